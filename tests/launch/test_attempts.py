"""How a run begins: anew or where it was, by what was asked for, what is there, and who has started it."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import attempts
import ranks
from options import parse
from progress import Progress, read_metrics
from run_options import UsageError


def decide(folder: Path, *words: str) -> tuple[attempts.Beginning, str]:
    """What rank 0 decides, and what it says."""
    said: list[str] = []
    alone: Any = SimpleNamespace(once=lambda what, work: work(), agree=lambda *values: list(values), say=said.append)
    return attempts.decide(parse(["--out", str(folder), *words]), alone), "\n".join(said)


def a_run(folder: Path, *steps: int, state: str = "running", launch: str = "this") -> Path:
    """A folder in which such a run has been, with checkpoints of these steps."""
    for step in steps:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").touch()
    os.environ["TORCHELASTIC_RUN_ID"], before = launch, os.environ.get("TORCHELASTIC_RUN_ID", "none")
    attempts.write(folder, state)
    os.environ["TORCHELASTIC_RUN_ID"] = before
    return folder


@pytest.fixture(autouse=True)
def launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that calls this launch "this", and has restarted nothing yet."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")


def test_a_first_start_goes_on_only_if_it_is_asked_to(tmp_path: Path) -> None:
    """Without being asked an earlier run is put aside, with all that it has learned."""
    run = a_run(tmp_path / "run", 3, 11, launch="earlier")
    assert decide(run, "--resume")[0] == attempts.Beginning([11, 3], restarted=False)
    assert decide(run, "--resume", "auto")[0].steps == [11, 3]
    beginning, said = decide(run)
    assert beginning.steps == [] and f"is now in {run}.1" in said
    assert (tmp_path / "run.1" / "checkpoints" / "step-00000011").is_dir()
    assert attempts.read(run) == {"state": "running", "launch": "this"}


def test_without_a_checkpoint_only_auto_begins_anew(tmp_path: Path) -> None:
    """A mistyped folder is an error, not a new run."""
    with pytest.raises(
        UsageError, match=r"--resume: there is no checkpoint in '\S+nowhere/checkpoints'; start without"
    ):
        decide(tmp_path / "nowhere", "--resume")
    beginning, said = decide(tmp_path / "nowhere", "--resume", "auto")
    assert beginning.steps == [] and "--resume auto: no checkpoint in" in said


@pytest.mark.parametrize("words", [(), ("--resume",), ("--resume", "auto")])
def test_a_restarted_process_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any) -> None:
    """With the same command line: from a checkpoint if one has been written, else anew."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    beginning, said = decide(a_run(tmp_path / "run", 4), *words)
    assert beginning == attempts.Beginning([4], restarted=True) and "restart 2 of this launch: goes on" in said
    beginning, said = decide(a_run(tmp_path / "young"), *words)
    assert beginning.steps == [] and "no checkpoint yet, begins anew" in said


def test_a_restart_does_not_take_an_earlier_run_for_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt may have died before it could put that aside."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert decide(a_run(tmp_path / "run", 4, launch="earlier"))[0].steps == []
    assert (tmp_path / "run.1" / "checkpoints" / "step-00000004").is_dir()


def test_a_restart_after_an_interruption_ends_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher takes the status of a run that was told to stop for a failure; it would go on into the end of its time."""
    run = a_run(tmp_path / "run", 4, state="interrupted")
    assert decide(run, "--resume", "auto")[0].steps == [4]  # started by hand
    attempts.write(run, "interrupted")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(attempts.ToldToStop):
        decide(run, "--resume", "auto")


@pytest.mark.parametrize("text", ["", "{", "[]", None])
def test_what_cannot_be_read_of_a_run_is_nothing(tmp_path: Path, text: str | None) -> None:
    """It was being written when the disk was full, or is not there."""
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert attempts.read(tmp_path) == {}


def test_lines_that_a_full_disk_does_not_take_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No record is lost or cut in two once there is room; without room it is said that they are lost."""
    progress = Progress(tmp_path, 0, 8, log_every=9, tensorboard=False)
    record = {"split": "validation", "loss": 1.0}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 8):
        resource.setrlimit(resource.RLIMIT_FSIZE, (130 if 2 <= step <= 4 else soft, hard))
        progress.validated({"step": step, **record})
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 8))
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 8
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written") == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (130, hard))
    try:
        progress.validated({"step": 8, **record})
        assert not progress.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "metrics.jsonl: its last 1 line(s) could not be written" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 8))


def test_the_flight_recorder_is_on_unless_the_environment_has_it_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the group is made: NCCL reads it then. The folder must exist, or nothing is written."""
    for name in ranks.FLIGHT_RECORDER:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    monkeypatch.chdir(tmp_path)
    ranks._record_flights()
    expected = ranks.FLIGHT_RECORDER | {"TORCH_FR_BUFFER_SIZE": "7"}
    assert {name: os.environ[name] for name in expected} == expected
    assert (tmp_path / "runs" / "hangs").is_dir()


def test_a_run_that_goes_on_says_at_once_that_it_has_begun(tmp_path: Path) -> None:
    """A queue would start a job again, for ever, that fails before it has read its checkpoint."""
    run = a_run(tmp_path / "run", 3, state="interrupted", launch="earlier")
    assert decide(run, "--resume", "auto")[0].steps == [3]
    assert attempts.read(run) == {"state": "running", "launch": "this"}


def test_checkpoints_alone_are_an_earlier_run_too(tmp_path: Path) -> None:
    """Else the first restart would go on from them."""
    run = a_run(tmp_path / "run", 9)
    (run / "metrics.jsonl").unlink()
    assert decide(run)[0].steps == []
    assert (tmp_path / "run.1" / "checkpoints" / "step-00000009").is_dir()
