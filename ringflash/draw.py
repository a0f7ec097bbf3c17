"""Pictures of plans: which part of the attention matrix is computed where, and in which step.

On the left the attention matrix, each visible cell in the colour of the step that computes it; the strips along its
edges say which rank holds the query and the key. On the right what every rank does in every step: the shard it meets and
its share of an even load (1.00 is what every rank would do in every step if all were busy and equal).
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from ringflash.layout import Layout
from ringflash.plan import Plan

_SAMPLES = 512  # cells of the matrix along each side, at most


def draw(plans: Sequence[Plan], path: str | PathLike[str]) -> None:
    """Draw a complete set of plans (``rf.plans(s)``) into ``path``; its suffix chooses the format (svg, png, pdf).

    Needs matplotlib (``pip install ringflash[draw]``); raises ``ImportError`` with that sentence if it is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("draw: matplotlib is needed; pip install 'ringflash[draw]'") from None
    if [p.rank for p in plans] != list(range(plans[0].ranks if plans else 1)):
        raise ValueError(
            f"draw: got plans of ranks {[p.rank for p in plans]}; one plan for every rank, as of rf.plans(s)"
        )
    first = plans[0]
    steps = max(1, *(len(p.steps) for p in plans))
    figure = Figure(
        figsize=(6.2 + max(3.2, 0.7 * steps + 1.2), max(4.6, 0.36 * first.ranks + 1.6)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    matrix, timetable = figure.subplots(1, 2, width_ratios=[5.0, max(3.2, 0.7 * steps + 1.2)])
    _draw_matrix(matrix, plans, steps)
    _draw_timetable(timetable, plans, steps)
    figure.suptitle(f"{first.queries.length} positions on {first.ranks} ranks, {first.mask}", fontsize=11)
    figure.savefig(path, dpi=150)


def _draw_matrix(axes: Any, plans: Sequence[Plan], steps: int) -> None:
    first = plans[0]
    met = np.full((first.ranks, first.ranks), -1)  # [rank, shard]: the step in which they meet
    for plan in plans:
        for visit in plan.legs.visits:
            met[plan.rank, visit.shard] = visit.step
    queries, keys = (_sample(layout.length) for layout in (first.queries, first.keys))
    lo, hi = first.mask.bounds(queries + first.q_offset)
    seen = (keys >= lo[:, None]) & (keys < hi[:, None])
    holders = _holders(first.queries)[queries], _holders(first.keys)[keys]
    cells = np.where(seen, met[holders[0][:, None], holders[1]], -1)
    extent = (0, first.keys.length, first.queries.length, 0)
    axes.imshow(
        np.ma.masked_less(cells, 0), cmap=_colours(steps), vmin=0, vmax=steps, extent=extent, interpolation="nearest"
    )
    axes.set(xlabel="key position", ylabel="query position")
    axes.set_facecolor("white")
    for holder, where in zip(holders, ("left", "top"), strict=True):
        strip = axes.inset_axes([-0.035, 0, 0.025, 1] if where == "left" else [0, 1.01, 1, 0.025])
        strip.imshow(holder[:, None] if where == "left" else holder[None], aspect="auto", cmap="tab20", vmin=0, vmax=19)
        strip.set(xticks=[], yticks=[])
    axes.tick_params(labelsize=8)
    axes.yaxis.set_tick_params(pad=14)
    axes.set_title("colour: the step that computes a cell\nstrips: the rank that holds it", fontsize=9, pad=14)


def _draw_timetable(axes: Any, plans: Sequence[Plan], steps: int) -> None:
    work = np.zeros((len(plans), steps))
    for plan in plans:
        for visit in plan.legs.visits:
            work[plan.rank, visit.step] = plan.cells(visit.shard)
    even = max(work.sum() / work.size, 1)
    shown = np.ma.masked_equal(np.where(work > 0, np.arange(steps), -1), -1)
    axes.imshow(shown, cmap=_colours(steps), vmin=0, vmax=steps, aspect="auto")
    small = len(plans) * steps <= 144
    for plan in plans:
        for visit in plan.legs.visits if small else ():
            share = work[plan.rank, visit.step] / even
            label = f"shard {visit.shard}\n{share:.2f}"
            axes.text(visit.step, plan.rank, label, ha="center", va="center", fontsize=7, color="black")
    if small:
        axes.set(xticks=range(steps), yticks=range(len(plans)))
    busiest = work.sum(axis=1).max() / max(work.sum(axis=1).mean(), 1)
    axes.set(xlabel="step", ylabel="rank")
    axes.set_title(f"shard met, and share of an even load\nbusiest rank: {busiest:.2f} x the mean", fontsize=9, pad=14)
    axes.tick_params(labelsize=8)


def _sample(length: int) -> np.ndarray:
    return np.unique(np.linspace(0, max(0, length - 1), num=min(length, _SAMPLES)).astype(np.int64))


def _holders(layout: Layout) -> np.ndarray:
    """The rank that holds each position."""
    holder = np.zeros(layout.length, dtype=np.int64)
    for rank in range(layout.ranks):
        holder[layout.positions(rank)] = rank
    return holder


def _colours(steps: int) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("steps", ["#f6d285", "#e88b6a", "#b58ad6", "#6fa8dc"], N=max(2, steps + 1))
