"""A model that was written for one device, run on a sequence spread over many, in one line.

    model = rf.SequenceParallel(model, group)
    loss = model(input_ids=ids, labels=ids).loss        # the same global mean on every rank
    loss.backward()                                     # the same gradients on every rank

What goes into the model and what comes out of it is spread in ``spread.py``; here is the module around it, which is the
model to everybody else (names, state_dict, attributes), and which sums gradients as often as needed, not once more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ringflash.accord import accord_of, tell
from ringflash.check import settle
from ringflash.gradients import GradientSum
from ringflash.groups import Group, address, connect_all
from ringflash.layout import Layout
from ringflash.mask import Mask, causal
from ringflash.route import Route
from ringflash.shard import Sharding
from ringflash.spread import Spread
from ringflash.terms import HIDDEN, digest_of


class SequenceParallel(nn.Module):
    """Run ``model`` with its sequence spread over ``group``, as ``layout``, ``route`` and ``heads_axis`` say of a Sharding.

    Every rank of the group passes the same whole batch. ``input_ids``, ``position_ids``, ``labels`` and the other names
    of ``spread.SEQUENCE_DIMS`` are sharded; further ones are named with ``seq_dims={"name": dim}`` (None: pass it whole).
    Any other tensor argument with a dimension as long as the sequence is an error. ``position_ids`` are made, global, if the
    model names them. ``attention_mask`` may pad either end of a row; padding becomes a document of its own. A mask passed in
    the call, ``model(..., mask=rf.causal & rf.documents(cu_seqlens))``, replaces ``mask`` for that batch. With
    ``model(..., sharding=s)`` the inputs are this rank's parts already (and the labels ``shift_labels``).

    The model computes attention in modules that have a ``sharding`` attribute (``rf.RingAttention``, or your own with
    ``self.sharding = None`` and ``rf.ring_attention(q, k, v, self.sharding)``), and returns logits: a tensor, or an object
    with ``.logits`` (its ``.loss`` is set where it has one). With ``labels`` (shifted here) or ``shift_labels`` (shifted
    already) the loss is the mean cross entropy over all unmasked tokens of ``tokens_group`` (default ``group``): equal on
    all ranks, 0 if there are none. A model of Transformers takes part once ``ringflash.integrations.transformers`` is
    imported. With ``num_items_in_batch=n`` the loss is this rank's share of the sum over n, and nobody scales it.

    ``loss_tile``: compute the loss from hidden states, so many tokens at a time, with recomputation in backward: logits,
    the largest tensor of a long sequence, never exist, and are returned as None. ``head`` names the module that makes them
    (a Transformers model knows its own).

    ``gradients="reduce"``: parameter gradients are summed over ``group`` after every backward. ``"engine"``: DDP, FSDP or
    ZeRO averages over ``tokens_group`` or more, and the loss is scaled so that its average is right.
    state_dict, parameter names and attributes are those of ``model``; ``model.sharding`` is that of the last forward.
    ``check``: how closely ranks watch each other, as in ``Sharding``.
    """

    module: nn.Module

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
        loss_tile: int | None = None,
        head: str | None = None,
        check: str | None = None,
    ) -> None:
        super().__init__()
        if gradients not in ("reduce", "engine"):
            raise ValueError(f"SequenceParallel: gradients is {gradients!r}; accepted are 'reduce' and 'engine'")
        if any(isinstance(module, SequenceParallel) for module in model.modules()):
            raise ValueError(
                f"SequenceParallel: {type(model).__name__} is or holds a SequenceParallel, which would cut its part of the "
                "sequence again; wrap the inner model alone"
            )
        self._given: dict[str, Any] = dict(
            layout=layout, seq_dims=seq_dims, route=route, loss_tile=loss_tile, head=head, check=check
        )
        self._mask, self._gradients = mask, gradients
        self.module = model
        self.spread = Spread(
            model,
            group,
            mask,
            heads_axis=heads_axis,
            engine=gradients == "engine",
            tokens_group=tokens_group,
            **self._given,
        )
        self._sum: GradientSum | None = None
        if gradients == "reduce":
            self._refuse_engines()
            tokens, mine = address(self.spread.tokens_group)[1], address(self.spread.group)[1]
            if tokens != mine:
                raise ValueError(
                    f"SequenceParallel: tokens_group has {tokens} ranks, group {mine}; gradients='reduce' sums over group "
                    "alone: use 'engine', with DDP or FSDP"
                )
            self._sum = _sum_once(model, self.spread.group, check)
        self._register_state_dict_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    @property
    def sharding(self) -> Sharding | None:
        """That of the last forward; None before it."""
        return self.spread.sharding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inner model's forward on this rank's part; returns :class:`Output`, or the model's own with ``loss`` set."""
        if self._sum is not None:
            self._refuse_engines()
            self._sum.watch()
        try:
            return self.spread.leave(self.module(**self.spread.enter(args, kwargs)))
        except Exception as error:
            tell(self.spread.group, error)
            raise
        finally:
            self.spread.forget()

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: a cache over shards is not there yet, and without one every rank would decode from its own shard alone."""
        raise RuntimeError(
            "SequenceParallel: generate is not available on a sequence that is spread over ranks; decode with the model alone "
            "(for Transformers, loaded with attn_implementation='sdpa')"
        )

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
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(prefix, True, remove_duplicate) if recurse else iter(())

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        return self.module.named_buffers(prefix, True, remove_duplicate) if recurse else iter(())

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallel:
        """A copy of the model in the same group, with hooks of its own."""
        return SequenceParallel(
            copy.deepcopy(self.module, memo),
            group=self.spread.group,
            mask=self._mask,
            gradients=self._gradients,
            tokens_group=self.spread.tokens_group,
            heads_axis=self.spread.heads_axis,
            **self._given,
        )


class _SumOver(GradientSum):
    """A sum that knows its group, in which all ranks must have the same parameters."""

    def __init__(self, model: nn.Module, group: Group, check: str | None) -> None:
        super().__init__(model, connect_all(group))
        self.group, self._check = group, settle(check)

    def _compare(self, model: nn.Module) -> None:
        if not self._check.compares:
            return
        named = [(name, list(p.shape), str(p.dtype)) for name, p in model.named_parameters() if p.requires_grad]
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        what = "parameters that learn"
        texts = {what: f"{len(named)}, of {numbers:,} numbers", what + HIDDEN: digest_of({what: str(named)})}
        name = "sum of gradients"
        accord_of(self.group).enter(name, (name, *texts.values()), None, texts)


_sums: WeakKeyDictionary[nn.Module, _SumOver] = WeakKeyDictionary()  # a model's sum lives as long as the model


def _sum_once(model: nn.Module, group: Group, check: str | None) -> GradientSum:
    """What sums the gradients of ``model``. A model that is wrapped again keeps the one it has: two would sum twice."""
    if address(group)[1] == 1:
        return GradientSum(model, connect_all(group))
    known = _sums.get(model)
    if known is None:
        known = _sums[model] = _SumOver(model, group, check)
    if known.group != group:
        raise ValueError(
            "SequenceParallel: an earlier wrapper sums the gradients of model over another group; wrap copy.deepcopy(model)"
        )
    return known


def _drop_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}module.")]:
        state[prefix + key.removeprefix(f"{prefix}module.")] = state.pop(key)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}module.{key.removeprefix(prefix)}"] = state.pop(key)
