"""The virtual ring: it computes what one device computes, calls a model a model, and is checked against a real ring."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringflash as rf
from ringflash.forecast.hardware import Link
from ringflash.forecast.timeline import schedule
from ringflash.views.planner import Question

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
hops, links, play, record, stopwatch, virtual_ring = map(
    importlib.import_module, ("hops", "links", "play", "record", "stopwatch", "virtual_ring")
)

SMALL = dict(heads=4, kv_heads=2, head_dim=8, dtype="float64", hardware="cpu")
PACKED = rf.causal & rf.documents([0, 5, 60, 61, 150, 193])


def staged(question: Question) -> Any:
    """A stage with random tensors for the plans of a question."""
    heads, dtype = (question.heads, question.kv_heads), getattr(torch, question.dtype)
    inputs = play.draw_inputs(question.length, heads, question.head_dim, dtype, torch.device("cpu"))
    return play.Stage(question.model.plans_of(question.plans), inputs)


def rehearsed(question: Question) -> tuple[Any, Any]:
    stage = staged(question)
    return stage, stage.rehearse(stopwatch.Budget(0))


@pytest.mark.parametrize("kv_heads", [1, 4], ids=["keys travel", "queries travel"])
@pytest.mark.parametrize(
    ("mask", "layout", "route", "ranks"),
    [
        (rf.causal, "zigzag", "ring_down", 4),
        (rf.causal & rf.window(20, 0), "contiguous", "needed_only", 5),
        (rf.full, "striped", "gather", 3),
        (PACKED, "balanced", "ring", 4),
    ],
)
def test_the_played_ranks_together_are_one_device(
    mask: Any, layout: str, route: str, ranks: int, kv_heads: int
) -> None:
    """Time of a wrong result is worth nothing: out, dq, dk and dv are one device's, whoever travels."""
    question = Question(193, ranks, mask, layout, route, **(SMALL | {"kv_heads": kv_heads}))
    stage, heard = rehearsed(question)
    assert max(stage.compare().values()) < 1e-11
    assert stage.plans["backward"][0].travels == ("keys" if kv_heads == 1 else "queries")
    for name in play.PASSES:
        assert [len(v) for v in heard.median(name)] == [len(plan.meetings) for plan in stage.plans[name]]
        assert len(heard.visits[name]) == play.LEAST and min(map(min, heard.median(name))) > 0


@pytest.mark.parametrize("lost", ["attend", "attend_backward"])
def test_a_lost_visit_is_never_timed(lost: str) -> None:
    """A schedule that computes less is faster, and its time must not reach anybody."""
    stage = staged(Question(193, 4, rf.causal, "zigzag", "ring", **SMALL))
    right, calls = getattr(stage.engine, lost), iter(range(100))

    def lossy(*arguments: Any) -> Any:
        if next(calls) != 2:
            return right(*arguments)
        if lost == "attend":
            return arguments[-2]
        dq, dk, dv = right(*arguments)
        return dq, 0 * dk, dv

    stage.engine = stage.engine._replace(**{lost: lossy})
    with pytest.raises(AssertionError, match=r"^(out|dk) is off by"):
        stage.rehearse(stopwatch.Budget(0))


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.integers(2, 6),
    compute=st.integers(1, 10**7),
    latency=st.floats(0, 1e-2),
    bandwidth=st.floats(1e6, 1e12),
    host=st.floats(0, 1e-3),
    before=st.floats(0, 1e-3),
)
def test_equal_visits_take_what_the_formula_says(
    ranks: int, compute: int, latency: float, bandwidth: float, host: float, before: float
) -> None:
    """T = sum of max(C, a + n / B) over the steps + C of the last, and the host's share of each step, for a plain ring."""
    link = Link("given", bandwidth, 1.0, latency)
    question = Question(64 * ranks, ranks, rf.full, "contiguous", "ring", **SMALL)
    model = replace(question, hardware=question.machine.with_(within=link, between=link)).model
    seconds = [[compute * links.NANO] * ranks for _ in range(ranks)]
    n = 64 * model.workload.keys.onward
    for variation, (wider, later) in links.VARIATIONS.items():
        found = links.join(model, "forward", question.plans, [links.Played(seconds, [before] * ranks)], host, variation)
        hop = max(seconds[0][0], latency * later + n / (bandwidth * wider))
        assert found.seconds == pytest.approx(before + (ranks - 1) * hop + seconds[0][0] + ranks * host, rel=1e-9)
        assert found.compute == pytest.approx(before + sum(seconds[0]))
        assert found.exposed == pytest.approx(found.seconds - found.compute, abs=1e-12)


def test_a_schedule_takes_its_visits_in_the_order_of_the_plan() -> None:
    """A visit that is charged to another rank or step would move the waiting around."""
    plans = Question(193, 4, PACKED, "balanced", "needed_only", **SMALL).plans
    seconds = [[(10 * plan.rank + i) * 1e-3 for i in range(len(plan.meetings))] for plan in plans]
    table = links.charge(schedule(plans), seconds)
    charged = {(number, v.rank): v.cells for number, move in enumerate(table.moves) for v in move.visits}
    wanted = {
        (meeting.step, plan.rank): round(spent / links.NANO)
        for plan, visits in zip(plans, seconds, strict=True)
        for meeting, spent in zip(plan.meetings, visits, strict=True)
    }
    assert charged == wanted


def test_laps_time_each_call_and_start_anew() -> None:
    """Every call has its own seconds, in order, and none is told twice."""
    laps = stopwatch.Laps(torch.device("cpu"))
    laps.lead()
    assert [laps.time(lambda x=x: x) for x in "ab"] == ["a", "b"]
    assert len(laps.take()) == 2 and laps.take() == []


def test_the_host_is_measured_without_any_message() -> None:
    """What remains of a hop when nothing is sent is the library's own Python; a held sharding is looked up, not planned."""
    per_hop = hops.microseconds_per_hop(torch.device("cpu"), calls=20)
    assert per_hop.keys() == {"forward", "backward"} and all(0 < us < 50_000 for us in per_hop.values())
    assert all(0 < us < 1_000 for us in hops.microseconds_per_lookup(calls=20).values())


def test_a_run_prints_models_as_models_beside_a_real_ring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script that will run on a GPU, in small: every figure says what it is, and two real processes check the model."""
    path, threads = tmp_path / "virtual_ring.jsonl", torch.get_num_threads()
    shape = ["--ranks=4", "--length=512", "--heads=4", "--kv-heads=2", "--head-dim=16"]
    try:
        assert virtual_ring.main(["--device=cpu", *shape, "--minutes=0", f"--out={path}"]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    *lines, last = printed.splitlines()
    assert {line.split()[0] for line in lines[2:]} == {"measured", "counted", "model"}
    assert "scal" not in printed and "speedup" not in printed
    records = record.read(path)
    assert json.loads(last)["records"] == len(records) == 8
    found = {(r["kind"], r.get("pass")): r for r in records}
    assert {kind for kind, _ in found} == {"host", "visits", "memory", "model", "ring"}
    for r in records:
        assert {"benchmark", "date", "commit", "torch", "cpu", "gpu"} <= set(r)
    assert len(found["memory", None]["counted_bytes"]) == 4
    for name in ("forward", "backward"):
        visits, model, ring = (found[kind, name] for kind in ("visits", "model", "ring"))
        assert visits["balance"] >= 1 and visits["area"] == pytest.approx(1.0, abs=0.01)
        seconds = [model["model"][variation]["seconds"] for variation in ("B/2", "B", "2B")]
        assert seconds == sorted(seconds, reverse=True) and seconds[-1] >= visits["mean_rank_seconds"]
        assert (ring["processes"], ring["length"]) == (2, 256)  # shards as long as those that were played
        for kind in ("quiet", "together"):
            assert ring["measured_over_model"][kind] * ring["model"][kind]["seconds"] == pytest.approx(
                ring["measured_ring_seconds"]
            )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device=meta"], "accepted are cpu, cuda"),
        (["--mask=casual"], "a mask is"),
        (["--ranks=0"], "ranks"),
        (["--heads=3", "--kv-heads=2"], "multiple"),
    ],
)
def test_a_mistake_is_a_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is measured for a question that cannot be asked."""
    with pytest.raises(SystemExit) as stopped:
        virtual_ring.main(["--device=cpu", *arguments])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
