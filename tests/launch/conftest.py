"""Real processes for the tests of launch/: a program under torchrun, with a time limit, killed as a whole."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT, torchrun

SECONDS = 120

# Small enough that a step takes milliseconds; an odd length, so that shards are uneven on any number of ranks.
SMALL = """
    --seq-length 61 --batch 4 --layers 2 --dim 32 --heads 4 --kv-heads 2 --head-dim 8 --hidden 48
    --learning-rate 1e-3 --warmup 2 --validate-every 3 --validation-samples 8 --log-every 1 --device cpu
"""


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some real sources, few enough to be read in no time."""
    folder = tmp_path_factory.mktemp("text")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("abc.py", "ast.py", "bisect.py", "calendar.py", "copy.py", "csv.py", "heapq.py", "queue.py"):
        (folder / name).write_bytes((stdlib / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def train() -> Callable[..., str]:
    """``train(processes, *arguments, status=0)`` runs launch/train.py for real and returns all that it printed."""
    return _train


def _train(processes: int, *arguments: object, status: int = 0) -> str:
    return torchrun(processes, ROOT / "launch" / "train.py", *arguments, seconds=SECONDS, status=status)


@pytest.fixture(scope="session")
def curve() -> Callable[[Path], dict[str, list[float]]]:
    """``curve(folder)`` reads a run's metrics: training losses, raw gradient norms and validation losses in order."""
    return _curve


def _curve(folder: Path) -> dict[str, list[float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if record["split"] == "train"]
    assert [record["step"] for record in training] == list(range(1, len(training) + 1))
    return {
        "loss": [record["loss"] for record in training],
        "gradient_norm": [record["gradient_norm"] for record in training],
        "validation": [record["loss"] for record in records if record["split"] == "validation"],
    }


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Arguments of a run that takes milliseconds a step."""
    return SMALL.split()


@pytest.fixture(scope="session")
def one_process_run(
    train: Callable[..., str], small: list[str], text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Eight steps of one process that nothing interrupts: what every other way of running must reproduce."""
    out = tmp_path_factory.mktemp("one") / "run"
    train(1, *small, "--text", text_folder, "--steps", 8, "--out", out)
    return out


@pytest.fixture(scope="session")
def stopped_run(
    train: Callable[..., str], small: list[str], text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Two processes that check and profile themselves, and stop after four of eight steps: folder, and what they printed."""
    out = tmp_path_factory.mktemp("two") / "run"
    stop = ("--steps", 8, "--stop-at", 4, "--out", out)
    return out, train(2, *small, "--text", text_folder, *stop, "--check", "--profile", "--profile-steps", "2-3")
