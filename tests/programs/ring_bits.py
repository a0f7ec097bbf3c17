"""Run by test_gloo.py under torchrun: a ring over real processes must give the bits of the in-process world.

Every rank plays both, and prints one line; the ring also runs on a strided subgroup and on two rings in turn.
"""

from __future__ import annotations

import math
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import ringflash as rf

LENGTH = 37
MASKS = (rf.full, rf.causal, rf.window(5, 3), rf.causal & rf.documents([[0, 5, 17, LENGTH], [0, 30, 30, LENGTH]]))


def everything(group: object, dtype: torch.dtype) -> list[Tensor]:
    """Out, lse and gradients of this rank, for every mask and layout, and with keys of another length."""
    make = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    problems = [(mask, layout, LENGTH, 0) for mask in MASKS for layout in ("contiguous", "zigzag", "striped")]
    problems += [(rf.causal, "zigzag", 23, -14), (rf.full, "striped", 2, 0)]
    for mask, layout, keys, q_offset in problems:
        shapes = [(2, LENGTH, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8), (2, LENGTH, 4, 8)]
        whole = [torch.randn(shape, generator=make).to(dtype) for shape in shapes]
        s = rf.Sharding(LENGTH, group, mask, layout, keys=keys, q_offset=q_offset)
        sides = (s, s.key_sharding, s.key_sharding, s)
        q, k, v, dout = (side.shard(x, 1) for side, x in zip(sides, whole, strict=True))
        for x in (q, k, v):
            x.requires_grad_()
        out, lse = rf.ring_attention(q, k, v, s, return_lse=True)
        seen = lse[lse != -math.inf]
        ((out * dout).sum() + seen.sum()).backward()
        found += [x for x in (out.detach(), lse.detach(), q.grad, k.grad, v.grad) if x is not None]
        found.append(s.unshard(out.detach(), 1))
    return found


def topologies(group: object, dtype: torch.dtype, axes: object = None) -> list[Tensor]:
    """Out, lse and gradients of this rank on every route, and with heads split over neighbours (``axes``: of a mesh)."""
    ranks = rf.Sharding(LENGTH, group, rf.full, "contiguous", heads_axis=axes or 1).ranks
    shapes = [(n, ranks // n) for n in range(1, ranks + 1) if ranks % n == 0]
    doubles = [rf.double_ring(*shape, direction) for shape in shapes for direction in (1, -1)]
    cases = [(route, 1) for route in ("ring_down", "gather", "needed_only", rf.direct(2), *doubles)]
    cases += [("auto", degree) for degree in (2, 4) if ranks % degree == 0]
    if axes:
        cases = [("auto", axes)]
    found: list[Tensor] = []
    layouts = ("contiguous", "zigzag", "striped", "balanced")
    documents = rf.causal & rf.documents([0, 2, 19, 30, LENGTH])
    for number, (route, degree) in enumerate(cases):
        for mask, layout in ((rf.causal, layouts[number % 3]), (documents, layouts[(number + 1) % 4])):
            make = torch.Generator().manual_seed(number)
            heads = (4, 4, 4, 4) if number % 2 else (4, 2, 2, 4)  # queries travel in the backward, or keys do
            s = rf.Sharding(LENGTH, group, mask, layout, route, heads_axis=degree)
            q, k, v, dout = (s.shard(torch.randn(2, LENGTH, n, 8, generator=make).to(dtype), 1) for n in heads)
            for x in (q, k, v):
                x.requires_grad_()
            out, lse = rf.ring_attention(q, k, v, s, return_lse=True)
            ((out * dout).sum() + lse.sum()).backward()
            found += [x for x in (out.detach(), lse.detach(), q.grad, k.grad, v.grad) if x is not None]
            found.append(s.unshard(out.detach(), 1))
    return found


def same_bits(real: list[Tensor], local: list[Tensor]) -> bool:
    return len(real) == len(local) and all(torch.equal(a, b) for a, b in zip(real, local, strict=True))


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.new_group([0])  # processes then differ in how many groups they have, by which torch names new ones
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        local = rf.local_world(ranks).run(everything, dtype)[rank]
        assert same_bits(everything(None, dtype), local), f"rank {rank} of {ranks}, {dtype}"
        local = rf.local_world(ranks).run(topologies, dtype)[rank]
        assert same_bits(topologies(None, dtype), local), f"topologies: rank {rank} of {ranks}, {dtype}"
    if ranks == 4:  # rings of two, whose shards two neighbours share
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "heads"))
        local_grid = rf.local_world(4).run(topologies, torch.float32, 2)
        assert same_bits(topologies(mesh, torch.float32, "heads"), local_grid[rank]), f"rank {rank}, mesh of heads"
    if ranks == 4:  # data x context: every rank is in a ring of two neighbours, and in one of every other rank
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
        local_pair = rf.local_world(2).run(everything, torch.float32)
        for axis in ("context", "data", "context"):
            real = everything(mesh[axis], torch.float32)
            assert same_bits(real, local_pair[mesh[axis].get_local_rank()]), f"rank {rank}, axis {axis}"
    print(f"rank {rank} of {ranks}: same bits", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
