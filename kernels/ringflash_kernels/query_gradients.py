"""dq: a program holds a block of queries and walks over the keys that they see.

The second of two passes: it forms p and ds once more, and in return nothing is added out of order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ringflash_kernels.tiles import LOG2E, bend, block_range, kept, partly_visible, products, put, row_statistics, tile


@triton.jit(
    do_not_specialize=["seed", "threshold", "queries", "keys", "row_stride", "block_stride", "first_block", "blocks"]
)
def query_gradients(
    Q, K0, K1, V0, V1, DOUT, LSE, DELTA, OLD, DQ,
    BEGIN, END, BLOCKS, QUERY_POSITIONS, KEY_POSITIONS, SLOPES,
    scale, softcap, seed: tl.int64, threshold: tl.int64, keep_scale, ds_scale, grad_scale,
    first_block, blocks, queries, keys, heads, group, row_stride, block_stride, slope_stride, slope_step,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, dout_b, dout_s, dout_h, dq_b, dq_s, dq_h, old_b, old_s, old_h,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    ADD: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    block = first_block + blocks - 1 - tl.program_id(0) % blocks
    b = tl.program_id(0) // blocks // heads
    h = tl.program_id(0) // blocks % heads
    hk = h // group
    batch = b.to(tl.int64)
    first = block * BLOCK_Q
    row = first + tl.arange(0, BLOCK_Q)
    inside = row < queries
    begin = tl.load(BEGIN + batch * row_stride + row, mask=inside, other=0)
    end = tl.load(END + batch * row_stride + row, mask=inside, other=0)
    start, full_start, full_end, stop = block_range(BLOCKS + batch * block_stride, block)
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
    lse, delta = row_statistics(LSE, DELTA, (batch * heads + h) * queries, row, queries, ds_scale)
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
