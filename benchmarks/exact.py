"""Is a result right? Attention in float64 or float32 for one group of heads, every row of it, and a verdict.

One key head with its query heads costs a fraction of the whole, and all its rows and keys are looked at. What is allowed
is computed, not tuned: the same formulas are worked out once more with the roundings that no kernel in that dtype can
avoid (weights and their gradients enter a product in the dtype of the inputs, results leave in it), and a version may be
three times as far from the truth as that. The error of every block of 64 positions is looked at as well: one lost tile
drowns in the mean of a long sequence, and stands out in its block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NAMES = ("out", "dq", "dk", "dv")
TIMES = 3.0  # the unavoidable error, over everything
TIMES_BLOCK = 5.0  # and in a block of positions, where it scatters
BLOCK = 64
_CELLS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 27}
_FLOAT64_TOKENS = 8192  # longer sequences are worked out in float32, 500 times finer than bfloat16


@dataclass(frozen=True)
class Group:
    """One batch row and key head, with the query heads that read it."""

    row: int
    head: int
    heads: int

    def queries(self, x: Tensor) -> Tensor:
        """``[b, s, h, d]`` to ``[heads, s, d]``."""
        return x[self.row, :, self.head * self.heads : (self.head + 1) * self.heads].transpose(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """``[b, s, h_kv, d]`` to ``[1, s, d]``."""
        return x[self.row, :, self.head][None]


def attention(
    tensors: tuple[Tensor, ...], bounds: tuple[np.ndarray, np.ndarray], scale: float, rounding: torch.dtype | None
) -> dict[str, Tensor]:
    """Out, dq ``[g, s_q, d]`` and dk, dv ``[1, s_k, d]`` of one group; query ``i`` sees ``bounds[0][i] <= j < bounds[1][i]``.

    ``tensors``: q ``[g, s_q, d]``, k and v ``[1, s_k, d]``, dout ``[g, s_q, d]`` (without it: forward only). ``rounding``
    is the dtype to which weights, their gradients and results are rounded.
    """
    source = tensors[0]
    dtype = torch.float64 if source.shape[1] <= _FLOAT64_TOKENS else torch.float32

    def coarse(x: Tensor) -> Tensor:
        return x if rounding is None else x.to(rounding).to(dtype)

    q, k, v, *rest = (x.to(dtype) for x in tensors)
    k, v = k[0], v[0]
    dout = rest[0] if rest else None
    lo, hi = (np.minimum(bound, len(k)) for bound in bounds)
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q[..., : v.shape[1]], q, k, v))
    key = torch.arange(len(k), device=q.device)
    row = 0
    while row < q.shape[1]:
        rows = slice(row, row + max(1, _CELLS_AT_ONCE[q.device.type] // (len(q) * max(1, int(hi[row:].max())))))
        row = rows.stop
        seen = slice(int(lo[rows].min()), int(hi[rows].max()))
        if seen.start >= seen.stop:
            continue
        first, last = (torch.from_numpy(bound[rows]).to(q.device)[:, None] for bound in (lo, hi))
        hidden = (key[seen] < first) | (key[seen] >= last)
        scores = (q[:, rows] @ k[seen].T).mul_(scale).masked_fill_(hidden, -torch.inf)
        weights = torch.softmax(scores, dim=-1).nan_to_num_(0.0)  # a row that sees nothing
        del scores
        part = coarse(coarse(weights) @ v[seen])
        out[:, rows] = part
        if dout is None:
            continue
        g = dout[:, rows]
        dv[seen] += coarse(weights).flatten(0, 1).T @ g.flatten(0, 1)
        delta = (g * part).sum(-1, keepdim=True)
        ds = coarse(weights.mul_((g @ v[seen].T).sub_(delta)))
        dq[:, rows] = ds @ k[seen] * scale
        dk[seen] += ds.flatten(0, 1).T @ q[:, rows].flatten(0, 1) * scale
    found = dict(zip(NAMES, (out, *map(coarse, (dq, dk[None], dv[None]))), strict=True))
    return found if dout is not None else {"out": out}


@dataclass(frozen=True)
class Oracle:
    """What one group of a problem should be, and how far from it rounding alone may lead."""

    group: Group
    exact: dict[str, Tensor]
    rounded: dict[str, Tensor]

    @classmethod
    def ask(
        cls,
        inputs: tuple[Tensor, ...],
        bounds: tuple[np.ndarray, np.ndarray],
        scale: float,
        group: Group,
    ) -> Oracle:
        """Work out the group's share of ``inputs``: q, k, v and perhaps dout, ``[b, s, heads, d]``."""
        takes = (group.queries, group.keys, group.keys, group.queries)
        tensors = tuple(take(x.detach()) for take, x in zip(takes, inputs, strict=False))
        dtype = tensors[0].dtype
        return cls(group, attention(tensors, bounds, scale, None), attention(tensors, bounds, scale, rounding=dtype))

    def judge(self, results: dict[str, Tensor]) -> dict[str, dict[str, float | bool]]:
        """For each result its error, what is allowed, the same of its worst block, and whether it is ``right``.

        Everything else of a result (other heads, other rows) must at least be finite.
        """
        return {name: self._judge(name, result) for name, result in results.items()}

    def _judge(self, name: str, result: Tensor) -> dict[str, float | bool]:
        exact, rounded = self.exact[name], self.rounded[name]
        take = self.group.queries if name in ("out", "dq") else self.group.keys
        got = take(result).to(exact.dtype)
        size = exact.norm().clamp_min(1e-30)
        allowed = TIMES * (rounded - exact).norm() / size + 1e-6
        error = (got - exact).norm() / size
        blocks, likely = (_blocks(x - exact) for x in (got, rounded))
        tolerated = TIMES_BLOCK * likely + 0.5 * likely.square().mean().sqrt() + 1e-6 * exact.square().mean().sqrt()
        worst = (blocks / tolerated.clamp_min(1e-30)).max()
        finite = bool(result.isfinite().all())
        return {
            "right": finite and bool(error <= allowed) and bool(worst <= 1),
            "error": _number(error),
            "allowed": _number(allowed),
            "worst_block": _number(worst),  # its error over what is allowed there
        }


def _blocks(x: Tensor) -> Tensor:
    """Root mean square of every block of positions: ``[g, s, d]`` to ``[g, blocks]``."""
    short = -x.shape[1] % BLOCK
    squares = torch.nn.functional.pad(x.square().mean(-1), (0, short))
    return squares.unflatten(1, (-1, BLOCK)).mean(-1).sqrt()


def _number(x: Tensor) -> float:
    """JSON knows neither NaN nor infinity."""
    return float(torch.nan_to_num(x, nan=1e30, posinf=1e30))
