"""The one operator behind every attention, as ``torch.library`` sees it: an opaque step with registered autograd.

What it has to do is found through a *handle* (``recipe.py``).

Forward: partials over the shards that come by are added up in the accumulation dtype (float32; float64 for float64).
Backward: with the lse and delta of the whole row, p = exp(s - lse) is the final softmax, and gradients simply add.

    delta = rowsum(dout * out) - dlse        (the second term makes lse differentiable)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringflash.backend import select
from ringflash.circulate import Freight, circulate
from ringflash.intervals import intervals_of
from ringflash.partial import Partial, accumulation_dtype, owned
from ringflash.plan import Plan
from ringflash.recipe import recipes
from ringflash.reference import Scoring


@torch.library.custom_op("ringflash::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    handle: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor,
    scale: float,
    softcap: float,
    dropout_p: float,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    plan, wire = recipes[handle].bind(q.shape[1], k.shape[1])
    scoring = Scoring(scale, softcap, alibi_slopes, dropout_p, int(seed))
    engine = select(backend, q, v, scoring)
    dtype = accumulation_dtype(q.dtype)
    total = None if sinks is None else _sink(sinks, q, v)
    last = _last_visit(plan)

    def visit(shard: int, tensors: tuple[Tensor, ...]) -> None:
        nonlocal total
        kept = q.dtype if shard == last else dtype
        total = engine.attend(q, *tensors, intervals_of(plan, shard, q.device), scoring, total, kept)

    circulate(plan, wire, (k, v), visit)
    out, lse = owned(total, q, v)
    return out.to(q.dtype), lse


@torch.library.custom_op("ringflash::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    handle: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor,
    scale: float,
    softcap: float,
    dropout_p: float,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan, wire = recipes[handle].bind(q.shape[1], k.shape[1])
    scoring = Scoring(scale, softcap, alibi_slopes, dropout_p, int(seed))
    engine = select(backend, q, v, scoring)
    dtype = lse.dtype
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # once, and not in every visit
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    delta = engine.delta(dout, out, dlse)
    dq: Tensor | None = None
    last = _last_visit(plan)
    travelling = k.dtype if plan.ranks == 1 else dtype

    def visit(shard: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal dq
        dtypes = (q.dtype if shard == last else dtype, travelling)
        table = intervals_of(plan, shard, q.device)
        dq, *share = engine.attend_backward(dout, q, *tensors, lse, delta, table, scoring, dq, dtypes, deterministic)
        return tuple(share)

    dk, dv = circulate(plan, wire, (k, v), visit, home=Freight.like((k, v), dtype)) or ()
    dq = q.new_zeros(q.shape) if dq is None else dq
    dsinks = q.new_zeros(0)
    if sinks is not None:  # the sink's value is 0, so its ds is -p delta
        share = torch.exp(sinks.to(dtype)[:, None] - torch.where(lse == -torch.inf, 0.0, lse))
        dsinks = -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)
    return dq, _own(dk, k.dtype), _own(dv, v.dtype), dsinks


def _last_visit(plan: Plan) -> int | None:
    """The shard that this rank computes with last: results in their final dtype come from there."""
    return next((shard for step in reversed(plan.steps) for shard in step.visits), None)


def _sink(logits: Tensor, q: Tensor, v: Tensor) -> Partial:
    """Every query of this rank has seen the sinks ``[h]``: one row, broadcast."""
    batch, tokens, heads, _ = q.shape
    lse = logits.to(accumulation_dtype(q.dtype), copy=True)  # what becomes a carry is written to
    out = lse.new_zeros(v.shape[3]).expand(batch, tokens, heads, v.shape[3])
    return Partial(out, lse[None, :, None].expand(batch, heads, tokens))


def _own(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """What leaves an operator must not be a view of a buffer, and a parcel holds both gradients."""
    if gradient.numel() and gradient.dtype == dtype and gradient.untyped_storage().nbytes() == gradient.nbytes:
        return gradient
    return torch.empty(gradient.shape, dtype=dtype, device=gradient.device).copy_(gradient)


@attend.register_fake
def _(q, k, v, handle, sinks, alibi_slopes, seed, scale, softcap, dropout_p, backend, *_):  # type: ignore[no-untyped-def]
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=accumulation_dtype(q.dtype))
    return q.new_empty(batch, tokens, heads, v.shape[3]), lse


@attend_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, handle, sinks, *options):  # type: ignore[no-untyped-def]
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, handle, sinks, alibi_slopes, seed, *ctx.options = inputs
    if type(handle) is Tensor:  # and not a stand-in while a graph is captured
        ctx.recipe = recipes[handle]
    ctx.save_for_backward(q, k, v, *output, handle, sinks, alibi_slopes, seed)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    *saved, sinks, alibi_slopes, seed = ctx.saved_tensors
    dq, dk, dv, dsinks = attend_backward(dout, dlse, *saved, sinks, alibi_slopes, seed, *ctx.options)
    return dq, dk, dv, None, None if sinks is None else dsinks, *(None,) * 7


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "ringflash: attention can be differentiated once; the gradient of its gradient is not implemented "
        "(create_graph=True, gradient penalties, Hessians): use dense attention there"
    )


attend.register_autograd(_differentiate, setup_context=_save)
attend_backward.register_autograd(_refuse_second_derivative)
