"""The bugs that the suite must catch are planted, and caught: a test that cannot fail proves nothing."""

from __future__ import annotations

from collections import Counter

import pytest
from mutants.mutant import Mutant
from mutants.runner import ROOT, Outcome, judged, run
from mutants.table import MUTANTS


def test_every_mutant_can_be_planted() -> None:
    """Code moves on: a bug that is no longer where it was would be caught by nobody, and nobody would notice."""
    assert not [name for name, count in Counter(m.name for m in MUTANTS).items() if count > 1]
    tests: dict[str, str] = {}
    wrong: list[str] = []
    for mutant in MUTANTS:
        try:
            mutant.apply((ROOT / mutant.file).read_text())
        except ValueError as error:
            wrong.append(f"{mutant.name}: {error}")
        for test in mutant.caught_by:
            file, _, name = test.partition("::")
            source = tests.setdefault(file, (ROOT / file).read_text())
            if f"def {name.partition('[')[0]}(" not in source:
                wrong.append(f"{mutant.name}: there is no test {test}")
    assert not wrong, "\n".join(wrong)


def test_a_mutant_without_its_place_is_refused() -> None:
    """With the name, and how often its text was found."""
    mutant = Mutant(name="m", file="f.py", old="a", new="b", breaks="", caught_by=())
    assert mutant.apply("xax") == "xbx"
    for source, count in (("xyz", 0), ("aa", 2)):
        with pytest.raises(ValueError, match=rf"mutant m: f\.py holds its text {count} times"):
            mutant.apply(source)


@pytest.mark.parametrize(
    ("status", "kinds", "caught"),
    [
        (0, None, False),
        (1, ["AssertionError", "Exception"], True),
        (1, ["PlanError", "Exception"], True),
        (1, ["ImportError", "Exception"], False),
        (2, None, False),  # nothing could be collected
        (5, None, False),  # nothing was selected
        (None, None, False),  # it hangs, and that was not the bug
    ],
)
def test_only_a_failed_assertion_or_the_expected_error_is_a_catch(
    status: int | None, kinds: list[str] | None, caught: bool
) -> None:
    """A mutant that cannot be imported turns every test red, and proves nothing."""
    mutant = Mutant(name="m", file="", old="", new="", breaks="", caught_by=("t",), raises=("PlanError",))
    failures = [] if kinds is None else [{"test": "t", "kinds": kinds, "error": ""}]
    assert judged(mutant, status, failures, "")[0] == caught


@pytest.mark.slow
def test_every_mutant_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    """Lost hops, stale buffers, wrong signs, leaking masks, skipped checks: each one turns its test red."""
    alive: list[Outcome] = []
    for outcome in run(MUTANTS):
        with capsys.disabled():
            print(outcome, flush=True)
        if not outcome.caught:
            alive.append(outcome)
    assert not alive, "\n".join(f"{x.mutant.name}: {x.how}\n{x.mutant.diff(ROOT)}" for x in alive)
