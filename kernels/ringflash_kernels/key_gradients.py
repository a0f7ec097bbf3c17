"""dk and dv: a program holds a block of keys and walks over the queries that see it.

All query heads of its group come by in one flat loop, so dk and dv never leave registers. Scores are formed transposed, keys by
queries: p and ds then feed the products for dv and dk straight from registers. With ``ADD_DQ`` the same ds also makes the
share of these keys in dq, which is added to memory in whatever order programs come.

At head dim 128 the head dim is worked in halves: the accumulators of a whole one spill.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ringflash_kernels.tiles import LOG2E, bend, block_range, kept, partly_visible, put, row_statistics, tile


@triton.jit(do_not_specialize=["seed", "threshold", "queries", "keys", "row_stride", "block_stride"])
def key_gradients(
    Q0, Q1, K, V, DOUT0, DOUT1, LSE, DELTA, DQ0, DQ1, DK, DV_,
    BEGIN, END, BLOCKS, QUERY_POSITIONS, KEY_POSITIONS, SLOPES,
    scale, softcap, seed: tl.int64, threshold: tl.int64, keep_scale, ds_scale, grad_scale,
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
    start, full_start, full_end, stop = block_range(BLOCKS + batch * block_stride, block)
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
    several = tl.maximum(partly, 1)  # loads run ahead of the loop, and so do these divisions
    for i in tl.range(0, partly * group):
        h = hk * group + i // several
        at = partly_visible(i % several, start, full_start, full_end) * BLOCK_Q
        dk0, dk1, dv0, dv1 = _against_queries(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, key, key_position,
            Q0, Q1, DOUT0, DOUT1, LSE, DELTA, DQ0, DQ1, BEGIN, END, QUERY_POSITIONS, SLOPES, b, h, at,
            scale, softcap, seed, threshold, keep_scale, ds_scale, grad_scale,
            queries, heads, row_stride, slope_stride, slope_step,
            q_b, q_s, q_h, dout_b, dout_s, dout_h, dq_b, dq_s, dq_h,
            D, D0, D1, DV, DV0, DV1, BLOCK_Q, DESCRIPTORS, PRECISION, ADD_DQ, SOFTCAP, ALIBI, DROPOUT, True,
        )  # fmt: skip
    several = tl.maximum(full_end - full_start, 1)
    for i in tl.range(0, (full_end - full_start) * group):
        h = hk * group + i // several
        at = (full_start + i % several) * BLOCK_Q
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
    lse, delta = row_statistics(LSE, DELTA, (batch * heads + h) * queries, row, queries, ds_scale)
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
