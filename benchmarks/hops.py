"""What the host does for a hop, and for a look at a sharding: Python alone, on tensors of a few bytes.

The loop of the library runs on a wire on which nothing is sent and everything has arrived, with visits that compute nothing.
What remains per hop is the plan being carried out: buffers made, batches posted, ranges named for the profiler.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import ringflash as rf
from ringflash.circulate import Cargo, Home, circulate
from ringflash.freight import Freight
from ringflash.guard import KEY_GRADIENTS, KEYS
from ringflash.wire import Message

_FEW, _MANY = 8, 24  # ranks: the difference is that of so many more hops


class Silent:
    """A wire on which nothing is sent and everything has arrived."""

    def __init__(self, ranks: int) -> None:
        self.rank, self.ranks = 0, ranks

    def warm_up(self, device: torch.device, channels: int = 1) -> None: ...

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], channel: int = 0, about: object = ""
    ) -> Silent:
        return self

    def wait(self) -> None: ...


def microseconds_per_hop(device: torch.device, calls: int = 200) -> dict[str, float]:
    """By pass: of a message onward and its visit, and in the backward also of a total on its way home."""
    return {
        "forward": (_loop(_MANY, device, False, calls) - _loop(_FEW, device, False, calls)) / (_MANY - _FEW),
        "backward": (_loop(_MANY, device, True, calls) - _loop(_FEW, device, True, calls)) / (_MANY - _FEW),
    }


def _loop(ranks: int, device: torch.device, backward: bool, calls: int) -> float:
    """Microseconds of one round of a ring on which every rank needs everything."""
    plan = rf.plan(rf.Sharding(8 * ranks, (0, ranks), rf.full, "contiguous", "ring"))
    cargo = tuple(torch.zeros(1, 8, 1, 8, device=device) for _ in range(2))

    def visit(shard: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return tensors if backward else None

    home = Home(KEY_GRADIENTS, Freight.like(cargo, torch.float32)) if backward else None
    return _microseconds(lambda: circulate(plan, Silent(ranks), Cargo(KEYS, cargo), visit, home), calls)


def microseconds_per_lookup(calls: int = 2000) -> dict[str, float]:
    """Of what a model asks a sharding that it holds: the same mask again, an equal one, another one it had, the plan."""
    offsets = list(range(0, 1 << 20, 1 << 11))
    packed, again = (rf.causal & rf.documents([*offsets, 1 << 20]) for _ in range(2))
    s = rf.Sharding(1 << 20, (0, 64), packed, "zigzag", "ring")
    s.with_mask(rf.causal)
    asked: dict[str, Callable[[], Any]] = {
        "with_mask, the same": lambda: s.with_mask(packed),
        "with_mask, an equal one": lambda: s.with_mask(again),
        "with_mask, one it had": lambda: s.with_mask(rf.causal),
        "plan": lambda: s.plan,
    }
    return {name: _microseconds(call, calls) for name, call in asked.items()}


def _microseconds(call: Callable[[], object], calls: int) -> float:
    """The median of some batches of calls, of one call, in time of the processor: others may want it too."""
    call()
    batch = max(1, calls // 20)
    times = []
    for _ in range(20):
        began = time.thread_time()
        for _ in range(batch):
            call()
        times.append(1e6 * (time.thread_time() - began) / batch)
    return statistics.median(times)
