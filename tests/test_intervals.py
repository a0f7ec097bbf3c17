"""Row intervals as blocks and tiles: every cell once, in one of the kind that it says; and tables that do not pile up."""

from __future__ import annotations

import threading
import weakref
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import planned

import ringflash as rf
from ringflash import intervals as module
from ringflash.intervals import Intervals, Tile, intervals_of, key_blocks, query_blocks, tiles
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
    assert table.query_positions.tolist() == table.queries.tolist() == [-2, 0]
    assert table.key_positions.tolist() == table.keys.tolist() == [0, 2, 4]
    assert table.query_positions.dtype == table.key_positions.dtype == torch.int32
    assert table.queries.dtype == table.keys.dtype == torch.int64  # what reference multiplies to random numbers


def test_positions_that_do_not_fit_are_refused():
    """They would wrap around, and distances be wrong without a word."""
    for offset in (1 << 31, -(1 << 31) - 1):
        plan = rf.plan(rf.Sharding(4, (0, 1), rf.full, q_offset=offset))
        with pytest.raises(ValueError, match="32 bits"):
            _ = Intervals(plan, 0, CPU).query_positions
    edge = rf.plan(rf.Sharding(4, (0, 1), rf.full, q_offset=(1 << 31) - 4))
    assert int(Intervals(edge, 0, CPU).query_positions[-1]) == (1 << 31) - 1


def block_ranges(seen: np.ndarray, block_q: int, block_k: int) -> list[list[int]]:
    """By definition, for each block of rows: the first and past the last block of columns of which any cell is seen,
    and between them the blocks of which every cell is."""
    found = []
    for q in range(0, seen.shape[0], block_q):
        columns = [seen[q : q + block_q, k : k + block_k] for k in range(0, seen.shape[1], block_k)]
        touched = [i for i, block in enumerate(columns) if block.any()]
        full = [i for i, block in enumerate(columns) if block.all() and touched]
        start, end = (touched[0], touched[-1] + 1) if touched else (0, 0)
        assert not full or full == list(range(full[0], full[-1] + 1))
        found.append([start, full[0], full[-1] + 1, end] if full else [start, end, end, end])
    return found


@given(row_intervals(longest=12), st.integers(0, 5), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=200)
def test_block_ranges_are_what_a_look_at_every_cell_finds(rows, unseen, block_q, block_k):
    """A block too few is a key unseen, a block too many is time lost, and a full one is computed without a mask."""
    begin, end = rows
    keys = int(end.max()) + unseen
    cells = seen(*rows)[:, :-1]
    cells = np.pad(cells, ((0, 0), (0, unseen)))
    whole = keys // block_k * block_k
    inside = np.pad(cells, ((0, 0), (0, -keys % block_k)))  # the key block that reaches past the last is never full
    assert query_blocks(begin, end, keys, block_q, block_k).tolist() == block_ranges(inside, block_q, block_k)
    transposed = block_ranges(inside.T, block_k, block_q)
    assert key_blocks(begin, end, keys, block_q, block_k).tolist() == transposed
    assert all(full_start == full_end for _, full_start, full_end, _ in transposed[whole // block_k :])


@given(planned(), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=60)
def test_blocks_compute_every_cell_of_every_visit_exactly_once(planned, block_q, block_k):
    """As a kernel reads them, any layout and mask: partly visible blocks under the mask, full ones without it."""
    s, _ = planned
    for plan in rf.plans(s):
        for visit in plan.legs.visits:
            table = intervals_of(plan, visit.shard, CPU)
            queries, keys = len(plan.q_positions), plan.key_tokens(visit.shard)
            expected = table.seen(slice(0, queries), slice(0, keys)).int()
            rows = len(expected)
            by_queries = torch.zeros(rows, -(-queries // block_q) * block_q, -(-keys // block_k) * block_k).int()
            by_keys = by_queries.clone()
            masked = torch.nn.functional.pad(
                expected, (0, by_queries.shape[2] - keys, 0, by_queries.shape[1] - queries)
            )
            for row in range(rows):
                for i, (start, full_start, full_end, end) in enumerate(
                    table.query_blocks(block_q, block_k)[row].tolist()
                ):
                    assert 0 <= start <= full_start <= full_end <= end <= -(-keys // block_k)
                    for j in range(start, end):
                        block = row, slice(i * block_q, (i + 1) * block_q), slice(j * block_k, (j + 1) * block_k)
                        by_queries[block] += 1 if full_start <= j < full_end else masked[block]
                for j, (start, full_start, full_end, end) in enumerate(
                    table.key_blocks(block_q, block_k)[row].tolist()
                ):
                    assert 0 <= start <= full_start <= full_end <= end <= -(-queries // block_q)
                    for i in range(start, end):
                        block = row, slice(i * block_q, (i + 1) * block_q), slice(j * block_k, (j + 1) * block_k)
                        by_keys[block] += 1 if full_start <= i < full_end else masked[block]
            for count in (by_queries, by_keys):
                assert not count[:, :, keys:].any()  # rows that do not exist are nobody's, but keys would be read
                assert torch.equal(count[:, :queries, :keys], expected)


@given(planned())
@settings(max_examples=60)
def test_one_build_for_all_hops_is_every_hop_built_alone(planned):
    """Views of the wrong part of the buffer would be another hop's keys."""
    s, _ = planned
    for plan in [*rf.plans(s), *(plan.turned for plan in rf.plans(s))]:
        cache = module._Cache(1 << 20)
        for shard in range(s.ranks):  # also those that are not visited
            together, alone = cache.get(plan, shard, CPU), Intervals(plan, shard, CPU)
            for mine, expected in zip((together.begin, together.end), plan.intervals(shard), strict=True):
                assert mine.dtype == torch.int32
                assert np.array_equal(mine.numpy(), expected)
            assert together.key_positions.tolist() == plan.sides(shard)[1].tolist()
            assert together.query_positions.tolist() == plan.sides(shard)[0].tolist()
            assert together.tiles == alone.tiles
            for blocks in ("query_blocks", "key_blocks"):
                assert torch.equal(getattr(together, blocks)(3, 2), getattr(alone, blocks)(3, 2))


def test_all_hops_are_aligned_views_of_one_copy():
    """One copy for a ring, not one for each hop; and a kernel is not compiled anew for an address that is less round."""
    plan = rf.plan(rf.Sharding(997, (3, 7), rf.causal, "zigzag"))
    cache = module._Cache(1 << 20)
    hops = [cache.get(plan, visit.shard, CPU) for visit in plan.legs.visits]
    assert len(hops) == 7
    for kind in (
        [x for hop in hops for x in (hop.begin, hop.end)],
        [x for hop in hops for x in (hop.query_positions, hop.key_positions)],
        [hop.query_blocks(16, 32) for hop in hops],
        [hop.key_blocks(16, 32) for hop in hops],
    ):
        assert len({x.untyped_storage().data_ptr() for x in kind}) == 1
        assert all(x.data_ptr() % 64 == 0 and x.is_contiguous() and x.dtype == torch.int32 for x in kind)


def test_a_mask_is_asked_once_for_all_hops(monkeypatch):
    """Documents are looked up for every query; once for each of hundreds of hops would be felt at every step."""
    asked = []
    original = rf.Mask.bounds
    plan = rf.plan(rf.Sharding(64, (5, 8), rf.documents([[0, 7, 64], [0, 64]])))
    visits = plan.legs.visits
    monkeypatch.setattr(rf.Mask, "bounds", lambda *args: asked.append(1) or original(*args))
    cache = module._Cache(1 << 20)
    for visit in visits:
        cache.get(plan, visit.shard, CPU).key_blocks(4, 4)
    assert len(visits) == 8 and len(asked) == 2  # one for each row


def test_empty_shards_have_empty_tables():
    """More ranks than tokens: some hold no query, some no key."""
    plan = rf.plan(rf.Sharding(2, (0, 3), rf.full, "contiguous"))  # this rank holds nothing
    table = Intervals(plan, 1, CPU)
    assert table.begin.shape == table.end.shape == (1, 0)
    assert table.query_blocks(4, 4).shape == (1, 0, 4)
    assert table.key_blocks(4, 4).tolist() == [[[0, 0, 0, 0]]]
    assert table.tiles == [[]]
    no_keys = Intervals(rf.plan(rf.Sharding(2, (1, 3), rf.full, "contiguous")), 0, CPU)
    assert no_keys.query_blocks(4, 4).tolist() == [[[0, 0, 0, 0]]]
    assert no_keys.key_blocks(4, 4).shape == (1, 0, 4)
    assert no_keys.key_positions.shape == (0,)


def some_plan(i: int) -> Plan:
    return rf.plan(rf.Sharding(1000, (0, 1), rf.window(i, 0)))


def test_a_table_is_made_once_for_all_layers():
    """Every layer, forward and backward, asks for the same one."""
    plan = rf.plan(rf.Sharding(8, (0, 2), rf.causal))
    table = intervals_of(plan, 0, CPU)
    assert table is intervals_of(plan, 0, CPU)
    assert table is not intervals_of(plan, 1, CPU)
    for blocks in (table.query_blocks, table.key_blocks):
        assert blocks(4, 4).data_ptr() == blocks(4, 4).data_ptr()
        assert blocks(4, 4).data_ptr() != blocks(4, 2).data_ptr()


def test_tables_of_the_past_are_let_go():
    """Packed documents differ every step; a cache without a bound would be a leak. The newest are kept.

    At once, too, and not when a garbage collector finds the time: this is memory of the device.
    """
    measure = module._Cache(1 << 20)
    measure.get(some_plan(0), 0, CPU)
    cache = module._Cache(5 * measure.nbytes)
    plans = [some_plan(i) for i in range(1, 41)]
    tables = [weakref.ref(cache.get(plan, 0, CPU)) for plan in plans]
    assert [table() is not None for table in tables] == [False] * 35 + [True] * 5
    assert cache.get(plans[35], 0, CPU) is tables[35]()  # asked for again, and so the newest
    cache.get(plans[0], 0, CPU)
    assert [i for i, table in enumerate(tables) if table() is not None] == [35, 37, 38, 39]


def test_block_ranges_and_positions_count():
    """They are made later than the rows, and take room all the same."""
    cache = module._Cache(1 << 20)
    table = cache.get(some_plan(1), 0, CPU)
    sizes = [cache.nbytes]
    for ask in (lambda: table.query_blocks(8, 8), lambda: table.key_blocks(8, 8), lambda: table.query_positions):
        ask()
        sizes.append(cache.nbytes)
    assert [b - a for a, b in pairwise(sizes)] == [2048, 2048, 8064]  # 125 blocks, 125 blocks, 2 x 1000 positions
    narrow = module._Cache(2 * sizes[-1])
    for i in range(1, 10):
        late = narrow.get(some_plan(i), 0, CPU)
        assert narrow.nbytes <= 2 * sizes[-1]
        late.query_blocks(8, 8), late.key_blocks(8, 8), late.query_positions


def test_few_shardings_are_kept_whatever_their_size():
    """A thousand small ones are a pile too; the ranks of a local world share one sharding."""
    cache = module._Cache(1 << 30)
    everyone = [rf.plans(rf.Sharding(24, (0, 12), rf.window(i, 0), "zigzag")) for i in range(1, 13)]
    kept = [[weakref.ref(cache.get(plan, plan.rank, CPU)) for plan in plans] for plans in everyone]
    alive = [sum(table() is not None for table in tables) for tables in kept]
    assert alive == [0] * 4 + [12] * 8


def test_threads_share_one_table():
    """Ranks of a local world are threads; a table made twice is a table counted twice."""
    cache = module._Cache(1 << 20)
    plan = some_plan(1)
    gate, found = threading.Barrier(8), []

    def ask() -> None:
        gate.wait()
        table = cache.get(plan, 0, CPU)
        found.append((id(table), table.query_blocks(64, 64).data_ptr(), table.key_positions.data_ptr()))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


def test_a_table_larger_than_the_cache_is_served():
    """One very long sequence is no reason to fail."""
    cache = module._Cache(10)
    for plan in (some_plan(1), some_plan(2)):
        table = cache.get(plan, 0, CPU)
        assert table.begin.shape == (1, 1000)
        assert cache.get(plan, 0, CPU) is table


@pytest.mark.parametrize("mask", [rf.causal, rf.window(5, 0), rf.documents([0, 9, 40])], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_the_span_of_queries_leaves_out_only_who_sees_nothing(layout, mask):
    """Blocks outside it are not launched: whoever is forgotten keeps what it had before."""
    for rank in range(3):
        plan = rf.plan(rf.Sharding(40, (rank, 3), mask, layout))
        for shard in range(3):
            table = Intervals(plan, shard, CPU)
            first, past = table.query_span(4, 4)
            sees = (table.begin < table.end).any(0)
            assert not sees[: 4 * first].any() and not sees[4 * past :].any()
            assert first == past == 0 or (sees[4 * first :][:4].any() and sees[4 * (past - 1) :][:4].any())


@pytest.mark.gpu
def test_tables_reach_a_device_without_stopping_it():
    """A wait for the device in every step with new documents would idle it; a stream of one's own sees them whole."""
    plan = rf.plan(rf.Sharding(1 << 16, (3, 8), rf.causal & rf.documents([0, 1000, 1 << 16]), "zigzag"))
    device = torch.device("cuda", torch.cuda.current_device())
    cache, other = module._Cache(1 << 24), torch.cuda.Stream()
    found = []
    busy = torch.cuda._sleep
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        busy(100_000_000)  # the copies stand behind this
        for visit in plan.legs.visits:
            table = cache.get(plan, visit.shard, device)
            for _ in (table.begin, table.query_blocks(128, 128), table.key_blocks(64, 128), table.key_positions):
                pass
            with torch.cuda.stream(other):
                tensors = table.begin, table.end, table.query_blocks(128, 128), table.key_blocks(64, 128)
                found.append([x.clone() for x in (*tensors, table.query_positions, table.key_positions)])
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()
    for visit, tensors in zip(plan.legs.visits, found, strict=True):
        alone = Intervals(plan, visit.shard, CPU)
        blocks = alone.query_blocks(128, 128), alone.key_blocks(64, 128)
        expected = alone.begin, alone.end, *blocks, alone.query_positions, alone.key_positions
        assert all(torch.equal(a.cpu(), b) for a, b in zip(tensors, expected, strict=True))


def test_alternating_masks_build_their_tables_once_whichever_side_travels():
    """Layers under six masks, with queries travelling in the backward: the second step finds every table."""
    built = []

    def one_rank(group):
        s = rf.Sharding(32, group, rf.causal, "zigzag")
        x = s.shard(torch.randn(1, 32, 4, 8), 1).requires_grad_()
        for step in range(2):
            if step:
                s.unshard(x.detach(), 1)  # both ranks are through with the first step
                built.clear()
            hidden = x
            for reach in range(6):
                hidden = rf.ring_attention(hidden, hidden, hidden, s, mask=rf.causal & rf.window(3 + reach, 0))
            hidden.sum().backward()

    plain = module._Copied.__init__
    with mock.patch.object(module._Copied, "__init__", lambda self, *args: (built.append(1), plain(self, *args))[1]):
        rf.local_world(2).run(one_rank)
    assert not built
