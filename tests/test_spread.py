"""Around the model: inputs that are cut already, losses that divide by another's count, losses without logits, adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringflash as rf
from ringflash import spread

VOCABULARY, LENGTH = 13, 22
IDS = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))
TARGETS[0], TARGETS[1, :9] = -100, -100  # on many ranks some have no target


class Model(nn.Module):
    """Logits from a head; ``warp`` is what happens to them afterwards."""

    warp: Callable[[Tensor], Tensor] | None = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.attention = rf.RingAttention(8, heads=2, kv_heads=1)
        self.head = nn.Linear(8, VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        logits = self.head(x + self.attention(x, position_ids))
        return logits if self.warp is None else self.warp(logits)


def step(ranks: int, inputs: Callable[[Any], dict[str, Any]], **options: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Every rank's loss and raw gradients; ``inputs(group)`` makes what it passes."""

    def one_rank(group: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model = Model()
        out = rf.SequenceParallel(model, group, **options)(**inputs(group))
        out.loss.backward()
        assert (out.logits is None) == ("loss_tile" in options)
        return out.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    return rf.local_world(ranks).run(one_rank)


def whole(group: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "shift_labels": TARGETS}


def close(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(
        torch.allclose(some[name], others[name], rtol=1e-10, atol=1e-13) for name in some
    )


def alone(mask: rf.Mask = rf.causal) -> tuple[Tensor, dict[str, Tensor]]:
    """Plain PyTorch around the same model."""
    model = Model()
    model.attention.alone = mask
    logits = model(IDS)
    loss = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), ignore_index=-100)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_inputs_that_are_cut_already_are_taken_as_they_are(layout: str) -> None:
    """A loader gives each rank its part and the sharding, documents included; nothing is cut twice."""
    mask = rf.causal & rf.documents([0, 5, 15, LENGTH])

    def cut(group: Any) -> dict[str, Any]:
        s = rf.Sharding(LENGTH, group, mask, layout)
        return {"input_ids": s.shard(IDS, 1), "shift_labels": s.shard(TARGETS, 1), "sharding": s}

    want_loss, want = alone(mask)
    for ranks in (1, 3):
        for loss, gradients in step(ranks, cut, layout="contiguous"):
            assert torch.allclose(loss, want_loss, rtol=1e-12, atol=0) and close(gradients, want)


def test_whoever_passes_a_count_gets_a_share_of_the_sum() -> None:
    """Transformers' Trainer divides by the tokens of a whole step and sums over ranks itself."""
    want_loss, want = alone()
    targets = int((TARGETS != -100).sum())
    for count in (targets, torch.tensor(targets)):
        results = step(3, lambda group, n=count: {**whole(group), "num_items_in_batch": n}, gradients="engine")
        assert torch.allclose(sum(loss for loss, _ in results), want_loss, rtol=1e-12, atol=0)
        total = {name: sum(gradients[name] for _, gradients in results if name in gradients) for name in want}
        assert close(total, want)


@pytest.mark.parametrize("tile", [1, 5, 100])
def test_a_loss_without_logits_is_the_same_loss(tile: int) -> None:
    """Tile by tile from hidden states: loss and raw gradients of one process, on more ranks than tokens too."""
    want_loss, want = alone()
    for ranks in (1, 3, LENGTH + 2):
        for loss, gradients in step(ranks, whole, loss_tile=tile, head="head"):
            assert torch.allclose(loss, want_loss, rtol=1e-12, atol=0) and close(gradients, want)


def test_a_loss_without_logits_never_makes_more_than_a_tile_of_them() -> None:
    """That is the point: tile x vocabulary, on no rank more; without labels logits are whole."""
    most = []

    def one_rank(group: Any) -> int:
        model = Model()
        model.head.register_forward_hook(lambda _, args, out: most.append(out.shape[:-1].numel()))
        wrapped = rf.SequenceParallel(model, group, loss_tile=4, head="head")
        for _ in range(2):
            wrapped(**whole(group)).loss.backward()
        assert max(most) <= 4
        return wrapped(IDS).logits.shape[1]

    assert sum(rf.local_world(2).run(one_rank)) == LENGTH


def test_what_a_model_does_to_logits_after_its_head_is_noticed() -> None:
    """A cap after the head would be left out of a loss from hidden states: an error on every rank, not another loss."""

    class Capped(Model):
        def warp(self, logits: Tensor) -> Tensor:
            return 30 * torch.tanh(logits / 30)

    def one_rank(group: Any) -> None:
        with pytest.raises(ValueError, match="Capped changes logits after its head"):
            rf.SequenceParallel(Capped(), group, loss_tile=4, head="head")(**whole(group))

    rf.local_world(LENGTH + 1).run(one_rank)


def test_copies_of_a_wrapped_model_have_a_catch_of_their_own() -> None:
    """deepcopy for an averaged model: both go on working, and neither takes the other's hidden states."""
    wrapped = rf.SequenceParallel(Model(), (0, 1), loss_tile=4, head="head")
    other = copy.deepcopy(wrapped)
    with torch.no_grad():
        other.head.weight.zero_(), other.head.bias.zero_()
    assert torch.allclose(wrapped(**whole(None)).loss, alone()[0])
    assert torch.allclose(other(**whole(None)).loss, torch.tensor(VOCABULARY).double().log())
    assert torch.allclose(wrapped(**whole(None)).loss, alone()[0])
    assert len(other.head._forward_pre_hooks) == 1


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    """The next forward starts clean, with labels or without."""
    wrapped = rf.SequenceParallel(Model(), (0, 1), loss_tile=4, head="head")
    with pytest.raises(IndexError):
        wrapped(input_ids=IDS + 1000, shift_labels=TARGETS)
    assert wrapped(IDS).logits.shape == (2, LENGTH, VOCABULARY)
    assert torch.allclose(wrapped(**whole(None)).loss, alone()[0])


@pytest.mark.parametrize(
    ("options", "inputs", "sentence"),
    [
        ({"loss_tile": 0, "head": "head"}, {}, "loss_tile is 0; a number of tokens"),
        ({"loss_tile": 4}, {}, "name the module that does, head='lm_head'"),
        ({"head": "head"}, {}, "head is 'head' without loss_tile"),
        ({"loss_tile": 4, "head": "lm_head"}, {}, "head is 'lm_head', and the model has no such module.* attention, head"),
        ({"loss_tile": 4, "head": "embed"}, {}, r"shape \(2, 22\) entered the head"),
        ({}, {"sharding": 3}, "sharding is a int; it is the rf.Sharding"),
        ({}, {"sharding": rf.Sharding(LENGTH, (0, 2))}, "of rank 0 of 2 with 1 to a shard; the model is on rank 0 of 1"),
        ({}, {"sharding": rf.Sharding(9, (0, 1))}, r"input_ids has shape \(2, 22\); dim 1 should have the 9 positions"),
        ({}, {"sharding": rf.Sharding(LENGTH, (0, 1)), "labels": IDS}, "labels was given with sharding.*pass shift_labels"),
        ({}, {"sharding": rf.Sharding(LENGTH, (0, 1)), "attention_mask": IDS}, "attention_mask was given with sharding"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_computed(
    options: dict[str, Any], inputs: dict[str, Any], sentence: str
) -> None:
    """One sentence with the name of the argument, what came and what is accepted."""
    inputs = {"input_ids": IDS, **({} if "labels" in inputs else {"shift_labels": TARGETS}), **inputs}
    with pytest.raises((ValueError, TypeError), match=sentence):
        rf.SequenceParallel(Model(), (0, 1), **options)(**inputs)


def test_inputs_by_place_need_a_model_that_names_them() -> None:
    """A forward(*args) does not say which input is the sequence."""

    class Loose(Model):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    with pytest.raises(TypeError, match="give them by name, input_ids=ids"):
        rf.SequenceParallel(Loose(), (0, 1))(IDS)


def test_generate_is_refused() -> None:
    """Every rank would decode from its own shard alone; also for a model that has a generate of its own."""
    with pytest.raises(RuntimeError, match="generate is not available on a sequence that is spread"):
        rf.SequenceParallel(Model(), (0, 1)).generate(IDS)


def test_an_adapter_sees_the_whole_batch_and_its_state_comes_back_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a framework needs it does in five places; of two interleaved forwards each backward finds its own state."""
    events: list[Any] = []

    class Adapter:
        def __init__(self, model: nn.Module) -> None:
            self.head = model.get_submodule("head")

        def tail(self, logits: Tensor) -> Tensor:
            return 3 * logits

        def prepare(self, inputs: dict[str, Any], mask: rf.Mask, length: int) -> rf.Mask:
            events.append(("prepare", tuple(inputs["input_ids"].shape), length))
            return mask & rf.documents(inputs.pop("cuts"))

        def prepare_local(self, inputs: dict[str, Any], s: rf.Sharding) -> None:
            events.append(("local", s.length))

        def begin(self, s: rf.Sharding) -> Callable[[], None]:
            events.append(("begin", s.mask))
            return lambda: events.append(("again", s.mask))

        def finish(self, output: Any) -> None:
            events.append("finish")

    class Tripled(Model):
        def warp(self, logits: Tensor) -> Tensor:
            return 3 * logits

    monkeypatch.setattr(
        spread, "ADAPTERS", [lambda model, mask: Adapter(model) if isinstance(model, Tripled) else None]
    )
    wrapped = rf.SequenceParallel(Tripled(), (0, 1), loss_tile=7)
    assert wrapped.spread.adapter is not None and rf.SequenceParallel(Model(), (0, 1)).spread.adapter is None
    masks = [rf.causal & rf.documents([0, cut, LENGTH]) for cut in (5, 12)]
    losses = [wrapped(input_ids=IDS, shift_labels=TARGETS, cuts=[0, cut, LENGTH]).loss for cut in (5, 12)]
    for loss in losses:
        loss.backward()
    assert events[:3] == [("prepare", (2, LENGTH), LENGTH), ("begin", masks[0]), "finish"]
    again = [event[1] for event in events if event[0] == "again"]
    assert again[0] == masks[0] and again[-1] == masks[1] and wrapped.attention.sharding.mask == masks[1]
    wrapped(input_ids=IDS, sharding=rf.Sharding(LENGTH, (0, 1)))
    assert ("local", LENGTH) in events


def test_objects_without_room_for_a_loss_become_a_plain_output() -> None:
    """A model may return its logits in whatever has the attribute."""

    class Wordy(Model):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Any:
            return SimpleNamespace(logits=super().forward(input_ids, position_ids), loss=None)

    out = rf.SequenceParallel(Wordy(), (0, 1), loss_tile=4, head="head")(**whole(None))
    assert isinstance(out, SimpleNamespace) and out.logits is None and torch.allclose(out.loss, alone()[0])
