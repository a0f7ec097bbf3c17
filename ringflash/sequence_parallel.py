"""A model that was written for one device, run on a sequence spread over many, in one line.

    model = rf.SequenceParallel(model, group)
    loss = model(input_ids=ids, labels=ids).loss        # the same global mean on every rank
    loss.backward()                                     # the same gradients on every rank

Everything but attention is local to a token. So the wrapper shards what has a sequence dimension, hands the model this
rank's part with its global positions, and takes care of the three things that go wrong when people do this by hand:
labels are shifted before they are sharded (the target of a shard's last token is on another rank), the mean is over the
unmasked tokens of all ranks (a rank may hold none), and gradients are summed as often as needed, not once more.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ringflash.gradients import GradientSum
from ringflash.layout import Layout
from ringflash.mask import Mask, causal, documents
from ringflash.partial import accumulation_dtype
from ringflash.route import Route
from ringflash.shard import Sharding
from ringflash.wire import Group, address, connect_all, resolve, resolve_axes

IGNORED = -100  # the label of a token without a target, as in torch.nn.functional.cross_entropy

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
    """What a wrapped model returns: ``loss`` (None without labels) and this rank's ``logits [b, s_local, vocab]``."""

    loss: Tensor | None
    logits: Tensor


class SequenceParallel(nn.Module):
    """Run ``model`` with its sequence spread over ``group``, as ``layout``, ``route`` and ``heads_axis`` say of a Sharding.

    Every rank of the group passes the same whole batch. ``input_ids``, ``position_ids``, ``labels`` and the other names
    of ``SEQUENCE_DIMS`` are sharded; further ones are named with ``seq_dims={"name": dim}`` (None: pass it whole). Any
    other tensor argument with a dimension as long as the sequence is an error. ``position_ids`` are made, global, if the
    model names them. ``attention_mask`` may pad either end of a row; padding becomes a document of its own. A mask passed in
    the call, ``model(..., mask=rf.causal & rf.documents(cu_seqlens))``, replaces ``mask`` for that batch.

    The model computes attention in modules that have a ``sharding`` attribute (``rf.RingAttention``, or your own with
    ``self.sharding = None`` and ``rf.ring_attention(q, k, v, self.sharding)``), and returns logits: a tensor, or an object
    with ``.logits`` (its ``.loss`` is set where it has one). With ``labels`` (shifted here) or ``shift_labels`` (shifted
    already) the loss is the mean cross entropy over all unmasked tokens of ``tokens_group`` (default ``group``): equal on
    all ranks, 0 if there are none.

    ``gradients="reduce"``: parameter gradients are summed over ``group`` after every backward. ``"engine"``: DDP, FSDP or
    ZeRO averages over ``tokens_group`` or more, and the loss is scaled so that its average is right.
    state_dict, parameter names and attributes are those of ``model``; ``model.sharding`` is that of the last forward.
    """

    module: nn.Module
    sharding: Sharding | None

    def __init__(
        self,
        model: nn.Module,
        group: Group = None,
        mask: Mask = causal,
        layout: str | Layout = "auto",
        gradients: Literal["reduce", "engine"] = "reduce",
        tokens_group: Group = None,
        seq_dims: Mapping[str, int | None] | None = None,
        route: str | Route = "auto",
        heads_axis: str | int | None = None,
    ) -> None:
        super().__init__()
        if gradients not in ("reduce", "engine"):
            raise ValueError(f"SequenceParallel: gradients is {gradients!r}; accepted are 'reduce' and 'engine'")
        if not any(_takes_part(m) for m in model.modules()):
            raise ValueError(
                f"SequenceParallel: no module of {type(model).__name__} has a sharding attribute, so every rank would attend "
                "to its own shard alone; use rf.RingAttention, or set self.sharding = None in your attention module and "
                "call rf.ring_attention(q, k, v, self.sharding)"
            )
        self.module = model
        self.sharding = None
        self._group, self._heads_axis = resolve_axes(group, heads_axis)
        self._mask, self._layout, self._route, self._gradients = mask, layout, route, gradients
        self._tokens_group = self._group if tokens_group is None else resolve(tokens_group)
        self._seq_dims = SEQUENCE_DIMS | dict(seq_dims or {})
        self._signature = inspect.signature(_innermost(model).forward)
        self._sum: GradientSum | None = None
        if gradients == "reduce":
            self._refuse_engines()
            if address(self._tokens_group)[1] != address(self._group)[1]:
                raise ValueError(
                    f"SequenceParallel: tokens_group has {address(self._tokens_group)[1]} ranks, group "
                    f"{address(self._group)[1]}; gradients='reduce' sums over group alone: use 'engine', with DDP or FSDP"
                )
            self._sum = GradientSum(model, connect_all(self._group))
        self._register_state_dict_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inner model's forward on this rank's part; returns :class:`Output`, or the model's own with ``loss`` set."""
        if self._sum is not None:
            self._refuse_engines()
            self._sum.watch()
        mask = kwargs.pop("mask") if isinstance(kwargs.get("mask"), Mask) else self._mask
        inputs = {**self._signature.bind_partial(*args).arguments, **kwargs}
        length = self._length(inputs)
        mask = _with_padding(mask, inputs.pop("attention_mask", None), length)
        s = Sharding(length, self._group, mask, self._layout, self._route, heads_axis=self._heads_axis)
        self.sharding = s
        self._tell(s)
        labels = _targets(inputs)
        labels = None if labels is None else self._local("labels", labels, s)
        local = {name: self._local(name, value, s) for name, value in inputs.items()}
        if "position_ids" not in local and self._accepts("position_ids"):
            device = next((x.device for x in local.values() if isinstance(x, Tensor)), None)
            local["position_ids"] = s.positions.to(device)[None]
        output = self.module(**local)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"SequenceParallel: the model returned a {type(output).__name__}; it should return logits, as a tensor or "
                "as the attribute logits of an object"
            )
        if logits.requires_grad:
            # activation checkpointing reads the sharding again, when another forward may have set another one
            logits.register_hook(lambda _: self._tell(s))
        loss = None if labels is None else self._loss(logits, labels)
        if isinstance(output, Tensor):
            return Output(loss, logits)
        try:
            output.loss = loss if labels is not None else output.loss
        except AttributeError:  # a tuple, a frozen dataclass, or an object without a place for a loss
            return Output(loss, logits)
        return output

    def _tell(self, s: Sharding) -> None:
        """Let every layer that asks for it know the sharding."""
        for module in self.module.modules():
            if _takes_part(module):
                setattr(module, "sharding", s)  # noqa: B010 - a type checker knows only tensors and modules here

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.to(accumulation_dtype(logits.dtype))
        here = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        tokens = (labels != IGNORED).sum()
        total = torch.stack([here.detach().double(), tokens.double()])
        connect_all(self._tokens_group).all_reduce(total)
        count = total[1].clamp_min(1)
        engine_ranks = address(self._tokens_group)[1] if self._gradients == "engine" else 1
        loss: Tensor = _Stated.apply(here * (engine_ranks / count).to(here.dtype), (total[0] / count).to(here.dtype))
        return loss

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

    def _refuse_engines(self) -> None:
        wrapped = isinstance(self.module, DistributedDataParallel)
        inside = getattr(DistributedDataParallel, "_active_ddp_module", None) is not None
        if wrapped or inside or any(hasattr(p, "device_mesh") for p in self.module.parameters()):
            raise ValueError(
                "SequenceParallel: the parameters belong to DDP or FSDP, which reduce gradients themselves; "
                "pass gradients='engine'"
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, *args: Any
    ) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(prefix, True, *args) if recurse else iter(())

    def named_buffers(self, prefix: str = "", recurse: bool = True, *args: Any) -> Iterator[tuple[str, Tensor]]:
        return self.module.named_buffers(prefix, True, *args) if recurse else iter(())

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallel:
        """A copy of the model in the same group, with hooks of its own."""
        groups = {"group": self._group, "tokens_group": self._tokens_group}
        return SequenceParallel(
            copy.deepcopy(self.module, memo),
            mask=self._mask,
            layout=self._layout,
            gradients=self._gradients,
            seq_dims=self._seq_dims,
            route=self._route,
            heads_axis=self._heads_axis,
            **groups,
        )


class _Stated(torch.autograd.Function):
    """A number whose value is stated, the same on all ranks, and whose gradient is that of this rank's share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _innermost(model: Any) -> nn.Module:
    """The user's own module inside DDP and torch.compile, whose forward has the names of its inputs."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    inner: nn.Module = model
    return inner


def _takes_part(module: nn.Module) -> bool:
    return "sharding" in vars(module)


def _targets(inputs: dict[str, Any]) -> Tensor | None:
    """Take the labels out of ``inputs``, shifted over the whole sequence: position i holds the target of token i."""
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if labels is not None and shifted is not None:
        raise ValueError("SequenceParallel: labels and shift_labels were given; pass one of them")
    return shifted if labels is None else F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def _with_padding(mask: Mask, attention_mask: Tensor | None, length: int) -> Mask:
    """Padding at either end of a row becomes a document of its own, which no real token sees."""
    if attention_mask is None:
        return mask
    if attention_mask.ndim != 2 or attention_mask.shape[1] != length:
        raise ValueError(
            f"SequenceParallel: attention_mask has shape {tuple(attention_mask.shape)}; [batch, {length}] with 0 for padding "
            "is needed, other masks are given as mask=rf.causal & ..."
        )
    if bool(attention_mask.all()):
        return mask
    rows = []
    for row in (attention_mask != 0).tolist():
        edges = [i for i in range(1, len(row)) if row[i] != row[i - 1]]
        if sum(row[i] for i in (0, *edges)) > 1:
            raise ValueError(
                "SequenceParallel: attention_mask pads between the tokens of a row; only its ends can be padded"
            )
        rows.append([0, *edges, len(row)])
    return mask & documents(rows)


def _drop_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}module.")]:
        state[prefix + key.removeprefix(f"{prefix}module.")] = state.pop(key)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}module.{key.removeprefix(prefix)}"] = state.pop(key)
