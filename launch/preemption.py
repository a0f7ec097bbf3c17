"""Being told to stop: SIGTERM (preemption, a launcher that ends) and SIGUSR1 (Slurm's --signal, some time before the end).

A signal reaches ranks at different moments, some ranks never; all must stop after the same step. So it only sets a flag,
the flags meet in the small all-reduce at the end of a step, and whoever has one stops all:

    rank 0   step 7 ............... | step 8 ......... | flags 0, 15 -> 15 | checkpoint, exit
    rank 1   step 7 .... SIGTERM .. | step 8 ......... | flags 0, 15 -> 15 | checkpoint, exit

Signals are read by a thread: while the main thread waits inside a collective, Python would run no handler of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ECHO = 5.0
"""Seconds in which a second SIGTERM is the first one again: Slurm tells a launcher and its processes, and the launcher tells
the processes too."""
_before: dict[signal.Signals, Any] = {}  # what signals did before, while somebody listens


class Preemption:
    """What this process has been told; ``asked`` is the number of the signal, 0 for none."""

    def __init__(self) -> None:
        self.asked = 0
        self._since = 0.0

    def told(self, number: int) -> None:
        """A signal has come. A second SIGTERM ends the process at once, unless it is the echo of the first."""
        if number not in SIGNALS:
            return
        now = time.monotonic()
        if number == signal.SIGTERM and self.asked == signal.SIGTERM and now - self._since > ECHO:
            print("a second SIGTERM: ends at once, without a checkpoint", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGTERM)
        if self.asked != signal.SIGTERM:
            self.asked, self._since = number, now


@contextlib.contextmanager
def listen() -> Iterator[Preemption]:
    """Within it both signals are noted, and do nothing else (main thread only); afterwards they do what they did before."""
    preemption = Preemption()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(target=_read, args=(reader, preemption), name="signals", daemon=True)
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread.start()
    _before.update(handlers)
    try:
        yield preemption
    finally:
        _before.clear()
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


def _forget() -> None:
    """In a forked process (a worker that loads data): what it is told is for itself, and ends it as before."""
    if _before:
        signal.set_wakeup_fd(-1)
        for number, handler in _before.items():
            signal.signal(number, handler)


os.register_at_fork(after_in_child=_forget)


def _read(reader: socket.socket, preemption: Preemption) -> None:
    while received := reader.recv(64):
        for number in received:
            preemption.told(number)
