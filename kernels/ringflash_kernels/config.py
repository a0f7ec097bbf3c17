"""Which tile shapes a kernel runs with: a reviewed table, not an autotuner.

Autotuning at the first step stalls every rank for minutes, and ranks that choose differently round differently. So the
choice is a table, read by (architecture, direction, what the kernel has to do, head dim), written by hand from what the
compiler reports and what ``benchmarks/tune.py`` measures. An architecture that is not in it runs a small tile that fits
everywhere.

    direction    forward | decode | backward (dq by reduce-add) | dkdv, dq (two passes, nothing added out of order)
    work         plain | options (softcap, ALiBi, dropout: more registers) | float32
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

Direction = Literal["forward", "decode", "backward", "dkdv", "dq"]
Work = Literal["plain", "options", "float32"]


@dataclass(frozen=True)
class Config:
    """A tile of ``block_q`` queries by ``block_k`` keys, on so many warps, with loads so many stages ahead."""

    block_q: int
    block_k: int
    warps: int
    stages: int


Rows = tuple[tuple[int, Config], ...]  # (largest padded head dim, what to run), ascending

# What the compiler makes of each row is in tests/kernels/compiled.json; no row has been timed on a GPU yet.
TABLE: dict[tuple[int, Direction, Work], Rows] = {
    (80, "forward", "plain"): ((64, Config(128, 64, 8, 3)), (128, Config(128, 32, 8, 3)), (256, Config(64, 32, 8, 2))),
    (80, "forward", "options"): ((256, Config(64, 32, 8, 2)),),
    (80, "decode", "plain"): ((256, Config(64, 64, 4, 2)),),
    (80, "backward", "plain"): ((64, Config(32, 128, 8, 2)), (128, Config(32, 64, 8, 2)), (256, Config(32, 32, 8, 1))),
    (80, "backward", "options"): ((128, Config(32, 64, 8, 1)), (256, Config(32, 32, 8, 1))),
    (80, "dkdv", "plain"): ((64, Config(32, 128, 8, 2)), (128, Config(32, 64, 8, 2)), (256, Config(32, 32, 8, 1))),
    (80, "dkdv", "options"): ((64, Config(32, 64, 8, 1)), (256, Config(32, 32, 8, 1))),
    (80, "dq", "plain"): ((128, Config(128, 32, 8, 2)), (256, Config(64, 32, 8, 1))),
    (80, "dq", "options"): ((128, Config(64, 32, 8, 2)), (256, Config(64, 32, 8, 1))),
    (90, "forward", "plain"): (
        (64, Config(128, 128, 8, 2)),
        (96, Config(128, 64, 8, 3)),  # two parts of a head dim overlap with the softmax only at 64 keys
        (128, Config(128, 128, 8, 2)),
        (256, Config(128, 64, 8, 2)),
    ),
    (90, "forward", "options"): ((256, Config(128, 64, 8, 2)),),
    (90, "decode", "plain"): ((128, Config(64, 64, 4, 3)), (256, Config(64, 64, 4, 2))),
    (90, "backward", "plain"): ((128, Config(64, 128, 8, 2)), (192, Config(64, 64, 8, 2))),
    (90, "backward", "options"): ((64, Config(64, 64, 8, 2)),),  # wider, one pass spills or leaves wgmma
    (90, "dkdv", "plain"): ((128, Config(64, 128, 8, 2)), (256, Config(64, 64, 8, 2))),
    (90, "dkdv", "options"): ((64, Config(64, 64, 8, 2)), (128, Config(32, 64, 8, 2)), (256, Config(32, 64, 8, 1))),
    (90, "dq", "plain"): ((64, Config(128, 128, 8, 2)), (128, Config(128, 64, 8, 2)), (256, Config(64, 64, 8, 2))),
    (90, "dq", "options"): ((256, Config(64, 64, 8, 2)),),
    # Blackwell: dk and dv of 128 keys by 128 overflow tensor memory, and what is compiled then is an empty kernel
    (100, "forward", "plain"): ((128, Config(128, 128, 8, 2)), (256, Config(128, 64, 8, 2))),
    (100, "forward", "options"): ((256, Config(128, 64, 8, 2)),),
    (100, "decode", "plain"): ((128, Config(64, 64, 4, 3)), (256, Config(64, 64, 4, 2))),
    (100, "backward", "plain"): ((64, Config(64, 128, 8, 2)), (128, Config(64, 64, 8, 2))),
    (100, "backward", "options"): ((128, Config(64, 64, 8, 1)),),
    (100, "dkdv", "plain"): ((64, Config(64, 128, 8, 2)), (128, Config(64, 64, 8, 2)), (256, Config(32, 32, 8, 1))),
    (100, "dkdv", "options"): ((128, Config(64, 64, 8, 1)), (256, Config(32, 32, 8, 1))),
    (100, "dq", "plain"): ((128, Config(128, 64, 8, 2)), (256, Config(64, 32, 8, 1))),
    (100, "dq", "options"): ((128, Config(64, 64, 8, 2)), (256, Config(64, 32, 8, 1))),
}
FLOAT32: dict[Direction, Rows] = {  # one way for all: true float32 does not run on the matrix units
    "forward": ((64, Config(64, 32, 8, 2)), (256, Config(32, 16, 8, 2))),
    "decode": ((128, Config(16, 32, 4, 1)), (256, Config(16, 16, 4, 1))),
    "backward": ((128, Config(32, 32, 8, 1)), (256, Config(16, 16, 8, 1))),
    "dkdv": ((128, Config(32, 32, 8, 1)), (256, Config(16, 16, 8, 1))),
    "dq": ((256, Config(32, 16, 8, 1)),),
}

ELSEWHERE: Rows = ((128, Config(64, 32, 4, 2)), (256, Config(32, 32, 4, 1)))  # fits where shared memory is 99 KiB
INTERPRETED = Config(32, 32, 4, 1)  # many seams in few rows

_overrides: dict[Direction, Config] = {}


def choose(direction: Direction, arch: int, head_dim: int, value_dim: int, work: Work) -> Config:
    """What to run on ``arch`` (80, 90, 100, ...; 0 is the interpreter) for these head dims."""
    found = _find(direction, arch, head_dim, value_dim, work)
    assert found is not None, "only backward may lack a row, and who asks for it looks first"
    return found


def has_one_pass(arch: int, head_dim: int, value_dim: int, work: Work) -> bool:
    """Does backward have a tile for one pass? Where registers or tensor memory cannot hold it, there is no row."""
    return _find("backward", arch, head_dim, value_dim, work) is not None


def _find(direction: Direction, arch: int, head_dim: int, value_dim: int, work: Work) -> Config | None:
    if direction in _overrides:
        return _overrides[direction]
    if arch == 0:
        return INTERPRETED
    wide = max(sum(parts(head_dim)), sum(parts(value_dim)))
    known = arch in {arch for arch, *_ in TABLE}
    if direction == "backward" and not known:
        rows: Rows = ()
    elif work == "float32":
        rows = FLOAT32[direction]
    elif known:
        rows = TABLE[arch, direction, "plain" if direction == "decode" else work]
    else:
        rows = ELSEWHERE
    return next((config for largest, config in rows if wide <= largest), None)


@contextmanager
def use(direction: Direction, config: Config) -> Iterator[None]:
    """Run ``direction`` with ``config`` inside this block, whatever the table says: for tests and the tuner."""
    before = _overrides.get(direction)
    _overrides[direction] = config
    try:
        yield
    finally:
        if before is None:
            del _overrides[direction]
        else:
            _overrides[direction] = before


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> int:
    """The table's name for a device: 80 for A100, 90 for H100 and H200, 100 for B200; 0 for a CPU (the interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 100 if major == 10 else 10 * major + minor


@lru_cache(maxsize=256)
def parts(head_dim: int) -> tuple[int, int]:
    """A head dim as powers of two that cover it, of at least 16: one up to 64, two beyond, the second 0 if one is enough.

    >>> parts(128), parts(192), parts(80), parts(112), parts(40)
    ((128, 0), (128, 64), (64, 16), (64, 64), (64, 0))
    """
    if head_dim <= 64:
        return max(16, 1 << (head_dim - 1).bit_length()), 0
    first = 1 << (head_dim.bit_length() - 1)
    return first, 0 if first == head_dim else max(16, 1 << (head_dim - first - 1).bit_length())


def halves(head_dim: int) -> tuple[int, int]:
    """:func:`parts`, with 128 and 256 cut in two: where a whole head dim of accumulators does not fit into registers."""
    return (head_dim // 2, head_dim // 2) if head_dim in (128, 256) else parts(head_dim)


def work(dtype: torch.dtype, options: bool) -> Work:
    """What a kernel has to do: see the module."""
    return "float32" if dtype == torch.float32 else "options" if options else "plain"


def precision(dtype: torch.dtype, head_dim: int) -> str:
    """How float32 tiles are multiplied, by PyTorch's own setting ``torch.set_float32_matmul_precision``.

    ``"highest"`` (its default) is true float32; ``"high"`` and ``"medium"`` are 3xTF32, which the matrix units run and which
    keeps all but the last two bits or so. Above head dim 128 that does not fit into registers, and true float32 it is. Other
    dtypes have one way.
    """
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" or head_dim > 128:
        return "ieee"
    return "tf32x3"
