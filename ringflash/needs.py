"""Which rank needs which part of each shard.

One side of attention stays (usually the queries), the other travels. What stays on a rank needs some runs of what
travels, and where these begin and end cuts shards into *pieces*: all tokens of a piece are needed by the same ranks. A
route moves pieces. Causal zigzag on three ranks, chunks 0 to 5:

    shard   pieces     needed by ranks
    0       chunk 0    0 1 2              early keys: everybody
            chunk 5    0                  late keys: nobody but their owner and those whose late chunk is later still
    1       chunk 1    0 1 2
            chunk 4    0 1
    2       chunks 2, 3    0 1 2          neighbours, and all ranks have queries behind both

Because every query sees its own neighbourhood, the rows of a solid run together see one solid run of positions, and two
evaluations of the mask per run decide. Runs with a stride (striped layouts) can step over keys: such shards are one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ringflash.layout import Layout

Reach = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""``reach(positions, row)``: the range of travelling positions ``[lo, hi)`` that meets each staying position."""

_GRAIN = 32  # a shard is cut at the ends of its runs, and between them at places that are a 32nd of its tokens apart


class Part(NamedTuple):
    """Some of a shard's tokens: local indices ``[a, b)`` in ascending, disjoint spans."""

    shard: int
    spans: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(b - a for a, b in self.spans)

    def below(self, indices: np.ndarray) -> np.ndarray:
        """How many tokens of this part lie below each local index of the shard: where that index stands in the part.

        >>> Part(0, ((2, 4), (6, 9))).below(np.array([0, 3, 5, 7, 9]))
        array([0, 1, 2, 3, 5])
        """
        place = np.zeros_like(indices)
        for a, b in self.spans:
            place += np.clip(indices, a, b) - a
        return place

    def inside(self, whole: Part) -> list[tuple[slice, slice]]:
        """Where this part's tokens are in itself and in a part that holds them all, run by run.

        >>> Part(0, ((2, 4), (6, 9))).inside(Part(0, ((0, 4), (5, 9))))
        [(slice(0, 2, None), slice(2, 4, None)), (slice(2, 5, None), slice(5, 8, None))]
        """
        found, at = [], 0
        starts = whole.below(np.array([a for a, _ in self.spans], dtype=np.int64)).tolist()
        for (a, b), start in zip(self.spans, starts, strict=True):
            found.append((slice(at, at + b - a), slice(start, start + b - a)))
            at += b - a
        return found


@dataclass(frozen=True, eq=False)
class Needs:
    """The pieces of all shards, and who computes with them. Pieces of one shard stand together, in order."""

    parts: tuple[Part, ...]
    seen: np.ndarray
    """bool ``[ranks, pieces]``: does what stays on rank r need any token of the piece, in any batch row?"""

    @cached_property
    def owner(self) -> np.ndarray:
        """int ``[pieces]``: the shard that each piece belongs to."""
        return np.array([part.shard for part in self.parts], dtype=np.int64)

    @cached_property
    def tokens(self) -> np.ndarray:
        """int ``[pieces]``."""
        return np.array([part.tokens for part in self.parts], dtype=np.int64)

    @property
    def ranks(self) -> int:
        return len(self.seen)

    def part(self, pieces: tuple[int, ...]) -> Part:
        """Several pieces of one shard as one part."""
        if len(pieces) == 1:
            return self.parts[pieces[0]]
        if pieces not in self._joined:
            spans = sorted(span for piece in pieces for span in self.parts[piece].spans)
            self._joined[pieces] = Part(self.parts[pieces[0]].shard, _merged(spans))
        return self._joined[pieces]

    @cached_property
    def _joined(self) -> dict[tuple[int, ...], Part]:
        return {}


def whole(shard: int, tokens: int) -> Part:
    """All of a shard."""
    return Part(shard, ((0, tokens),) if tokens else ())


def find_needs(moving: Layout, staying: Layout, reach: Reach, rows: int) -> Needs:
    """The pieces of ``moving``, by where the positions of ``staying`` reach in any of ``rows`` batch rows."""
    if any(run.step != 1 and len(run) > 1 for layout in (moving, staying) for runs in layout.runs for run in runs):
        return _of_whole_shards(moving, staying, reach, rows)
    runs, stays = _runs(moving), _runs(staying)
    lo = np.concatenate([reach(stays[:, 1], row)[0] for row in range(rows)]).clip(0, moving.length)
    hi = np.concatenate([reach(stays[:, 2] - 1, row)[1] for row in range(rows)]).clip(0, moving.length)
    some = lo < hi
    ranks, lo, hi = np.tile(stays[:, 0], rows)[some], lo[some], hi[some]
    order = np.argsort(runs[:, 1])
    lo, hi = _rounded(runs[order], lo, up=False), _rounded(runs[order], hi, up=True)
    edges = np.unique(np.concatenate([runs[:, 1], lo, hi, [0, moving.length]]))
    depth = np.zeros((staying.ranks, len(edges)), dtype=np.int32)
    np.add.at(depth, (ranks, np.searchsorted(edges, lo)), 1)
    np.add.at(depth, (ranks, np.searchsorted(edges, hi)), -1)
    seen = np.cumsum(depth, axis=1)[:, :-1] > 0
    at = order[np.searchsorted(runs[order, 1], edges[:-1], side="right") - 1] if len(runs) else np.zeros(0, np.int64)
    first = runs[at, 3] + edges[:-1] - runs[at, 1]  # local index
    return _pieces(runs[at, 0], first, first + np.diff(edges), seen)


def _runs(layout: Layout) -> np.ndarray:
    """int ``[runs, 4]``: the rank, start, stop and first local index of each run."""
    table = [(rank, run[0], run[-1] + 1, 0) for rank, runs in enumerate(layout.runs) for run in runs]
    runs = np.array(table, dtype=np.int64).reshape(-1, 4)
    before = np.cumsum(runs[:, 2] - runs[:, 1]) - (runs[:, 2] - runs[:, 1])
    runs[:, 3] = before - before[np.searchsorted(runs[:, 0], runs[:, 0])] if len(runs) else 0
    return runs


def _rounded(runs: np.ndarray, positions: np.ndarray, up: bool) -> np.ndarray:
    """Each position moved outward to a place where its run (sorted by start) may be cut."""
    if not len(positions):
        return positions
    held = np.bincount(runs[:, 0], runs[:, 2] - runs[:, 1]).astype(np.int64)
    run = runs[np.searchsorted(runs[:, 1], positions - up, side="right") - 1]
    grain = np.maximum(1, held[run[:, 0]] // _GRAIN)
    steps = positions - run[:, 1]
    return np.minimum(run[:, 1] + (-(-steps // grain) if up else steps // grain) * grain, run[:, 2])


def _pieces(owner: np.ndarray, first: np.ndarray, past: np.ndarray, seen: np.ndarray) -> Needs:
    """Stretches of shards, joined into pieces where the same ranks need them. ``seen`` is bool ``[ranks, stretches]``."""
    if not len(owner):
        return Needs((), seen)
    pattern = np.vstack([np.packbits(seen, axis=0), owner.astype(">u4").view(np.uint8).reshape(-1, 4).T])
    kind = np.ascontiguousarray(pattern.T).view(np.dtype((np.void, len(pattern)))).ravel()
    _, example, piece = np.unique(kind, return_index=True, return_inverse=True)
    least = np.full(len(example), np.iinfo(np.int64).max)
    np.minimum.at(least, piece, first)  # pieces of a shard in the order of their first tokens
    rank = np.lexsort((least, owner[example]))
    number = np.argsort(rank)[piece]
    order = np.lexsort((first, number))
    number, first, past = number[order], first[order], past[order]
    fresh = np.append(True, (number[1:] != number[:-1]) | (first[1:] != past[:-1]))  # a new span
    ends = np.append(fresh[1:], True)
    spans = list(zip(first[fresh].tolist(), past[ends].tolist(), strict=True))
    starts = [*np.searchsorted(number[fresh], np.arange(len(rank))).tolist(), len(spans)]
    shards = owner[example][rank].tolist()
    parts = tuple(Part(shard, tuple(spans[a:b])) for shard, a, b in zip(shards, starts, starts[1:], strict=False))
    table = seen[:, example[rank]]
    table.setflags(write=False)
    return Needs(parts, table)


def _of_whole_shards(moving: Layout, staying: Layout, reach: Reach, rows: int) -> Needs:
    """Shards as one piece each, for runs with a stride.

    The ends of a run settle dense masks; only what they leave open is asked position by position.
    """
    owner = np.array([shard for shard, runs in enumerate(moving.runs) for _ in runs], dtype=np.int64)
    spans = np.array([(k.start, k.step, len(k)) for runs in moving.runs for k in runs], dtype=np.int64).reshape(-1, 3)
    stays = [(rank, run) for rank, runs in enumerate(staying.runs) for run in runs]
    table = np.zeros((staying.ranks, moving.ranks), dtype=bool)
    for row in range(rows):
        ends = [reach(np.array([run[end] for _, run in stays], dtype=np.int64), row) for end in (0, -1)]
        first, last = (_meet(spans, *end) for end in ends)
        open_still = _meet(spans, ends[0][0], ends[1][1]) & ~first & ~last
        for (rank, run), settled, unsettled in zip(stays, first | last, open_still, strict=True):
            table[rank, owner[settled]] = True
            unsettled &= ~table[rank, owner]
            if run.step == 1:
                table[rank, owner[unsettled]] = True
            elif unsettled.any():
                met = _meet(spans[unsettled], *reach(np.arange(run.start, run.stop, run.step), row)).any(axis=0)
                table[rank, owner[unsettled][met]] = True
    table.setflags(write=False)
    return Needs(tuple(whole(shard, moving.tokens(shard)) for shard in range(moving.ranks)), table)


def _meet(spans: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """Does each run of positions (start, step, count) have one in each range ``[lo, hi)``? bool ``[ranges, runs]``."""
    start, step, count = spans.T
    below_hi, below_lo = (np.clip(-((start - edge[:, None]) // step), 0, count) for edge in (hi, lo))
    return below_hi > below_lo


def _merged(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted spans, with neighbours joined."""
    joined: list[tuple[int, int]] = []
    for a, b in spans:
        if joined and joined[-1][1] == a:
            joined[-1] = joined[-1][0], b
        else:
            joined.append((a, b))
    return tuple(joined)
