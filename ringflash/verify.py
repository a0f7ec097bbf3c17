"""The laws of a complete set of plans, one for each rank, checked without a device.

Layouts hold every position once; every visible (query, key) cell is computed exactly once; every message has two ends;
nobody sends what it does not hold; every contribution to a shard's total comes home exactly once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ringflash.errors import PlanError
from ringflash.plan import Plan


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

    A plan says nothing about numbers: NaN or inf at a key never crosses a hop that the plan dropped, but inside a tile
    that is partly visible a kernel multiplies it by zero, and 0 x NaN is NaN for the rows of that tile.
    """
    require_plans(plans, "verify")
    if not plans or [p.rank for p in plans] != list(range(plans[0].ranks)):
        raise PlanError(f"verify: got plans of ranks {[p.rank for p in plans]}; one plan for every rank, in order")
    if len({p.problem for p in plans}) > 1:
        raise PlanError("verify: the plans are of different problems (layout, mask, route, q_offset or side differ)")
    try:
        plans[0].queries.check()
        plans[0].keys.check()
    except ValueError as error:
        raise PlanError(str(error)) from None
    for plan in plans:
        _check_visits(plan)
    _check_messages(plans)
    _check_holdings(plans)
    cells = sum(_check_cells(plan) for plan in plans)
    _check_homecoming(plans)
    legs = [p.legs for p in plans]
    return Verdict(
        ranks=len(plans),
        cells=cells,
        visits=sum(len(x.visits) for x in legs),
        onward_hops=sum(len(x.onward_out) for x in legs),
        home_hops=sum(len(x.home_out) for x in legs),
    )


def require_plans(plans: object, caller: str) -> None:
    """Raise ``TypeError`` unless these are plans; ``caller`` was given them."""
    if not isinstance(plans, Sequence):
        came = f"a {type(plans).__name__}"
    elif odd := [p for p in plans if not isinstance(p, Plan)]:
        came = f"a {type(plans).__name__} with a {type(odd[0]).__name__} in it"
    else:
        return
    raise TypeError(f"{caller}: plans is {came}; a list of the plans of all ranks is needed, rf.plans(s)")


def _check_visits(plan: Plan) -> None:
    shards = [visit.shard for visit in plan.legs.visits]
    if len(set(shards)) < len(shards):
        raise PlanError(f"verify: rank {plan.rank} visits a shard twice: {sorted(shards)}")
    if len({visit.step for visit in plan.legs.visits}) < len(shards):
        raise PlanError(f"verify: rank {plan.rank} visits two shards in one step")


def _check_cells(plan: Plan) -> int:
    """Shards are disjoint, so distinct visits that add up to all visible cells compute each of them once."""
    computed = sum(plan.cells(visit.shard) for visit in plan.legs.visits)
    visible = 0
    for row in range(plan.mask.rows):
        if plan.travels == "keys":
            at, limits = plan.q_positions, (0, plan.keys.length)
            lo, hi = plan.mask.bounds(at, row)
        else:
            at, limits = plan.keys.positions(plan.rank), (plan.q_offset, plan.q_offset + plan.queries.length)
            lo, hi = plan.mask.seers(at, row)
        visible += int((np.clip(hi, *limits) - np.clip(lo, *limits)).sum())
    if computed != visible:
        side, other = ("queries", "see") if plan.travels == "keys" else ("keys", "are seen by")
        raise PlanError(f"verify: rank {plan.rank} computes {computed} cells, but its {side} {other} {visible}")
    return computed


def _check_messages(plans: Sequence[Plan]) -> None:
    for phase in ("onward", "home"):
        sent, received = (
            Counter(
                (m.step, *((p.rank, m.peer) if end == "out" else (m.peer, p.rank)), m.shard, m.due, m.channel, m.pieces)
                for p in plans
                for m in getattr(p.legs, f"{phase}_{end}")
            )
            for end in ("out", "in")
        )
        if sent != received or any(n > 1 for n in sent.values()):
            odd = min((sent - received) + (received - sent) + Counter({k: n - 1 for k, n in sent.items() if n > 1}))
            words = "verify: message {} at step {}, rank {} to {}, shard {}, lacks an end"
            raise PlanError(words.format(phase, *odd[:4]))


def _check_holdings(plans: Sequence[Plan]) -> None:
    """What is computed with or sent on has arrived: piece by piece, in the step in which its batch is due."""
    for plan in plans:
        owner = plan.needs.owner
        held_from = dict.fromkeys(np.flatnonzero(owner == plan.rank).tolist(), 0)
        for move in plan.legs.onward_in:
            if move.due <= move.step:
                raise PlanError(f"verify: rank {plan.rank} is to use shard {move.shard} in the step that sends it")
            held_from |= dict.fromkeys(move.pieces, move.due)
        for use in plan.legs.uses:
            if any(held_from.get(piece, use.step + 1) > use.step for piece in use.pieces):
                raise PlanError(
                    f"verify: rank {plan.rank} uses shard {use.shard} at step {use.step} without holding it"
                )


def _check_homecoming(plans: Sequence[Plan]) -> None:
    """Follow each piece's totals from visitor to visitor: every visitor's share must end at the owner, once."""
    visits: dict[int, dict[int, int]] = {}  # of each piece: at which step each rank abroad computes with it
    moves: dict[int, list[tuple[int, int, int]]] = {}
    owner = plans[0].needs.owner.tolist()
    for plan in plans:
        for visit in plan.legs.visits:
            for piece in visit.pieces if visit.shard != plan.rank else ():
                visits.setdefault(piece, {})[plan.rank] = visit.step
        for move in plan.legs.home_out:
            for piece in move.pieces:
                moves.setdefault(piece, []).append((move.step, plan.rank, move.peer))
    for piece in range(len(owner)):
        shard, visited = owner[piece], visits.get(piece, {})
        inside: dict[int, list[int]] = {}  # whose shares each rank has been handed
        since: dict[int, int] = {}  # and the last step in which it was
        home: list[int] = []
        for step, source, target in sorted(moves.get(piece, [])):
            if visited.get(source, step + 1) > step or since.get(source, -1) >= step or source in home:
                raise PlanError(f"verify: the total of shard {shard} leaves rank {source} at step {step} out of turn")
            shares = [*inside.pop(source, []), source]
            (home if target == shard else inside.setdefault(target, [])).extend(shares)
            since[target] = step if target != shard else -1
        if sorted(home) != sorted(visited) or inside:
            raise PlanError(f"verify: the total of shard {shard} reaches its owner with the shares of ranks {home}")
