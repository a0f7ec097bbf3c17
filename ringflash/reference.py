"""Attention written so that it is obviously right: dense, in blocks of queries, in any floating dtype.

It knows every option and serves as the oracle of the other backends. Scores of a block of queries against the keys that
any of them sees are formed, masked, exponentiated and summed, as in the textbook:

    s = softcap(scale q k^T) - slope |distance|        p = exp(s - lse)        out = (p * keep) v
    dp = (dout v^T) * keep     ds = p (dp - delta)     dv = (p * keep)^T dout   dq = scale ds k   dk = scale ds^T q

``delta = rowsum(dout * out) - dlse`` and ``lse`` are those of the whole row, so that gradients of key blocks add up.
Blocks are as small as memory asks: 16K tokens cost tens of megabytes, not gigabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ringflash.intervals import Intervals
from ringflash.partial import Partial, absorb, owned

_CELLS_AT_ONCE = 1 << 22  # scores of one block: 16 MiB in float32


@dataclass(frozen=True)
class Scoring:
    """How a query and a key become a weight.

    ``softcap`` 0 is off. ``alibi_slopes`` are ``[h]`` or ``[b, h]`` and lower a score by slope x |distance in global
    positions|. ``dropout_p`` drops weights by a counter-based random number of (seed, batch, head, query, key), where the
    tensors' heads are numbered from ``first_head``.
    """

    scale: float
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0
    first_head: int = 0

    def of_heads(self, heads: slice) -> Scoring:
        """The same for some of the heads."""
        slopes = None if self.alibi_slopes is None else self.alibi_slopes[..., heads]
        return replace(self, alibi_slopes=slopes, first_head=self.first_head + heads.start)


class _Block(NamedTuple):
    rows: slice
    columns: slice
    seen: Tensor  # bool [b or 1, 1, 1, rows, columns]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    scoring: Scoring,
    carry: Partial | None = None,
    dtype: torch.dtype = torch.float32,
) -> Partial:
    """Attention over these keys, added to ``carry`` (which is consumed), with out in ``dtype``.

    ``q [b, s_q, h, d]``, ``k [b, s_k, h_kv, d]``, ``v [b, s_k, h_kv, d_v]``; ``intervals`` say which keys each query sees.
    """
    found = owned(carry, q, v)
    q, k, v = (x.to(found.out.dtype) for x in (q, k, v))
    heads = (k.shape[2], q.shape[2] // max(1, k.shape[2]))
    for block in _blocks(q, intervals):
        scores, _ = _scores(q, k, block, intervals, scoring, heads)
        top = scores.amax(dim=-1)
        top = torch.where(top == -torch.inf, 0.0, top)
        weights = torch.exp(scores - top[..., None])
        total = weights.sum(dim=-1)
        lse = top + torch.log(total)  # log(0) is the -inf of a row that sees nothing
        if scoring.dropout_p:
            weights = weights * _keep(block, intervals, scoring, heads, len(q))
        out = torch.einsum("bngqk,bknd->bqngd", weights, v[:, block.columns])
        out = out / torch.where(total == 0, 1.0, total).permute(0, 3, 1, 2)[..., None]
        part = Partial(rearrange(out, "b q n g d -> b q (n g) d"), rearrange(lse, "b n g q -> b (n g) q"))
        absorb(Partial(found.out[:, block.rows], found.lse[:, :, block.rows]), part)
    return Partial(found.out.to(dtype), found.lse)


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
    """Gradients through these keys: dq with ``carry`` added (which is consumed), dk and dv; in ``dtypes``, of dq and of dk, dv.

    ``lse`` and ``delta`` ``[b, h, s_q]`` are those of the whole rows, over all keys of all ranks. Always deterministic.
    """
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device) if carry is None else carry
    q, k, v, dout = (x.to(dq.dtype) for x in (q, k, v, dout))
    heads = (k.shape[2], q.shape[2] // max(1, k.shape[2]))
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)  # contiguous, whatever the strides of k and v
    lse, delta = (rearrange(x, "b (n g) q -> b n g q 1", n=heads[0]) for x in (lse, delta))
    for block in _blocks(q, intervals):
        scores, slope = _scores(q, k, block, intervals, scoring, heads)
        row_lse = lse[:, :, :, block.rows]
        weights = torch.exp(scores - torch.where(row_lse == -torch.inf, 0.0, row_lse))
        g = rearrange(dout[:, block.rows], "b q (n g) d -> b q n g d", n=heads[0])
        dp = torch.einsum("bqngd,bknd->bngqk", g, v[:, block.columns])
        kept = weights
        if scoring.dropout_p:
            keep = _keep(block, intervals, scoring, heads, len(q))
            dp, kept = dp * keep, weights * keep
        ds = torch.where(block.seen, weights * (dp - delta[:, :, :, block.rows]) * slope * scoring.scale, 0.0)
        dv[:, block.columns] += torch.einsum("bngqk,bqngd->bknd", kept, g)
        grouped = rearrange(q[:, block.rows], "b q (n g) d -> b q n g d", n=heads[0])
        dk[:, block.columns] += torch.einsum("bngqk,bqngd->bknd", ds, grouped)
        dq[:, block.rows] += rearrange(
            torch.einsum("bngqk,bknd->bqngd", ds, k[:, block.columns]), "b q n g d -> b q (n g) d"
        )
    return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[1])


def delta(dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
    """``rowsum(dout * out) - dlse``, ``[b, h, s_q]``: the second term makes lse differentiable."""
    return (dout.to(dlse.dtype) * out.to(dlse.dtype)).sum(dim=-1).transpose(1, 2) - dlse


def keep_mask(
    seed: int, batch: int, heads: int, queries: Tensor, keys: Tensor, dropout_p: float, first_head: int = 0
) -> Tensor:
    """Which weights dropout keeps: bool ``[batch, heads, queries, keys]``, a pure function of what it is given.

    One Philox4x32-10 number (Salmon et al. 2011) per cell, with counter (key position, query position, head, batch row)
    and the 64-bit seed as key; a weight is dropped if its first word is below ``dropout_p * 2**32``. Positions are
    global, so the answer does not depend on the number of ranks, the layout or the backend.
    """
    low = 0xFFFFFFFF
    device = queries.device
    index = torch.arange(batch, device=device), torch.arange(first_head, first_head + heads, device=device)
    b, h = (x.reshape(-1, *(1,) * (3 - i)) for i, x in enumerate(index))
    c0, c1, c2, c3 = torch.broadcast_tensors(keys & low, (queries & low)[:, None], h, b)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        product_a, product_b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps around 2**64: the bits are what counts
        c0, c2 = ((product_b >> 32) & low) ^ c1 ^ k0, ((product_a >> 32) & low) ^ c3 ^ k1
        c1, c3 = product_b & low, product_a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0 >= int(dropout_p * 2**32)


def _blocks(q: Tensor, intervals: Intervals) -> Iterator[_Block]:
    """Blocks of queries, each with the one range of keys that any of its rows sees; blocks that see nothing are left out."""
    batch, queries, heads, _ = q.shape
    begin, end = intervals.begin, intervals.end
    row = 0
    while row < queries and batch and heads:
        span = int((end[:, row:] - begin[:, row : row + 1]).max())
        size = max(1, min(queries - row, _CELLS_AT_ONCE // (batch * heads * max(1, span))))
        rows = slice(row, row + size)
        row += size
        first, last = int(begin[:, rows].min()), int(end[:, rows].max())
        if first >= last or not bool((end[:, rows] > begin[:, rows]).any()):
            continue
        columns = slice(first, last)
        yield _Block(rows, columns, intervals.seen(rows, columns)[:, None, None])


def _scores(
    q: Tensor, k: Tensor, block: _Block, intervals: Intervals, scoring: Scoring, heads: tuple[int, int]
) -> tuple[Tensor, Tensor | float]:
    """Masked scores ``[b, n, g, rows, columns]``, and the slope of the softcap at each (1 without one)."""
    grouped = rearrange(q[:, block.rows], "b q (n g) d -> b q n g d", n=heads[0])
    scores = torch.einsum("bqngd,bknd->bngqk", grouped, k[:, block.columns]) * scoring.scale
    slope: Tensor | float = 1.0
    if scoring.softcap:
        bent = torch.tanh(scores / scoring.softcap)
        scores, slope = bent * scoring.softcap, 1 - bent * bent
    if scoring.alibi_slopes is not None:
        slopes = scoring.alibi_slopes.to(scores.dtype).reshape(-1, *heads, 1, 1)
        distance = (intervals.queries[block.rows, None] - intervals.keys[block.columns]).abs()
        scores = scores - slopes * distance
    return scores.masked_fill(~block.seen, -torch.inf), slope


def _keep(block: _Block, intervals: Intervals, scoring: Scoring, heads: tuple[int, int], batch: int) -> Tensor:
    """Dropout as a factor: 0, or 1 / (1 - p); ``[b, n, g, rows, columns]``."""
    queries, keys = intervals.queries[block.rows], intervals.keys[block.columns]
    kept = keep_mask(scoring.seed, batch, heads[0] * heads[1], queries, keys, scoring.dropout_p, scoring.first_head)
    return rearrange(kept, "b (n g) q k -> b n g q k", n=heads[0]) / (1 - scoring.dropout_p)
