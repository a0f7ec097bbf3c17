"""The loss of a sequence that is spread over ranks: one mean over the tokens of all, and the gradient that belongs to it.

    value       sum over the tokens of all ranks / number of their targets       equal on all ranks
    gradient    that of this rank's own sum / number of targets, x ranks where an engine will average

A mean of means would be wrong (ranks hold different numbers of targets, some none), and so would a gradient of the whole
value on every rank.

With a *tile* the loss is computed from hidden states, and logits never exist as a whole. The model is not asked to know:
a catch at its head takes the hidden states and lets the first token through. The logits of that token come out at the
model's end, and show whether something happens to logits on the way that the loss would leave out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringflash.groups import Group, address, connect_all
from ringflash.partial import accumulation_dtype
from ringflash.shard import Sharding
from ringflash.tiling import tiled_cross_entropy

IGNORED = -100  # the label of a token without a target, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Mean:
    """Cross entropy over the unmasked tokens of all ranks of ``group``; ``engine``: somebody averages gradients over them."""

    group: Group
    engine: bool

    def of(self, here: Tensor, labels: Tensor, strange: Tensor, items: Tensor | float | None) -> Tensor:
        """The loss from the sum over this rank's tokens, 0-dim.

        ``strange``: how many labels of this rank are outside the vocabulary; if any rank has one, all of them raise.
        ``items``: the caller divides and scales, as Transformers' Trainer does, and gets this rank's share of sum / items.
        """
        if items is not None:
            _refuse(strange, "of this rank")
            return here / torch.as_tensor(items, device=here.device).to(here.dtype)
        total = torch.stack([here.detach().double(), (labels != IGNORED).sum().double(), strange.double()])
        connect_all(self.group).all_reduce(total)
        _refuse(total[2], "of all ranks")
        count = total[1].clamp_min(1)
        ranks = address(self.group)[1] if self.engine else 1
        loss: Tensor = _Stated.apply(here * (ranks / count).to(here.dtype), (total[0] / count).to(here.dtype))
        return loss


def in_vocabulary(labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Labels with those outside ``[0, size)`` ignored, and the number of these, 0-dim: one rank alone must not raise."""
    strange = (labels != IGNORED) & ((labels < 0) | (labels >= size))
    return torch.where(strange, IGNORED, labels), strange.sum()


def _refuse(strange: Tensor, whose: str) -> None:
    """Raise if there are labels outside the vocabulary; on a GPU the device does, since nobody waits for it here."""
    if strange.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(strange == 0, f"SequenceParallel: labels {whose} are outside the vocabulary")
    elif strange:
        raise ValueError(
            f"SequenceParallel: {int(strange)} labels {whose} are outside the vocabulary of the logits; {IGNORED} is no target"
        )


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits ``[b, s, vocab]`` and labels ``[b, s]``, in the accumulation dtype."""
    wide = logits.to(accumulation_dtype(logits.dtype)).flatten(0, 1)
    return F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="sum")


class Tiles:
    """Sums of cross entropy from the hidden states that enter ``head``, ``tile`` tokens at a time.

    ``tail`` is what the model, here called ``name``, is known to do to logits after its head. ``expect`` before a forward,
    ``sum`` after it.
    """

    def __init__(
        self, head: nn.Module, tile: int, tail: Callable[[Tensor], Tensor] | None, group: Group, name: str
    ) -> None:
        self._head, self._tile, self._tail, self._group, self._name = head, tile, tail, group, name
        self._catch = _stand_at(head)

    def expect(self, tokens: int | None) -> None:
        """In the next forward, stop the hidden states of so many tokens before the head; None: let everything pass."""
        self._catch.tokens, self._catch.hidden, self._catch.first = tokens, None, None

    def sum(self, logits: Tensor, labels: Tensor, s: Sharding) -> Tensor:
        """Over this rank's tokens. ``logits`` are what the model returned: those of the first token."""
        hidden, first = self._catch.hidden, self._catch.first
        self.expect(None)
        if hidden is None or first is None:
            raise ValueError(
                f"SequenceParallel: loss_tile is {self._tile}, and nothing entered the head of {self._name}"
            )
        self._refuse_unknown_tail(first, logits)
        calls = -(-len(hidden) * s.most_tokens // self._tile)
        here = tiled_cross_entropy(self._logits, hidden, labels, self._tile, calls=calls)
        if logits.requires_grad:  # DDP, FSDP and ZeRO watch what the model returned
            here = _Tied.apply(here, logits)
        return here

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden)
        return logits if self._tail is None else self._tail(logits)

    @torch.no_grad()
    def _refuse_unknown_tail(self, first: Tensor, logits: Tensor) -> None:
        """Are the logits of the first token at the model's end those that its head made? All ranks decide together.

        In every forward, and to the bit: a cap shows once logits have grown. Casts do not count. Waits for the device.
        """
        ours, allowed = first if self._tail is None else self._tail(first), 0.0
        changed = ours is not first
        coarse = max(ours.dtype, logits.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        ours, theirs = ours.to(coarse), logits.to(coarse)
        if changed and ours.numel():  # by the same operations, but there they may have been fused
            allowed = 16 * torch.finfo(coarse).eps * float(ours.abs().amax())
        same = ours.shape == theirs.shape and torch.allclose(theirs, ours, rtol=0.0, atol=allowed, equal_nan=True)
        other = torch.tensor(float(not same), device=logits.device)
        connect_all(self._group).all_reduce(other)
        if other:
            raise ValueError(
                f"SequenceParallel: {self._name} changes logits after its head, in a way that is not known here, so a loss "
                "from hidden states would be another one; leave loss_tile out"
            )


@dataclass
class _Catch:
    """Stands at a head: the hidden states of ``tokens`` that it stopped, and the logits of the first of them."""

    tokens: int | None = None
    hidden: Tensor | None = None
    first: Tensor | None = None


def _stand_at(head: nn.Module) -> _Catch:
    """The catch at ``head``. It is kept in the module, so that a copy of the model has one of its own."""
    catch = vars(head).get("ringflash_catch")
    if not isinstance(catch, _Catch):
        catch = vars(head)["ringflash_catch"] = _Catch()
        head.register_forward_pre_hook(_stop_here)
        head.register_forward_hook(_note_first)
    return catch


def _stop_here(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    catch = vars(head)["ringflash_catch"]
    if catch.tokens is None:
        return None
    hidden = args[0] if args else None
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[1] != catch.tokens:
        came = f"a tensor of shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else "no tensor by place"
        raise ValueError(
            f"SequenceParallel: {came} entered the head ({type(head).__name__}); with "
            f"loss_tile these are the hidden states [batch, {catch.tokens}, dim] of this rank"
        )
    catch.hidden, catch.tokens = hidden, None
    return (hidden[:, :1], *args[1:])


def _note_first(head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
    catch = vars(head)["ringflash_catch"]
    if catch.hidden is not None and catch.first is None:
        catch.first = logits.detach().clone()  # what follows may change logits in place


class _Stated(torch.autograd.Function):
    """A number whose value is stated, the same on all ranks, and whose gradient is that of this rank's share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Tied(torch.autograd.Function):
    """A number as it is, whose backward also passes through ``output``, with gradient zero."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, output: Tensor) -> Tensor:
        ctx.shape, ctx.like = output.shape, output.new_empty(0)
        return number.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.like.new_zeros(ctx.shape)
