"""What ``layout="auto"`` and ``route="auto"`` stand for: the cheapest, by a coarse estimate of what is equal on all ranks.

The estimate is that of ``cost.py`` without its details: the fullest rank's cells against the busiest rank's traffic, each
in units of one cell. It knows no hardware, since every rank has to come to the same answer; the ratio between computing
and sending is that of a Hopper GPU with grouped heads on a fast network, and only decides where it matters little.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ringflash.balance import areas, balanced
from ringflash.layout import LAYOUTS, Layout
from ringflash.mask import Mask
from ringflash.needs import Needs
from ringflash.plan import needs
from ringflash.route import Route, carried, double_ring, gather, needed_only, ring, ring_down, tour_of, visited

_CELLS_PER_TOKEN = 1024
"""Cells of attention that a GPU computes while the key and value of one token cross a link."""
_SLOW = 8  # how much longer a hop between nodes takes
_HELD = 8
"""Shards' worth of keys that a rank may hold at once: still little beside what a layer saves for its backward."""
_MARGIN = 0.9  # direct hops go to far ranks, neighbours' hops do not: they have to save this much to be taken


def choose_layout(length: int, keys: int, ranks: int, mask: Mask) -> str:
    """The name of the layout that the estimate prefers: "contiguous", or "balanced" for documents, or "zigzag"."""
    if ranks == 1 or length < 2 * ranks:
        return "contiguous"
    documents = keys == length and mask.documents and mask.rows == 1
    names = ("contiguous", "balanced" if documents else "zigzag")
    return min(names, key=lambda name: _price(name, length, keys, ranks, mask))


def choose_route(queries: Layout, keys: Layout, mask: Mask, q_offset: int, nodes: int = 1) -> Route:
    """The route that sends least, on ranks that are spread evenly over so many ``nodes``; rings where it hardly matters.

    Where owners had better send themselves they do so all at once, if memory lets them: documents give ranks much work in
    some steps and none in others, and who posts step by step makes others wait for his work.
    """
    if queries.ranks == 1:
        return ring
    found = needs(queries, keys, mask, q_offset)
    per_node = queries.ranks // nodes
    rings: tuple[Route, ...] = (ring, ring_down)
    if nodes > 1:
        rings += (double_ring(nodes, per_node), double_ring(nodes, per_node, -1))
    sent = {route: _sent(route, found, nodes).sum() for route in (*rings, needed_only)}
    best = min(rings, key=lambda route: sent[route])
    if sent[needed_only] >= _MARGIN * sent[best]:
        return best
    abroad = found.seen & (found.owner != np.arange(found.ranks)[:, None])
    return gather if (abroad @ found.tokens).max() * queries.ranks <= _HELD * keys.length else needed_only


@lru_cache(maxsize=64)
def _price(name: str, length: int, keys: int, ranks: int, mask: Mask) -> tuple[int, int]:
    """What the slowest rank takes if transfers hide behind computing, and if they do not; in cells."""
    queries, held = (
        balanced(n, ranks, mask) if name == "balanced" else LAYOUTS[name](n, ranks) for n in (length, keys)
    )
    offset = keys - length  # where the ends are aligned, as in most cross-attention; no offset changes the order much
    found = needs(queries, held, mask, offset)
    wanted_abroad = found.seen.sum(axis=0) - found.seen[found.owner, np.arange(len(found.owner))]
    sent = np.bincount(found.owner, found.tokens * wanted_abroad, minlength=ranks)
    work, traffic = int(areas(queries, mask, offset, keys).max()), int(sent.max()) * _CELLS_PER_TOKEN
    return max(work, traffic), work + traffic


def _sent(route: Route, found: Needs, nodes: int = 1) -> np.ndarray:
    """Tokens that each rank sends onward, those to other nodes counted as often as they are slower; float ``[ranks]``."""
    tour = tour_of(route, found.ranks)
    comes = carried(tour, visited(tour, found))
    comes[:, 0] = False
    piece, step = np.nonzero(comes)
    owner = found.owner[piece]
    sender, receiver = tour.rank_at[owner, tour.parent[step]], tour.rank_at[owner, step]
    per_node = found.ranks // nodes
    weight = np.where(sender // per_node == receiver // per_node, 1, _SLOW)
    return np.bincount(sender, found.tokens[piece] * weight, minlength=found.ranks)
