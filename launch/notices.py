"""What one rank does while the others wait, and what ranks tell each other outside of collectives.

Writing a checkpoint or tokenizing a library takes rank 0 as long as it takes. Ranks that wait in a collective meanwhile run
into the time-out of their group; and if rank 0 fails, they wait for nothing. So they wait at the store of the launcher:

    rank 0     work ... sign of life ... sign of life ... done: {"value": 7}, or {"error": "OSError: ..."}
    others     wait until rank 0 says how it ended, or has given no sign of life for ``patience`` seconds

Notices are JSON: nothing is pickled. They are deleted when all have read them.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from run_options import UsageError

SIGN = 2.0  # seconds between two signs of life
PATIENCE = 600.0  # seconds without one


class Notices:
    """The ranks of a run at their store. Every rank must call the same methods in the same order."""

    def __init__(self, store: dist.Store, rank: int, size: int, patience: float = PATIENCE) -> None:
        self._store, self._rank, self._size, self._patience = store, rank, size, patience
        self._calls = 0

    def once(self, what: str, work: Callable[[], Any]) -> Any:
        """What ``work`` returns on rank 0, which alone calls it; a plain value, as JSON has them.

        If ``work`` raises, rank 0 raises that, and every other rank an error with its text: a ``UsageError`` if it was one,
        else a ``RuntimeError``. ``what`` is for messages.
        """
        if self._size == 1:
            return work()
        self._calls += 1
        key = f"{self._calls}/{what}"
        if self._rank > 0:
            return self._read(key, what)
        notice: dict[str, Any] = {"error": "it was interrupted"}
        try:
            with self._signs_of_life():
                notice = {"value": work()}
        except Exception as error:
            known = isinstance(error, UsageError)
            notice = {"error": str(error) if known else f"{type(error).__name__}: {error}", "usage": known}
            raise
        finally:
            self._store.set(key, json.dumps(notice))
        return notice["value"]

    def collect(self, what: str, mine: Any) -> list[Any]:
        """Every rank's plain value, by rank, on every rank."""
        if self._size == 1:
            return [mine]
        key = f"{self._calls + 1}/{what}"
        self._store.set(f"{key}/{self._rank}", json.dumps(mine))
        return self.once(what, lambda: [self._take(f"{key}/{rank}", rank, what) for rank in range(self._size)])

    def _take(self, key: str, rank: int, what: str) -> Any:
        began = time.monotonic()
        while not self._store.check([key]):  # to wait at the store would keep the signs of life from it
            if time.monotonic() - began > self._patience:
                raise RuntimeError(f"rank {rank} did not say {what!r} within {self._patience:g} s")
            time.sleep(0.01)
        value = json.loads(self._store.get(key))
        self._store.delete_key(key)
        return value

    def _read(self, key: str, what: str) -> Any:
        self._wait(key, what)
        notice = json.loads(self._store.get(key))
        if self._store.add(f"{key}/read", 1) == self._size - 1:
            self._store.delete_key(key)
            self._store.delete_key(f"{key}/read")
        if "value" in notice:
            return notice["value"]
        if notice.get("usage"):
            raise UsageError(notice["error"])
        raise RuntimeError(f"{what}: rank 0 failed: {notice['error']}")

    def _wait(self, key: str, what: str) -> None:
        signs, heard = -1, time.monotonic()
        while True:
            with contextlib.suppress(dist.DistStoreError):  # not there yet
                self._store.wait([key], timedelta(seconds=SIGN))
                return
            now = self._store.add("signs", 0)
            if now != signs:
                signs, heard = now, time.monotonic()
            if time.monotonic() - heard > self._patience:
                raise RuntimeError(
                    f"{what}: rank 0 has given no sign of life for {self._patience:g} s; is it stopped, or its disk stuck?"
                )

    @contextlib.contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        done = threading.Event()

        def give() -> None:
            while not done.wait(SIGN):
                self._store.add("signs", 1)

        thread = threading.Thread(target=give, name="signs of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
