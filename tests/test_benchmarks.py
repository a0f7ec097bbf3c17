"""The benchmarks themselves, in small: a run writes what it says, times nothing wrong, keeps its budget, and is drawn."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ringflash as rf

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")

sys.path.insert(0, str(BENCHMARKS))
attention, bench, exact, peers, record, stopwatch, table = map(
    importlib.import_module, ("attention", "bench", "exact", "peers", "record", "stopwatch", "table")
)

CAUSAL = "d64 causal 128"


def start(script: str, *arguments: object, **more: str) -> subprocess.Popen[str]:
    """A benchmark in a process of its own, as users start it."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    return subprocess.Popen(
        [sys.executable, str(BENCHMARKS / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def small_bench(minutes: float = 1.0) -> Any:
    journal = record.Journal(None)
    return bench.Bench(CPU, "auto", stopwatch.Budget(minutes), journal, ("flash", "cudnn"), 0.02)


def only(name: str) -> list[Any]:
    return [case for case in attention.programme(tiny=True) if name in case.name]


def test_a_tiny_run_ends_with_json_and_leaves_valid_records(tmp_path: Path) -> None:
    """The script that will run on a GPU for minutes is run here for seconds, every case of it."""
    path = tmp_path / "attention.jsonl"
    output, errors = (run := start("attention.py", "--device", "cpu", "--out", path)).communicate(timeout=120)
    assert run.returncode == 0, output + errors
    last = json.loads(output.splitlines()[-1])
    records = record.read(path)
    assert last["records"] == len(records) and last["written"] == path.name
    assert last["wrong"] == last["failed"] == last["left_out"] == []
    assert {r["kind"] for r in records} == {"matmul", "compare", "carry", "ring", "host", "derived"}
    for r in records:
        assert {"benchmark", "case", "date", "commit", "torch", "triton", "python", "cpu", "gpu"} <= set(r)
    compared = [r for r in records if r["kind"] == "compare"]
    assert {(r["mask"], r["pass"]) for r in compared} == {
        (mask, direction) for mask in ("causal", "full", "window", "documents") for direction in ("forward", "backward")
    }
    for r in compared:
        ours = r["versions"]["ringflash"]
        assert 0 < ours["ms"]["p5"] <= ours["ms"]["p50"] <= ours["ms"]["p95"]
        assert ours["tflops"] == pytest.approx(
            4 * r["cells"] * r["head_dim"] * (1 if r["pass"] == "forward" else 2.5) / ours["ms"]["p50"] / 1e9
        )
        assert r["ratio"] == pytest.approx(ours["tflops"] / r["versions"][r["best_peer"]]["tflops"])
        assert r["versions"]["cudnn"] == {"missing": r["versions"]["cudnn"]["missing"]}


@pytest.mark.parametrize("spoil", ["a tile", "dk", "another head"])
def test_a_wrong_version_is_recorded_and_never_timed(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast kernel that is wrong would win every comparison."""
    right = bench.Bench.attention

    def wrong(self: Any, name: str, problem: Any) -> Any:
        version = right(self, name, problem)
        if name != "ringflash":
            return version

        def spoilt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if spoil == "dk":
                k = k.detach() + 0 * k
            out = version(q, k, v)
            out = out.clone()
            if spoil == "a tile":
                lost = rf.flash_attention(q[:, -64:], k[:, :64], v[:, :64], rf.full)
                out[:, -64:] = out[:, -64:] - lost / 4
            if spoil == "another head":
                out[0, 3, 0, 5] = torch.nan
            return out

        return spoilt

    monkeypatch.setattr(bench.Bench, "attention", wrong)
    run = small_bench()
    found = attention.run(run, only(CAUSAL))
    assert len(found["wrong"]) == 1 and found["wrong"][0].endswith(": ringflash")
    for r in run.journal.records:
        assert "wrong" in r["versions"]["ringflash"] and "ms" not in r["versions"]["ringflash"]
        assert r["ratio"] is None and "ms" in r["versions"]["flash"]


def test_a_run_with_a_wrong_version_ends_with_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody reads a table of numbers as closely as a shell reads a status."""

    def double(problem: Any, device: torch.device) -> Any:
        return lambda q, k, v: 2 * q + 0 * (k.sum() + v.sum())

    monkeypatch.setattr(bench, "PEERS", peers.PEERS | {"flash": double})
    monkeypatch.setattr(sys, "argv", ["attention.py", "--device", "cpu", "--only", CAUSAL])
    with pytest.raises(SystemExit) as stopped:
        attention.main()
    assert stopped.value.code == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [name.rpartition(": ")[2] for name in last["wrong"]] == ["flash"] and last["written"] is None


def test_a_version_that_raises_costs_only_its_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers come and go with versions of PyTorch; the reason stands in the record."""

    def broken(problem: Any, device: torch.device) -> Any:
        raise RuntimeError("no such\n  kernel")

    monkeypatch.setattr(bench, "PEERS", peers.PEERS | {"flash": broken})
    run = small_bench()
    found = attention.run(run, only(CAUSAL))
    assert found["wrong"] == found["failed"] == []
    for r in run.journal.records:
        assert r["versions"]["flash"] == {"failed": "RuntimeError: no such kernel"}
        assert "missing" in r["versions"]["cudnn"] and r["versions"]["ringflash"]["tflops"] > 0


def test_a_spent_budget_leaves_cases_out_and_says_which() -> None:
    """A machine is lent by the minute: what no longer fits is named, not begun."""
    run = small_bench(minutes=0.0)
    cases = attention.programme(tiny=True)
    assert attention.run(run, cases)["left_out"] == [case.name for case in cases]
    assert run.journal.records == []


def test_timing_stops_where_the_budget_does() -> None:
    """A slow version must not run its full number of rounds beyond the end."""
    watch = stopwatch.Stopwatch(CPU, stopwatch.Budget(0.4 / 60))
    began = time.monotonic()
    times = watch.in_turns({"a": lambda i: time.sleep(0.05), "b": lambda i: time.sleep(0.02)}, 2, seconds=60)
    assert time.monotonic() - began < 2 and len(times["a"]) == len(times["b"]) >= 2


def test_versions_take_turns_on_changing_inputs() -> None:
    """Every round holds every version once, and a version meets every set of inputs."""
    calls: list[tuple[str, int]] = []
    watch = stopwatch.Stopwatch(CPU, stopwatch.Budget(1.0))
    versions = {name: lambda i, name=name: calls.append((name, i)) for name in "abc"}
    rounds = len(watch.in_turns(versions, 2, seconds=1.0)["a"])
    names = [name for name, _ in calls]
    assert rounds == stopwatch.MOST
    assert all(set(names[i : i + 3]) == set("abc") for i in range(0, len(names), 3))
    assert set(calls) == {(name, i) for name in "abc" for i in (0, 1)}


def test_records_survive_a_kill(tmp_path: Path) -> None:
    """A job that is preempted keeps every figure that it had."""
    path = tmp_path / "attention.jsonl"
    run = start("attention.py", "--device", "cpu", "--out", path)
    until = time.monotonic() + 60
    while not (path.exists() and path.read_text().count("\n") >= 1) and time.monotonic() < until:
        time.sleep(0.05)
    run.kill()
    run.communicate()
    assert record.read(path)[0]["kind"] == "matmul"
    path.write_text(path.read_text() + '{"benchmark": "atten')
    assert all(r["benchmark"] == "attention" for r in record.read(path))


@pytest.mark.parametrize("mask", ["causal", "full", "window", "documents"])
def test_the_oracle_is_dense_attention(mask: str) -> None:
    """The judge of all versions is judged by autograd, in float64, on every row of its group."""
    values = {
        "causal": rf.causal,
        "full": rf.full,
        "window": rf.window(9, 0),
        "documents": rf.causal & rf.documents([0, 1, 40, 90]),
    }
    problem = peers.Problem(16, mask, values[mask], 90, 2, 4, 2, torch.float64)
    q, k, v, dout = problem.inputs(CPU, 0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    lo, hi = (torch.from_numpy(x)[:, None] for x in problem.bounds)
    seen = (torch.arange(90) >= lo) & (torch.arange(90) < hi)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * problem.scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(2, 2))
    dense = dict(zip(exact.NAMES, (out, *torch.autograd.grad(out, leaves, dout)), strict=True))
    oracle = exact.Oracle.ask((q, k, v, dout), problem.bounds, problem.scale, exact.Group(1, 1, 2))
    for verdict in oracle.judge({name: x.detach() for name, x in dense.items()}).values():
        assert verdict["right"] and verdict["error"] < 1e-12
    assert problem.cells == int(seen.sum()) * 2 * 4


def test_packed_documents_have_the_asked_mean() -> None:
    """Log-normal lengths with a mean of 2K in 64K are what the figure for packed documents promises."""
    offsets = attention.packed(1 << 22, mean=2048)
    assert offsets[0] == 0 and offsets[-1] == 1 << 22 and sorted(set(offsets)) == offsets
    assert (1 << 22) / (len(offsets) - 1) == pytest.approx(2048, rel=0.1)


MADE_UP = {
    "date": "2000-01-01",
    "commit": "0000000",
    "torch": "0",
    "triton": "0",
    "python": "0",
    "cpu": "none",
    "gpu": "a GPU that does not exist",
    "driver": "0",
}


def made_up() -> list[dict[str, Any]]:
    """Records as a run would leave them; no figure in them was measured."""
    records: list[dict[str, Any]] = [{"kind": "matmul", "size": 8192, "tflops": 700.0}]
    for head_dim, heads, mask, length, direction in (
        *(
            (d, (64, 8), m, n, p)
            for d in (128, 64)
            for m in ("causal", "full")
            for n in (1024, 16384)
            for p in table.PASSES
        ),
        (128, (64, 8), "documents", 65536, "forward"),
    ):
        rate = 100.0 + head_dim + length / 512
        versions = {
            "ringflash": {"tflops": rate},
            "flash": {"tflops": rate / 2},
            "cudnn": {"tflops": rate * 1.25},
            "flex": {"missing": "why"},
        }
        shape = {"head_dim": head_dim, "heads": heads[0], "kv_heads": heads[1], "mask": mask, "length": length}
        found = {"versions": versions, "best_peer": "cudnn", "ratio": 0.8, "dtype": "bfloat16", "pass": direction}
        records.append({"kind": "compare"} | shape | found)
    records.append({"kind": "carry", "overhead": 0.031, "length": 8192, "head_dim": 128, "pass": "forward"})
    return [{"benchmark": "attention", "case": "made up"} | r | MADE_UP for r in records]


def write_made_up(folder: Path) -> Path:
    path = folder / "attention.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in made_up()))
    return path


def test_the_readme_holds_the_table_between_its_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures come from records and from nowhere else; the rest of the file is left as it was; twice is as once."""
    results, readme = write_made_up(tmp_path), tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["table.py", "--results", str(results), "--readme", str(readme)])
    table.main()
    text = readme.read_text()
    assert (
        text.startswith(f"before\n{table.BEGIN}\n") and text.endswith(f"\n{table.END}\nafter\n") and "old" not in text
    )
    assert "| 64/8, 128, causal | forward | 230 (0.80) | 260 (0.80) |  |" in text
    assert "a GPU that does not exist, driver 0" in text and "FlashAttention 2 and cuDNN" in text
    assert "+3.1 %" in text
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    table.main()
    assert readme.read_text() == text
    assert "rewritten" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["no markers", f"{table.END} {table.BEGIN}", f"{table.BEGIN}{table.END}" * 2])
def test_a_readme_without_both_markers_is_left_alone(text: str, tmp_path: Path) -> None:
    """A table in the wrong place is worse than none."""
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(SystemExit, match="attention:begin"):
        table.rewrite(readme, "table")
    assert readme.read_text() == text


def test_without_results_nothing_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number may be invented."""
    readme = tmp_path / "README.md"
    readme.write_text(f"{table.BEGIN}\n{table.END}")
    monkeypatch.setattr(sys, "argv", ["table.py", "--results", str(tmp_path / "none.jsonl"), "--readme", str(readme)])
    with pytest.raises(SystemExit, match="no results"):
        table.main()
    assert readme.read_text() == f"{table.BEGIN}\n{table.END}"
    assert list(tmp_path.iterdir()) == [readme]
