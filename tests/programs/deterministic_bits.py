"""Run by test_deterministic.py, also under torchrun: the bits of rings and of a model, with hops that come when they like.

    deterministic_bits.py SEED      every hop is held up for a time drawn by SEED; prints one digest per rank of all answers

Digests of two launches with other delays (and another hash seed of Python) and of the in-process world must be equal: an order
that depends on who comes first, or on the order of a set, would show in them.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from model_gradients import Model, batch
from torch import Tensor

import ringflash as rf
from ringflash.mask import Mask
from ringflash.route import Route

LENGTH = 37
PACKED = rf.causal & rf.documents([0, 2, 19, 30, LENGTH])
KEYS, QUERIES = (4, 2), (4, 4)  # query and key heads with which the backward moves keys, or queries


@dataclass(frozen=True)
class Case:
    """A ring that is not like the others."""

    name: str
    mask: Mask = rf.causal
    layout: str = "zigzag"
    route: str | Route = "ring"
    heads: tuple[int, int] = KEYS
    ulysses: int = 1
    backend: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)


def cases(ranks: int) -> list[Case]:
    """Every route, layout, travelling side, backend and option, for an even number of ranks or an odd one."""
    routes: list[str | Route] = ["ring", "ring_down", "gather", "needed_only", rf.direct(2), rf.double_ring(ranks, 1)]
    if ranks % 2 == 0:
        routes += [rf.double_ring(2, ranks // 2), rf.double_ring(2, ranks // 2, -1)]
    layouts = ("zigzag", "contiguous", "striped", "balanced")
    found = [
        Case(
            f"{route}, {layouts[i % 4]}", (rf.causal, PACKED)[i % 4 == 3], layouts[i % 4], route, (KEYS, QUERIES)[i % 2]
        )
        for i, route in enumerate(routes)
    ]
    found += [Case(f"queries travel, {route}", rf.full, "striped", route, QUERIES) for route in ("ring", "needed_only")]
    found += [
        Case(f"backend {name}", backend=name, heads=heads)
        for name in ("aten", "reference")
        for heads in (KEYS, QUERIES)
    ]
    found += [Case("ulysses", PACKED, "balanced", ulysses=ranks, heads=(2 * ranks, 1))]
    found += [Case("ulysses and a ring", ulysses=2, heads=(4, 2))] if ranks % 2 == 0 else []
    return [
        *found,
        Case("options", rf.window(5, 0), options={"dropout_p": 0.3, "seed": 7, "softcap": 5.0, "sinks": True}),
    ]


def answers(group: Any, case: Case, dtype: torch.dtype = torch.float32, **more: Any) -> list[Tensor]:
    """Out, lse and all gradients of this rank, in deterministic mode."""
    make = torch.Generator().manual_seed(len(case.name))
    s = rf.Sharding(LENGTH, group, case.mask, case.layout, case.route, heads_axis=case.ulysses, **more)
    (heads, kv_heads), options = case.heads, dict(case.options)
    sizes = (heads, kv_heads, kv_heads, heads)
    q, k, v, dout = (s.shard(torch.randn(2, LENGTH, n, 8, generator=make).to(dtype), 1) for n in sizes)
    leaves = [q, k, v]
    if options.get("sinks"):
        options["sinks"] = torch.randn(heads, generator=make)
        leaves.append(options["sinks"])
    for x in leaves:
        x.requires_grad_()
    how = dict(return_lse=True, backend=case.backend, deterministic=True)
    out, lse = rf.ring_attention(q, k, v, s, **how, **options)
    ((out * dout).sum() + lse[lse.isfinite()].sum()).backward()
    return [out.detach(), lse.detach(), *(x.grad for x in leaves if x.grad is not None)]


def everything(group: Any) -> list[Tensor]:
    """All answers of this rank to all cases."""
    ranks = group.ranks if group else dist.get_world_size()
    dtypes = (torch.float32, torch.bfloat16)
    return [x for case in cases(ranks) for dtype in dtypes for x in answers(group, case, dtype)]


def model_step(group: Any) -> list[Tensor]:
    """Loss and summed gradients of a model whose sequences are spread over the group."""
    model, (ids, labels) = Model(), batch()
    loss = rf.SequenceParallel(model, group)(input_ids=ids, labels=labels).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def digest(tensors: Iterable[Tensor]) -> str:
    """One number for all bits."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(f"{x.dtype} {list(x.shape)}".encode() + x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """The same bits, also of zeros and NaN."""
    return digest(a) == digest(b)


def hold_up(seed: int) -> None:
    """From now on every batch of messages of this process is late by up to 4 ms."""
    draw, post = random.Random(seed), dist.batch_isend_irecv

    def late(batch: Any) -> Any:
        time.sleep(draw.random() * draw.choice((0, 0.004)))
        return post(batch)

    dist.batch_isend_irecv = late


def in_any_order(fn: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """``fn`` for ``rf.local_world``: before each batch and each wait, a rank may let others go first, as ``seed`` draws."""

    def one_rank(group: Any, *args: Any) -> Any:
        draw, exchange = random.Random(1000 * seed + group.rank), group.wire.exchange

        def let_others_go() -> None:
            for _ in range(draw.randrange(3)):
                looks = iter((False, True))
                group.wire._state.wait_until(group.rank, lambda looks=looks: next(looks, True), "nothing")

        def late(*message: Any, **about: Any) -> Any:
            let_others_go()
            pending = exchange(*message, **about)
            arrive = pending.wait
            pending.wait = lambda: (let_others_go(), arrive())
            return pending

        group.wire.exchange = late
        return fn(group, *args)

    return one_rank


def main(seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    hold_up(1000 * seed + rank)
    step = model_step(None)
    hashes = os.environ.get("PYTHONHASHSEED")
    print(
        f"rank {rank} of {ranks}: attention {digest(everything(None))} model {digest(step)} (hash seed {hashes})",
        flush=True,
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
