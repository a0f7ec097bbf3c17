"""Real processes for tests: a program under torchrun, with a time limit, killed as a whole if it does not end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MARK = "RINGFLASH_TEST_MARK"  # in the environment of all processes that a test starts, however deep


def torchrun(ranks: int, *command: object, seconds: float = 120, status: int = 0) -> str:
    """Run ``command`` (a script and its arguments) on so many gloo processes; return all that they printed.

    One rank is a plain process without a launcher. Fails the test, with the tail of the output, if the run does not end
    in time or ends with another status.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    arguments = [sys.executable, *launcher, *map(str, command)]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1", MARK: mark, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for number in {process.pid, *alive(mark)}:  # torchrun gives its workers sessions of their own
            os.kill(number, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{arguments} did not end within {seconds} s; it printed:\n{output[-4000:]}")
    if process.returncode != status:
        pytest.fail(f"{arguments} ended with status {process.returncode}, not {status}; it printed:\n{output[-4000:]}")
    return output


def alive(mark: str) -> list[int]:
    """The processes that were started with this mark in their environment; those that are about to end have two seconds."""
    for _ in range(20):
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{MARK}={mark}".encode() in file.read_bytes().split(b"\0"):
                    found.append(int(file.parent.name))
            except OSError:
                continue
        if not found:
            break
        time.sleep(0.1)
    return found
