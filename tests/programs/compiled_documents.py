"""Run by test_checkpointing.py under torchrun on 2 ranks: compiled models, checkpoints and tiles, with FSDP2 and without.

Twenty batches with other documents each are one graph, with every forward hop made once; gradients are one process's. The
argument is the name of a policy: keep_attention, or none for a model without checkpoints.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import ringflash as rf
from ringflash.checkpointing import keep_attention, keep_attention_on_cpu
from ringflash.tiling import Tiled, tiled_cross_entropy

LENGTH = 48
Policy = Callable[[], Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = rf.RingAttention(16, heads=4, kv_heads=2)
        self.mlp = nn.Linear(16, 16)

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), position_ids)
        return x + self.mlp(x).sin()


class Model(nn.Module):
    def __init__(self, policy: Policy | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.policy = policy
        self.embed = nn.Embedding(19, 16)
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(16, 19)
        self.double()

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            if self.policy is None:
                x = block(x, position_ids)
            else:
                x = checkpoint(block, x, position_ids, use_reentrant=False, context_fn=self.policy)
        return self.head(x)


def packing(number: int) -> rf.Mask:
    """Every batch has other documents, and another number of them."""
    return rf.causal & rf.documents([*range(0, 2 * number + 1, 3), 2 * number + 2, LENGTH])


def step(wrapped: nn.Module, number: int) -> list[Tensor]:
    ids = torch.randint(0, 19, (2, LENGTH), generator=torch.Generator().manual_seed(number))
    labels = torch.where(ids % 3 == 0, -100, ids)
    wrapped.zero_grad()
    out = wrapped(input_ids=ids, labels=labels, mask=packing(number))
    out.loss.backward()
    grads = [p.grad for p in wrapped.parameters() if p.grad is not None]
    return [out.loss.detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)]


class Messages:
    """Counts what is posted."""

    def __init__(self) -> None:
        self.posted = 0
        post = dist.batch_isend_irecv

        def counted(operations: list[Any]) -> Any:
            self.posted += len(operations)
            return post(operations)

        dist.batch_isend_irecv = counted

    def during(self, run: Callable[[], list[Tensor]]) -> tuple[int, list[Tensor]]:
        before, result = self.posted, run()
        return self.posted - before, result


def agree(name: str, found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), (name, (a - b).abs().max())


def one_graph(policy: Policy | None, messages: Messages, wanted: list[list[Tensor]]) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    plain = rf.SequenceParallel(Model(), layout="zigzag")
    compiled = rf.SequenceParallel(torch.compile(Model(policy), fullgraph=True, backend=graphs), layout="zigzag")
    step(plain, 0)  # connects
    for number, want in enumerate(wanted):
        expected, _ = messages.during(lambda: step(plain, number))  # noqa: B023
        posted, found = messages.during(lambda: step(compiled, number))  # noqa: B023
        agree(f"packing {number}", found, want)
        assert posted == expected, (number, posted, expected)
    assert messages.posted > 0
    assert graphs.frame_count == 1, f"{graphs.frame_count} graphs"
    print("one graph, the messages of a model without checkpoints", flush=True)


def sharded_parameters(messages: Messages, wanted: list[list[Tensor]]) -> None:
    counts = {}
    policies: dict[str, Policy | None] = {"none": None, "here": keep_attention, "cpu": keep_attention_on_cpu}
    for name, compiled in (("none", False), ("here", False), ("cpu", False), ("here", True)):
        torch._dynamo.reset()
        model, policy = Model(), policies[name]
        for i, block in enumerate(model.blocks):
            if policy is not None:
                model.blocks[i] = block = checkpoint_wrapper(block, context_fn=policy)
            if compiled:
                block.compile(fullgraph=True, backend="aot_eager")
            fully_shard(block)
        fully_shard(model)
        wrapped = rf.SequenceParallel(model, gradients="engine", layout="zigzag")
        counts[name, compiled], found = messages.during(lambda: step(wrapped, 3))  # noqa: B023
        agree(f"FSDP2 {name}", found, wanted[3])
    assert len(set(counts.values())) == 1, counts
    print("FSDP2: equal to one process, the same messages with checkpoints and without", flush=True)


def sharded_tiles() -> None:
    """Ranks with fewer tokens, or none, call what gathers parameters as often as the others."""
    for length, whole in ((11, False), (1, False), (11, True)):
        hidden = torch.randn(2, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        labels = torch.arange(2 * length).view(2, length) % 19
        results = []
        for s in (rf.Sharding(length, (0, 1)), rf.Sharding(length, layout="contiguous")):
            torch.manual_seed(0)
            mlp = Tiled(nn.Linear(16, 16) if whole else nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)), tile=5)
            head = nn.Linear(16, 19)
            mlp.double(), head.double()
            mlp.sharding = s
            if s.ranks > 1:
                for module in (mlp, head) if whole else (*mlp.children(), head):
                    fully_shard(module)
            x = s.shard(hidden, dim=1).requires_grad_()
            calls = -(-len(x) * s.most_tokens // 5)
            tiled_cross_entropy(head, mlp(x), s.shard(labels, dim=1), tile=5, calls=calls).backward()
            grads = [p.grad for module in (mlp, head) for p in module.parameters()]
            if s.ranks > 1:  # FSDP has averaged
                grads = [g.full_tensor() * s.ranks for g in grads]
            results.append([s.unshard(x.grad, dim=1), *grads])
        agree(f"tiles of {length} tokens", results[1], results[0])
    print("uneven tiles: equal to one process, with FSDP2 around them and inside", flush=True)


def main() -> None:
    dist.init_process_group("gloo")
    alone = rf.SequenceParallel(Model(), (0, 1))
    wanted = [step(alone, number) for number in range(20)]
    messages = Messages()
    policies: dict[str, Policy | None] = {"none": None, "keep_attention": keep_attention}
    one_graph(policies[sys.argv[1]], messages, wanted)
    sharded_parameters(messages, wanted)
    sharded_tiles()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
