"""Run by test_gloo.py under torchrun on 2 x 2 ranks: loss and raw gradients of a wrapped model equal one
process's, with the loss from logits and from hidden states."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ringflash as rf


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(19, 16)
        self.first = rf.RingAttention(16, heads=4, kv_heads=2)
        self.second = rf.RingAttention(16, heads=4, kv_heads=1, mask=rf.window(6, 0))
        self.head = nn.Linear(16, 19)
        self.double()

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.first(x, position_ids)
        return self.head(x + self.second(x, position_ids))


def batch() -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 19, (4, 41), generator=make)
    labels = ids.clone()
    labels[0], labels[1, :30], labels[3, 7:] = -100, -100, -100  # uneven: some shards have no target at all
    return ids, labels


def one_process() -> tuple[Tensor, list[Tensor]]:
    model = Model()
    ids, labels = batch()
    out = rf.SequenceParallel(model, (0, 1))(input_ids=ids, labels=labels)
    out.loss.backward()
    return out.loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def sharded(engine: str, mesh: DeviceMesh, **tiles: Any) -> tuple[Tensor, list[Tensor]]:
    ids, labels = batch()
    if engine == "reduce":  # all four ranks in one ring
        model = Model()
        wrapped: nn.Module = rf.SequenceParallel(model, None, **tiles)
    else:
        everyone = mesh._flatten("everyone")
        mine = mesh["data"].get_local_rank()
        ids, labels = ids[2 * mine : 2 * mine + 2], labels[2 * mine : 2 * mine + 2]
        model = Model()
        if engine == "fsdp":
            fully_shard(model, mesh=everyone)
        wrapped = rf.SequenceParallel(model, mesh["context"], gradients="engine", tokens_group=everyone, **tiles)
        if engine == "ddp":
            wrapped = DistributedDataParallel(wrapped, process_group=everyone.get_group())
    out = wrapped(input_ids=ids, labels=labels)
    out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return out.loss.detach(), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    loss, grads = one_process()
    for engine in ("reduce", "ddp", "fsdp"):
        for tiles in ({}, {"loss_tile": 16, "head": "head"}):
            got, mine = sharded(engine, mesh, **tiles)
            assert torch.allclose(got, loss, rtol=1e-10, atol=0), (engine, tiles, got, loss)
            assert len(mine) == len(grads)
            for a, b in zip(mine, grads, strict=True):
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), (engine, tiles, (a - b).abs().max())
        print(f"{engine}: equal to one process", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
