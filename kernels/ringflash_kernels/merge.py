"""Adding up partials: many attention results over disjoint keys become one.

    lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

The sum is taken online, one partial after the other, so any number of them costs one pass. A partial that saw nothing
(lse -inf, or +inf as FlashAttention 2 writes it) does not count, whatever its out holds.

Milakov & Gimelshein 2018 (arXiv 1805.02867).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash_kernels import launch
from ringflash_kernels.tiles import LN2, LOG2E, put, tile


@triton.jit
def _statistics(LSE, batch, h, row, limit, lse_b, lse_h, lse_s):
    """lse of some rows in log2; -inf for those that saw nothing."""
    at = LSE + batch * lse_b + h.to(tl.int64) * lse_h + row.to(tl.int64) * lse_s
    lse = tl.load(at, mask=row < limit, other=float("-inf")) * LOG2E
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit
def _add(acc, top, total, out, lse):
    """A running sum (acc, total, both relative to exp2(top)) and one more partial."""
    higher = tl.maximum(top, lse)
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    old_weight = tl.math.exp2(top - shift)
    weight = tl.math.exp2(lse - shift)
    out = tl.where((weight == 0.0)[:, None], 0.0, out)
    return acc * old_weight[:, None] + out * weight[:, None], higher, total * old_weight + weight


@triton.jit(
    do_not_specialize=[
        "count",
        "queries",
        "lses_n",
        "lses_lse_b",
        "lses_lse_h",
        "lses_lse_s",
        "carry_lse_b",
        "carry_lse_h",
        "carry_lse_s",
    ]
)
def _merge(
    OUTS, LSES, CARRY_OUT, CARRY_LSE, OUT, LSE, count, queries, heads,
    outs_n, outs_b, outs_s, outs_h, lses_n, lses_lse_b, lses_lse_h, lses_lse_s,
    carry_b, carry_s, carry_h, carry_lse_b, carry_lse_h, carry_lse_s, out_b, out_s, out_h,
    DV: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    b = tl.program_id(0) // blocks // heads
    h = tl.program_id(0) // blocks % heads
    batch = b.to(tl.int64)
    row = first + tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if CARRY:
        base = CARRY_OUT + batch * carry_b + h.to(tl.int64) * carry_h
        out = tile(CARRY_OUT, base, b, first, h, queries, carry_s, 0, ROWS, WIDTH, DV, False).to(tl.float32)
        lse = _statistics(CARRY_LSE, batch, h, row, queries, carry_lse_b, carry_lse_h, carry_lse_s)
        acc, top, total = _add(acc, top, total, out, lse)
    outs = OUTS + batch * outs_b + h.to(tl.int64) * outs_h
    lses = LSES
    for _ in tl.range(0, count):
        out = tile(OUTS, outs, b, first, h, queries, outs_s, 0, ROWS, WIDTH, DV, False).to(tl.float32)
        lse = _statistics(lses, batch, h, row, queries, lses_lse_b, lses_lse_h, lses_lse_s)
        acc, top, total = _add(acc, top, total, out, lse)
        outs += outs_n
        lses += lses_n
    unseen = total == 0.0
    total = tl.where(unseen, 1.0, total)
    put(OUT + batch * out_b + h.to(tl.int64) * out_h, acc / total[:, None], first, queries, out_s, 0, ROWS, WIDTH, DV)
    lse = tl.where(unseen, float("-inf"), (top + tl.math.log2(total)) * LN2)
    tl.store(LSE + (batch * heads + h) * queries + row, lse, mask=row < queries)


def merge(
    outs: Tensor, lses: Tensor, carry: tuple[Tensor, Tensor] | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The sum of n partials: ``outs [n, b, s, h, d_v]``, ``lses [n, b, h, s]``, of any strides with d_v contiguous, and of
    ``carry``, one more. Out ``[b, s, h, d_v]`` in ``dtype``, lse ``[b, h, s]`` float32."""
    outs = launch.ready(outs)
    count, batch, queries, heads, width = outs.shape
    out = torch.empty(batch, queries, heads, width, dtype=dtype, device=outs.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=outs.device)
    first, first_lse = (None, None) if carry is None else (launch.ready(carry[0]), carry[1])
    rows = 16
    if out.numel():
        _merge[(triton.cdiv(queries, rows) * batch * heads,)](
            **dict(OUTS=outs, LSES=lses, CARRY_OUT=first, CARRY_LSE=first_lse, OUT=out, LSE=lse),
            **dict(count=count, queries=queries, heads=heads, outs_n=outs.stride(0), lses_n=lses.stride(0)),
            **launch.steps(outs=outs[0] if count else None, out=out, carry=first),
            **launch.steps_of_lse(lses=lses[0] if count else None, carry=first_lse),
            DV=width,
            WIDTH=max(16, triton.next_power_of_2(width)),
            ROWS=rows,
            CARRY=carry is not None,
        )
    return out, lse
