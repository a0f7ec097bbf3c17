"""A model of a few hundred weights, and its loss and gradients in one process without a ring."""

from __future__ import annotations

from collections.abc import Sequence

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringflash as rf

VOCABULARY = 11


class Tiny(nn.Module):
    """One attention layer between an embedding and a head, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.attention = rf.RingAttention(8, heads=2, kv_heads=1, rope_theta=None)
            self.head = nn.Linear(8, VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.attention(x))


def dense_loss(model: Tiny, tokens: Tensor, offsets: Sequence[int] | None = None) -> tuple[float, list[Tensor]]:
    """The mean loss of the next token, and all gradients, with the oracle in the place of attention."""
    length = tokens.shape[1]
    seen = oracle.causal() if offsets is None else oracle.both(oracle.causal(), oracle.documents(offsets))
    x = model.embed(tokens)
    layer = model.attention
    q, k, v = (y(x).unflatten(-1, (-1, layer.head_dim)) for y in (layer.query, layer.key, layer.value))
    out, _ = oracle.attention(q, k, v, oracle.table(seen, length))
    logits = model.head(x + layer.out(out.flatten(2)))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    parameters = list(model.parameters())
    return loss.item(), list(torch.autograd.grad(loss, parameters))
