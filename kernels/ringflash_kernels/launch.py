"""From tensors to kernel arguments: strides, copy-engine descriptors, and what an option becomes.

Kernels take any strides as long as the head dim is contiguous. A tensor whose head dim is not (an expanded gradient, say)
is copied here, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ringflash_kernels import interpreter
from ringflash_kernels.config import Config, parts, precision

if interpreter.active():
    interpreter.install()


class Intervals(Protocol):
    """Which keys each query sees, on the device: everything that a kernel learns of masks, layouts and ranks.

    ``begin``, ``end`` int32 ``[rows, s_q]``, rows 1 or the batch size. Positions are global, int32. ``query_blocks`` are int32
    ``[rows, blocks of queries, 4]``: key blocks ``start <= full_start <= full_end <= end``, visited from start to end, seen
    whole by every row from full_start to full_end. ``key_blocks`` are the same with the sides exchanged. ``query_span`` are the
    first block of queries that sees anything, and one past the last, known on the host.
    """

    @property
    def begin(self) -> Tensor: ...
    @property
    def end(self) -> Tensor: ...
    @property
    def query_positions(self) -> Tensor: ...
    @property
    def key_positions(self) -> Tensor: ...
    def query_blocks(self, block_q: int, block_k: int) -> Tensor: ...
    def key_blocks(self, block_q: int, block_k: int) -> Tensor: ...
    def query_span(self, block_q: int, block_k: int) -> tuple[int, int]: ...


class Scoring(Protocol):
    """How a query and a key become a weight; see ``ringflash.reference.Scoring``."""

    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float: ...
    @property
    def alibi_slopes(self) -> Tensor | None: ...
    @property
    def dropout_p(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def first_head(self) -> int: ...


def ready(x: Tensor) -> Tensor:
    """``x``, or a copy if its last dim is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def steps(**tensors: Tensor | None) -> dict[str, int]:
    """Strides of batch, sequence and heads, as ``q_b``, ``q_s``, ``q_h`` and so on."""
    return {
        f"{name}_{dim}": 0 if x is None else x.stride(i) for name, x in tensors.items() for i, dim in enumerate("bsh")
    }


def steps_of_lse(**tensors: Tensor | None) -> dict[str, int]:
    """Strides of batch, heads and sequence, as ``carry_lse_b``, ``carry_lse_h``, ``carry_lse_s``."""
    return {
        f"{name}_lse_{dim}": 0 if x is None else x.stride(i)
        for name, x in tensors.items()
        for i, dim in enumerate("bhs")
    }


def has_options(scoring: Scoring) -> bool:
    return bool(scoring.softcap or scoring.alibi_slopes is not None or scoring.dropout_p)


def loads(x: Tensor, rows: int, split: tuple[int, int], descriptors: bool) -> tuple[Any, Any]:
    """A tensor as a kernel reads it, in one or two parts of its head dim: descriptors of ``[batch, seq, heads, head_dim]`` with
    blocks of ``rows`` positions, or the tensor itself."""
    if not descriptors:
        return x, x if split[1] else None
    first, second = (describe(x, rows, columns) if columns else None for columns in split)
    return first, second


def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of ``[batch, seq, heads, head_dim]`` that brings ``rows`` positions of one head, ``columns`` wide."""
    steps, extent = [1], -(-x.shape[3] // 16) * 16
    for size, step in zip(x.shape[2::-1], x.stride()[2::-1], strict=True):
        # a dim of size 1 is never stepped over, and its stride may be any number: give it one that the engine takes
        steps.insert(0, step if size > 1 else extent)
        extent = max(extent, size * steps[0])
    return TensorDescriptor(x, list(x.shape), steps, [1, rows, 1, columns])


def describable(arch: int, *tensors: Tensor) -> bool:
    """Can the copy engine (Hopper and later; the interpreter plays along) address all of these?

    It wants 16-byte steps from a 16-byte boundary, and something to read. What it brings lies in shared memory, from where
    only matrix units multiply: true float32 goes through pointers.
    """
    return (arch == 0 or (arch >= 90 and tensors[0].element_size() == 2)) and all(
        x.numel() > 0
        and x.data_ptr() % 16 == 0
        and all(
            step > 0 and step * x.element_size() % 16 == 0
            for size, step in zip(x.shape[:3], x.stride()[:3], strict=True)
            if size > 1
        )
        for x in tensors
    )


def options(scoring: Scoring, intervals: Intervals) -> dict[str, Any]:
    """The kernel arguments of scale, softcap, ALiBi and dropout."""
    slopes, dropout = scoring.alibi_slopes, scoring.dropout_p > 0
    positions = slopes is not None or dropout
    return dict(
        scale=float(scoring.scale),
        softcap=float(scoring.softcap) or 1.0,
        seed=scoring.seed,
        threshold=int(scoring.dropout_p * 2**32) + (scoring.first_head + 1 << 32),
        keep_scale=1.0 / (1.0 - scoring.dropout_p),
        SLOPES=slopes,
        slope_stride=slopes.stride(0) if slopes is not None and slopes.ndim == 2 else 0,
        slope_step=slopes.stride(-1) if slopes is not None else 0,
        QUERY_POSITIONS=intervals.query_positions if positions else None,
        KEY_POSITIONS=intervals.key_positions if positions else None,
        SOFTCAP=scoring.softcap > 0,
        ALIBI=slopes is not None,
        DROPOUT=dropout,
    )


Split = Callable[[int], tuple[int, int]]


def shape(q: Tensor, v: Tensor, tiles: Config, split: Split = parts) -> dict[str, Any]:
    """The kernel arguments that fix the shape of its tiles: blocks, and how ``split`` cuts the head dims."""
    (d0, d1), (dv0, dv1) = split(q.shape[3]), split(v.shape[3])
    return dict(
        D=q.shape[3],
        D0=d0,
        D1=d1,
        DV=v.shape[3],
        DV0=dv0,
        DV1=dv1,
        BLOCK_Q=tiles.block_q,
        BLOCK_K=tiles.block_k,
        PRECISION=precision(q.dtype, max(q.shape[3], v.shape[3])),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def sizes(q: Tensor, k: Tensor) -> dict[str, int]:
    return dict(queries=q.shape[1], keys=k.shape[1], heads=q.shape[2], group=q.shape[2] // k.shape[2])


def rows(intervals: Intervals) -> dict[str, Any]:
    """Row intervals; batch rows that share them have no stride."""
    begin, end = intervals.begin, intervals.end
    return dict(BEGIN=begin, END=end, row_stride=begin.stride(0) if begin.shape[0] > 1 else 0)


def blocks(table: Tensor) -> dict[str, Any]:
    """Block ranges, likewise."""
    return dict(BLOCKS=table, block_stride=table.stride(0) if table.shape[0] > 1 else 0)
