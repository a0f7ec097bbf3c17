"""Ranks agree on what they are about to do, before anything of it is sent.

A call of one rank is a set of short texts: its name, the sharding's terms, shapes, dtypes, options. What is new is compared
once, through the board of the group:

    every rank    posts its texts under a key of its own
    rank 0        reads them all, posts one verdict: which texts, and of which ranks each
    every rank    reads the verdict, and raises if there is more than one text, or a rank is missing

so a thousand ranks cost one read, and errors are raised on all of them, which name ranks and fields. What ranks have agreed on
is remembered, and costs a look into a table. The table is the same on all ranks, since all that enters it was compared: so all
of them find a call in it, or none does, unless one of them does something else than the others.

    rank 0, 2    call 7, as agreed     wait for rank 1 in a hop         "rank 1 is about to start something else: k dtype ..."
    rank 1       call 7, in float16    waits for rank 0 to compare      "call 7, which is new here: query: ... float16 ..."

A grid of ranks has a board along each axis: what a row has found out is compared along the columns, so everybody learns of
everybody.

A launcher that restarts processes may keep its store, and in it the notes of those that died. So before the first comparison
rank 0 draws a name for all notes to come, and gives it to whoever shows a number that cannot be from earlier.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from ringflash.board import Board
from ringflash.check import Check
from ringflash.errors import DisagreementError, IntegrityError, NonFiniteError, PeerError, RingflashError
from ringflash.groups import Grid, Group, address, boards, connect_all
from ringflash.guard import Guard, Unread
from ringflash.terms import HIDDEN, Terms

_MOST = 1024  # calls and shardings that are remembered
_KINDS = 64  # different texts that a verdict tells apart
_SOON = 1.0  # seconds after which a rank that waits says so
_GRACE = 1.0  # seconds that a verdict may take longer than the notes


_NUMBER = re.compile(r"[0-9a-f]{32}")
_GARBLED = "garbled"  # in place of texts: what is wrong with a note


Survey = dict[str, list[int]]
"""For each text that was posted, the ranks that posted it."""


class Accord:
    """What the ranks of one group have agreed on. Each rank has its own; made by :func:`accord_of`."""

    def __init__(self, group: Group) -> None:
        self.rank, self.ranks = address(group)
        self.everyone = connect_all(group)
        self.unread: Unread = deque()
        """What was written down on the device in earlier calls: raises if it is wrong, returns whether it could be read."""
        self._levels = [(board, members) for board, members in boards(group) if board.ranks > 1]
        self._sessions: dict[int, _Session] = {}  # by level
        self._calls = self._round = 0
        self._agreed: dict[Hashable, None] = {}
        self._last: dict[str, dict[str, str]] = {}
        self._guards: dict[str, Guard] = {}

    def recall(self, key: Hashable, digest: str) -> int:
        """The number of a call that all ranks have agreed on before; 0 if they have not."""
        if self.unread:
            self._read()
        if key in self._agreed and digest in self._agreed:
            self._calls += 1
            return self._calls
        return 0

    def enter(
        self,
        name: str,
        key: Hashable,
        terms: Terms | None,
        texts: Mapping[str, str],
        every_call: bool = False,
        fault: str = "",
    ) -> int:
        """The number of this call, once all ranks are known to make it.

        ``key`` stands for ``texts``, which is compared if it is new; neither holds anything that may differ between ranks.
        ``fault``: this rank cannot go on, for this reason, which is then raised on all ranks (``every_call`` only).
        Raises :class:`DisagreementError`, or :class:`PeerError` if a rank does not come.
        """
        self._read()
        self._calls += 1
        digest = None if terms is None else terms.digest
        if key not in self._agreed or digest not in self._agreed or every_call:
            self._compare(name, {**texts, **({} if terms is None else terms.texts)}, fault)
            for new in (key, digest):
                self._agreed[new] = None
            while len(self._agreed) > _MOST:  # the oldest: in the same order on all ranks
                del self._agreed[next(iter(self._agreed))]
        return self._calls

    def guard(self, check: Check, number: int, name: str, digest: int) -> Guard:
        """What accompanies the messages of a call. Where it labels none it only knows what the call is, and serves again."""
        if check.labels:
            return Guard(check, number, name, digest, self.rank, self.ranks, self.unread, self._report)
        guard = self._guards.get(name)
        if guard is None:
            guard = self._guards[name] = Guard(check, number, name, digest, self.rank, self.ranks)
        guard.call = number
        return guard

    def _report(self, trouble: str) -> None:
        with contextlib.suppress(RuntimeError):  # the store may be gone
            for board, _ in self._levels:
                board.report(trouble)

    def _read(self) -> None:
        while self.unread and self.unread[0]():
            self.unread.popleft()

    def _compare(self, name: str, texts: Mapping[str, str], fault: str) -> None:
        mine = {"call": f"{self._calls} ({name})", **texts, "fault": fault}
        self._round += 1
        known: Survey = {json.dumps(mine): [self.rank]}
        for level, (board, members) in enumerate(self._levels):
            session = self._sessions.setdefault(level, _Session(board, f"ringflash/{len(self._levels)}"))
            try:
                known, absent = _survey(session, members, self._round, known, self._waits_for(mine))
            except RingflashError:
                raise
            except ValueError as error:
                told = board.distress(f"could not read what others left to compare call {mine['call']}: {error}")
                raise IntegrityError(f"{self._me}: call {mine['call']} is not made: {error}.{told}") from error
            except RuntimeError as error:
                told = board.distress(f"could not compare call {mine['call']}: {error}")
                raise PeerError(f"{self._me}: ranks could not compare call {mine['call']}: {error}.{told}") from error
            if absent:
                raise self._left_alone(board, absent, mine)
        found = [(_texts(note), ranks) for note, ranks in known.items()]
        odd = [f"{_ranks(ranks)} left {x[_GARBLED]}" for x, ranks in found if _GARBLED in x]
        if odd:
            raise IntegrityError(
                f"{self._me}: call {mine['call']} is not made: {'; '.join(odd)}; who else writes to this store?"
            )
        faults = [f"rank {rank}: {x['fault']}" for x, ranks in found for rank in sorted(ranks) if x.get("fault")]
        if faults:
            raise NonFiniteError(f"{self._me}: call {mine['call']} is not made. {'; '.join(faults[:8])}")
        if len(found) > 1:
            raise DisagreementError(f"{self._me}: ranks disagree on call {mine['call']}: {_differences(found)}")
        self._last[name] = mine

    def _waits_for(self, mine: dict[str, str]) -> str:
        """What this rank would say of its waiting."""
        name = mine["call"].partition(" ")[2].strip("()")
        agreed = self._last.get(name)
        if agreed is None:
            return f"all ranks to compare call {mine['call']}, the first of its kind"
        news = _differences([({**mine, "call": ""}, [self.rank]), ({**agreed, "call": ""}, [])], "as agreed before")
        return f"all ranks to compare call {mine['call']}" + (f", which is new to it: {news}" if news else "")

    def _left_alone(self, board: Board, absent: list[int], mine: dict[str, str]) -> PeerError:
        waited = self._waits_for(mine)
        told = board.distress(f"waited for {waited}; {_ranks(absent)} did not come")
        others = "go on with what was agreed, or are" if "new to it" in waited else "are"
        return PeerError(
            f"{self._me}: {_ranks(absent)} did not come within {board.seconds:g} s; this rank waits for {waited}. They "
            f"{others} dead, stopped, far behind or have left this call out: their own output says what they do; if they are "
            f"only slow, raise RINGFLASH_TIMEOUT.{told}"
        )

    @property
    def _me(self) -> str:
        return f"ringflash, rank {self.rank} of {self.ranks}"


def accord_of(group: Group) -> Accord:
    """The accord of a resolved group, the same at every call."""
    if isinstance(group, tuple):
        return Accord(group)
    outer, inner = (group.ring, group.heads) if isinstance(group, Grid) else (group, None)
    accords = _accords.setdefault(outer, {})
    if inner not in accords:
        accords[inner] = Accord(group)
    return accords[inner]


def tell(group: Group, error: Exception) -> None:
    """Let the other ranks of a group know why this one does not come to the next call, if nothing told them yet."""
    if isinstance(error, RingflashError) or isinstance(group, tuple):
        return
    with contextlib.suppress(RuntimeError, ValueError):  # the store may be gone, or the time-out no number
        for board, _ in boards(group):
            board.report(f"{type(error).__name__}: {error}")


_accords: weakref.WeakKeyDictionary[Any, dict[Any, Accord]] = weakref.WeakKeyDictionary()


class _Session:
    """The name of the notes of this attempt: drawn by rank 0, the same on all ranks of a board.

    The others leave a number under ``here/rank``; what rank 0 leaves under ``answer/number`` is meant for nobody else.
    """

    def __init__(self, board: Board, root: str) -> None:
        self.board, self._root, self._answered = board, root, set[str]()
        self.here = f"{root}/here/{board.rank}"
        self.name = ""
        if board.rank == 0:
            self._take(uuid.uuid4().hex)

    def join(self, what: str) -> bool:
        """Learn the name; False if rank 0 did not tell it in time."""
        board = self.board
        if not self.name:
            number = uuid.uuid4().hex
            answer = f"{self._root}/answer/{number}"
            board.post(self.here, number)
            if _await(board, [answer], board.seconds + _GRACE, what):
                return False
            self._take(*board.read([answer]))
            board.remove([answer])
        return True

    def _take(self, name: str) -> None:
        self.name = name
        self.board.session = self.board.session or name

    def admit(self) -> None:
        """Of rank 0: tell the name to whoever asks."""
        here = [f"{self._root}/here/{rank}" for rank in range(1, self.board.ranks)]
        gone = set(self.board.missing(here, 0, ""))
        for number in set(self.board.read([key for key in here if key not in gone])) - self._answered:
            if _NUMBER.fullmatch(number):  # perhaps still that of a process that has died
                self.board.post(f"{self._root}/answer/{number}", self.name)
            self._answered.add(number)

    def key(self, number: int, of: object) -> str:
        return f"{self._root}/{self.name}/{number}/{of}"


def _survey(
    session: _Session, members: Sequence[Sequence[int]], number: int, known: Survey, what: str
) -> tuple[Survey, list[int]]:
    """What all ranks of a board know together, and those of them that did not come.

    ``members[i]`` are the ranks for which the board's rank i speaks. Notes are taken away when they have been read.
    """
    board = session.board
    if not session.join(what):
        return known, list(members[0])
    keys, verdict = [session.key(number, rank) for rank in range(board.ranks)], session.key(number, "verdict")
    board.post(keys[board.rank], json.dumps(known))
    if board.rank == 0:
        absent = _await(board, keys, board.seconds, what, session.admit if number == 1 else None)
        together: Survey = {}
        came = [rank for rank, key in enumerate(keys) if key not in absent]
        for rank, note in zip(came, board.read([keys[rank] for rank in came]), strict=True):
            for text, ranks in _told_by(members[rank], note).items():
                if text in together or len(together) < _KINDS:
                    together.setdefault(text, []).extend(ranks)
        missing = [rank for key, ranks in zip(keys, members, strict=True) if key in absent for rank in ranks]
        board.post(verdict, json.dumps({"known": together, "absent": missing}))
        board.remove([keys[0], session.key(number - 1, "verdict")])  # who came has read the verdict of the last round
        return together, missing
    if _await(board, [verdict], board.seconds + _GRACE, what):
        absent = board.missing(keys, 0, what) or keys[:1]  # all have come, and rank 0 did not judge
        return known, [rank for key, ranks in zip(keys, members, strict=True) if key in absent for rank in ranks]
    (note,) = board.read([verdict])
    board.remove([keys[board.rank], *([session.here] if number == 1 else [])])  # nobody reads them any more
    return _judgement(note, max(map(max, members)) + 1)


def _await(
    board: Board, keys: list[str], seconds: float, what: str, meanwhile: Callable[[], None] | None = None
) -> list[str]:
    """As ``Board.missing``; a rank that waits for long says so."""
    soon = min(_SOON, seconds)
    absent = board.missing(keys, soon, what, meanwhile)
    if not absent:
        return []
    board.waiting(what)
    absent = board.missing(keys, seconds - soon, what, meanwhile)
    if not absent:
        board.waiting("")
    return absent


def _told_by(speaks_for: Sequence[int], note: str) -> Survey:
    """What a rank has written about itself, or others that it speaks for; that it is garbled is told on, to all."""
    try:
        survey = _survey_of(_json(note), range(max(speaks_for) + 1))
    except ValueError as error:
        return {json.dumps({_GARBLED: str(error)}): list(speaks_for)}
    return survey


def _judgement(note: str, ranks: int) -> tuple[Survey, list[int]]:
    """A verdict as rank 0 has written it; of anything else ``ValueError``."""
    judged = _json(note)
    if not isinstance(judged, dict) or judged.keys() != {"known", "absent"}:
        raise ValueError(_no_survey(judged))
    absent = _survey_of({"{}": judged["absent"]}, range(ranks))
    return _survey_of(judged["known"], range(ranks)), absent["{}"]


def _survey_of(found: object, ranks: range) -> Survey:
    """A survey that came as JSON; of anything else ``ValueError``."""
    if not isinstance(found, dict):
        raise ValueError(_no_survey(found))
    for text, who in found.items():
        _texts(text)
        if not isinstance(who, list) or not all(type(rank) is int and rank in ranks for rank in who):
            raise ValueError(_no_survey(found))
    return found


def _texts(text: str) -> dict[str, str]:
    found = _json(text)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(_no_survey(found))
    return found


def _json(note: str) -> object:
    try:
        return json.loads(note)
    except (ValueError, RecursionError):
        raise ValueError(_no_survey(note)) from None


def _no_survey(note: object) -> str:
    return f"a note that is no survey, {ascii(note)[:80]}"


def _differences(found: Sequence[tuple[Mapping[str, str], Sequence[int]]], nobody: str = "nobody") -> str:
    """Every field that is not the same in all, with who has what.

    >>> _differences([({"dtype": "bfloat16", "heads": "8"}, [0, 2]), ({"dtype": "float16", "heads": "8"}, [1])])
    'dtype: bfloat16 on ranks 0, 2 and float16 on rank 1'
    """
    names = list(dict.fromkeys(name for texts, _ in found for name in texts))
    parts: dict[str, str] = {}
    for name in names:
        if name.removesuffix(HIDDEN) in parts:
            continue
        values: dict[str, list[int]] = {}
        for texts, ranks in found:
            values.setdefault(texts.get(name, "nothing"), []).extend(ranks)
        if len(values) > 1:
            who = (
                f"{text or 'nothing'} {f'on {_ranks(ranks)}' if ranks else nobody}" for text, ranks in values.items()
            )
            parts[name] = f"{name.replace(HIDDEN, ' (by digest)')}: {' and '.join(who)}"
    more = "; further differences are left out" if len(found) >= _KINDS else ""
    return "; ".join(parts.values()) + more


def _ranks(ranks: Sequence[int]) -> str:
    """Some ranks in words, few of many.

    >>> _ranks([1]), _ranks([4, 0, 2])
    ('rank 1', 'ranks 0, 2, 4')
    """
    shown = sorted(ranks)
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return f"{'rank' if len(shown) == 1 else 'ranks'} {', '.join(map(str, shown[:8]))}{more}"
