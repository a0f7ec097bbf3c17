"""Partial attention results, and how they add up.

Attention over a set of keys is a weighted mean. Two means over disjoint key sets combine if each remembers its weight,
and the weight is exp(lse):

    lse = log(exp(a.lse) + exp(b.lse))        out = exp(a.lse - lse) a.out + exp(b.lse - lse) b.out

So partials form a commutative monoid (identity: out = 0, lse = -inf). Every distributed form of attention in this
library is a choice of the order in which these additions happen.

Milakov & Gimelshein 2018 (arXiv 1805.02867); Dao et al. 2022 (arXiv 2205.14135).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.numbers import brief
from ringflash.tensors import require_dense

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Partial(NamedTuple):
    """Attention over some of the keys: ``out [b, s, h, d]`` and its natural log-sum-exp ``lse [b, h, s]``.

    Both are kept in the accumulation dtype: float32, or float64 for float64 inputs. A row that has seen no key has
    ``out = 0`` and ``lse = -inf``, never NaN.
    """

    out: Tensor
    lse: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partials and travelling gradients of ``dtype`` inputs are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nothing(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Partial:
    """The identity of :func:`merge`: what queries have seen before they met any key."""
    out = torch.zeros(batch, tokens, heads, head_dim, dtype=dtype, device=device)
    return Partial(out, torch.full((batch, heads, tokens), -torch.inf, dtype=dtype, device=device))


def owned(carry: Partial | None, q: Tensor, v: Tensor) -> Partial:
    """What attention over more keys may add to in place: ``carry`` in memory of its own, or :func:`nothing`."""
    if carry is None:
        batch, tokens, heads, _ = q.shape
        return nothing(batch, tokens, heads, v.shape[3], accumulation_dtype(q.dtype), q.device)
    return Partial(*(x.contiguous() for x in carry))  # a sink is one row, broadcast


def sink(logits: Tensor) -> Partial:
    """An attention sink: one imaginary key per head with this logit and the value zero. ``logits [h]``.

    It takes its part of the softmax and adds nothing. Broadcasts against any partial:

    >>> part = Partial(torch.ones(1, 2, 3, 4), torch.zeros(1, 3, 2))
    >>> merge(part, sink(torch.zeros(3))).out[0, 0, 0]
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    require_dense(logits, "sink: logits")
    if logits.ndim != 1 or logits.dtype not in _FLOATS:
        raise ValueError(
            f"sink: logits is {logits.dtype} of shape {tuple(logits.shape)}; floats, one per head, are needed"
        )
    return Partial(logits.new_zeros(1, 1, len(logits), 1), logits[None, :, None])


def merge(a: Partial, b: Partial) -> Partial:
    """Combine attention over two disjoint sets of keys. Differentiable; dimensions of 1 (a sink's) broadcast.

    Rows that have seen no key (``lse == -inf``, or FlashAttention 2's ``+inf``) take the other side unchanged, whatever
    their out holds; a row that neither side has seen stays zero. Only differences of lse are exponentiated, so nothing
    overflows.

    >>> a, b = (Partial(torch.full((1, 1, 1, 1), x), torch.zeros(1, 1, 1)) for x in (1.0, 3.0))
    >>> merge(a, b).out.item(), round(merge(a, b).lse.item(), 4)
    (2.0, 0.6931)
    """
    _check("a", a)
    _check("b", b)
    if a.out.device != b.out.device:
        raise ValueError(f"merge: a is on {a.out.device}, b on {b.out.device}; one device is needed")
    if any(x != y and 1 not in (x, y) for x, y in zip(a.out.shape, b.out.shape, strict=True)):
        shapes = f"a.out has shape {tuple(a.out.shape)}, b.out {tuple(b.out.shape)}"
        raise ValueError(f"merge: {shapes}; they must agree, but for dimensions of 1")
    lse, weight_a, weight_b = _weigh(a.lse, b.lse)
    return Partial(_scaled(a.out, weight_a) + _scaled(b.out, weight_b), lse)


def _check(name: str, part: object) -> None:
    """Is this attention over some keys?"""
    if not isinstance(part, Partial):
        hint = ": rf.Partial(*pair)" if isinstance(part, tuple) and len(part) == 2 else ""
        raise TypeError(f"merge: {name} is {brief(part)} of type {type(part).__name__}; an rf.Partial is needed{hint}")
    for dims, field, x in (("[b, s, h, d]", "out", part.out), ("[b, h, s]", "lse", part.lse)):
        require_dense(x, f"merge: {name}.{field}")
        if x.ndim != dims.count(",") + 1 or x.dtype not in _FLOATS:
            raise ValueError(f"merge: {name}.{field} is {x.dtype} of shape {tuple(x.shape)}; floats {dims} are needed")
    batch, tokens, heads, _ = part.out.shape
    if part.lse.shape != (batch, heads, tokens) or part.lse.device != part.out.device:
        raise ValueError(
            f"merge: {name}.lse has shape {tuple(part.lse.shape)} on {part.lse.device}; {name}.out, of shape "
            f"{tuple(part.out.shape)} on {part.out.device}, needs {(batch, heads, tokens)} there"
        )


def absorb(total: Partial, part: Partial) -> None:
    """:func:`merge` in place, for a loop that owns ``total``: ``total = merge(total, part)``."""
    lse, weight_total, weight_part = _weigh(total.lse, part.lse)
    total.out.mul_(_per_row(weight_total)).add_(_scaled(part.out, weight_part))
    total.lse.copy_(lse)


def _weigh(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The joint lse ``[b, h, s]`` of two, and the weight of each in the joint mean (0 for a side that saw nothing)."""
    a, b = (torch.where(x == torch.inf, -torch.inf, x) for x in (a, b))
    top = torch.maximum(a, b).detach()
    unseen = top == -torch.inf
    top = torch.where(unseen, 0.0, top)
    weight_a, weight_b = torch.exp(a - top), torch.exp(b - top)
    total = torch.where(unseen, 1.0, weight_a + weight_b)
    lse = torch.where(unseen, -torch.inf, top + torch.log(total))
    return lse, weight_a / total, weight_b / total


def _scaled(out: Tensor, weight: Tensor) -> Tensor:
    weight = _per_row(weight)
    return torch.where(weight == 0, 0.0, out) * weight  # a block that nobody wrote may hold NaN


def _per_row(x: Tensor) -> Tensor:
    """``[b, h, s]`` to ``[b, s, h, 1]``, to scale the rows of an out."""
    return x.transpose(1, 2).unsqueeze(-1)
