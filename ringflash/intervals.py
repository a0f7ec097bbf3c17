"""What a kernel learns of masks and layouts: for each query row, the run of local keys that it sees.

``plan.intervals`` derives them on the host; here they become tensors on a device, made once per plan and shard and shared
by every layer, forward and backward. Kernels that only know rectangles and triangles get them cut into tiles:

    end flat           end climbing by one          anything else (windows, short documents)

    ████████           full │ causal                 ██▒▒····   blocks of 256 queries,
    ████████          ██████│█                       ·▒██▒···   with a mask on the ragged edges
    ████████          ██████│██                      ··▒▒██▒·
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringflash.plan import Plan

_BLOCK = 256  # queries under one additive mask
_SHORT = 32  # a run of rows below this is not worth a call of its own
_BYTES_KEPT = 128 << 20  # packed documents differ every step, and their tables must not pile up


class Tile(NamedTuple):
    """Queries ``q0:q1`` against keys ``k0:k1``: all cells, the lower triangle, or those inside the row intervals."""

    q0: int
    q1: int
    k0: int
    k1: int
    kind: Literal["full", "causal", "masked"]


class Intervals:
    """Row intervals of one visit, on one device.

    ``begin``, ``end``: int32 ``[rows, s_q]``, ``rows`` 1 or the batch size; query i sees the local keys ``[begin, end)``.
    ``queries``, ``keys``: global positions, int64 ``[s_q]`` and ``[s_k]``, for ALiBi and dropout.
    """

    def __init__(self, plan: Plan, shard: int, device: torch.device) -> None:
        self._plan, self._shard, self._device = plan, shard, device
        self._host = plan.intervals(shard)
        self.begin, self.end = (torch.from_numpy(x).to(device) for x in self._host)

    @cached_property
    def queries(self) -> Tensor:
        return torch.tensor(self._plan.q_positions, device=self._device)

    @cached_property
    def keys(self) -> Tensor:
        return torch.tensor(self._plan.keys.positions(self._shard), device=self._device)

    @cached_property
    def tiles(self) -> list[list[Tile]]:
        """The same cells as rectangles and triangles, one list for each batch row that the mask tells apart."""
        return [tiles(begin, end) for begin, end in zip(*self._host, strict=True)]

    def seen(self, queries: slice, keys: slice) -> Tensor:
        """Which of these keys these queries see: bool ``[rows, queries, keys]``."""
        key = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=self._device)
        return (key >= self.begin[:, queries, None]) & (key < self.end[:, queries, None])

    @property
    def nbytes(self) -> int:
        """All that this table may come to hold: positions are made when somebody asks for them."""
        positions = 8 * (len(self._plan.q_positions) + self._plan.keys.tokens(self._shard))
        return self.begin.nbytes + self.end.nbytes + positions + 1024  # an object costs something beside its tensors


class _Cache:
    """The tables that were used last, up to a number of bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes, self._lock = most, 0, threading.Lock()
        self._tables: OrderedDict[tuple[Plan, int, torch.device], Intervals] = OrderedDict()

    def get(self, plan: Plan, shard: int, device: torch.device) -> Intervals:
        key = (plan, shard, device)
        with self._lock:
            found = self._tables.pop(key, None)
            if found is None:
                found = Intervals(plan, shard, device)
                self._bytes += found.nbytes
                while self._tables and self._bytes > self._most:
                    self._bytes -= self._tables.popitem(last=False)[1].nbytes
            self._tables[key] = found  # the newest stands last
            return found


intervals_of = _Cache(_BYTES_KEPT).get
"""``intervals_of(plan, shard, device)``: the table of a visit, kept for the next layer and the next step."""


def tiles(begin: np.ndarray, end: np.ndarray) -> list[Tile]:
    """Cut the cells ``begin[i] <= j < end[i]`` of one batch row into tiles; each cell is in exactly one.

    >>> tiles(np.zeros(64, int), 40 + np.arange(64))
    [Tile(q0=0, q1=64, k0=0, k1=39, kind='full'), Tile(q0=0, q1=64, k0=39, k1=103, kind='causal')]
    """
    found: list[Tile] = []
    for first, last, climbs in _stretches(begin, end):
        b, e = int(begin[first]), int(end[first])
        if climbs is None:
            found += _ragged(begin, end, first, last)
        elif not climbs:
            found.append(Tile(first, last, b, e, "full"))
        elif e == b:  # the first row sees nothing
            found.append(Tile(first + 1, last, b, b + last - first - 1, "causal"))
        else:
            found += [Tile(first, last, b, e - 1, "full"), Tile(first, last, e - 1, e - 1 + last - first, "causal")]
    return [t for t in found if t.q0 < t.q1 and t.k0 < t.k1]


def _stretches(begin: np.ndarray, end: np.ndarray) -> Iterator[tuple[int, int, bool | None]]:
    """Rows cut where the intervals change their manner: ``(first, last + 1, does end climb)``, None for ragged rows."""
    climb = np.diff(end)
    manner = np.where((np.diff(begin) != 0) | (climb > 1), 2, climb)  # of the step from each row to the next
    edges = [0, *(np.flatnonzero(np.diff(manner)) + 1).tolist(), len(manner)] if len(manner) else []
    at = 0
    for start, stop in pairwise(edges):
        first, last = max(at, start), stop + 1
        if manner[start] == 2 or last - first < _SHORT:
            continue
        if at < first:
            yield at, first, None
        yield first, last, bool(manner[start])
        at = last
    if at < len(begin):
        yield at, len(begin), None


def _ragged(begin: np.ndarray, end: np.ndarray, first: int, last: int) -> Iterator[Tile]:
    for q0 in range(first, last, _BLOCK):
        q1 = min(last, q0 + _BLOCK)
        k0, k1 = int(begin[q0]), int(end[q1 - 1])
        full0, full1 = int(begin[q1 - 1]), int(end[q0])  # every row sees these
        if full1 - full0 < _SHORT:
            yield Tile(q0, q1, k0, k1, "masked")
        else:
            yield Tile(q0, q1, k0, full0, "masked")
            yield Tile(q0, q1, full0, full1, "full")
            yield Tile(q0, q1, full1, k1, "masked")
