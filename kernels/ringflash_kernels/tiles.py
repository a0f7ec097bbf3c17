"""What the kernels share: a tile of a tensor, a tile of scores, and which of its cells count.

Shapes inside a kernel: q is a block of queries, k a block of keys, d a part of the head dim. Tiles must be powers of two,
head dims are not: a head dim is one or two *parts*, each a power of two (192 = 128 + 64, 80 = 64 + 16, 112 = 64 + 64 with
zeros behind), and every product over the head dim is a sum over its parts.

Inside, scores are in units of log2 (exp2 is what the hardware has) and a masked score is -1e30; -inf, natural logarithms
and the caller's dtypes exist at the door only.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1.0e30)


@triton.jit
def tile(
    source, base, batch, first, head, limit, stride,
    COLUMN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Positions ``first ..`` of one head, columns ``COLUMN ..``: ``[ROWS, COLUMNS]``.

    Zeros stand past the last position (``limit``) and past the head dim (``WIDTH``). Through a descriptor of
    ``[batch, seq, heads, head_dim]``, which the copy engine serves, or through pointers from ``base``, where the head begins.
    """
    if DESCRIPTORS:
        return source.load([batch, first, head, COLUMN]).reshape([ROWS, COLUMNS])
    else:
        row = first + tl.arange(0, ROWS)
        column = COLUMN + tl.arange(0, COLUMNS)
        inside = (row < limit)[:, None]
        if COLUMN + COLUMNS > WIDTH:
            inside = inside & (column < WIDTH)[None, :]
        return tl.load(base + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def put(
    base, value, first, limit, stride,
    COLUMN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store what :func:`tile` would load, in the dtype of the tensor behind ``base``."""
    row = first + tl.arange(0, ROWS)
    column = COLUMN + tl.arange(0, COLUMNS)
    inside = (row < limit)[:, None]
    if COLUMN + COLUMNS > WIDTH:
        inside = inside & (column < WIDTH)[None, :]
    at = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def block_range(table, block):
    """What a block visits: ``start <= full_start <= full_end <= end``, in blocks of the other side."""
    at = table + block.to(tl.int64) * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def partly_visible(i, start, full_start, full_end):
    """The i-th block that is visited and not full: those before the full ones, then those behind."""
    return tl.where(i < full_start - start, start + i, full_end + i - (full_start - start))


@triton.jit
def products(
    q0, q1, K0, K1, base, batch, first, head, limit, stride,
    ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Query block times a tile of keys, q k^T: ``[queries, ROWS]`` float32, without the scale."""
    k0 = tile(K0, base, batch, first, head, limit, stride, 0, ROWS, D0, D, DESCRIPTORS)
    found = tl.dot(q0, k0.T, input_precision=PRECISION)
    if D1:
        k1 = tile(K1, base, batch, first, head, limit, stride, D0, ROWS, D1, D, DESCRIPTORS)
        found = tl.dot(q1, k1.T, found, input_precision=PRECISION)
    return found


@triton.jit
def add_values(
    acc0, acc1, weights, V0, V1, base, batch, first, head, limit, stride,
    ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + weights v``, part by part; ``acc1`` passes through where there is no second part."""
    v0 = tile(V0, base, batch, first, head, limit, stride, 0, ROWS, D0, D, DESCRIPTORS)
    acc0 = tl.dot(weights, v0, acc0, input_precision=PRECISION)
    if D1:
        v1 = tile(V1, base, batch, first, head, limit, stride, D0, ROWS, D1, D, DESCRIPTORS)
        acc1 = tl.dot(weights, v1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def tanh(x):
    """Through exp2 of a negative number, and near 0, where that loses digits, through its series. Without a library function,
    since the interpreter has none."""
    small = tl.math.exp2(tl.abs(x) * (-2.0 * LOG2E))
    bent = (1.0 - small) / (1.0 + small)
    y = x * x
    series = x + x * y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835))))
    return tl.where(y < 0.0625, series, tl.where(x < 0.0, -bent, bent))


@triton.jit
def bend(scores, query_position, key_position, slope, scale, softcap, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Raw products to scores in log2 with softcap and ALiBi; and the tanh of the softcap, whose slope backward needs.

    The positions broadcast against the scores, whichever way round these lie.
    """
    scores = scores * scale
    bent = scores
    if SOFTCAP:
        bent = tanh(scores / softcap)
        scores = bent * softcap
    if ALIBI:
        scores = scores - slope * tl.abs(query_position - key_position).to(tl.float32)
    return scores * LOG2E, bent


@triton.jit
def kept(seed, query_position, key_position, head, batch, threshold):
    """Which weights dropout keeps: Philox4x32-10 on (key, query, head, batch), as in ``ringflash.reference.keep_mask``.

    Above the 32 bits of ``threshold`` stands the number of the first head, plus 1 so that they are always 64: an argument of
    its own would move the registers of kernels that drop nothing, and one of them would spill in its loop.
    """
    head = head.to(tl.uint32) + (threshold >> 32).to(tl.uint32) - 1
    key, query = tl.broadcast(key_position.to(tl.uint32), query_position.to(tl.uint32))
    zero = key & 0
    word, _, _, _ = tl.philox(seed, key, query, zero + head, zero + batch.to(tl.uint32))
    return word >= threshold.to(tl.uint32)


@triton.jit
def row_statistics(LSE, DELTA, at, row, limit, ds_scale):
    """lse in log2, +inf for rows that see nothing (their p is 0 then), and delta as ``ds`` wants it."""
    inside = row < limit
    lse = tl.load(LSE + at + row, mask=inside, other=float("-inf"))
    delta = tl.load(DELTA + at + row, mask=inside, other=0.0)
    unseen = lse == float("-inf")  # there p is 0, and 0 times whatever came as its gradient must stay 0
    return tl.where(unseen, float("inf"), lse * LOG2E), tl.where(unseen, 0.0, delta * ds_scale)
