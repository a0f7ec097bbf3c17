"""What a kernel learns of masks and layouts: for each query row, the run of local keys that it sees.

``plan.intervals`` derives them on the host; here they become tensors on a device, made once per plan, for all of its
visits together, and shared by every layer, forward and backward. Kernels that walk over blocks of keys are told, for each
block of queries, which blocks to visit and which of them every row sees whole; kernels that only know rectangles and
triangles get the same cells cut into tiles:

    end flat           end climbing by one          anything else (windows, short documents)

    ████████           full │ causal                 ██▒▒····   blocks of 256 queries,
    ████████          ██████│█                       ·▒██▒···   with a mask on the ragged edges
    ████████          ██████│██                      ··▒▒██▒·
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
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
_SHARDINGS_KEPT = 8
_ALIGNMENT = 16  # int32 numbers: Triton compiles a kernel anew for pointers that are not multiples of 16 bytes


class Tile(NamedTuple):
    """Queries ``q0:q1`` against keys ``k0:k1``: all cells, the lower triangle, or those inside the row intervals."""

    q0: int
    q1: int
    k0: int
    k1: int
    kind: Literal["full", "causal", "masked"]


class Intervals:
    """Row intervals of one visit, on one device; alone, or as views ``among`` those of all visits of the plan.

    Query i sees the local keys ``[begin, end)``. ``rows`` in the shapes below is 1 or the batch size.
    """

    def __init__(self, plan: Plan, shard: int, device: torch.device, among: _Visits | None = None) -> None:
        self._visits = _Visits(plan, (shard,), device) if among is None else among
        self._place = self._visits.shards.index(shard)
        self._device = device

    @property
    def begin(self) -> Tensor:
        """The first key that each query sees, int32 ``[rows, s_q]``; non-decreasing along a row."""
        return self._visits.rows.tensors[2 * self._place]

    @property
    def end(self) -> Tensor:
        """One past the last key that each query sees, int32 ``[rows, s_q]``; non-decreasing, never before ``begin``."""
        return self._visits.rows.tensors[2 * self._place + 1]

    @property
    def query_positions(self) -> Tensor:
        """Global positions of the queries, int32 ``[s_q]``, for ALiBi and dropout."""
        return self._visits.side(0, self._place)

    @property
    def key_positions(self) -> Tensor:
        """Global positions of the keys, int32 ``[s_k]``."""
        return self._visits.side(1, self._place)

    @property
    def queries(self) -> Tensor:
        """``query_positions`` as int64, for arithmetic that outgrows 32 bits."""
        return self.query_positions.long()

    @property
    def keys(self) -> Tensor:
        """``key_positions`` as int64."""
        return self.key_positions.long()

    def query_blocks(self, block_q: int, block_k: int) -> Tensor:
        """The key blocks that each block of queries visits, int32 ``[rows, ceil(s_q / block_q), 4]``.

        Four block numbers ``start <= full_start <= full_end <= end``: no row sees a key outside blocks ``[start, end)``,
        and every row sees all of ``[full_start, full_end)``. A key block that reaches past the last key is never full.
        """
        return self._visits.blocks(query_blocks, block_q, block_k).tensors[self._place]

    def key_blocks(self, block_q: int, block_k: int) -> Tensor:
        """The query blocks that visit each block of keys, int32 ``[rows, ceil(s_k / block_k), 4]``: the transposed.

        A query block that reaches past the last query is full if all its queries see the whole block of keys.
        """
        return self._visits.blocks(key_blocks, block_q, block_k).tensors[self._place]

    def query_span(self, block_q: int, block_k: int) -> tuple[int, int]:
        """The first block of queries that sees any key, in any batch row, and one past the last; (0, 0) if none does."""
        table = self._visits.blocks(query_blocks, block_q, block_k).host[self._place]
        seeing = np.flatnonzero((table[..., 0] < table[..., 3]).any(axis=0))
        return (int(seeing[0]), int(seeing[-1]) + 1) if len(seeing) else (0, 0)

    @cached_property
    def tiles(self) -> list[list[Tile]]:
        """The same cells as rectangles and triangles, one list for each batch row that the mask tells apart."""
        begin, end = self._visits.rows.host[2 * self._place :][:2]
        return [tiles(*row) for row in zip(begin, end, strict=True)]

    def seen(self, queries: slice, keys: slice) -> Tensor:
        """Which of these keys these queries see: bool ``[rows, queries, keys]``."""
        key = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=self._device)
        return (key >= self.begin[:, queries, None]) & (key < self.end[:, queries, None])


class _Visits:
    """The tables of some visits of one rank, on one device: each kind of table in one copy, when somebody asks for it."""

    def __init__(self, plan: Plan, shards: Sequence[int], device: torch.device) -> None:
        self.shards = tuple(shards)
        self._plan, self._device, self._lock = plan, device, threading.Lock()
        self._made: dict[object, _Copied] = {}
        self.rows = self._once("rows", lambda: [table for pair in plan.tables(self.shards) for table in pair])

    def side(self, side: int, place: int) -> Tensor:
        """Global positions of the queries (0) or the keys (1) of a visit; one of the two is the same in all visits."""
        copied = self._once("positions", self._positions)
        stays = 0 if self._plan.travels == "keys" else 1
        return copied.tensors[0 if side == stays else 1 + place]

    def blocks(self, ranges: Callable[..., np.ndarray], block_q: int, block_k: int) -> _Copied:
        """For each shard its block ranges, found by ``ranges`` row by row."""
        return self._once((ranges, block_q, block_k), lambda: self._blocks(ranges, block_q, block_k))

    @property
    def nbytes(self) -> int:
        """What the device holds; the host keeps no more than that."""
        return 1024 + sum(made.nbytes for made in self._made.values())  # an object costs something beside its tensors

    def _once(self, name: object, make: Callable[[], list[np.ndarray]]) -> _Copied:
        with self._lock:
            if name not in self._made:
                self._made[name] = _Copied(make(), self._device)
            return self._made[name]

    def _positions(self) -> list[np.ndarray]:
        first, past = self._plan.q_offset, self._plan.q_offset + self._plan.queries.length
        if max(past, self._plan.keys.length) - min(first, 0) > 1 << 31:  # their distance has to fit too
            raise ValueError(
                f"positions from {first} to {past - 1} under ALiBi or dropout; they need to fit into 32 bits: use a "
                "smaller q_offset"
            )
        sides = [self._plan.sides(shard) for shard in self.shards]
        stays, travels = (0, 1) if self._plan.travels == "keys" else (1, 0)
        return [side[stays] for side in sides[:1]] + [side[travels] for side in sides]

    def _blocks(self, ranges: Callable[..., np.ndarray], block_q: int, block_k: int) -> list[np.ndarray]:
        pairs = zip(self.rows.host[::2], self.rows.host[1::2], strict=True)
        return [
            np.stack([ranges(*row, self._plan.key_tokens(shard), block_q, block_k) for row in zip(*pair, strict=True)])
            for shard, pair in zip(self.shards, pairs, strict=True)
        ]


class _Copied:
    """Arrays that became int32 tensors on a device: views of one buffer, copied at once while the host goes on.

    A stream that asks for them waits for the copy, if another stream has posted it.
    """

    def __init__(self, arrays: Sequence[np.ndarray], device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        if _capturing(device):
            raise RuntimeError(
                "a CUDA graph is being captured, and attention has to build tables for this mask and these lengths first: run "
                "the step once before you capture it"
            )
        edges = np.cumsum([0, *(-(-x.size // _ALIGNMENT) * _ALIGNMENT for x in arrays)]).tolist()
        source = torch.empty(edges[-1], dtype=torch.int32, device="cpu", pin_memory=on_cuda)
        self.host = [source.numpy()[at : at + x.size].reshape(x.shape) for at, x in zip(edges, arrays, strict=False)]
        for inside, array in zip(self.host, arrays, strict=True):
            inside[...] = array
        self._buffer = source.to(device, non_blocking=True)
        self._views = [self._buffer[at : at + x.size].view(x.shape) for at, x in zip(edges, arrays, strict=False)]
        self._posted = None
        if on_cuda:
            stream = torch.cuda.current_stream(device)
            self._posted = stream, stream.record_event()

    @property
    def tensors(self) -> list[Tensor]:
        if self._posted is not None:
            mine, (theirs, arrival) = torch.cuda.current_stream(self._buffer.device), self._posted
            if mine != theirs and not torch.cuda.is_current_stream_capturing():
                mine.wait_event(arrival)
                self._buffer.record_stream(mine)
        return self._views

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes


def _capturing(device: torch.device) -> bool:
    """Is a CUDA graph being captured on the current stream of this device?"""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class _Cache:
    """The tables that were used last, up to a number of bytes and of shardings."""

    def __init__(self, most: int, shardings: int = _SHARDINGS_KEPT) -> None:
        self._most, self._shardings, self._lock = most, shardings, threading.Lock()
        self._captured: set[_Visits] = set()
        self._kept: OrderedDict[tuple[Plan, torch.device], tuple[_Visits, dict[int, Intervals]]] = OrderedDict()

    def get(self, plan: Plan, shard: int, device: torch.device) -> Intervals:
        key = (plan, device)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)  # the newest stands last
            else:
                visits = _Visits(plan, [visit.shard for visit in plan.legs.visits], device)
                self._kept[key] = visits, {shard: Intervals(plan, shard, device, visits) for shard in visits.shards}
                while len(self._kept) > 1 and not self._fits():
                    self._kept.popitem(last=False)
            visits, tables = self._kept[key]
            if _capturing(device):
                self._captured.add(visits)  # a graph holds addresses: these tables live as long as the process
            return tables.get(shard) or Intervals(plan, shard, device)

    def _fits(self) -> bool:
        shardings = {
            (p.queries, p.keys, p.mask, p.q_offset) for p, _ in self._kept
        }  # whichever side travels, and however
        return len(shardings) <= self._shardings and self.nbytes <= self._most

    @property
    def nbytes(self) -> int:
        return sum(visits.nbytes for visits, _ in self._kept.values())


intervals_of = _Cache(_BYTES_KEPT).get
"""``intervals_of(plan, shard, device)``: the table of a visit, kept for the next layer and the next step."""


def query_blocks(begin: np.ndarray, end: np.ndarray, keys: int, block_q: int, block_k: int) -> np.ndarray:
    """``Intervals.query_blocks`` of one batch row, int32 ``[blocks, 4]``.

    >>> query_blocks(np.zeros(6, int), np.arange(1, 7), 6, 2, 2).tolist()  # causal: the diagonal is partly visible
    [[0, 1, 1, 1], [0, 0, 1, 2], [0, 0, 2, 3]]
    """
    edges = np.minimum(np.arange(0, len(begin) + block_q, block_q), len(begin))
    seeing = np.flatnonzero(begin < end)
    before = np.searchsorted(seeing, edges)
    some = before[:-1] < before[1:]
    all_see = (np.diff(before) == np.diff(edges))[some]
    first, last = seeing[before[:-1][some]], seeing[before[1:][some] - 1]
    table = np.zeros((len(some), 4), dtype=np.int32)
    full = np.where(all_see, -(-begin[last] // block_k), 0), np.where(all_see, end[first] // block_k, 0)
    table[some] = _ranges(begin[first] // block_k, *full, -(-end[last] // block_k))
    return table


def key_blocks(begin: np.ndarray, end: np.ndarray, keys: int, block_q: int, block_k: int) -> np.ndarray:
    """``Intervals.key_blocks`` of one batch row, int32 ``[blocks, 4]``.

    >>> key_blocks(np.zeros(6, int), np.arange(1, 7), 6, 2, 2).tolist()
    [[0, 1, 3, 3], [1, 2, 3, 3], [2, 3, 3, 3]]
    """
    low = np.arange(0, keys, block_k, dtype=begin.dtype)
    high = low + block_k
    seeing = np.flatnonzero(begin < end)
    first, past = np.searchsorted(end[seeing], low, side="right"), np.searchsorted(begin[seeing], high)
    some = first < past
    full_first, full_past = np.searchsorted(end, high)[some], np.searchsorted(begin, low, side="right")[some]
    full_end = np.where(full_past == len(begin), -(-full_past // block_q), full_past // block_q)
    table = np.zeros((len(low), 4), dtype=np.int32)
    table[some] = _ranges(
        seeing[first[some]] // block_q,
        -(-full_first // block_q),
        full_end,
        seeing[past[some] - 1] // block_q + 1,
    )
    return table


def _ranges(start: np.ndarray, full_start: np.ndarray, full_end: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The four numbers side by side; where nothing is full, both in the middle are ``end``."""
    full = full_start < full_end
    return np.stack([start, np.where(full, full_start, end), np.where(full, full_end, end), end], axis=1)


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
