"""What a rank holds while a plan runs: its own tensors, the parts that came by, the totals on their way home.

The buffers are those of ``circulate.py``, step by step: a part is held from the step that posts its hop to the one that uses
it last, what was cut out of it until it has left, a total until the step that awaits it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ringflash.forecast.workload import Workload
from ringflash.needs import Part
from ringflash.plan import Plan


class InFlight(NamedTuple):
    """Tokens that a rank holds: of other ranks' shards and copies on their way, and of totals (not its share of its own)."""

    parts: int
    totals: int


def peak(forward: Sequence[Plan], backward: Sequence[Plan], workload: Workload) -> dict[str, int]:
    """Bytes by kind of tensor, where all of them together are most: on the fullest rank, in the fuller pass.

    Where ranks share shards (Ulysses), "not pooled" is what the caller holds beside its pooled copies, and "swap" what a swap
    has packed, expects and puts together. Then the peak may lie in a swap, before or after the ring.
    """
    travelling = workload.keys if backward[0].travels == "keys" else workload.queries
    held: list[dict[str, int]] = []
    for plan in forward:
        inside = _own(plan, workload) | _flying(plan, workload.batch, workload.keys.onward, 0)
        held += _around("forward", plan, workload, inside)
    for plan in backward:
        flying = _flying(plan, workload.batch, travelling.onward, travelling.home)
        held += _around("backward", plan, workload, _own(plan, workload) | _gradients(plan, workload) | flying)
    return max(held, key=lambda tensors: sum(tensors.values()))


def _around(phase: str, plan: Plan, workload: Workload, inside: dict[str, int]) -> list[dict[str, int]]:
    """What a rank holds ``inside`` the ring; where it shares its shard, also while tensors are pooled and spread again.

    Pooled tensors are gone when what was made of them is spread.
    """
    if workload.degree == 1:
        return [inside]
    tokens = [workload.share(layout.tokens(plan.rank)) for layout in (plan.queries, plan.keys)]
    queries, keys = (max(held) * workload.batch for held in tokens)
    d, dv, narrow, wide = workload.head_dim, workload.value_dim, workload.itemsize, workload.wide
    q, rows = queries * workload.heads * d, queries * workload.heads
    k_and_v = keys * workload.kv_heads * (d + dv)
    kept, results = (q + k_and_v) * narrow, rows * (dv * narrow + wide)  # q, k, v; out and lse
    pooled, made = ["q", "k, v"], ["out", "lse"]
    if phase == "backward":
        kept += 2 * results + rows * wide  # out, lse, their gradients, and delta, which is made before
        results = q * narrow + k_and_v * wide
        pooled, made = ["q", "k, v", "dout", "lse", "delta"], ["dq", "dk, dv"]
        inside = inside | {"out": 0, "dlse": 0}
    spread = {name: inside[name] for name in made}
    if phase == "backward":
        spread["dq"] = spread["dq"] * narrow // wide  # it leaves the ring in the dtype of q
    swaps = []
    for swap, then in zip(workload.exchanged(phase, *tokens), (sum(inside[x] for x in pooled), results), strict=True):
        packed, expected = (int(swap.sum(axis=axis).max()) for axis in (1, 0))
        swaps.append({"not pooled": kept, "swap": expected + max(packed, then)})
    return [swaps[0], inside | {"not pooled": kept}, spread | swaps[1]]


def _own(plan: Plan, workload: Workload) -> dict[str, int]:
    """What attention takes and returns on this rank, with the carry in which it is summed."""
    queries, keys = (workload.batch * layout.tokens(plan.rank) for layout in (plan.queries, plan.keys))
    heads, kv_heads, d, dv = workload.local_heads, workload.local_kv_heads, workload.head_dim, workload.value_dim
    carried = workload.itemsize < workload.wide and len(plan.meetings) > 1
    return {
        "q": queries * heads * d * workload.itemsize,
        "k, v": keys * kv_heads * (d + dv) * workload.itemsize,
        "out": queries * heads * dv * workload.itemsize,
        "lse": queries * heads * workload.wide,
        "partial out": queries * heads * dv * workload.wide if carried else 0,
    }


def _gradients(plan: Plan, workload: Workload) -> dict[str, int]:
    """What the backward adds; sums are in the accumulation dtype. Where queries come by, each visit makes a share of them."""
    shares = plan.travels == "queries" and len(plan.meetings) > 1
    queries, keys = (workload.batch * layout.tokens(plan.rank) for layout in (plan.queries, plan.keys))
    heads, kv_heads, d, dv = workload.local_heads, workload.local_kv_heads, workload.head_dim, workload.value_dim
    return {
        "partial out": 0,
        "dout": queries * heads * dv * workload.itemsize,
        "dlse": queries * heads * workload.wide,
        "delta": queries * heads * workload.wide,
        "dq": queries * heads * d * workload.wide,
        "dk, dv": keys * kv_heads * (d + dv) * workload.wide,
        "shares of dk, dv": keys * kv_heads * (d + dv) * workload.wide if shares else 0,
    }


def _flying(plan: Plan, batch: int, onward: int, home: int) -> dict[str, int]:
    """Bytes in flight where parts and totals together are most."""
    most = max(in_flight(plan), key=lambda now: now.parts * onward + now.totals * home, default=InFlight(0, 0))
    return {"parts in flight": most.parts * onward * batch, "totals in flight": most.totals * home * batch}


def in_flight(plan: Plan) -> list[InFlight]:
    """For each step of ``plan``: the most that is in flight at one time in it."""
    parts: dict[int, Part] = {}  # what has come of other ranks' shards, or is to come
    copies: dict[Part, int] = {}  # parts that were cut out to be sent, and the step by which they have left
    rooms: dict[int, int] = {}  # tokens of totals that have come, or are to come, for the next visitor, by shard
    moving: list[tuple[int, int]] = []  # tokens of totals that leave, or come home, and the step that awaits them
    last: Part | None = None  # cut out, and kept for the next who needs the same
    found = []
    for number, step in enumerate(plan.steps):
        copies = {part: due for part, due in copies.items() if due > number or part == last}
        moving = [(due, tokens) for due, tokens in moving if due > number]
        for batch in step.onward:
            parts |= {message.part.shard: message.part for message in batch.back}
            for part in (message.part for message in batch.out):
                if part != parts.get(part.shard):
                    copies[part] = max(batch.due, copies.get(part, 0))
                    last = part
        for batch in step.home:
            moving += [(batch.due, message.part.tokens) for message in batch.out]
            for part in (message.part for message in batch.back):
                if part.shard == plan.rank:
                    moving.append((batch.due, part.tokens))
                else:
                    rooms[part.shard] = rooms.get(part.shard, 0) + part.tokens
        abroad = [meeting for meeting in step.visits if meeting.shard != plan.rank]
        for meeting in abroad:  # the total that has come becomes the one that leaves
            rooms.pop(meeting.shard, None)
        held = sum(part.tokens for part in (*parts.values(), *copies))
        shares = sum(meeting.part.tokens for meeting in abroad)
        found.append(InFlight(held, sum(rooms.values()) + shares + sum(tokens for _, tokens in moving)))
        for shard in step.done_with:
            parts.pop(shard, None)
            last = None if last is not None and last.shard == shard else last
    return found
