"""Looks after transfers that only a GPU waits for.

Waiting for a transfer on NCCL returns at once: the stream waits, and a rank that never comes shows as a device that stands
still, in whatever call the host happens to need it next. So one thread of this process keeps a list of what is under way,
and when the time of one is up and it is not done, says on stderr what would have been raised: the hop, the peer,
its host. It cannot raise in a thread that sits in a CUDA call, and it ends nothing: aborting the communicator would let the
stream go on with half a message. The next exchange raises the same, if the host comes that far; else torch's own watchdog
ends the process, at the group's time-out, which is later.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

PERIOD = 1.0  # seconds between two looks


class Work(Protocol):
    def is_completed(self) -> bool: ...


@dataclass
class Watch:
    """What is under way, and until when. ``now`` is a clock in seconds.

    The thread asks a work only when its time is up: asking is a call of CUDA, which another thread may not make while a graph
    is captured. Whoever adds one forgets those before it that are done.
    """

    now: Callable[[], float] = time.monotonic
    _under_way: deque[tuple[float, Work, Callable[[], None]]] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def add(self, work: Work, seconds: float, overdue: Callable[[], None]) -> None:
        """Call ``overdue()`` once, in another thread, unless ``work`` is completed in so many seconds."""
        with self._lock:
            while self._under_way and _is_over(self._under_way[0][1]):
                self._under_way.popleft()
            self._under_way.append((self.now() + seconds, work, overdue))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look_after, name="ringflash watch", daemon=True)
                self._thread.start()

    def look(self) -> None:
        """Report what is overdue."""
        with self._lock:
            late = [entry for entry in self._under_way if self.now() >= entry[0]]
            self._under_way = deque(entry for entry in self._under_way if self.now() < entry[0])
        for _, work, overdue in late:
            if not _is_over(work):
                overdue()

    def _look_after(self) -> None:
        while True:
            time.sleep(PERIOD)
            try:
                self.look()
            except Exception as error:  # while it was told: the next look is at the others
                print(f"ringflash: the watch over transfers met {error!r}", file=sys.stderr, flush=True)


def _is_over(work: Work) -> bool:
    """Completed; or of a group that was destroyed, whose transfers are nobody's any more."""
    try:
        return work.is_completed()
    except RuntimeError:
        return True


watch = Watch()
