"""Forward: attention over row intervals, added to what the queries have already seen.

One program holds a block of queries of one head and walks over the blocks of keys that any of its rows sees: first the
partly visible ones, where indices are compared, then the ones that every row sees whole. The loop is *skewed*: softmax of
tile j runs while the matrix units multiply tile j-1 by its values, which is what hides the exponentials.

    rescale the sum by what the last tile changed    s = q k_j^T    sum += p_(j-1) v_(j-1)    p = exp2(s - max)

A *carry*, the partial that earlier keys left behind, is added after the loops, weighted by exp(lse) like any partial. Taken
before them it would cost the overlap (the compiler then waits for the sum before each softmax). Where a row sees nothing
it stays the carry, or the identity (0, -inf).

Dao et al. 2022, 2023 (arXiv 2205.14135, 2307.08691); the skew: Shah et al. 2024 (arXiv 2407.08608), section 3.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash_kernels import config, decode, launch
from ringflash_kernels.tiles import (
    LN2,
    LOG2E,
    MASKED,
    add_values,
    bend,
    block_range,
    kept,
    partly_visible,
    products,
    put,
    tile,
)


@triton.jit(
    do_not_specialize=[
        "seed",
        "threshold",
        "queries",
        "keys",
        "row_stride",
        "block_stride",
        "first_block",
        "blocks",
        "carry_lse_b",
        "carry_lse_h",
        "carry_lse_s",
    ]
)
def _attend(
    Q, K0, K1, V0, V1, CARRY_OUT, CARRY_LSE, OUT, LSE,
    BEGIN, END, BLOCKS, QUERY_POSITIONS, KEY_POSITIONS, SLOPES,
    scale, softcap, seed: tl.int64, threshold: tl.int64, keep_scale,
    first_block, blocks, queries, keys, heads, group, row_stride, block_stride, slope_stride, slope_step,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, out_b, out_s, out_h,
    carry_b, carry_s, carry_h, carry_lse_b, carry_lse_h, carry_lse_s,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    CARRY: tl.constexpr, NEGATIVE: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    # under a causal mask the last rows see most: long work first
    block = first_block + blocks - 1 - tl.program_id(0) % blocks
    b = tl.program_id(0) // blocks // heads
    h = tl.program_id(0) // blocks % heads
    hk = h // group
    batch = b.to(tl.int64)
    first = block * BLOCK_Q
    row = first + tl.arange(0, BLOCK_Q)
    inside = row < queries
    column = tl.arange(0, BLOCK_K)
    begin = tl.load(BEGIN + batch * row_stride + row, mask=inside, other=0)
    end = tl.load(END + batch * row_stride + row, mask=inside, other=0)
    start, full_start, full_end, stop = block_range(BLOCKS + batch * block_stride, block)

    q_base = Q + batch * q_b + h.to(tl.int64) * q_h
    k_base = K0
    v_base = V0
    if not DESCRIPTORS:
        k_base = K0 + batch * k_b + hk.to(tl.int64) * k_h
        v_base = V0 + batch * v_b + hk.to(tl.int64) * v_h
    q0 = tile(Q, q_base, b, first, h, queries, q_s, 0, BLOCK_Q, D0, D, False)
    if NEGATIVE:  # the loops take the maximum before they scale: the sign goes to the queries
        q0 = -q0
    q1 = q0
    if D1:
        q1 = tile(Q, q_base, b, first, h, queries, q_s, D0, BLOCK_Q, D1, D, False)
        if NEGATIVE:
            q1 = -q1
    BENT: tl.constexpr = SOFTCAP or ALIBI
    POSITIONS: tl.constexpr = ALIBI or DROPOUT
    DTYPE: tl.constexpr = Q.dtype.element_ty
    if BENT:
        unit = 1.0
    else:
        unit = tl.abs(scale) * LOG2E
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + batch * slope_stride + h * slope_step).to(tl.float32)
    query_position = row[:, None]
    key_position = column[None, :]
    if POSITIONS:
        query_position = tl.load(QUERY_POSITIONS + row, mask=inside, other=0)[:, None]

    acc0 = tl.zeros([BLOCK_Q, DV0], tl.float32)
    acc1 = tl.zeros([BLOCK_Q, DV1 if DV1 else 1], tl.float32)
    partly = (full_start - start) + (stop - full_end)
    # The first tile, peeled off. A block that sees nothing takes one past the last key: zeros, all of them masked.
    block_k = tl.where(partly > 0, partly_visible(0, start, full_start, full_end), full_start)
    before = tl.where(start < stop, block_k, tl.cdiv(keys, BLOCK_K)) * BLOCK_K
    s = products(q0, q1, K0, K1, k_base, b, before, hk, keys, k_s, BLOCK_K, D, D0, D1, DESCRIPTORS, PRECISION)
    key = before + column
    if POSITIONS:
        key_position = tl.load(KEY_POSITIONS + key, mask=key < keys, other=0)[None, :]
    if BENT:
        s, _ = bend(s, query_position, key_position, slope, tl.abs(scale), softcap, SOFTCAP, ALIBI)
    s = tl.where((key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None]), s * unit, MASKED)
    top = tl.maximum(tl.max(s, 1), MASKED)
    p = tl.where(s <= 0.5 * MASKED, 0.0, tl.math.exp2(s - top[:, None]))  # in this order NaN stays NaN
    total = tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept(seed, query_position, key_position, h, b, threshold), p, 0.0)
    alpha = tl.full([BLOCK_Q], 1.0, tl.float32)
    for i in tl.range(1, partly):
        here = partly_visible(i, start, full_start, full_end) * BLOCK_K
        weights = p.to(DTYPE)
        acc0 = acc0 * alpha[:, None]
        if DV1:
            acc1 = acc1 * alpha[:, None]
        s = products(q0, q1, K0, K1, k_base, b, here, hk, keys, k_s, BLOCK_K, D, D0, D1, DESCRIPTORS, PRECISION)
        acc0, acc1 = add_values(
            acc0, acc1, weights, V0, V1, v_base, b, before, hk, keys, v_s, BLOCK_K, DV, DV0, DV1, DESCRIPTORS, PRECISION
        )
        key = here + column
        if POSITIONS:
            key_position = tl.load(KEY_POSITIONS + key, mask=key < keys, other=0)[None, :]
        if BENT:
            s, _ = bend(s, query_position, key_position, slope, tl.abs(scale), softcap, SOFTCAP, ALIBI)
        s = tl.where((key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None]), s * unit, MASKED)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.where(s <= 0.5 * MASKED, 0.0, tl.math.exp2(s - higher[:, None]))
        alpha = tl.math.exp2(top - higher)
        total = total * alpha + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(seed, query_position, key_position, h, b, threshold), p, 0.0)
        top = higher
        before = here
    for i in tl.range(full_start + tl.where(partly > 0, 0, 1), full_end):
        here = i * BLOCK_K
        weights = p.to(DTYPE)
        acc0 = acc0 * alpha[:, None]
        if DV1:
            acc1 = acc1 * alpha[:, None]
        s = products(q0, q1, K0, K1, k_base, b, here, hk, keys, k_s, BLOCK_K, D, D0, D1, DESCRIPTORS, PRECISION)
        acc0, acc1 = add_values(
            acc0, acc1, weights, V0, V1, v_base, b, before, hk, keys, v_s, BLOCK_K, DV, DV0, DV1, DESCRIPTORS, PRECISION
        )
        if POSITIONS:
            key_position = tl.load(KEY_POSITIONS + here + column)[None, :]
        if BENT:
            s, _ = bend(s, query_position, key_position, slope, tl.abs(scale), softcap, SOFTCAP, ALIBI)
        higher = tl.maximum(top, tl.max(s, 1) * unit)
        p = tl.math.exp2(s * unit - higher[:, None])
        alpha = tl.math.exp2(top - higher)
        total = total * alpha + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(seed, query_position, key_position, h, b, threshold), p, 0.0)
        top = higher
        before = here
    weights = p.to(DTYPE)
    acc0 = acc0 * alpha[:, None]
    if DV1:
        acc1 = acc1 * alpha[:, None]
    acc0, acc1 = add_values(
        acc0, acc1, weights, V0, V1, v_base, b, before, hk, keys, v_s, BLOCK_K, DV, DV0, DV1, DESCRIPTORS, PRECISION
    )

    out_base = OUT + batch * out_b + h.to(tl.int64) * out_h
    if CARRY:
        lse_at = CARRY_LSE + batch * carry_lse_b + h.to(tl.int64) * carry_lse_h + row.to(tl.int64) * carry_lse_s
        old = tl.load(lse_at, mask=inside, other=float("-inf")) * LOG2E
        higher = tl.maximum(tl.maximum(top, old), MASKED)
        old_weight = tl.math.exp2(old - higher)
        weight = tl.math.exp2(top - higher)
        total = total * weight + old_weight
        top = higher
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        carry_base = CARRY_OUT + batch * carry_b + h.to(tl.int64) * carry_h
        old0 = tile(CARRY_OUT, carry_base, b, first, h, queries, carry_s, 0, BLOCK_Q, DV0, DV, False)
        acc0 = acc0 * (weight * inverse * keep_scale)[:, None] + old0 * (old_weight * inverse)[:, None]
        if DV1:
            old1 = tile(CARRY_OUT, carry_base, b, first, h, queries, carry_s, DV0, BLOCK_Q, DV1, DV, False)
            acc1 = acc1 * (weight * inverse * keep_scale)[:, None] + old1 * (old_weight * inverse)[:, None]
    else:
        inverse = keep_scale / tl.where(total == 0.0, 1.0, total)
        acc0 = acc0 * inverse[:, None]
        if DV1:
            acc1 = acc1 * inverse[:, None]
    put(out_base, acc0, first, queries, out_s, 0, BLOCK_Q, DV0, DV)
    if DV1:
        put(out_base, acc1, first, queries, out_s, DV0, BLOCK_Q, DV1, DV)
    unseen = total == 0.0
    lse = tl.where(unseen, float("-inf"), (top + tl.math.log2(tl.where(unseen, 1.0, total))) * LN2)
    tl.store(LSE + (batch * heads + h) * queries + row, lse, mask=inside)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: launch.Intervals,
    scoring: launch.Scoring,
    carry: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Attention over these keys, added to ``carry``: out ``[b, s_q, h, d_v]`` in ``dtype``, lse ``[b, h, s_q]`` float32.

    ``q [b, s_q, h, d]``, ``k [b, s_k, h_kv, d]``, ``v [b, s_k, h_kv, d_v]``: bfloat16, float16 or float32, head dims up to
    256. ``carry`` is an (out, lse) in float32, of any strides and so possibly broadcast; a contiguous out of ``dtype`` is
    consumed: the sum is written over it.
    """
    if decode.pays(q, k):
        return decode.attend(q, k, v, intervals, scoring, carry, dtype)
    q, k, v = map(launch.ready, (q, k, v))
    batch, queries, heads, width = *q.shape[:3], v.shape[3]
    arch = config.architecture(q.device)
    tiles = config.choose("forward", arch, q.shape[3], width, config.work(q.dtype, launch.has_options(scoring)))
    descriptors = launch.describable(arch, k, v)
    out, lse = (None, None) if carry is None else (launch.ready(carry[0]), carry[1])
    into = out
    if into is None or into.dtype != dtype or not into.is_contiguous():
        into = torch.empty(batch, queries, heads, width, dtype=dtype, device=q.device)
    # never over the carried lse: several threads read each of its rows, and one of them might have written by then
    new_lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    first_block, past = 0, triton.cdiv(queries, tiles.block_q)
    if lse is not None and into is out:  # queries that see nothing here have their answer already
        first_block, past = intervals.query_span(tiles.block_q, tiles.block_k)
        if past - first_block < triton.cdiv(queries, tiles.block_q):
            new_lse.copy_(lse)
    if into.numel() and past > first_block:
        _attend[((past - first_block) * batch * heads,)](
            q,
            *launch.loads(k, tiles.block_k, config.parts(k.shape[3]), descriptors),
            *launch.loads(v, tiles.block_k, config.parts(width), descriptors),
            out,
            lse,
            into,
            new_lse,
            first_block=first_block,
            blocks=past - first_block,
            **launch.rows(intervals),
            **launch.blocks(intervals.query_blocks(tiles.block_q, tiles.block_k)),
            **launch.sizes(q, k),
            **launch.steps(q=q, k=k, v=v, out=into, carry=out),
            **launch.steps_of_lse(carry=lse),
            **launch.options(scoring, intervals),
            **launch.shape(q, v, tiles),
            NEGATIVE=scoring.scale < 0,
            DESCRIPTORS=descriptors,
            CARRY=carry is not None,
        )
    return into, new_lse
