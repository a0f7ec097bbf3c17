"""A run of benchmarks: where it computes, what it may spend, what it has found; and how one version is run once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from exact import NAMES
from peers import PEERS, Attention, Problem, ringflash
from record import Journal
from stopwatch import Budget, Stopwatch
from torch import Tensor

OURS = "ringflash"

Record = dict[str, Any]


@dataclass
class Bench:
    """One run. ``backend`` is ringflash's; every measurement's share of seconds is multiplied by ``haste``."""

    device: torch.device
    backend: str
    budget: Budget
    journal: Journal
    peers: tuple[str, ...] = tuple(PEERS)
    haste: float = 1.0
    matmul: float | None = field(default=None, init=False)
    """TFLOP/s of a large product, once it is measured."""

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.device, self.budget)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def attention(self, name: str, problem: Problem) -> Attention:
        """The version of this name, ready for ``problem``; raises ``Unfit`` if it has nothing for it."""
        if name == OURS:
            return ringflash(problem, self.backend)
        return PEERS[name](problem, self.device)

    def inputs(self, problem: Problem, seed: int) -> tuple[Tensor, ...]:
        """Random q, k, v that want gradients, and dout."""
        *leaves, dout = problem.inputs(self.device, seed)
        return (*(x.requires_grad_() for x in leaves), dout)

    def sets(self, problem: Problem) -> list[tuple[Tensor, ...]]:
        """So many inputs that no level-2 cache holds them all; at least two."""
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.cuda else 0
        size = 2 * problem.batch * problem.length * problem.head_dim * (problem.heads + problem.kv_heads)
        wanted = math.ceil(3 * cache / (size * problem.dtype.itemsize))
        return [self.inputs(problem, seed) for seed in range(max(2, min(8, wanted)))]

    def try_once(self, attention: Attention, inputs: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], Record]:
        """Out and gradients, and the bytes that each pass takes at its peak beyond what stood before it."""
        q, k, v, dout = inputs
        out, forward = self._peak(lambda: attention(q, k, v))
        grads, backward = self._peak(lambda: torch.autograd.grad(out, (q, k, v), dout))
        return dict(zip(NAMES, (out.detach(), *grads), strict=True)), {"forward": forward, "backward": backward}

    def _peak(self, call: Callable[[], Any]) -> tuple[Any, int | None]:
        if not self.cuda:
            return call(), None
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call()
        return result, torch.cuda.max_memory_allocated(self.device) - before

    def alive(self) -> bool:
        """After an illegal access nothing on a GPU works again in this process."""
        try:
            if self.cuda:
                torch.cuda.synchronize(self.device)
        except Exception:
            return False
        return True


@dataclass(frozen=True)
class Case:
    """A measurement with a name, and the seconds that it takes at the very least."""

    name: str
    run: Callable[[Bench], Iterable[Record]]
    seconds: float = 1.0
    problem: Problem | None = None


def reason(error: BaseException) -> str:
    """An exception as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def all_right(verdict: dict[str, dict[str, float | bool]]) -> bool:
    """Is every result right?"""
    return all(bool(part["right"]) for part in verdict.values())
