"""Traces that Perfetto opens."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringflash as rf
from ringflash.forecast.cost import Estimate, estimate
from ringflash.views.trace import LANES, trace


@st.composite
def estimates(draw: st.DrawFn) -> Estimate:
    ranks, degree = draw(st.sampled_from([1, 2, 4, 6])), draw(st.sampled_from([1, 2]))
    routes = [
        "ring",
        "ring_down",
        "gather",
        "needed_only",
        *([rf.double_ring(2, ranks // 2)] if ranks % 2 == 0 else []),
    ]
    mask = draw(st.sampled_from([rf.full, rf.causal, rf.window(300, 0), rf.causal & rf.documents([0, 300, 4096])]))
    layout = draw(st.sampled_from(["contiguous", "zigzag"]))
    plans = rf.plans(rf.Sharding(4096, (0, ranks), mask, layout, draw(st.sampled_from(routes))))
    heads = draw(st.sampled_from([2, 4]))
    return estimate(
        plans, "h100", heads=heads, kv_heads=2, heads_degree=degree, ranks_per_node=draw(st.sampled_from([2, 8]))
    )


def events_of(model: Estimate, folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The document, and its events by kind."""
    path = folder / "trace.json"
    trace(model, path)
    document = json.loads(path.read_text())
    kinds = defaultdict(list)
    for event in document["traceEvents"]:
        kinds[event["ph"]].append(event)
    return document, kinds


@settings(max_examples=25, deadline=None)
@given(model=estimates())
def test_every_span_is_a_bar_on_a_thread_where_nothing_overlaps(
    model: Estimate, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Viewers nest bars that overlap, which would show a message as a part of another."""
    _, kinds = events_of(model, tmp_path_factory.mktemp("trace"))
    spans = [(phase.name, span) for phase in (model.forward, model.backward) for span in phase.spans]
    assert Counter((name, span.rank + 1, span.label, span.step) for name, span in spans) == Counter(
        (bar["args"]["pass"], bar["pid"], bar["name"], bar["args"]["step"]) for bar in kinds["X"]
    )
    threads = defaultdict(list)
    for bar in kinds["X"]:
        assert bar["ts"] >= 0 and bar["dur"] >= 0
        threads[bar["pid"], bar["tid"]].append((round(1000 * bar["ts"]), round(1000 * (bar["ts"] + bar["dur"]))))
    for bars in threads.values():  # nanoseconds
        assert all(first[1] <= second[0] for first, second in pairwise(bars))
    end = max((round(1000 * (bar["ts"] + bar["dur"])) for bar in kinds["X"]), default=0)
    assert end <= 1e9 * model.seconds + 2


@settings(max_examples=25, deadline=None)
@given(model=estimates())
def test_names_order_and_arrows_are_complete(model: Estimate, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every process and thread has a name, time never runs backwards, and every arrow leads forward from bar to bar."""
    document, kinds = events_of(model, tmp_path_factory.mktemp("trace"))
    processes = {e["pid"]: e["args"]["name"] for e in kinds["M"] if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in kinds["M"] if e["name"] == "thread_name"}
    assert processes == {pid: f"rank {pid - 1}" for pid in processes}
    for bar in kinds["X"]:
        lane = bar["cat"].split(",")[1]
        assert lane in LANES and threads[bar["pid"], bar["tid"]].split()[0] == lane and bar["pid"] in processes
    assert len({tid for _, tid in threads}) == len(threads)
    times = [event["ts"] for event in document["traceEvents"] if event["ph"] != "M"]
    assert times == sorted(times)
    starts, ends = ({e["id"]: e for e in kinds[kind]} for kind in ("s", "f"))
    assert len(starts) == len(kinds["s"]) and set(starts) == set(ends)
    bars = {(bar["pid"], bar["tid"], bar["ts"]): bar for bar in kinds["X"]}
    for name, start in starts.items():
        source, target = (bars[e["pid"], e["tid"], e["ts"]] for e in (start, ends[name]))
        assert source["args"]["peer"] + 1 == target["pid"]
        assert target["ts"] >= source["ts"] + source["dur"] - 2e-3
        assert source["name"].split(" to ")[0] == target["name"].split(" to ")[0]


def test_each_hop_of_a_ring_points_at_the_visit_that_waits_for_it(tmp_path: Path) -> None:
    """Forward on four ranks: three hops onward for each shard, each used in one visit and, but for the last, sent on."""
    model = estimate(rf.plans(rf.Sharding(4096, (0, 4), rf.full, "contiguous", "ring")), "h100", heads=4)
    document, kinds = events_of(model, tmp_path)
    forward = [event for event in kinds["f"] if event["cat"].startswith("forward")]
    visits = {(bar["pid"], bar["tid"], bar["ts"]) for bar in kinds["X"] if ",compute" in bar["cat"]}
    assert len(forward) == 12
    assert {(event["pid"], event["tid"], event["ts"]) for event in forward} <= visits
    assert "model" in document["otherData"]["what"] and document["displayTimeUnit"] == "ms"


def test_messages_that_travel_at_once_get_threads_of_their_own(tmp_path: Path) -> None:
    """A double ring crosses the slow link beside its inner ring."""
    s = rf.Sharding(65536, (0, 8), rf.full, "contiguous", rf.double_ring(2, 4))
    _, kinds = events_of(estimate(rf.plans(s), "h100", heads=4, ranks_per_node=4), tmp_path)
    names = {event["args"]["name"] for event in kinds["M"] if event["name"] == "thread_name"}
    assert {"compute", "onward", "onward 2", "home"} <= names


@pytest.mark.parametrize(
    "path, error, sentence",
    [
        (None, TypeError, "trace: path is None"),
        ("", ValueError, "trace: path is ''; .*ends in .json"),
        ("timeline", ValueError, "trace: path is 'timeline'; .*ends in .json"),
        ("folder.json", ValueError, "trace: path is 'folder.json', a folder"),
    ],
)
def test_what_cannot_be_written_is_refused_in_a_sentence(
    path: Any, error: type[Exception], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is accepted; plans in the place of an estimate, too."""
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    plans = rf.plans(rf.Sharding(8, (0, 2)))
    with pytest.raises(error, match=sentence):
        trace(estimate(plans, "h100", heads=4), path)
    with pytest.raises(TypeError, match=r"trace: estimate is a list; .*rf.estimate"):
        trace(plans, tmp_path / "trace.json")  # type: ignore[arg-type]
