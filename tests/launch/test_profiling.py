"""Traces of real processes: every hop and visit is in them by name, and a viewer can show what overlaps."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

import ringflash as rf
from ringflash.plan import Plan

Event = dict[str, Any]
LAYERS = 2  # of the runs of conftest.py


def bars(folder: Path, rank: int) -> list[Event]:
    """All that has a beginning and an end, in the order in which it began, longer things first."""
    events = json.loads((folder / f"trace-rank{rank}.json").read_text())["traceEvents"]
    found = [event for event in events if event.get("ph") == "X"]
    return sorted(found, key=lambda event: (event["ts"], -event["dur"]))


def inside(outer: Event, events: list[Event]) -> list[Event]:
    """Those that begin and end within ``outer``."""
    end = outer["ts"] + outer["dur"]
    return [event for event in events if outer["ts"] <= event["ts"] and event["ts"] + event["dur"] <= end]


def named(start: str, events: list[Event]) -> list[Event]:
    return [event for event in events if event["name"].startswith(start)]


def ranges(plan: Plan, home: bool) -> list[str]:
    """The names of what the loop does, in its order."""
    found = []
    for number, step in enumerate(plan.steps):
        found += [f"ringflash onward, for step {batch.due}" for batch in step.onward]
        found += [f"ringflash visit, step {number}, shard {visit.shard}" for visit in step.visits]
        found += [f"ringflash home, step {number}" for _ in step.home if home]
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_a_trace_names_every_hop_and_visit(stopped_run: tuple[Path, str], rank: int) -> None:
    """Each layer of each profiled step has the ranges of its plan, in order, inside its attention: nothing is missing."""
    events = bars(stopped_run[0], rank)
    plan = rf.plan(rf.Sharding(61, (rank, 2), rf.causal))
    steps = named("step ", events)
    assert [step["name"] for step in steps] == ["step 2", "step 3"]
    for step in steps:
        within = inside(step, events)
        for operator, home in (("ringflash::attend", False), ("ringflash::attend_backward", True)):
            calls = [event for event in within if event["name"] == operator]
            assert len(calls) == LAYERS
            for call in calls:
                assert [event["name"] for event in named("ringflash ", inside(call, within))] == ranges(plan, home)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_transfer_is_posted_before_the_visit_that_hides_it(stopped_run: tuple[Path, str], rank: int) -> None:
    """Overlap is what the trace is for: what step 1 uses is on its way while step 0 computes."""
    events = bars(stopped_run[0], rank)
    posts = named("ringflash onward, for step 1", events)
    visits = named("ringflash visit, step 0", events)
    assert len(posts) == len(visits) == 2 * 2 * LAYERS  # two steps, forward and backward
    transfers = named("gloo:recv", events)
    for post, visit in zip(posts, visits, strict=True):
        assert post["ts"] + post["dur"] <= visit["ts"]
        begun = [x for x in transfers if post["ts"] <= x["ts"] <= post["ts"] + post["dur"]]
        assert len(begun) == 1 and begun[0]["ts"] + begun[0]["dur"] > visit["ts"]


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_in_a_row_overlaps_without_being_nested(stopped_run: tuple[Path, str], rank: int) -> None:
    """Viewers drop a bar that begins in one and ends after it; that is how transfers come out of PyTorch."""
    rows = defaultdict(list)
    for event in bars(stopped_run[0], rank):
        rows[event["pid"], event["tid"]].append(event)
    for row in rows.values():
        open_until: list[float] = []
        for event in row:
            while open_until and open_until[-1] <= event["ts"] + 1e-3:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1] + 1e-3, event
            open_until.append(end)


def test_a_trace_says_whose_it_is(stopped_run: tuple[Path, str]) -> None:
    """Traces of many ranks are opened together; the run says where they are and what opens them."""
    folder, output = stopped_run
    assert f"profile: steps 2 to 3 of every rank are in {folder / 'trace-rank0.json'}" in output
    assert "https://ui.perfetto.dev" in output
    for rank in range(2):
        events = json.loads((folder / f"trace-rank{rank}.json").read_text())["traceEvents"]
        names = Counter(event["args"]["name"] for event in events if event["name"] in ("process_name", "thread_name"))
        assert names[f"rank {rank} of 2"] == 1 and names["transfers 1"] == 1
