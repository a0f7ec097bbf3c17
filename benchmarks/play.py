"""One device plays every rank of a ring in turn, with real tensors: what each visit computes and takes, and no messages.

    rank 0   [ shard 0 ][ shard 3 ][ shard 2 ][ shard 1 ]
    rank 1                                               [ shard 1 ][ shard 0 ] ...          each visit timed alone

What would have come by message is cut out of the whole sequence, outside of the time that is measured. Results are put
together over all ranks and compared with one device on the whole sequence, or nothing is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from links import Played
from stopwatch import Budget, Laps
from torch import Tensor

import ringflash as rf
from ringflash.backend import select
from ringflash.intervals import intervals_of
from ringflash.partial import Partial, accumulation_dtype, owned
from ringflash.plan import Plan
from ringflash.reference import Scoring

NAMES = ("out", "dq", "dk", "dv")
PASSES = ("forward", "backward")
LEAST, MOST = 3, 30  # rounds
ALLOWED = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative distance between a ring and one device: both round results, weights and their gradients to this dtype."""

_BLOCK = 64  # positions; a lost visit may drown in the whole, and stands out in its block
_BLOCK_ALLOWED = 5  # times as much


@dataclass
class Heard:
    """Seconds by pass, rank and visit, of each round; ``extra`` is what a rank computes before its first visit.

    ``peaks`` are the bytes by pass and rank that a GPU held at most beyond what stood there before; empty on a CPU.
    """

    visits: dict[str, list[list[list[float]]]] = field(default_factory=lambda: {name: [] for name in PASSES})
    extra: dict[str, list[list[float]]] = field(default_factory=lambda: {name: [] for name in PASSES})
    peaks: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in PASSES})

    def median(self, name: str) -> list[list[float]]:
        """Of each rank's visits, in the order of its plan."""
        rounds = self.visits[name]
        return [np.median([played[rank] for played in rounds], axis=0).tolist() for rank in range(len(rounds[0]))]

    def rounds(self, name: str) -> list[Played]:
        """All rounds of a pass."""
        return [Played(*played) for played in zip(self.visits[name], self.extra[name], strict=True)]


class Stage:
    """The tensors of a whole sequence, ``[1, length, heads, head_dim]``, on one device, and the plans to be played on it.

    ``plans`` has those of all ranks for each pass; in the backward keys may travel, or queries.
    """

    def __init__(self, plans: dict[str, Sequence[Plan]], inputs: tuple[Tensor, ...], backend: str = "auto") -> None:
        self.plans, self.inputs = plans, inputs
        q, k, v, _ = inputs
        self.ranks, self.device = len(plans["forward"]), q.device
        self.scoring = Scoring(q.shape[-1] ** -0.5)
        self.engine = select(backend, q, v, self.scoring)
        self.laps = Laps(q.device)
        wide = accumulation_dtype(q.dtype)
        self.lse = torch.zeros(1, q.shape[2], q.shape[1], dtype=wide, device=q.device)
        self.delta = torch.zeros_like(self.lse)
        self.results = {
            "out": torch.zeros_like(q[..., : v.shape[3]]),
            **{name: torch.zeros_like(x, dtype=wide) for name, x in zip(NAMES[1:], (q, k, v), strict=True)},
        }

    def rehearse(self, budget: Budget) -> Heard:
        """Everything once, compared with one device; then as often as the budget allows, timed."""
        for name in PASSES:
            self.play(name)
        self.compare()
        heard = Heard()
        while len(heard.visits["backward"]) < LEAST or (budget.left > 0 and len(heard.visits["backward"]) < MOST):
            for name in PASSES:
                self.play(name, heard)
        return heard

    def play(self, name: str, heard: Heard | None = None, ranks: Sequence[int] | None = None) -> None:
        """One pass of some ranks (all of them), one after the other; its seconds are added to ``heard``."""
        if name == "backward":
            self.delta = self.engine.delta(self.inputs[3], self.results["out"], torch.zeros_like(self.lse))
            for gradient in NAMES[1:]:
                self.results[gradient].zero_()
        perform = {"forward": self._forward, "backward": self._backward}[name]
        played: list[list[float]] = [[] for _ in range(self.ranks)]
        extra, peaks = [0.0] * self.ranks, [0] * self.ranks
        for rank in range(self.ranks) if ranks is None else ranks:
            before = self._reset_peak()
            self.laps.lead()
            perform(self.plans[name][rank])
            seconds = self.laps.take()
            visits = len(self.plans[name][rank].meetings)
            extra[rank], played[rank] = sum(seconds[: len(seconds) - visits]), seconds[len(seconds) - visits :]
            peaks[rank] = self._peak() - before
        if heard is not None:
            heard.visits[name].append(played)
            heard.extra[name].append(extra)
            heard.peaks[name] = peaks if self.device.type == "cuda" else []

    def compare(self) -> dict[str, float]:
        """The relative distance of each result from one device; raises ``AssertionError`` if one is too far."""
        q, k, v, dout = (x.detach() for x in self.inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = rf.flash_attention(*leaves, mask=self.plans["forward"][0].mask, backend=self.engine.name)
        wanted = (out.detach(), *torch.autograd.grad(out, leaves, dout))
        allowed = ALLOWED[q.dtype]
        errors = {}
        for name, want in zip(NAMES, wanted, strict=True):
            errors[name], worst = _distance(self.results[name], want)
            assert errors[name] <= allowed, f"{name} is off by {errors[name]:.1e}; {allowed:.0e} is rounding"
            assert worst <= _BLOCK_ALLOWED * allowed, f"{name} is off by {worst:.1e} in a block of {_BLOCK} positions"
        return errors

    def _forward(self, plan: Plan) -> None:
        q, k, v, _ = self.inputs
        rows = self._at(plan.q_positions)
        mine, total = q[:, rows], None
        for meeting in plan.meetings:
            last = meeting is plan.meetings[-1]
            keys = self._at(plan.sides(meeting.shard)[1])
            table = intervals_of(plan, meeting.shard, self.device)
            total = self._attend(mine, k[:, keys], v[:, keys], table, total, q.dtype if last else self.lse.dtype)
        out, lse = owned(total, mine, v[:, :0])
        self.results["out"][:, rows], self.lse[:, :, rows] = out.to(q.dtype), lse

    def _attend(self, *arguments: Any) -> Partial:
        *visit, carry, dtype = arguments
        partial: Partial = self.laps.time(lambda: self.engine.attend(*visit, self.scoring, carry, dtype))
        return partial

    def _backward(self, plan: Plan) -> None:
        """What stays on the rank is summed there; what came by is added to the whole, outside of the time."""
        rows = self._at(self.plans["forward"][plan.rank].q_positions)
        mine = self.inputs[3][:, rows], self.results["out"][:, rows], torch.zeros_like(self.lse[:, :, rows])
        self.laps.time(lambda: self.engine.delta(*mine))
        if plan.travels == "keys":
            self._keys_travel(plan, rows)
        else:
            self._queries_travel(plan)

    def _keys_travel(self, plan: Plan, rows: Tensor) -> None:
        q, k, v, dout = self.inputs
        wide, mine, dq = self.lse.dtype, (dout[:, rows], q[:, rows]), None
        lse, delta = (x[:, :, rows].contiguous() for x in (self.lse, self.delta))
        for meeting in plan.meetings:
            keys = self._at(plan.sides(meeting.shard)[1])
            arguments = (*mine, k[:, keys], v[:, keys], lse, delta, intervals_of(plan, meeting.shard, self.device))
            dtypes = (q.dtype if meeting is plan.meetings[-1] else wide, wide)
            dq, dk, dv = self._differentiate(arguments, dq, dtypes)
            self.results["dk"].index_add_(1, keys, dk)
            self.results["dv"].index_add_(1, keys, dv)
        if dq is not None:
            self.results["dq"].index_add_(1, rows, dq.to(wide))

    def _queries_travel(self, plan: Plan) -> None:
        q, k, v, dout = self.inputs
        wide = self.lse.dtype
        keys = self._at(plan.keys.positions(plan.rank))
        mine = k[:, keys], v[:, keys]
        for meeting in plan.meetings:
            rows = self._at(plan.sides(meeting.shard)[0])
            statistics = (x[:, :, rows].contiguous() for x in (self.lse, self.delta))
            table = intervals_of(plan, meeting.shard, self.device)
            arguments = (dout[:, rows], q[:, rows], *mine, *statistics, table)
            dq, dk, dv = self._differentiate(arguments, None, (wide, wide))
            for name, where, share in zip(NAMES[1:], (rows, keys, keys), (dq, dk, dv), strict=True):
                self.results[name].index_add_(1, where, share)

    def _differentiate(self, visit: tuple[Any, ...], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.laps.time(lambda: self.engine.attend_backward(*visit, self.scoring, *rest, False))

    def _at(self, positions: np.ndarray) -> Tensor:
        return torch.tensor(positions, device=self.device)

    def _reset_peak(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def draw_inputs(
    length: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Random q, k, v, dout of a whole sequence; zeros would run cooler and faster than any model."""
    make = torch.Generator(device).manual_seed(0)
    shapes = [(1, length, n, head_dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    return tuple(torch.randn(shape, generator=make, device=device, dtype=dtype) for shape in shapes)


def _distance(got: Tensor, want: Tensor) -> tuple[float, float]:
    """The relative error of all, and of the worst block of positions (small blocks count as 1 % of the mean one)."""
    difference, want = (got - want).double(), want.double()
    blocks = []
    for x in (difference, want):
        short = -x.shape[1] % _BLOCK
        padded = torch.nn.functional.pad(x.square().sum(dim=(0, 2, 3)), (0, short))
        blocks.append(padded.unflatten(0, (-1, _BLOCK)).sum(-1).sqrt())
    floor = 0.01 * blocks[1].square().mean().sqrt()
    whole = difference.norm() / want.norm().clamp_min(1e-30)
    return float(whole), float((blocks[0] / blocks[1].clamp_min(floor.clamp_min(1e-30))).max())
