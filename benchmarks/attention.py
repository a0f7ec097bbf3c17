"""How fast is attention on this GPU, against everything in PyTorch that computes the same? One run, most important first.

    python benchmarks/attention.py --minutes 8        results/attention.jsonl; then python benchmarks/table.py
    python benchmarks/attention.py --pilot            its first cases in a minute; results/attention_pilot.jsonl
    python benchmarks/attention.py --tiny             seconds, on any machine: does the benchmark itself work?

Nothing wrong is timed: out, dq, dk and dv of every version are compared with float64 or float32 first (``exact.py``); a
wrong result is recorded with its error, left out, and the run ends with status 1. Versions take turns on several sets of
random inputs (``stopwatch.py``). TFLOP/s count visible cells only: 4 x cells x head_dim forward, 2.5 times that backward.
Forward is forward as in training: it keeps what backward needs. ``costs.py`` measures what surrounds the kernels.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import costs
import numpy as np
import torch
from bench import OURS, Bench, Case, Record, all_right, reason
from exact import NAMES, Group, Oracle
from peers import PEERS, Attention, Problem, Unfit, explained
from record import RESULTS, Journal
from stopwatch import Budget, quantiles
from torch import Tensor

import ringflash as rf

WITHIN = {"forward": 2.0, "backward": 3.0}  # seconds that a comparison is given, if five rounds fit into them
_FORESEEN = 20e12  # FLOP/s: three versions at 300, called five times each


def main() -> None:
    options = _options()
    cases = [case for case in programme(options.tiny) if options.only in case.name]
    device = torch.device(options.device)
    if options.warm:
        share, of = map(int, options.warm.split("/"))
        return warm_up(cases[share::of], Bench(device, options.backend, Budget(5), Journal(None)))
    out = options.out or (None if options.tiny else RESULTS / f"attention{'_pilot' if options.pilot else ''}.jsonl")
    minutes = options.minutes if options.minutes is not None else 1.0 if options.pilot or options.tiny else 8.0
    peers = tuple(name for name in PEERS if not (options.pilot and name == "flex"))
    haste = 0.02 if options.tiny else 0.5 if options.pilot else 1.0
    bench = Bench(device, options.backend, Budget(minutes), Journal(out), peers, haste)
    if bench.cuda and options.jobs and not options.pilot:
        compile_ahead(bench.budget, options.jobs)
    found = run(bench, cases)
    print(json.dumps(found | {"written": out.name if out and bench.journal.records else None}), flush=True)
    sys.exit(1 if found["wrong"] or found["failed"] else 0)


def programme(tiny: bool) -> list[Case]:
    """Every case, the most important first."""
    if tiny:
        heads = (4, 2)
        return [
            Case("matmul", functools.partial(costs.matmul, size=64)),
            *compared(64, ("causal", "full", "window", "documents"), (128,), heads, tokens=256),
            Case("carry", functools.partial(costs.carry, length=64, heads=(2, 1), head_dim=32)),
            Case("ring", functools.partial(costs.ring, length=100, heads=heads, head_dim=32)),
            Case("host", functools.partial(costs.host, calls=5)),
        ]
    both, grouped = ("causal", "full"), (64, 8)
    return [
        Case("matmul", functools.partial(costs.matmul, size=8192), 3),
        *compared(128, both, (8192, 16384), grouped),
        *compared(64, both, (8192, 16384), grouped),
        Case("carry", functools.partial(costs.carry, length=8192, heads=grouped, head_dim=128), 4),
        *compared(128, ("documents", "causal"), (65536,), grouped),
        *compared(128, both, (32768,), grouped),
        *compared(128, both, (8192, 16384), (16, 16)),
        Case("ring", functools.partial(costs.ring, length=65536, heads=grouped, head_dim=128), 15),
        *compared(128, ("window",), (65536,), grouped),
        *compared(256, both, (16384,), (32, 4)),
        Case("host", functools.partial(costs.host, calls=300), 3),
        *compared(128, both, (4096, 2048, 1024), grouped),
        *compared(64, both, (32768,), grouped),
        *compared(64, both, (16384,), (32, 32)),
        *compared(64, ("window", "documents"), (65536,), grouped),
        *compared(256, both, (8192, 32768), (32, 4)),
        *compared(64, both, (4096, 2048, 1024), grouped),
        *compared(128, ("causal",), (16384,), grouped, dtype=torch.float16),
        *compared(128, ("full",), (65536,), grouped),
        *compared(64, both, (65536,), grouped),
        *compared(128, ("causal",), (131072,), grouped),
        *compared(256, both, (4096, 2048, 1024, 65536), (32, 4)),
    ]


def compared(
    head_dim: int,
    masks: Iterable[str],
    lengths: Iterable[int],
    heads: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 16384,
) -> Iterator[Case]:
    """The cases of some problems, each with a batch that makes so many ``tokens`` in all, or one row of more."""
    for length in lengths:
        for mask in masks:
            value = {
                "full": rf.full,
                "causal": rf.causal,
                "window": rf.window(length // 16 - 1, 0),  # 4096 keys of 64K
                "documents": rf.causal & rf.documents(packed(length, mean=length / 32)),  # 2K of 64K
            }[mask]
            batch = 1 if mask == "documents" else max(1, tokens // length)
            problem = Problem(head_dim, mask, value, length, batch, *heads, dtype)
            kind = "" if dtype == torch.bfloat16 else f", {str(dtype).removeprefix('torch.')}"
            name = f"d{head_dim} {mask} {length} x {batch}, {heads[0]}/{heads[1]} heads{kind}"
            seconds = 2 + sum(map(problem.flops, WITHIN)) / _FORESEEN
            yield Case(name, functools.partial(compare, problem), seconds, problem)


def packed(length: int, mean: float, spread: float = 1.0) -> list[int]:
    """Offsets of documents of log-normal length; the last one ends where the sequence does."""
    draw = np.random.default_rng(0)
    offsets = [0]
    while offsets[-1] < length:
        document = draw.lognormal(math.log(mean) - spread**2 / 2, spread)
        offsets.append(min(length, offsets[-1] + max(1, round(document))))
    return offsets


def run(bench: Bench, cases: list[Case]) -> Record:
    """All cases that the budget affords, in order; returns what was found, in short. A device that fails ends the run."""
    left_out, alive = [], True
    for case in cases:
        if not alive or bench.budget.left < case.seconds * bench.haste:
            left_out.append(case.name)
            continue
        try:
            for record in case.run(bench):
                _note(bench, case, record)
        except Exception as error:
            _note(bench, case, {"kind": "failure", "failed": reason(error)})
            alive = bench.alive()
        if bench.cuda and alive:
            gc.collect()
            torch.cuda.empty_cache()
    for record in derived(bench.journal.records):
        _note(bench, Case("derived", lambda _: ()), record)
    return summary(bench, left_out)


def compare(problem: Problem, bench: Bench) -> Iterator[Record]:
    """Forward, then backward, of every version that can serve this problem and is right."""
    sets = bench.sets(problem)
    group = Group(problem.batch - 1, problem.kv_heads - 1, problem.heads // problem.kv_heads)
    oracle = Oracle.ask(sets[0], problem.bounds, problem.scale, group)
    found: dict[str, Record] = {}
    right: dict[str, Attention] = {}
    for name in (OURS, *bench.peers):
        try:
            with explained():
                attention = bench.attention(name, problem)
                results, memory = bench.try_once(attention, sets[0])
            verdict = oracle.judge(results)
            del results
            found[name] = {"error": {k: part["error"] for k, part in verdict.items()}, "peak_bytes": memory}
            if all_right(verdict):
                right[name] = attention
            else:
                found[name]["wrong"] = verdict
        except Unfit as error:
            found[name] = {"missing": str(error)}
        except Exception as error:
            found[name] = {"failed": reason(error)}
            if not bench.alive():
                raise
    del oracle
    calls: dict[str, Callable[[int], object]]
    calls = {name: functools.partial(_forward, attention, sets) for name, attention in right.items()}
    yield _compared(problem, bench, found, calls, "forward", len(sets))
    if right:
        graphs = {name: [_forward(attention, sets, i) for i in range(len(sets))] for name, attention in right.items()}
        calls = {name: functools.partial(_backward, graphs[name], sets) for name in right}
    yield _compared(problem, bench, found, calls, "backward", len(sets))


def _forward(attention: Attention, sets: list[tuple[Tensor, ...]], i: int) -> Tensor:
    return attention(*sets[i][:3])


def _backward(graphs: list[Tensor], sets: list[tuple[Tensor, ...]], i: int) -> tuple[Tensor, ...]:
    """Backward alone: the graph stands, and is walked again and again."""
    return torch.autograd.grad(graphs[i], sets[i][:3], sets[i][3], retain_graph=True)


def _compared(
    problem: Problem,
    bench: Bench,
    found: dict[str, Record],
    calls: dict[str, Callable[[int], object]],
    direction: str,
    sets: int,
) -> Record:
    """The record of one pass: what is known of every version, and the times of those that are right."""
    times = bench.watch.in_turns(calls, sets, WITHIN[direction] * bench.haste) if calls else {}
    results = ("out",) if direction == "forward" else NAMES[1:]
    versions: dict[str, Record] = {}
    for name, known in found.items():
        versions[name] = dict(known)
        if "error" in known:
            versions[name]["error"] = {k: known["error"][k] for k in results}
            versions[name]["peak_bytes"] = known["peak_bytes"][direction]
        if name in times:
            spread = quantiles(times[name])
            versions[name] |= {"ms": spread, "tflops": problem.flops(direction) / spread["p50"] / 1e9}
    rates = {name: version["tflops"] for name, version in versions.items() if "tflops" in version}
    best = max((name for name in rates if name != OURS), key=rates.__getitem__, default=None)
    mine = rates.get(OURS)
    return problem.describe() | {
        "kind": "compare",
        "pass": direction,
        "cells": problem.cells,
        "sets": sets,
        "rounds": len(next(iter(times.values()), [])),
        "versions": versions,
        "best_peer": best,
        "ratio": mine / rates[best] if mine and best else None,
        "of_matmul": mine / bench.matmul if mine and bench.matmul else None,
    }


def derived(records: list[Record]) -> Iterator[Record]:
    """Ratios between cases of this run: what masking by intervals costs, and what packed documents keep of dense speed."""
    rates: dict[tuple[Any, ...], float] = {}
    for r in records:
        rate = r.get("versions", {}).get(OURS, {}).get("tflops") if r["kind"] == "compare" else None
        if rate:
            rates[r["dtype"], r["head_dim"], r["heads"], r["kv_heads"], r["length"], r["pass"], r["mask"]] = rate
    named = ("dtype", "head_dim", "heads", "kv_heads", "length", "pass", "mask")
    for (*rest, mask), rate in rates.items():
        against = {"causal": "full", "documents": "causal"}.get(mask)
        dense = rates.get((*rest, against))
        if dense:
            base = dict(zip(named, (*rest, mask), strict=True))
            yield {"kind": "derived"} | base | {"against": against, "speed_per_cell": rate / dense}


def summary(bench: Bench, left_out: list[str]) -> Record:
    """The last line of a run."""
    records = bench.journal.records
    versions = [(r["case"], name, v) for r in records for name, v in r.get("versions", {}).items()]
    failed = {f"{case}: {name}: {v['failed']}" for case, name, v in versions if name == OURS and "failed" in v}
    failed |= {f"{r['case']}: {r['failed']}" for r in records if "failed" in r}
    return {
        "records": len(records),
        "seconds": round(bench.budget.spent, 1),
        "wrong": sorted({f"{case}: {name}" for case, name, v in versions if "wrong" in v}),
        "failed": sorted(failed),
        "left_out": left_out,
        "ratio_to_best_peer": {f"{r['case']}, {r['pass']}": round(r["ratio"], 3) for r in records if r.get("ratio")},
    }


def compile_ahead(budget: Budget, jobs: int) -> None:
    """Fill the compilers' caches from parallel processes, for at most a third of the budget."""
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--warm", f"{job}/{jobs}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for job in range(jobs)
    ]
    until = time.monotonic() + budget.left / 3
    for worker in workers:
        try:
            worker.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    print(f"{budget.spent:6.0f} s  compiled ahead in {jobs} processes", flush=True)


def warm_up(cases: list[Case], bench: Bench) -> None:
    """Whatever these cases compile: ringflash once for each kind of problem, FlexAttention for every shape."""
    done = set()
    for problem in (case.problem for case in cases if case.problem):
        kind = (problem.head_dim, problem.heads // problem.kv_heads, problem.dtype)
        for name in ("flex",) if kind in done else (OURS, "flex"):
            try:
                bench.try_once(bench.attention(name, problem), bench.inputs(problem, 0))
            except Exception:  # the run itself will say what is wrong
                continue
        done.add(kind)


def _note(bench: Bench, case: Case, record: Record) -> None:
    bench.journal.add({"benchmark": "attention", "case": case.name} | record)
    print(f"{bench.budget.spent:6.0f} s  {case.name:<44} {record.get('pass', ''):<19}{_line(record)}", flush=True)


def _line(record: Record) -> str:
    if record["kind"] == "compare":
        said = []
        for name, version in record["versions"].items():
            if "tflops" in version:
                said.append(f"{name} {version['tflops']:.3g}")
            elif "wrong" in version or "failed" in version:
                said.append(f"{name} {'WRONG' if 'wrong' in version else 'failed'}")
        return "  ".join(said) + (f"  TFLOP/s, ratio {record['ratio']:.2f}" if record["ratio"] else "")
    wanted = (
        "failed",
        "missing",
        "versions",
        "mask",
        "against",
        "speed_per_cell",
        "tflops",
        "overhead",
        "slowdown",
        "us",
    )
    return json.dumps({name: record[name] for name in wanted if name in record})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, help="of the whole run, compilation included (8; pilot and tiny: 1)")
    parser.add_argument("--pilot", action="store_true", help="the first cases, in a minute, without FlexAttention")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that the benchmark works")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto", help="of ringflash")
    jobs = min(8, (os.cpu_count() or 1) // 2)
    parser.add_argument("--jobs", type=int, default=jobs, help="processes that compile ahead, on CUDA; 0 for none")
    parser.add_argument("--out", type=Path, help="where records go (results/attention.jsonl; tiny: nowhere)")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tiny = options.tiny or options.device == "cpu"
    return options


if __name__ == "__main__":
    main()
