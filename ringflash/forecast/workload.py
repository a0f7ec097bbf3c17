"""What one attention call computes and sends for each token: the numbers that turn a plan into bytes and operations.

A token of keys is k and v of all key heads. A token of queries, where queries travel in the backward, is q, dout, lse and
delta of all query heads. Gradients come home in the accumulation dtype: float32, float64 for float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import numpy as np

from ringflash.numbers import whole
from ringflash.plan import Cost

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
"""Bytes of one element, by dtype."""

_MOST = 1 << 20
"""Of heads, dims and batch rows: bytes of a call stay below 2**63."""


@dataclass(frozen=True)
class Workload:
    """Shapes of one call: q ``[batch, tokens, heads, head_dim]``, k and v with ``kv_heads``, v with ``value_dim``.

    ``degree`` ranks share each shard of the ring and swap heads for tokens (Ulysses); 1 is a ring alone. ``rows`` are the
    batch rows that the mask tells apart: 1, or ``batch``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    batch: int = 1
    dtype: str = "bfloat16"
    degree: int = 1
    rows: int = 1

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "value_dim", "batch", "degree"):
            object.__setattr__(self, name, whole(getattr(self, name), f"estimate: {name}", least=1, most=_MOST))
        if not isinstance(self.dtype, str) or self.dtype not in ITEMSIZE:
            raise ValueError(f"estimate: dtype is {self.dtype!r}; accepted are {', '.join(ITEMSIZE)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"estimate: heads is {self.heads}, which is no multiple of kv_heads, {self.kv_heads}")
        if self.heads % self.degree:
            raise ValueError(f"estimate: heads is {self.heads}, which heads_degree, {self.degree}, does not divide")
        if self.rows not in (1, self.batch):
            raise ValueError(f"estimate: batch is {self.batch}, and the mask has {self.rows} rows of documents")

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def wide(self) -> int:
        """Bytes of one element of a sum: the accumulation dtype."""
        return max(4, self.itemsize)

    @property
    def local_heads(self) -> int:
        """Query heads of one rank inside the ring."""
        return self.heads // self.degree

    @property
    def local_kv_heads(self) -> int:
        """Key heads of one rank inside the ring: copied only where the queries of one are on several ranks."""
        return self.local_heads // gcd(self.local_heads, self.heads // self.kv_heads)

    @property
    def keys(self) -> Cost:
        """Bytes of a token where keys and values travel: k, v onward; dk, dv home."""
        row = self.local_kv_heads * (self.head_dim + self.value_dim)
        return Cost(row * self.itemsize, row * self.wide)

    @property
    def queries(self) -> Cost:
        """Bytes of a token where queries travel: q, dout, lse, delta onward; dq home."""
        onward = self.local_heads * ((self.head_dim + self.value_dim) * self.itemsize + 2 * self.wide)
        return Cost(onward, self.local_heads * self.head_dim * self.wide)

    @property
    def flops(self) -> dict[str, int]:
        """Dense floating-point operations of one rank for one (query, key) pair and batch row, by pass.

        Forward: q k' and p v. Backward: q k', dout v', p' dout, ds k and ds' q, 2.5 times as many if head dims are equal.
        """
        d, dv = self.head_dim, self.value_dim
        return {"forward": 2 * self.local_heads * (d + dv), "backward": 2 * self.local_heads * (3 * d + 2 * dv)}

    @property
    def pairs_per_cell(self) -> float:
        """Batch rows that one counted cell stands for: plans count the cells of all rows that their mask tells apart."""
        return self.batch / self.rows

    def exchanged(
        self, phase: str, query_tokens: Sequence[int], key_tokens: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bytes that the ranks of one shard send each other before and after the ring, int64 ``[source, target]`` each.

        They hold so many of the shard's tokens. Each gets the query heads of its block, and every key head that these need
        once; dq comes back in the dtype of q, dk and dv, which are sums, in the accumulation dtype.
        """
        at, block, group = np.arange(self.degree) * self.local_heads, self.local_heads, self.heads // self.kv_heads
        kv_heads = (at + block - 1) // group - at // group + 1
        d, dv, narrow, wide = self.head_dim, self.value_dim, self.itemsize, self.wide
        if phase == "forward":
            there, back, key_back = d * narrow, dv * narrow + wide, 0  # q; out and lse; nothing
        else:
            there = (d + dv) * narrow + 2 * wide  # q, dout, lse, delta
            back, key_back = d * narrow, (d + dv) * wide  # dq; dk and dv
        queries, keys = (np.asarray(tokens, dtype=np.int64) * self.batch for tokens in (query_tokens, key_tokens))
        before = (queries * block * there)[:, None] + np.outer(keys * (d + dv) * narrow, kv_heads)
        after = (queries * block * back)[None] + np.outer(kv_heads, keys * key_back)
        others = ~np.eye(self.degree, dtype=bool)
        return before * others, after * others

    def share(self, tokens: int) -> list[int]:
        """How many of a shard's tokens each of the ranks holds that share it: neighbours, cut as ``Layout.split`` does."""
        cuts = [i * tokens // self.degree for i in range(self.degree + 1)]
        return [b - a for a, b in pairwise(cuts)]
