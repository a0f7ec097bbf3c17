"""Looks after transfers that only a GPU waits for.

Waiting for a transfer on NCCL returns at once: the stream waits, and a rank that never comes shows as a device that stands
still, in whatever call the host happens to need it next. So one thread of this process keeps a list of what is under way,
asks now and then whether it is done, and when the time is up says on stderr what would have been raised: the hop, the peer,
its host. It cannot raise in a thread that sits in a CUDA call, and it ends nothing: aborting the communicator would let the
stream go on with half a message. The next exchange raises the same, if the host comes that far; else torch's own watchdog
ends the process, at the group's time-out, which is later.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

PERIOD = 1.0  # seconds between two looks


class Work(Protocol):
    def is_completed(self) -> bool: ...


@dataclass
class Watch:
    """What is under way, and until when. ``now`` is a clock in seconds."""

    now: Callable[[], float] = time.monotonic
    _under_way: list[tuple[float, Work, Callable[[], None]]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def add(self, work: Work, seconds: float, overdue: Callable[[], None]) -> None:
        """Call ``overdue()`` once, in another thread, unless ``work`` is completed in so many seconds."""
        with self._lock:
            self._under_way.append((self.now() + seconds, work, overdue))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look_after, name="ringflash watch", daemon=True)
                self._thread.start()

    def look(self) -> int:
        """Forget what is completed, report what is overdue; returns how much is left under way."""
        with self._lock:
            still, late = [], []
            for deadline, work, overdue in self._under_way:
                if work.is_completed():
                    continue
                if self.now() < deadline:
                    still.append((deadline, work, overdue))
                else:
                    late.append(overdue)
            self._under_way = still
        for overdue in late:
            overdue()
        return len(still)

    def _look_after(self) -> None:
        while True:
            time.sleep(PERIOD)
            try:
                self.look()
            except Exception as error:  # a group that was destroyed: what it had under way is nobody's any more
                print(f"ringflash: the watch over transfers met {error!r}", file=sys.stderr, flush=True)
                with self._lock:
                    self._under_way = []


watch = Watch()
