"""Row intervals as tiles: every cell in exactly one, of the kind that it says; and tables that do not pile up."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringflash as rf
from ringflash import intervals as module
from ringflash.intervals import Intervals, Tile, intervals_of, tiles
from ringflash.plan import Plan

CPU = torch.device("cpu")


@st.composite
def row_intervals(draw: st.DrawFn, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of rows, each with its own manner of moving begin and end: flat, climbing by one, jumping, empty."""
    begin, end = [draw(st.integers(0, 5))], [draw(st.integers(5, 60))]
    for _ in range(draw(st.integers(1, 5))):
        begin_step, end_step = draw(
            st.sampled_from([(0, 0), (0, 1), (0, 1), (1, 1), (0, 2), (3, 3), (1, 0), (0, 40), (50, 50)])
        )
        for _ in range(draw(st.integers(1, longest))):
            end.append(end[-1] + end_step)
            begin.append(min(end[-1], begin[-1] + begin_step))
        if draw(st.booleans()):  # a jump between stretches; sometimes so far that rows see nothing
            end.append(end[-1] + draw(st.integers(0, 9)))
            begin.append(min(end[-1], begin[-1] + draw(st.sampled_from([0, 2, 10_000]))))
    return np.array(begin, dtype=np.int32), np.array(end, dtype=np.int32)


def painted(found: list[Tile], begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How often the tiles compute each cell, by what each kind of tile means to a kernel."""
    count = np.zeros((len(begin), int(end.max(initial=0)) + 1), dtype=int)
    keys = np.arange(count.shape[1])
    for t in found:
        assert 0 <= t.q0 < t.q1 <= len(begin) and 0 <= t.k0 < t.k1 <= count.shape[1] - 1
        inside = np.zeros(count.shape, dtype=bool)
        inside[t.q0 : t.q1, t.k0 : t.k1] = True
        if t.kind == "causal":
            assert t.q1 - t.q0 == t.k1 - t.k0
            inside &= keys - t.k0 <= (np.arange(len(begin)) - t.q0)[:, None]
        elif t.kind == "masked":
            inside &= (keys >= begin[:, None]) & (keys < end[:, None])
        count += inside
    return count


def seen(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    keys = np.arange(int(end.max(initial=0)) + 1)
    return (keys >= begin[:, None]) & (keys < end[:, None])


@given(row_intervals(longest=80))
@settings(max_examples=150)
def test_tiles_cover_every_cell_exactly_once(rows):
    """A cell in no tile is a key unseen, a cell in two is a key counted twice, one outside is a leak."""
    assert (painted(tiles(*rows), *rows) == seen(*rows)).all()


@given(row_intervals(longest=12), st.integers(1, 9), st.integers(1, 6))
@settings(max_examples=200)
def test_tiles_cover_every_cell_exactly_once_at_any_block_size(rows, block, short):
    """Small blocks put many more seams into few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        patch.setattr(module, "_SHORT", short)
        assert (painted(tiles(*rows), *rows) == seen(*rows)).all()


def test_no_rows_are_no_tiles():
    """An empty shard has nothing to compute."""
    none = np.zeros(0, dtype=np.int32)
    assert tiles(none, none) == []
    assert tiles(np.zeros(3, np.int32), np.zeros(3, np.int32)) == []


@pytest.mark.parametrize(
    ("mask", "layout", "shard", "kinds"),
    [
        (rf.full, "contiguous", 0, ["full"]),
        (rf.causal, "contiguous", 1, ["causal"]),
        (rf.causal, "contiguous", 0, ["full"]),
        (rf.causal, "zigzag", 0, ["full"]),
        (rf.causal, "striped", 0, ["causal"]),
    ],
)
def test_plain_masks_need_no_additive_mask(mask, layout, shard, kinds):
    """The common visits are one rectangle or one triangle: the fast paths of every kernel."""
    plan = rf.plan(rf.Sharding(256, (1, 2), mask, layout))
    found = tiles(*(x[0] for x in plan.intervals(shard)))
    assert [t.kind for t in found] in (kinds, ["full", *kinds])
    assert "masked" not in {t.kind for t in found}


def test_a_wide_window_computes_its_inside_unmasked():
    """Only the ragged edges of a window pay for a mask."""
    plan = rf.plan(rf.Sharding(4096, (0, 1), rf.window(1023, 0)))
    found = tiles(*(x[0] for x in plan.intervals(0)))
    area = {kind: sum((t.q1 - t.q0) * (t.k1 - t.k0) for t in found if t.kind == kind) for kind in ("full", "masked")}
    assert area["full"] > area["masked"]


def test_seen_is_the_mask_of_a_corner():
    """Kernels ask for any block of queries and keys."""
    plan = rf.plan(rf.Sharding(6, (0, 1), rf.documents([[0, 2, 6], [0, 6]]) & rf.causal))
    table = Intervals(plan, 0, CPU)
    whole = table.seen(slice(0, 6), slice(0, 6))
    assert torch.equal(whole[1], torch.ones(6, 6).tril().bool())
    assert torch.equal(table.seen(slice(1, 4), slice(2, 5)), whole[:, 1:4, 2:5])


def test_true_positions_travel_with_the_table():
    """Distances and random numbers are keyed on global positions, offset of the queries included."""
    plan = rf.plan(rf.Sharding(4, (1, 2), rf.full, "striped", keys=6, q_offset=-3))
    table = Intervals(plan, 0, CPU)
    assert table.queries.tolist() == [-2, 0]
    assert table.keys.tolist() == [0, 2, 4]


def some_plan(i: int) -> Plan:
    return rf.plan(rf.Sharding(1000, (0, 1), rf.window(i, 0)))


def test_a_table_is_made_once_for_all_layers():
    """Every layer, forward and backward, asks for the same one."""
    plan = rf.plan(rf.Sharding(8, (0, 2), rf.causal))
    assert intervals_of(plan, 0, CPU) is intervals_of(plan, 0, CPU)
    assert intervals_of(plan, 0, CPU) is not intervals_of(plan, 1, CPU)


def test_tables_of_the_past_are_let_go():
    """Packed documents differ every step; a cache without a bound would be a leak. The newest are kept."""
    room = 5 * Intervals(some_plan(0), 0, CPU).nbytes
    cache = module._Cache(room)
    plans = [some_plan(i) for i in range(1, 41)]
    tables = [weakref.ref(cache.get(plan, 0, CPU)) for plan in plans]
    gc.collect()
    assert [table() is not None for table in tables] == [False] * 35 + [True] * 5
    assert cache.get(plans[35], 0, CPU) is tables[35]()  # asked for again, and so the newest
    cache.get(plans[0], 0, CPU)
    gc.collect()
    assert [i for i, table in enumerate(tables) if table() is not None] == [35, 37, 38, 39]


def test_a_table_larger_than_the_cache_is_served():
    """One very long sequence is no reason to fail."""
    cache = module._Cache(10)
    for plan in (some_plan(1), some_plan(2)):
        table = cache.get(plan, 0, CPU)
        assert table.begin.shape == (1, 1000)
        assert cache.get(plan, 0, CPU) is table
