"""Which tile shapes are fastest on this GPU? An offline search; its answer is read by a person, not by the library.

    python benchmarks/tune.py --minutes 10            results/tune.jsonl, and lines for the reviewed table
    python benchmarks/tune.py --only forward --jobs 8

Candidates are tried in processes of their own first, several at once: each compiles (into Triton's cache, so that this
process need not), runs, and is compared with the oracle. A compiler that aborts or a kernel that hangs takes only its own
process along. Those that were right are then timed in turns with the present choice, causal and full. Nothing is
overwritten: ``ringflash_kernels.config`` is a reviewed table, and the lines printed at the end are a proposal for it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench import Bench, Record, all_right, reason
from exact import Group, Oracle
from peers import Problem, ringflash
from record import RESULTS, Journal
from stopwatch import Budget, quantiles
from torch import Tensor

import ringflash as rf
from ringflash_kernels.config import Config, Direction, architecture, choose, has_one_pass, use

SECONDS_FOR_A_TRIAL = 120
Table = tuple[tuple[int, int, int, int], ...]

# block_q, block_k, warps, stages; the likeliest first
FORWARD: Table = (
    (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2),
    (128, 128, 8, 3), (128, 64, 4, 2), (128, 32, 8, 3), (256, 64, 8, 2),
)  # fmt: skip
BACKWARD: Table = (
    (64, 128, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 1), (64, 128, 8, 3),
    (128, 64, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 1),
)  # fmt: skip
DQ: Table = ((128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3), (64, 128, 8, 2), (128, 32, 8, 2))
DECODE: Table = ((16, 64, 4, 2), (16, 128, 4, 2), (16, 64, 4, 3), (16, 128, 8, 2), (16, 32, 4, 3), (32, 64, 4, 2))
CANDIDATES: dict[Direction, Table] = {
    "forward": FORWARD, "backward": BACKWARD, "dkdv": BACKWARD, "dq": DQ, "decode": DECODE,
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A line of the table: what is computed, at which head dim."""

    direction: Direction
    head_dim: int

    def __str__(self) -> str:
        return f"{self.direction} {self.head_dim}"

    def problems(self, tiny: bool) -> list[Problem]:
        """What it is timed on."""
        length, batch, heads = (96, 1, (2, 1)) if tiny else (8192, 2, (64, 8))
        if self.direction == "decode":
            length, batch = (length, batch) if tiny else (32768, 8)
            return [Problem(self.head_dim, "full", rf.full, length, batch, *heads, queries=1)]
        masks = {"causal": rf.causal, "full": rf.full}
        return [Problem(self.head_dim, name, mask, length, batch, *heads) for name, mask in masks.items()]

    def call(self, bench: Bench, problem: Problem, sets: Sequence[tuple[Tensor, ...]]) -> Callable[[int], Any]:
        """The pass that is tuned, on one of the sets of inputs."""
        attention = ringflash(problem, bench.backend, deterministic=self.direction in ("dkdv", "dq"))
        if self.direction in ("forward", "decode"):
            return lambda i: attention(*sets[i][:3])
        graphs = [attention(*inputs[:3]) for inputs in sets]
        return lambda i: torch.autograd.grad(graphs[i], sets[i][:3], sets[i][3], retain_graph=True)


TARGETS = [
    *(Target(direction, head_dim) for head_dim in (128, 64) for direction in ("forward", "backward")),
    *(Target(direction, 256) for direction in ("forward", "backward")),
    *(Target(direction, head_dim) for head_dim in (128, 64) for direction in ("dkdv", "dq")),
    *(Target("decode", head_dim) for head_dim in (128, 64)),
    *(Target(direction, 256) for direction in ("dkdv", "dq", "decode")),
]


def main() -> None:
    options = _options()
    bench = Bench(torch.device(options.device), options.backend, Budget(options.minutes), Journal(_path(options)))
    if options.trial:
        direction, head_dim, *shape = json.loads(options.trial)
        print(json.dumps(trial(Target(direction, head_dim), Config(*shape), bench, options.tiny)), flush=True)
        return
    arch = architecture(bench.device)
    targets = [
        t
        for t in TARGETS  # where backward takes two passes, those are what there is to tune
        if options.only in str(t) and (t.direction != "backward" or has_one_pass(arch, t.head_dim, t.head_dim, "plain"))
    ][: 1 if options.tiny else None]
    left_out = []
    for target in targets:
        if bench.budget.left < (0 if options.tiny else 20):
            left_out.append(str(target))
            continue
        try:
            candidates = [Config(*x) for x in CANDIDATES[target.direction]][: 2 if options.tiny else None]
            bench.journal.add(tune(target, candidates, bench, options))
        except Exception as error:
            bench.journal.add({"benchmark": "tune", "target": str(target), "failed": reason(error)})
            if not bench.alive():
                break
        show(bench.journal.records[-1])
    records = bench.journal.records
    print("\n".join(["", "# a proposal for TABLE in ringflash_kernels/config.py, to be reviewed", *proposal(records)]))
    failed = [f"{r['target']}: {r['failed']}" for r in records if "failed" in r]
    last = {"records": len(records), "seconds": round(bench.budget.spent, 1), "failed": failed, "left_out": left_out}
    print(json.dumps(last | {"written": bench.journal.path.name if bench.journal.path and records else None}))
    sys.exit(1 if failed else 0)


def tune(target: Target, candidates: Sequence[Config], bench: Bench, options: argparse.Namespace) -> Record:
    """Try all candidates and the present choice, and time those that are right in turns; the record of it."""
    present = choose(target.direction, architecture(bench.device), target.head_dim, target.head_dim, "plain")
    configs = list(dict.fromkeys([present, *candidates]))
    with ThreadPoolExecutor(options.jobs) as pool:
        ask = functools.partial(_in_a_process, target, options=options)
        tried = dict(zip(configs, pool.map(ask, configs), strict=True))
    right = [config for config in configs if tried[config].get("right")]
    problems = target.problems(options.tiny)
    times = [_times(target, right, problem, bench, options.tiny) for problem in problems if right]
    for config in right:  # against the present choice, or the first that runs if that does not
        ratios = [t[right[0]]["p50"] / t[config]["p50"] for t in times]
        tried[config]["gain"] = math.prod(ratios) ** (1 / len(ratios))
        tried[config]["ms"] = {p.mask: t[config] for p, t in zip(problems, times, strict=True)}
    fastest = sorted(configs, key=lambda config: -tried[config].get("gain", 0.0))
    return {
        "benchmark": "tune",
        "target": str(target),
        "direction": target.direction,
        "head_dim": target.head_dim,
        "arch": architecture(bench.device),
        "problems": [p.describe() for p in problems],
        "present": asdict(present),
        "present_runs": present in right,
        "candidates": [{"config": asdict(config)} | tried[config] for config in fastest],
    } | ({} if right else {"failed": "no candidate runs and is right"})


def trial(target: Target, config: Config, bench: Bench, tiny: bool) -> Record:
    """Compile and run one candidate, and compare it with the oracle. In a process of its own: see the module."""
    errors: dict[str, float] = {}
    for problem in target.problems(tiny):
        inputs = bench.inputs(problem, 0)
        attention = ringflash(problem, bench.backend, deterministic=target.direction in ("dkdv", "dq"))
        try:
            with use(target.direction, config):
                if target.direction == "decode":
                    inputs = inputs[:3]
                    with torch.no_grad():
                        results = {"out": attention(*inputs)}
                else:
                    results, _ = bench.try_once(attention, inputs)
        except Exception as error:
            return {"right": False, "failed": reason(error)}
        group = Group(problem.batch - 1, problem.kv_heads - 1, problem.heads // problem.kv_heads)
        verdict = Oracle.ask(inputs, problem.bounds, problem.scale, group).judge(results)
        if not all_right(verdict):
            return {"right": False, "wrong": {problem.mask: verdict}}
        errors |= {f"{problem.mask} {name}": float(part["error"]) for name, part in verdict.items()}
    return {"right": True, "error": errors}


def proposal(records: Sequence[Record]) -> Iterator[str]:
    """Lines for the table, each with what it gains; less than 1 % is no reason to change anything."""
    for r in records:
        best: Record = next(iter(r.get("candidates", ())), {})
        present = tuple(r.get("present", {}).values())
        if "failed" in r or "gain" not in best:
            yield f"# {r['target']}: {r.get('failed')}"
        elif r["present_runs"] and best["gain"] < 1.01:
            yield f"# {r['target']}: stays {present}"
        else:
            shape = ", ".join(map(str, best["config"].values()))
            why = f"{best['gain']:.2f} x {present}" if r["present_runs"] else f"{present} does not run"
            where = f"{r['gpu'] or r['cpu']}, torch {r['torch']}, Triton {r['triton']}, {r['date']}"
            key = f'({r["arch"]}, "{r["direction"]}", "plain")'
            yield f"{key}: ({r['head_dim']}, Config({shape})),  # {why}; {where}"


def show(record: Record) -> None:
    """What was found for a target, the fastest first."""
    print(f"{record['target']}: " + record.get("failed", ""), flush=True)
    for candidate in record.get("candidates", ()):
        if "gain" in candidate:
            times = "  ".join(f"{mask} {spread['p50']:.3f} ms" for mask, spread in candidate["ms"].items())
            said = f"{candidate['gain']:.3f} x  {times}"
        else:
            said = f"failed: {candidate['failed']}" if "failed" in candidate else "WRONG"
        mark = "present" if candidate["config"] == record["present"] else ""
        print(f"  {tuple(candidate['config'].values())!s:<20} {mark:<8} {said}", flush=True)


def _times(
    target: Target, configs: Sequence[Config], problem: Problem, bench: Bench, tiny: bool
) -> dict[Config, dict[str, float]]:
    sets = bench.sets(problem)
    call = target.call(bench, problem, sets)

    def under(config: Config, i: int) -> None:
        with use(target.direction, config):
            call(i)

    calls = {str(config): functools.partial(under, config) for config in configs}
    found = bench.watch.in_turns(calls, len(sets), 0.1 if tiny else 3.0)
    return {config: quantiles(found[str(config)]) for config in configs}


def _in_a_process(target: Target, config: Config, options: argparse.Namespace) -> Record:
    asked = json.dumps([target.direction, target.head_dim, *asdict(config).values()])
    command = [sys.executable, __file__, "--trial", asked, "--device", options.device, "--backend", options.backend]
    try:
        done = subprocess.run(
            [*command, *(["--tiny"] if options.tiny else [])],
            capture_output=True,
            text=True,
            timeout=SECONDS_FOR_A_TRIAL,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return {"right": False, "failed": f"no answer in {SECONDS_FOR_A_TRIAL} s"}
    try:
        answer: Record = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        tail = " ".join(done.stderr.split()[-60:])
        return {"right": False, "failed": f"ended with status {done.returncode}: {tail[-400:]}"}
    return answer


def _path(options: argparse.Namespace) -> Path | None:
    return options.out or (None if options.tiny or options.trial else RESULTS / "tune.jsonl")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the whole run")
    parser.add_argument("--only", default="", help="targets whose name contains this, such as 'forward' or 'dq 64'")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="candidates tried at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="triton", help="of ringflash")
    parser.add_argument("--tiny", action="store_true", help="one target, two candidates, small shapes: does it work?")
    parser.add_argument("--out", type=Path, help="where records go (results/tune.jsonl; tiny: nowhere)")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
