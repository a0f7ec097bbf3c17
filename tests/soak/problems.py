"""What a random program asks, and what the oracle says to it.

Masks and options come from a number and are evenly spread: a search from small to large would try the dull ones first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import reduce
from typing import Any

import oracle
import torch
from test_mask import Masked
from torch import Tensor

import ringflash as rf


@dataclass(frozen=True)
class Spread:
    """A sharding that all ranks have built, under ``name``, and what it should mean."""

    name: str
    masked: Masked
    queries: int
    keys: int
    q_offset: int
    batch: int
    degree: int


@dataclass(frozen=True)
class Forward:
    """A forward that has been made, and not yet differentiated."""

    name: str
    spread: Spread
    masked: Masked
    seed: int
    heads: int
    kv_heads: int
    dims: tuple[int, int]
    dtype: torch.dtype
    wants: tuple[bool, bool, bool]
    options: tuple[tuple[str, Any], ...]

    @property
    def whole(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout, dlse of the whole sequence; dlse is None in nobody's loss."""
        draw = torch.Generator().manual_seed(self.seed)
        b, s = self.spread.batch, self.spread
        d, d_v = self.dims
        shapes = (
            (b, s.queries, self.heads, d),
            (b, s.keys, self.kv_heads, d),
            (b, s.keys, self.kv_heads, d_v),
            (b, s.queries, self.heads, d_v),
            (b, self.heads, s.queries),
        )
        q, k, v, dout, dlse = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return *(x.to(self.dtype) for x in (q, k, v, dout)), dlse.to(wide)

    def answer(self, dtype: torch.dtype) -> oracle.Answer:
        """What the oracle says, computed in this dtype from these inputs."""
        *inputs, dout, dlse = (x.to(dtype) for x in self.whole)
        s = self.spread
        seen = self.masked.table(s.queries, s.keys, s.q_offset).expand(s.batch, -1, -1)
        leaves = [x.detach().requires_grad_() for x in inputs]
        options = dict(self.options)
        if "alibi_slopes" in options:
            options["bias"] = alibi(options.pop("alibi_slopes").to(dtype), s)
        if "sinks" in options:
            options["sinks"] = options["sinks"].to(dtype)
        out, lse = oracle.attention(*leaves, seen, **options)
        loss = (out * dout).sum() + torch.where(lse == -torch.inf, 0.0, lse * dlse).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        filled = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))
        return oracle.Answer(out.detach(), lse.detach(), *filled)


def alibi(slopes: Tensor, s: Spread) -> Tensor:
    """``[1, h, queries, keys]``: slope x distance, to be added to scores."""
    distance = (torch.arange(s.queries)[:, None] + s.q_offset - torch.arange(s.keys)).abs()
    return -slopes[None, :, None, None] * distance


def close(found: dict[str, Tensor], f: Forward) -> None:
    """Twice the error of a dense attention in the same dtype, and a few units in the last place: not tuned."""
    exact = f.answer(torch.float64)._asdict()
    wide = torch.float32 if f.dtype in (torch.bfloat16, torch.float16) else f.dtype
    plain = f.answer(wide)._asdict()
    for name, ours in found.items():
        expected, rounded = exact[name], plain[name]
        assert torch.equal(ours == -torch.inf, expected == -torch.inf), f"{name}: other rows see nothing"
        ours, expected, rounded = (torch.where(x == -torch.inf, 0.0, x.double()) for x in (ours, expected, rounded))
        if not expected.numel():
            continue
        size = 1 + expected.abs().max().item()
        dtype = wide if name == "lse" else f.dtype
        allowed = 2 * (rounded - expected).abs().max().item() + 32 * torch.finfo(dtype).eps * size
        allowed += 2 * torch.finfo(wide).eps * 32 * size
        error = (ours - expected).abs().max().item()
        assert error <= allowed, f"{name} is wrong by {error:.2g}, allowed {allowed:.2g}: {f}"


def some_mask(draw: random.Random, length: int, rows: int = 1) -> Masked:
    """Up to three elementary masks joined with ``&``, for a sequence of this length and so many batch rows."""
    if not length:
        return _alike(rf.causal, oracle.causal(), rows)
    terms = [_term(draw, length, rows) for _ in range(draw.randint(1, 3))]
    return reduce(lambda a, b: a & b, terms)


def _term(draw: random.Random, length: int, rows: int) -> Masked:
    left, right = (draw.choice([None, draw.randint(0, 6)]) for _ in range(2))
    n = draw.randint(1, 8)
    kind = draw.choice(["full", "causal", "causal", "window", "prefix", "chunks", "documents", "documents"])
    if kind == "documents":
        cuts = [[0, *sorted(draw.randint(0, length) for _ in range(draw.randint(0, 4))), length] for _ in range(rows)]
        cuts = cuts if draw.random() < 0.5 else cuts[:1] * rows
        return Masked(rf.documents(cuts), tuple(map(oracle.documents, cuts)))
    kinds = {
        "full": (rf.full, oracle.full()),
        "causal": (rf.causal, oracle.causal()),
        "window": (rf.window(left, right), oracle.window(left, right)),
        "prefix": (rf.prefix(n), oracle.prefix(n)),
        "chunks": (rf.chunks(n), oracle.chunks(n)),
    }
    return _alike(*kinds[kind], rows)


def _alike(mask: rf.Mask, sees: oracle.Predicate, rows: int) -> Masked:
    return Masked(mask, (sees,) * rows)


def some_options(draw: random.Random, heads: int) -> tuple[tuple[str, Any], ...]:
    """Options of a call that the oracle knows too."""
    slopes = torch.linspace(0.1, 0.7, heads, dtype=torch.float64)
    sinks = torch.linspace(-1, 1, heads, dtype=torch.float64)
    every = {"scale": draw.choice([0.3, -0.5, 0.0]), "softcap": 1.5, "alibi_slopes": slopes, "sinks": sinks}
    return tuple((name, every[name]) for name in draw.sample([*every], draw.choice([0, 0, 1, 2])))
