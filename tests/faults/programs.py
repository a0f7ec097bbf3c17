"""What ranks do while something goes wrong; each is one rank's life, and rank 1 is the culprit wherever there is one."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import ringflash as rf
from faults import wires
from faults.harness import Rank

LENGTH = 24
HOPS = 3  # of a forward on four ranks
HOST = socket.gethostname()


def call(
    group: Any = None,
    *,
    length: int = LENGTH,
    mask: rf.Mask = rf.full,
    layout: str = "contiguous",
    heads: int = 4,
    dtype: torch.dtype = torch.float32,
    back: bool = True,
    check: str | None = None,
    heads_axis: Any = None,
    **options: Any,
) -> str:
    """One attention of the same numbers on however many ranks; the digest of this rank's bits."""
    s = rf.Sharding(length, group, mask, layout, "ring", check=check, heads_axis=heads_axis)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (s.shard(torch.randn(1, length, n, 8, generator=draw).to(dtype), 1) for n in (heads, 1, 1))
    for x in (q, k, v):
        x.requires_grad_(back)
    out = rf.ring_attention(q, k, v, s, **options)
    found: list[Tensor | None] = [out.detach()]
    if back:
        out.square().sum().backward()
        found += [q.grad, k.grad, v.grad]
    bits = (x.contiguous().view(torch.uint8).numpy().tobytes() for x in found if x is not None)
    return hashlib.blake2b(b"".join(bits), digest_size=8).hexdigest()


def fault_after(me: Rank, hop: int, what: Any) -> None:
    """Rank 1 does something in one of its next hops."""

    def fault(number: int, sends: list[Any]) -> list[Any]:
        if number == hop:
            what()
        return sends

    if me.rank == 1:
        wires.put_in(fault)


def killed_in_forward(me: Rank) -> str:
    call()
    me.now()
    fault_after(me, 1, me.kill)
    return call()


def killed_in_backward(me: Rank) -> str:
    call()
    me.now()
    fault_after(me, HOPS + 1, me.kill)
    return call()


def stopped(me: Rank) -> str:
    call()
    me.now()
    fault_after(me, 1, lambda: me.kill(signal.SIGSTOP))
    return call()


def exits_early(me: Rank) -> str:
    call()
    me.now()
    if me.rank == 1:
        os._exit(0)
    return call()


def raises(me: Rank) -> str:
    call()
    me.now()
    if me.rank == 1:
        raise ValueError("a batch that cannot be read")
    return call()


def skips_a_call_that_is_known(me: Rank) -> str:
    call()
    me.now()
    if me.rank == 1:
        time.sleep(60)
    return call()


def skips_a_call_that_is_new(me: Rank) -> str:
    call()
    me.now()
    if me.rank == 1:
        time.sleep(60)
    return call(dtype=torch.float64)


def is_slow(me: Rank) -> list[str]:
    found = [call()]
    for _ in range(2):
        if me.rank == 1:
            time.sleep(1.0)
        found.append(call())
    return found


def changes_while_others_go_on(me: Rank) -> str:
    call()
    me.now()
    return call(dtype=torch.float64 if me.rank == 1 else torch.float32)


def differs(me: Rank, **options: Any) -> list[str]:
    """Rank 1 makes its first call with these options; and what is right works afterwards."""
    said = []
    try:
        call(**(options if me.rank == 1 else {}))
    except rf.DisagreementError as error:
        said.append(str(error))
    return [*said, call()]


def another_dtype(me: Rank) -> list[str]:
    return differs(me, dtype=torch.bfloat16)


def another_length(me: Rank) -> list[str]:
    return differs(me, length=LENGTH + 4)


def another_layout(me: Rank) -> list[str]:
    return differs(me, layout="zigzag")


def another_mask(me: Rank) -> list[str]:
    return differs(me, mask=rf.causal)


def another_scale(me: Rank) -> list[str]:
    return differs(me, scale=1.0)


def another_number_of_heads(me: Rank) -> list[str]:
    return differs(me, heads=8)


def another_check(me: Rank) -> list[str]:
    return differs(me, check="always")


def another_seed(me: Rank) -> list[str]:
    try:
        call(dropout_p=0.5, seed=4 if me.rank == 1 else 3)
    except rf.DisagreementError as error:
        return [str(error)]
    return []


def checks_nothing(me: Rank) -> str:
    """Rank 1 alone has RINGFLASH_CHECK=off."""
    if me.rank == 1:
        os.environ["RINGFLASH_CHECK"] = "off"
    me.now()
    return call()


def another_order(me: Rank) -> str:
    """Two calls that all know, of one size; rank 1 makes them in another order."""
    calls = [lambda: call(back=False), lambda: call(back=False, mask=rf.causal)]
    for make in calls:
        make()
    me.now()
    return "".join(sorted(make() for make in (calls[::-1] if me.rank == 1 else calls)))


def flips_a_bit(me: Rank) -> str:
    call()
    me.now()
    if me.rank == 1:
        wires.put_in(wires.flipped(1, byte=-100))
    return call()


def drops_a_hop(me: Rank) -> str:
    call()
    me.now()
    if me.rank == 1:
        wires.put_in(wires.dropped(1))
    return call(back=False)


def swaps_hops(me: Rank) -> str:
    call()
    me.now()
    if me.rank == 1:
        wires.put_in(wires.swapped(0))
    return call(back=False)


def two_rings(me: Rank) -> list[str]:
    """The whole world, and every other rank of it, in turns."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = pairs[me.rank % 2]
    return [call(), call(mine), call(), call(mine)]


def odd_ranks(me: Rank) -> str:
    """A group of ranks 1 and 3 alone."""
    group = dist.new_group([1, 3])
    return call(group) if me.rank % 2 else ""


def odd_ranks_die(me: Rank) -> str:
    group = dist.new_group([1, 3])
    if me.rank % 2 == 0:
        return ""
    call(group)
    me.now()
    if me.rank == 3:
        me.kill()
    return call(group)


def believes_in_another_world(me: Rank) -> str:
    """Rank 1 was told of one rank more than there are."""
    me.now()
    if me.rank == 1:
        return call((1, me.ranks + 1))
    return call()


def rank_0_dies(me: Rank) -> str:
    call()
    me.now()
    if me.rank == 0:
        me.kill()
    return call()


def differs_in_a_grid(me: Rank) -> list[str]:
    mesh = init_device_mesh("cpu", (2, me.ranks // 2), mesh_dim_names=("ring", "heads"))
    said = []
    me.now()
    try:
        call(mesh, heads_axis="heads", scale=0.5 if me.rank == 1 else 1.0)
    except rf.DisagreementError as error:
        said.append(str(error))
    return [*said, call(mesh, heads_axis="heads")]


def not_finite(me: Rank) -> str:
    """One NaN among the values of rank 1."""
    s = rf.Sharding(LENGTH, None, rf.causal)
    q, k, v = (torch.ones(1, s.local_length, 2, 8) for _ in range(3))
    me.now()
    if me.rank == 1:
        v[0, 2, 1, 5] = torch.nan
    out = rf.ring_attention(q, k, v, s)
    return "nan" if out.isnan().any() else "finite"


class Model(torch.nn.Module):
    """Embeds bytes, attends and predicts the next one; raises for a label that is none."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16)
        self.heads = heads
        self.sharding: rf.Sharding | None = None

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        q = x.unflatten(-1, (self.heads, -1))
        assert self.sharding is not None
        return self.head(rf.ring_attention(q, q, q, self.sharding).flatten(2))


def wrapped(me: Rank, heads: int = 2, label: int = 3) -> float:
    model = rf.SequenceParallel(Model(heads))
    ids = torch.arange(LENGTH)[None] % 16
    labels = torch.full_like(ids, label)
    return float(model(input_ids=ids, labels=labels).loss)


def a_label_outside_the_vocabulary(me: Rank) -> float:
    wrapped(me)
    me.now()
    return wrapped(me, label=99 if me.rank == 1 else 3) + wrapped(me)


def another_model(me: Rank) -> float:
    me.now()
    return wrapped(me, heads=4 if me.rank == 1 else 2)
