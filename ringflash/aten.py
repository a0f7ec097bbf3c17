"""PyTorch's flash attention for CPUs as the block kernel of a ring: fast on a laptop and in CI.

The operator knows full and top-left causal rectangles, or an additive mask: the three kinds of tile into which row
intervals are cut (``intervals.py``). Each tile is one call, and its result is one more partial.

It has traps, all guarded here: an empty q or k kills the process; a row that sees nothing comes back with lse 0; lse =
-inf in backward gives NaN; a last dimension that is not contiguous, or lengths that differ, give wrong numbers silently.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ringflash import reference
from ringflash.intervals import Intervals, Tile
from ringflash.partial import Partial, absorb, owned
from ringflash.reference import Scoring

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    scoring: Scoring,
    carry: Partial | None = None,
    dtype: torch.dtype = torch.float32,
) -> Partial:
    """As :func:`ringflash.reference.attend`, on a CPU and without further options."""
    total = owned(carry, q, v)
    q, k, v = (_ready(x, total.out.dtype) for x in (q, k, v))
    for rows, tile in _tiles_of_batch(q, intervals):
        bias, blind = _bias(tile, intervals, rows, q.dtype)
        queries, keys = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
        out, lse = _forward(
            *(x.transpose(1, 2) for x in (q[rows, queries], k[rows, keys], v[rows, keys])),
            0.0,
            tile.kind == "causal",
            attn_mask=bias,
            scale=scoring.scale,
        )
        if blind is not None:
            lse = lse.masked_fill(blind, -torch.inf)
        absorb(Partial(total.out[rows, queries], total.lse[rows, :, queries]), Partial(out.transpose(1, 2), lse))
    return Partial(total.out.to(dtype), total.lse)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    intervals: Intervals,
    scoring: Scoring,
    carry: Tensor | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`ringflash.reference.attend_backward`.

    The operator takes no delta: it forms rowsum(dout * out) itself. So it is given, in place of out, the multiple of
    dout that has the wanted sum. Where dout is zero, or too small, no multiple has; such rows (their gradient comes from
    lse alone) hand the call to the reference.
    """
    dq = torch.zeros(q.shape, dtype=lse.dtype) if carry is None else carry
    q, k, v, dout = (_ready(x, dq.dtype) for x in (q, k, v, dout))
    direction = dout / dout.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(dq.dtype).tiny)
    length = (dout * direction).sum(dim=-1)
    wanted = delta.transpose(1, 2)
    multiple = torch.where(wanted == 0, 0.0, wanted / length)
    if not bool(multiple.isfinite().all()):
        return reference.attend_backward(dout, q, k, v, lse, delta, intervals, scoring, dq, dtypes)
    out = direction * multiple[..., None]
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    dk, dv = torch.zeros(k.shape, dtype=dq.dtype), torch.zeros(v.shape, dtype=dq.dtype)
    for rows, tile in _tiles_of_batch(q, intervals):
        bias, _ = _bias(tile, intervals, rows, q.dtype)
        queries, keys = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
        operands = (dout[rows, queries], q[rows, queries], k[rows, keys], v[rows, keys], out[rows, queries])
        grads = _backward(
            *(x.transpose(1, 2) for x in operands),
            lse[rows, :, queries],
            0.0,
            tile.kind == "causal",
            attn_mask=bias,
            scale=scoring.scale,
        )
        for total, where, grad in zip((dq, dk, dv), (queries, keys, keys), grads, strict=True):
            total[rows, where] += grad.transpose(1, 2)
    return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[1])


def _tiles_of_batch(q: Tensor, intervals: Intervals) -> Iterator[tuple[slice, Tile]]:
    """Every tile with the batch rows that it belongs to."""
    if q.numel() == 0:
        return
    for row, tiles in enumerate(intervals.tiles):
        rows = slice(None) if len(intervals.tiles) == 1 else slice(row, row + 1)
        for tile in tiles:
            yield rows, tile


def _bias(tile: Tile, intervals: Intervals, rows: slice, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The additive mask of a tile, ``[queries, keys]``, and which queries it leaves with nothing; None if it needs none."""
    if tile.kind != "masked":
        return None, None
    seen = intervals.seen(slice(tile.q0, tile.q1), slice(tile.k0, tile.k1))[rows.start or 0]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf), ~seen.any(dim=-1)


def _ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()
