"""Which rank holds which positions.

A layout is a partition of the sequence: for each rank, the sorted global positions it holds, written as a few built-in
``range`` runs. Any length is cut over any number of ranks; shards may be uneven, and empty.

    12 tokens on 2 ranks     contiguous   0 0 0 0 0 0 1 1 1 1 1 1     neighbours together: fewest hops for windows
                             zigzag       0 0 0 1 1 1 1 1 1 0 0 0     an early and a late chunk each: equal causal work
                             striped      0 1 0 1 0 1 0 1 0 1 0 1     dealt out like cards

Zigzag: Brandon et al. 2023 discuss striping (arXiv 2311.09431); pairing early with late chunks is due to zhuzilin's
ring-flash-attention and Llama 3 (arXiv 2407.21783).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from ringflash.numbers import FAR, brief


@dataclass(frozen=True)
class Layout:
    """For each rank, its positions as runs: ``runs[rank]`` is a tuple of non-empty, ascending ranges in order.

    ``name`` is for messages; layouts that place every position alike are equal.

    >>> zigzag(12, 2).runs
    ((range(0, 3), range(9, 12)), (range(3, 9),))
    >>> zigzag(12, 2).positions(0)
    array([ 0,  1,  2,  9, 10, 11])
    """

    runs: tuple[tuple[range, ...], ...]
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.runs, tuple | list):
            raise TypeError(f"Layout: runs is {brief(self.runs)}; for each rank a tuple of ranges is needed")
        for rank, runs in enumerate(self.runs):
            odd = [run for run in runs if not isinstance(run, range)] if isinstance(runs, tuple | list) else [runs]
            if odd:
                raise TypeError(f"Layout: runs: rank {rank} holds {brief(odd[0])}; a tuple of ranges is needed")
            if any(max(abs(run.start), abs(run.stop)) > FAR for run in runs):
                raise ValueError(f"Layout: runs: rank {rank} holds {brief(runs)}; positions go up to 2**60")
        object.__setattr__(self, "runs", tuple(map(tuple, self.runs)))  # lists are as good

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        return Layout, (self.runs, self.name)  # a hash is of one process

    @cached_property
    def _hash(self) -> int:  # thousands of runs on a large ring, hashed once
        return hash(self.runs)

    @property
    def ranks(self) -> int:
        return len(self.runs)

    @cached_property
    def length(self) -> int:
        """Number of positions held by all ranks together."""
        return sum(map(self.tokens, range(self.ranks)))

    def tokens(self, rank: int) -> int:
        """Number of positions that ``rank`` holds."""
        return sum(map(len, self.runs[rank]))

    def positions(self, rank: int) -> np.ndarray:
        """The global positions that ``rank`` holds, ascending, int64 ``[tokens(rank)]``; shared and read-only."""
        return _positions(self.runs[rank])

    def below(self, rank: int, positions: np.ndarray) -> np.ndarray:
        """How many of ``rank``'s positions lie below each of ``positions``: the local index where a key would go.

        Closed form: between the ends of a run the answer climbs with the position, elsewhere it is constant. In ascending
        order each stretch is written once, whatever the number of runs.

        >>> zigzag(12, 2).below(0, np.array([0, 2, 5, 11, 40]))
        array([0, 2, 3, 5, 6])
        """
        index = np.empty_like(positions)
        if (positions[1:] < positions[:-1]).any():
            order = np.argsort(positions)
            index[order] = self.below(rank, positions[order])
            return index
        ends = np.array([end for run in self.runs[rank] for end in (run.start, run[-1])], dtype=positions.dtype)
        edges = np.searchsorted(positions, ends, side="right").tolist()
        at = held = 0
        for run, first, last in zip(self.runs[rank], edges[::2], edges[1::2], strict=True):
            index[at:first] = held
            if first < last:
                steps = positions[first:last] - (run.start + 1)
                index[first:last] = (steps if run.step == 1 else steps // run.step) + (held + 1)
            held, at = held + len(run), last
        index[at:] = held
        return index

    def split(self, ways: int) -> Layout:
        """Each shard cut into ``ways`` parts of neighbours: rank ``r * ways + i`` holds part i of the shard of r.

        >>> zigzag(12, 2).split(2).runs
        ((range(0, 3),), (range(9, 12),), (range(3, 6),), (range(6, 9),))
        """
        return self if ways == 1 else _split(self, ways)

    def check(self) -> None:
        """Raise ``ValueError`` unless every position is on exactly one rank, in ascending order."""
        if self._fault is not None:
            raise ValueError(self._fault)

    @cached_property
    def _fault(self) -> str | None:
        """The sentence about what keeps this from being a partition."""
        for rank, runs in enumerate(self.runs):
            if not _ascend(runs):
                return f"layout: rank {rank} holds {runs[:9]}; runs must be non-empty and ascending"
        everything = sorted((run for runs in self.runs for run in runs), key=lambda run: run.start)
        if all(run.step == 1 for run in everything):
            edges = [0, *(edge for run in everything for edge in (run.start, run.stop))]
            whole = edges[:-1:2] == edges[1::2]
        else:
            held = np.sort(np.concatenate([_positions(runs) for runs in self.runs]))
            whole = np.array_equal(held, np.arange(len(held)))
        return None if whole else "layout: every position from 0 to the length must be on exactly one rank"

    def __repr__(self) -> str:
        shown = "; ".join(f"{rank}: {_spell(runs)}" for rank, runs in enumerate(self.runs[:4]))
        named = f"{self.name}, " if self.name else ""
        return (
            f"Layout({named}{self.length} positions on {self.ranks} ranks: {shown}{'; ...' if self.ranks > 4 else ''})"
        )

    def __str__(self) -> str:
        return self.name or repr(self)


def contiguous(length: int, ranks: int) -> Layout:
    """Equal slices in order."""
    return Layout(
        tuple(solid(range(r * length // ranks, (r + 1) * length // ranks)) for r in range(ranks)), "contiguous"
    )


def zigzag(length: int, ranks: int) -> Layout:
    """Two chunks each, one from the front and its mirror from the back: every rank has the same causal work."""
    cut = [range(i * length // (2 * ranks), (i + 1) * length // (2 * ranks)) for i in range(2 * ranks)]
    return Layout(tuple(solid(cut[r], cut[-1 - r]) for r in range(ranks)), "zigzag")


def striped(length: int, ranks: int) -> Layout:
    """Every ``ranks``-th position (Striped Attention, arXiv 2311.09431)."""
    return Layout(tuple(solid(range(r, length, ranks)) for r in range(ranks)), "striped")


LAYOUTS: dict[str, Callable[[int, int], Layout]] = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


def solid(*runs: range) -> tuple[range, ...]:
    """The runs that hold something, with neighbours joined."""
    joined: list[range] = []
    for run in runs:
        if len(run) == 0:
            continue
        if joined and joined[-1].step == run.step == 1 and joined[-1].stop == run.start:
            joined[-1] = range(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)


def _ascend(runs: tuple[range, ...]) -> bool:
    """Does every run hold something, in ascending order, behind the end of the one before?"""
    solid = all(len(run) and run.step > 0 for run in runs)
    return solid and all(a[-1] < b[0] for a, b in pairwise(runs))


@lru_cache(maxsize=64)
def _split(layout: Layout, ways: int) -> Layout:
    parts = []
    for rank, runs in enumerate(layout.runs):
        cuts = [i * layout.tokens(rank) // ways for i in range(ways + 1)]
        parts += [_cut(runs, a, b) for a, b in pairwise(cuts)]
    return Layout(tuple(parts), layout.name)


def _cut(runs: tuple[range, ...], start: int, stop: int) -> tuple[range, ...]:
    """Of the positions in ``runs``, counted from 0, those from ``start`` to ``stop``."""
    held, pieces = 0, []
    for run in runs:
        pieces.append(run[max(start - held, 0) : max(stop - held, 0)])
        held += len(run)
    return tuple(piece for piece in pieces if len(piece))


@lru_cache(maxsize=256)
def _positions(runs: tuple[range, ...]) -> np.ndarray:
    positions = np.concatenate(
        [np.arange(r.start, r.stop, r.step, dtype=np.int64) for r in runs] or [np.zeros(0, np.int64)]
    )
    positions.setflags(write=False)
    return positions


def _spell(runs: tuple[range, ...]) -> str:
    spelled = [f"[{x.start}, {x[-1] + 1})" + ("" if x.step == 1 else f" by {x.step}") for x in runs[:3]]
    return " ".join(spelled) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "") or "nothing"
