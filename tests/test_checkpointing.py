"""Checkpointing: the ring runs forward once, whatever keeps what it returned, and gradients have the same bits."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import torchrun
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

import ringflash as rf
from ringflash import checkpointing
from ringflash.checkpointing import ATTENTION, keep_attention, keep_attention_on_cpu
from ringflash.local import LocalWire

PROGRAM = Path(__file__).parent / "programs" / "compiled_documents.py"
POLICIES = [keep_attention, keep_attention_on_cpu]
Policy = Callable[[], Any]


class Block(nn.Module):
    """As many attentions as asked for, between things that are recomputed."""

    def __init__(self, attentions: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attentions = nn.ModuleList(rf.RingAttention(16, heads=4, kv_heads=2) for _ in range(attentions))
        self.mlp = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for attention in self.attentions:
            x = x + attention(self.norm(x))
        return x + self.mlp(self.norm(x)).sin()


class Model(nn.Module):
    """Checkpointed regions with so many attentions each: one, two, none. Policy None: no checkpoints."""

    def __init__(self, policy: Policy | None, attentions: tuple[int, ...] = (1, 2, 0)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.policy = policy
        self.embed = nn.Embedding(19, 16)
        self.blocks = nn.ModuleList(map(Block, attentions))
        self.head = nn.Linear(16, 19)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x) if self.policy is None else checkpoint(block, x, use_reentrant=False, context_fn=self.policy)
        return self.head(x)


ATTENTIONS = 3


@pytest.fixture
def attends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one per ring, forward or backward."""
    calls: list[int] = []
    circulate = checkpointing.ringflash.operator.circulate

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return circulate(*args, **kwargs)

    monkeypatch.setattr("ringflash.operator.circulate", counted)
    return calls


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one per message that a rank posts."""
    posted: list[int] = []
    exchange = LocalWire.exchange

    def counted(self: LocalWire, sends: Any, receives: Any, *more: Any) -> Any:
        posted.extend(1 for _ in sends)
        return exchange(self, sends, receives, *more)

    monkeypatch.setattr(LocalWire, "exchange", counted)
    return posted


@pytest.fixture
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 19, (2, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def in_a_ring(policy: Policy | None, lengths: tuple[int, ...] = (21,)) -> list[Tensor]:
    """Gradients of rank 0 of 2 after a forward for every length, and then all backwards in the same order."""

    def one_rank(group: Any) -> list[Tensor]:
        model = Model(policy)
        wrapped = rf.SequenceParallel(model, group, layout="zigzag")
        losses = [wrapped(input_ids=tokens(n), labels=tokens(n, seed=1)).loss for n in lengths]
        for loss in losses:
            loss.backward()
        return gradients(model)

    return rf.local_world(ranks=2).run(one_rank)[0]


def alone(model: nn.Module, **backward: Any) -> list[Tensor]:
    """Gradients on one device."""
    model.zero_grad()
    out = model(tokens(12))
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    loss.backward(**backward)
    return gradients(model)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_ring_runs_forward_once(policy: Policy, messages: list[int], attends: list[int]) -> None:
    """Checkpointing alone makes every forward hop a second time; with a policy the hops are those without checkpoints."""
    counts, grads = [], []
    for each in (None, noop_context_fn, policy):
        messages.clear()
        attends.clear()
        grads.append(in_a_ring(each))
        counts.append((len(attends), len(messages)))
    (rings, hops), (rings_twice, hops_twice), kept = counts
    assert rings == 2 * 2 * ATTENTIONS  # 2 ranks, forward and backward
    assert rings_twice == rings + 2 * ATTENTIONS
    assert hops_twice > hops
    assert kept == (rings, hops)
    assert same(grads[1], grads[0]) and same(grads[2], grads[0])


@pytest.mark.parametrize("policy", POLICIES)
def test_two_batches_may_be_under_way(policy: Policy) -> None:
    """What is kept belongs to its forward, and so does the sharding: another forward in between changes neither."""
    assert same(in_a_ring(policy, (21, 8)), in_a_ring(None, (21, 8)))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_graph_may_be_walked_twice(policy: Policy) -> None:
    """Several losses over one forward are common; the second walk recomputes again, from the same attention."""
    model = Model(policy)
    out = model(tokens(12))
    once, twice = (
        torch.autograd.grad(out.sin().sum(), model.parameters(), retain_graph=keep) for keep in (True, False)
    )
    assert same(list(twice), list(once))


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_kept_after_backward(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cycle between the graph and what it keeps would hold all layers until the garbage collector comes by."""
    held: list[weakref.ref[Any]] = []
    for kind in (checkpointing._Here, checkpointing._OnCPU):
        make = kind.__init__

        def watched(self: Any, x: Tensor, make: Any = make) -> None:
            make(self, x)
            held.append(weakref.ref(self))

        monkeypatch.setattr(kind, "__init__", watched)
    model = Model(policy)
    gc.disable()
    try:
        out = model(tokens(12))
        assert sum(ref() is not None for ref in held) == 2 * ATTENTIONS  # out and lse
        out.sum().backward()
        assert not any(ref() for ref in held)
        out = model(tokens(12))
        del out  # never walked
        assert not any(ref() for ref in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("policy", POLICIES)
def test_nested_checkpoints(policy: Policy, attends: list[int]) -> None:
    """A region inside a region is recomputed as part of that, and again; attention is not."""

    def nested(policy: Policy | None) -> Model:
        model = Model(policy)
        inner = model.blocks[1]
        model.blocks[1] = Checkpointed(inner, policy or noop_context_fn)
        return model

    wanted = alone(Model(None))
    attends.clear()
    assert same(alone(nested(policy)), wanted)
    assert len(attends) == 2 * ATTENTIONS


class Checkpointed(nn.Module):
    def __init__(self, module: nn.Module, policy: Policy) -> None:
        super().__init__()
        self.module, self.policy = module, policy

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=False, context_fn=self.policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("early", [True, False])
def test_recomputation_may_stop_early_or_not(policy: Policy, early: bool) -> None:
    """torch stops recomputing when it has what it needs; nothing depends on that."""
    wanted = alone(Model(None))
    with torch.utils.checkpoint.set_checkpoint_early_stop(early):
        assert same(alone(Model(policy)), wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_attention_returned_may_be_written_to(policy: Policy) -> None:
    """A model that scales out in place must not change what is kept of it."""

    def attention(x: Tensor, in_place: bool) -> Tensor:
        q = (x * 1.5)[:, :, None]
        out = rf.flash_attention(q, q, q).sigmoid()
        again = rf.flash_attention(q.detach(), q.detach(), out)
        return (again.mul_(3) if in_place else again * 3).sin()

    def gradient(**how: Any) -> Tensor:
        x = torch.linspace(-1, 1, 40).view(1, 5, 8).requires_grad_()
        out = checkpoint(attention, x, how.pop("in_place"), use_reentrant=False, **how)
        return torch.autograd.grad((out * x.detach()[:, :, None]).sum(), x)[0]

    assert torch.equal(gradient(in_place=True, context_fn=policy), gradient(in_place=False))


def test_autocast_is_that_of_the_forward() -> None:
    """Recomputed projections and kept attention meet in the same dtypes."""
    grads = []
    for policy in (None, *POLICIES):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model = Model(policy)
            out = model(tokens(12))
        out.float().sin().sum().backward()
        grads.append(gradients(model))
    assert all(same(found, grads[0]) for found in grads[1:])


def test_a_policy_of_ones_own_can_keep_more(attends: list[int]) -> None:
    """``ATTENTION`` is a list of operators, as torch's own policies take it."""
    wanted = alone(Model(None))
    attends.clear()
    more = functools.partial(create_selective_checkpoint_contexts, [*ATTENTION, torch.ops.aten.addmm.default])
    assert same(alone(Model(more)), wanted)
    assert len(attends) == 2 * ATTENTIONS


def test_a_region_that_does_something_else_the_second_time_is_named() -> None:
    """Attention that the forward did not call has no result to give back."""
    calls = []

    def moody(x: Tensor) -> Tensor:
        calls.append(1)
        for _ in calls:
            x = rf.flash_attention(x, x, x) * 2
        return x.sin()

    x = torch.ones(1, 5, 2, 8, requires_grad=True)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        out = checkpoint(moody, x, use_reentrant=False, context_fn=keep_attention)
    with pytest.raises(RuntimeError, match="called attention 1 times, and its recomputation calls it once more"):
        out.sum().backward()


@pytest.mark.usefixtures("_forget")
def test_compiled_around_the_checkpoint(attends: list[int]) -> None:
    """One graph; attention is kept in it. A graph cannot keep things on the CPU, and says so."""
    wanted = alone(Model(None, (1,)))
    attends.clear()
    compile_it = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    assert same(alone(compile_it(Model(keep_attention, (1,)))), wanted)
    assert len(attends) == 2
    with pytest.raises(Exception, match=r"keep_attention_on_cpu: torch\.compile is capturing this checkpoint"):
        alone(compile_it(Model(keep_attention_on_cpu, (1,))))


@pytest.mark.usefixtures("_forget")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo's own doing
@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_inside_of_the_checkpoint(policy: Policy, attends: list[int]) -> None:
    """A compiled block stays compiled, and its attention is seen."""
    graphs = CompileCounterWithBackend("aot_eager")
    wanted = alone(Model(None, (1,)))
    model = Model(policy, (1,))
    for block in model.blocks:
        block.compile(fullgraph=True, backend=graphs)
    for _ in range(2):
        attends.clear()
        assert same(alone(model), wanted)
        assert len(attends) == 2
    assert graphs.frame_count == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_code_may_reuse_the_memory_of_what_is_kept(policy: Policy) -> None:
    """Inductor writes over attention's out once its graph needs it no more, and no version counter tells."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            out = (rf.flash_attention(x, x, x) * 2 + 1).sin()  # without gradient, so out is not saved
            return (out[:, :, 0] * self.weight).cos() * x[:, :, 0]

    x = torch.randn(1, 64, 1, 8, generator=torch.Generator().manual_seed(0))
    wanted, model = Frozen(), Frozen()
    wanted(x).sum().backward()
    model.compile()
    checkpoint(model, x, use_reentrant=False, context_fn=policy).sum().backward()
    torch.testing.assert_close(model.weight.grad, wanted.weight.grad)


@pytest.mark.gpu
def test_copies_to_the_cpu_and_back_are_in_time() -> None:
    """On CUDA they run beside the computation, over memory that is used again: many layers, the same bits every time."""

    class Deep(nn.Module):
        def __init__(self, policy: Policy) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.policy = policy
            self.blocks = nn.ModuleList(Block() for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False, context_fn=self.policy)
            return x

    x = torch.randn(1, 8192, 16, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    grads = []
    for policy in (keep_attention, keep_attention_on_cpu, keep_attention_on_cpu):
        model = Deep(policy).cuda()
        torch.use_deterministic_algorithms(True, warn_only=True)
        model(x).sin().sum().backward()
        torch.use_deterministic_algorithms(False)
        grads.append(gradients(model))
    assert same(grads[1], grads[0]) and same(grads[2], grads[0])


def test_compiled_documents_checkpoints_and_tiles_on_real_processes() -> None:
    """20 packings are one graph and send nothing twice; FSDP2 is right with checkpoints, compiled, and with uneven tiles."""
    output = torchrun(2, PROGRAM, "keep_attention", seconds=300)
    for line in ("one graph, the messages", "FSDP2: equal to one process", "uneven tiles: equal to one process"):
        assert output.count(line) == 2, output[-2000:]


@pytest.mark.slow
def test_compiled_documents_without_checkpoints_on_real_processes() -> None:
    """20 packings of a model without checkpoints are one graph too."""
    assert torchrun(2, PROGRAM, "none", seconds=300).count("one graph, the messages") == 2
