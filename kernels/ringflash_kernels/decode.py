"""Few queries, many keys: the keys are split over programs, and their partials merged.

A block of queries per program would leave most of the chip idle when a step of decoding asks for one query. Here every
program takes a stretch of the keys, and all query heads that share a key head stand as rows of one tile, so keys and
values are read once:

    rows  (query 0, head 0) (query 0, head 1) .. (query 1, head 0) ..      x      keys  | split 0 | split 1 | split 2 |

Flash-Decoding: Dao, Haziza, Massa & Sizov 2023. Reading memory is the limit, so each tile compares indices and no
loop is skewed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash_kernels import config, launch
from ringflash_kernels.merge import merge
from ringflash_kernels.tiles import LN2, LOG2E, MASKED, add_values, bend, kept, products

_MOST_ROWS = 64


@triton.jit(do_not_specialize=["seed", "threshold", "splits", "queries", "keys", "row_stride"])
def _stretch(
    Q, K0, K1, V0, V1, OUTS, LSES,
    BEGIN, END, QUERY_POSITIONS, KEY_POSITIONS, SLOPES,
    scale, softcap, seed: tl.int64, threshold: tl.int64, keep_scale,
    splits, queries, keys, heads, group, row_stride, slope_stride, slope_step,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % splits
    hk = tl.program_id(0) // splits % (heads // group)
    b = tl.program_id(0) // splits // (heads // group)
    batch = b.to(tl.int64)
    packed = tl.arange(0, BLOCK_Q)
    inside = packed < queries * group
    row = packed // group
    h = hk * group + packed % group
    column = tl.arange(0, BLOCK_K)
    begin = tl.load(BEGIN + batch * row_stride + row, mask=inside, other=0)
    end = tl.load(END + batch * row_stride + row, mask=inside, other=0)
    sees = end > begin
    start = tl.min(tl.where(sees, begin, keys), 0) // BLOCK_K
    stop = tl.cdiv(tl.max(tl.where(sees, end, 0), 0), BLOCK_K)
    share = tl.cdiv(tl.maximum(stop - start, 0), splits)

    q_at = Q + batch * q_b + row.to(tl.int64)[:, None] * q_s + h.to(tl.int64)[:, None] * q_h
    part = tl.arange(0, D0)[None, :]
    q0 = tl.load(q_at + part, mask=inside[:, None] & (part < D), other=0.0)
    q1 = q0
    if D1:
        part = D0 + tl.arange(0, D1)[None, :]
        q1 = tl.load(q_at + part, mask=inside[:, None] & (part < D), other=0.0)
    k_base = K0
    v_base = V0
    if not DESCRIPTORS:
        k_base = K0 + batch * k_b + hk.to(tl.int64) * k_h
        v_base = V0 + batch * v_b + hk.to(tl.int64) * v_h
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + batch * slope_stride + h * slope_step, mask=inside, other=0.0).to(tl.float32)[:, None]
    query_position = row[:, None]
    key_position = column[None, :]
    if ALIBI or DROPOUT:
        query_position = tl.load(QUERY_POSITIONS + row, mask=inside, other=0)[:, None]

    acc0 = tl.zeros([BLOCK_Q, DV0], tl.float32)
    acc1 = tl.zeros([BLOCK_Q, DV1 if DV1 else 1], tl.float32)
    top = tl.full([BLOCK_Q], MASKED, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for i in tl.range(start + split * share, tl.minimum(start + (split + 1) * share, stop)):
        here = i * BLOCK_K
        key = here + column
        s = products(q0, q1, K0, K1, k_base, b, here, hk, keys, k_s, BLOCK_K, D, D0, D1, DESCRIPTORS, PRECISION)
        if ALIBI or DROPOUT:
            key_position = tl.load(KEY_POSITIONS + key, mask=key < keys, other=0)[None, :]
        if SOFTCAP or ALIBI:
            s, _ = bend(s, query_position, key_position, slope, scale, softcap, SOFTCAP, ALIBI)
        else:
            s = s * (scale * LOG2E)
        s = tl.where((key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None]), s, MASKED)
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.where(s <= 0.5 * MASKED, 0.0, tl.math.exp2(s - higher[:, None]))
        alpha = tl.math.exp2(top - higher)
        total = total * alpha + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(seed, query_position, key_position, h[:, None], b, threshold), p, 0.0)
        acc0 = acc0 * alpha[:, None]
        acc1 = acc1 * alpha[:, None]
        acc0, acc1 = add_values(
            acc0, acc1, p.to(q0.dtype), V0, V1, v_base, b, here, hk, keys, v_s,
            BLOCK_K, DV, DV0, DV1, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        top = higher

    unseen = total == 0.0
    total = tl.where(unseen, 1.0, total)
    batches = tl.num_programs(0) // splits // (heads // group)
    place = split.to(tl.int64) * batches + b
    out_at = OUTS + ((place * queries + row)[:, None] * heads + h[:, None]) * DV
    part = tl.arange(0, DV0)[None, :]
    tl.store(out_at + part, acc0 * (keep_scale / total)[:, None], mask=inside[:, None] & (part < DV))
    if DV1:
        part = DV0 + tl.arange(0, DV1)[None, :]
        tl.store(out_at + part, acc1 * (keep_scale / total)[:, None], mask=inside[:, None] & (part < DV))
    lse = tl.where(unseen, float("-inf"), (top + tl.math.log2(total)) * LN2)
    tl.store(LSES + (place * heads + h) * queries + row, lse, mask=inside)


def pays(q: Tensor, k: Tensor) -> bool:
    """Are the queries so few, and the keys so many, that splitting these is what fills the device?"""
    rows = q.shape[1] * (q.shape[2] // k.shape[2])
    return 0 < rows <= _MOST_ROWS and k.shape[1] >= 8 * _tiles(q, k, False).block_k


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: launch.Intervals,
    scoring: launch.Scoring,
    carry: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """As :func:`ringflash_kernels.forward.attend`, for at most 64 queries x query heads per key head."""
    q, k, v = map(launch.ready, (q, k, v))
    (batch, queries, heads, _), (_, keys, key_heads, _) = q.shape, k.shape
    chosen = _tiles(q, v, launch.has_options(scoring))
    rows = max(16, triton.next_power_of_2(queries * (heads // key_heads)))
    tiles = config.Config(rows, chosen.block_k, chosen.warps, chosen.stages)
    splits = max(1, min(2 * _processors(q.device) // (batch * key_heads), keys // (2 * tiles.block_k)))
    outs = torch.empty(splits, batch, queries, heads, v.shape[3], dtype=torch.float32, device=q.device)
    lses = torch.empty(splits, batch, heads, queries, dtype=torch.float32, device=q.device)
    descriptors = launch.describable(config.architecture(q.device), k, v)
    _stretch[(splits * key_heads * batch,)](
        q,
        *launch.loads(k, tiles.block_k, config.parts(k.shape[3]), descriptors),
        *launch.loads(v, tiles.block_k, config.parts(v.shape[3]), descriptors),
        outs,
        lses,
        splits=splits,
        **launch.rows(intervals),
        **launch.options(scoring, intervals),
        **launch.sizes(q, k),
        **launch.steps(q=q, k=k, v=v),
        **launch.shape(q, v, tiles),
        DESCRIPTORS=descriptors,
    )
    return merge(outs, lses, carry, dtype)


def _tiles(q: Tensor, v: Tensor, options: bool) -> config.Config:
    arch = config.architecture(q.device)
    return config.choose("decode", arch, q.shape[3], v.shape[3], config.work(q.dtype, options))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
