"""delta, what ds subtracts from dp: the gradient of the softmax's denominator, and of lse itself.

ds = p (dp - delta)        delta = rowsum(dout * out) - dlse
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash_kernels import config, launch
from ringflash_kernels.tiles import tile


@triton.jit(do_not_specialize=["queries", "dlse_b", "dlse_h", "dlse_s"])
def _rowsum(
    DOUT, OUT, DLSE, DELTA, queries, heads,
    dout_b, dout_s, dout_h, out_b, out_s, out_h, dlse_b, dlse_h, dlse_s,
    DV: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    b = tl.program_id(0) // blocks // heads
    h = tl.program_id(0) // blocks % heads
    batch = b.to(tl.int64)
    row = first + tl.arange(0, ROWS)
    dout_base = DOUT + batch * dout_b + h.to(tl.int64) * dout_h
    out_base = OUT + batch * out_b + h.to(tl.int64) * out_h
    dout = tile(DOUT, dout_base, b, first, h, queries, dout_s, 0, ROWS, WIDTH, DV, False).to(tl.float32)
    out = tile(OUT, out_base, b, first, h, queries, out_s, 0, ROWS, WIDTH, DV, False).to(tl.float32)
    dlse_at = DLSE + batch * dlse_b + h.to(tl.int64) * dlse_h + row.to(tl.int64) * dlse_s
    dlse = tl.load(dlse_at, mask=row < queries, other=0.0)
    tl.store(DELTA + (batch * heads + h) * queries + row, tl.sum(dout * out, 1) - dlse, mask=row < queries)


def delta(dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
    """``rowsum(dout * out) - dlse``, float32 ``[b, h, s]``, from ``[b, s, h, d_v]`` twice and ``[b, h, s]``."""
    dout, out = launch.ready(dout), launch.ready(out)
    batch, queries, heads, width = out.shape
    found = torch.empty(batch, heads, queries, dtype=torch.float32, device=out.device)
    if found.numel():
        rows = (64 if width <= 128 else 32) if config.architecture(out.device) else 16
        _rowsum[(triton.cdiv(queries, rows) * batch * heads,)](
            dout, out, dlse, found, queries, heads, **launch.steps(dout=dout, out=out),
            **{f"dlse_{dim}": dlse.stride(i) for i, dim in enumerate("bhs")},
            DV=width, WIDTH=max(16, triton.next_power_of_2(width)), ROWS=rows, num_warps=4,
        )  # fmt: skip
    return found
