"""Who meets whom, when, and how results come home.

A route is a *tour*: a table that says, for each step, at which rank a shard is, from whom it comes, and when that hop is
posted. A ring, for shard 0 on four ranks that all need it:

    step      0         1         2         3
    onward    0 -> 1    1 -> 2    2 -> 3              what travels goes to the next rank while this one computes
    visits    at 0      at 1      at 2      at 3
    home                1 -> 2    2 -> 3    3 -> 0    the total follows the visitors, then goes straight to its owner

Everything else follows from the table and from who needs what (``needs.py``). A piece of a shard stops where nobody
further along needs it: zigzag's late chunks, the far end of a window and foreign documents do not travel, and no route
knows of any of them. Totals pass from visitor to visitor inside a *chain* (a ring has one, a double ring one in each
node, direct routes one for each visitor), whose last visitor sends them straight to their owner.

Both ends of a message know it by the same (step, phase, hop), and every rank goes through these in one order, so that
messages cannot wait for each other in a circle.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from ringflash.needs import Needs
from ringflash.numbers import whole

_PATIENCE = 2
"""Steps that a total has for its way: one beside the next visit, and one to spare."""
_FREE = 8
"""Steps that totals have on routes whose ranks need not keep step: as many are held by their owner at most."""


@dataclass(frozen=True, eq=False)
class Tour:
    """Where shards are, by step; the same for every shard but for the ranks' numbers. A tour has as many steps as ranks.

    Step 0 is at the owner. ``chain`` never decreases. A rank is at one shard in each step, and each rank once at each.
    """

    rank_at: np.ndarray
    """int ``[ranks, steps]``: the rank where the shard of each rank is in each step."""
    parent: np.ndarray
    """int ``[steps]``: the earlier step whose rank sends it on to this one."""
    post: np.ndarray
    """int ``[steps]``: the step in which that hop is posted, before the one in which it is used."""
    chain: np.ndarray
    """int ``[steps]``: totals are passed on inside a chain."""
    channel: np.ndarray
    """int ``[steps]``: hops of one channel follow each other; a slow link has one of its own."""
    patience: np.ndarray
    """int ``[steps]``: how many steps after its visit a total that goes straight home is awaited, from 1."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` unless this is a tour: what breaks its rules would compute garbage, or wait for ever."""
        ranks = len(self.rank_at)
        steps = np.arange(ranks)
        for field in fields(self):
            table = getattr(self, field.name)
            shape = (ranks, ranks) if field.name == "rank_at" else (ranks,)
            if not isinstance(table, np.ndarray) or table.shape != shape or table.dtype.kind not in "iu":
                raise ValueError(f"Tour: {field.name} is not an array of integers of shape {shape}")
            table.setflags(write=False)
        rules = {
            "rank_at: every shard is at each rank once, and every rank at one shard in each step": all(
                (np.sort(table, axis=1) == steps).all() for table in (self.rank_at, self.rank_at.T)
            ),
            "rank_at: in step 0 every shard is at its owner": (self.rank_at[:, :1] == steps[:, None]).all(),
            "parent and post: a hop is posted once its parent's step has begun, and before it is used": (
                (self.parent[1:] <= self.post[1:]) & (self.post[1:] < steps[1:]) & (self.parent[1:] >= 0)
            ).all(),
            "chain: never decreases": (np.diff(self.chain) >= 0).all() and (self.chain >= 0).all(),
            "channel: from 0": (self.channel >= 0).all(),
            "patience: from 1": (self.patience >= 1).all(),
        }
        for rule, kept in rules.items():
            if not kept:
                raise ValueError(f"Tour: a rule is broken. {rule}")

    @cached_property
    def step_at(self) -> np.ndarray:
        """int ``[ranks, ranks]``: the step in which each shard is at each rank; the inverse of ``rank_at``."""
        return np.argsort(self.rank_at, axis=1)

    @cached_property
    def home_channel(self) -> np.ndarray:
        """int ``[steps]``: a total that leaves its chain goes home by the channel by which the chain was reached."""
        return self.channel[np.searchsorted(self.chain, self.chain)]

    @cached_property
    def channels(self) -> int:
        """Number of channels in use."""
        return 1 + int(self.channel.max(initial=0))


class Route(Protocol):
    """Anything with a tour; a route is a value that compares and hashes."""

    def tour(self, ranks: int) -> Tour:
        """The tour of so many ranks; raises ``ValueError`` if the route does not fit them."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, repr=False)
class Ring:
    """Shards go round a ring, one rank per step (Liu et al. 2023, arXiv 2310.01889).

    With ``direction`` -1 they travel towards lower ranks: causal zigzag shards then pass first those who need both their
    chunks, and drop the late one on the way.
    """

    direction: int = 1

    def __post_init__(self) -> None:
        _settle(self, "ring", "direction")

    def tour(self, ranks: int) -> Tour:
        return DoubleRing(1, ranks, self.direction).tour(ranks)

    @property
    def reversed(self) -> Ring:
        """The same ring, the other way round."""
        return Ring(-self.direction)

    def __repr__(self) -> str:
        return "ring" if self.direction == 1 else "ring_down"


@dataclass(frozen=True, repr=False)
class DoubleRing:
    """Rings inside nodes, and a ring of nodes around them (LoongTrain, arXiv 2406.18485).

    A shard crosses to the next node once, posted a whole inner ring before it is needed there, on a channel of its own;
    totals are summed inside each node and cross once. Rank ``node * per_node + lane`` stands in ``node``.
    """

    nodes: int
    per_node: int
    direction: int = 1

    def __post_init__(self) -> None:
        _settle(self, "double_ring", "nodes", "per_node", "direction")

    def tour(self, ranks: int) -> Tour:
        if self.nodes * self.per_node != ranks:
            raise ValueError(f"route is {self}, for {self.nodes * self.per_node} ranks; there are {ranks}")
        steps = np.arange(ranks)
        lap, place = steps // self.per_node, steps % self.per_node
        node, lane = steps[:, None] // self.per_node, steps[:, None] % self.per_node
        onto = (node + self.direction * lap) % self.nodes, (lane + self.direction * place) % self.per_node
        crossing = (place == 0) & (lap > 0)
        parent = np.where(crossing, steps - self.per_node, np.maximum(steps - 1, 0))
        # the hop into a node is posted when its parent, a whole lap earlier, starts to compute
        patience = np.where(lap > 0, max(_PATIENCE, self.per_node), _PATIENCE)  # a crossing home has a lap too
        return Tour(onto[0] * self.per_node + onto[1], parent, parent, lap, np.where(crossing, 1, 0), patience)

    @property
    def reversed(self) -> DoubleRing:
        """The same rings, the other way round."""
        return DoubleRing(self.nodes, self.per_node, -self.direction)

    def __repr__(self) -> str:
        return f"double_ring({self.nodes}, {self.per_node}{'' if self.direction == 1 else ', direction=-1'})"


@dataclass(frozen=True, repr=False)
class Direct:
    """Owners send to each rank what it needs, and totals come straight home: nobody passes anything on.

    What is used in a step is posted ``depth`` steps before; with None all of it in the first, which holds everything that
    this rank needs in its memory at once.
    """

    depth: int | None = 1

    def __post_init__(self) -> None:
        if self.depth is not None:
            _settle(self, "direct", "depth")

    def tour(self, ranks: int) -> Tour:
        steps = np.arange(ranks)
        ahead = ranks if self.depth is None else self.depth
        rank_at = (steps[:, None] + steps) % max(1, ranks)
        patience = np.full_like(steps, max(_PATIENCE, min(ahead, _FREE)))
        none = np.zeros_like(steps)
        return Tour(rank_at, none, np.maximum(steps - ahead, 0), steps, none, patience)

    def __repr__(self) -> str:
        return {None: "gather", 1: "needed_only"}.get(self.depth, f"direct({self.depth})")


def _settle(route: Ring | DoubleRing | Direct, called: str, *names: str) -> None:
    """The numbers of a route as Python's own, if they make sense."""
    for name in names:
        turn = name == "direction"
        nothing = ", or None for all at once" if name == "depth" else ""
        needed = "1 is towards higher ranks, -1 towards lower ones" if turn else f"a number from 1{nothing} is needed"
        number = whole(getattr(route, name), f"{called}: {name}", least=-1 if turn else 1, needed=needed)
        if turn and number not in (1, -1):
            raise ValueError(f"{called}: direction is {number}; {needed}")
        object.__setattr__(route, name, number)


def double_ring(nodes: int, per_node: int, direction: int = 1) -> DoubleRing:
    """Rings of ``per_node`` neighbouring ranks inside each of so many nodes; each shard crosses to a node once.

    >>> double_ring(2, 2).tour(4).rank_at[0].tolist()  # rank 1 is the neighbour of rank 0, ranks 2 and 3 the other node
    [0, 1, 2, 3]
    """
    return DoubleRing(nodes, per_node, direction)


def direct(depth: int | None = 1) -> Direct:
    """Owners send to each rank what it needs, ``depth`` steps ahead of its use."""
    return Direct(depth)


ring, ring_down, gather, needed_only = Ring(), Ring(-1), Direct(None), Direct()
ROUTES: dict[str, Route] = {"ring": ring, "ring_down": ring_down, "gather": gather, "needed_only": needed_only}


class Visit(NamedTuple):
    """At ``step`` this rank computes with ``shard``; ``pieces`` are those that it needs."""

    step: int
    shard: int
    pieces: tuple[int, ...]


class Transfer(NamedTuple):
    """One end of a message, posted at ``step`` and awaited at ``due``: pieces of ``shard`` leave for, or come from, ``peer``.

    What goes onward is used from ``due`` on. A total may be wanted before, by a next visitor, who then awaits it himself.
    """

    step: int
    due: int
    channel: int
    peer: int
    shard: int
    pieces: tuple[int, ...]


class Legs(NamedTuple):
    """All that one rank does, each tuple in the order of its steps."""

    visits: tuple[Visit, ...]
    onward_out: tuple[Transfer, ...] = ()
    onward_in: tuple[Transfer, ...] = ()
    home_out: tuple[Transfer, ...] = ()
    home_in: tuple[Transfer, ...] = ()

    @property
    def uses(self) -> tuple[Visit | Transfer, ...]:
        """Whatever needs a shard to be here: visits, and sending it on."""
        return self.visits + self.onward_out


@lru_cache(maxsize=64)
def tour_of(route: Route, ranks: int) -> Tour:
    """The tour of a route, made once."""
    return route.tour(ranks)


def visited(tour: Tour, needs: Needs) -> np.ndarray:
    """``[piece, step]``: is the piece computed with in that step? bool."""
    return needs.seen[tour.rank_at[needs.owner], np.arange(len(needs.owner))[:, None]]


def carried(tour: Tour, seen: np.ndarray) -> np.ndarray:
    """``[piece, step]``: does the piece come there, to be computed with or to be sent on? bool."""
    here = seen.copy()
    for step in range(len(tour.parent) - 1, 0, -1):
        here[:, tour.parent[step]] |= here[:, step]
    return here


@lru_cache(maxsize=16)
def _journeys(route: Route, needs: Needs) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each piece and step: visited, carried there, and the next and the last visit abroad before it (or ``steps``, 0)."""
    tour = tour_of(route, needs.ranks)
    seen = visited(tour, needs)
    steps = np.arange(seen.shape[1])
    abroad = seen & (steps > 0)
    last = np.maximum.accumulate(np.where(abroad, steps, 0), axis=1)
    following = np.minimum.accumulate(np.where(abroad, steps, len(steps))[:, ::-1], axis=1)[:, ::-1]
    before = np.pad(last[:, :-1], ((0, 0), (1, 0)))
    after = np.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=len(steps))
    return seen, carried(tour, seen), before, after


def legs(route: Route, rank: int, needs: Needs) -> Legs:
    """What ``rank`` does on ``route``, if ``needs`` says who computes with what."""
    tour, (seen, comes, before, after) = tour_of(route, needs.ranks), _journeys(route, needs)
    pieces, owner = np.arange(len(needs.owner)), needs.owner
    place = tour.step_at[owner, rank]  # of each piece: the step in which it can be here
    chain = np.append(tour.chain, -1)  # no chain follows the last step

    def moves(
        some: np.ndarray, step: np.ndarray, due: np.ndarray, channel: np.ndarray, peer: np.ndarray
    ) -> list[Transfer]:
        return _grouped(some, step[some], due[some], channel[some], peer[some], owner[some])

    here = np.flatnonzero(seen[pieces, place])
    arriving = np.flatnonzero((place > 0) & comes[pieces, place])
    onward_in = moves(arriving, tour.post[place], place, tour.channel[place], tour.rank_at[owner, tour.parent[place]])
    piece, child = np.nonzero(comes & (tour.parent == place[:, None]) & (np.arange(len(tour.parent)) > 0))
    onward_out = _grouped(
        piece, tour.post[child], child, tour.channel[child], tour.rank_at[owner[piece], child], owner[piece]
    )
    foreign = here[place[here] > 0]
    goes_home = chain[after[pieces, place]] != chain[place]  # and not to the next visitor of its chain
    home_out = moves(
        foreign,
        place,
        place + np.where(goes_home, tour.patience[place], _PATIENCE),
        np.where(goes_home, tour.home_channel[place], 0),
        np.where(goes_home, owner, tour.rank_at[owner, np.minimum(after[pieces, place], len(tour.parent) - 1)]),
    )
    earlier = before[pieces, place]
    passed_on = foreign[(chain[earlier] == chain[place])[foreign] & (earlier[foreign] > 0)]
    home_in = moves(passed_on, earlier, earlier + _PATIENCE, np.zeros_like(place), tour.rank_at[owner, earlier])
    own, at = np.nonzero(seen[owner == rank] & (np.arange(len(tour.parent)) > 0))
    own = np.flatnonzero(owner == rank)[own]
    final = chain[after[own, at]] != chain[at]
    own, at = own[final], at[final]
    home_in += _grouped(own, at, at + tour.patience[at], tour.home_channel[at], tour.rank_at[rank, at], owner[own])
    return Legs(
        tuple(Visit(move.step, move.shard, move.pieces) for move in moves(here, place, place, place, place)),
        *(tuple(sorted(part)) for part in (onward_out, onward_in, home_out, home_in)),
    )


def _grouped(pieces: np.ndarray, *keys: np.ndarray) -> list[Transfer]:
    """The pieces that share a message, in one transfer each: ``keys`` are step, due, channel, peer and shard."""
    order = np.lexsort((pieces, *keys[::-1]))
    table = np.stack([*keys, pieces])[:, order]
    if not len(order):
        return []
    edges = np.flatnonzero((table[:-1, 1:] != table[:-1, :-1]).any(axis=0)) + 1
    starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(order)]
    rows, ordered = table[:-1, starts].T.tolist(), table[-1].tolist()
    return [Transfer._make((*row, tuple(ordered[a:b]))) for row, a, b in zip(rows, starts, stops, strict=True)]
