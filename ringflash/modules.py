"""A ready attention layer: projections, rotary positions, grouped heads, and attention over however many ranks there are.

The layer does not know where its sequence is. Whoever does (``SequenceParallel``, or a training script) sets its
``sharding`` attribute before the forward: with a sharding the layer runs the ring, without one it is ordinary attention
on one device. Any module can be wired in the same way.

Rotary positions: Su et al. 2021 (arXiv 2104.09864); grouped queries: Ainslie et al. 2023 (arXiv 2305.13245).
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ringflash.attention import flash_attention, ring_attention
from ringflash.mask import Mask, causal, full
from ringflash.shard import Sharding


class RingAttention(nn.Module):
    """Self-attention ``[b, s, dim] -> [b, s, dim]``, where s is this rank's part of the sequence.

    ``kv_heads`` (default ``heads``) divide ``heads``; ``head_dim`` defaults to ``dim // heads``. ``rope_theta`` None
    leaves positions out. ``mask`` narrows the mask of the sharding for this layer (``rf.window(1023, 0)``), so that
    layers with a sliding window and layers without share one sharding; on one device it narrows ``rf.causal``.

    >>> RingAttention(16, heads=4, kv_heads=2)(torch.ones(1, 5, 16)).shape
    torch.Size([1, 5, 16])
    """

    sharding: Sharding | None

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10000.0,
        mask: Mask | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if head_dim is None and dim % heads:
            raise ValueError(f"RingAttention: dim {dim} is not a multiple of heads {heads}; pass head_dim")
        head_dim = dim // heads if head_dim is None else head_dim
        if heads % kv_heads:
            raise ValueError(
                f"RingAttention: heads is {heads}, kv_heads {kv_heads}; heads must be a multiple of kv_heads"
            )
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"RingAttention: head_dim is {head_dim}; rotary positions turn pairs, so it must be even")
        self.head_dim, self.rope_theta = head_dim, rope_theta
        self.mask = full if mask is None else mask
        self.alone = causal & self.mask
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.value = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.sharding = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "sharding" and value is not None:  # narrowed here, so that a captured forward has nothing to derive
            value = value.with_mask(value.mask & self.mask)
        super().__setattr__(name, value)

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """``position_ids``: global positions ``[b or 1, s]`` for the rotation; default those of the sharding."""
        split = "b s (h d) -> b s h d"
        q, k, v = (rearrange(project(x), split, d=self.head_dim) for project in (self.query, self.key, self.value))
        if self.rope_theta is not None:
            if position_ids is None:
                here = torch.arange(x.shape[1]) if self.sharding is None else self.sharding.positions
                position_ids = here.to(x.device)[None]
            q, k = (rotate(y, position_ids, self.rope_theta) for y in (q, k))
        if self.sharding is None:
            out = flash_attention(q, k, v, mask=self.alone)
        else:
            out = ring_attention(q, k, v, self.sharding)
        result: Tensor = self.out(rearrange(out, "b s h d -> b s (h d)"))
        return result


def rotate(x: Tensor, position_ids: Tensor, theta: float) -> Tensor:
    """Rotary embedding: turn each pair ``(x_i, x_{i + d/2})`` of ``x [b, s, h, d]`` by position x theta^(-2i/d).

    Angles are computed in float32 at least: bfloat16 cannot tell positions beyond 256 apart.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=dtype, device=x.device) / half)
    angle = position_ids.to(dtype)[:, :, None, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
