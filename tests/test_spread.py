"""Around the model: inputs that are cut already, losses that divide by another's count, losses without logits, adapters."""

from __future__ import annotations

import copy
import dataclasses
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


class Capped(Model):
    def warp(self, logits: Tensor) -> Tensor:
        return 30 * torch.tanh(logits / 30)


def scaled(model: Model, largest: float) -> Model:
    """``model`` with a head whose logits for the first token of IDS are so large."""
    with torch.no_grad():
        x = model.embed(IDS[:, :1])
        model.attention.alone = rf.causal
        model.head.bias.zero_()
        factor = largest / model.head(x + model.attention(x)).abs().amax()
        model.head.weight.mul_(factor)
    return model


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


def test_a_mask_of_the_call_replaces_that_of_the_sharding() -> None:
    """As it replaces the mask of the wrapper where the inputs are whole."""
    mask = rf.causal & rf.documents([0, 5, 15, LENGTH])

    def cut(group: Any) -> dict[str, Any]:
        s = rf.Sharding(LENGTH, group)
        return {"input_ids": s.shard(IDS, 1), "shift_labels": s.shard(TARGETS, 1), "sharding": s, "mask": mask}

    assert all(close(gradients, alone(mask)[1]) for _, gradients in step(2, cut))


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


def test_every_rank_calls_the_head_equally_often_in_a_loss_without_logits() -> None:
    """An engine that gathers the weights of the head at each call would wait for ever for a rank with fewer tokens."""

    def one_rank(group: Any) -> int:
        calls, model = [], Model()
        model.head.register_forward_hook(lambda *_: calls.append(1))
        wrapped = rf.SequenceParallel(model, group, layout="contiguous", loss_tile=11, head="head")
        wrapped(**whole(group)).loss.backward()
        return len(calls)

    assert len({*rf.local_world(4).run(one_rank)}) == 1  # 10 or 12 tokens: a tile or two


def test_what_a_model_does_to_logits_after_its_head_is_noticed() -> None:
    """A cap after the head would be left out of a loss from hidden states: an error on every rank, not another loss."""

    def one_rank(group: Any) -> None:
        with pytest.raises(ValueError, match="Capped changes logits after its head"):
            rf.SequenceParallel(Capped(), group, loss_tile=4, head="head")(**whole(group))

    rf.local_world(LENGTH + 1).run(one_rank)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 10.0), (torch.float32, 0.1)])
def test_a_slight_change_of_logits_is_noticed_too(dtype: torch.dtype, largest: float) -> None:
    """A cap of 30 changes logits of 10 by 4 %, about the rounding of a few bfloat16 operations: compared to the bit."""
    model = scaled(Capped().to(dtype), largest)
    with pytest.raises(ValueError, match="Capped changes logits after its head"):
        rf.SequenceParallel(model, (0, 1), loss_tile=4, head="head")(**whole(None))


def test_a_change_of_logits_in_place_is_noticed() -> None:
    """What the head made is kept, not looked up again."""
    model = Model()
    model.warp = lambda logits: logits.mul_(2)
    with pytest.raises(ValueError, match="Model changes logits after its head"):
        rf.SequenceParallel(model, (0, 1), loss_tile=4, head="head")(**whole(None))


def test_a_change_of_logits_that_shows_only_once_they_have_grown_is_noticed_then() -> None:
    """At the start of a training logits are small, and a cap may do nothing to them."""
    model = scaled(Model(), 1.0)
    model.warp = lambda logits: logits.clamp(-15, 15)
    wrapped = rf.SequenceParallel(model, (0, 1), loss_tile=4, head="head")
    wrapped(**whole(None))
    with torch.no_grad():
        model.head.weight.mul_(20)
    with pytest.raises(ValueError, match="Model changes logits after its head"):
        wrapped(**whole(None))


def test_casts_and_nan_are_no_change_of_logits() -> None:
    """A model that computes in bfloat16 and returns float32 has one loss; one that diverged has NaN, and no wrong reason."""

    class Cast(Model):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(input_ids, position_ids).float()

    model = Cast().float()
    loss = rf.SequenceParallel(model, (0, 1), loss_tile=4, head="head")(**whole(None)).loss
    assert abs(loss - alone()[0]) < 0.02
    with torch.no_grad():
        model.embed.weight.fill_(torch.nan)
    assert rf.SequenceParallel(model, (0, 1), loss_tile=4, head="head")(**whole(None)).loss.isnan()


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


@pytest.mark.parametrize("where", ["before the head", "after the head"])
def test_a_forward_that_fails_leaves_nothing_behind(where: str) -> None:
    """No hidden states stay in memory or in a copy, the bare model gives all its logits, and the next forward starts clean."""
    model = Model()
    wrapped = rf.SequenceParallel(model, (0, 1), loss_tile=4, head="head")
    with pytest.raises((IndexError, ZeroDivisionError)):
        if where == "after the head":
            model.warp = lambda logits: 1 / 0
        wrapped(input_ids=IDS if where == "after the head" else IDS + 1000, shift_labels=TARGETS)
    model.warp = None
    copy.deepcopy(model)
    assert model(IDS).shape == wrapped(IDS).logits.shape == (2, LENGTH, VOCABULARY)
    assert torch.allclose(wrapped(**whole(None)).loss, alone()[0])


def test_a_head_that_is_called_by_keyword() -> None:
    """Without labels nothing is caught and all is well; with labels the catch says what it needs."""

    class Keyword(Model):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
            return self.head(input=self.embed(input_ids))

    wrapped = rf.SequenceParallel(Keyword(), (0, 1), loss_tile=4, head="head")
    assert wrapped(IDS).logits.shape == (2, LENGTH, VOCABULARY)
    with pytest.raises(ValueError, match=r"no tensor by place entered the head \(Linear\)"):
        wrapped(**whole(None))


def test_backward_passes_through_what_the_model_returned() -> None:
    """DDP, FSDP and ZeRO start from there, also where the loss is made of hidden states; its gradient is zero."""
    model, came = Model(), []
    model.warp = lambda logits: (logits.register_hook(came.append), logits)[1]
    rf.SequenceParallel(model, (0, 1), loss_tile=4, head="head")(**whole(None)).loss.backward()
    assert len(came) == 1 and not came[0].any()


def test_a_model_that_is_wrapped_again_has_its_gradients_summed_once() -> None:
    """One wrapper to train and one to evaluate, or a cell of a notebook run twice: not the sum of sums."""

    def one_rank(group: Any) -> dict[str, Tensor]:
        model = Model()
        first = rf.SequenceParallel(model, group)
        second = rf.SequenceParallel(model, group, loss_tile=4, head="head")
        with torch.no_grad():
            first(**whole(group))
        second(**whole(group)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert all(close(gradients, alone()[1]) for gradients in rf.local_world(3).run(one_rank))


def test_wrappers_that_cannot_share_a_model_are_refused() -> None:
    """A wrapper in a wrapper would cut a part again; another group's sum would add to the first."""
    with pytest.raises(ValueError, match="SequenceParallel is or holds a SequenceParallel"):
        rf.SequenceParallel(rf.SequenceParallel(Model(), (0, 1)), (0, 1))
    model = Model()
    worlds = [rf.local_world(2) for _ in range(2)]
    kept = worlds[0].run(lambda group: rf.SequenceParallel(model, group) if group.rank == 0 else None)
    with pytest.raises(Exception, match="an earlier wrapper sums the gradients of model over another group"):
        worlds[1].run(lambda group: rf.SequenceParallel(model, group) if group.rank == 0 else None)
    assert kept[0] is not None


@pytest.mark.parametrize("given", [{}, {"position_ids": None}])
@pytest.mark.parametrize("inside", [0, 2])
def test_positions_are_global_for_a_model_that_counts_them_itself(inside: int, given: dict[str, Any]) -> None:
    """None is no position, and a wrapper that passes on whatever it gets (PEFT) hides no name."""

    class Counts(Model):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1])[None]
            return super().forward(input_ids, position_ids) + torch.sin(position_ids)[..., None] * torch.arange(13)

    class Around(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.base(*args, **kwargs)

    def one_rank(group: Any) -> Tensor:
        model: nn.Module = Counts()
        for _ in range(inside):
            model = Around(model)
        return rf.SequenceParallel(model, group)(IDS, shift_labels=TARGETS, **given).loss.detach()

    want = rf.local_world(1).run(one_rank)[0]
    assert all(torch.allclose(loss, want, rtol=1e-12, atol=0) for loss in rf.local_world(3).run(one_rank))


def test_names_of_parameters_with_and_without_duplicates() -> None:
    """Frameworks ask for tied weights under all their names, by keyword."""
    model = Model()
    model.tied = model.head
    wrapped = rf.SequenceParallel(model, (0, 1))
    for names in (
        lambda m, once: m.named_parameters(remove_duplicate=once),
        lambda m, once: m.named_buffers("x", True, once),
    ):
        assert all([n for n, _ in names(wrapped, x)] == [n for n, _ in names(model, x)] for x in (True, False))


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

        def forget(self) -> None:
            events.append("forget")

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
    plain = Tripled()
    for loss, mask in zip(losses, masks, strict=True):
        plain.attention.alone = mask
        want = F.cross_entropy(plain(IDS).flatten(0, 1), TARGETS.flatten(), ignore_index=-100)
        assert torch.allclose(loss, want, rtol=1e-12, atol=0)
    for loss in losses:
        loss.backward()
    assert events[:4] == [("prepare", (2, LENGTH), LENGTH), ("begin", masks[0]), "finish", "forget"]
    again = [event[1] for event in events if event[0] == "again"]
    assert again[0] == masks[0] and again[-1] == masks[1] and wrapped.attention.sharding.mask == masks[1]
    wrapped(input_ids=IDS, sharding=rf.Sharding(LENGTH, (0, 1)))
    assert ("local", LENGTH) in events


@dataclasses.dataclass(frozen=True)
class Answer:
    loss: Tensor | None
    logits: Tensor | None
    remark: str = "kept"


def test_a_models_own_kind_of_output_is_returned_with_the_loss() -> None:
    """An object is changed, a dataclass (frozen, or one of Transformers, which are sequences too) made anew."""
    made = {
        SimpleNamespace: lambda logits: SimpleNamespace(logits=logits, loss=None, remark="kept"),
        Answer: lambda logits: Answer(None, logits),
    }
    for kind, make in made.items():

        class Wordy(Model):
            def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, make: Any = make) -> Any:
                return make(super().forward(input_ids, position_ids))

        out = rf.SequenceParallel(Wordy(), (0, 1), loss_tile=4, head="head")(**whole(None))
        assert isinstance(out, kind) and out.logits is None and out.remark == "kept"
        assert torch.allclose(out.loss, alone()[0])
        assert rf.SequenceParallel(Wordy(), (0, 1))(IDS).loss is None


def test_a_tiled_mlp_is_no_attention() -> None:
    """It is told the sharding, but a model without attention that is told it would attend to shards alone."""
    with pytest.raises(ValueError, match="no module of Sequential has a sharding attribute"):
        rf.SequenceParallel(nn.Sequential(rf.Tiled(nn.Linear(8, 8), tile=4)), (0, 1))
