"""The one oracle of this suite: attention as in the textbook, dense, in float64, over the whole sequence.

It shares no code with the library: a mask comes in as a predicate written out from its definition, or as a boolean table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

Predicate = Callable[[int, int], bool]


def full() -> Predicate:
    return lambda q, k: True


def causal() -> Predicate:
    return lambda q, k: k <= q


def window(left: int | None, right: int | None) -> Predicate:
    return lambda q, k: (left is None or q - k <= left) and (right is None or k - q <= right)


def documents(offsets: Sequence[int]) -> Predicate:
    def document(p: int) -> int:
        return next((i for i, (a, b) in enumerate(pairwise(offsets)) if a <= p < b), -1)

    return lambda q, k: document(q) == document(k) != -1


def prefix(n: int) -> Predicate:
    return lambda q, k: q >= 0 and (k < n or k <= q)


def chunks(n: int) -> Predicate:
    return lambda q, k: q // n == k // n


def both(*predicates: Predicate) -> Predicate:
    return lambda q, k: all(p(q, k) for p in predicates)


def table(predicate: Predicate, queries: int, keys: int | None = None, q_offset: int = 0) -> Tensor:
    """Which keys each query sees: bool ``[queries, keys]``."""
    keys = queries if keys is None else keys
    cells = [[predicate(q + q_offset, k) for k in range(keys)] for q in range(queries)]
    return torch.tensor(cells, dtype=torch.bool).reshape(queries, keys)


class Answer(NamedTuple):
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``q, k, v`` ``[b, s, h, d]``, ``seen`` bool ``[.., queries, keys]``; out ``[b, s, h, d_v]``, lse ``[b, h, s]``.

    ``bias`` is added to scores, ``keep`` multiplies weights (dropout), ``sinks [h]`` are one more key of value 0.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~(seen if seen.ndim == 2 else seen[:, None]), -torch.inf)
    if sinks is not None:
        sink = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        scores, v = torch.cat([scores, sink], dim=-1), torch.cat([v, torch.zeros_like(v[:, :1])], dim=1)
        keep = keep if keep is None else torch.cat([keep, torch.ones_like(keep[..., :1])], dim=-1)
    lse = torch.logsumexp(scores, dim=-1) if scores.shape[-1] else scores.sum(-1) - torch.inf
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    weights = weights if keep is None else weights * keep
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def answer(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, dout: Tensor, dlse: Tensor | None = None, **options: Any
) -> Answer:
    """Out, lse and gradients for the loss ``(out * dout).sum() + (lse * dlse).sum()``, all in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, lse = attention(q, k, v, seen, **options)
    loss = (out * dout.double()).sum()
    if dlse is not None:
        loss = loss + torch.where(lse == -torch.inf, 0.0, lse * dlse.double()).sum()
    grads = torch.autograd.grad(loss, (q, k, v), allow_unused=True)
    dq, dk, dv = (torch.zeros_like(x) if g is None else g for x, g in zip((q, k, v), grads, strict=True))
    return Answer(out.detach(), lse.detach(), dq, dk, dv)
