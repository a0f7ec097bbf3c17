"""Backward: gradients through row intervals, from the lse and delta of whole rows.

With lse and delta of the whole softmax, over all keys of all ranks, p = exp(s - lse) is final, and gradients of blocks of
keys simply add:

    p = exp(s - lse)    dv = p^T dout    dp = dout v^T    ds = p (dp - delta)    dk = scale ds^T q    dq = scale ds k

One pass makes all three and adds dq to memory tile by tile: five products. Two passes (``key_gradients``, then
``query_gradients``) make seven, and the same bits every time.

Dao 2023 (arXiv 2307.08691), algorithm 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ringflash_kernels import config, launch
from ringflash_kernels.key_gradients import key_gradients
from ringflash_kernels.query_gradients import query_gradients


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    intervals: launch.Intervals,
    scoring: launch.Scoring,
    carry: Tensor | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through these keys: dq with ``carry`` added to it, dk and dv, in the two ``dtypes`` (of dq; of dk and dv).

    ``lse`` and ``delta``, float32 ``[b, h, s_q]``, are those of whole rows. ``carry``, a contiguous float32 dq, is consumed.
    ``deterministic`` runs two passes and gives the same bits every time; otherwise, where one pass has a tile, the order in
    which blocks of keys add to dq is left to the hardware, and dq differs from run to run by rounding. dk and dv never do.
    """
    dout, q, k, v = map(launch.ready, (dout, q, k, v))
    call = _Call(dout, q, k, v, lse.contiguous(), delta.contiguous(), intervals, scoring)
    dk, dv = (torch.empty(x.shape, dtype=dtypes[1], device=x.device) for x in (k, v))
    if deterministic or not call.one_pass:
        call.keys_pass("dkdv", dk, dv, None)
        return call.queries_pass(carry, dtypes[0]), dk, dv
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if carry is None else carry
    call.keys_pass("backward", dk, dv, dq)
    return dq.to(dtypes[0]), dk, dv


class _Call(NamedTuple):
    """What both passes need to know."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    delta: Tensor
    intervals: launch.Intervals
    scoring: launch.Scoring

    @property
    def problem(self) -> tuple[int, int, int, config.Work]:
        work = config.work(self.q.dtype, launch.has_options(self.scoring))
        return config.architecture(self.q.device), self.q.shape[3], self.v.shape[3], work

    @property
    def one_pass(self) -> bool:
        return config.has_one_pass(*self.problem)

    def descriptors(self, *read: Tensor) -> bool:
        return launch.describable(config.architecture(self.q.device), *read)

    def arguments(self) -> dict[str, Any]:
        """ds is rounded to the input dtype before its last products, and there it holds the scale already: one multiplication
        less. Except in float16, where the scale could push it below the smallest normal number."""
        scale = float(self.scoring.scale)
        late = self.q.dtype == torch.float16
        return (
            launch.sizes(self.q, self.k)
            | launch.options(self.scoring, self.intervals)
            | launch.steps(q=self.q, k=self.k, v=self.v, dout=self.dout)
            | dict(LSE=self.lse, DELTA=self.delta)
            | dict(ds_scale=1.0 if late else scale, grad_scale=scale if late else 1.0)
        )

    def keys_pass(self, direction: config.Direction, dk: Tensor, dv: Tensor, dq: Tensor | None) -> None:
        """Writes dk and dv, and adds to dq unless it is None."""
        batch, keys, heads, _ = self.k.shape
        tiles = config.choose(direction, *self.problem)
        descriptors = self.descriptors(self.q, self.dout, *(() if dq is None else (dq,)))
        split, value_split = config.halves(self.q.shape[3]), config.halves(self.v.shape[3])
        q0, q1 = launch.loads(self.q, tiles.block_q, split, descriptors)
        dout0, dout1 = launch.loads(self.dout, tiles.block_q, value_split, descriptors)
        dq0, dq1 = (None, None) if dq is None else launch.loads(dq, tiles.block_q, split, descriptors)
        if keys:
            key_gradients[(triton.cdiv(keys, tiles.block_k) * batch * heads,)](
                **dict(Q0=q0, Q1=q1, K=self.k, V=self.v, DOUT0=dout0, DOUT1=dout1, DQ0=dq0, DQ1=dq1, DK=dk, DV_=dv),
                **launch.rows(self.intervals),
                **launch.blocks(self.intervals.key_blocks(tiles.block_q, tiles.block_k)),
                **self.arguments(),
                **launch.steps(dk=dk, dv=dv, dq=dq),
                **launch.shape(self.q, self.v, tiles, config.halves),
                DESCRIPTORS=descriptors,
                ADD_DQ=dq is not None,
            )

    def queries_pass(self, carry: Tensor | None, dtype: torch.dtype) -> Tensor:
        """dq, with ``carry`` added."""
        batch, queries, heads, _ = self.q.shape
        dq = carry
        if dq is None or dq.dtype != dtype:
            dq = torch.empty(self.q.shape, dtype=dtype, device=self.q.device)
        tiles = config.choose("dq", *self.problem)
        descriptors = self.descriptors(self.k, self.v)
        k0, k1 = launch.loads(self.k, tiles.block_k, config.parts(self.k.shape[3]), descriptors)
        v0, v1 = launch.loads(self.v, tiles.block_k, config.parts(self.v.shape[3]), descriptors)
        first_block, past = 0, triton.cdiv(queries, tiles.block_q)
        if carry is not None and dq is carry:  # queries that see nothing here have their sum already
            first_block, past = self.intervals.query_span(tiles.block_q, tiles.block_k)
        if past > first_block:
            query_gradients[((past - first_block) * batch * heads,)](
                first_block=first_block,
                blocks=past - first_block,
                **dict(Q=self.q, K0=k0, K1=k1, V0=v0, V1=v1, DOUT=self.dout, OLD=carry, DQ=dq),
                **launch.rows(self.intervals),
                **launch.blocks(self.intervals.query_blocks(tiles.block_q, tiles.block_k)),
                **self.arguments(),
                **launch.steps(dq=dq, old=carry),
                **launch.shape(self.q, self.v, tiles),
                DESCRIPTORS=descriptors,
                ADD=carry is not None,
            )
        return dq
