"""A plugin of pytest that writes down how tests failed: which one, and by an error of which kind.

An exit status tells a failed assertion from a module that could not be imported no better than a passing one. Nothing is
shrunk: a mutant needs one counterexample, not the smallest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from .mutant import REPORT


def pytest_sessionstart() -> None:  # behind conftest.py, before tests are imported
    quick = settings(settings(), phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)
    settings.register_profile("mutants", quick)
    settings.load_profile("mutants")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo is not None:
        line = {
            "test": item.nodeid,
            "kinds": kinds(call.excinfo.value),
            "error": str(call.excinfo.value)[:2000],
        }
        with Path(os.environ[REPORT]).open("a") as file:
            file.write(json.dumps(line) + "\n")
    return report


def kinds(error: BaseException) -> list[str]:
    """The names of the classes of an error, the most special first; of all errors, if it is a group of them."""
    errors = getattr(error, "exceptions", (error,))
    return list(dict.fromkeys(kind.__name__ for one in errors for kind in type(one).__mro__))
