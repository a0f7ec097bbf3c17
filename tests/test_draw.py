"""Pictures of plans, and the numbers in them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringflash as rf
from ringflash.forecast.cost import Estimate, estimate
from ringflash.plan import Plan, cheaper_backward
from ringflash.views.chart import Chart, Palette, chart_of_pass, chart_of_work
from ringflash.views.draw import PALE, choose_ticks, colour_cells


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
    for chart in [chart_of_work(plans), *(chart_of_pass(phase, len(plans)) for phase in phases)]:
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
    """Also where queries travel in the backward, and go round the other way: its blocks are those of its own plans."""
    for layout in ("zigzag", "contiguous"):
        plans = rf.plans(rf.Sharding(64, (0, 4), rf.causal, layout, "ring"))
        model = modelled(plans, heads=2, kv_heads=2)
        assert model.backward.travels == "queries"
        cost = model.workload
        backward = [cheaper_backward(plan, cost.keys, cost.queries) for plan in plans]
        assert layout == "zigzag" or backward[0].route != plans[0].route
        for phase, of in ((model.forward, plans), (model.backward, backward)):
            shown = {(bar.rank, bar.shard) for bar in chart_of_pass(phase, len(plans)).bars if bar.lane == "compute"}
            met = {(plan.rank, meeting.step, meeting.shard) for plan in of for meeting in plan.meetings}
            assert shown == {(rank, shard) for rank, _, shard in met}
            by_step = {
                (span.rank, span.step): int(span.label.split()[1]) for span in phase.spans if span.lane == "compute"
            }
            assert met == {(rank, step, shard) for (rank, step), shard in by_step.items()}


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


def test_an_estimate_of_other_plans_is_refused(tmp_path: Path) -> None:
    """Its seconds would stand beside a matrix they are not of; one of the same plans is drawn with either side turned."""
    plans = rf.plans(rf.Sharding(64, (0, 4), rf.causal, "zigzag", "ring"))
    for other in (
        rf.Sharding(128, (0, 4), rf.causal, "zigzag", "ring"),
        rf.Sharding(64, (0, 2), rf.causal, "zigzag", "ring"),
        rf.Sharding(64, (0, 4), rf.causal, "contiguous", "ring"),
        rf.Sharding(64, (0, 4), rf.full, "zigzag", "ring"),
        rf.Sharding(64, (0, 4), rf.causal, "zigzag", "gather"),
    ):
        with pytest.raises(ValueError, match="the estimate is of other plans"):
            rf.draw(plans, tmp_path / "plan.svg", modelled(rf.plans(other)))
    rf.draw([plan.turned for plan in plans], tmp_path / "plan.svg", modelled(plans))


@pytest.mark.parametrize(
    "change, error, sentence",
    [
        ({"path": None}, TypeError, "draw: path is None; .*ends in .svg"),
        ({"path": ""}, ValueError, "draw: path is ''; .*ends in .svg or .png or .pdf"),
        ({"path": "plan"}, ValueError, "draw: path is 'plan'; .*ends in .svg"),
        ({"path": "plan.xyz"}, ValueError, "draw: path is 'plan.xyz'; .*ends in .svg"),
        ({"path": "folder.svg"}, ValueError, "draw: path is 'folder.svg', a folder"),
        ({"plans": rf.Sharding(8, (0, 2))}, TypeError, "draw: plans is a Sharding; .*rf.plans"),
        ({"plans": rf.plan(rf.Sharding(8, (0, 2)))}, TypeError, "draw: plans is a Plan; .*rf.plans"),
        ({"estimate": "h100"}, TypeError, "draw: estimate is 'h100'; .*rf.estimate"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(
    change: dict[str, Any], error: type[Exception], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is drawn, with what is accepted."""
    monkeypatch.chdir(tmp_path)
    Path("folder.svg").mkdir()
    with pytest.raises(error, match=sentence):
        rf.draw(**({"plans": rf.plans(rf.Sharding(8, (0, 2))), "path": "plan.svg"} | change))


@given(st.integers(0, 1 << 40))
def test_ticks_stand_at_positions_and_none_twice(length: int) -> None:
    """Tiny lengths once had 0, 0, 1, 2, 2."""
    ticks = choose_ticks(length)
    assert ticks == sorted(set(ticks)) and ticks[0] == 0 and ticks[-1] == length and len(ticks) == min(5, length + 1)


def test_an_empty_chart_has_no_waits() -> None:
    """Nothing to do takes no time."""
    assert Chart("", "s", ranks=2, end=0.0, bars=()).waits == []
