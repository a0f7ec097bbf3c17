"""What a plain ring does in the same faults: ``batch_isend_irecv`` in a loop, as most libraries have it.

Run by hand; it prints the rows of the table in ``docs/trust.md``: who ended how, after how many seconds, with what numbers.

    PYTHONPATH=.:kernels:tests python -m faults.plain
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from faults.harness import Rank, suffer

TOKENS, HEADS, DIM = 6, 4, 8  # of one rank


def attention(rank: Rank, kv: Tensor, meddle: Callable[[int, Tensor], Tensor | None] = lambda hop, kv: kv) -> Tensor:
    """Full attention of this rank's queries, as a ring; what ``meddle`` returns is sent in its hop, None is not."""
    draw = torch.Generator().manual_seed(rank.rank)
    q = torch.randn(1, TOKENS, HEADS, DIM, generator=draw).to(kv.dtype)
    scores, values = [], []
    there, here = (rank.rank + 1) % rank.ranks, (rank.rank - 1) % rank.ranks
    for hop in range(rank.ranks):
        k, v = kv
        scores.append(torch.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5)
        values.append(v)
        if hop == rank.ranks - 1:
            break
        leaves, comes = meddle(hop, kv), torch.empty_like(kv)
        moves = [] if leaves is None else [dist.P2POp(dist.isend, leaves.contiguous(), there)]
        for work in dist.batch_isend_irecv([*moves, dist.P2POp(dist.irecv, comes, here)]):
            work.wait()
        kv = comes
    return torch.einsum("bhqk,bkhd->bqhd", torch.cat(scores, -1).softmax(-1), torch.cat(values, 1))


def life(rank: Rank, fault: str) -> float:
    """The largest error of this rank's out; rank 1 comes to grief."""
    draw = torch.Generator().manual_seed(7)
    kv = torch.randn(rank.ranks, 2, 1, TOKENS, HEADS, DIM, generator=draw)
    right = attention(rank, kv[rank.rank])
    rank.now()
    mine, odd = kv[rank.rank], rank.rank == 1
    meddle: Callable[[int, Tensor], Tensor | None] = lambda hop, kv: kv  # noqa: E731
    if odd and fault == "killed":
        rank.kill()
    elif odd and fault == "stopped":
        rank.kill(signal.SIGSTOP)
    elif odd and fault == "exits early":
        os._exit(0)
    elif odd and fault == "raises":
        raise ValueError("a batch that cannot be read")
    elif odd and fault == "skips a call":
        time.sleep(90)
    elif odd and fault == "bfloat16":
        mine = mine.bfloat16()
    elif odd and fault == "a shorter message":
        meddle = lambda hop, kv: kv.flatten()[:-8]  # noqa: E731
    elif odd and fault == "other heads":
        mine = mine.transpose(3, 4).reshape(mine.shape)
    elif odd and fault == "a flipped bit":
        meddle = lambda hop, kv: flipped(kv) if hop == 1 else kv  # noqa: E731
    elif odd and fault == "a dropped hop":
        meddle = lambda hop, kv: None if hop == 1 else kv  # noqa: E731
    elif odd and fault == "not finite":
        mine = mine.clone()
        mine[1, 0, 2, 1, 5] = torch.nan

    return float((attention(rank, mine, meddle).float() - right).abs().max())


def flipped(x: Tensor) -> Tensor:
    changed = x.clone()
    changed.view(torch.uint8).flatten()[-101] ^= 64
    return changed


FAULTS = [
    "killed",
    "stopped",
    "exits early",
    "raises",
    "skips a call",
    "bfloat16",
    "a shorter message",
    "a flipped bit",
]
FAULTS += ["other heads", "a dropped hop", "not finite"]


class Plain:
    """A program for the harness: it has to be sent to another process."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __call__(self, rank: Rank) -> Any:
        return life(rank, self.fault)


def main() -> None:
    for fault in sys.argv[1:] or FAULTS:
        print(f"{fault}", flush=True)
        for number, ending in enumerate(suffer(4, Plain(fault), seconds=70)):
            what = ending.error or ("error of out" if ending.value is not None else "ended without a word")
            text = f"{ending.value:.2g}" if isinstance(ending.value, float) else ending.text.partition("\n")[0][:160]
            print(f"    rank {number}: status {ending.status}, {ending.seconds:.1f} s, {what} {text}", flush=True)


if __name__ == "__main__":
    main()
