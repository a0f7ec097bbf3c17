"""What a run survives, on real processes: each ends by itself, says what has happened, leaves no process and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from processes import MARK, ROOT, alive

Curve = Callable[[Path], dict[str, list[float]]]
FAULTY = ROOT / "tests" / "launch" / "programs" / "faulty.py"
TOLERANCE = 2e-6  # relative, float32, eight AdamW steps
SECONDS = 280


def launch(
    ranks: int, *command: object, restarts: int = 0, status: int | None = 0, tell: signal.Signals | None = None
) -> str:
    """Run train.py with a fault under torchrun until it ends by itself; returns what it printed.

    ``tell`` is sent to torchrun after the third step. No process of it may be left, wherever it has hidden.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "--max-restarts", restarts]
    mark = f"survival-{os.getpid()}-{time.monotonic_ns()}"
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        [sys.executable, *map(str, launcher), *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said = ""
        if tell is not None:
            assert process.stdout is not None
            for line in process.stdout:
                said += line
                if line.startswith("step     3/"):
                    break
            process.send_signal(tell)
        said += process.communicate(timeout=SECONDS)[0]
    finally:
        left = alive(mark)
        for number in left:
            os.kill(number, signal.SIGKILL)
    assert status is None or process.returncode == status, said[-6000:]
    assert not left, f"{len(left)} process(es) left; {said[-6000:]}"
    return said


@pytest.fixture
def command(small: list[str], text_folder: Path, tmp_path: Path) -> Callable[..., list[object]]:
    """``command(fault, *more)``: a run of eight steps in ``tmp_path / "run"``."""

    def make(fault: str, *more: object) -> list[object]:
        return [
            FAULTY,
            fault,
            "train.py",
            *small,
            "--text",
            text_folder,
            "--steps",
            8,
            "--out",
            tmp_path / "run",
            *more,
        ]

    return make


def same(curve: Curve, found: Path, expected: Path) -> None:
    """One curve, without a seam."""
    found_curve, expected_curve = curve(found), curve(expected)
    assert found_curve["loss"] == pytest.approx(expected_curve["loss"], rel=TOLERANCE)
    assert found_curve["gradient_norm"] == pytest.approx(expected_curve["gradient_norm"], rel=10 * TOLERANCE)
    assert found_curve["validation"] == pytest.approx(expected_curve["validation"], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_rank_costs_the_steps_since_the_last_good_checkpoint(
    command: Callable[..., list[object]], one_process_run: Path, curve: Curve, tmp_path: Path, damaged: bool
) -> None:
    """kill -9 in step 6: the same command goes on after step 4; if a bit of that checkpoint has flipped, after step 2."""
    fault = "kill+flip:1:6" if damaged else "kill:1:6"
    said = launch(2, *command(fault, "--save-every", 2), restarts=1)
    assert "restart 1 of this launch: goes on" in said
    assert f"{2 if damaged else 4} steps, {8 if damaged else 16} samples done" in said
    assert ("model.safetensors is damaged" in said) == damaged
    same(curve, tmp_path / "run", one_process_run)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "ended"


@pytest.mark.slow
def test_without_a_checkpoint_a_restart_begins_anew(
    command: Callable[..., list[object]], one_process_run: Path, curve: Curve, tmp_path: Path
) -> None:
    """And an older run that the first attempt has put aside is not taken for this one."""
    old = tmp_path / "run" / "checkpoints" / "step-00000007"
    old.mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    said = launch(2, *command("kill:0:3"), restarts=1)
    assert "restart 1 of this launch: no checkpoint yet, begins anew" in said
    same(curve, tmp_path / "run", one_process_run)
    assert (tmp_path / "run.1" / "checkpoints" / "step-00000007").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["to torchrun", "SIGTERM to one rank", "SIGUSR1 to one rank"])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(
    command: Callable[..., list[object]], one_process_run: Path, curve: Curve, tmp_path: Path, how: str
) -> None:
    """All ranks stop after the same step, whoever was told; a launcher that restarts them all the same ends again at once."""
    if how == "to torchrun":
        said = launch(2, *command("wait:0:4"), status=1, tell=signal.SIGTERM)
    else:
        said = launch(2, *command(f"signal:1:3:{how.split()[0]}"), status=1, restarts=1)
        assert said.count("this launch was told to stop, and has") >= 1
    name = "SIGUSR1" if "SIGUSR1" in how else "SIGTERM"
    assert f"{name}: stopped after step" in said and "of 8, with a checkpoint" in said
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["state"] == "interrupted" and 3 <= run["step"] < 8
    assert f"{run['step']} steps, {4 * run['step']} samples done" in launch(3, *command("none", "--resume", "auto"))
    same(curve, tmp_path / "run", one_process_run)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full:0:2-4", "full:0:6-8", "full:0:4-4 stop"])
def test_a_full_disk_costs_no_checkpoint_that_was_there(
    command: Callable[..., list[object]], one_process_run: Path, curve: Curve, tmp_path: Path, fault: str
) -> None:
    """Training goes on and saves when it can; the status is not 0 if the last one is missing, or when it was to stop."""
    fault, *stop = fault.split()
    more = ("--on-save-error", "stop") if stop else ()
    said = launch(2, *command(fault, "--save-every", 2, *more), status=0 if fault == "full:0:2-4" else 1)
    assert "no checkpoint could be written to" in said and "File too large" in said
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    if stop:
        assert left == ["step-00000002"] and "step     5/8" not in said
        return
    assert left == (["step-00000006", "step-00000008"] if fault == "full:0:2-4" else ["step-00000002", "step-00000004"])
    same(curve, tmp_path / "run", one_process_run)
    if fault == "full:0:6-8":
        assert "the last checkpoint is missing" in said
        assert "4 steps, 16 samples done" in launch(2, *command("none", "--resume"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed --zero-stage 2", "deepspeed --zero-stage 3"])
@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ("forward:1:3:blocks.0.feedforward.gate", "in forward, in the output of blocks.0.feedforward.gate"),
        (
            "backward:1:3:blocks.0.attention",
            "in backward, in the gradient that reaches the output of blocks.0.attention",
        ),
    ],
)
def test_a_nan_is_traced_to_its_rank_and_module_and_skipped(
    command: Callable[..., list[object]], tmp_path: Path, engine: str, fault: str, place: str
) -> None:
    """Attention has carried it to the other rank; the step is not taken, the batch is listed, and the run learns on."""
    said = launch(2, *command(fault, "--on-nonfinite", "skip", "--engine", *engine.split()))
    assert f"step 3: loss {'nan' if 'forward' in fault else ''}" in said
    assert "it began on rank 1 of 2" in said and f"{place}, at [" in said
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["split"] == "train"] == list(range(1, 9))
    (skipped,) = [record for record in records if record["split"] == "skipped"]
    assert (skipped["step"], skipped["batch"], skipped["gradient_norm"]) in [(3, 3, "nan"), (3, 3, "inf")]
    assert place in skipped["why"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ("weight:1:3:blocks.1.attention.out.weight", "in the output of blocks.1.attention.out, at"),
        ("once:1:3:blocks.1", "in a replay every activation and every gradient of every rank was finite"),
    ],
)
def test_a_nan_ends_the_run_unless_it_is_to_be_skipped(
    command: Callable[..., list[object]], tmp_path: Path, fault: str, place: str
) -> None:
    """With a sentence, status 1 of every rank, and the earlier checkpoint."""
    said = launch(2, *command(fault, "--save-every", 2), status=1)
    assert "train.py: error: step 3: loss nan" in said and place in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
def test_the_time_out_is_that_of_all_groups(command: Callable[..., list[object]]) -> None:
    """Groups made of a group do not inherit it, and the ring runs in one of them."""
    said = launch(2, *command("timeouts", "--timeout", 77, "--stop-at", 0))
    assert "time-outs: [77.0, 77.0, 77.0, 77.0]" in said


@pytest.mark.slow
def test_no_sample_is_read_twice_or_left_out_on_any_number_of_ranks(
    small: list[str], text_folder: Path, curve: Curve, tmp_path: Path
) -> None:
    """One run in five parts, on 1, 2, 3, 4 ranks and 2 x 2: all samples in their order, each once; the curve of one process."""
    rows, out = tmp_path / "rows", tmp_path / "run"
    base = [FAULTY, f"rows:{rows}", "train.py", *small, "--batch", 12, "--text", text_folder, "--steps", 10]
    for stop, (ranks, data) in enumerate([(1, 1), (2, 2), (3, 3), (4, 4), (4, 2)], 1):
        launch(ranks, *base, "--data", data, "--stop-at", 2 * stop, "--out", out, "--resume", "auto")
    read: dict[int, dict[int, tuple[int, ...]]] = {}
    for line in rows.read_text().splitlines():
        step, data, _, *numbers = map(int, line.split())
        assert read.setdefault(step, {}).setdefault(data, tuple(numbers)) == tuple(
            numbers
        )  # equal on ranks that share it
    order = [number for step in sorted(read) for data in sorted(read[step]) for number in read[step][data]]
    assert order == list(range(120))
    launch(1, *base, "--out", tmp_path / "one")
    resumed, one = curve(out), curve(tmp_path / "one")
    assert resumed["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
    assert all(late < early for early, late in pairwise(resumed["validation"][:3]))
    shutil.rmtree(out)
