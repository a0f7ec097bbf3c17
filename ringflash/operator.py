"""The one operator behind every attention, as ``torch.library`` sees it: an opaque step with registered autograd.

What it has to do is found through a *handle* (``recipe.py``).

Forward: partials over the shards that come by are added up in the accumulation dtype (float32; float64 for float64).
Backward: with the lse and delta of the whole row, p = exp(s - lse) is the final softmax, and gradients simply add.

    delta = rowsum(dout * out) - dlse        (the second term makes lse differentiable)
"""

from __future__ import annotations

from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringflash.backend import Backend, select
from ringflash.circulate import Cargo, Home, circulate
from ringflash.door import enter
from ringflash.errors import RingflashError
from ringflash.freight import Freight
from ringflash.guard import KEY_GRADIENTS, KEYS, QUERIES, QUERY_GRADIENTS, Guard
from ringflash.intervals import intervals_of
from ringflash.laws import obey
from ringflash.partial import Partial, accumulation_dtype, owned
from ringflash.plan import Cost, Plan, cheaper_backward
from ringflash.recipe import recipes
from ringflash.reference import Scoring
from ringflash.ulysses import Swap
from ringflash.wire import Wire


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
    bound = recipes[handle].bind(q.shape[1], k.shape[1])
    plan, wire, swap, _ = bound
    scoring = Scoring(scale, softcap, alibi_slopes, dropout_p, int(seed))
    guard = enter("forward", bound, (q, k, v), scoring, sinks, backend, deterministic)
    if swap is None:
        results = _forward(plan, wire, guard, backend, scoring, sinks, q, k, v)
        guard.close()
        return results
    heads = q.shape[2], k.shape[2]
    mine = swap.share(*heads).queries
    scoring, sinks = scoring.of_heads(mine), None if sinks is None else sinks[mine]
    # what is pooled lives as long as the call
    out, lse = _forward(plan, wire, guard, backend, scoring, sinks, *chain(*swap.pool((q,), (k, v), guard)))
    (out, rows), _ = swap.spread((out, lse.transpose(1, 2)), (), *heads, guard)
    guard.close()
    return out, rows.transpose(1, 2).contiguous()


def _forward(
    plan: Plan,
    wire: Wire,
    guard: Guard,
    backend: str,
    scoring: Scoring,
    sinks: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    """Out in the dtype of q, and lse, over all shards that come by."""
    engine = select(backend, q, v, scoring)
    dtype = accumulation_dtype(q.dtype)
    total = None if sinks is None else _sink(sinks, q, v)
    last = _last_visit(plan)
    numbers = count()

    def visit(shard: int, tensors: tuple[Tensor, ...]) -> None:
        nonlocal total
        kept = q.dtype if shard == last else dtype
        table = intervals_of(plan, shard, q.device)
        twice = guard.repeats(next(numbers), len(plan.meetings))
        carried = Partial(total.out.clone(), total.lse.clone()) if twice and total else total  # a carry is written to
        total = engine.attend(q, *tensors, table, scoring, total, kept)
        if twice:
            guard.same(f"visit of shard {shard}", total, engine.attend(q, *tensors, table, scoring, carried, kept))

    circulate(plan, wire, Cargo(KEYS, (k, v)), visit, guard=guard)
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
    bound = recipes[handle].bind(q.shape[1], k.shape[1])
    plan, wire, swap, _ = bound
    scoring = Scoring(scale, softcap, alibi_slopes, dropout_p, int(seed))
    guard = enter("backward", bound, (q, k, v), scoring, sinks, backend, deterministic, {"dout": dout, "dlse": dlse})
    heads, dtypes = (q.shape[2], k.shape[2]), (q.dtype, k.dtype, v.dtype)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # once, and not in every visit
    delta = select(backend, q, v, scoring).delta(dout, out, dlse)
    dsinks = q.new_zeros(0) if sinks is None else _sink_gradient(sinks, lse, delta)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    if swap is None:
        handed_over = k.dtype if plan.ranks == 1 else lse.dtype  # what is still to be summed stays wide
        way = _Way(plan, wire, guard, backend, scoring, deterministic, handed_over)
        gradients = _backward(way, q, dout, lse, delta, k, v)
    else:
        mine = scoring.of_heads(swap.share(*heads).queries)
        way = _Way(plan, wire, guard, backend, mine, deterministic, lse.dtype)
        gradients = _pooled_backward(way, swap, q, dout, lse, delta, k, v)
        (dq,), shares = swap.spread(gradients[:1], gradients[1:], *heads, guard)
        gradients = (dq, *shares)
    guard.close()
    dq, dk, dv = (_own(gradient, dtype) for gradient, dtype in zip(gradients, dtypes, strict=True))
    if bound.watched is not None and guard.check.numbers:
        rows = out, lse, dout, dlse
        obey(guard, bound.watched.accord.everyone, scoring, sinks is not None, (q, k, v), (dq, dk, dv), rows)
    return dq, dk, dv, dsinks


class _Way(NamedTuple):
    """How a backward is to be done, whatever its tensors are."""

    plan: Plan
    wire: Wire
    guard: Guard
    backend: str
    scoring: Scoring
    deterministic: bool
    handed_over: torch.dtype
    """In which dk and dv are returned."""


def _pooled_backward(way: _Way, swap: Swap, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``_backward`` with all tokens of the ring's shard and this rank's heads; what is pooled lives as long as the call."""
    q, dout, lse, delta, k, v = tensors
    rows = (x.transpose(1, 2) for x in (lse, delta))
    (q, dout, lse, delta), (k, v) = swap.pool((q, dout, *rows), (k, v), way.guard)
    lse, delta = (x.transpose(1, 2).contiguous() for x in (lse, delta))
    return _backward(way, q, dout, lse, delta, k, v)


def _backward(
    way: _Way, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    """dq in the dtype of q, dk and dv for what this rank holds."""
    engine = select(way.backend, q, v, way.scoring)
    plan = cheaper_backward(way.plan, *_costs(q, k, v, lse.dtype))
    how = (way.wire, way.guard, engine, way.scoring, way.deterministic, way.handed_over)
    work = _Backward(plan, *how, q, k, v, dout, lse, delta)
    dq, dk, dv = work.keys_travel() if plan.travels == "keys" else work.queries_travel()
    return dq.to(q.dtype), dk, dv


class _Backward(NamedTuple):
    """What both sides need to travel; both ways return dq, dk, dv."""

    plan: Plan
    wire: Wire
    guard: Guard
    engine: Backend
    scoring: Scoring
    deterministic: bool
    handed_over: torch.dtype
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor

    def keys_travel(self) -> tuple[Tensor, ...]:
        """Keys and values come by; dq stays here, dk and dv go home."""
        plan, q, k, v, dtype = self.plan, self.q, self.k, self.v, self.lse.dtype
        dq: Tensor | None = None
        last = _last_visit(plan)

        def visit(shard: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal dq
            dtypes = (q.dtype if shard == last else dtype, self.handed_over)
            table = intervals_of(plan, shard, q.device)
            dq, *share = self.engine.attend_backward(
                self.dout, q, *tensors, self.lse, self.delta, table, self.scoring, dq, dtypes, self.deterministic
            )
            return tuple(share)

        home = Home(KEY_GRADIENTS, Freight.like((k, v), dtype))
        dk, dv = circulate(plan, self.wire, Cargo(KEYS, (k, v)), visit, home, self.guard) or ()
        return (q.new_zeros(q.shape) if dq is None else dq), dk, dv

    def queries_travel(self) -> tuple[Tensor, ...]:
        """Queries come by with all that their rows need; dk and dv stay here, dq goes home."""
        plan, k, v, dtype = self.plan, self.k, self.v, self.lse.dtype
        sums: list[Tensor] = []

        def visit(shard: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            q, dout, *rows = tensors
            lse, delta = (x.transpose(1, 2).contiguous() for x in rows)
            table = intervals_of(plan, shard, k.device)
            dq, *share = self.engine.attend_backward(
                dout, q, k, v, lse, delta, table, self.scoring, None, (dtype, dtype), self.deterministic
            )
            if sums:
                for total, mine in zip(sums, share, strict=True):
                    total.add_(mine)
            else:
                sums.extend(share)
            return (dq,)

        rows = (x.transpose(1, 2).contiguous() for x in (self.lse, self.delta))
        cargo = Cargo(QUERIES, (self.q, self.dout, *rows))
        home = Home(QUERY_GRADIENTS, Freight.like((self.q,), dtype))
        (dq,) = circulate(plan, self.wire, cargo, visit, home, self.guard) or ()
        dk, dv = sums or (k.new_zeros(k.shape), v.new_zeros(v.shape))
        return dq, dk, dv


def _costs(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Bytes per token if keys travel, and if queries do: k, v against dk, dv; q, dout, lse, delta against dq."""
    dims, size = k.shape[3] + v.shape[3], q.element_size()
    keys = Cost(k.shape[2] * dims * size, k.shape[2] * dims * dtype.itemsize)
    queries = Cost(q.shape[2] * (dims * size + 2 * dtype.itemsize), q.shape[2] * q.shape[3] * dtype.itemsize)
    return keys, queries


def _sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The sink's value is 0, so its ds is -p delta; summed over this rank's queries."""
    share = torch.exp(sinks.to(lse.dtype)[:, None] - torch.where(lse == -torch.inf, 0.0, lse))
    return -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)


def _last_visit(plan: Plan) -> int | None:
    """The shard that this rank computes with last: results in their final dtype come from there."""
    return plan.meetings[-1].shard if plan.meetings else None


def _sink(logits: Tensor, q: Tensor, v: Tensor) -> Partial:
    """Every query of this rank has seen the sinks ``[h]``: one row, broadcast."""
    batch, tokens, heads, _ = q.shape
    lse = logits.to(accumulation_dtype(q.dtype), copy=True)  # what becomes a carry is written to
    out = lse.new_zeros(v.shape[3]).expand(batch, tokens, heads, v.shape[3])
    return Partial(out, lse[None, :, None].expand(batch, heads, tokens))


def _own(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """What leaves an operator must not be a view of a buffer, and a parcel holds both gradients."""
    if (
        gradient.numel()
        and gradient.dtype == dtype
        and gradient.is_contiguous()
        and gradient.untyped_storage().nbytes() == gradient.nbytes
    ):
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
    raise RingflashError(
        "flash_attention, ring_attention: attention can be differentiated once; the gradient of its gradient is not there "
        "(create_graph=True, gradient penalties, Hessians): use dense attention there"
    )


attend.register_autograd(_differentiate, setup_context=_save)
attend_backward.register_autograd(_refuse_second_derivative)
