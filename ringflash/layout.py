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
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ringflash.mask import Mask


@dataclass(frozen=True)
class Layout:
    """For each rank, its positions as runs: ``runs[rank]`` is a tuple of non-empty, ascending ranges in order.

    >>> zigzag(12, 2).runs
    ((range(0, 3), range(9, 12)), (range(3, 9),))
    >>> zigzag(12, 2).positions(0)
    array([ 0,  1,  2,  9, 10, 11])
    """

    runs: tuple[tuple[range, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.runs))  # thousands of runs on a large ring, hashed once

    def __hash__(self) -> int:
        return int(self._hash)  # type: ignore[attr-defined]

    @property
    def ranks(self) -> int:
        return len(self.runs)

    @property
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

    def check(self) -> None:
        """Raise ``ValueError`` unless every position is on exactly one rank, in ascending order."""
        held = [_positions(runs) for runs in self.runs]
        for rank, positions in enumerate(held):
            if (np.diff(positions) <= 0).any() or any(len(run) == 0 for run in self.runs[rank]):
                raise ValueError(f"layout: rank {rank} holds {self.runs[rank]}; runs must be non-empty and ascending")
        everything = np.sort(np.concatenate(held)) if held else np.zeros(0, int)
        if not np.array_equal(everything, np.arange(len(everything))):
            raise ValueError("layout: every position from 0 to the length must be on exactly one rank")

    def __repr__(self) -> str:
        shown = "; ".join(
            f"{r}: {' '.join(_spell(x) for x in runs) or 'nothing'}" for r, runs in enumerate(self.runs[:4])
        )
        return f"Layout({self.length} positions on {self.ranks} ranks: {shown}{'; ...' if self.ranks > 4 else ''})"


def contiguous(length: int, ranks: int) -> Layout:
    """Equal slices in order."""
    return Layout(tuple(_solid(range(r * length // ranks, (r + 1) * length // ranks)) for r in range(ranks)))


def zigzag(length: int, ranks: int) -> Layout:
    """Two chunks each, one from the front and its mirror from the back: every rank has the same causal work."""
    cut = [range(i * length // (2 * ranks), (i + 1) * length // (2 * ranks)) for i in range(2 * ranks)]
    return Layout(tuple(_solid(cut[r], cut[-1 - r]) for r in range(ranks)))


def striped(length: int, ranks: int) -> Layout:
    """Every ``ranks``-th position (Striped Attention, arXiv 2311.09431)."""
    return Layout(tuple(_solid(range(r, length, ranks)) for r in range(ranks)))


LAYOUTS: dict[str, Callable[[int, int], Layout]] = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


def choose(length: int, ranks: int, mask: Mask) -> str:
    """The name that ``layout="auto"`` stands for, from what is equal on all ranks.

    Work that grows along the whole sequence (causal, prefix) is balanced by zigzag. Where a query sees only its
    neighbourhood (window, documents, chunks), or everything, neighbours stay together and most hops vanish.
    """
    local = mask.left is not None or mask.documents or mask.chunks
    grows = mask.right is not None or mask.prefix is not None
    return "zigzag" if grows and not local and length >= 2 * ranks else "contiguous"


def _solid(*runs: range) -> tuple[range, ...]:
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


@lru_cache(maxsize=256)
def _positions(runs: tuple[range, ...]) -> np.ndarray:
    positions = np.concatenate(
        [np.arange(r.start, r.stop, r.step, dtype=np.int64) for r in runs] or [np.zeros(0, np.int64)]
    )
    positions.setflags(write=False)
    return positions


def _spell(run: range) -> str:
    return f"[{run.start}, {run[-1] + 1})" + ("" if run.step == 1 else f" by {run.step}")
