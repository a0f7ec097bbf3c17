"""Plants mutants in a copy of the tree, one after the other, and runs the tests that must notice.

The copy holds what tests need, and no compiled files: a mutant of the same length, written in the same second, would be
taken for what was compiled before. First all these tests are run without a mutant, since a test that is red anyway proves
nothing. Each run is a process of its own, forked from one that has imported torch already: that is half of its time.
"""

from __future__ import annotations

import json
import multiprocessing.context
import multiprocessing.forkserver
import os
import queue
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn, TypedDict

from .mutant import REPORT, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("ringflash", "kernels", "launch", "tests", "benchmarks", "docs", "pyproject.toml", "README.md", "Makefile")
ASSERTIONS = ("AssertionError", "Failed")  # Failed: pytest.raises saw nothing, or pytest.fail
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
OPTIONS = ("-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider", "-p", "tests.mutants.judge")
PREPARED = ["torch", "numpy", "einops"]  # not hypothesis: pytest wants to see the first import of its plugins


class Failure(TypedDict):
    """What ``judge`` writes of a test: the classes of its error, the most special first."""

    test: str
    kinds: list[str]
    error: str


class Outcome(NamedTuple):
    """What became of a mutant: was it ``caught``, and ``how``: the test that noticed, or why none is thought to have."""

    mutant: Mutant
    caught: bool
    how: str
    seconds: float

    def __str__(self) -> str:
        return f"{'caught' if self.caught else 'ALIVE':<7} {self.seconds:5.1f} s  {self.mutant.name:<44} {self.how}"


class BaselineError(RuntimeError):
    """Tests that are to notice mutants fail without one."""


def run(mutants: Sequence[Mutant], processes: int = 1, root: Path = ROOT) -> Iterator[Outcome]:
    """What becomes of each mutant, in the order in which they end, ``processes`` at a time.

    Raises :class:`BaselineError` if their tests are not green without them.
    """
    with ExitStack() as stack:
        folders: queue.SimpleQueue[Path] = queue.SimpleQueue()
        copies = [stack.enter_context(_copy_of(root)) for _ in range(max(1, processes))]
        for interpreted in {mutant.interpreted for mutant in mutants}:
            some = [mutant for mutant in mutants if mutant.interpreted == interpreted]
            _require_green(copies[0], list(dict.fromkeys(x for mutant in some for x in mutant.caught_by)), interpreted)
        for folder in copies:
            folders.put(folder)

        def one(mutant: Mutant) -> Outcome:
            folder = folders.get()
            try:
                return attempt(mutant, folder)
            finally:
                folders.put(folder)

        with ThreadPoolExecutor(len(copies)) as pool:
            waiting = [pool.submit(one, mutant) for mutant in mutants]
            try:
                for ended in as_completed(waiting):
                    yield ended.result()
            finally:
                pool.shutdown(cancel_futures=True)


def attempt(mutant: Mutant, folder: Path) -> Outcome:
    """Plant a mutant in a copy of the tree, run its tests, and take it out again."""
    path = folder / mutant.file
    source, begin = path.read_text(), time.perf_counter()
    try:
        path.write_text(mutant.apply(source))
        ran = _pytest(folder, mutant.caught_by, mutant.interpreted, mutant.seconds)
    finally:
        path.write_text(source)
    return Outcome(mutant, *judged(mutant, *ran), time.perf_counter() - begin)


class _Run(NamedTuple):
    status: int | None  # None: it was still running at the end of its time
    failures: list[Failure]
    output: str


@contextmanager
def _copy_of(root: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        for entry in COPIED:
            source, target = root / entry, Path(name, entry)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            elif source.is_file():
                shutil.copy2(source, target)
        yield Path(name).resolve()


def _require_green(folder: Path, tests: Sequence[str], interpreted: bool) -> None:
    ran = _pytest(folder, tests, interpreted, 60 * len(tests) + 300)
    if ran.status != 0:
        raise BaselineError(
            "tests fail, or are not there, in a tree without any mutant; mutants prove nothing until they pass:\n"
            + ran.output[-4000:]
        )


def judged(mutant: Mutant, status: int | None, failures: Sequence[Failure], output: str) -> tuple[bool, str]:
    """Whether a run of its tests has caught a mutant, and how; ``status`` is None if the run did not end in time."""
    if status is None:
        return mutant.hangs, f"did not end within {mutant.seconds} s"
    if status == 0:
        return False, "its tests pass"
    if status != 1 or not failures:
        return False, f"pytest ended with status {status}, and no test failed:\n{output[-1500:]}"
    first = failures[0]
    if {*ASSERTIONS, *mutant.raises} & {*first["kinds"]}:
        return True, first["test"]
    return False, f"{first['test']} failed by an error that nobody expected, {first['kinds'][0]}: {first['error']}"


def _pytest(folder: Path, tests: Sequence[str], interpreted: bool, seconds: float) -> _Run:
    """Run tests in ``folder`` up to the first failure."""
    report, log = folder / "failures.jsonl", folder / "output.txt"
    report.unlink(missing_ok=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTER"))
    }
    environment |= {**THREADS, "PYTHONDONTWRITEBYTECODE": "1", REPORT: str(report)}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    process = _forks().Process(target=_run_here, args=(folder, [*OPTIONS, *tests], environment, log))
    process.start()
    try:
        process.join(seconds)
        status = process.exitcode
    finally:
        if process.is_alive() and process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    failures = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    return _Run(status, failures, log.read_text(errors="replace") if log.exists() else "")


def _forks() -> multiprocessing.context.ForkServerContext:
    """Makes processes that have imported torch already, and that have one thread each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PREPARED)
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(THREADS)  # read when numpy and torch are imported
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    return context


def _run_here(folder: Path, arguments: list[str], environment: dict[str, str], log: Path) -> NoReturn:
    """In a process of its own: pytest, as if it had been started in ``folder``."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    import pytest

    sys.exit(int(pytest.main(arguments)))
