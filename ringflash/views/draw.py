"""Pictures of plans: who computes which part of the attention matrix, and what every rank does when.

On the left the attention matrix. A visible cell has the colour of the rank that computes it: full where the rank holds
both sides, pale where one of them had to travel. The strips along the edges say who holds the query and the key.

On the right one row per rank against time. Blocks have the colour of the shard that is met, whatever is hatched is spent
waiting, and the thin lines below are messages. With an estimate time is in seconds, forward and backward. Without one it
is in work (1 is an even share of the forward), in lockstep: each step takes as long as its busiest rank.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from os import PathLike
from typing import Any

import numpy as np

from ringflash.forecast.cost import Estimate
from ringflash.layout import Layout
from ringflash.plan import Plan
from ringflash.units import spell_tokens
from ringflash.verify import require_plans
from ringflash.views.chart import MESSAGES, WAITING, Chart, Palette, chart_of_pass, chart_of_work, draw_chart
from ringflash.views.reading import read_path

PICTURES = (".svg", ".png", ".pdf")
"""The formats that are drawn, by the suffix of the file."""

_SAMPLES = 640  # cells of the matrix along each side, at most
_MANY = 8  # with more ranks charts stand side by side
PALE = 0.42
"""How much colour is left where one side travelled."""


def draw(plans: Sequence[Plan], path: str | PathLike[str], estimate: Estimate | None = None) -> None:
    """Draw a complete set of plans (``rf.plans(s)``) into ``path``; its suffix chooses the format (svg, png, pdf).

    ``estimate`` (``rf.estimate(plans, ...)`` of the same plans) draws seconds instead of steps.
    Needs matplotlib (``pip install ringflash[draw]``); raises ``ImportError`` with that sentence if it is missing, and
    ``ValueError`` or ``TypeError`` for a path or an estimate that does not fit, before anything is drawn.
    """
    file = read_path(path, PICTURES, "draw: path")
    _check(plans, estimate)
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("draw: matplotlib is needed; pip install 'ringflash[draw]'") from None
    first = plans[0]
    palette = Palette(first.ranks)
    if estimate is None:
        charts = [chart_of_work(plans)]
    else:
        charts = [chart_of_pass(phase, first.ranks) for phase in (estimate.forward, estimate.backward)]
    with rc_context({"hatch.linewidth": 0.7, "svg.hashsalt": "ringflash"}):
        figure = Figure(figsize=_size(first.ranks, len(charts)), layout="constrained")
        FigureCanvasAgg(figure)
        matrix, rows = _panels(figure, first.ranks, len(charts))
        _draw_matrix(matrix, first, palette)
        for axes, chart in zip(rows, charts, strict=True):
            draw_chart(axes, chart, palette)
        _draw_legend(figure, charts, palette)
        if first.ranks > palette.named:
            _draw_scale(matrix.figure, matrix, palette)
        figure.suptitle(_title(first, estimate), fontsize=12)
        figure.savefig(file, dpi=160)


def _check(plans: Sequence[Plan], estimate: Estimate | None) -> None:
    """Are these the plans of all ranks, and is the estimate one of them?"""
    require_plans(plans, "draw")
    if [p.rank for p in plans] != list(range(plans[0].ranks if plans else 1)):
        raise ValueError(
            f"draw: got plans of ranks {[p.rank for p in plans]}; one plan for every rank, as of rf.plans(s)"
        )
    if estimate is None:
        return
    if not isinstance(estimate, Estimate):
        raise TypeError(
            f"draw: estimate is {estimate!r}; an estimate of the same plans is needed, rf.estimate(plans, ...)"
        )
    first = plans[0]
    if first.problem[:-1] != estimate.problem[:-1]:
        raise ValueError(
            f"draw: the estimate is of other plans, of {estimate.tokens} tokens on {estimate.ranks} ranks; the plans are of "
            f"{first.queries.length} tokens on {first.ranks} ranks, {first.mask}, {first.route}"
        )


def _size(ranks: int, charts: int) -> tuple[float, float]:
    """Inches. Few ranks: charts one above the other; many: side by side, as high as the rows need."""
    if ranks <= _MANY:
        return 13.2, max(6.4, 1.9 + charts * (1.0 + 0.22 * ranks))
    return 6.4 + 5.2 * charts, min(40.0, max(7.2, 1.8 + 0.09 * ranks))


def _panels(figure: Any, ranks: int, charts: int) -> tuple[Any, list[Any]]:
    if ranks <= _MANY:
        left, right = figure.subfigures(1, 2, width_ratios=[6.0, 7.2])
        return left.subplots(), list(np.atleast_1d(right.subplots(charts, 1)))
    left, right = figure.subfigures(1, 2, width_ratios=[6.4, 5.2 * charts])
    return left.subplots(), list(np.atleast_1d(right.subplots(1, charts)))


def _title(first: Plan, estimate: Estimate | None) -> str:
    layout = f", {first.queries.name} layout" if first.queries.name else ""
    ranks = f"{first.ranks} ranks"
    if estimate is not None and estimate.ranks != first.ranks:
        ranks = f"{estimate.ranks} ranks in rings of {first.ranks}"
    documents = f"{len(first.mask.documents[0]) - 1} documents" if first.mask.documents else ""
    mask = re.sub(r"documents\(.*\)", documents, str(first.mask))
    text = f"{spell_tokens(first.queries.length)} positions on {ranks}{layout}, {first.route}, {mask}"
    lines = textwrap.wrap(text, 120)
    if estimate is not None:
        lines.append(f"a model of {estimate.hardware.name}, not a measurement; limit: {estimate.limit}")
    return "\n".join(lines)


def _draw_matrix(axes: Any, plan: Plan, palette: Palette) -> None:
    """All plans of a set show the same matrix: it is layout x mask."""
    length, width = plan.queries.length, plan.keys.length
    queries, keys = _samples(0, length), _samples(0, width)
    _paint(axes, plan, palette, queries, keys)
    axes.set(xticks=[], yticks=[])
    axes.set_box_aspect(1)
    left = axes.inset_axes([-0.06, 0, 0.045, 1])
    _draw_strip(left, queries, _holders(plan.queries, queries), palette, upright=True)
    top = axes.inset_axes([0, 1.015, 1, 0.045])
    _draw_strip(top, keys, _holders(plan.keys, keys), palette, upright=False)
    rows, columns = (choose_ticks(n) for n in (length, width))
    left.set_yticks(rows, [*map(spell_tokens, rows)], fontsize=9)
    axes.set_xticks(columns, [*map(spell_tokens, columns)], fontsize=9)
    left.set_ylabel("query position", fontsize=10)
    axes.set_xlabel("key position", fontsize=10)
    row = " (batch row 0)" if plan.mask.rows > 1 else ""
    top.set_title(
        f"who computes what{row}\nfull colour: {plan.travels} at home; pale: {plan.travels} that travelled", fontsize=10
    )
    _draw_detail(axes, plan, palette)


def choose_ticks(length: int) -> list[int]:
    """Positions that are written along an axis: the ends and what lies between, none twice.

    >>> choose_ticks(4096), choose_ticks(2), choose_ticks(0)
    ([0, 1024, 2048, 3072, 4096], [0, 1, 2], [0])
    """
    return sorted({round(length * quarter / 4) for quarter in range(5)})


def _paint(axes: Any, plan: Plan, palette: Palette, queries: np.ndarray, keys: np.ndarray) -> None:
    extent = (keys[0], keys[-1], queries[-1], queries[0])
    if len(queries) > 1 and len(keys) > 1:
        picture = colour_cells(plan, palette, queries, keys)
        axes.imshow(picture, extent=extent, interpolation="nearest", aspect="auto")


def colour_cells(plan: Plan, palette: Palette, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Red, green, blue of the cells between these edges, float ``[queries - 1, keys - 1, 3]``.

    A cell has a colour if any of its queries sees any of its keys, and belongs to the ranks that hold its middle.
    """
    lo, _ = plan.mask.bounds(queries[:-1] + plan.q_offset)
    _, hi = plan.mask.bounds(queries[1:] - 1 + plan.q_offset)
    seen = (keys[1:] > lo[:, None]) & (keys[:-1] < hi[:, None])
    rows, columns = _holders(plan.queries, queries)[:, None], _holders(plan.keys, keys)[None]
    colours = palette.of(np.broadcast_to(rows if plan.travels == "keys" else columns, seen.shape))
    colours = np.where((rows == columns)[..., None], colours, 1 - PALE * (1 - colours))
    return np.where(seen[..., None], colours, 1.0)


def _draw_detail(axes: Any, plan: Plan, palette: Palette) -> None:
    """A magnified piece, in the corner that a narrow band leaves empty: the end of whatever reaches furthest."""
    length = plan.queries.length
    if length < _SAMPLES or plan.keys.length != length or plan.q_offset:
        return
    lo, hi = (x.clip(0, length) for x in plan.mask.bounds(np.arange(length)))
    reach = hi - lo
    side = int(max(3 * length // plan.ranks, 6 * reach.mean()))
    if max(reach.max(), side) > length * 0.3:
        return
    furthest = np.flatnonzero(reach == reach.max())
    middle = int(furthest[len(furthest) // 2])
    start = min(max(0, middle - side // 2), length - side)
    detail = axes.inset_axes([0.53, 0.53, 0.45, 0.45])
    _paint(detail, plan, palette, _samples(start, start + side), _samples(start, start + side))
    detail.set(xticks=[], yticks=[])
    detail.text(0.04, 0.05, f"{length / side:.0f} times larger", transform=detail.transAxes, fontsize=8)
    axes.indicate_inset_zoom(detail, edgecolor="#444444", alpha=0.9, linewidth=0.8)


def _draw_strip(strip: Any, edges: np.ndarray, holders: np.ndarray, palette: Palette, upright: bool) -> None:
    """Who holds the positions between ``edges``; with the rank's number where there is room for it."""
    strip.set(xticks=[], yticks=[])
    if not holders.size:
        return
    picture = palette.of(holders)
    length = edges[-1]
    extent = (0, 1, length, 0) if upright else (0, length, 1, 0)
    strip.imshow(picture[:, None] if upright else picture[None], aspect="auto", extent=extent, interpolation="nearest")
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(holders)) + 1, [len(holders)]])
    for a, b in pairwise(cuts):
        middle = (edges[a] + edges[b]) / 2
        number = str(holders[a])
        if edges[b] - edges[a] >= (0.026 if upright else 0.012 + 0.014 * len(number)) * length:
            at = (0.5, middle) if upright else (middle, 0.5)
            ink = palette.ink(int(holders[a]))
            strip.text(*at, number, ha="center", va="center", fontsize=8, color=ink)


def _draw_legend(figure: Any, charts: Sequence[Chart], palette: Palette) -> None:
    """What blocks and lines mean, and the colours of ranks where they are too many to be numbered."""
    from matplotlib.patches import Patch

    names = {"onward": "sends onward", "home": "sends a total home", "exchange": "swaps heads for tokens (Ulysses)"}
    lanes = {lane for chart in charts for lane in chart.lanes}
    met = (
        "colour: the shard that is met" if palette.ranks > palette.named else "colour and number: the shard that is met"
    )
    handles = [Patch(facecolor=tuple(palette.of(palette.ranks // 3)), label=f"computes ({met})")]
    if any(chart.waits for chart in charts):
        handles.append(Patch(facecolor=WAITING[0], edgecolor=WAITING[1], hatch="/////", linewidth=0, label="waits"))
    handles += [Patch(facecolor=colour, label=names[lane]) for lane, colour in MESSAGES.items() if lane in lanes]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), fontsize=9, frameon=False)


def _draw_scale(figure: Any, axes: Any, palette: Palette) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(0, palette.ranks - 1), palette.scale)
    bar = figure.colorbar(scale, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.02)
    bar.set_label("rank", fontsize=10)
    bar.ax.tick_params(labelsize=9)


def _samples(start: int, stop: int) -> np.ndarray:
    """The edges of the cells along one side."""
    return np.unique(np.linspace(start, stop, num=min(stop - start, _SAMPLES) + 1).astype(np.int64))


def _holders(layout: Layout, edges: np.ndarray) -> np.ndarray:
    """The rank that holds the middle of each cell."""
    holder = np.zeros(layout.length, dtype=np.int64)
    for rank in range(layout.ranks):
        holder[layout.positions(rank)] = rank
    return holder[(edges[:-1] + edges[1:]) // 2]
