"""One row per rank against time: what it computes, when it waits, and what it sends meanwhile.

    rank 0   [ shard 0 ][ shard 3 ]////[ shard 2 ]       blocks: visits; hatched: waiting
              ----       ----                            thin lines: messages onward, and home

The same chart serves seconds (the spans of an estimate) and work (the cells of plans, all ranks in lockstep).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ringflash.forecast.timeline import schedule
from ringflash.plan import Plan
from ringflash.units import spell_seconds

if TYPE_CHECKING:
    from ringflash.forecast.cost import Pass, Span

WAITING = ("#fbe3df", "#c0392b")
"""Face and hatch of time in which a rank computes nothing."""

MESSAGES = {"onward": "#2f2f2f", "home": "#8c8c8c", "exchange": "#7b3294"}
"""The colour of each kind of message."""

_FEW = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8a8a", "#d6c62b")  # Okabe & Ito
_ROOM = 0.028  # share of the time axis that a block needs to carry a number


class Bar(NamedTuple):
    """``rank`` is busy with something of ``shard`` from ``start`` to ``end``."""

    rank: int
    lane: str
    start: float
    end: float
    shard: int


@dataclass(frozen=True)
class Chart:
    """Bars of all ranks from 0 to ``end``, in one unit of time."""

    title: str
    unit: str
    ranks: int
    end: float
    bars: tuple[Bar, ...]

    @property
    def lanes(self) -> tuple[str, ...]:
        """What occurs, "compute" first."""
        return tuple(lane for lane in ("compute", *MESSAGES) if any(bar.lane == lane for bar in self.bars))

    @property
    def waits(self) -> list[tuple[int, float, float]]:
        """When each rank computes nothing: (rank, start, end)."""
        gaps = []
        for rank in range(self.ranks):
            busy = sorted((bar.start, bar.end) for bar in self.bars if bar.rank == rank and bar.lane == "compute")
            edges = [0.0, *(edge for bar in busy for edge in bar), self.end]
            gaps += [(rank, a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 1e-9 * self.end]
        return gaps


@dataclass(frozen=True)
class Palette:
    """The colour of each rank. Up to eight are told apart by hue, more lie on a scale from 0 to the last rank."""

    ranks: int

    @property
    def named(self) -> int:
        """Up to so many ranks each has a hue of its own."""
        return len(_FEW)

    @property
    def scale(self) -> Any:
        """The colours in order of the ranks, as matplotlib takes them."""
        from matplotlib import colormaps
        from matplotlib.colors import LinearSegmentedColormap, ListedColormap

        if self.ranks <= len(_FEW):
            return ListedColormap(_FEW[: max(1, self.ranks)])
        return LinearSegmentedColormap.from_list("ranks", colormaps["viridis"](np.linspace(0.06, 0.97, 256)))

    def of(self, ranks: Any) -> np.ndarray:
        """Red, green, blue of each of ``ranks``, float ``[..., 3]``."""
        chosen = np.asarray(ranks)
        if self.ranks <= len(_FEW):
            return np.asarray(self.scale(chosen))[..., :3]
        return np.asarray(self.scale(chosen / (self.ranks - 1)))[..., :3]

    def ink(self, rank: int) -> str:
        """Black or white, whichever is read on the colour of ``rank``."""
        red, green, blue = self.of(rank)
        return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def chart_of_pass(phase: Pass, ranks: int) -> Chart:
    """The spans of one modelled pass on rings of ``ranks``, in seconds; the shard is that of their labels."""
    unit, scale = next(
        (unit, scale)
        for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6))
        if scale * phase.seconds >= 1 or unit == "us"
    )
    bars = tuple(
        Bar(span.rank, span.lane, scale * span.start, scale * span.end, _shard_of(span)) for span in phase.spans
    )
    computed = sum(bar.end - bar.start for bar in bars if bar.lane == "compute")
    busy = computed / max(scale * ranks * phase.seconds, 1e-30)
    title = f"{phase.name}: {spell_seconds(phase.seconds)}, the {phase.travels} travel\nranks compute {busy:.0%} of it"
    return Chart(title, unit, ranks, scale * phase.seconds, bars)


def _shard_of(span: Span) -> int:
    """The shard of a visit or a message ("shard 3 to rank 1"); a rank's own where heads are swapped for tokens."""
    kind, *rest = span.label.split()
    return int(rest[0]) if kind == "shard" else span.rank


def chart_of_work(plans: Sequence[Plan]) -> Chart:
    """The cells of every visit, in even shares of all cells; each step is as long as its busiest rank needs."""
    steps = [move.visits for move in schedule(plans).moves]
    even = max(1, sum(visit.cells for visits in steps for visit in visits)) / len(plans)
    bars, total, at = [], np.zeros(len(plans)), 0.0
    for visits in steps:
        for visit in visits:
            bars.append(Bar(visit.rank, "compute", at, at + visit.cells / even, visit.shard))
            total[visit.rank] += visit.cells / even
        at += max((visit.cells for visit in visits), default=0) / even
    title = f"work in lockstep\nbusiest rank {total.max():.2f} x the mean; all steps together {at:.2f} x"
    return Chart(title, "work (1 = an even share)", len(plans), at, tuple(bars))


def draw_chart(axes: Any, chart: Chart, palette: Palette) -> None:
    """Draw ``chart`` into ``axes``; rank 0 on top."""
    messages = [lane for lane in chart.lanes if lane in MESSAGES]
    tall = 0.88 if not messages else 0.56
    _draw_blocks(axes, chart.waits, tall, facecolors=WAITING[0], edgecolors=WAITING[1], hatch="/////", linewidth=0)
    visits = [bar for bar in chart.bars if bar.lane == "compute" and bar.end > bar.start]
    few = chart.ranks <= len(_FEW) * 2
    _draw_blocks(
        axes,
        [(bar.rank, bar.start, bar.end) for bar in visits],
        tall,
        facecolors=palette.of(np.array([bar.shard for bar in visits], dtype=np.int64)),
        edgecolors="white",
        linewidth=0.8 if few else 0.15,
    )
    for bar in visits if few else ():
        share = (bar.end - bar.start) / chart.end
        if share >= _ROOM:
            at = ((bar.start + bar.end) / 2, bar.rank - 0.44 + tall / 2)
            label = f"shard {bar.shard}" if share >= 4 * _ROOM else str(bar.shard)
            axes.text(*at, label, ha="center", va="center", fontsize=8, color=palette.ink(bar.shard))
    for lane in messages:
        second = lane == "home" and "onward" in messages
        lines = [(bar.rank, bar.start, bar.end) for bar in chart.bars if bar.lane == lane]
        _draw_blocks(axes, lines, 0.11, top=0.32 if second else 0.16, facecolors=MESSAGES[lane], linewidth=0)
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if chart.ranks <= 16 * step or step == 128)
    axes.set(xlim=(0, chart.end or 1), ylim=(chart.ranks - 0.5, -0.5))
    named = np.arange(0, chart.ranks, every)
    axes.set_yticks(named - 0.44 + tall / 2, named)
    axes.set_ylabel("rank", fontsize=10)
    axes.set_xlabel(chart.unit, fontsize=10)
    axes.set_title(chart.title, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_blocks(
    axes: Any, blocks: Iterable[tuple[int, float, float]], tall: float, top: float = -0.44, **look: Any
) -> None:
    """Rectangles (rank, start, end), in one collection; thousands of them become an image inside a vector format."""
    from matplotlib.collections import PolyCollection

    table = np.array(list(blocks), dtype=float).reshape(-1, 3)
    rank, start, end = table.T
    upper, lower = rank + top, rank + top + tall
    corners = np.stack([start, upper, end, upper, end, lower, start, lower], axis=1).reshape(-1, 4, 2)
    axes.add_collection(PolyCollection(list(corners), rasterized=len(corners) > 1500, **look), autolim=False)
