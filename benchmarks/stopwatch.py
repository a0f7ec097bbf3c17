"""Time versions of one computation fairly: in turns, on data that no cache holds, on the device's own clock.

    round 1   ours(set 0)  flash(set 1)  cuDNN(set 2)  ...      the order is drawn anew in every round, so that a
    round 2   cuDNN(set 0) ours(set 1)   flash(set 2)  ...      slow second, or a warm neighbour, meets all alike

A GPU measures itself with events. The host must be ahead of it, or the gaps between kernels would be counted; unrelated
work at the start of every stretch gives the host that lead.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

_Result = TypeVar("_Result")

LEAST, MOST = 5, 60  # rounds
_STRETCH = 0.4  # seconds between two looks at the budget


class Budget:
    """Seconds that may still be spent. It began when the process did what it was asked, compilation included."""

    def __init__(self, minutes: float) -> None:
        self.began, self.seconds = time.monotonic(), 60 * minutes

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        return self.seconds - self.spent


class Stopwatch:
    """Milliseconds on ``device``, within ``budget``."""

    def __init__(self, device: torch.device, budget: Budget) -> None:
        self.device, self.budget = device, budget
        self._flush = torch.empty(1 << 28, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def in_turns(
        self, calls: Mapping[str, Callable[[int], object]], sets: int, seconds: float
    ) -> dict[str, list[float]]:
        """Call ``calls[name](set)`` in interleaved rounds for about ``seconds``; the milliseconds of each, by name.

        At least 5 rounds and at most 60; fewer, down to 2, if the budget ends first.
        """
        self._round(calls, list(calls), 0, sets)  # caches fill, clocks rise
        once = max(1e-6, sum(self._round(calls, list(calls), 1, sets).values()) / 1e3)
        rounds = int(min(max(LEAST, seconds / once), MOST, max(2, self.budget.left / once)))
        draw = random.Random(0)
        found: dict[str, list[float]] = {name: [] for name in calls}
        done = 0
        while done < rounds and (done < 2 or self.budget.left > 0):
            together = max(1, min(rounds - done, int(_STRETCH / once)))
            orders = [draw.sample(list(calls), len(calls)) for _ in range(together)]
            for name, milliseconds in self._stretch(calls, orders, done, sets):
                found[name].append(milliseconds)
            done += together
        return found

    def _round(
        self, calls: Mapping[str, Callable[[int], object]], order: Sequence[str], number: int, sets: int
    ) -> dict[str, float]:
        return dict(self._stretch(calls, [order], number, sets))

    def _stretch(
        self, calls: Mapping[str, Callable[[int], object]], orders: Sequence[Sequence[str]], done: int, sets: int
    ) -> list[tuple[str, float]]:
        turns = [name for order in orders for name in order]
        if self.device.type != "cuda":
            times = []
            for turn, name in enumerate(turns, done):
                start = time.perf_counter()
                calls[name](turn % sets)
                times.append(1e3 * (time.perf_counter() - start))
            return list(zip(turns, times, strict=True))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in turns]
        for _ in range(32):  # about two milliseconds
            self._flush.zero_()  # type: ignore[union-attr]
        for turn, (name, (began, ended)) in enumerate(zip(turns, events, strict=True), done):
            began.record()
            calls[name](turn % sets)
            ended.record()
        torch.cuda.synchronize(self.device)
        return [(name, began.elapsed_time(ended)) for name, (began, ended) in zip(turns, events, strict=True)]


class Laps:
    """Seconds of calls that follow from one another, so that they cannot take turns: each by itself, on the device's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(1 << 28, dtype=torch.int8, device=device) if device.type == "cuda" else None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: list[float] = []

    def lead(self) -> None:
        """Give a GPU a few milliseconds of other work, so that the host is ahead of it when the next calls come."""
        for _ in range(64 if self._flush is not None else 0):
            self._flush.zero_()  # type: ignore[union-attr]

    def time(self, call: Callable[[], _Result]) -> _Result:
        """Call it, and remember how long that took."""
        if self._flush is None:
            start = time.perf_counter()
            result = call()
            self._seconds.append(time.perf_counter() - start)
            return result
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        result = call()
        ended.record()
        self._events.append((began, ended))
        return result

    def take(self) -> list[float]:
        """The seconds of all calls since this was last asked; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
        found = self._seconds + [began.elapsed_time(ended) / 1e3 for began, ended in self._events]
        self._seconds, self._events = [], []
        return found


def quantiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """What is reported of many times."""
    p5, p50, p95 = np.percentile(milliseconds, (5, 50, 95))
    return {"p5": float(p5), "p50": float(p50), "p95": float(p95), "least": min(milliseconds)}
