"""Where the processes of an attempt meet: a store in which nothing is left from the attempt before.

torchrun has one store for a launch, also after it has restarted all processes (pytorch/pytorch#135712, #167288). Keys of
processes that have died are still there, among them the addresses at which they listened; whether a restart finds the new
address or the old one is a matter of luck, and with the old one it hangs until it times out. Restarts are counted by each
node for itself, so a count is no name for an attempt. Rank 0 draws one, and gives it to whoever shows a number that cannot
be from earlier:

    rank 1    here/1 = 77fe...                             answer/77fe... -> e0a1...      e0a1.../1 = ""
    rank 0         here/1 -> 77fe...     answer/77fe... = e0a1...                    until e0a1.../1 is there
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PATIENCE = 1800.0  # seconds: nodes may start at very different times


def meet() -> tuple[dist.Store, int]:
    """A store for this attempt alone, and this process's rank; without a launcher a store of its own."""
    if "RANK" not in os.environ:
        return dist.HashStore(), 0
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # rank 0 has it, and it began with rank 0
        return store, rank
    name = agree_on_name(dist.PrefixStore("meeting", store), rank, world)
    return dist.PrefixStore(name, store), rank


def agree_on_name(store: dist.Store, rank: int, world: int, patience: float = PATIENCE) -> str:
    """A name that no earlier attempt had, the same on all ranks. Raises ``RuntimeError`` that names ranks which do not come."""
    number = uuid.uuid4().hex
    if rank == 0:
        _give(store, number, set(range(1, world)), patience)
        return number
    store.set(f"here/{rank}", number)
    try:
        store.wait([f"answer/{number}"], timedelta(seconds=patience))
    except dist.DistStoreError:
        raise RuntimeError(f"rank 0 did not start within {patience:g} s of rank {rank}") from None
    name = store.get(f"answer/{number}").decode()
    store.set(f"{name}/{rank}", "")
    return name


def _give(store: dist.Store, name: str, absent: set[int], patience: float) -> None:
    answered: set[str] = set()
    began = time.monotonic()
    while absent:
        for rank in sorted(absent):
            if store.check([f"here/{rank}"]):
                number = store.get(f"here/{rank}").decode()  # perhaps still that of a process of an earlier attempt
                if number not in answered:
                    answered.add(number)
                    store.set(f"answer/{number}", name)
            if store.check([f"{name}/{rank}"]):
                absent.discard(rank)
        if absent and time.monotonic() - began > patience:
            raise RuntimeError(f"rank(s) {sorted(absent)} did not start within {patience:g} s of rank 0")
        time.sleep(0.01)
