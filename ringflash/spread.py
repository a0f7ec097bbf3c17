"""What goes into a model, and what comes out of it, when its sequence is spread over ranks.

    whole inputs      enter       this rank's inputs      the model      this rank's logits      leave      loss of all
    [b, length]    ----------->   [b, local_length]    ------------>   [b, local_length, v]   ---------->   ranks' tokens

Everything but attention is local to a token. What is not is done here: labels are shifted before they are sharded (the
target of a shard's last token is on another rank), positions are global, the mean is over the unmasked tokens of all
ranks, and every layer that attends is told the sharding.

A framework whose models need more than that (Transformers) appends a finder of an :class:`Adapter` to ``ADAPTERS``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ringflash.check import settle
from ringflash.groups import Group, address, resolve, resolve_axes
from ringflash.layout import Layout
from ringflash.loss import IGNORED, Mean, Tiles, cross_entropy_sum, in_vocabulary
from ringflash.mask import Mask, documents
from ringflash.numbers import said_by, whole
from ringflash.route import Route
from ringflash.shard import Sharding
from ringflash.tiling import Tiled

SEQUENCE_DIMS: dict[str, int | None] = {
    "input_ids": 1,
    "inputs_embeds": 1,
    "position_ids": -1,
    "token_type_ids": 1,
    "labels": 1,
    "shift_labels": 1,
    "attention_mask": 1,
}


class Output(NamedTuple):
    """What a wrapped model returns: ``loss`` (None without labels) and this rank's ``logits [b, s_local, vocab]``.

    Logits are None where the loss is computed tile by tile (``loss_tile``): then they never exist as a whole.
    """

    loss: Tensor | None
    logits: Tensor | None


class Adapter(Protocol):
    """What the models of a framework need beside the general rules. What it refuses, it refuses on all ranks alike."""

    head: nn.Module | None
    """The module that turns hidden states into logits, for ``loss_tile``; None if it is not known."""

    def tail(self, logits: Tensor) -> Tensor:
        """What the model does to logits after the head (a cap, a factor)."""

    def prepare(self, inputs: dict[str, Any], mask: Mask, length: int) -> Mask:
        """Whole inputs, before they are sharded: change entries in place; returns the mask of this batch."""

    def prepare_local(self, inputs: dict[str, Any], s: Sharding) -> None:
        """The same for inputs that are this rank's part already."""

    def begin(self, s: Sharding) -> Callable[[], None]:
        """A forward under ``s`` begins. Returns what puts its state back, for recomputation in its backward."""

    def finish(self, output: Any) -> None:
        """The model's forward is over."""

    def forget(self) -> None:
        """So is all that was begun, also if it failed."""


ADAPTERS: list[Callable[[nn.Module, Mask], Adapter | None]] = []
"""Who is asked, in this order, whether a model is theirs; integrations append to it when they are imported."""


@dataclasses.dataclass
class _Batch:
    """One forward that has entered and not yet left."""

    sharding: Sharding
    labels: Tensor | None
    items: Tensor | float | None
    back: Callable[[], None]


class Spread:
    """``enter`` and ``leave`` around the forward of ``model``; the arguments are those of ``SequenceParallel``.

    ``engine``: somebody else averages gradients over the ranks of ``tokens_group``.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        mask: Mask,
        *,
        layout: str | Layout = "auto",
        route: str | Route = "auto",
        heads_axis: str | int | None = None,
        engine: bool = False,
        tokens_group: Group = None,
        seq_dims: Mapping[str, int | None] | None = None,
        loss_tile: int | None = None,
        head: str | None = None,
        check: str | None = None,
    ) -> None:
        self.sharding: Sharding | None = None
        with said_by("SequenceParallel"):
            self.group, self.heads_axis = resolve_axes(group, heads_axis)
            self.tokens_group = self.group if tokens_group is None else resolve(tokens_group)
        self.adapter = next((found for find in ADAPTERS if (found := find(model, mask)) is not None), None)
        if not any(_takes_part(m) and not isinstance(m, Tiled) for m in model.modules()):
            raise ValueError(
                f"SequenceParallel: no module of {type(model).__name__} has a sharding attribute, so every rank would attend "
                "to its own shard alone; use rf.RingAttention, or set self.sharding = None in your attention module and "
                "call rf.ring_attention(q, k, v, self.sharding). For a Transformers model, import "
                "ringflash.integrations.transformers"
            )
        self._model, self._mask, self._layout, self._route, self._check = model, mask, layout, route, settle(check).name
        self._seq_dims = SEQUENCE_DIMS | dict(seq_dims or {})
        self._signature = inspect.signature(_who_names_inputs(model).forward)
        self._mean = Mean(self.tokens_group, engine)
        self._tiles = self._make_tiles(loss_tile, head)
        self._batch: _Batch | None = None

    def enter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of the model's forward on this rank. Every layer that attends knows its sharding now."""
        inputs = {**self._by_name(args), **kwargs}
        items, s = inputs.pop("num_items_in_batch", None), inputs.pop("sharding", None)
        if s is None:
            s = self._cut(inputs)
        else:
            s = self._accept(inputs, s)
        labels = inputs.pop("shift_labels", None)
        if inputs.get("position_ids") is None and self._accepts("position_ids"):
            device = next((x.device for x in inputs.values() if isinstance(x, Tensor)), None)
            inputs["position_ids"] = s.positions.to(device)[None]
        self.sharding = s
        self._tell(s)
        again = None if self.adapter is None else self.adapter.begin(s)

        def back() -> None:
            self._tell(s)
            if again is not None:
                again()

        self._batch = _Batch(s, labels, items, back)
        if self._tiles is not None:
            self._tiles.expect(None if labels is None else s.local_length)
        return inputs

    def leave(self, output: Any) -> Any:
        """The model's output with the loss: :class:`Output`, or the model's own object with ``loss`` set."""
        batch, self._batch = self._batch, None
        assert batch is not None  # enter comes first
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"SequenceParallel: the model returned a {type(output).__name__}; it should return logits, as a tensor or "
                "as the attribute logits of an object"
            )
        if self.adapter is not None:
            self.adapter.finish(output)
        loss: Tensor | None = None
        left: Tensor | None = logits
        if batch.labels is not None:
            labels, strange = in_vocabulary(batch.labels, logits.shape[-1])
            if self._tiles is None:
                here = cross_entropy_sum(logits, labels)
            else:
                here, left = self._tiles.sum(logits, labels, batch.sharding), None
            loss = self._mean.of(here, labels, strange, batch.items)
        back = batch.back
        for result in (logits, loss):
            if result is not None and result.requires_grad:
                # activation checkpointing reads the sharding again, when another forward may have set another one
                result.register_hook(lambda _: back())
        return Output(loss, left) if isinstance(output, Tensor) else _with_loss(output, loss, left)

    def forget(self) -> None:
        """A forward is over, also one that failed: keep nothing of it, and let a call of the bare model pass."""
        self._batch = None
        if self._tiles is not None:
            self._tiles.expect(None)
        if self.adapter is not None:
            self.adapter.forget()

    def _by_name(self, args: tuple[Any, ...]) -> dict[str, Any]:
        parameters = self._signature.parameters
        if args and any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
            raise TypeError(
                f"SequenceParallel: {len(args)} inputs were given by place; give them by name, input_ids=ids"
            )
        return dict(self._signature.bind_partial(*args).arguments)

    def _cut(self, inputs: dict[str, Any]) -> Sharding:
        """Replace whole inputs by this rank's parts; the labels are ``shift_labels`` afterwards."""
        mask = inputs.pop("mask") if isinstance(inputs.get("mask"), Mask) else self._mask
        length = self._length(inputs)
        if self.adapter is None:
            mask = with_padding(mask, inputs.pop("attention_mask", None), length)
        else:
            mask = self.adapter.prepare(inputs, mask, length)
        how = (self._layout, self._route)
        s = Sharding(length, self.group, mask, *how, heads_axis=self.heads_axis, check=self._check)
        labels = _targets(inputs)
        if labels is not None:
            inputs["shift_labels"] = labels
        for name, value in inputs.items():
            inputs[name] = self._local(name, value, s)
        return s

    def _accept(self, inputs: dict[str, Any], s: Any) -> Sharding:
        """Check inputs that are this rank's parts already, as a loader yields them."""
        if not isinstance(s, Sharding):
            raise TypeError(f"SequenceParallel: sharding is a {type(s).__name__}; it is the rf.Sharding of the inputs")
        if (address(s.group), s.heads_degree) != (address(self.group), self.heads_axis):
            there, here = address(s.group), address(self.group)
            raise ValueError(
                f"SequenceParallel: sharding is of rank {there[0]} of {there[1]} with {s.heads_degree} to a shard; the model "
                f"is on rank {here[0]} of {here[1]} with {self.heads_axis}"
            )
        for name, why in (
            ("labels", "targets are shifted over the whole sequence, before it is sharded: pass shift_labels"),
            ("attention_mask", "padding is in the mask of the sharding, as a document of its own"),
        ):
            if inputs.get(name) is not None:
                raise ValueError(f"SequenceParallel: {name} was given with sharding, whose inputs are sharded; {why}")
            inputs.pop(name, None)
        if isinstance(inputs.get("mask"), Mask):
            s = s.with_mask(inputs.pop("mask"))
        for name, dim in self._seq_dims.items():
            value = inputs.get(name)
            if isinstance(value, Tensor) and dim is not None and value.shape[dim] != s.local_length:
                raise ValueError(
                    f"SequenceParallel: {name} has shape {tuple(value.shape)}; dim {dim} should have the {s.local_length} "
                    f"positions of rank {s.rank}, since sharding was given"
                )
        if self.adapter is not None:
            self.adapter.prepare_local(inputs, s)
        return s

    def _tell(self, s: Sharding) -> None:
        """Let every layer that asks for it know the sharding."""
        for module in self._model.modules():
            if _takes_part(module):
                setattr(module, "sharding", s)  # noqa: B010 - a type checker knows only tensors and modules here

    def _make_tiles(self, loss_tile: int | None, name: str | None) -> Tiles | None:
        if loss_tile is None:
            if name is not None:
                raise ValueError(f"SequenceParallel: head is {name!r} without loss_tile; it serves that alone")
            return None
        loss_tile = whole(
            loss_tile, "SequenceParallel: loss_tile", 1, needed="a number of tokens, 1 or more, is needed"
        )
        model = innermost(self._model)
        head = None if self.adapter is None else self.adapter.head
        if name is not None:
            try:
                head = model.get_submodule(name)
            except AttributeError:
                children = ", ".join(child for child, _ in model.named_children())
                raise ValueError(
                    f"SequenceParallel: head is {name!r}, and the model has no such module; its own are {children}"
                ) from None
        if head is None:
            raise ValueError(
                "SequenceParallel: loss_tile computes logits from hidden states; name the module that does, head='lm_head'"
            )
        tail = None if self.adapter is None else self.adapter.tail
        return Tiles(head, loss_tile, tail, self.group, type(model).__name__)

    def _length(self, inputs: dict[str, Any]) -> int:
        for name in ("input_ids", "inputs_embeds", *self._seq_dims):
            value = inputs.get(name)
            dim = self._seq_dims.get(name)
            if isinstance(value, Tensor) and dim is not None:
                if not -value.ndim <= dim < value.ndim:
                    raise ValueError(
                        f"SequenceParallel: {name} has shape {tuple(value.shape)}; dim {dim} is its sequence"
                    )
                return value.shape[dim]
        raise ValueError(
            f"SequenceParallel: none of {sorted(inputs)} is a sequence; name one with seq_dims={{'name': dim}}"
        )

    def _local(self, name: str, value: Any, s: Sharding) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name in self._seq_dims:
            dim = self._seq_dims[name]
            if dim is None:
                return value
            if not -value.ndim <= dim < value.ndim or value.shape[dim] != s.length:
                raise ValueError(
                    f"SequenceParallel: {name} has shape {tuple(value.shape)}; dim {dim} should have {s.length} positions. "
                    "Every rank passes the whole sequence"
                )
            return s.shard(value, dim)
        if s.length in value.shape:
            raise ValueError(
                f"SequenceParallel: {name} has shape {tuple(value.shape)}, and {s.length} is the length of the sequence; say "
                f"seq_dims={{'{name}': dim}} to shard it, or None in place of dim to pass it whole"
            )
        return value

    def _accepts(self, name: str) -> bool:
        return name in self._signature.parameters


def _with_loss(output: Any, loss: Tensor | None, logits: Tensor | None) -> Any:
    """The model's own object with a loss (its own, where there is none from here), or :class:`Output`."""
    loss = getattr(output, "loss", None) if loss is None else loss
    if dataclasses.is_dataclass(output) and not isinstance(output, type) and hasattr(output, "loss"):
        return dataclasses.replace(
            output, loss=loss, logits=logits
        )  # in Transformers, the loss comes first by place, too
    try:
        output.loss, output.logits = loss, logits
    except AttributeError:  # a tuple, or an object without a place for a loss
        return Output(loss, logits)
    return output


def innermost(model: Any) -> nn.Module:
    """The user's own module inside DDP and torch.compile, whose forward has the names of its inputs."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    inner: nn.Module = model
    return inner


def _who_names_inputs(model: nn.Module) -> nn.Module:
    """The module whose forward has the names of the inputs: wrappers around one child (PEFT) pass on ``*args, **kwargs``."""
    model = innermost(model)
    children = list(model.children())
    kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
    passes_on = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return _who_names_inputs(children[0]) if passes_on and len(children) == 1 else model


def with_padding(mask: Mask, attention_mask: Tensor | None, length: int) -> Mask:
    """``mask``, in which padding at either end of a row (0 in ``attention_mask [b, length]``) is a document of its own.

    No real token sees it. One copy to the host.
    """
    if attention_mask is None:
        return mask
    if attention_mask.ndim != 2 or attention_mask.shape[1] != length:
        raise ValueError(
            f"SequenceParallel: attention_mask has shape {tuple(attention_mask.shape)}; [batch, {length}] with 0 for padding "
            "is needed, other masks are given as mask=rf.causal & ..."
        )
    kept = (attention_mask != 0).cpu().numpy()
    if kept.all():
        return mask
    rows = []
    for row in kept:
        edges = (np.flatnonzero(row[1:] != row[:-1]) + 1).tolist()
        if row[[0, *edges]].sum() > 1:
            raise ValueError(
                "SequenceParallel: attention_mask pads between the tokens of a row; only its ends can be padded"
            )
        rows.append([0, *edges, len(row)])
    return mask & documents(rows)


def _takes_part(module: nn.Module) -> bool:
    return "sharding" in vars(module)


def _targets(inputs: dict[str, Any]) -> Tensor | None:
    """Take the labels out of ``inputs``, shifted over the whole sequence: position i holds the target of token i."""
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if labels is not None and shifted is not None:
        raise ValueError("SequenceParallel: labels and shift_labels were given; pass one of them")
    return shifted if labels is None else F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
