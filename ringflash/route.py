"""Who meets whom, when, and how results come home.

A route turns one fact, which rank needs which shard, into the moves of every rank. Keys and values go *onward*; what
visits add up to (their gradients) comes *home*. A move of the ring, for shard 0 on four ranks that all need it:

    step      0         1         2         3
    onward    0 -> 1    1 -> 2    2 -> 3              keys travel to the next rank while this one computes
    visits    at 0      at 1      at 2      at 3
    home                1 -> 2    2 -> 3    3 -> 0    the total follows the visitors, then goes straight to its owner

Both ends of a message know it by the same (step, phase), and every rank goes through steps and phases in one order, so
that messages cannot wait for each other in a circle. Nobody sends what it does not hold, every contribution reaches
its owner exactly once, and a hop that nobody further along needs does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, order=True)
class Visit:
    """At ``step`` this rank's queries meet the keys of ``shard``."""

    step: int
    shard: int


@dataclass(frozen=True, order=True)
class Transfer:
    """One end of a message: at ``step`` something of ``shard`` leaves for, or comes from, rank ``peer``."""

    step: int
    peer: int
    shard: int


@dataclass(frozen=True)
class Legs:
    """All that one rank does, each tuple in the order of its steps.

    ``onward_in`` and ``home_in`` say when the message is posted, which is the step of its sender. Keys that come onward are
    used from the next step on; a total that comes home is used when this rank has visited the shard itself.
    """

    visits: tuple[Visit, ...]
    onward_out: tuple[Transfer, ...] = ()
    onward_in: tuple[Transfer, ...] = ()
    home_out: tuple[Transfer, ...] = ()
    home_in: tuple[Transfer, ...] = ()

    @property
    def uses(self) -> tuple[Visit | Transfer, ...]:
        """Whatever needs a shard to be here: visits, and sending it on."""
        return self.visits + self.onward_out


class Route(Protocol):
    """Anything with ``legs(rank, needs)``; a route is a value that compares and hashes."""

    def legs(self, rank: int, needs: np.ndarray) -> Legs:
        """What ``rank`` does, if ``needs[r, s]`` says that rank r computes with shard s (bool, ``[ranks, ranks]``)."""
        ...


@dataclass(frozen=True)
class Ring:
    """Shards go round a ring, one rank per step (Liu et al. 2023, arXiv 2310.01889).

    A shard stops at the last rank that needs it. Its total starts at the first foreign visitor, skips ranks that have
    nothing to add, and goes from the last visitor straight to the owner: P - 1 hops on a full ring, one for a window.
    """

    def legs(self, rank: int, needs: np.ndarray) -> Legs:
        ranks = len(needs)
        distance = np.arange(ranks)
        # visited[s, d]: shard s is needed by the rank d places further along the ring
        visited = needs[(distance[:, None] + distance) % ranks, distance[:, None]]
        visited_abroad = visited & (distance > 0)
        reach = np.where(visited_abroad, distance, 0).max(axis=1)

        def at(shard: int, places: int) -> int:
            return int(shard + places) % ranks

        visits, onward_out, onward_in, home_out, home_in = [], [], [], [], []
        for step in range(ranks):
            shard, coming = at(rank, -step), at(rank, -step - 1)
            if visited[shard, step]:
                visits.append(Visit(step, shard))
            if step < reach[shard]:
                onward_out.append(Transfer(step, at(rank, 1), shard))
            if step < reach[coming]:
                onward_in.append(Transfer(step, at(rank, -1), coming))
            if visited_abroad[shard, step]:  # hand the total on: to the next visitor, or home
                later = np.flatnonzero(visited_abroad[shard, step + 1 :])
                home_out.append(Transfer(step, at(shard, step + 1 + later[0]) if len(later) else shard, shard))
                earlier = np.flatnonzero(visited_abroad[shard, :step])
                if len(earlier):
                    home_in.append(Transfer(int(earlier[-1]), at(shard, earlier[-1]), shard))
        if reach[rank]:
            home_in.append(Transfer(int(reach[rank]), at(rank, reach[rank]), rank))
        return Legs(tuple(visits), tuple(onward_out), tuple(onward_in), tuple(home_out), tuple(sorted(home_in)))


ring = Ring()
ROUTES: dict[str, Route] = {"ring": ring}
