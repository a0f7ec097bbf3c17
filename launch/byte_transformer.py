"""A decoder-only transformer over bytes, in plain PyTorch.

It exists to show how little a model must know of ring attention: nothing here mentions ranks, groups or shards. Every
layer acts on each position alone, except one:

    bytes -> embedding -> [ + attention(norm(x)) ; + swiglu(norm(x)) ] x layers -> norm -> logits of the next byte
                              ^^^^^^^^^ rf.RingAttention: the only place where positions meet

so ``rf.SequenceParallel`` can hand it a shard of the sequence and the global positions of that shard, and the result is
the shard of what one device would have computed.

Shapes: b batch, s positions held here (all of them on one device), d model width, v vocabulary (256 bytes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ringflash as rf
from ringflash.mask import Mask

VOCABULARY = 256


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes of the parameters, so that two equal configs can exchange checkpoints."""

    layers: int = 4
    dim: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 384
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        """Refuse what could not be built, naming both numbers."""
        for name in ("layers", "dim", "heads", "kv_heads", "head_dim", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"model: {name} is {getattr(self, name)}; it must be at least 1")
        if self.head_dim % 2:
            raise ValueError(f"model: head_dim {self.head_dim} must be even: rotary positions turn pairs")
        if self.heads % self.kv_heads:
            raise ValueError(f"model: heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")


class SwiGLU(nn.Module):
    """The gated feed-forward of each position alone: ``down(silu(gate(x)) * up(x))``, [b, s, d] -> [b, s, d]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape [b, s, d]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, mask: Mask | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = rf.RingAttention(
            config.dim,
            config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            mask=mask,
        )
        self.feedforward_norm = nn.RMSNorm(config.dim)
        self.feedforward = SwiGLU(config.dim, config.hidden)

    def forward(self, x: Tensor, position_ids: Tensor | None) -> Tensor:
        """Keep the shape [b, s, d]."""
        x = x + self.attention(self.attention_norm(x), position_ids=position_ids)
        return x + self.feedforward(self.feedforward_norm(x))


class ByteTransformer(nn.Module):
    """Logits of the next byte.

    ``mask`` is given to every attention layer; None takes the mask of the wrapper around the model, and is causal
    without one. The embedding and the head are separate matrices: 256 rows are cheap, and the two want other scales.

    >>> model = ByteTransformer(ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, hidden=32))
    >>> model(torch.zeros(3, 10, dtype=torch.long)).shape
    torch.Size([3, 10, 256])
    """

    def __init__(self, config: ModelConfig, mask: Mask | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config, mask) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        self._initialise()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """input_ids [b, s] bytes -> logits [b, s, v].

        ``position_ids`` are the global positions of the s bytes; without them the bytes are a whole sequence. A shard
        passed without its positions would be rotated as if it began the sequence: wrong, and no error.
        """
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, position_ids)
        return self.head(self.norm(x))

    @torch.no_grad()
    def _initialise(self) -> None:
        """Unit variance in, unit variance out; what is added to the residual stream shrinks with the depth.

        2 x layers terms are added to the stream: each is scaled by 1 / sqrt(2 x layers), so that its variance does not
        grow with depth. The head starts small: the first loss is that of a uniform guess, log(256) nats.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
            for residual in (block.attention.out, block.feedforward.down):
                residual.weight.mul_(1 / math.sqrt(2 * self.config.layers))
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.head.weight, std=0.1 * self.config.dim**-0.5)
