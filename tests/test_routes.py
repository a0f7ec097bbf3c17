"""Every topology is the same attention: layouts x masks x routes x Ulysses degrees, planned and computed.

Plans are verified for all of them. Attention is compared with the float64 oracle for each pair of a layout and a route,
with masks, degrees and numbers of ranks taking turns; the whole product runs among the slow tests.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections import Counter
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Answer
from test_attention import LENGTH, MASKS, problem, worst
from test_mask import masks
from torch import Tensor

import ringflash as rf
from ringflash import auto
from ringflash.auto import choose_route
from ringflash.freight import Freight, Parcel
from ringflash.plan import Cost, cheaper_backward, derive, tokens_moved
from ringflash.route import Direct, Ring, Route, Tour, ring, ring_down, tour_of

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
DEGREES = (1, 2, 4)


def routes(ranks: int) -> list[Route]:
    """Every route that fits so many ranks, double rings of all shapes and both directions among them."""
    shapes = [(n, ranks // n) for n in range(1, ranks + 1) if ranks % n == 0]
    doubles = [rf.double_ring(*shape, direction) for shape in shapes for direction in (1, -1)]
    return [ring, ring_down, rf.direct(None), rf.direct(1), rf.direct(2), *doubles]


def packed(mask: rf.Mask) -> bool:
    """Can the balanced layout serve this mask?"""
    return bool(mask.documents) and mask.rows == 1


@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_tour_is_at_each_rank_once(ranks: int) -> None:
    """A shard meets every rank once, a rank one shard in each step; a hop is posted when its data is there, before its use."""
    for route in routes(ranks):
        tour, steps = tour_of(route, ranks), np.arange(ranks)
        for table in (tour.rank_at, tour.rank_at.T):
            assert (np.sort(table, axis=1) == steps).all()
        assert (tour.rank_at[:, 0] == steps).all()
        assert (tour.rank_at[steps[:, None], tour.step_at] == steps).all()
        assert (tour.post[1:] < steps[1:]).all() and (tour.parent <= tour.post).all()
        assert (np.diff(tour.chain) >= 0).all()


@pytest.mark.parametrize("travels", ["keys", "queries"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_plans_keep_their_laws_on_every_route(ranks: int, travels: Any) -> None:
    """Every cell once, both ends of every message, no total lost: all layouts and masks, whichever side travels."""
    for (mask, _), layout, route in itertools.product(MASKS.values(), LAYOUTS, routes(ranks)):
        if layout != "balanced" or packed(mask):
            s = rf.Sharding(LENGTH, (0, ranks), mask, layout, route)
            rf.verify([p if p.travels == travels else p.turned for p in rf.plans(s)])


@given(st.data())
@settings(max_examples=60)
def test_plans_keep_their_laws_for_any_problem(data: Any) -> None:
    """Random masks, lengths, offsets and cuts."""
    ranks, keys = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 70))
    queries, offset = data.draw(st.sampled_from([(keys, 0)]) | st.tuples(st.integers(0, 30), st.integers(-8, 40)))
    mask = data.draw(masks(keys, data.draw(st.integers(1, 2)))).mask
    layout, route = data.draw(st.sampled_from(LAYOUTS[:3])), data.draw(st.sampled_from(routes(ranks)))
    s = rf.Sharding(queries, (0, ranks), mask, layout, route, keys=keys, q_offset=offset)
    rf.verify(rf.plans(s))
    rf.verify([p.turned for p in rf.plans(s)])


@given(masks(24, 1), st.integers(-5, 30), st.integers(0, 30))
def test_seers_are_bounds_the_other_way_round(masked: Any, offset: int, queries: int) -> None:
    """A key is seen by exactly those queries that see it."""
    at, keys = np.arange(queries) + offset, np.arange(24)
    lo, hi = masked.mask.bounds(at)
    first, past = masked.mask.seers(keys)
    seen = (keys >= lo[:, None]) & (keys < hi[:, None])
    assert ((at[:, None] >= first) & (at[:, None] < past) == seen).all()
    assert (np.diff(first) >= 0).all() and (np.diff(past) >= 0).all()


@pytest.mark.parametrize("offset", [-5, 0, 3])
@pytest.mark.parametrize("mask", [rf.prefix(7), rf.prefix(7) & rf.window(4, 2), rf.chunks(5), rf.window(3, 6)], ids=str)
def test_queries_before_the_first_key_see_what_seers_say(mask: rf.Mask, offset: int) -> None:
    """A query at a negative position is in no prefix and in no chunk, from whichever side one asks."""
    at, keys = np.arange(20) + offset, np.arange(24)
    (lo, hi), (first, past) = mask.bounds(at), mask.seers(keys)
    seen = (keys >= lo[:, None]) & (keys < hi[:, None])
    assert ((at[:, None] >= first) & (at[:, None] < past) == seen).all()


@pytest.mark.parametrize("mask", [rf.window(37, 21), rf.causal & rf.documents([0, 301, 517, 1000]), rf.causal], ids=str)
def test_cuts_that_are_rounded_lose_nothing(mask: rf.Mask) -> None:
    """Shards of hundreds of tokens are cut at multiples of several; rounded the wrong way, cells at the edges would be lost."""
    for layout, route in itertools.product(("contiguous", "zigzag"), ("ring", "needed_only")):
        plans = rf.plans(rf.Sharding(1000, (0, 3), mask, layout, route))
        rf.verify(plans)
        rf.verify([plan.turned for plan in plans])


def answer(
    p: dict[str, Tensor], ranks: int, mask: rf.Mask, layout: str, route: Any, degree: int, **options: Any
) -> Answer:
    """Out, lse, dq, dk, dv of the whole sequence, computed on so many in-process ranks."""

    def one_rank(group: object) -> list[Tensor]:
        s = rf.Sharding(p["q"].shape[1], group, mask, layout, route, heads_axis=degree)
        q, k, v = (s.shard(p[name], 1).requires_grad_() for name in "qkv")
        out, lse = rf.ring_attention(q, k, v, s, return_lse=True, **options)
        seen = torch.where(lse == -math.inf, 0.0, lse * s.shard(p["dlse"], 2))
        ((out * s.shard(p["dout"], 1)).sum() + seen.sum()).backward()
        parts = ((out.detach(), 1), (lse.detach(), 2), (q.grad, 1), (k.grad, 1), (v.grad, 1))
        return [s.unshard(x, dim) for x, dim in parts]

    return Answer(*rf.local_world(ranks).run(one_rank)[-1])


def wanted(p: dict[str, Tensor], name: str) -> Answer:
    seen = torch.stack([oracle.table(x, LENGTH) for x in MASKS[name][1]])
    return oracle.answer(p["q"], p["k"], p["v"], seen, p["dout"], p["dlse"])


def combinations() -> list[tuple[str, str, Route, int, int]]:
    """Mask, layout, route, ranks of the ring, Ulysses degree."""
    return [
        (name, layout, route, ranks, degree)
        for degree, ranks in itertools.product(DEGREES, range(1, 9))
        if ranks * degree <= 8
        for route, layout, name in itertools.product(routes(ranks), LAYOUTS, MASKS)
        if layout != "balanced" or packed(MASKS[name][0])
    ]


def covering() -> list[tuple[str, str, Route, int, int]]:
    """So many of them that each layout meets each route, each degree each ring and each mask each layout and degree."""
    found: dict[tuple[Any, ...], tuple[str, str, Route, int, int]] = {}
    everything = combinations()
    np.random.default_rng(0).shuffle(everything)  # type: ignore[arg-type]
    chosen = []
    for case in everything:
        name, layout, route, ranks, degree = case
        pairs = [("lr", layout, str(route)), ("dr", degree, ranks), ("ml", name, layout), ("md", name, degree)]
        if any(pair not in found for pair in pairs):
            chosen.append(case)
            found |= dict.fromkeys(pairs, case)
    return chosen


@pytest.mark.parametrize("part", range(4))
def test_every_topology_equals_dense_attention(part: int) -> None:
    """Out, lse and all gradients in float64 agree with the textbook to 1e-10, with grouped heads, on 1 to 8 ranks."""
    p = problem(heads=(4, 2))
    right = {name: wanted(p, name) for name in MASKS}
    for name, layout, route, ranks, degree in covering()[part::4]:
        got = answer(p, ranks * degree, MASKS[name][0], layout, route, degree)
        assert worst(got, right[name]) < 1e-10, (name, layout, route, ranks, degree)


@pytest.mark.slow
def test_the_whole_product_of_topologies_equals_dense_attention() -> None:
    """Every mask x layout x route x degree on 1 to 8 ranks."""
    p = problem(heads=(4, 2), batch=2)
    right = {name: wanted(p, name) for name in MASKS}
    for name, layout, route, ranks, degree in combinations():
        got = answer(p, ranks * degree, MASKS[name][0], layout, route, degree)
        assert worst(got, right[name]) < 1e-10, (name, layout, route, ranks, degree)


@pytest.mark.parametrize("heads", [(4, 4), (8, 1)], ids=["queries travel", "keys travel"])
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_backward_moves_the_side_that_is_cheaper(layout: str, heads: tuple[int, int]) -> None:
    """With as many key heads as query heads the queries travel, with few the keys do; both give the textbook's gradients."""
    p = problem(heads=heads)
    s = rf.Sharding(LENGTH, (0, 4), rf.causal, layout)
    keys, queries = Cost(heads[1] * 16 * 8, heads[1] * 16 * 8), Cost(heads[0] * 18 * 8, heads[0] * 8 * 8)
    assert cheaper_backward(s.plan, keys, queries).travels == ("queries" if heads[0] == heads[1] else "keys")
    got = answer(p, 4, rf.causal, layout, "auto", 1)
    assert worst(got, wanted(p, "causal")) < 1e-10


def test_causal_zigzag_sends_three_quarters_when_shards_travel_downwards() -> None:
    """Late chunks are dropped where nobody further needs them; the busiest link keeps its load."""
    for ranks in (2, 4, 8, 16):
        length = 64 * ranks
        s = rf.Sharding(length, (0, ranks), rf.causal, "zigzag", "ring_down")
        shard = length // ranks
        onward, _ = tokens_moved(s.plan.needs, s.route)
        assert onward == 0.75 * shard * ranks * (ranks - 1)
        sent = [sum(m.part.tokens for step in p.steps for b in step.onward for m in b.out) for p in rf.plans(s)]
        assert sum(sent) == onward and max(sent) == shard * (ranks - 1)


@pytest.mark.parametrize("route", ["ring", "needed_only", "gather"])
def test_a_window_bounds_what_is_sent_whatever_the_number_of_ranks(route: str) -> None:
    """4K of 1M tokens: a rank sends its last 4K keys (rounded up to a cut), once, be it one of 16 or of 256."""
    length, reach = 1 << 20, 4095
    for ranks in (16, 64, 256):
        s = rf.Sharding(length, (0, ranks), rf.causal & rf.window(reach, 0), "contiguous", route)
        shard = length // ranks
        onward, home = tokens_moved(s.plan.needs, s.route)
        assert onward == home == (ranks - 1) * -(-reach // (shard // 32)) * (shard // 32)


@pytest.mark.parametrize("depth", [1, 2, 3, None])
def test_direct_hops_are_posted_so_many_steps_ahead(depth: int | None) -> None:
    """The depth of prefetching is a number of steps; None posts everything in the first."""
    plan = derive(0, *[rf.Sharding(24, (0, 6), rf.full, "contiguous").plan.queries] * 2, rf.full, Direct(depth))
    ahead = [batch.due - number for number, step in enumerate(plan.steps) for batch in step.onward]
    assert ahead == [min(due, depth or 6) for due in range(1, 6)]


def test_a_shard_crosses_between_nodes_once_and_a_whole_inner_ring_ahead() -> None:
    """On channel 1, posted when the ring inside the node before begins; totals cross once for each node."""
    plans = rf.plans(rf.Sharding(64, (0, 8), rf.full, "contiguous", rf.double_ring(2, 4)))
    for plan in plans:
        crossing = [
            (number, batch) for number, step in enumerate(plan.steps) for batch in step.onward if batch.channel == 1
        ]
        assert [(number, batch.due, len(batch.out)) for number, batch in crossing] == [(0, 4, 1)]
        home = [message for step in plan.steps for batch in step.home for message in batch.out]
        assert sum(message.peer // 4 != plan.rank // 4 for message in home) == 1
        leaving = [batch.due - n for n, step in enumerate(plan.steps) for batch in step.home if batch.channel == 1]
        assert leaving and set(leaving) == {4}


@pytest.mark.parametrize(
    ("route", "words"),
    [
        (rf.double_ring(2, 4), r"double_ring\(2, 4\), for 8 ranks; there are 6"),
        ("spiral", "'spiral'; accepted are 'auto', 'ring', 'ring_down', 'gather', 'needed_only'"),
    ],
)
def test_a_route_that_does_not_fit_is_refused_at_once(route: Any, words: str) -> None:
    """Before anything is sent, with what would fit."""
    with pytest.raises(ValueError, match=words):
        rf.Sharding(64, (0, 6), route=route)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: rf.direct(0), ValueError, "depth is 0; a number from 1, or None for all at once"),
        (lambda: rf.direct(1.5), TypeError, "direct: depth is 1.5 of type float; an integer"),
        (lambda: rf.double_ring(-2, -4), ValueError, "double_ring: nodes is -2; a number from 1"),
        (lambda: rf.double_ring(2, 4, direction=0), ValueError, "direction is 0; 1 is towards higher ranks"),
        (lambda: Ring(2), ValueError, "ring: direction is 2"),
    ],
)
def test_a_route_that_makes_no_sense_cannot_be_written(make: Any, error: Any, words: str) -> None:
    """A mistake is said where it is made, and not when a plan is."""
    with pytest.raises(error, match=words):
        make()


BROKEN = {
    "posted in the step that uses it": (dict(post=[0, 1, 2, 3]), "parent and post"),
    "posted before it is there": (dict(post=[0, 0, 0, 0]), "parent and post"),
    "never at one rank": (dict(rank_at=[[0, 1, 2, 2], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 3]]), "rank_at"),
    "two shards at a rank": (dict(rank_at=[[0, 1, 2, 3], [1, 2, 3, 0], [2, 1, 0, 3], [3, 0, 1, 2]]), "rank_at"),
    "not at its owner first": (dict(rank_at=[[1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2], [0, 1, 2, 3]]), "owner"),
    "chains that mix": (dict(chain=[0, 1, 0, 1]), "chain: never decreases"),
    "a channel below 0": (dict(channel=[0, -1, 0, 0]), "channel"),
    "a table of another size": (dict(parent=[0, 0, 1]), r"parent is not an array of integers of shape \(4,\)"),
    "a table of fractions": (dict(post=[0.0, 0.0, 1.0, 2.0]), "post is not an array of integers"),
    "no patience": (dict(patience=[0, 0, 0, 0]), "patience"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_tour_that_breaks_a_rule_is_refused(fault: str) -> None:
    """A route of your own would otherwise read what has not come, or wait for what nobody sends."""
    tables, words = BROKEN[fault]
    good = ring.tour(4)
    kept = {name: getattr(good, name) for name in ("rank_at", "parent", "post", "chain", "channel", "patience")}

    class Own:
        def tour(self, ranks: int) -> Tour:
            return Tour(**kept | {name: np.array(table) for name, table in tables.items()})

    with pytest.raises(ValueError, match=words):
        rf.Sharding(16, (0, 4), route=Own())


@pytest.mark.parametrize("route", ["ring", "ring_down", "needed_only", "gather", rf.double_ring(4, 4)], ids=str)
def test_owners_do_not_hoard_totals(monkeypatch: pytest.MonkeyPatch, route: Any) -> None:
    """What comes home is added as it comes: a rank holds a few totals at once, and not one from each of 15 others."""
    ranks, tokens, held = 16, 8, {"ring": 6, "ring_down": 6, "gather": 12}.get(str(route), 8)
    now, most = Counter[str](), Counter[str]()
    blank = Freight.blank

    def counted(freight: Freight, count: int) -> Parcel:
        parcel, rank = blank(freight, count), threading.current_thread().name
        if freight.dtypes[0] == torch.float32:  # totals; what goes onward is bfloat16
            now[rank] += 1
            most[rank] = max(most[rank], now[rank])
            weakref.finalize(parcel, now.subtract, [rank])
        return parcel

    monkeypatch.setattr(Freight, "blank", counted)

    def one_rank(group: object) -> None:
        s = rf.Sharding(ranks * tokens, group, rf.full, "contiguous", route)
        q, k, v = (torch.randn(1, tokens, heads, 8).bfloat16().requires_grad_() for heads in (8, 1, 1))
        rf.ring_attention(q, k, v, s).sum().backward()

    rf.local_world(ranks).run(one_rank)
    assert 0 < max(most.values()) <= held


def test_options_do_not_depend_on_the_topology() -> None:
    """Softcap, ALiBi, sinks and dropout give one device's numbers with queries travelling, double rings and split heads."""
    p = problem(heads=(4, 4))
    slopes, sinks = torch.linspace(0.1, 0.4, 4, dtype=torch.float64), torch.linspace(-1, 1, 4, dtype=torch.float64)
    options = dict(softcap=20.0, alibi_slopes=slopes, sinks=sinks, dropout_p=0.3, seed=7, scale=0.2)
    alone = answer(p, 1, rf.causal, "contiguous", "ring", 1, **options)
    cases = [(8, "zigzag", rf.double_ring(2, 2), 2), (4, "striped", "needed_only", 4), (6, "zigzag", "gather", 2)]
    for ranks, layout, route, degree in cases:
        assert worst(answer(p, ranks, rf.causal, layout, route, degree, **options), alone) < 1e-10


def test_routes_are_values() -> None:
    """They compare, hash, and print as they are written."""
    assert Ring() == ring != ring_down and hash(Ring(-1)) == hash(ring_down)
    assert [str(r) for r in (ring, ring_down, rf.direct(), rf.direct(None), rf.direct(3), rf.double_ring(2, 3))] == [
        *("ring", "ring_down", "needed_only", "gather", "direct(3)", "double_ring(2, 3)")
    ]


PACKED = rf.causal & rf.documents([0, 1300, 2400, 3300, 4096])
CHOSEN = [
    (rf.full, "contiguous", 1, "ring"),
    (rf.causal, "zigzag", 1, "ring_down"),
    (rf.causal, "zigzag", 2, "double_ring(2, 4, direction=-1)"),
    (rf.causal & rf.window(5, 0), "contiguous", 1, "ring"),
    (rf.causal & rf.window(5, 0), "contiguous", 2, "ring"),
    (PACKED, "balanced", 1, "gather"),
]


@pytest.mark.parametrize(("mask", "layout", "nodes", "route"), CHOSEN, ids=str)
def test_auto_takes_the_route_that_sends_least(mask: rf.Mask, layout: str, nodes: int, route: str) -> None:
    """Rings the right way round, double rings between nodes where all is needed, and owners themselves where little is."""
    held = rf.Sharding(4096, (0, 8), mask, layout, "ring").plan.queries
    assert str(choose_route(held, held, mask, 0, nodes)) == route


def test_auto_does_not_gather_what_memory_would_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rank would hold more shards at once than allowed, owners send step by step."""
    held = rf.Sharding(4096, (0, 8), PACKED, "balanced", "ring").plan.queries
    monkeypatch.setattr(auto, "_HELD", 0.1)
    assert str(choose_route(held, held, PACKED, 0)) == "needed_only"
