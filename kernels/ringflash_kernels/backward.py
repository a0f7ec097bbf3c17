"""Backward: gradients through row intervals, from the lse and delta of whole rows.

With lse and delta of the whole softmax, over all keys of all ranks, p = exp(s - lse) is final, and gradients of blocks of
keys simply add:

    p = exp(s - lse)    dv = p^T dout    dp = dout v^T    ds = p (dp - delta)    dk = scale ds^T q    dq = scale ds k

``_key_gradients`` holds a block of keys and walks over the queries that see it, all query heads of its group in one flat
loop: dk and dv never leave registers. dq belongs to the queries: it is added to memory tile by tile, in whatever order
programs come (``ADD_DQ``), or left to ``_query_gradients``, a second pass that holds queries and walks over keys: seven
products for five, and the same bits every time.

Scores are formed transposed, keys by queries, so that p and ds feed the products for dv and dk from registers. At head dim 128
the head dim is worked in halves: a whole one spills.

Dao 2023 (arXiv 2307.08691), algorithm 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash_kernels import config, launch
from ringflash_kernels.tiles import LOG2E, bend, kept, partly_visible, products, put, tile


@triton.jit
def _row_statistics(LSE, DELTA, at, row, limit, ds_scale):
    """lse in log2, +inf for rows that see nothing (their p is 0 then), and delta as ``ds`` wants it."""
    inside = row < limit
    lse = tl.load(LSE + at + row, mask=inside, other=float("-inf"))
    delta = tl.load(DELTA + at + row, mask=inside, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), delta * ds_scale


@triton.jit
def _key_gradients(
    Q0, Q1, K, V, DOUT0, DOUT1, LSE, DELTA, DQ0, DQ1, DK, DV_,
    BEGIN, END, BLOCKS, QUERY_POSITIONS, KEY_POSITIONS, SLOPES,
    scale, softcap, seed, threshold, keep_scale, ds_scale, grad_scale,
    queries, keys, heads, group, row_stride, block_stride, slope_stride, slope_step,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, dout_b, dout_s, dout_h, dq_b, dq_s, dq_h,
    dk_b, dk_s, dk_h, dv_b, dv_s, dv_h,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    ADD_DQ: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keys, BLOCK_K)
    block = tl.program_id(0) % blocks  # under a causal mask the first keys are seen by most: long work first
    hk = tl.program_id(0) // blocks % (heads // group)
    b = tl.program_id(0) // blocks // (heads // group)
    batch = b.to(tl.int64)
    first = block * BLOCK_K
    key = first + tl.arange(0, BLOCK_K)
    ranges = BLOCKS + batch * block_stride + block.to(tl.int64) * 4
    start = tl.load(ranges)
    full_start = tl.load(ranges + 1)
    full_end = tl.load(ranges + 2)
    stop = tl.load(ranges + 3)
    partly = (full_start - start) + (stop - full_end)

    k_base = K + batch * k_b + hk.to(tl.int64) * k_h
    v_base = V + batch * v_b + hk.to(tl.int64) * v_h
    k0 = tile(K, k_base, b, first, hk, keys, k_s, 0, BLOCK_K, D0, D, False)
    v0 = tile(V, v_base, b, first, hk, keys, v_s, 0, BLOCK_K, DV0, DV, False)
    k1 = k0
    v1 = v0
    if D1:
        k1 = tile(K, k_base, b, first, hk, keys, k_s, D0, BLOCK_K, D1, D, False)
    if DV1:
        v1 = tile(V, v_base, b, first, hk, keys, v_s, DV0, BLOCK_K, DV1, DV, False)
    key_position = key[:, None]
    if ALIBI or DROPOUT:
        key_position = tl.load(KEY_POSITIONS + key, mask=key < keys, other=0)[:, None]

    dk0 = tl.zeros([BLOCK_K, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_K, D1 if D1 else 1], tl.float32)
    dv0 = tl.zeros([BLOCK_K, DV0], tl.float32)
    dv1 = tl.zeros([BLOCK_K, DV1 if DV1 else 1], tl.float32)
    for i in tl.range(0, partly * group):
        h = hk * group + i // partly
        at = partly_visible(i % partly, start, full_start, full_end) * BLOCK_Q
        dk0, dk1, dv0, dv1 = _against_queries(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, key, key_position,
            Q0, Q1, DOUT0, DOUT1, LSE, DELTA, DQ0, DQ1, BEGIN, END, QUERY_POSITIONS, SLOPES, b, h, at,
            scale, softcap, seed, threshold, keep_scale, ds_scale, grad_scale,
            queries, heads, row_stride, slope_stride, slope_step,
            q_b, q_s, q_h, dout_b, dout_s, dout_h, dq_b, dq_s, dq_h,
            D, D0, D1, DV, DV0, DV1, BLOCK_Q, DESCRIPTORS, PRECISION, ADD_DQ, SOFTCAP, ALIBI, DROPOUT, True,
        )  # fmt: skip
    for i in tl.range(0, (full_end - full_start) * group):
        h = hk * group + i // (full_end - full_start)
        at = (full_start + i % (full_end - full_start)) * BLOCK_Q
        dk0, dk1, dv0, dv1 = _against_queries(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, key, key_position,
            Q0, Q1, DOUT0, DOUT1, LSE, DELTA, DQ0, DQ1, BEGIN, END, QUERY_POSITIONS, SLOPES, b, h, at,
            scale, softcap, seed, threshold, keep_scale, ds_scale, grad_scale,
            queries, heads, row_stride, slope_stride, slope_step,
            q_b, q_s, q_h, dout_b, dout_s, dout_h, dq_b, dq_s, dq_h,
            D, D0, D1, DV, DV0, DV1, BLOCK_Q, DESCRIPTORS, PRECISION, ADD_DQ, SOFTCAP, ALIBI, DROPOUT, False,
        )  # fmt: skip

    dk_base = DK + batch * dk_b + hk.to(tl.int64) * dk_h
    dv_base = DV_ + batch * dv_b + hk.to(tl.int64) * dv_h
    put(dk_base, dk0 * grad_scale, first, keys, dk_s, 0, BLOCK_K, D0, D)
    put(dv_base, dv0 * keep_scale, first, keys, dv_s, 0, BLOCK_K, DV0, DV)
    if D1:
        put(dk_base, dk1 * grad_scale, first, keys, dk_s, D0, BLOCK_K, D1, D)
    if DV1:
        put(dv_base, dv1 * keep_scale, first, keys, dv_s, DV0, BLOCK_K, DV1, DV)


@triton.jit
def _against_queries(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, key, key_position,
    Q0, Q1, DOUT0, DOUT1, LSE, DELTA, DQ0, DQ1, BEGIN, END, QUERY_POSITIONS, SLOPES, b, h, at,
    scale, softcap, seed, threshold, keep_scale, ds_scale, grad_scale,
    queries, heads, row_stride, slope_stride, slope_step,
    q_b, q_s, q_h, dout_b, dout_s, dout_h, dq_b, dq_s, dq_h,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BLOCK_Q: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    ADD_DQ: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PARTLY: tl.constexpr,
):  # fmt: skip
    """One block of queries: adds its share to dk and dv, and the share of these keys to its dq."""
    batch = b.to(tl.int64)
    row = at + tl.arange(0, BLOCK_Q)
    q_base = Q0
    dout_base = DOUT0
    if not DESCRIPTORS:
        q_base = Q0 + batch * q_b + h.to(tl.int64) * q_h
        dout_base = DOUT0 + batch * dout_b + h.to(tl.int64) * dout_h
    q0 = tile(Q0, q_base, b, at, h, queries, q_s, 0, BLOCK_Q, D0, D, DESCRIPTORS)
    s = tl.dot(k0, q0.T, input_precision=PRECISION)
    if D1:
        q1 = tile(Q1, q_base, b, at, h, queries, q_s, D0, BLOCK_Q, D1, D, DESCRIPTORS)
        s = tl.dot(k1, q1.T, s, input_precision=PRECISION)
    lse, delta = _row_statistics(LSE, DELTA, (batch * heads + h) * queries, row, queries, ds_scale)
    query_position = row[None, :]
    if ALIBI or DROPOUT:
        query_position = tl.load(QUERY_POSITIONS + row, mask=row < queries, other=0)[None, :]
    if SOFTCAP or ALIBI:
        slope = 0.0
        if ALIBI:
            slope = tl.load(SLOPES + batch * slope_stride + h * slope_step).to(tl.float32)
        s, bent = bend(s, query_position, key_position, slope, scale, softcap, SOFTCAP, ALIBI)
        p = tl.math.exp2(s - lse[None, :])
    else:
        p = tl.math.exp2(s * (scale * LOG2E) - lse[None, :])
    if PARTLY:
        begin = tl.load(BEGIN + batch * row_stride + row, mask=row < queries, other=0)
        end = tl.load(END + batch * row_stride + row, mask=row < queries, other=0)
        p = tl.where((key[:, None] >= begin[None, :]) & (key[:, None] < end[None, :]), p, 0.0)
    dout0 = tile(DOUT0, dout_base, b, at, h, queries, dout_s, 0, BLOCK_Q, DV0, DV, DESCRIPTORS)
    dp = tl.dot(v0, dout0.T, input_precision=PRECISION)
    if DV1:
        dout1 = tile(DOUT1, dout_base, b, at, h, queries, dout_s, DV0, BLOCK_Q, DV1, DV, DESCRIPTORS)
        dp = tl.dot(v1, dout1.T, dp, input_precision=PRECISION)
    weights = p
    if DROPOUT:
        keep = kept(seed, query_position, key_position, h, b, threshold)
        weights = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    weights = weights.to(k0.dtype)
    dv0 = tl.dot(weights, dout0, dv0, input_precision=PRECISION)
    if DV1:
        dv1 = tl.dot(weights, dout1, dv1, input_precision=PRECISION)
    ds = p * (dp * ds_scale - delta[None, :])
    if SOFTCAP:
        ds = ds * (1.0 - bent * bent)
    ds = ds.to(k0.dtype)
    dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
    if D1:
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
    if ADD_DQ:
        dq_base = DQ0
        if not DESCRIPTORS:
            dq_base = DQ0 + batch * dq_b + h.to(tl.int64) * dq_h
        dq0 = tl.dot(ds.T, k0, input_precision=PRECISION)
        if k0.dtype == tl.float16:  # elsewhere ds has the scale already
            dq0 = dq0 * grad_scale
        _add(DQ0, dq_base, dq0, b, at, h, queries, dq_s, 0, BLOCK_Q, D0, D, DESCRIPTORS)
        if D1:
            dq1 = tl.dot(ds.T, k1, input_precision=PRECISION)
            if k0.dtype == tl.float16:
                dq1 = dq1 * grad_scale
            _add(DQ1, dq_base, dq1, b, at, h, queries, dq_s, D0, BLOCK_Q, D1, D, DESCRIPTORS)
    return dk0, dk1, dv0, dv1


@triton.jit
def _add(
    target, base, value, batch, first, head, limit, stride,
    COLUMN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add a tile to memory, beside other programs that do the same."""
    if DESCRIPTORS:
        target.atomic_add([batch, first, head, COLUMN], value.reshape([1, ROWS, 1, COLUMNS]))
    else:
        row = first + tl.arange(0, ROWS)
        column = COLUMN + tl.arange(0, COLUMNS)
        inside = (row < limit)[:, None]
        if COLUMN + COLUMNS > WIDTH:
            inside = inside & (column < WIDTH)[None, :]
        at = base + row.to(tl.int64)[:, None] * stride + column[None, :]
        tl.atomic_add(at, value, mask=inside, sem="relaxed")


@triton.jit
def _query_gradients(
    Q, K0, K1, V0, V1, DOUT, LSE, DELTA, OLD, DQ,
    BEGIN, END, BLOCKS, QUERY_POSITIONS, KEY_POSITIONS, SLOPES,
    scale, softcap, seed, threshold, keep_scale, ds_scale, grad_scale,
    queries, keys, heads, group, row_stride, block_stride, slope_stride, slope_step,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, dout_b, dout_s, dout_h, dq_b, dq_s, dq_h, old_b, old_s, old_h,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    ADD: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_Q)
    block = blocks - 1 - tl.program_id(0) % blocks
    b = tl.program_id(0) // blocks // heads
    h = tl.program_id(0) // blocks % heads
    hk = h // group
    batch = b.to(tl.int64)
    first = block * BLOCK_Q
    row = first + tl.arange(0, BLOCK_Q)
    inside = row < queries
    begin = tl.load(BEGIN + batch * row_stride + row, mask=inside, other=0)
    end = tl.load(END + batch * row_stride + row, mask=inside, other=0)
    ranges = BLOCKS + batch * block_stride + block.to(tl.int64) * 4
    start = tl.load(ranges)
    full_start = tl.load(ranges + 1)
    full_end = tl.load(ranges + 2)
    stop = tl.load(ranges + 3)
    partly = (full_start - start) + (stop - full_end)

    q_base = Q + batch * q_b + h.to(tl.int64) * q_h
    dout_base = DOUT + batch * dout_b + h.to(tl.int64) * dout_h
    q0 = tile(Q, q_base, b, first, h, queries, q_s, 0, BLOCK_Q, D0, D, False)
    dout0 = tile(DOUT, dout_base, b, first, h, queries, dout_s, 0, BLOCK_Q, DV0, DV, False)
    q1 = q0
    dout1 = dout0
    if D1:
        q1 = tile(Q, q_base, b, first, h, queries, q_s, D0, BLOCK_Q, D1, D, False)
    if DV1:
        dout1 = tile(DOUT, dout_base, b, first, h, queries, dout_s, DV0, BLOCK_Q, DV1, DV, False)
    lse, delta = _row_statistics(LSE, DELTA, (batch * heads + h) * queries, row, queries, ds_scale)
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + batch * slope_stride + h * slope_step).to(tl.float32)
    query_position = row[:, None]
    if ALIBI or DROPOUT:
        query_position = tl.load(QUERY_POSITIONS + row, mask=inside, other=0)[:, None]

    dq0 = tl.zeros([BLOCK_Q, D0], tl.float32)
    dq1 = tl.zeros([BLOCK_Q, D1 if D1 else 1], tl.float32)
    for i in tl.range(0, partly):
        at = partly_visible(i, start, full_start, full_end) * BLOCK_K
        dq0, dq1 = _against_keys(
            dq0, dq1, q0, q1, dout0, dout1, lse, delta, begin, end, query_position, slope,
            K0, K1, V0, V1, KEY_POSITIONS, b, h, hk, at, scale, softcap, seed, threshold, keep_scale, ds_scale,
            keys, k_b, k_s, k_h, v_b, v_s, v_h,
            D, D0, D1, DV, DV0, DV1, BLOCK_K, DESCRIPTORS, PRECISION, SOFTCAP, ALIBI, DROPOUT, True,
        )  # fmt: skip
    for i in tl.range(full_start, full_end):
        dq0, dq1 = _against_keys(
            dq0, dq1, q0, q1, dout0, dout1, lse, delta, begin, end, query_position, slope,
            K0, K1, V0, V1, KEY_POSITIONS, b, h, hk, i * BLOCK_K, scale, softcap, seed, threshold, keep_scale, ds_scale,
            keys, k_b, k_s, k_h, v_b, v_s, v_h,
            D, D0, D1, DV, DV0, DV1, BLOCK_K, DESCRIPTORS, PRECISION, SOFTCAP, ALIBI, DROPOUT, False,
        )  # fmt: skip

    dq_base = DQ + batch * dq_b + h.to(tl.int64) * dq_h
    dq0 = dq0 * grad_scale
    dq1 = dq1 * grad_scale
    if ADD:
        old_base = OLD + batch * old_b + h.to(tl.int64) * old_h
        dq0 += tile(OLD, old_base, b, first, h, queries, old_s, 0, BLOCK_Q, D0, D, False)
        if D1:
            dq1 += tile(OLD, old_base, b, first, h, queries, old_s, D0, BLOCK_Q, D1, D, False)
    put(dq_base, dq0, first, queries, dq_s, 0, BLOCK_Q, D0, D)
    if D1:
        put(dq_base, dq1, first, queries, dq_s, D0, BLOCK_Q, D1, D)


@triton.jit
def _against_keys(
    dq0, dq1, q0, q1, dout0, dout1, lse, delta, begin, end, query_position, slope,
    K0, K1, V0, V1, KEY_POSITIONS, b, h, hk, at, scale, softcap, seed, threshold, keep_scale, ds_scale,
    keys, k_b, k_s, k_h, v_b, v_s, v_h,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, PARTLY: tl.constexpr,
):  # fmt: skip
    """One block of keys: adds its share to dq."""
    batch = b.to(tl.int64)
    key = at + tl.arange(0, BLOCK_K)
    k_base = K0
    v_base = V0
    if not DESCRIPTORS:
        k_base = K0 + batch * k_b + hk.to(tl.int64) * k_h
        v_base = V0 + batch * v_b + hk.to(tl.int64) * v_h
    k0 = tile(K0, k_base, b, at, hk, keys, k_s, 0, BLOCK_K, D0, D, DESCRIPTORS)
    s = tl.dot(q0, k0.T, input_precision=PRECISION)
    if D1:
        k1 = tile(K1, k_base, b, at, hk, keys, k_s, D0, BLOCK_K, D1, D, DESCRIPTORS)
        s = tl.dot(q1, k1.T, s, input_precision=PRECISION)
    dp = products(dout0, dout1, V0, V1, v_base, b, at, hk, keys, v_s, BLOCK_K, DV, DV0, DV1, DESCRIPTORS, PRECISION)
    key_position = key[None, :]
    if ALIBI or DROPOUT:
        key_position = tl.load(KEY_POSITIONS + key, mask=key < keys, other=0)[None, :]
    if SOFTCAP or ALIBI:
        s, bent = bend(s, query_position, key_position, slope, scale, softcap, SOFTCAP, ALIBI)
        p = tl.math.exp2(s - lse[:, None])
    else:
        p = tl.math.exp2(s * (scale * LOG2E) - lse[:, None])
    if PARTLY:
        p = tl.where((key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None]), p, 0.0)
    if DROPOUT:
        dp = tl.where(kept(seed, query_position, key_position, h, b, threshold), dp * keep_scale, 0.0)
    ds = p * (dp * ds_scale - delta[:, None])
    if SOFTCAP:
        ds = ds * (1.0 - bent * bent)
    ds = ds.to(q0.dtype)
    dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
    if D1:
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    return dq0, dq1


@triton.jit
def _rowsum(
    DOUT, OUT, DLSE, DELTA, queries, heads,
    dout_b, dout_s, dout_h, out_b, out_s, out_h, dlse_b, dlse_h, dlse_s,
    DV: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    b = tl.program_id(0) // blocks // heads
    h = tl.program_id(0) // blocks % heads
    batch = b.to(tl.int64)
    row = first + tl.arange(0, ROWS)
    dout_base = DOUT + batch * dout_b + h.to(tl.int64) * dout_h
    out_base = OUT + batch * out_b + h.to(tl.int64) * out_h
    dout = tile(DOUT, dout_base, b, first, h, queries, dout_s, 0, ROWS, WIDTH, DV, False).to(tl.float32)
    out = tile(OUT, out_base, b, first, h, queries, out_s, 0, ROWS, WIDTH, DV, False).to(tl.float32)
    dlse_at = DLSE + batch * dlse_b + h.to(tl.int64) * dlse_h + row.to(tl.int64) * dlse_s
    dlse = tl.load(dlse_at, mask=row < queries, other=0.0)
    tl.store(DELTA + (batch * heads + h) * queries + row, tl.sum(dout * out, 1) - dlse, mask=row < queries)


def delta(dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
    """``rowsum(dout * out) - dlse``, float32 ``[b, h, s]``, from ``[b, s, h, d_v]`` twice and ``[b, h, s]``.

    What ds subtracts from dp: the gradient of the softmax's denominator, and of lse itself.
    """
    dout, out = launch.ready(dout), launch.ready(out)
    batch, queries, heads, width = out.shape
    found = torch.empty(batch, heads, queries, dtype=torch.float32, device=out.device)
    if found.numel():
        rows = 64 if config.architecture(out.device) else 16
        _rowsum[(triton.cdiv(queries, rows) * batch * heads,)](
            dout, out, dlse, found, queries, heads, **launch.steps(dout=dout, out=out),
            **{f"dlse_{dim}": dlse.stride(i) for i, dim in enumerate("bhs")},
            DV=width, WIDTH=max(16, triton.next_power_of_2(width)), ROWS=rows, num_warps=4,
        )  # fmt: skip
    return found


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    intervals: launch.Intervals,
    scoring: launch.Scoring,
    carry: Tensor | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through these keys: dq with ``carry`` added to it, dk and dv, in the two ``dtypes`` (of dq; of dk and dv).

    ``lse`` and ``delta``, float32 ``[b, h, s_q]``, are those of whole rows. ``carry``, a contiguous float32 dq, is consumed.
    ``deterministic`` runs two passes and gives the same bits every time; otherwise, where one pass has a tile, the order in
    which blocks of keys add to dq is left to the hardware, and dq differs from run to run by rounding. dk and dv never do.
    """
    dout, q, k, v = map(launch.ready, (dout, q, k, v))
    call = _Call(dout, q, k, v, lse.contiguous(), delta.contiguous(), intervals, scoring)
    dk, dv = (torch.empty(x.shape, dtype=dtypes[1], device=x.device) for x in (k, v))
    if deterministic or not call.one_pass:
        call.key_gradients("dkdv", dk, dv, None)
        return call.query_gradients(carry, dtypes[0]), dk, dv
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if carry is None else carry
    call.key_gradients("backward", dk, dv, dq)
    return dq.to(dtypes[0]), dk, dv


class _Call(NamedTuple):
    """What both passes need to know."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    delta: Tensor
    intervals: launch.Intervals
    scoring: launch.Scoring

    @property
    def problem(self) -> tuple[int, int, int, config.Work]:
        work = config.work(self.q.dtype, launch.has_options(self.scoring))
        return config.architecture(self.q.device), self.q.shape[3], self.v.shape[3], work

    @property
    def one_pass(self) -> bool:
        return config.has_one_pass(*self.problem)

    def descriptors(self, *read: Tensor) -> bool:
        return launch.describable(config.architecture(self.q.device), *read)

    def arguments(self) -> dict[str, Any]:
        """ds is rounded to the input dtype before its last products, and there it holds the scale already: one multiplication
        less. Except in float16, where the scale could push it below the smallest normal number."""
        scale = float(self.scoring.scale)
        late = self.q.dtype == torch.float16
        return (
            launch.sizes(self.q, self.k)
            | launch.options(self.scoring, self.intervals)
            | launch.steps(q=self.q, k=self.k, v=self.v, dout=self.dout)
            | dict(LSE=self.lse, DELTA=self.delta)
            | dict(ds_scale=1.0 if late else scale, grad_scale=scale if late else 1.0)
        )

    def key_gradients(self, direction: config.Direction, dk: Tensor, dv: Tensor, dq: Tensor | None) -> None:
        """Writes dk and dv, and adds to dq unless it is None."""
        batch, keys, heads, _ = self.k.shape
        tiles = config.choose(direction, *self.problem)
        descriptors = self.descriptors(self.q, self.dout, *(() if dq is None else (dq,)))
        split, value_split = config.halves(self.q.shape[3]), config.halves(self.v.shape[3])
        q0, q1 = launch.loads(self.q, tiles.block_q, split, descriptors)
        dout0, dout1 = launch.loads(self.dout, tiles.block_q, value_split, descriptors)
        dq0, dq1 = (None, None) if dq is None else launch.loads(dq, tiles.block_q, split, descriptors)
        if keys:
            _key_gradients[(triton.cdiv(keys, tiles.block_k) * batch * heads,)](
                **dict(Q0=q0, Q1=q1, K=self.k, V=self.v, DOUT0=dout0, DOUT1=dout1, DQ0=dq0, DQ1=dq1, DK=dk, DV_=dv),
                **launch.rows(self.intervals),
                **launch.blocks(self.intervals.key_blocks(tiles.block_q, tiles.block_k)),
                **self.arguments(),
                **launch.steps(dk=dk, dv=dv, dq=dq),
                **launch.shape(self.q, self.v, tiles, config.halves),
                DESCRIPTORS=descriptors,
                ADD_DQ=dq is not None,
            )

    def query_gradients(self, carry: Tensor | None, dtype: torch.dtype) -> Tensor:
        """dq, with ``carry`` added."""
        batch, queries, heads, _ = self.q.shape
        dq = carry
        if dq is None or dq.dtype != dtype:
            dq = torch.empty(self.q.shape, dtype=dtype, device=self.q.device)
        tiles = config.choose("dq", *self.problem)
        descriptors = self.descriptors(self.k, self.v)
        k0, k1 = launch.loads(self.k, tiles.block_k, config.parts(self.k.shape[3]), descriptors)
        v0, v1 = launch.loads(self.v, tiles.block_k, config.parts(self.v.shape[3]), descriptors)
        if queries:
            _query_gradients[(triton.cdiv(queries, tiles.block_q) * batch * heads,)](
                **dict(Q=self.q, K0=k0, K1=k1, V0=v0, V1=v1, DOUT=self.dout, OLD=carry, DQ=dq),
                **launch.rows(self.intervals),
                **launch.blocks(self.intervals.query_blocks(tiles.block_q, tiles.block_k)),
                **self.arguments(),
                **launch.steps(dq=dq, old=carry),
                **launch.shape(self.q, self.v, tiles),
                DESCRIPTORS=descriptors,
                ADD=carry is not None,
            )
        return dq
