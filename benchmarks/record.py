"""What every benchmark writes: one JSON line per measurement, with the machine, versions, commit and date beside it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import ringflash as rf

RESULTS = Path(__file__).parent / "results"


def surroundings() -> dict[str, Any]:
    """Where and on what a figure was measured. ``COMMIT`` in the environment names a tree that came without its history."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("COMMIT") or _printed("git", "describe", "--always", "--dirty") or "unknown",
        "ringflash": rf.__version__,
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "gpu": gpu,
    } | (_card() if gpu else {})


def write(name: str, records: list[dict[str, Any]]) -> Path:
    """Replace ``results/<name>.jsonl`` by these records, each with its surroundings."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    here = surroundings()
    path.write_text("".join(json.dumps(record | here) + "\n" for record in records))
    return path


class Journal:
    """The records of a run, each on disk before the next measurement begins: a run that is killed keeps what it had.

    The first record replaces what ``path`` held; a run that measures nothing leaves it alone. Without a path nothing is
    written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.records, self._here = path, list[dict[str, Any]](), surroundings()

    def add(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a" if self.records else "w") as file:
                file.write(json.dumps(record | self._here, allow_nan=False) + "\n")
        self.records.append(record | self._here)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line that a kill cut short is left out. No file holds no records."""
    lines = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline was never finished


def _card() -> dict[str, Any]:
    """Driver, clocks and power as they were found. Nothing is set: other work on the machine would feel it."""
    wanted = ("driver_version", "clocks.max.sm", "clocks.sm", "power.limit", "temperature.gpu")
    query = f"--query-gpu={','.join(wanted)}"
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
    values = _printed("nvidia-smi", query, "--format=csv,noheader,nounits", "-i", index).split(",")
    named = dict(zip(wanted, (value.strip() for value in values), strict=False)) if values[0] else {}
    return {"driver": named.pop("driver_version", None), "cuda": torch.version.cuda, "card": named}


def _printed(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())
