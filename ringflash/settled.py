"""What the words stand for by which a sharding is described: ``"zigzag"``, ``"needed_only"``, ``"auto"``.

Whatever does not fit the positions, the ranks or the mask is refused here, by the name of the argument.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ringflash.auto import choose_layout, choose_route
from ringflash.balance import balanced
from ringflash.groups import Group, nodes
from ringflash.layout import LAYOUTS, Layout
from ringflash.mask import Mask
from ringflash.numbers import brief, said_by
from ringflash.route import ROUTES, Route, tour_of


def settle_layout(wanted: str | Layout, length: int, keys: int, ranks: int, mask: Mask) -> str | Layout:
    """The name of a layout that needs no mask, with "auto" decided, or a layout that fits."""
    if isinstance(wanted, Layout):
        with said_by("Sharding"):
            wanted.check()
        if (wanted.length, wanted.ranks) != (length, ranks) or keys != length:
            raise ValueError(
                f"Sharding: layout has {wanted.length} positions on {wanted.ranks} ranks; needed are {length} "
                f"on {ranks}" + ("" if keys == length else f", and {keys} keys can only be laid out by name")
            )
        return wanted
    if not isinstance(wanted, str):
        raise TypeError(
            f"Sharding: layout is {brief(wanted)} of type {type(wanted).__name__}; a name is needed, or a Layout"
        )
    name = _chosen_layout(length, keys, ranks, mask) if wanted == "auto" else wanted
    if name == "balanced":
        if keys != length:
            raise ValueError(
                f"Sharding: layout is 'balanced' and there are {keys} keys for {length} queries; documents are balanced "
                f"where queries and keys are the same positions: accepted are {', '.join(map(repr, LAYOUTS))}"
            )
        with said_by("Sharding"):
            return _balanced(length, ranks, mask)
    if name not in LAYOUTS:
        names = ", ".join(map(repr, ("auto", *LAYOUTS, "balanced")))
        raise ValueError(f"Sharding: layout is {wanted!r}; accepted are {names}, or a Layout")
    return name


def lay_out(layout: str | Layout, length: int, ranks: int) -> Layout:
    """What ``settle_layout`` returned, for so many positions."""
    return layout if isinstance(layout, Layout) else _laid_out(layout, length, ranks)


def settle_route(wanted: str | Route, queries: Layout, keys: Layout, mask: Mask, q_offset: int, group: Group) -> Route:
    """The route, with "auto" decided, if it fits the ranks of a ring."""
    if isinstance(wanted, str) and wanted == "auto":
        homes = nodes(group)
        homes = homes if queries.ranks % homes == 0 else 1
        route = _chosen_route(queries, keys, mask, q_offset, homes)
    elif isinstance(wanted, str):
        if wanted not in ROUTES:
            names = ", ".join(map(repr, ("auto", *ROUTES)))
            raise ValueError(f"Sharding: route is {wanted!r}; accepted are {names}, or a value as rf.double_ring(2, 4)")
        route = ROUTES[wanted]
    elif callable(getattr(wanted, "tour", None)):
        route = wanted
    else:
        raise TypeError(
            f"Sharding: route is {brief(wanted)}; a name is needed, or a value such as rf.double_ring(2, 4)"
        )
    try:
        tour_of(route, queries.ranks)
    except ValueError as error:
        raise ValueError(f"Sharding: {error}") from None
    return route


# A sharding is built for every batch, and most of what decides it comes again.
_chosen_layout = lru_cache(maxsize=64)(choose_layout)
_chosen_route = lru_cache(maxsize=64)(choose_route)


@lru_cache(maxsize=128)
def _laid_out(name: str, length: int, ranks: int) -> Layout:
    return LAYOUTS[name](length, ranks)


@lru_cache(maxsize=16)
def _balanced(length: int, ranks: int, mask: Mask) -> Layout:
    return replace(balanced(length, ranks, mask), name="balanced")
