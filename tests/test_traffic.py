"""Bytes that plans send, counted, beside two formulas: a plain ring and an all-gather."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringflash as rf
from ringflash.forecast.traffic import traffic
from ringflash.plan import Plan


def plans_of(length: int, ranks: int, mask: rf.Mask, layout: str = "contiguous", route: str = "ring") -> list[Plan]:
    return rf.plans(rf.Sharding(length, (0, ranks), mask, layout, route=route))


@given(st.integers(1, 6), st.integers(0, 33), st.integers(1, 3), st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=40)
def test_a_plain_ring_and_an_all_gather_are_what_plans_of_a_full_mask_send(ranks, more, onward, home, per_node):
    """The two formulas are counted on real plans too: every number, also of uneven shards and of several nodes."""
    length = ranks + more  # no shard is empty: everybody needs something of everybody
    counted = dict(onward=onward, home=home, ranks_per_node=per_node)
    rings = traffic(plans_of(length, ranks, rf.full), **counted)
    direct_hops = traffic(plans_of(length, ranks, rf.full, route="gather"), **counted)
    assert rings.ours == rings.ring == direct_hops.ring
    assert direct_hops.ours == direct_hops.gather == rings.gather
    assert rings.ours.total == direct_hops.ours.total == (ranks - 1) * length * (onward + home)


def test_causal_zigzag_shards_drop_their_late_chunk_on_the_way_down():
    """A quarter of a plain ring's bytes is saved at 8 ranks; the busiest rank sends as much as ever."""
    found = traffic(plans_of(1 << 16, 8, rf.causal, "zigzag", "ring_down"))
    assert found.ours.total <= 0.76 * found.ring.total
    assert found.ours.sent == found.ring.sent
    assert "0.75 of a plain ring" in str(found)


@pytest.mark.parametrize("ranks", [8, 64])
def test_a_window_is_paid_for_by_its_width(ranks):
    """4K tokens of window in 1M: each rank needs that much of its neighbour, however many ranks there are."""
    found = traffic(plans_of(1 << 20, ranks, rf.window(4095, 0)))
    assert found.messages == ranks - 1
    grain = (1 << 20) // ranks // 32  # parts end where shards may be cut
    assert found.ours.total <= (ranks - 1) * (4096 + grain)
    assert found.ours.total >= (ranks - 1) * 4095


def test_packed_documents_send_what_their_neighbours_need():
    """Log-normal documents on a direct route: of every document that a border cuts what lies before it, and nothing else."""
    make = np.random.default_rng(0)
    lengths = np.minimum(make.lognormal(7.0, 1.2, 400).astype(int) + 1, 1 << 15).tolist()
    offsets = [0, *accumulate(lengths)]
    plans = plans_of(offsets[-1], 16, rf.causal & rf.documents(offsets), route="needed_only")
    found = traffic(plans)
    shard = offsets[-1] // 16
    needed = sum(
        r.start - offsets[bisect_right(offsets, r.start) - 1] for plan in plans for r in plan.queries.runs[plan.rank]
    )
    assert needed <= found.ours.total <= needed + 15 * (shard // 32)  # parts end where shards may be cut
    assert found.ours.total < 0.1 * found.ring.total
