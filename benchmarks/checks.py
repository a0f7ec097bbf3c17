"""What do the four checks cost? Ratios in one run, the bits of all modes asserted to be the same in the same run.

    python benchmarks/checks.py             starts two processes with one core each

Three figures: the door alone (``door.enter`` of a call that ranks have agreed on before, ``first`` less ``off``, the least of
many repeats), a forward and backward on two gloo processes in each mode by turns, and the same in a world of two in one
process. Causal, float32, grouped heads. Writes results/checks.jsonl, with the load of the machine beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from record import write
from torch import Tensor

import ringflash as rf
from ringflash import door
from ringflash.check import MODES
from ringflash.reference import Scoring

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        sys.exit(subprocess.run([sys.executable, *launcher, *sys.argv], env=environment).returncode)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    records = [at_the_door()]
    for length in options.lengths:
        records.append(whole_call(length, options.repeats, None, "2 gloo processes"))
        if dist.get_rank() == 0:
            records.append(rf.local_world(2).run(lambda group, n=length: whole_call(n, options.repeats, group))[0])
        dist.barrier()
    if dist.get_rank() == 0:
        show(records)
        path = write("checks", [record | {"load": load, "cores": os.cpu_count()} for record in records])
        print(json.dumps({"written": path.name, "records": len(records)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def at_the_door() -> dict[str, Any]:
    """Microseconds of ``door.enter`` for a call that is known, least of many repeats; nothing is sent."""
    found = {}
    for mode in ("off", "first"):
        s = rf.Sharding(16, check=mode)
        q = torch.ones(1, s.local_length, HEADS, HEAD_DIM)
        k = q[:, :, :KV_HEADS]
        rf.ring_attention(q, k, k, s)
        given = ("forward", s.bind(0, 0), (q, k, k), Scoring(HEAD_DIM**-0.5), None, "aten", False)
        door.enter(*given)
        found[mode] = 1e6 * min(timeit.repeat(lambda given=given: door.enter(*given), number=200, repeat=500)) / 200
        dist.barrier()
    return {"benchmark": "door", "microseconds": found, "first_less_off": found["first"] - found["off"]}


def whole_call(length: int, repeats: int, group: Any, world: str = "2 ranks in one process") -> dict[str, Any]:
    """Seconds of a forward and backward in each mode, in turns, and their ratios to ``off``."""
    make = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, length, heads, HEAD_DIM, generator=make) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    calls = {mode: _call(rf.Sharding(length, group, rf.causal, "zigzag", check=mode), whole) for mode in MODES}
    bits = {mode: call() for mode, call in calls.items()}
    for mode in MODES:
        if not all(torch.equal(a, b) for a, b in zip(bits["off"], bits[mode], strict=True)):
            raise SystemExit(f"{mode} has other bits than off at length {length}: nothing is timed")
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    together = dist.barrier if group is None else lambda: group.wire.all_reduce(torch.zeros(1))
    for _ in range(repeats):
        for mode, call in calls.items():
            together()
            began = time.perf_counter()
            call()
            together()
            seconds[mode].append(time.perf_counter() - began)
    least = {mode: min(values) for mode, values in seconds.items()}
    return {
        "benchmark": "forward + backward",
        "world": world,
        "length": length,
        "repeats": repeats,
        "median_seconds": {mode: statistics.median(values) for mode, values in seconds.items()},
        "least_seconds": least,
        "ratio_of_least": {mode: value / least["off"] for mode, value in least.items()},
    }


def _call(s: rf.Sharding, whole: list[Tensor]) -> Callable[[], list[Tensor]]:
    q, k, v, dout = (s.shard(x, dim=1) for x in whole)

    def call() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = rf.ring_attention(*leaves, s)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return call


def show(records: list[dict[str, Any]]) -> None:
    door_alone, *calls = records
    times = door_alone["microseconds"]
    print(f"the door alone: first {times['first']:.2f} us, off {times['off']:.2f} us per call")
    print(f"{'forward + backward':<24} {'length':>7}  " + "  ".join(f"{mode:>8}" for mode in MODES))
    for record in calls:
        ratios = "  ".join(f"{record['ratio_of_least'][mode]:>8.2f}" for mode in MODES)
        print(f"{record['world']:<24} {record['length']:>7}  {ratios}    off: {record['least_seconds']['off']:.4f} s")


if __name__ == "__main__":
    main()
