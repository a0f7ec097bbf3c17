"""A real ring of two gloo processes, one core each, beside what the model makes of its visits: is the model right here?

In every round the processes do three things, so that a noisy machine disturbs all of them alike:

    quiet       process 0 plays the schedules of both ranks, one after the other; process 1 waits
    together    each process plays the schedule of its own rank, at the same time, without a message
    real        ``rf.ring_attention`` with its messages, forward and backward

The model joins the visits of the first two with the latency and the bandwidth of gloo, measured before, at the size of a hop.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from links import Played, join, measure_link
from play import ALLOWED, LEAST, MOST, NAMES, PASSES, Heard, Stage, draw_inputs
from stopwatch import Budget
from torch import Tensor

import ringflash as rf
from ringflash.forecast.hardware import Link
from ringflash.groups import connect, resolve
from ringflash.plan import Plan
from ringflash.views.planner import Question

RANKS = 2


def ring(question: Question, minutes: float, folder: Path) -> None:
    """One process of the ring: measure, and leave what was found in ``folder`` for :func:`judge`."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, plans = dist.get_rank(), question.model.plans_of(question.plans)
    inputs = draw_inputs(
        question.length, (question.heads, question.kv_heads), question.head_dim,
        getattr(torch, question.dtype), torch.device("cpu"),
    )  # fmt: skip
    stage = Stage(plans, inputs)
    for name in PASSES:
        stage.play(name)
    stage.compare()
    s = question.sharding
    s = rf.Sharding(question.length, None, question.mask, s.layout, s.route)
    mine = [s.shard(x.detach(), dim=1) for x in inputs]
    _agree(stage, _attend(mine, s), s)
    link = measure_link(connect(resolve(None)), _largest(plans["forward"], question))
    quiet, together, real = Heard(), Heard(), {name: list[float]() for name in PASSES}
    budget = Budget(minutes)
    while _go_on(len(real["forward"]), budget):
        for name in PASSES:
            dist.barrier()
            if rank == 0:
                stage.play(name, quiet)
            dist.barrier()
            stage.play(name, together, ranks=[rank])
        _attend(mine, s, real)
    found: dict[str, Any] = {"link": link, "real": real, "rounds": len(real["forward"])}
    found |= {"together": {name: together.rounds(name) for name in PASSES}}
    found |= {"quiet": {name: quiet.rounds(name) for name in PASSES}}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def judge(question: Question, folder: Path, host: dict[str, float]) -> list[dict[str, Any]]:
    """Measured seconds of the ring beside those of the model, by pass. ``host`` are microseconds per hop."""
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS))
    link = first["link"]
    gloo = Link("gloo", link["bytes_per_second"], 1.0, link["latency"], "measured in this run")
    model = replace(question, hardware=question.machine.with_(within=gloo, between=gloo)).model
    records = []
    for name, plans in model.plans_of(question.plans).items():
        pairs = zip(first["together"][name], second["together"][name], strict=True)
        played = {
            "quiet": [Played(*played) for played in first["quiet"][name]],
            "together": [Played(*(_each_its_own(*side) for side in zip(*pair, strict=True))) for pair in pairs],
        }
        real = np.median(np.max([first["real"][name], second["real"][name]], axis=0))
        modelled = {kind: join(model, name, plans, rounds, host[name] / 1e6) for kind, rounds in played.items()}
        records.append(
            {
                "kind": "ring",
                "pass": name,
                "processes": RANKS,
                "length": question.length,
                "rounds": first["rounds"],
                "link": link,
                "measured_ring_seconds": float(real),
                "model": {kind: vars(m) for kind, m in modelled.items()},
                "measured_over_model": {kind: float(real) / m.seconds for kind, m in modelled.items()},
            }
        )
    return records


def _each_its_own(first: list[Any], second: list[Any]) -> list[Any]:
    """What process 0 found of rank 0, and process 1 of rank 1."""
    return [first[0], second[1]]


def _attend(mine: Sequence[Tensor], s: rf.Sharding, real: dict[str, list[float]] | None = None) -> list[Tensor]:
    """Both passes of the real ring, each from a common start; seconds are added to ``real``."""
    *leaves, dout = (x.detach().requires_grad_() for x in mine)
    dist.barrier()
    began = time.perf_counter()
    out = rf.ring_attention(*leaves, s)
    forward = time.perf_counter() - began
    dist.barrier()
    began = time.perf_counter()
    gradients = torch.autograd.grad(out, leaves, dout)
    if real is not None:
        real["forward"].append(forward)
        real["backward"].append(time.perf_counter() - began)
    return [out.detach(), *gradients]


def _agree(stage: Stage, got: Sequence[Tensor], s: rf.Sharding) -> None:
    """The ring gives what was played, or nothing is timed."""
    at = s.positions
    for name, x in zip(NAMES, got, strict=True):
        want = stage.results[name][:, at].to(x.dtype)
        error = float((x - want).norm() / want.norm().clamp_min(1e-30))
        assert error <= ALLOWED[x.dtype], f"{name} of the ring is off by {error:.1e}"


def _largest(plans: Sequence[Plan], question: Question) -> int:
    """Bytes of the largest message onward."""
    parts = [m.part.tokens for plan in plans for step in plan.steps for batch in step.onward for m in batch.out]
    return max(parts, default=1) * question.model.workload.keys.onward


def _go_on(done: int, budget: Budget) -> bool:
    """Rank 0 decides for both."""
    more = torch.tensor([int(done < LEAST or (budget.left > 0 and done < MOST))])
    dist.broadcast(more, 0)
    return bool(more)
