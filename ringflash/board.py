"""Notes that the ranks of a group leave for each other, beside the tensors that they send.

A board is the group's key-value store, seen by one rank: small texts, no collective, nothing that could pair with a message
of somebody else. Ranks compare what they are about to do there (``accord.py``), and say there why they stop:

    rank 2 waits for rank 1, in vain            a line on the board, and a moment for others to write theirs
    rank 0 lost rank 1: connection closed       a line before it
    what both raise                             their own trouble, whose line came first, and who has not written any

Texts are JSON with capped sizes, never pickle: the store is open to the network that the job runs in (SECURITY.md).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

LONGEST = 1 << 20  # bytes of a note: 1,000 ranks that all differ
_LINE, _MOST = 1000, 32  # characters of a line about a failure, and lines of one rank
_MOMENT = 1.5  # seconds that ranks give each other to say what happened to them
_FAILURES, _WAITING = "ringflash/failures{}", "ringflash/waiting{}/{}"


class Store(Protocol):
    """What a board needs of a store; those of ``torch.distributed`` have it."""

    def set(self, key: str, value: str, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def delete_key(self, key: str, /) -> Any: ...


class Board(Protocol):
    """The notes of ``ranks`` ranks, of which this is number ``rank``."""

    rank: int
    ranks: int
    seconds: float
    """How long a rank waits for others before it gives up."""
    session: str
    """The name of this attempt, once ranks have one."""

    def post(self, key: str, note: str) -> None:
        """Leave a note under a key."""

    def read(self, keys: Sequence[str]) -> list[str]:
        """The notes under keys that are all there."""

    def missing(
        self, keys: Sequence[str], seconds: float, what: str, meanwhile: Callable[[], None] | None = None
    ) -> list[str]:
        """Wait until there are notes under all ``keys``, for so long at most; those that are not there.

        ``meanwhile`` is done at every look, so that others can go on whom they wait for.
        """

    def remove(self, keys: Sequence[str]) -> None:
        """Take notes away; whether they are there or not."""

    def waiting(self, what: str) -> None:
        """Say what this rank waits for, before it gives up; "" if it does no longer."""

    def report(self, trouble: str) -> None:
        """Tell the others why this rank stops, and do not wait for them."""

    def distress(self, trouble: str) -> str:
        """Tell the others why this rank stops; returns what they have told, in sentences to be put behind its own."""


@dataclass
class StoreBoard:
    """A board on a store. ``name`` is what people know a rank by: its number in the world, and its host."""

    store: Store
    rank: int
    ranks: int
    seconds: float
    name: Callable[[int], str] = "rank {}".format
    session: str = ""
    """Of which lines are read: a store may hold those of processes that have died."""
    _reported: int = 0

    def post(self, key: str, note: str) -> None:
        if len(note) > LONGEST:
            raise ValueError(f"a note of {len(note):,} characters under {key!r}; {LONGEST:,} are allowed")
        self.store.set(key, note)

    def read(self, keys: Sequence[str]) -> list[str]:
        many = getattr(self.store, "multi_get", None)
        if many is not None and len(keys) > 1 and self.store.has_extended_api():  # type: ignore[attr-defined]
            notes = many(list(keys))
        else:
            notes = [self.store.get(key) for key in keys]
        for key, note in zip(keys, notes, strict=True):
            if len(note) > LONGEST:
                raise ValueError(f"a note of {len(note):,} bytes under {key!r}; {LONGEST:,} are allowed")
        return [note.decode() for note in notes]

    def missing(
        self, keys: Sequence[str], seconds: float, what: str, meanwhile: Callable[[], None] | None = None
    ) -> list[str]:
        """Looks rarely if it waits long: a thousandth of a second at first, then after a tenth of the time waited."""
        began = time.monotonic()
        while keys and not self.store.check(list(keys)):
            waited = time.monotonic() - began
            if waited > seconds or not seconds:
                return self._absent(list(keys))
            if meanwhile is not None:
                meanwhile()
            time.sleep(min(max(waited / 10, 0.0002), 0.25, seconds))
        return []

    def remove(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.store.delete_key(key)

    def waiting(self, what: str) -> None:
        if what:
            self.post(self._waiting(self.rank), what[:_LINE])
        else:
            self.remove([self._waiting(self.rank)])

    def report(self, trouble: str) -> None:
        if self._reported == _MOST:  # of somebody who goes on after every error
            return
        self._reported += 1
        line = json.dumps({"rank": self.rank, "at": time.time(), "trouble": trouble[:_LINE]})
        self.store.append(self._failures, line + "\n")  # type: ignore[attr-defined]  # torch's stubs leave it out

    def distress(self, trouble: str) -> str:
        try:
            self.report(trouble)
            began = time.monotonic()
            while len(lines := self._lines()) < self.ranks and time.monotonic() - began < _MOMENT:
                time.sleep(0.05)
            silent = sorted(set(range(self.ranks)) - {x["rank"] for x in lines})
            waiting = {rank: key for rank in silent[:8] if self.store.check([key := self._waiting(rank)])}
            lines += [
                {"rank": rank, "trouble": f"waits for {printable(self.store.get(key).decode(errors='replace'))}"}
                for rank, key in waiting.items()
            ]
        except (RuntimeError, ValueError) as error:  # the store died with the rank that held it
            why = str(error).partition("\n")[0]
            return f" The store is gone, which rank 0 holds unless a launcher does, so nobody could be asked ({why})."
        told = [x for x in lines if x["rank"] != self.rank]
        silent = [rank for rank in silent if rank not in waiting]
        text = ""
        if told:
            text += f" What others said, the earliest first: {'; '.join(self._spell(x) for x in told[:4])}."
        if silent:
            text += f" Nothing has been heard of {', '.join(map(self.name, silent[:8]))}."
        return text

    @property
    def _failures(self) -> str:
        return _FAILURES.format(self.session and f"/{self.session}")

    def _waiting(self, rank: int) -> str:
        return _WAITING.format(self.session and f"/{self.session}", rank)

    def _lines(self) -> list[dict[str, Any]]:
        """The last line of each rank, in the order in which they were written, but for those of an earlier trouble."""
        newest: dict[int, dict[str, Any]] = {}
        if not self.store.check([self._failures]):
            return []
        for text in self.store.get(self._failures)[-LONGEST:].decode(errors="replace").splitlines():
            try:
                line = json.loads(text)
                line = {"rank": int(line["rank"]), "at": float(line["at"]), "trouble": printable(line["trouble"])}
            except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
                continue
            if line["rank"] not in range(self.ranks) or not math.isfinite(line["at"]):
                continue
            newest.pop(line["rank"], None)
            newest[line["rank"]] = line
        last = max((x["at"] for x in newest.values()), default=0)
        return [{**x, "before": last - x["at"]} for x in newest.values() if x["at"] >= last - 2 * self.seconds - 10]

    def _spell(self, line: dict[str, Any]) -> str:
        before = f", {line['before']:.0f} s before" if line.get("before", 0) >= 1 else ""
        return f"{self.name(line['rank'])}{before}: {line['trouble'].rstrip('.')}"

    def _absent(self, keys: list[str]) -> list[str]:
        """Those of ``keys`` that are not there, by halves: a store says whether all of some are."""
        if self.store.check(keys):
            return []
        if len(keys) == 1:
            return keys
        half = len(keys) // 2
        return self._absent(keys[:half]) + self._absent(keys[half:])


def printable(text: object) -> str:
    """What somebody has written, for a terminal: no codes that move its cursor, and not too long."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:_LINE])
