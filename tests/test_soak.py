"""A long run must hold what it held when it was warm: memory, files, threads, keys, objects; and stay right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from soak.gauges import Gauges

ROOT = Path(__file__).resolve().parents[1]


def soak(*arguments: object, seconds: float = 400) -> tuple[dict[str, list[str]], str]:
    """Run the soak; what failed in which section, and all that was printed."""
    paths = [ROOT, ROOT / "kernels", ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    ended = subprocess.run(
        [sys.executable, "-m", "soak.soak", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    said = [line for line in ended.stdout.splitlines() if line.startswith('{"minutes"')]  # torch may have a last word
    assert said, ended.stdout[-4000:]
    verdict = json.loads(said[-1])
    assert ended.returncode == bool(verdict["failed"]), ended.stdout[-4000:]
    return verdict["failed"], ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("section", ["2", "3", "local"])
def test_nothing_grows(section):
    """Steps that are all different leave nothing behind, on real processes and in one."""
    failed, printed = soak("--minutes", 0.6, "--only", section)  # shorter runs take caches that fill for leaks
    assert not failed, printed[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leak", "gauge"),
    [
        ("heap", "heap"),  # 1 KiB in each step
        ("file", "files"),  # one in 50 steps
        ("key", "store keys"),  # one in each step
        ("tensor", "tensors"),  # one in five steps
        ("object", "objects: soak.soak.Leaked"),  # one in five steps
    ],
)
def test_a_planted_leak_is_found(leak, gauge):
    """A soak that is always green would look the same as a library that never leaks."""
    failed, printed = soak("--minutes", 0.35, "--only", "1", "--plant", leak)
    assert gauge in failed.get("1", []), printed[-6000:]


def test_growth_is_told_from_noise():
    """One odd sample decides nothing; a steady climb of one file in a hundred steps does."""
    gauges = Gauges()
    gauges._read = lambda: iter({"files": 20 + gauges.count // 4, "threads": 9 + 50 * (gauges.count == 30)}.items())  # type: ignore[method-assign, assignment]
    for i in range(40):
        gauges.sample(10 * i)
    verdicts = {growth.name: growth.allowed for growth in gauges.growths()}
    assert verdicts == {"files": False, "threads": True}
