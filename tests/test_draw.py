"""Pictures of plans, and the numbers in them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringflash as rf
from ringflash.forecast.cost import Estimate, estimate
from ringflash.plan import Plan
from ringflash.views.chart import Chart, Palette, chart_of_pass, chart_of_work
from ringflash.views.draw import PALE, colour_cells


@st.composite
def problems(draw: st.DrawFn) -> list[Plan]:
    """Plans of small problems, with everything that a picture has to cope with: empty ranks, other keys, foreign masks."""
    length, ranks = draw(st.integers(0, 40)), draw(st.integers(1, 9))
    offsets = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
    masks = [rf.full, rf.causal, rf.window(3, 1), rf.chunks(5), rf.causal & rf.documents([0, *offsets, length])]
    layout = draw(st.sampled_from(["contiguous", "zigzag", "striped"]))
    route = draw(st.sampled_from(["ring", "ring_down", "gather", "needed_only"]))
    plans = rf.plans(rf.Sharding(length, (0, ranks), draw(st.sampled_from(masks)), layout, route))
    return [plan.turned for plan in plans] if draw(st.booleans()) else plans


def modelled(plans: list[Plan], **options: int) -> Estimate:
    return estimate(plans, "h100", **{"heads": 4, "kv_heads": 2, "head_dim": 64, "ranks_per_node": 2} | options)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_a_cell_has_the_colour_of_the_rank_that_computes_it(plans: list[Plan]) -> None:
    """Full where that rank holds both sides, pale where one travelled, white where nobody may look: as the mask says."""
    first, palette = plans[0], Palette(plans[0].ranks)
    length = first.queries.length
    edges = np.arange(length + 1)
    picture = colour_cells(first, palette, edges, edges)
    holder = {int(p): rank for rank in range(first.ranks) for p in first.queries.positions(rank)}
    lo, hi = first.mask.bounds(np.arange(length))
    full = [palette.of(rank) for rank in range(first.ranks)]
    expected = np.ones_like(picture)
    for query in range(length):
        for key in range(lo[query], min(hi[query], length)):
            colour = full[holder[query if first.travels == "keys" else key]]
            expected[query, key] = colour if holder[query] == holder[key] else 1 - PALE * (1 - colour)
    assert np.allclose(picture, expected)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_a_rank_is_always_either_computing_or_waiting(plans: list[Plan]) -> None:
    """Blocks and hatched stretches of a rank fill its row without a gap, and no two of its blocks overlap."""
    model = modelled(plans) if plans[0].travels == "keys" else None
    phases = [] if model is None else [model.forward, model.backward]
    for chart in [chart_of_work(plans), *(chart_of_pass(phase, plans) for phase in phases)]:
        row = defaultdict(list)
        for bar in chart.bars:
            if bar.lane == "compute":
                row[bar.rank].append((bar.start, bar.end))
        for rank, start, end in chart.waits:
            row[rank].append((start, end))
        slack = 1e-6 * chart.end
        for rank in range(chart.ranks) if chart.end else ():
            edges = [0.0, *(edge for block in sorted(row[rank]) for edge in block), chart.end]
            assert all(abs(a - b) <= slack for a, b in zip(edges[::2], edges[1::2], strict=True))


@settings(max_examples=30, deadline=None)
@given(problems())
def test_work_in_lockstep_counts_every_cell_and_the_busiest_rank_of_each_step(plans: list[Plan]) -> None:
    """The end of the axis is the sum over steps of the largest visit, over the mean rank's cells."""
    steps = defaultdict(list)
    for plan in plans:
        for meeting in plan.meetings:
            steps[meeting.step].append(plan.cells(meeting.shard))
    total = sum(map(sum, steps.values()))
    chart = chart_of_work(plans)
    assert np.isclose(sum(bar.end - bar.start for bar in chart.bars), len(plans) if total else 0)
    assert np.isclose(chart.end, sum(map(max, steps.values())) * len(plans) / max(total, 1))


def test_blocks_show_the_shard_that_the_plan_meets() -> None:
    """Also where queries travel in the backward: its blocks are those of the turned plan."""
    plans = rf.plans(rf.Sharding(64, (0, 4), rf.causal, "zigzag", "ring"))
    model = modelled(plans, heads=2, kv_heads=2)
    assert model.backward.travels == "queries"
    for phase, of in ((model.forward, plans), (model.backward, [plan.turned for plan in plans])):
        shown = {(bar.rank, bar.shard) for bar in chart_of_pass(phase, plans).bars if bar.lane == "compute"}
        assert shown == {(plan.rank, meeting.shard) for plan in of for meeting in plan.meetings}


@pytest.mark.parametrize("ranks", [1, 2, 8, 9, 64])
def test_ranks_have_different_colours(ranks: int) -> None:
    """Two ranks of one colour would make the picture lie; numbers on them are black or white, whichever is read."""
    colours = Palette(ranks).of(np.arange(ranks))
    apart = np.abs(colours[:, None] - colours[None]).max(axis=-1) + np.eye(ranks)
    assert apart.min() > 1e-3
    assert {Palette(8).ink(0), Palette(8).ink(7)} == {"black", "white"}


@pytest.mark.parametrize(
    "s, suffix, options",
    [
        (rf.Sharding(64, (0, 4), layout="zigzag"), "svg", {"batch": 2}),
        (rf.Sharding(9, (0, 3), rf.full, "striped", keys=4), "svg", None),
        (rf.Sharding(2, (0, 8)), "png", {}),
        (rf.Sharding(100000, (0, 12), rf.causal & rf.window(900, 0)), "svg", {"heads_degree": 2}),
        (rf.Sharding(0, (0, 2)), "png", None),
    ],
    ids=["zigzag", "other keys", "empty ranks", "many ranks", "no tokens"],
)
def test_any_plan_can_be_drawn(s: rf.Sharding, suffix: str, options: dict[str, int] | None, tmp_path: Path) -> None:
    """With an estimate and without one; the file is a picture of its kind."""
    path, plans = tmp_path / f"plan.{suffix}", rf.plans(s)
    rf.draw(plans, path, None if options is None else modelled(plans, **options))
    start = path.read_bytes()[:2000]
    assert (b"<svg" in start) if suffix == "svg" else start.startswith(b"\x89PNG")


def test_an_incomplete_set_of_plans_is_refused(tmp_path: Path) -> None:
    """A picture of some ranks would look like a picture of all."""
    with pytest.raises(ValueError, match=r"got plans of ranks \[1\]"):
        rf.draw([rf.plan(rf.Sharding(8, (1, 2)))], tmp_path / "plan.svg")
    with pytest.raises(ValueError, match=r"got plans of ranks \[\]"):
        rf.draw([], tmp_path / "plan.svg")


def test_an_empty_chart_has_no_waits() -> None:
    """Nothing to do takes no time."""
    assert Chart("", "s", ranks=2, end=0.0, bars=()).waits == []
