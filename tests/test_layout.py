"""Layouts partition the sequence, whatever its length, and shards put together are the sequence again."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ringflash as rf
from ringflash.layout import LAYOUTS, solid
from ringflash.route import ROUTES

NAMES = sorted(LAYOUTS)


@pytest.mark.parametrize("ranks", range(1, 13))
@pytest.mark.parametrize("name", NAMES)
def test_every_position_is_on_exactly_one_rank(name, ranks):
    """For every length, with uneven and empty shards: a position lost or held twice would be silently wrong."""
    for length in range(51):
        layout = LAYOUTS[name](length, ranks)
        layout.check()
        assert (layout.ranks, layout.length) == (ranks, length)
        shards = [layout.positions(rank).tolist() for rank in range(ranks)]
        assert sorted(p for shard in shards for p in shard) == list(range(length))
        assert all(shard == sorted(shard) for shard in shards)
        assert [layout.tokens(rank) for rank in range(ranks)] == [len(shard) for shard in shards]


@pytest.mark.parametrize("name", NAMES)
def test_shards_differ_by_few_positions(name):
    """Uneven is what the length forces, not more: one position, or one for each of zigzag's two chunks."""
    for length in range(51):
        for ranks in range(1, 13):
            tokens = [LAYOUTS[name](length, ranks).tokens(rank) for rank in range(ranks)]
            assert max(tokens) - min(tokens) <= (2 if name == "zigzag" else 1), (length, ranks)


@pytest.mark.parametrize("name", NAMES)
@given(length=st.integers(0, 50), ranks=st.integers(1, 12), asked=st.lists(st.integers(-9, 99), max_size=20))
@settings(max_examples=60)
def test_below_counts(name, length, ranks, asked):
    """Where a key would go in a shard is how many of the shard's positions lie before it, for any position at all."""
    layout = LAYOUTS[name](length, ranks)
    for rank in range(ranks):
        counted = [sum(p < x for p in layout.positions(rank).tolist()) for x in asked]
        assert layout.below(rank, np.array(asked, dtype=np.int64)).tolist() == counted


@pytest.mark.parametrize("name", NAMES)
@given(length=st.integers(0, 50), ranks=st.integers(1, 6), ways=st.integers(1, 6))
@settings(max_examples=60)
def test_split_cuts_each_shard_evenly_and_in_order(name, length, ranks, ways):
    """The parts of a shard put in a row are the shard again, still sorted, and none is fuller by more than a position."""
    layout = LAYOUTS[name](length, ranks)
    parts = layout.split(ways)
    parts.check()
    assert parts.ranks == ranks * ways
    for rank in range(ranks):
        row = [parts.positions(rank * ways + i).tolist() for i in range(ways)]
        assert [p for part in row for p in part] == layout.positions(rank).tolist()
        assert max(map(len, row)) - min(map(len, row)) <= 1


@given(st.integers(0, 30), st.integers(1, 6), st.sampled_from(NAMES), st.sampled_from([-2, 0, 1, 2]))
@settings(max_examples=60)
def test_unshard_after_shard_is_the_sequence(length, ranks, name, dim):
    """On every rank, along any dimension, and shard takes what the positions say."""
    shape = [2, 3, 4]
    shape[dim] = length
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(length))

    def one_rank(group: Any) -> Tensor:
        s = rf.Sharding(length, group, layout=name)
        mine = s.shard(whole, dim)
        assert mine.is_contiguous() and mine.shape[dim] == s.local_length
        assert torch.equal(mine, whole.index_select(dim, s.positions))
        return s.unshard(mine, dim)

    for back in rf.local_world(ranks).run(one_rank):
        assert torch.equal(back, whole)


@pytest.mark.parametrize("name", NAMES)
def test_shard_and_unshard_differentiate(name):
    """A loss that every rank takes of the whole counts once for each rank, and reaches the position's owner."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 7, 3, generator=draw, dtype=torch.float64)
    weights = torch.randn(3, 2, 7, 3, generator=draw, dtype=torch.float64)

    def one_rank(group: Any) -> Tensor:
        s = rf.Sharding(7, group, layout=name)
        x = whole.clone().requires_grad_()
        loss = (s.unshard(s.shard(x, dim=1), dim=1) * weights[group.rank]).sum()
        return torch.autograd.grad(loss, x)[0]

    for rank, grad in enumerate(rf.local_world(3).run(one_rank)):
        held = LAYOUTS[name](7, 3).positions(rank).tolist()
        expected = torch.zeros_like(whole)
        expected[:, held] = weights.sum(0)[:, held]
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_zigzag_balances_causal_work(ranks):
    """Every rank computes equally many cells: the early chunk of each is paid for by its late one."""
    for chunk in (1, 2, 7):
        length = 2 * ranks * chunk
        work = [int((LAYOUTS["zigzag"](length, ranks).positions(r) + 1).sum()) for r in range(ranks)]
        assert len(set(work)) == 1
        assert sum(work) == length * (length + 1) // 2


def test_zigzag_is_nearly_balanced_at_any_length():
    """Without divisibility the work differs by what a few rows do, not by a share of the whole."""
    for length in range(1, 51):
        for ranks in range(1, 9):
            work = [int((LAYOUTS["zigzag"](length, ranks).positions(r) + 1).sum()) for r in range(ranks)]
            assert max(work) - min(work) <= 2 * length, (length, ranks)


def test_neighbouring_chunks_are_one_run():
    """Runs are what planning costs: the rank in the middle of a zigzag holds one, and empty chunks none."""
    assert LAYOUTS["zigzag"](12, 2).runs == ((range(0, 3), range(9, 12)), (range(3, 9),))
    assert LAYOUTS["contiguous"](2, 4).runs == ((), (range(0, 1),), (), (range(1, 2),))
    assert solid(range(0, 8, 2), range(8, 10)) == (range(0, 8, 2), range(8, 10))  # the stripes have gaps
    assert all(len(run) for name in NAMES for runs in LAYOUTS[name](5, 7).runs for run in runs)


REFUSED = [
    (((range(0, 4),), (range(3, 6),)), "exactly one rank"),  # overlap
    (((range(0, 3),), (range(4, 6),)), "exactly one rank"),  # gap
    (((range(1, 3),), (range(3, 6),)), "exactly one rank"),  # does not begin at 0
    (((range(0, 3), range(0, 3)), (range(3, 6),)), "ascending"),
    (((range(3, 6), range(0, 3)),), "ascending"),
    (((range(5, -1, -1),),), "ascending"),
    (((range(0, 0), range(0, 3)),), "non-empty"),
    (((range(0, 6, 2), range(1, 6, 2)),), "ascending"),  # interleaved runs of one rank
    (((range(0, 6, 2),), (range(0, 6, 2),)), "exactly one rank"),  # stripes twice, and stripes of nobody
    (((range(0, 6, 2),), (range(1, 6, 4),)), "exactly one rank"),
]


@pytest.mark.parametrize(("runs", "words"), REFUSED)
def test_check_refuses_what_is_no_partition(runs, words):
    """A layout of one's own must be one; a sharding refuses it before anything is sent."""
    layout = rf.Layout(runs)
    with pytest.raises(ValueError, match=words):
        layout.check()
    with pytest.raises(ValueError, match=words):
        rf.Sharding(6, (0, len(runs)), layout=layout)


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1, max_size=3), st.booleans())
@settings(max_examples=200)
def test_check_accepts_partitions_and_nothing_else(cuts, permuted):
    """By arithmetic on runs: what it says of solid runs is what their positions say, one by one."""
    shards = [sorted({p for p in shard if not permuted or p % len(cuts) == i}) for i, shard in enumerate(cuts)]
    runs = tuple(tuple(range(p, p + 1) for p in shard) for shard in shards)
    held = sorted(p for shard in shards for p in shard)
    if held == list(range(len(held))):
        rf.Layout(runs).check()
    else:
        with pytest.raises(ValueError, match="exactly one rank"):
            rf.Layout(runs).check()


def test_a_layout_of_ones_own_is_taken():
    """Anything that partitions the sequence is a layout, also with empty ranks."""
    layout = rf.Layout(((range(2, 3),), (), (range(0, 2), range(3, 5))))
    s = rf.Sharding(5, (2, 3), layout=layout)
    assert s.positions.tolist() == [0, 1, 3, 4]
    assert rf.verify(rf.plans(s)).cells == 15


@pytest.mark.parametrize(("length", "ranks"), [(6, 2), (5, 3)])
def test_a_layout_for_another_problem_is_refused(length, ranks):
    """Shards of another length or world would meet the wrong keys."""
    with pytest.raises(ValueError, match="layout has 5 positions on 2 ranks"):
        rf.Sharding(length, (0, ranks), layout=LAYOUTS["striped"](5, 2))


def test_positions_are_shared_and_cannot_be_changed():
    """Everybody who asks gets the same array; changing it would move tokens of other shardings."""
    positions = LAYOUTS["zigzag"](8, 2).positions(0)
    assert positions.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        positions[0] = 3


CHOSEN = [
    (rf.full, "contiguous"),
    (rf.causal, "zigzag"),
    (rf.prefix(9), "zigzag"),
    (rf.window(5, 0), "contiguous"),
    (rf.causal & rf.documents((0, 3, 64)), "contiguous"),
    (rf.causal & rf.chunks(8), "contiguous"),
]


@pytest.mark.parametrize(("mask", "name"), CHOSEN, ids=str)
def test_auto_balances_what_grows_and_keeps_neighbours_together(mask, name):
    """A pure function of what is equal on all ranks, so that nobody has to send anything to agree."""
    assert {str(rf.Sharding(64, (rank, 4), mask).layout) for rank in range(4)} == {name}


def test_layouts_compare_by_value_and_print_short():
    """They are keys of caches, and their print goes into error messages."""
    assert LAYOUTS["zigzag"](12, 2) == LAYOUTS["zigzag"](12, 2)
    assert hash(LAYOUTS["zigzag"](12, 2)) == hash(LAYOUTS["zigzag"](12, 2))
    assert repr(LAYOUTS["striped"](5, 2)) == "Layout(striped, 5 positions on 2 ranks: 0: [0, 5) by 2; 1: [1, 4) by 2)"
    assert len(repr(LAYOUTS["zigzag"](10_000, 100))) < 200
    assert len(repr(rf.Layout((tuple(range(i, i + 1) for i in range(0, 2000, 2)),)))) < 200


def test_the_name_of_a_layout_is_for_messages_alone():
    """Layouts that place everything alike share plans, whatever they are called; the name survives a split and a pickle."""
    plain, named = rf.Layout(((range(0, 4),), (range(4, 6),))), rf.Layout(((range(0, 4),), (range(4, 6),)), "my own")
    assert plain == named and hash(plain) == hash(named)
    assert str(named) == str(named.split(2)) == str(pickle.loads(pickle.dumps(named))) == "my own"
    assert repr(named) == "Layout(my own, 6 positions on 2 ranks: 0: [0, 4); 1: [4, 6))" and str(plain) == repr(plain)
    s = rf.Sharding(6, (0, 2), layout=named)
    with pytest.raises(ValueError, match="holds 4 of 6 in the my own layout"):
        rf.ring_attention(*(torch.ones(1, 6, 1, 8),) * 3, s)


PACKED = rf.causal & rf.documents((0, 3, 4, 40, 41, 60, 64))


def test_balanced_documents_are_a_layout_with_a_name():
    """Settled when the sharding is made: the same under every mask and on every rank, and named in messages."""
    everyone = [rf.Sharding(64, (rank, 4), PACKED, "balanced") for rank in range(4)]
    assert len({s.layout for s in everyone}) == 1 and str(everyone[0].layout) == "balanced"
    assert sorted(p for s in everyone for p in s.positions.tolist()) == list(range(64))
    assert {s.local_length for s in everyone} == {16}
    other = everyone[1].with_mask(rf.causal)
    assert other.layout == everyone[1].layout and torch.equal(other.positions, everyone[1].positions)
    shared = rf.Sharding(64, (5, 8), PACKED, "balanced", heads_axis=2)
    assert shared.layout == everyone[0].layout and shared.ring_ranks == 4


def test_a_held_sharding_finds_what_it_has_worked_out():
    """Layers ask for the plan and for their own mask in every forward; nothing is derived again."""
    s = rf.Sharding(64, (0, 4), PACKED, "balanced")
    other = s.with_mask(rf.causal & rf.window(3, 0))
    assert s.plan is s.plan and s.with_mask(rf.window(3, 0) & rf.causal) is other
    again = rf.Sharding(64, (0, 4), rf.causal & rf.documents((0, 3, 4, 40, 41, 60, 64)), "balanced")
    assert again == s and again.plan is s.plan


def test_an_automatic_route_is_chosen_for_each_mask(monkeypatch):
    """And a given one is kept: with_mask is the sharding that somebody would have made with that mask."""
    monkeypatch.setattr(
        "ringflash.settled._chosen_route", lambda q, k, mask, *_: ROUTES["ring" if mask == rf.full else "gather"]
    )
    chosen, given = (rf.Sharding(64, (0, 4), rf.full, route=route) for route in ("auto", "ring"))
    assert (chosen.route, given.route) == (ROUTES["ring"], ROUTES["ring"])
    assert (chosen.with_mask(rf.causal).route, given.with_mask(rf.causal).route) == (ROUTES["gather"], ROUTES["ring"])
    assert pickle.loads(pickle.dumps(chosen)).with_mask(rf.causal).route == ROUTES["gather"]
