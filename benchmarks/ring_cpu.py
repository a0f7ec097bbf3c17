"""What does a ring of two processes cost and gain on a CPU? Ratios in one run, right answers asserted in the same run.

    python benchmarks/ring_cpu.py            starts two processes with one core each

Versions take turns, so that a noisy machine disturbs all of them alike: the ring on two processes, ringflash on one
process with one core (the other process waits), and PyTorch's own scaled_dot_product_attention there. Forward and forward
plus backward, causal, float32, grouped heads. The host's overhead is measured where there is next to nothing to compute:
per call on a ring of one, and per hop (a message and one more visit) from a ring of two. Writes results/ring_cpu.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from record import write
from torch import Tensor

import ringflash as rf

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layout", default="zigzag")
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        sys.exit(subprocess.run([sys.executable, *launcher, *sys.argv], env=environment).returncode)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    records = [record for length in options.lengths for record in compare(length, options.repeats, options.layout)]
    records.append(overhead())
    if dist.get_rank() == 0:
        show(records)
        path = write("ring_cpu", records)
        print(json.dumps({"written": path.name, "records": len(records)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def compare(length: int, repeats: int, layout: str) -> list[dict[str, Any]]:
    """Seconds of each version at one length, interleaved."""
    make = torch.Generator().manual_seed(0)
    shapes = [(1, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    whole = [torch.randn(shape, generator=make) for shape in shapes]
    s = rf.Sharding(length, mask=rf.causal, layout=layout)
    mine = [s.shard(x, dim=1) for x in whole]

    def ring(backward: bool) -> list[Tensor]:
        return results(lambda q, k, v: rf.ring_attention(q, k, v, s), mine, backward)

    def alone(backward: bool) -> list[Tensor]:
        return results(rf.flash_attention, whole, backward)

    def torch_own(backward: bool) -> list[Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        return results(attention, whole, backward)

    versions: dict[str, Callable[[bool], list[Tensor]]] = {"ring of 2": ring, "one process": alone, "torch": torch_own}
    check(ring, alone if dist.get_rank() == 0 else None, s)
    records = []
    for backward in (False, True):
        seconds: dict[str, list[float]] = {name: [] for name in versions}
        for _ in range(repeats):
            for name, version in versions.items():
                dist.barrier()
                began = time.perf_counter()
                if version is ring or dist.get_rank() == 0:
                    version(backward)
                    seconds[name].append(time.perf_counter() - began)
        if dist.get_rank() == 0:
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            records.append(
                {
                    "benchmark": "ring_cpu",
                    "length": length,
                    "pass": "forward + backward" if backward else "forward",
                    "layout": layout,
                    "repeats": repeats,
                    "median_seconds": medians,
                    "fastest_seconds": {name: min(values) for name, values in seconds.items()},
                    "ring_speedup_over_one_process": medians["one process"] / medians["ring of 2"],
                    "one_process_over_torch": medians["one process"] / medians["torch"],
                }
            )
    return records


def results(attention: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> list[Tensor]:
    q, k, v, dout = inputs
    if not backward:
        with torch.no_grad():
            return [attention(q, k, v)]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(ring: Callable[[bool], list[Tensor]], alone: Callable[[bool], list[Tensor]] | None, s: rf.Sharding) -> None:
    """The ring's out and gradients are one process's, or nothing is timed. Also the warm-up of both."""
    together = [s.unshard(x, dim=1) for x in ring(True)]
    for got, want in zip(together, alone(True) if alone else [], strict=False):
        error = ((got - want).norm() / want.norm()).item()
        assert error < 1e-5, f"the ring is off by {error:.1e}"


def overhead(calls: int = 300) -> dict[str, Any]:
    """Microseconds of host work per call and per hop, on 8 tokens of one head."""
    x = torch.randn(1, 8, 1, 8)

    def seconds_per_call(s: rf.Sharding, backward: bool) -> float:
        part = s.shard(x, dim=1)
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            results(lambda q, k, v: rf.ring_attention(q, k, v, s), [part] * 4, backward)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    found: dict[str, Any] = {"benchmark": "overhead", "calls": calls}
    for name, backward in (("forward", False), ("forward + backward", True)):
        one = seconds_per_call(rf.Sharding(8, (0, 1)), backward)
        two = seconds_per_call(rf.Sharding(8, mask=rf.full), backward)
        hops = 3 if backward else 1  # keys onward in both passes, one total home
        found[name] = {
            "microseconds_per_call": 1e6 * one,
            "microseconds_per_hop": 1e6 * (two - one) / hops,
            "hops": hops,
        }
    return found


def show(records: list[dict[str, Any]]) -> None:
    print(
        f"causal, float32, {HEADS} query and {KV_HEADS} key heads of {HEAD_DIM}, one core per process; median seconds"
    )
    print(
        f"{'tokens':>7}  {'pass':<20}{'ring of 2':>10}{'one process':>13}{'torch':>8}{'ring gains':>12}{'one / torch':>13}"
    )
    for r in (r for r in records if r["benchmark"] == "ring_cpu"):
        t = r["median_seconds"]
        print(
            f"{r['length']:>7}  {r['pass']:<20}{t['ring of 2']:>10.3f}{t['one process']:>13.3f}{t['torch']:>8.3f}"
            f"{r['ring_speedup_over_one_process']:>11.2f}x{r['one_process_over_torch']:>13.2f}"
        )
    host = next(r for r in records if r["benchmark"] == "overhead")
    for name in ("forward", "forward + backward"):
        t = host[name]
        print(
            f"host overhead, {name}: {t['microseconds_per_call']:.0f} us per call, "
            f"{t['microseconds_per_hop']:.0f} us per hop: a message and its part of one more visit ({t['hops']} hops)"
        )


if __name__ == "__main__":
    main()
