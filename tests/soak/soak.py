"""Thousands of steps, none like the one before, and nothing that grows.

    python -m soak.soak --minutes 30                 all sections, one after the other
    python -m soak.soak --minutes 1 --only 2,local   two of them

A section is 1, 2, 3 or 4 real processes over gloo, four ranks in this process (``local``), or four processes that make groups
of some of them and destroy them again (``groups``). Each prints its gauges (gauges.py) and compares every so many steps with
one process in float64. What grew is named with the types of objects and, from 200 more steps, the lines of Python that hold it.
The last line is one JSON document; the status is 1 if anything grew or was wrong. ``--plant`` leaks on purpose, for the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from soak.gauges import Gauges, culprits, malloced, settle, spell
from soak.steps import CHECKS, Steps

import ringflash as rf

SECTIONS = ("1", "2", "3", "4", "local", "groups")
COMPARED = 25  # every so many steps
SAMPLES = 48
LEAST = 16  # samples that a verdict needs
STRIDE = 10  # steps between two looks at the clock
MORE = 200  # steps under tracemalloc, once something has grown
LEAKS: dict[str, Callable[[int], Any]] = {
    "heap": lambda step: bytearray(1024),
    "file": lambda step: os.open(os.devnull, os.O_RDONLY) if step % 50 == 0 else None,
    "key": lambda step: dist.distributed_c10d._get_default_store().set(f"leaked {dist.get_rank()} {step}", "x"),
    "tensor": lambda step: torch.zeros(16) if step % 5 == 0 else None,
    "object": lambda step: Leaked() if step % 5 == 0 else None,
}
"""What ``--plant`` keeps of each step."""


class Leaked:
    """What a leaking program keeps."""


def main() -> int:
    given = _arguments()
    sections = given.only.split(",")
    failed: dict[str, list[str]] = {}
    for section in sections:
        found = _run(section, 60 * given.minutes / len(sections), given)
        if found:
            failed[section] = found
    print(json.dumps({"minutes": given.minutes, "sections": len(sections), "failed": failed}))
    return int(bool(failed))


def _run(section: str, seconds: float, given: argparse.Namespace) -> list[str]:
    """One section in processes of its own, which print as they go; returns what grew in any of them."""
    ranks = 1 if section == "local" else 4 if section == "groups" else int(section)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "soak.soak", "--section", section, "--seconds", str(seconds)]
    command += ["--check", given.check, "--plant", given.plant]
    print(f"section {section}: {seconds:.0f} s", flush=True)
    found: set[str] = set()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_FR_BUFFER_SIZE": "0"}  # its log would fill for minutes
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"grew"'):
                found |= set(json.loads(line)["grew"])
            else:
                print(line, end="", flush=True)
    return sorted(found) + (["it ended with an error"] if process.returncode else [])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="all sections together (default 5)")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--check", default=",".join(CHECKS), help="check modes that take turns")
    parser.add_argument("--plant", default="", choices=["", *LEAKS], help="leak, to see that it is found")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := [section for section in given.only.split(",") if section not in SECTIONS]:
        parser.error(f"--only names {', '.join(unknown)}; accepted are {', '.join(SECTIONS)}")
    return given


def section(name: str, seconds: float, checks: tuple[str, ...], plant: str) -> None:
    """One section, in each of its processes; the last line says what grew."""
    torch.set_num_threads(1)
    _open_group()
    gauges, kept = Gauges(dist.distributed_c10d._get_default_store()), []
    run = {"local": _local, "groups": _groups}.get(name, _ring)(checks)

    def step(number: int) -> None:
        run(number, number % COMPARED == 0)
        if plant:
            kept.append(LEAKS[plant](number))

    me = f"section {name}, rank {dist.get_rank()}"
    started, number = time.monotonic(), 0
    while not (_any(time.monotonic() - started > seconds) and gauges.count >= LEAST):
        for _ in range(STRIDE):
            number += 1
            step(number)
        if _any(time.monotonic() - started > seconds / SAMPLES * (1 + gauges.count)):
            held = gauges.sample(number)
            if gauges.count % 10 == 0 and dist.get_rank() == 0:
                print(
                    f"{me}: step {number}, {held['rss'] / 2**20:.0f} MiB, {held['heap'] / 2**20:.2f} in use", flush=True
                )
    growths = gauges.growths()
    torchs = {"store keys"} if name == "groups" else set()  # torch leaves two of each group it has made
    grown = [g.name for g in growths if not g.allowed and not (g.name in torchs and g.per_step <= 3)]
    text = f"{me}: {number} steps in {time.monotonic() - started:.0f} s\n{spell(growths)}\n"
    if _any(bool(grown)):
        lines = _explain(step, number)
        text += f"{me}: what held more after {MORE} steps\n  " + "\n  ".join(lines) + "\n" if grown else ""
    print(text + json.dumps({"grew": grown}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _explain(step: Callable[[int], None], number: int) -> list[str]:
    """The lines of Python that hold more and more, found by going on under tracemalloc."""
    tracemalloc.start(1)
    settle()
    before, heap = tracemalloc.take_snapshot(), malloced()
    for more in range(1, MORE + 1):
        step(number + more)
    settle()
    lines = culprits(before, tracemalloc.take_snapshot())
    tracemalloc.stop()
    return [*lines, f"{malloced() - heap:+,} B of malloc, Python's own large objects included"]


def _open_group() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    else:
        dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", 0, 1, True), rank=0, world_size=1)


def _any(mine: bool) -> bool:
    """Is it so on any rank?"""
    votes = torch.tensor(int(mine))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def _ring(checks: tuple[str, ...]) -> Callable[[int, bool], None]:
    return Steps(None, checks)


def _local(checks: tuple[str, ...]) -> Callable[[int, bool], None]:
    """A new world of one to four ranks for every few steps."""

    def run(number: int, compare: bool) -> None:
        rf.local_world(1 + number % 4).run(lambda group: Steps(group, checks)(number, compare))

    return run


def _groups(checks: tuple[str, ...]) -> Callable[[int, bool], None]:
    """A group of some ranks, a few steps on it, and its end."""

    def run(number: int, compare: bool) -> None:
        first = number % 3
        members = [first, first + 1]
        group = dist.new_group(members)
        if dist.get_rank() in members:
            Steps(group, checks)(number, compare)
            dist.destroy_process_group(group)

    return run


if __name__ == "__main__":
    given = _arguments()
    if given.section:
        section(given.section, given.seconds, tuple(given.check.split(",")), given.plant)
    else:
        sys.exit(main())
