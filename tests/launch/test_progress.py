"""The files a run leaves behind agree with each other, and survive being killed."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

from curve import draw_curve
from options import UsageError, parse
from progress import Progress, read_metrics


def _record(step: int, split: str, **values: float) -> dict[str, Any]:
    figures = {"learning_rate": 0.1, "gradient_norm": 1.0, "tokens_per_second": 1000.0, "peak_bytes": 2**30}
    return {"step": step, "split": split, "loss": 5.0 / step, **(figures if split == "train" else {}), **values}


def _run(folder: Path, first: int, last: int, **values: float) -> None:
    progress = Progress(folder, first, steps=8, log_every=2, tensorboard=False)
    for step in range(first + 1, last + 1):
        progress.trained(_record(step, "train"))
        progress.validated(_record(step, "validation", **values))
    progress.close()


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    """Steps that a killed run made after its last checkpoint are made again: the old records of them must go."""
    _run(tmp_path, 0, 5)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "spl')
    _run(tmp_path, 3, 8)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records if record["split"] == "train"] == list(range(1, 9))
    with (tmp_path / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(int(row["step"]), row["split"], float(row["loss"])) for row in rows] == [
        (record["step"], record["split"], record["loss"]) for record in records
    ]


def test_records_are_at_no_moment_in_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed while it begins again has not lost its curve."""
    _run(tmp_path, 0, 5)
    there: list[int] = []
    monkeypatch.setattr("progress._csv_line", lambda record: there.append(len(read_metrics(tmp_path))) or "")
    _run(tmp_path, 3, 3)
    assert there == [6] * 7  # while what is made from them is written: a heading, and six records


def test_a_last_line_without_its_end_is_a_line(tmp_path: Path) -> None:
    """What comes next is another one."""
    _run(tmp_path, 0, 2)
    (tmp_path / "metrics.jsonl").write_bytes((tmp_path / "metrics.jsonl").read_bytes().rstrip())
    _run(tmp_path, 2, 4)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_without_a_terminal_there_is_one_line_per_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log file gets lines with the loss, speed, gradient norm and memory, and no control characters."""
    _run(tmp_path, 0, 5)
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if "tokens/s" in line]
    assert [line.split()[1] for line in lines] == ["1/8", "2/8", "4/8"]
    assert all(part in lines[1] for part in ("loss 2.5000", "1,000 tokens/s", "gradient norm 1.000", "1.00 GiB"))
    assert "\r" not in output and "\x1b" not in output


@pytest.mark.parametrize("chance", [None, 0.03])
def test_the_curve_is_a_picture(tmp_path: Path, chance: float | None) -> None:
    """The loss curve is drawn from the metrics alone, for tasks judged by loss and by accuracy."""
    progress = Progress(tmp_path, 0, steps=8, log_every=1, tensorboard=False)
    scores: dict[str, float] = {"bits_per_byte": 3.0} if chance is None else {"accuracy": 0.5}
    for step in range(1, 9):
        progress.trained({**_record(step, "train"), "bits_per_byte": 3.0})
    progress.validated(_record(8, "validation", **scores))
    progress.close()
    path = draw_curve(tmp_path, "a run", 512, chance)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")


def test_tensorboard_is_optional_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for TensorBoard without having it is one sentence with the remedy."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'ringflash\[tensorboard\]'"):
        parse(["--tensorboard"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--batch 3 --data 2", r"--batch 3 samples cannot be shared equally by --data 2"),
        ("--attention local --layout zigzag", r"--attention local .* --layout zigzag"),
        ("--task passkey --text .", r"--text is for --task text"),
        ("--seq-length 0", r"--seq-length is 0; it must be at least 1"),
        ("--steps -1", r"--steps is -1; it must not be negative"),
        ("--clip 0", r"--clip is 0.0; it must be positive"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(arguments: str, sentence: str) -> None:
    """Every wrong option is refused before anything starts, by its name and with its value."""
    with pytest.raises(UsageError, match=sentence):
        parse(arguments.split())


def test_a_sequence_must_be_long_enough_for_its_shards() -> None:
    """What depends on the number of processes is refused once that is known."""
    with pytest.raises(UsageError, match="--seq-length 7 is too short for 4 shards"):
        parse(["--seq-length", "7"]).check_against(4)
    with pytest.raises(UsageError, match="--seq-length 127 to be a multiple of 2"):
        parse(["--seq-length", "127", "--attention", "local"]).check_against(2)
