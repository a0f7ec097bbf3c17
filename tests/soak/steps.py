"""One step of a long run: something else each time, and the same on all ranks.

A step draws a problem from its number: lengths, a mask (packed documents differ in every step), layout, route, heads over
ranks, check mode, dtype; a forward and a backward, or a step of a wrapped model. Now and then it is compared with the oracle
in float64, which every rank can compute alone, since all of them know the whole sequence.
"""

from __future__ import annotations

import inspect
import random
from typing import Any

import oracle
import torch
from soak.models import VOCABULARY, Tiny, dense_loss
from torch import Tensor

import ringflash as rf

CHECKS = ("off", "first", "always", "verify")
MODEL_EVERY = 5
LONGEST = 40  # tokens


class Steps:
    """The steps of one rank of ``group``; ``checks`` are the check modes that take turns."""

    def __init__(self, group: Any, checks: tuple[str, ...] = CHECKS) -> None:
        self._group = group
        self._ranks = rf.Sharding(1, group).ranks
        self._checks = checks if "check" in inspect.signature(rf.Sharding).parameters else ()
        self._model = rf.SequenceParallel(Tiny(), group, mask=rf.causal)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.1)

    def __call__(self, step: int, compare: bool = False) -> None:
        """Make one step; raises ``AssertionError`` if it is compared and wrong."""
        draw = random.Random(step)
        if step % MODEL_EVERY:
            self._attend(draw, compare)
        else:
            self._train(draw, compare)

    def _attend(self, draw: random.Random, compare: bool) -> None:
        length = draw.randint(1, LONGEST)
        mask, sees = _mask(draw, length)
        degree = draw.choice([n for n in range(1, self._ranks + 1) if self._ranks % n == 0])
        doubles = [rf.double_ring(n, self._ranks // degree // n) for n in (2,) if self._ranks // degree % n == 0]
        s = rf.Sharding(
            length,
            self._group,
            mask,
            layout=draw.choice(["contiguous", "zigzag", "striped", "auto"]),
            route=draw.choice(["ring", "ring_down", "needed_only", "gather", "auto", rf.direct(2), *doubles]),
            heads_axis=degree,
            **({"check": draw.choice(self._checks)} if self._checks else {}),
        )
        if draw.random() < 0.2:
            mask, sees = _mask(draw, length)
            s = s.with_mask(mask)
        heads, kv_heads = draw.choice([(6, 6), (6, 3), (6, 1)] if degree == 3 else [(4, 4), (4, 2), (4, 1)])
        dtype = torch.float64 if compare else draw.choice([torch.float32, torch.bfloat16])
        numbers = torch.Generator().manual_seed(draw.randint(0, 1 << 30))
        q, k, v, dout = (
            torch.randn(1, length, n, 8, generator=numbers, dtype=torch.float64)
            for n in (heads, kv_heads, kv_heads, heads)
        )
        parts = [s.shard(x.to(dtype), 1).requires_grad_() for x in (q, k, v)]
        out = rf.ring_attention(*parts, s)
        out.backward(s.shard(dout.to(dtype), 1))
        if compare:
            a = oracle.answer(q, k, v, oracle.table(sees, length), dout)
            found = {"out": out, "dq": parts[0].grad, "dk": parts[1].grad, "dv": parts[2].grad}
            for name, ours in found.items():
                _same(name, ours, s.shard(getattr(a, name), 1))
        if draw.random() < 0.1:
            whole = s.unshard(out.detach(), 1)
            assert whole.shape[1] == length

    def _train(self, draw: random.Random, compare: bool) -> None:
        length = draw.randint(2, LONGEST)
        offsets = [0, *sorted(draw.randint(0, length) for _ in range(draw.randint(0, 3))), length]
        tokens = torch.randint(
            0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(draw.randint(0, 1 << 30))
        )
        self._optimizer.zero_grad()
        loss = self._model(input_ids=tokens, labels=tokens, mask=rf.causal & rf.documents(offsets)).loss
        loss.backward()
        if compare:
            there = Tiny()
            there.load_state_dict(self._model.module.state_dict())
            expected, gradients = dense_loss(there, tokens, offsets)
            assert abs(loss.item() - expected) < 1e-9, f"loss {loss.item()}, not {expected}"
            for (name, p), gradient in zip(self._model.named_parameters(), gradients, strict=True):
                _same(name, p.grad, gradient)
        self._optimizer.step()


def _mask(draw: random.Random, length: int) -> tuple[rf.Mask, oracle.Predicate]:
    """A mask and its definition; of documents there are new ones every time."""
    cuts = [0, *sorted(draw.randint(0, length) for _ in range(draw.randint(1, 4))), length]
    left, n = draw.randint(0, 12), draw.randint(1, 9)
    kinds = {
        "full": (rf.full, oracle.full()),
        "causal": (rf.causal, oracle.causal()),
        "window": (rf.window(left, 0), oracle.window(left, 0)),
        "chunks": (rf.causal & rf.chunks(n), oracle.both(oracle.causal(), oracle.chunks(n))),
        "documents": (rf.causal & rf.documents(cuts), oracle.both(oracle.causal(), oracle.documents(cuts))),
        "both": (rf.window(left, 2) & rf.documents(cuts), oracle.both(oracle.window(left, 2), oracle.documents(cuts))),
    }
    return kinds[draw.choice([*kinds, "documents", "documents"])]


def _same(name: str, ours: Tensor | None, expected: Tensor) -> None:
    assert ours is not None, f"{name} has no gradient"
    torch.testing.assert_close(
        ours.detach(), expected.detach(), rtol=1e-8, atol=1e-9, msg=lambda text: f"{name}: {text}"
    )
