"""A model of one device on a sequence over many: loss, logits and raw gradients are those of one process."""

from __future__ import annotations

import collections
import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringflash as rf
from ringflash.gradients import GradientSum

VOCABULARY, LENGTH = 17, 23


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.dense = rf.RingAttention(16, heads=4, kv_heads=2)
        self.local = rf.RingAttention(16, heads=4, kv_heads=1, mask=rf.window(4, 0))
        self.head = nn.Linear(16, VOCABULARY)
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, extra: Any = None) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.dense(x, position_ids)
        return self.head(x + self.local(x, position_ids))


BASE = Model()
IDS = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
LABELS = IDS.clone()
LABELS[0], LABELS[1, :9] = -100, -100  # on many ranks some have no target
PADDED = torch.ones(2, LENGTH, dtype=torch.int64)
PADDED[0, -6:], PADDED[1, :3] = 0, 0


def trained(
    ranks: int, layout: str = "auto", backwards: int = 1, **inputs: Any
) -> list[tuple[Tensor, Tensor, dict[str, Tensor | None]]]:
    """Loss, whole logits and raw gradients of every rank, after so many backwards without zeroing."""

    def one_rank(group: Any) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        model = copy.deepcopy(BASE)
        wrapped = rf.SequenceParallel(model, group, layout=layout)
        for _ in range(backwards):
            out = wrapped(**({"input_ids": IDS, "labels": LABELS} | inputs))
            out.loss.backward()
        whole = wrapped.sharding.unshard(out.logits.detach(), dim=1)
        return out.loss.detach(), whole, {name: p.grad for name, p in model.named_parameters()}

    return rf.local_world(ranks).run(one_rank)


def agree(some: dict[str, Tensor | None], others: dict[str, Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.allclose(a, b, rtol=1e-10, atol=1e-13))
        for a, b in zip(some.values(), others.values(), strict=True)
    )


def test_one_process_is_the_plain_model() -> None:
    """The reference of the other tests: the wrapper on one rank gives the model's own loss and gradients."""
    model = copy.deepcopy(BASE)
    logits = model(IDS)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    got_loss, got_logits, got_grads = trained(1)[0]
    assert torch.allclose(got_loss, loss) and torch.allclose(got_logits, logits)
    assert agree(got_grads, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"attention_mask": PADDED},
        {"attention_mask": torch.ones_like(PADDED)},
        {"mask": rf.causal & rf.documents([0, 4, 4, 20, LENGTH])},
        {"labels": None, "shift_labels": LABELS},
    ],
    ids=["plain", "padded", "nothing padded", "documents", "shifted labels"],
)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_any_number_of_ranks_gives_loss_logits_and_raw_gradients_of_one(layout: str, inputs: dict[str, Any]) -> None:
    """On 2, 3 and more ranks than tokens; raw, because clipping and Adam would hide a factor."""
    loss, logits, grads = trained(1, **inputs)[0]
    for ranks in (2, 3, LENGTH + 3):
        for rank_loss, rank_logits, rank_grads in trained(ranks, layout, **inputs):
            assert torch.allclose(rank_loss, loss, rtol=1e-12, atol=0)
            assert torch.allclose(rank_logits, logits, rtol=0, atol=1e-12)
            assert agree(rank_grads, grads)


def test_every_rank_states_the_same_loss_bit_for_bit() -> None:
    """Early stopping and learning-rate schedules that look at the loss must decide alike on all ranks."""
    assert len({loss.item() for loss, _, _ in trained(5)}) == 1


def test_gradients_accumulate_over_micro_batches() -> None:
    """A second backward adds its sum over ranks once, to what the first one left."""
    once, twice = trained(3)[0][2], trained(3, backwards=2)[0][2]
    assert agree({n: None if g is None else 2 * g for n, g in once.items()}, twice)


def test_a_parameter_that_nobody_used_keeps_no_gradient() -> None:
    """An optimizer skips parameters without a gradient; zeros would let weight decay and momentum act on them."""
    grads = trained(2)[0][2]
    assert grads["unused.weight"] is None and grads["embed.weight"] is not None


def test_a_parameter_that_only_some_ranks_used_is_summed_on_all() -> None:
    """Experts that no token of a rank went to count as zero there, and what earlier micro-batches left stays as it was."""

    def one_rank(group: Any) -> dict[str, float | None]:
        model = nn.ParameterDict(
            {name: nn.Parameter(torch.ones(n)) for n, name in enumerate(("never", "rare", "often"))}
        )
        total = GradientSum(model, group.wire)
        for used in (1, 0, 1):  # the rank that uses it
            total.watch()
            loss = model["often"].sum() * (1 + group.rank)
            (loss + model["rare"].sum() * 10 if group.rank == used else loss).backward()
        return {name: None if p.grad is None else p.grad.mean().item() for name, p in model.items()}

    assert rf.local_world(3).run(one_rank) == [{"never": None, "rare": 30.0, "often": 18.0}] * 3


def test_a_batch_without_any_target_has_loss_zero() -> None:
    """The mean over no tokens is 0 with zero gradients, not NaN."""
    for loss, _, grads in trained(3, labels=torch.full_like(IDS, -100)):
        assert loss == 0 and all(g is None or not g.any() for g in grads.values())


def test_evaluation_without_gradients_and_without_labels() -> None:
    """Under no_grad the loss is the same; without labels there is none."""

    def one_rank(group: Any) -> tuple[float, Any]:
        wrapped = rf.SequenceParallel(copy.deepcopy(BASE), group)
        return wrapped(input_ids=IDS, labels=LABELS).loss.item(), wrapped(IDS).loss

    with torch.no_grad():
        results = rf.local_world(2).run(one_rank)
    assert all(abs(loss - trained(1)[0][0].item()) < 1e-12 and none is None for loss, none in results)


def test_an_engine_that_averages_gets_a_scaled_loss() -> None:
    """With gradients="engine" the average of the ranks' gradients, not their sum, is one process's."""
    _, _, want = trained(1)[0]

    def one_rank(group: Any) -> tuple[float, dict[str, Tensor | None]]:
        model = copy.deepcopy(BASE)
        out = rf.SequenceParallel(model, group, gradients="engine")(input_ids=IDS, labels=LABELS)
        out.loss.backward()
        return out.loss.item(), {name: p.grad for name, p in model.named_parameters()}

    results = rf.local_world(3).run(one_rank)
    assert all(abs(loss - trained(1)[0][0].item()) < 1e-12 for loss, _ in results)
    for name, gradient in want.items():
        if gradient is not None:
            average = sum(grads[name] for _, grads in results if grads[name] is not None) / 3
            assert torch.allclose(average, gradient, rtol=1e-10, atol=1e-13), name


def test_the_wrapper_is_the_model_to_checkpoints_and_optimizers() -> None:
    """Names, state_dict, load_state_dict and attributes are the inner model's, alone and inside another module."""
    model = copy.deepcopy(BASE)
    wrapped = rf.SequenceParallel(model, (0, 1))
    assert [n for n, _ in wrapped.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(wrapped.state_dict()) == list(model.state_dict())
    outer = nn.ModuleDict({"part": wrapped})
    assert list(outer.state_dict()) == [f"part.{name}" for name in model.state_dict()]
    zeros = {name: torch.zeros_like(x) for name, x in outer.state_dict().items()}
    outer.load_state_dict(zeros)
    assert not any(p.any() for p in model.parameters())
    wrapped.load_state_dict(BASE.state_dict())
    assert wrapped.head is model.head and wrapped.embed.num_embeddings == VOCABULARY
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = wrapped.nothing_of_this_name


def test_seq_dims_name_further_inputs_and_nothing_is_passed_by_silently() -> None:
    """A tensor as long as the sequence is sharded, passed whole by request, or an error; never guessed."""
    seen = []

    class Curious(Model):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, extra: Any = None) -> Tensor:
            seen.append((tuple(extra.shape), position_ids.tolist()))
            return super().forward(input_ids, position_ids)

    def one_rank(group: Any, dims: dict[str, int | None] | None) -> None:
        rf.SequenceParallel(Curious(), group, layout="contiguous", seq_dims=dims)(
            input_ids=IDS, extra=torch.ones(3, LENGTH)
        )

    rf.local_world(2).run(one_rank, {"extra": 1})
    rf.local_world(2).run(one_rank, {"extra": None})
    assert [shape for shape, _ in seen] == [(3, 11), (3, 12), (3, LENGTH), (3, LENGTH)]
    assert seen[1][1] == [list(range(11, LENGTH))]
    with pytest.raises(ValueError, match=r"extra has shape \(3, 23\), and 23 is the length of the sequence"):
        rf.local_world(2).run(one_rank, None)


def test_objects_with_logits_come_back_with_the_loss_set() -> None:
    """A model that returns its own kind of output keeps it."""

    class Wordy(Model):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, extra: Any = None) -> Any:
            return SimpleNamespace(logits=super().forward(input_ids, position_ids), remark="kept", loss=None)

    out = rf.SequenceParallel(Wordy(), (0, 1))(input_ids=IDS, labels=LABELS)
    assert out.remark == "kept" and torch.allclose(out.loss, trained(1)[0][0])


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"labels": LABELS, "shift_labels": LABELS}, "labels and shift_labels were given"),
        ({"labels": LABELS[:, :-1]}, r"labels has shape \(2, 22\); dim 1 should have 23 positions"),
        ({"position_ids": torch.arange(5)[None]}, r"position_ids has shape \(1, 5\)"),
        ({"attention_mask": torch.tensor([[1] * 5 + [0] + [1] * 17] * 2)}, "pads between the tokens of a row"),
        ({"attention_mask": torch.zeros(2, 1, 23, 23)}, r"attention_mask has shape \(2, 1, 23, 23\)"),
        ({"attention_mask": torch.ones(2, 22)}, r"attention_mask has shape \(2, 22\); \[batch, 23\]"),
        ({"mask": rf.documents([0, 7])}, "documents of the mask cover 7 positions"),
    ],
    ids=["two labels", "short labels", "short positions", "holes", "4-d mask", "short mask", "documents"],
)
def test_what_does_not_fit_is_said_before_anything_is_sent(inputs: dict[str, Any], sentence: str) -> None:
    """On every rank alike."""
    with pytest.raises(ValueError, match=sentence):
        trained(2, **({"labels": None} | inputs))


def test_models_and_engines_that_cannot_work_are_refused() -> None:
    """A model without ring attention would silently attend to its shard; DDP inside would reduce gradients twice."""
    with pytest.raises(ValueError, match="no module of Linear has a sharding attribute"):
        rf.SequenceParallel(nn.Linear(2, 2), (0, 1))
    with pytest.raises(ValueError, match="accepted are 'reduce' and 'engine'"):
        rf.SequenceParallel(copy.deepcopy(BASE), (0, 1), gradients="sum")  # type: ignore[arg-type]
    sharded = copy.deepcopy(BASE)
    sharded.head.weight.device_mesh = "a mesh"  # as a DTensor has
    with pytest.raises(ValueError, match=r"belong to DDP or FSDP.*gradients='engine'"):
        rf.SequenceParallel(sharded, (0, 1))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dim": 10, "heads": 4}, "dim 10 is not a multiple of heads 4; pass head_dim"),
        ({"dim": 16, "heads": 4, "kv_heads": 3}, "heads must be a multiple of kv_heads"),
        ({"dim": 12, "heads": 4}, "head_dim is 3; rotary positions turn pairs"),
    ],
)
def test_ring_attention_module_says_which_sizes_fit(arguments: dict[str, int], sentence: str) -> None:
    """Sizes are checked when the layer is made."""
    with pytest.raises(ValueError, match=sentence):
        rf.RingAttention(**arguments)


def test_rotary_positions_are_relative() -> None:
    """Moving the whole sequence along the positions changes nothing; moving one token does."""
    layer = rf.RingAttention(16, heads=2, kv_heads=1).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    place = torch.arange(9)[None]
    assert torch.allclose(layer(x, place), layer(x, place + 1000), atol=1e-10)
    moved = place.clone()
    moved[0, 4] += 3
    assert not torch.allclose(layer(x, place), layer(x, moved), atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_the_ring_and_changes_nothing(reentrant: bool) -> None:
    """torch.utils.checkpoint over layers of the model, either kind, gives the same accumulated gradients on every rank."""
    from torch.utils.checkpoint import checkpoint

    class Thrifty(Model):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, extra: Any = None) -> Tensor:
            x = self.embed(input_ids)
            x = x + checkpoint(self.dense, x, position_ids, use_reentrant=reentrant)
            return self.head(x + checkpoint(self.local, x, position_ids, use_reentrant=reentrant))

    def one_rank(group: Any) -> dict[str, Tensor | None]:
        model = Thrifty()
        wrapped = rf.SequenceParallel(model, group)
        for _ in range(2):
            wrapped(input_ids=IDS, labels=LABELS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    assert agree(rf.local_world(3).run(one_rank)[1], trained(1, backwards=2)[0][2])


def test_checkpointing_with_two_forwards_before_a_backward() -> None:
    """Recomputation sees the sharding of its own forward, though a later one has set another mask and layout."""
    from torch.utils.checkpoint import checkpoint

    class Thrifty(Model):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, extra: Any = None) -> Tensor:
            x = self.embed(input_ids)
            return self.head(x + checkpoint(self.dense, x, position_ids, use_reentrant=False))

    masks = (rf.causal & rf.documents([0, 9, LENGTH]), rf.causal)

    def one_rank(group: Any, together: bool) -> dict[str, Tensor | None]:
        model = Thrifty()
        wrapped = rf.SequenceParallel(model, group)
        losses = [lambda m=m: wrapped(input_ids=IDS, labels=LABELS, mask=m).loss for m in masks]
        if together:
            sum(loss() for loss in losses).backward()
        else:
            for loss in losses:
                loss().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    for ranks in (1, 3):
        for a, b in zip(*(rf.local_world(ranks).run(one_rank, how) for how in (True, False)), strict=True):
            assert agree(a, b)


def _grads_after(change: Any, ranks: int = 2) -> list[dict[str, Tensor | None]]:
    """Raw gradients of a step on so many ranks, after ``change(model, wrapped)`` happened behind the wrapper's back."""

    def one_rank(group: Any) -> dict[str, Tensor | None]:
        torch.manual_seed(5)
        model = copy.deepcopy(BASE)
        wrapped = rf.SequenceParallel(model, group)
        change(model, wrapped)
        wrapped(input_ids=IDS, labels=LABELS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    return rf.local_world(ranks).run(one_rank)


def _new_head(model: nn.Module, wrapped: nn.Module) -> None:
    model.head = nn.Linear(16, VOCABULARY).double()


def _assigned(model: nn.Module, wrapped: nn.Module) -> None:
    wrapped.load_state_dict({name: x.clone() for name, x in BASE.state_dict().items()}, assign=True)


def _failed_backward(model: nn.Module, wrapped: nn.Module) -> None:
    def fail(gradient: Tensor) -> None:
        raise ArithmeticError("planted")

    hook = model.embed.weight.register_hook(fail)
    with pytest.raises(ArithmeticError, match="planted"):
        wrapped(input_ids=IDS, labels=LABELS).loss.backward()
    hook.remove()
    model.zero_grad()


def _thawed(model: nn.Module, wrapped: nn.Module) -> None:
    model.head.requires_grad_(False)
    wrapped(input_ids=IDS, labels=LABELS).loss.backward()
    model.head.requires_grad_(True)
    model.zero_grad()


def _gradients_taken_aside(model: nn.Module, wrapped: nn.Module) -> None:
    parameters = [p for name, p in model.named_parameters() if "unused" not in name]
    wrapped(input_ids=IDS, labels=LABELS).loss.backward()
    kept = [p.grad for p in parameters]
    torch.autograd.grad(wrapped(input_ids=IDS, labels=LABELS).loss, parameters)
    assert all(p.grad is gradient for p, gradient in zip(parameters, kept, strict=True))
    model.zero_grad()


@pytest.mark.parametrize("change", [_new_head, _assigned, _failed_backward, _thawed, _gradients_taken_aside])
def test_gradients_are_summed_whatever_happened_to_the_model(change: Any) -> None:
    """New parameters, frozen ones that thaw, a backward that failed, gradients taken without backward: still one process's."""
    (alone,) = _grads_after(change, ranks=1)
    assert all(agree(alone, grads) for grads in _grads_after(change, ranks=3))


def test_a_failed_backward_leaves_earlier_gradients_alone() -> None:
    """What micro-batches have accumulated survives an exception in a later one."""

    def one_rank(group: Any) -> dict[str, Tensor | None]:
        model = copy.deepcopy(BASE)
        wrapped = rf.SequenceParallel(model, group)
        wrapped(input_ids=IDS, labels=LABELS).loss.backward()
        hook = model.embed.weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            wrapped(input_ids=IDS, labels=LABELS).loss.backward()
        hook.remove()
        wrapped(input_ids=IDS, labels=LABELS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    assert agree(rf.local_world(2).run(one_rank)[0], trained(1, backwards=2)[0][2])


def test_accumulated_gradients_stay_the_tensors_they_were() -> None:
    """Optimizers over flat buffers keep views of the gradients."""

    def one_rank(group: Any) -> bool:
        model = copy.deepcopy(BASE)
        wrapped = rf.SequenceParallel(model, group)
        wrapped(input_ids=IDS, labels=LABELS).loss.backward()
        first = model.head.weight.grad
        wrapped(input_ids=IDS, labels=LABELS).loss.backward()
        return model.head.weight.grad is first

    assert all(rf.local_world(2).run(one_rank))


def test_a_copy_of_a_wrapped_model_is_a_model_of_its_own() -> None:
    """Averaged weights and ensembles copy models, also after a forward; the copy sums gradients itself."""

    def one_rank(group: Any) -> dict[str, Tensor | None]:
        wrapped = rf.SequenceParallel(copy.deepcopy(BASE), group)
        wrapped(input_ids=IDS, labels=LABELS)
        copied = copy.deepcopy(wrapped)
        assert copied.head.weight is not wrapped.head.weight
        copied(input_ids=IDS, labels=LABELS).loss.backward()
        assert wrapped.head.weight.grad is None
        return {name: p.grad for name, p in copied.module.named_parameters()}

    assert agree(rf.local_world(2).run(one_rank)[0], trained(1)[0][2])


@pytest.mark.parametrize(
    "topology", [{"heads_axis": 2}, {"heads_axis": 4, "route": "gather"}, {"route": "ring_down"}], ids=str
)
def test_topology_changes_nothing(topology: dict[str, Any]) -> None:
    """Swapping heads and other routes give one process's loss and raw gradients too, also to a copy of the wrapper."""

    def one_rank(group: Any) -> tuple[float, dict[str, Tensor | None], tuple[Any, ...]]:
        wrapped = copy.deepcopy(rf.SequenceParallel(copy.deepcopy(BASE), group, layout="zigzag", **topology))
        out = wrapped(input_ids=IDS, labels=LABELS)
        out.loss.backward()
        s = wrapped.sharding
        return out.loss.item(), {n: p.grad for n, p in wrapped.module.named_parameters()}, (s.heads_axis, str(s.route))

    loss, _, grads = trained(1)[0]
    for rank_loss, rank_grads, spread in rf.local_world(4).run(one_rank):
        assert abs(rank_loss - loss.item()) < 1e-12 and agree(rank_grads, grads)
        assert spread[0] == topology.get("heads_axis", 1) and topology.get("route", spread[1]) == spread[1]


def test_a_pickled_sharding_is_built_anew() -> None:
    """A handle means something in one process only; a sharding with a group belongs to its process."""
    s = rf.Sharding(9, (1, 2), rf.window(3, 0), "striped")
    again = pickle.loads(pickle.dumps(s))
    assert again == s and int(again.handle) != int(s.handle)
    with pytest.raises(TypeError, match="build it on each rank"):
        rf.local_world(1).run(lambda group: pickle.dumps(rf.Sharding(9, group)))


def test_outputs_that_cannot_take_a_loss_come_back_as_ours() -> None:
    """A NamedTuple with logits has no place for the loss: the wrapper's own output has."""

    class Named(Model):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, extra: Any = None) -> Any:
            return collections.namedtuple("Reply", "logits")(super().forward(input_ids, position_ids))

    assert torch.allclose(rf.SequenceParallel(Named(), (0, 1))(input_ids=IDS, labels=LABELS).loss, trained(1)[0][0])

    class Wrong(Model):
        def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, extra: Any = None) -> Any:
            return {"logits": super().forward(input_ids, position_ids)}

    with pytest.raises(TypeError, match="returned a dict; it should return logits"):
        rf.SequenceParallel(Wrong(), (0, 1))(input_ids=IDS)


def test_a_token_mean_beyond_the_group_needs_an_engine() -> None:
    """Summing over the group alone would leave out the other ranks' share of the mean."""
    with pytest.raises(
        ValueError, match=r"tokens_group has 4 ranks, group 2; gradients='reduce' sums over group alone"
    ):
        rf.SequenceParallel(copy.deepcopy(BASE), (0, 2), tokens_group=(0, 4))
