"""What every benchmark writes: one JSON line per measurement, with the machine, versions, commit and date beside it."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import ringflash as rf

RESULTS = Path(__file__).parent / "results"


def surroundings() -> dict[str, Any]:
    """Where and on what a figure was measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "ringflash": rf.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "gpu": gpu,
    }


def write(name: str, records: list[dict[str, Any]]) -> Path:
    """Replace ``results/<name>.jsonl`` by these records, each with its surroundings."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    here = surroundings()
    path.write_text("".join(json.dumps(record | here) + "\n" for record in records))
    return path


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())
