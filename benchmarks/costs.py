"""What surrounds a kernel: the rate of a plain product, a carry, the cuts of a ring, the host.

Each is a case of ``attention.py``: a function of the run that yields records.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench import OURS, Bench, Record, all_right, reason
from exact import NAMES, Group, Oracle
from peers import Attention, Problem, explained, ringflash
from stopwatch import quantiles
from torch import Tensor

import ringflash as rf

RANKS = 8


def matmul(bench: Bench, size: int) -> Iterator[Record]:
    """The rate of one large product: what this device gives to those who only multiply."""
    make = torch.Generator(bench.device).manual_seed(0)
    made = torch.randn(3, 2, size, size, device=bench.device, dtype=torch.bfloat16, generator=make)
    pairs = [(a, b) for a, b in made]
    times = bench.watch.in_turns({"matmul": lambda i: pairs[i][0] @ pairs[i][1]}, len(pairs), 1.5 * bench.haste)
    spread = quantiles(times["matmul"])
    bench.matmul = 2 * size**3 / spread["p50"] / 1e9
    yield {"kind": "matmul", "size": size, "dtype": "bfloat16", "ms": spread, "tflops": bench.matmul}


def carry(bench: Bench, length: int, heads: tuple[int, int], head_dim: int) -> Iterator[Record]:
    """What it costs a hop that its kernel adds to a carry: the kernel with one, against the same with float32 out."""
    try:
        from ringflash_kernels.forward import attend
    except ImportError as error:
        yield {"kind": "carry", "missing": f"no kernels here: {error}"}
        return
    if not bench.cuda and os.environ.get("TRITON_INTERPRET") != "1":
        yield {"kind": "carry", "missing": "the kernels run on CUDA, or with TRITON_INTERPRET=1"}
        return
    from ringflash.intervals import intervals_of
    from ringflash.reference import Scoring

    problem = Problem(head_dim, "full", rf.full, length, 1, *heads)
    plan = rf.plan(rf.Sharding(length, (0, 1), rf.full, "contiguous"))
    alone = functools.partial(
        attend, intervals=intervals_of(plan, 0, bench.device), scoring=Scoring(problem.scale), dtype=torch.float32
    )
    sets = [tuple(x.detach() for x in inputs[:3]) for inputs in bench.sets(problem)]
    carries = [alone(*inputs) for inputs in reversed(sets)]
    wanted = rf.merge(rf.Partial(*carries[0]), rf.Partial(*alone(*sets[0])))
    got = alone(*sets[0], carry=(carries[0][0].clone(), carries[0][1].clone()))
    off = max(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))
    base = problem.describe() | {"kind": "carry", "pass": "forward", "error": off}
    if not off < 1e-3:  # the kernel's weights are rounded alike in both; only the sum is taken elsewhere
        yield base | {"versions": {f"{OURS} with carry": {"wrong": f"off by {off:.1e}"}}}
        return
    calls = {
        "with carry": lambda i: alone(*sets[i], carry=carries[i]),
        "without, float32 out": lambda i: alone(*sets[i]),
        "without, final dtype": lambda i: alone(*sets[i], dtype=problem.dtype),
    }
    spread = {name: quantiles(t) for name, t in bench.watch.in_turns(calls, len(sets), 3 * bench.haste).items()}
    overhead = spread["with carry"]["p50"] / spread["without, float32 out"]["p50"] - 1
    rates = {name: problem.flops("forward") / s["p50"] / 1e9 for name, s in spread.items()}
    yield base | {"ms": spread, "tflops": rates, "overhead": overhead}


def ring(bench: Bench, length: int, heads: tuple[int, int], head_dim: int) -> Iterator[Record]:
    """Eight ranks of a causal zigzag ring, one after another on this device, against one device: what the cuts cost.

    Messages between the ranks are copies in this device's memory, made and read; they are part of the time.
    """
    problem = Problem(head_dim, "causal", rf.causal, length, 1, *heads)
    shardings = [rf.Sharding(length, (rank, RANKS), rf.causal, "zigzag") for rank in range(RANKS)]
    sets = bench.sets(problem)
    shards = [[_shard(s, inputs) for s in shardings] for inputs in sets]
    whole_sequence = ringflash(problem, bench.backend)

    def together(i: int, backward: bool) -> list[list[Tensor]]:
        def one_rank(group: Any) -> list[Tensor]:
            s = rf.Sharding(length, group, rf.causal, "zigzag")

            def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return rf.ring_attention(q, k, v, s, backend=bench.backend)

            return _run(attention, shards[i][group.rank], backward)

        found: list[list[Tensor]] = rf.local_world(RANKS).run(one_rank)
        return found

    def alone(i: int, backward: bool) -> list[Tensor]:
        return _run(whole_sequence, sets[i], backward)

    oracle = Oracle.ask(sets[0], problem.bounds, problem.scale, Group(0, heads[1] - 1, heads[0] // heads[1]))
    order = torch.cat([s.positions for s in shardings]).argsort().to(bench.device)
    whole = [torch.cat(parts, dim=1)[:, order] for parts in zip(*together(0, True), strict=True)]
    verdicts = {
        f"{OURS}, ring of {RANKS}": oracle.judge(dict(zip(NAMES, whole, strict=True))),
        f"{OURS}, one device": oracle.judge(dict(zip(NAMES, alone(0, True), strict=True))),
    }
    wrong = {name: {"wrong": verdict} for name, verdict in verdicts.items() if not all_right(verdict)}
    del oracle, whole
    for name, backward in (("forward", False), ("forward + backward", True)):
        base = problem.describe() | {"kind": "ring", "pass": name, "ranks": RANKS, "layout": "zigzag"}
        if wrong:
            yield base | {"versions": wrong}
            continue
        calls: dict[str, Callable[[int], object]] = {
            "ring": functools.partial(together, backward=backward),
            "one device": functools.partial(alone, backward=backward),
        }
        times = bench.watch.in_turns(calls, len(sets), 3 * bench.haste)
        spread = {name: quantiles(t) for name, t in times.items()}
        yield base | {"ms": spread, "slowdown": spread["ring"]["p50"] / spread["one device"]["p50"]}


def _shard(s: rf.Sharding, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    *leaves, dout = (s.shard(x.detach(), dim=1) for x in inputs)
    return (*(x.requires_grad_() for x in leaves), dout)


def _run(attention: Attention, inputs: tuple[Tensor, ...], backward: bool) -> list[Tensor]:
    *leaves, dout = inputs
    out = attention(*leaves)
    return [out.detach(), *(torch.autograd.grad(out, leaves, dout) if backward else ())]


def host(bench: Bench, calls: int) -> Iterator[Record]:
    """The host's microseconds per call on 1K tokens of few heads, where a GPU has almost nothing to do."""
    problem = Problem(128, "causal", rf.causal, 1024 if bench.cuda else 8, 1, 4, 4)
    inputs = bench.inputs(problem, 0)
    for name, backward in (("forward", False), ("forward + backward", True)):
        microseconds: Record = {}
        for version in (OURS, "flash", "cudnn"):
            try:
                with explained():
                    attention = bench.attention(version, problem)
                    _run(attention, inputs, backward)
            except Exception as error:
                microseconds[version] = {"missing": reason(error)}
                continue
            took = []
            for _ in range(calls):
                began = time.perf_counter()
                _run(attention, inputs, backward)
                took.append(1e6 * (time.perf_counter() - began))
                if bench.cuda and len(took) % 20 == 0:
                    torch.cuda.synchronize(bench.device)  # a full queue would make the host wait
            microseconds[version] = quantiles(took)
        yield problem.describe() | {"kind": "host", "pass": name, "calls": calls, "us": microseconds}
