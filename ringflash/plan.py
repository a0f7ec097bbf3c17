"""What one rank does, hop by hop: derived from layout x mask x route, never written by hand.

Layouts, masks and routes do not know each other. A plan puts three questions to them: which keys can a query see
(``mask.bounds``), where do those stand in a shard (``layout.below``), and who carries that shard past (``route.legs``).
Zigzag's three-way branch, the off-by-one of stripes, hops that a window makes needless and the edges of documents are
no code: they fall out as facts, and ``verify`` checks them for any set of plans.

With sorted positions the keys that a query may see are one run of *local key indices*, ``[begin, end)``. These two
numbers per query row are all that a kernel ever learns of masks and layouts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np

from ringflash.errors import PlanError
from ringflash.layout import Layout
from ringflash.mask import Mask
from ringflash.route import Legs, Route, Transfer

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Step:
    """What one rank does in one step: at most one batch onward, one visit, one batch home."""

    onward_out: tuple[Transfer, ...]
    onward_in: tuple[Transfer, ...]
    visits: tuple[int, ...]
    """The shard that this rank computes with, if any."""
    home_out: tuple[Transfer, ...]
    home_in: tuple[Transfer, ...]
    done_with: tuple[int, ...]
    """Shards that this rank has used for the last time when the step is over."""


@dataclass(frozen=True)
class Plan:
    """The work of ``rank``: its queries are ``queries.positions(rank) + q_offset``, the shards are those of ``keys``.

    Made by :func:`derive` (from a sharding: ``rf.plan(s)``). Printing a plan shows its steps.
    """

    rank: int
    queries: Layout
    keys: Layout
    mask: Mask
    route: Route
    q_offset: int = 0

    @property
    def ranks(self) -> int:
        return self.queries.ranks

    @cached_property
    def legs(self) -> Legs:
        return self.route.legs(self.rank, needs(self.queries, self.keys, self.mask, self.q_offset))

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The legs of this rank in the order of their steps: what the loop carries out."""
        legs = self.legs
        last_use = {use.shard: use.step for use in sorted(legs.uses, key=lambda use: use.step)}
        phases: dict[str, dict[int, list[Any]]] = {
            "onward_out": _by_step((m.step, m) for m in legs.onward_out),
            "onward_in": _by_step((m.step, m) for m in legs.onward_in),
            "visits": _by_step((v.step, v.shard) for v in legs.visits),
            "home_out": _by_step((m.step, m) for m in legs.home_out),
            "home_in": _by_step((m.step, m) for m in legs.home_in),
            "done_with": _by_step((step, shard) for shard, step in last_use.items()),
        }
        count = 1 + max((step for phase in phases.values() for step in phase), default=-1)
        return tuple(Step(**{name: tuple(phase[step]) for name, phase in phases.items()}) for step in range(count))

    @property
    def q_positions(self) -> np.ndarray:
        """Global positions of this rank's queries, int64 ``[s_q]``, ascending."""
        positions = self.queries.positions(self.rank)
        return positions + self.q_offset if self.q_offset else positions

    def intervals(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Local key indices ``[begin, end)`` in ``shard`` that each query sees; two int32 ``[rows, s_q]``.

        ``rows`` is 1, or the batch size if batch rows hold different documents. ``begin <= end``, both non-decreasing.
        """
        return next(self.tables((shard,)))

    def tables(self, shards: Iterable[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The ``intervals`` of several shards, one after the other; the mask is asked once for all of them."""
        furthest = self.keys.length
        bounds = [self.mask.bounds(self.q_positions, row) for row in range(self.mask.rows)]
        clipped = [[x.clip(0, furthest).astype(np.int32) for x in side] for side in zip(*bounds, strict=True)]
        for shard in shards:
            begin, end = (np.stack([self.keys.below(shard, x) for x in side]) for side in clipped)
            yield begin, end

    def cells(self, shard: int) -> int:
        """Number of (query, key) pairs that this rank computes against ``shard``, over the batch rows of the mask."""
        begin, end = self.intervals(shard)
        return int((end.astype(np.int64) - begin).sum())

    def __str__(self) -> str:
        head = f"rank {self.rank} of {self.ranks}: {len(self.q_positions)} queries, {self.mask}, {self.route}"
        lines = [head, f"{'step':>4}  {'computes with':<28}{'sends onward':<18}sends home"]
        for number, step in enumerate(self.steps):
            work = ", ".join(f"shard {shard} ({self.cells(shard)} cells)" for shard in step.visits) or "-"
            lines.append(f"{number:>4}  {work:<28}{_spell(step.onward_out):<18}{_spell(step.home_out)}")
        return "\n".join(lines)


@lru_cache(maxsize=256)
def derive(rank: int, queries: Layout, keys: Layout, mask: Mask, route: Route, q_offset: int = 0) -> Plan:
    """The plan of one rank. Equal arguments give the same object, with what it has worked out so far."""
    return Plan(rank, queries, keys, mask, route, q_offset)


@lru_cache(maxsize=64)
def needs(queries: Layout, keys: Layout, mask: Mask, q_offset: int) -> np.ndarray:
    """``[r, s]``: does any query of rank r see any key of shard s, in any batch row? bool ``[ranks, ranks]``.

    The rows of a solid run of queries together see one solid run of positions (a query sees itself and its neighbours
    overlap), so its two ends decide. Rows of a striped run can step over keys: the ends settle dense masks, and only
    what they leave open is asked row by row.
    """
    owner = np.array([s for s, runs in enumerate(keys.runs) for _ in runs], dtype=np.int64)
    spans = np.array([(k.start, k.step, len(k)) for runs in keys.runs for k in runs], dtype=np.int64).reshape(-1, 3)
    table = np.zeros((queries.ranks, keys.ranks), dtype=bool)
    for rank, runs in enumerate(queries.runs):
        for run in runs:
            for row in range(mask.rows):
                lo, hi = mask.bounds(np.array([run[0], run[-1]]) + q_offset, row)
                together = _meets(spans, lo[:1], hi[-1:])
                if run.step == 1:
                    table[rank, owner[together]] = True
                    continue
                table[rank, owner[_meets(spans, lo, hi)]] = True
                unsettled = together & ~table[rank, owner]
                if unsettled.any():
                    lo, hi = mask.bounds(np.arange(run.start, run.stop, run.step) + q_offset, row)
                    table[rank, owner[unsettled][_meets(spans[unsettled], lo, hi)]] = True
    table.setflags(write=False)
    return table


def _meets(spans: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """Does each run of keys (start, step, count) have one in any of the ranges ``[lo, hi)``? bool ``[runs]``."""
    start, step, count = spans.T[:, :, None]
    before = (np.clip(-((start - edge) // step), 0, count) for edge in (hi, lo))
    return np.greater(*before).any(axis=1)


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found true of a set of plans."""

    ranks: int
    cells: int
    visits: int
    onward_hops: int
    home_hops: int

    def __str__(self) -> str:
        return (
            f"{self.ranks} ranks: {self.cells} visible cells, each computed once in {self.visits} visits; "
            f"{self.onward_hops} hops onward, {self.home_hops} home"
        )


def verify(plans: Sequence[Plan]) -> Verdict:
    """Check the laws of a complete set of plans, one for each rank; raise :class:`PlanError` at the first broken one.

    Layouts hold every position once; every visible (query, key) cell is computed exactly once; every message has two
    ends; nobody sends what it does not hold; every contribution to a shard's gradient comes home exactly once.

    A plan says nothing about numbers: NaN or inf at a key never crosses a hop that the plan dropped, but inside a tile
    that is partly visible a kernel multiplies it by zero, and 0 x NaN is NaN for the rows of that tile.
    """
    if not plans or [p.rank for p in plans] != list(range(plans[0].ranks)):
        raise PlanError(f"verify: got plans of ranks {[p.rank for p in plans]}; one plan for every rank, in order")
    if len({(p.queries, p.keys, p.mask, p.route, p.q_offset) for p in plans}) > 1:
        raise PlanError("verify: the plans are of different problems (layout, mask, route or q_offset differ)")
    try:
        plans[0].queries.check()
        plans[0].keys.check()
    except ValueError as error:
        raise PlanError(str(error)) from None
    cells = sum(_check_cells(plan) for plan in plans)
    _check_messages(plans)
    _check_holdings(plans)
    _check_homecoming(plans)
    legs = [p.legs for p in plans]
    return Verdict(
        ranks=len(plans),
        cells=cells,
        visits=sum(len(x.visits) for x in legs),
        onward_hops=sum(len(x.onward_out) for x in legs),
        home_hops=sum(len(x.home_out) for x in legs),
    )


def _check_cells(plan: Plan) -> int:
    """Shards are disjoint, so distinct visits that add up to all visible cells compute each of them once."""
    shards = [visit.shard for visit in plan.legs.visits]
    if len(set(shards)) < len(shards):
        raise PlanError(f"verify: rank {plan.rank} visits a shard twice: {sorted(shards)}")
    if len({visit.step for visit in plan.legs.visits}) < len(shards):
        raise PlanError(f"verify: rank {plan.rank} visits two shards in one step")
    computed = sum(map(plan.cells, shards))
    length = plan.keys.length
    bounds = [plan.mask.bounds(plan.q_positions, row) for row in range(plan.mask.rows)]
    visible = sum(int((hi.clip(0, length) - lo.clip(0, length)).sum()) for lo, hi in bounds)
    if computed != visible:
        raise PlanError(f"verify: rank {plan.rank} computes {computed} cells, but its queries see {visible}")
    return computed


def _check_messages(plans: Sequence[Plan]) -> None:
    for phase in ("onward", "home"):
        sent, received = (
            Counter(
                (m.step, *((p.rank, m.peer) if end == "out" else (m.peer, p.rank)), m.shard)
                for p in plans
                for m in getattr(p.legs, f"{phase}_{end}")
            )
            for end in ("out", "in")
        )
        if sent != received or any(n > 1 for n in sent.values()):
            odd = min((sent - received) + (received - sent) + Counter({k: n - 1 for k, n in sent.items() if n > 1}))
            raise PlanError("verify: message {} at step {}, rank {} to {}, shard {}, lacks an end".format(phase, *odd))


def _check_holdings(plans: Sequence[Plan]) -> None:
    for plan in plans:
        held_from = {plan.rank: 0} | {m.shard: m.step + 1 for m in plan.legs.onward_in}
        for use in plan.legs.uses:
            if held_from.get(use.shard, use.step + 1) > use.step:
                raise PlanError(
                    f"verify: rank {plan.rank} uses shard {use.shard} at step {use.step} without holding it"
                )


def _check_homecoming(plans: Sequence[Plan]) -> None:
    """Follow each shard's total from visitor to visitor: it must pass every visitor once, and end at the owner."""
    for shard, owner in enumerate(plans):
        moves = sorted((m.step, p.rank, m.peer) for p in plans for m in p.legs.home_out if m.shard == shard)
        visited = {p.rank: v.step for p in plans for v in p.legs.visits if v.shard == shard and p.rank != shard}
        carried: list[int] = []
        at = None
        for step, source, target in moves:
            if (at is not None and at != source) or visited.get(source, step + 1) > step or source in carried:
                raise PlanError(f"verify: the total of shard {shard} leaves rank {source} at step {step} out of turn")
            carried.append(source)
            at = target
        if set(carried) != set(visited) or (moves and at != owner.rank):
            raise PlanError(f"verify: the total of shard {shard} reaches rank {at} with the shares of ranks {carried}")


def _spell(moves: tuple[Transfer, ...]) -> str:
    return ", ".join(f"{m.shard} to rank {m.peer}" for m in moves) or "-"


def _by_step(items: Iterable[tuple[int, _Item]]) -> dict[int, list[_Item]]:
    steps: dict[int, list[_Item]] = defaultdict(list)
    for step, item in items:
        steps[step].append(item)
    return steps
