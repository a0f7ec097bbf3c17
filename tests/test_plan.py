"""Plans: every visible cell once, no needless hop, and a verifier that sees every fault planted in a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import ceil

import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask import Masked, masks

import ringflash as rf
from ringflash.layout import LAYOUTS
from ringflash.plan import derive, needs
from ringflash.route import Legs, Transfer, Visit

NAMES = sorted(LAYOUTS)


@st.composite
def planned(draw: st.DrawFn) -> tuple[rf.Sharding, Masked]:
    """A sharding on up to 6 ranks, and what its mask means by definition."""
    keys, ranks, rows = draw(st.integers(1, 24)), draw(st.integers(1, 6)), draw(st.integers(1, 2))
    queries = keys if draw(st.booleans()) else draw(st.integers(0, 24))
    offset = draw(st.sampled_from([0, keys - queries]) | st.integers(-8, 8))
    masked = draw(masks(keys, rows))
    layout = draw(st.sampled_from(NAMES))
    route = draw(st.sampled_from(["ring", "ring_down"]))
    return rf.Sharding(queries, (0, ranks), masked.mask, layout, route, keys=keys, q_offset=offset), masked


def visible(s: rf.Sharding, masked: Masked) -> list[set[tuple[int, int]]]:
    """For each row of the mask, the (query, key) positions that it lets through, by its definition."""
    assert s.keys is not None and s.q_offset is not None
    return [
        {(q, k) for q in range(s.q_offset, s.q_offset + s.length) for k in range(s.keys) if sees(q, k)}
        for sees in masked.sees[: masked.mask.rows]
    ]


@given(planned())
@settings(max_examples=150)
def test_every_visible_cell_is_computed_exactly_once(planned):
    """By count over the intervals that a kernel would be given, cell by cell: none lost, none twice, none too many."""
    s, masked = planned
    computed = [Counter() for _ in range(masked.mask.rows)]
    for plan in rf.plans(s):
        for visit in plan.legs.visits:
            begin, end = plan.intervals(visit.shard)
            keys = plan.sides(visit.shard)[1].tolist()
            for row, cells in enumerate(computed):
                for q, b, e in zip(plan.q_positions.tolist(), begin[row], end[row], strict=True):
                    cells.update((q, k) for k in keys[b:e])
    for cells, expected in zip(computed, visible(s, masked), strict=True):
        assert set(cells) == expected
        assert max(cells.values(), default=1) == 1
    assert rf.verify(rf.plans(s)).cells == sum(map(len, visible(s, masked)))


@given(planned())
@settings(max_examples=150)
def test_a_hop_that_the_plan_dropped_carried_nothing_anybody_could_see(planned):
    """And one that it kept carries something: a visit exists where some cell does, and only there."""
    s, masked = planned
    plans = rf.plans(s)
    cells = set().union(*visible(s, masked))
    table = needs(plans[0].queries, plans[0].keys, s.mask, s.q_offset)
    for plan in plans:
        mine = plan.q_positions.tolist()
        met = {r for r in range(s.ranks) if any((q, k) in cells for q in mine for k in plan.keys.positions(r).tolist())}
        assert {v.shard for v in plan.legs.visits} == met == set(table.owner[table.seen[plan.rank]].tolist())
    direction = s.route.direction
    for piece, part in enumerate(table.parts):  # and a piece goes no further than to the last who needs it
        visitors = {(r - part.shard) * direction % s.ranks for r in range(s.ranks) if table.seen[r, piece]}
        assert sum(piece in m.pieces for p in plans for m in p.legs.onward_out) == max(visitors, default=0)


@given(planned())
@settings(max_examples=100)
def test_intervals_are_monotone_runs_of_local_keys(planned):
    """Kernels count on it: begin first, both never decreasing, both inside the shard."""
    s, _ = planned
    for plan in rf.plans(s):
        for shard in range(s.ranks):
            begin, end = plan.intervals(shard)
            assert begin.dtype == end.dtype == "int32"
            assert begin.shape == end.shape == (s.mask.rows, len(plan.q_positions))
            assert ((begin >= 0) & (begin <= end) & (end <= plan.keys.tokens(shard))).all()
            assert (begin[:, 1:] >= begin[:, :-1]).all() and (end[:, 1:] >= end[:, :-1]).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", NAMES)
def test_a_full_ring_brings_every_shard_everywhere_and_every_total_home(name, ranks):
    """P - 1 hops for each shard, onward and home: the least that brings it to all, and all shares to its owner."""
    verdict = rf.verify(rf.plans(rf.Sharding(2 * ranks, (0, ranks), rf.full, name)))
    assert verdict.cells == 4 * ranks * ranks
    assert verdict.visits == ranks * ranks
    assert verdict.onward_hops == verdict.home_hops == ranks * (ranks - 1)


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_zigzag_has_three_kinds_of_visits(ranks):
    """A triangle, the first half of its keys for all queries, all keys for the second half of the queries.

    Its own shard, an earlier one, a later one: nobody wrote that down, it follows.
    """
    chunk = 3
    s = rf.Sharding(2 * ranks * chunk, (0, ranks), layout="zigzag")
    for plan in rf.plans(s):
        for visit in plan.legs.visits:
            begin, end = (x[0].tolist() for x in plan.intervals(visit.shard))
            assert begin == [0] * 2 * chunk
            if visit.shard == plan.rank:
                assert end == list(range(1, 2 * chunk + 1))
            elif visit.shard < plan.rank:
                assert end == [chunk] * 2 * chunk
            else:
                assert end == [0] * chunk + [2 * chunk] * chunk


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_striped_shards_differ_by_one_on_the_diagonal(ranks):
    """A shard of an earlier offset shows its key of the same stripe, one of a later offset does not."""
    s = rf.Sharding(5 * ranks, (0, ranks), layout="striped")
    for plan in rf.plans(s):
        for shard in range(ranks):
            begin, end = (x[0].tolist() for x in plan.intervals(shard))
            assert begin == [0] * 5
            assert end == [i + (shard <= plan.rank) for i in range(5)]


@pytest.mark.parametrize("reach", [0, 1, 3, 4, 5, 8, 9, 31, 40])
def test_a_window_prunes_a_contiguous_ring(reach):
    """A shard travels as many hops as the window reaches shards; what nobody further along sees goes home from where it is."""
    ranks, shard = 8, 4
    verdict = rf.verify(rf.plans(rf.Sharding(ranks * shard, (0, ranks), rf.window(reach, 0), "contiguous")))
    behind = [min(ceil(reach / shard), ranks - 1 - owner) for owner in range(ranks)]
    assert verdict.onward_hops == sum(behind)
    assert sum(behind) <= verdict.home_hops <= 2 * sum(behind)
    assert verdict.visits == ranks + sum(behind)


def test_documents_that_fit_into_shards_need_no_hop():
    """Whoever packs documents to the edges of shards pays for no communication."""
    s = rf.Sharding(12, (0, 3), rf.causal & rf.documents((0, 1, 4, 8, 10, 12)), "contiguous")
    verdict = rf.verify(rf.plans(s))
    assert (verdict.visits, verdict.onward_hops, verdict.home_hops) == (3, 0, 0)


def test_a_hop_is_needed_if_any_batch_row_needs_it():
    """Rows with different documents share one plan."""
    s = rf.Sharding(8, (0, 2), rf.documents([[0, 4, 8], [0, 3, 8]]), "contiguous")
    assert rf.verify(rf.plans(s)).visits == 4
    assert rf.verify(rf.plans(s.with_mask(rf.documents([0, 4, 8])))).visits == 2
    alone = range(9)  # documents of one token
    for rows in ([alone, [0, 3, 8]], [[0, 3, 8], alone]):
        assert rf.verify(rf.plans(rf.Sharding(8, (0, 2), rf.documents(rows), "striped"))).visits == 4
    assert rf.verify(rf.plans(rf.Sharding(8, (0, 2), rf.documents([alone, alone]), "striped"))).visits == 2


def test_equal_questions_have_one_plan():
    """Layers and steps share what a plan has worked out so far."""
    a, b = (rf.Sharding(8, (1, 2), mask) for mask in (rf.causal, rf.window(None, 0)))
    assert rf.plan(a) is rf.plan(b)


def rebuilt(plans: list[rf.Plan], changes: dict[int, Callable[[Legs], Legs]]) -> list[rf.Plan]:
    """The same plans, with the legs of some ranks doctored."""
    doctored = []
    for plan in plans:
        copy = replace(plan)
        copy.__dict__["legs"] = changes.get(plan.rank, lambda legs: legs)(plan.legs)
        doctored.append(copy)
    return doctored


def without(field: str, **wanted: int) -> Callable[[Legs], Legs]:
    """Drop the one move of ``field`` whose fields have the values in ``wanted``."""

    def change(legs: Legs) -> Legs:
        kept = tuple(m for m in getattr(legs, field) if any(getattr(m, k) != v for k, v in wanted.items()))
        assert len(kept) == len(getattr(legs, field)) - 1
        return legs._replace(**{field: kept})

    return change


def extra(field: str, move: Visit | Transfer) -> Callable[[Legs], Legs]:
    return lambda legs: legs._replace(**{field: tuple(sorted((*getattr(legs, field), move)))})


def chain(*changes: Callable[[Legs], Legs]) -> Callable[[Legs], Legs]:
    def change(legs: Legs) -> Legs:
        for one in changes:
            legs = one(legs)
        return legs

    return change


def sent(step: int, peer: int, shard: int) -> Transfer:
    """One end of a message with all of a shard, used in the step after it is posted."""
    return Transfer(step, step + 1, 0, peer, shard, (shard,))


# On a full ring of 4, shard 1 goes 1 -> 2 -> 3 -> 0, and its total 2 -> 3 -> 0 -> 1.
FAULTS = {
    "a visit is dropped": ({2: without("visits", shard=1)}, "rank 2 computes 12 cells, but its queries see 16"),
    "a visit is duplicated": (
        {2: extra("visits", Visit(3, 1, (1,)))},
        r"rank 2 visits a shard twice: \[0, 1, 1, 2, 3\]",
    ),
    "two visits share a step": (
        {2: chain(without("visits", shard=1), extra("visits", Visit(2, 1, (1,))))},
        "rank 2 visits two shards in one step",
    ),
    "a send onward is dropped": ({2: without("onward_out", shard=1)}, "step 1, rank 2 to 3, shard 1, lacks an end"),
    "a receive onward is dropped": ({3: without("onward_in", shard=1)}, "step 1, rank 2 to 3, shard 1, lacks an end"),
    "a message onward is sent twice": (
        {2: extra("onward_out", sent(1, 3, 1)), 3: extra("onward_in", sent(1, 2, 1))},
        "step 1, rank 2 to 3, shard 1, lacks an end",
    ),
    "both ends onward are dropped": (
        {2: without("onward_out", shard=1), 3: without("onward_in", shard=1)},
        "rank 3 uses shard 1 at step 2 without holding it",
    ),
    "a shard is used before it is there": (
        {
            2: chain(
                without("visits", shard=1),
                without("visits", shard=2),
                extra("visits", Visit(0, 1, (1,))),
                extra("visits", Visit(1, 2, (2,))),
            )
        },
        "rank 2 uses shard 1 at step 0 without holding it",
    ),
    "a send home is dropped": ({0: without("home_out", shard=1)}, "home at step 3, rank 0 to 1, shard 1, lacks an end"),
    "a receive at home is dropped": (
        {1: without("home_in", shard=1)},
        "home at step 3, rank 0 to 1, shard 1, lacks an end",
    ),
    "the last hop home is lost": (
        {0: without("home_out", shard=1), 1: without("home_in", shard=1)},
        r"total of shard 1 reaches its owner with the shares of ranks \[\]",
    ),
    "a total goes to the wrong owner": (
        {
            0: chain(without("home_out", shard=1), extra("home_out", sent(3, 2, 1))),
            1: without("home_in", shard=1),
            2: extra("home_in", sent(3, 0, 1)),
        },
        r"total of shard 1 reaches its owner with the shares of ranks \[\]",
    ),
    "a total passes a visitor by": (
        {
            2: chain(without("home_out", shard=1), extra("home_out", sent(1, 0, 1))),
            3: chain(without("home_out", shard=1), without("home_in", shard=1)),
            0: chain(without("home_in", shard=1), extra("home_in", sent(1, 2, 1))),
        },
        r"total of shard 1 reaches its owner with the shares of ranks \[2, 0\]",
    ),
    "a total leaves before its visit": (
        {
            2: chain(without("home_out", shard=1), extra("home_out", sent(0, 3, 1))),
            3: chain(without("home_in", shard=1), extra("home_in", sent(0, 2, 1))),
        },
        "total of shard 1 leaves rank 2 at step 0 out of turn",
    ),
    "a total leaves before what came to it": (
        {
            2: chain(without("home_out", shard=1), extra("home_out", sent(3, 3, 1))),
            3: chain(without("home_in", shard=1), extra("home_in", sent(3, 2, 1))),
        },
        r"total of shard 1 reaches its owner with the shares of ranks \[3, 0\]",
    ),
    "a shard is used in the step that sends it": (
        {
            1: chain(without("onward_out", shard=1), extra("onward_out", Transfer(1, 1, 0, 2, 1, (1,)))),
            2: chain(without("onward_in", shard=1), extra("onward_in", Transfer(1, 1, 0, 1, 1, (1,)))),
        },
        "rank 2 is to use shard 1 in the step that sends it",
    ),
    "a total leaves in the step in which it is sent there": (
        {
            2: chain(without("home_out", shard=1), extra("home_out", sent(2, 3, 1))),
            3: chain(without("home_in", shard=1), extra("home_in", sent(2, 2, 1))),
        },
        "total of shard 1 leaves rank 3 at step 2 out of turn",
    ),
    "a share is sent again when its total is home": (
        {2: extra("home_out", sent(4, 3, 1)), 3: extra("home_in", sent(4, 2, 1))},
        "total of shard 1 leaves rank 2 at step 4 out of turn",
    ),
    "a share is sent again to a rank that sends no more": (
        {
            0: chain(without("home_out", shard=1), extra("home_out", sent(4, 1, 1))),
            1: chain(without("home_in", shard=1), extra("home_in", sent(4, 0, 1))),
            2: extra("home_out", sent(3, 3, 1)),
            3: extra("home_in", sent(3, 2, 1)),
        },
        r"total of shard 1 reaches its owner with the shares of ranks \[2, 3, 0\]",
    ),
}


def full_ring() -> list[rf.Plan]:
    return rf.plans(rf.Sharding(8, (0, 4), rf.full, "contiguous"))


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_the_planted_fault_and_names_it(fault):
    """A verifier that accepts everything proves nothing."""
    changes, words = FAULTS[fault]
    rf.verify(rebuilt(full_ring(), {}))
    with pytest.raises(rf.PlanError, match=words):
        rf.verify(rebuilt(full_ring(), changes))


@given(planned(), st.sampled_from(["visits", "onward_out", "onward_in", "home_out", "home_in"]), st.data())
@settings(max_examples=100)
def test_verify_misses_no_lost_move(planned, field, data):
    """Whichever move of whichever plan is dropped, it is missed."""
    plans = rf.plans(planned[0])
    having = [p.rank for p in plans if getattr(p.legs, field)]
    if not having:
        return
    rank = data.draw(st.sampled_from(having))
    move = data.draw(st.sampled_from(getattr(plans[rank].legs, field)))
    lost = without(field, **{name: getattr(move, name) for name in move._fields})
    with pytest.raises(rf.PlanError):
        rf.verify(rebuilt(plans, {rank: lost}))


def test_verify_wants_all_plans_of_one_problem():
    """Half a set of plans says nothing of the other half."""
    plans = full_ring()
    with pytest.raises(rf.PlanError, match=r"plans of ranks \[0, 1, 2\]; one plan for every rank"):
        rf.verify(plans[:3])
    with pytest.raises(rf.PlanError, match="in order"):
        rf.verify(plans[::-1])
    with pytest.raises(rf.PlanError, match=r"\[\]"):
        rf.verify([])
    with pytest.raises(rf.PlanError, match="different problems"):
        rf.verify([*plans[:3], replace(plans[3], mask=rf.causal)])


def test_verify_wants_layouts_that_partition():
    """Two ranks with one key would both compute it."""
    twice = rf.Layout(((range(0, 3),), (range(2, 4),)))
    route = full_ring()[0].route
    for queries, keys in ((twice, LAYOUTS["contiguous"](4, 2)), (LAYOUTS["contiguous"](4, 2), twice)):
        with pytest.raises(rf.PlanError, match="exactly one rank"):
            rf.verify([derive(rank, queries, keys, rf.full, route) for rank in range(2)])


def test_a_plan_prints_its_steps():
    """What a rank does is short enough to read."""
    s = rf.Sharding(12, (1, 3), layout="zigzag", route="ring")
    assert [line.rstrip() for line in str(rf.plan(s)).splitlines()] == [
        "rank 1 of 3: 4 queries, causal, ring",
        "step  computes with       sends onward            sends home",
        "   0  shard 1 (10 cells)  1 to rank 2             -",
        "   1  shard 0 (8 cells)   0 (2 tokens) to rank 2  0 (2 tokens) to rank 2",
        "   2  shard 2 (8 cells)   -                       2 to rank 2",
    ]


def test_a_verdict_prints_as_a_sentence():
    """For people who check a layout of their own."""
    assert str(rf.verify(full_ring())) == (
        "4 ranks: 64 visible cells, each computed once in 16 visits; 12 hops onward, 12 home"
    )


def test_the_oracle_counts_what_verify_counts():
    """The picture in the module of masks has 18 visible cells."""
    mask = rf.causal & rf.window(2, 0) & rf.documents((0, 5, 8))
    seen = oracle.table(oracle.both(oracle.window(2, 0), oracle.documents((0, 5, 8))), 8)
    verdict = rf.verify(rf.plans(rf.Sharding(8, (0, 3), mask)))
    assert verdict.cells == int(seen.sum()) == mask.draw(8).count("█") == 18
