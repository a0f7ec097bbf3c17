"""Packed documents, dealt out so that every rank has equal tokens, equal work, and few keys to fetch.

Work is *area*: the visible cells of the rows that a rank holds. A causal document of n tokens is a triangle of n (n + 1) / 2
cells, so the late rows of the longest documents are most of the work of a batch, and few of its tokens. Whichever of its
rows a rank holds, it needs the keys up to the last of them:

    foreign keys  =  sum over ranks and documents of the last row held there, counted from 1   -   all tokens

A cut is cheap where only a short head stays behind. ``balanced`` fills one rank after the other: from the heaviest document
it cuts the *latest* rows, as many as the area allows, and makes up the tokens with the lightest documents, whole. What
remains is a shorter document like any other; as soon as it fits, it goes somewhere whole. Who holds what of documents of 12,
3, 3, 3 and 3 tokens, on three ranks:

    0 0 0 0 0 0 0 1 1 1 2 2   2 2 2   2 2 2   1 1 1   1 1 0        8 tokens each; 31, 36 and 35 cells; 19 foreign keys

One document alone becomes a zigzag. Among the rows that are left there is always a mixture of heavy and light ones that has
their mean, so the last ranks do not pay for the first.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ringflash.layout import Layout, contiguous, solid
from ringflash.mask import Mask


@lru_cache(maxsize=16)
def balanced(length: int, ranks: int, mask: Mask, slack: float = 0.05) -> Layout:
    """The layout for packed documents: equal tokens, area within ``slack`` of the mean, and then few foreign keys.

    Tokens differ by one at most. No rank's area exceeds ``1 + slack`` times the mean by more than one row, where rows do
    not shrink along a document (causal, bidirectional, prefix, windows that look back). Less slack costs more keys.

    >>> from ringflash.mask import causal, documents
    >>> balanced(24, 3, causal & documents([0, 12, 15, 18, 21, 24])).runs
    ((range(0, 7), range(23, 24)), (range(7, 10), range(18, 23)), (range(10, 18),))
    """
    if slack < 0:
        raise ValueError(f"layout='balanced': slack is {slack}; it is a share of the mean area, 0 or more")
    offsets = _offsets(length, mask)
    neighbours = contiguous(length, ranks)
    if ranks == 1 or length == 0:
        return neighbours
    cells = _Cells.of(mask, length, 0, length)
    most = int(cells.total[-1] * (1 + slack)) // ranks
    shares = _Dealer(offsets, cells).deal(length, ranks, most)
    dealt = _layout(shares)
    busiest = max(sum(piece.area for piece in share) for share in shares)
    if np.diff(cells.before(np.arange(ranks + 1) * length // ranks)).max() > max(most, busiest):
        return dealt
    return min(neighbours, dealt, key=lambda layout: _foreign(layout, mask).sum())


def _offsets(length: int, mask: Mask) -> tuple[int, ...]:
    if not mask.documents:
        raise ValueError(f"layout='balanced': the mask is {mask}; it deals out documents, so join documents(...) to it")
    if mask.rows > 1:
        raise ValueError(f"layout='balanced': the mask has documents for {mask.rows} batch rows; one row is dealt out")
    if mask.length != length:
        raise ValueError(f"layout='balanced': the documents cover {mask.length} positions, the sequence has {length}")
    return mask.documents[0]


class _Piece(NamedTuple):
    """The rows ``[start, stop)`` of the document that begins at ``head``; compares by how heavy a row of it is."""

    density: float
    start: int
    stop: int
    area: int
    head: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def _layout(shares: list[list[_Piece]]) -> Layout:
    """Ranks in the order of the rows that they work on most: those that share a document are neighbours."""
    order = sorted(shares, key=lambda share: max(((x.area, x.start) for x in share), default=(0, 0))[1])
    spans = [sorted((x.start, x.stop) for x in share) for share in order]
    return Layout(tuple(solid(*(range(*span) for span in mine)) for mine in spans))


class _Dealer:
    """Deals out documents rank by rank. ``pool`` holds what is left, from the lightest rows to the heaviest.

    ``rows[i]`` and ``cells[i]`` sum up its first ``i`` pieces, from any origin, as far as anybody asked: few are summed up
    twice, since mostly heavy ones go and light ones count. ``area``, ``room`` and ``share`` are of the rank that is being
    filled: its cells, the tokens it lacks, and its pieces; ``rest`` is what it left of the document that it cut.
    """

    def __init__(self, offsets: tuple[int, ...], cells: _Cells) -> None:
        edges = np.unique(offsets)
        start, stop, area = edges[:-1], edges[1:], np.diff(cells.before(edges))
        density = area / (stop - start)
        order = np.lexsort((start, density))
        self.pool = list(map(_Piece, *(x[order].tolist() for x in (density, start, stop, area, start))))
        self.before, self.rows, self.cells = cells.counter(), [0], [0]

    def deal(self, length: int, ranks: int, most: int) -> list[list[_Piece]]:
        """The pieces of each rank, with at most ``most`` cells and one row if rows do not shrink along a document."""
        shares, left = [], sum(piece.area for piece in self.pool)
        for rank in range(ranks):
            tokens = (rank + 1) * length // ranks - rank * length // ranks
            least = left - (ranks - 1 - rank) * most  # with less, those who follow would have more than ``most``
            kept = self.pool.copy()
            self.fill(tokens, least, most, packing=True)
            if not least <= self.area <= most:
                self.pool, self.rows, self.cells = kept, [0], [0]
                self.fill(tokens, least, most, packing=False)
            left -= self.area
            shares.append(self.share)
        return shares

    def fill(self, tokens: int, least: int, most: int, packing: bool) -> None:
        """Fill one rank with ``tokens``, and with an area from ``least`` to ``most`` where that is possible.

        The heaviest document goes first, whole or cut. ``packing`` then adds the heaviest that fits, again and again, and
        cuts only to reach ``least``. Otherwise it is the heaviest of all until one must be cut: between the lightest and
        the heaviest rows of the pool there is always a mixture that has its mean.
        """
        self.area, self.room, self.share, self.rest = 0, tokens, list[_Piece](), list[_Piece]()
        while self.room:
            packs, tight = packing and self.share, len(self.pool)
            if packs and self.area + self.light(self.room) >= max(least, most - most // 128):
                break
            if not self.fits(self.pool[-1], most):
                tight = bisect_left(self.pool, True, key=lambda piece: not self.fits(piece, most))
            if tight == len(self.pool) or (packs and tight > 0):
                self.hold(self.take(tight - 1))
                continue
            if not packs or self.area + self.light(self.room) < least:
                self.cut(tight if packs else len(self.pool) - 1, least, most)
            break
        self.top_up(least, most)

    def take(self, index: int) -> _Piece:
        del self.rows[index + 1 :], self.cells[index + 1 :]
        return self.pool.pop(index)

    def put(self, pieces: list[_Piece]) -> None:
        for piece in pieces:
            index = bisect_left(self.pool, piece)
            del self.rows[index + 1 :], self.cells[index + 1 :]
            self.pool.insert(index, piece)

    def whole(self, wanted: int) -> int:
        """How many of the lightest pieces together have at most ``wanted`` rows."""
        rows, cells, wanted = self.rows, self.cells, wanted + self.rows[0]
        while rows[-1] < wanted and len(rows) <= len(self.pool):
            _, start, stop, area, _ = self.pool[len(rows) - 1]
            rows.append(rows[-1] + stop - start)
            cells.append(cells[-1] + area)
        return bisect_right(rows, wanted) - 1

    def light(self, wanted: int) -> int:
        """The area of ``wanted`` rows, the lightest first, or of all there are."""
        whole = self.whole(wanted)
        light, more = self.cells[whole] - self.cells[0], wanted + self.rows[0] - self.rows[whole]
        if not more or whole == len(self.pool):
            return light
        start = self.pool[whole].start
        return light + self.before(start + more) - self.before(start)

    def fits(self, piece: _Piece, most: int) -> bool:
        """Fits ``piece`` into this rank whole, beside the lightest rows?"""
        return piece.rows <= self.room and self.area + piece.area + self.light(self.room - piece.rows) <= most

    def cut(self, index: int, least: int, most: int) -> None:
        """Take as many of the last rows of a piece as leave area for the lightest rows of others beside them."""
        piece = self.take(index)
        self.whole(self.room)
        others = self.rows[-1] - self.rows[0]  # the rows of all others, or more than there is room for

        def area(rows: int) -> int:
            rest = self.room - rows
            own = max(0, rest - others)  # without other documents, its own first rows
            heavy = piece.area - self.before(piece.stop - rows) + self.before(piece.start + own)
            return self.area + heavy + self.light(rest - own)

        furthest = min(self.room, piece.rows)
        rows = _last(furthest, most, area)
        rows += area(rows) < least and rows < furthest
        self.rest = self.hold_part(piece, piece.stop - rows, piece.stop) if rows else [piece]

    def top_up(self, least: int, most: int) -> None:
        """Take the lightest pieces whole, and of one the first or the last rows, whichever makes fewer foreign keys."""
        whole = self.whole(self.room)
        for piece in self.pool[:whole]:
            self.hold(piece)
        del self.pool[:whole], self.rows[:whole], self.cells[:whole]
        lightest, room = self.pool[:1], self.room
        self.put(self.rest)
        if room:
            ways = [(x.start + room - x.head, x.start, x) for x in lightest or self.rest]
            ways += [(x.stop - room - x.head, x.stop - room, x) for x in lightest]
            ways += [(0, x.start, x) for x in self.rest if x.rows >= room]
            area = {start: self.area + self.before(start + room) - self.before(start) for _, start, _ in ways}
            _, start, piece = min((way for way in ways if least <= area[way[1]] <= most), default=ways[0])
            self.take(self.pool.index(piece))
            self.put(self.hold_part(piece, start, start + room))

    def hold(self, piece: _Piece) -> None:
        self.share.append(piece)
        self.area += piece.area
        self.room -= piece.stop - piece.start

    def hold_part(self, piece: _Piece, start: int, stop: int) -> list[_Piece]:
        """Give the rank rows ``[start, stop)`` of a piece that left the pool; returns what remains of it."""
        self.hold(self.piece(start, stop, piece.head))
        return [self.piece(a, b, piece.head) for a, b in ((piece.start, start), (stop, piece.stop)) if a < b]

    def piece(self, start: int, stop: int, head: int) -> _Piece:
        return _Piece((area := self.before(stop) - self.before(start)) / (stop - start), start, stop, area, head)


def _last(furthest: int, most: int, area: Callable[[int], int]) -> int:
    """The largest number up to ``furthest`` whose area is at most ``most``, or 0: by interpolation and halving in turn."""
    low, high, halve = 0, furthest, False
    below, above = area(low), area(high)
    if above <= most or below > most:
        return high if above <= most else low
    while high - low > 1:
        middle = (low + high) // 2 if halve else low + (most - below) * (high - low) // (above - below)
        middle, halve = min(max(middle, low + 1), high - 1), not halve
        here = area(middle)
        if here <= most:
            low, below = middle, here
        else:
            high, above = middle, here
    return low


@dataclass(frozen=True)
class Balance:
    """How evenly a layout divides the work of a mask, and how many keys it makes ranks fetch.

    >>> from ringflash.layout import zigzag
    >>> from ringflash.mask import causal, documents
    >>> print(balance_of(zigzag(12, 2), causal & documents([0, 8, 12])))
    2 ranks: tokens max/mean 1.000, area max/mean 1.348, 4 foreign keys (at most 3 on one rank)
    """

    tokens: tuple[int, ...]
    """Positions that each rank holds."""
    areas: tuple[int, ...]
    """Visible cells of each rank's rows, over the batch rows of the mask."""
    foreign: tuple[int, ...]
    """Keys that each rank's queries see (in any batch row) and it does not hold."""

    @property
    def token_ratio(self) -> float:
        """Tokens of the fullest rank over the mean; 1 when there are none."""
        return _ratio(self.tokens)

    @property
    def area_ratio(self) -> float:
        """Area of the busiest rank over the mean; 1 when there is none."""
        return _ratio(self.areas)

    @property
    def foreign_keys(self) -> int:
        """Keys to fetch, summed over the ranks."""
        return sum(self.foreign)

    def __str__(self) -> str:
        return (
            f"{len(self.tokens)} ranks: tokens max/mean {self.token_ratio:.3f}, area max/mean {self.area_ratio:.3f}, "
            f"{self.foreign_keys} foreign keys (at most {max(self.foreign, default=0)} on one rank)"
        )


def balance_of(layout: Layout, mask: Mask) -> Balance:
    """What ``layout`` makes of self-attention under ``mask``: exact, from the ends of runs where these are solid."""
    if mask.length not in (None, layout.length):
        raise ValueError(f"balance_of: the documents cover {mask.length} positions, the layout has {layout.length}")
    tokens = tuple(layout.tokens(rank) for rank in range(layout.ranks))
    return Balance(tokens, tuple(areas(layout, mask).tolist()), tuple(_foreign(layout, mask).tolist()))


def _ratio(counts: tuple[int, ...]) -> float:
    return max(counts) * len(counts) / sum(counts) if any(counts) else 1.0


def _foreign(layout: Layout, mask: Mask) -> np.ndarray:
    """Keys that each rank needs and does not hold, int64 ``[ranks]``.

    The rows of a solid run together see one run of keys, from the first row's lo to the last row's hi. Spaced rows may
    step over keys and are asked one by one.
    """
    runs = [(rank, run.start, run.stop, run.step) for rank, mine in enumerate(layout.runs) for run in mine]
    _, start, stop, step = table = np.array(runs, dtype=np.int64).reshape(-1, 4).T
    asked = np.where(step == 1, 1, -((start - stop) // step))
    owner, start, stop, step = np.repeat(table, asked, axis=1)
    first = start + step * (np.arange(len(owner)) - np.repeat(np.cumsum(asked) - asked, asked))
    last = np.where(step == 1, stop - 1, first)
    far = layout.length + 1
    lo, hi = (
        np.concatenate([mask.bounds(at, row)[side].clip(0, layout.length) + owner * far for row in range(mask.rows)])
        for side, at in enumerate((first, last))
    )
    order = np.argsort(lo, kind="stable")
    lo, hi, owner = lo[order], hi[order], np.tile(owner, mask.rows)[order]
    reach = np.maximum.accumulate(np.append(0, hi))[:-1]
    needed = np.bincount(owner, np.maximum(0, hi - np.maximum(lo, reach)), layout.ranks).astype(np.int64)
    return needed - [layout.tokens(rank) for rank in range(layout.ranks)]


def areas(layout: Layout, mask: Mask, q_offset: int = 0, keys: int | None = None) -> np.ndarray:
    """Visible cells of each rank's rows, summed over the batch rows of the mask: int64 ``[ranks]``, exact.

    The queries of ``layout`` stand ``q_offset`` further on in a sequence of ``keys`` keys (None: as many as queries).

    >>> from ringflash.layout import contiguous, zigzag
    >>> from ringflash.mask import causal
    >>> areas(contiguous(8, 2), causal), areas(zigzag(8, 2), causal)
    (array([10, 26]), array([18, 18]))
    """
    keys = layout.length if keys is None else keys
    runs = [(rank, run) for rank, mine in enumerate(layout.runs) for run in mine]
    total = np.zeros(layout.ranks, dtype=np.int64)
    if not runs:
        return total
    first, last = min(run.start for _, run in runs) + q_offset, max(run[-1] for _, run in runs) + q_offset
    solid = [(rank, run.start, run.stop) for rank, run in runs if run.step == 1]
    owner, start, stop = np.array(solid, dtype=np.int64).reshape(-1, 3).T
    for row in range(mask.rows):
        cells = _Cells.of(mask, keys, first, last + 1, row)
        np.add.at(total, owner, cells.before(stop + q_offset) - cells.before(start + q_offset))
        for rank, run in runs:
            if run.step != 1:
                total[rank] += cells.along(range(run.start + q_offset, run.stop + q_offset, run.step))
    return total


@dataclass(frozen=True)
class _Cells:
    """How many keys a row sees: linear between few breakpoints, the edges of documents and the like, also moved by the window.

    Row ``at[i]`` sees ``width[i]`` keys, every next one ``slope[i]`` more; all rows before it see ``total[i]``. ``at`` ends
    with the end of all rows.
    """

    at: np.ndarray
    width: np.ndarray
    slope: np.ndarray
    total: np.ndarray

    @classmethod
    def of(cls, mask: Mask, keys: int, first: int, stop: int, row: int = 0) -> _Cells:
        """For the rows ``[first, stop)`` of a batch row, in a sequence of ``keys`` keys."""
        reach = max(mask.left or 0, mask.right or 0) + 1
        edges: list[Any] = [(0, keys, mask.prefix or 0), *(mask.documents[row : row + 1] or mask.documents)]
        edges += [np.arange(max(0, first - reach) // n * n, stop + reach + n, n) for n in mask.chunks]
        edge = np.concatenate([np.asarray(some, dtype=np.int64) for some in edges])
        moves = (0, mask.left, None if mask.right is None else -mask.right - 1)
        at = np.unique(np.concatenate([edge + move for move in moves if move is not None]))
        at = np.concatenate([[first], at[(at > first) & (at < stop)], [stop]])
        rows = np.diff(at)
        lo, hi = mask.bounds(np.append(at[:-1], at[1:] - 1), row)
        width, last = np.split(hi.clip(0, keys) - lo.clip(0, keys), 2)
        slope = (last - width) // np.maximum(rows - 1, 1)
        total = np.cumsum(np.append(0, (width + last) * rows // 2))
        return cls(at, np.append(width, 0), np.append(slope, 0), total)

    def before(self, position: np.ndarray) -> np.ndarray:
        """Cells of all rows before each of ``position``."""
        i = np.searchsorted(self.at, position, side="right") - 1
        rows = position - self.at[i]
        return self.total[i] + rows * self.width[i] + rows * (rows - 1) // 2 * self.slope[i]

    def counter(self) -> Callable[[int], int]:
        """The same for one position at a time, which plain numbers do ten times as fast."""
        at, width, slope, total = (x.tolist() for x in (self.at, self.width, self.slope, self.total))

        def before(position: int) -> int:
            i = bisect_right(at, position) - 1
            rows = position - at[i]
            return total[i] + rows * width[i] + rows * (rows - 1) // 2 * slope[i]

        return before

    def along(self, run: range) -> int:
        """Cells of the rows of a spaced run: every stretch without a breakpoint is a trapezoid."""
        inside = self.at[(self.at > run.start) & (self.at < run.stop)]
        cuts = np.concatenate([[0], -((run.start - inside) // run.step), [len(run)]])
        cuts = np.unique(cuts) if len(inside) < len(run) else np.arange(len(run) + 1)
        ends = run.start + run.step * np.append(cuts[:-1], cuts[1:] - 1)
        i = np.searchsorted(self.at, ends, side="right") - 1
        first, last = np.split(self.width[i] + self.slope[i] * (ends - self.at[i]), 2)
        return int(((first + last) * np.diff(cuts) // 2).sum())
