"""Which suite this process can run, and a line that repeats a failure.

Triton decides when it is imported whether kernels run in its interpreter, so one process cannot do both: interpreted, there
is nothing to compile and no GPU; and otherwise nothing is interpreted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the oracle, also with --confcutdir=tests/kernels
torch.set_num_threads(1)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETER = "TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 "


class Elsewhere(pytest.Module):
    """A module of tests that belong into a process of the other kind."""

    def collect(self) -> NoReturn:
        how = "without TRITON_INTERPRET" if INTERPRETED else f"by itself: {INTERPRETER}python -m pytest tests/kernels"
        pytest.skip(f"runs {how}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module | None:
    here = module_path.name.startswith("test_interpreted") == INTERPRETED
    return None if here else Elsewhere.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        marked = "-m gpu " if item.get_closest_marker("gpu") else ""
        line = f"{INTERPRETER if INTERPRETED else ''}python -m pytest {marked}'{item.nodeid}'"
        report.sections.append(("repeat with", line))
    return report
