"""Changes that a user could make: other routes, layouts, numbers of ranks, and heads spread over ranks.

Each is a complete set of plans for the same problem, made only when somebody looks at it. What a change is worth, ``cost.py``
finds out by playing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ringflash.balance import balanced
from ringflash.forecast.workload import Workload
from ringflash.layout import LAYOUTS, Layout
from ringflash.mask import Mask
from ringflash.plan import Plan, derive, tokens_moved
from ringflash.route import Direct, DoubleRing, Ring, Route, gather, needed_only, ring, ring_down

_FEW = 32  # ranks up to which twice as many are planned in little time


class Change(NamedTuple):
    """Another way to run the same problem; ``plans`` makes its plans, for rings of which ``degree`` share the heads."""

    label: str
    degree: int
    plans: Callable[[], list[Plan]]


def routes(plans: Sequence[Plan], per_node: int, degree: int) -> Iterator[Change]:
    """The same shards on other routes that can send less over the slow links, on ``per_node`` ranks of the ring per node."""
    first = plans[0]
    rings: list[Route] = [ring, ring_down]
    if 1 < per_node < first.ranks and first.ranks % per_node == 0:
        rings = [DoubleRing(first.ranks // per_node, per_node, direction) for direction in (1, -1)]
    others = [min(rings, key=lambda route: tokens_moved(first.needs, route))]
    if _is_local(first.mask):
        others += [needed_only, gather]  # what little somebody needs may well come at once: then nobody waits in a step
    for route in others:
        if route != first.route and isinstance(first.route, Ring | DoubleRing | Direct):
            yield Change(f"route {route}", degree, _planned(first, first.queries, first.keys, route))


def layouts(plans: Sequence[Plan], degree: int) -> Iterator[Change]:
    """The same ring with other layouts, for self-attention."""
    first = plans[0]
    for name in ("contiguous", "zigzag", "balanced") if first.queries == first.keys else ():
        layout = remake(name, first.queries.length, first.ranks, first.mask)
        if layout is not None and layout != first.queries:
            yield Change(f'layout "{name}"', degree, _planned(first, layout, layout, first.route))
            if first.route != gather and _is_local(first.mask):
                yield Change(f'layout "{name}" and route gather', degree, _planned(first, layout, layout, gather))


def degrees(plans: Sequence[Plan], workload: Workload, per_node: int) -> Iterator[Change]:
    """The same ranks in smaller rings, of which more share the heads (Ulysses), within nodes of ``per_node`` ranks."""
    first, ranks = plans[0], plans[0].ranks * workload.degree
    for degree in (2, 4, 8):
        fits = ranks % degree == 0 and workload.heads % degree == 0 and per_node % degree == 0
        if fits and degree > workload.degree:
            label = f"heads_axis of {degree} ranks (Ulysses), rings of {ranks // degree}"
            yield from _resized(first, ranks // degree, degree, label)


def more_ranks(plans: Sequence[Plan], degree: int) -> Iterator[Change]:
    """Twice as many ranks, where planning them takes little time."""
    first = plans[0]
    if first.ranks <= _FEW:
        label = f"{2 * first.ranks * degree} ranks instead of {first.ranks * degree}"
        yield from _resized(first, 2 * first.ranks, degree, label)


def remake(name: str, length: int, ranks: int, mask: Mask) -> Layout | None:
    """The layout of that name, or None where it has none for such a problem."""
    if name in LAYOUTS:
        return LAYOUTS[name](length, ranks)
    if name == "balanced" and mask.documents and mask.rows == 1 and mask.length == length:
        return balanced(length, ranks, mask)
    return None


def _resized(first: Plan, ranks: int, degree: int, label: str) -> Iterator[Change]:
    """The same problem on rings of so many ranks, with the layout of the same name; a double ring keeps its nodes' size."""
    name, route = first.queries.name, first.route
    if isinstance(route, DoubleRing):
        inner = min(max(1, route.per_node * ranks // first.ranks) if ranks < first.ranks else route.per_node, ranks)
        route = DoubleRing(ranks // inner, inner, route.direction) if ranks % inner == 0 else ring
    queries = remake(name, first.queries.length, ranks, first.mask)
    keys = queries if first.keys == first.queries else remake(name, first.keys.length, ranks, first.mask)
    if queries is not None and keys is not None:
        yield Change(label, degree, _planned(first, queries, keys, route))


def _is_local(mask: Mask) -> bool:
    """Do queries see their neighbourhood only, so that most ranks need little of each other?"""
    return bool(mask.documents or mask.chunks) or mask.left is not None


def _planned(first: Plan, queries: Layout, keys: Layout, route: Route) -> Callable[[], list[Plan]]:
    return lambda: [derive(rank, queries, keys, first.mask, route, first.q_offset) for rank in range(queries.ranks)]
