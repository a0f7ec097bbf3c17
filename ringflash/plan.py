"""What one rank does, step by step: derived from layout x mask x route, never written by hand.

Layouts, masks and routes do not know each other. A plan puts three questions to them: which keys can a query see
(``mask.bounds``), where do those stand in a shard (``layout.below``), and where is that shard when (``route.tour``).
Zigzag's three-way branch, the off-by-one of stripes, hops that a window makes needless and the edges of documents are
no code: they fall out as facts, and ``verify`` checks them for any set of plans.

With sorted positions the keys that a query may see are one run of *local key indices*, ``[begin, end)``. These two
numbers per query row are all that a kernel ever learns of masks and layouts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from ringflash.layout import Layout
from ringflash.mask import Mask
from ringflash.needs import Needs, Part, find_needs, whole
from ringflash.route import DoubleRing, Legs, Ring, Route, Transfer, carried, legs, tour_of, visited

_Item = TypeVar("_Item")
Side = Literal["keys", "queries"]


class Message(NamedTuple):
    """One end of a message: ``part`` leaves for, or comes from, rank ``peer``."""

    peer: int
    part: Part


class Batch(NamedTuple):
    """Messages that are posted together, on one channel, and awaited in step ``due``, if not before."""

    due: int
    channel: int
    out: tuple[Message, ...]
    back: tuple[Message, ...]


class Meeting(NamedTuple):
    """In ``step`` this rank computes with ``part`` of ``shard``, which is here; its own shard is here as a whole."""

    step: int
    shard: int
    part: Part


class Step(NamedTuple):
    """What one rank does in one step: post what goes onward, compute, post what goes home."""

    onward: tuple[Batch, ...]
    visits: tuple[Meeting, ...]
    home: tuple[Batch, ...]
    done_with: tuple[int, ...]
    """Shards that this rank has used for the last time when the step is over."""


@dataclass(frozen=True)
class Plan:
    """The work of ``rank``: its queries are ``queries.positions(rank) + q_offset``, its keys ``keys.positions(rank)``.

    ``travels`` says which side goes round, in shards: keys (and values), or queries. Made by :func:`derive` (from a sharding:
    ``rf.plan(s)``). Printing a plan shows its steps.
    """

    rank: int
    queries: Layout
    keys: Layout
    mask: Mask
    route: Route
    q_offset: int = 0
    travels: Side = "keys"

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.rank, *self.problem))

    @property
    def problem(self) -> tuple[Any, ...]:
        """What the plans of all ranks have in common."""
        return self.queries, self.keys, self.mask, self.route, self.q_offset, self.travels

    @property
    def ranks(self) -> int:
        return self.queries.ranks

    @property
    def moving(self) -> Layout:
        """The layout of what travels."""
        return self.keys if self.travels == "keys" else self.queries

    @property
    def turned(self) -> Plan:
        """The plan of the same rank if the other side travelled."""
        *rest, travels = self.problem
        return derive(self.rank, *rest, "queries" if travels == "keys" else "keys")

    @cached_property
    def needs(self) -> Needs:
        """Which pieces of the side that travels each rank computes with."""
        return needs(self.queries, self.keys, self.mask, self.q_offset, self.travels)

    @property
    def channels(self) -> int:
        """How many channels the messages of all ranks use."""
        return tour_of(self.route, self.ranks).channels

    @cached_property
    def legs(self) -> Legs:
        return legs(self.route, self.rank, self.needs)

    @cached_property
    def meetings(self) -> tuple[Meeting, ...]:
        """All visits of this rank in the order of their steps, each with the part of the shard that is here."""
        here = {move.shard: move.pieces for move in self.legs.onward_in}
        own = whole(self.rank, self.moving.tokens(self.rank))
        return tuple(
            Meeting(visit.step, visit.shard, own if visit.shard == self.rank else self.needs.part(here[visit.shard]))
            for visit in self.legs.visits
        )

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The legs of this rank in the order of their steps: what the loop carries out."""
        moves = self.legs
        uses = sorted((use.step, use.shard) for use in moves.uses)
        last_use = {shard: step for step, shard in uses}
        phases: dict[str, dict[int, list[Any]]] = {
            "onward": _by_step(self._batches(moves.onward_out, moves.onward_in)),
            "visits": _by_step((meeting.step, meeting) for meeting in self.meetings),
            "home": _by_step(self._batches(moves.home_out, moves.home_in)),
            "done_with": _by_step((step, shard) for shard, step in last_use.items()),
        }
        count = 1 + max((step for phase in phases.values() for step in phase), default=-1)
        return tuple(Step(*(tuple(phase.get(step, ())) for phase in phases.values())) for step in range(count))

    def _batches(self, out: Iterable[Transfer], back: Iterable[Transfer]) -> Iterator[tuple[int, Batch]]:
        """Each step's messages, those of one hop and channel in one batch, in the order that all ranks have."""
        ends: dict[tuple[int, int, int], tuple[list[Message], list[Message]]] = defaultdict(lambda: ([], []))
        for end, moves in enumerate((out, back)):
            for move in moves:
                message = Message(move.peer, self.needs.part(move.pieces))
                ends[move.step, move.due, move.channel][end].append(message)
        for (step, due, channel), (sent, received) in sorted(ends.items()):
            yield step, Batch(due, channel, tuple(sent), tuple(received))

    @property
    def q_positions(self) -> np.ndarray:
        """Global positions of this rank's queries, int64 ``[s_q]``, ascending."""
        return self._shifted(self.queries.positions(self.rank))

    def meeting(self, shard: int) -> Meeting:
        """The visit to ``shard``; if this rank has none, one that would find all of it."""
        return self._meeting_of.get(shard) or Meeting(0, shard, whole(shard, self.moving.tokens(shard)))

    def sides(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Global positions of the queries and of the keys of a visit, int64 ``[s_q]`` and ``[s_k]``."""
        part = self.meeting(shard).part
        if self.travels == "keys":
            return self.q_positions, _of_part(self.keys.positions(shard), part)
        return self._met_queries(part), self.keys.positions(self.rank)

    def key_tokens(self, shard: int) -> int:
        """Number of keys of a visit."""
        return self.meeting(shard).part.tokens if self.travels == "keys" else self.keys.tokens(self.rank)

    def intervals(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Local key indices ``[begin, end)`` that each query of a visit sees; two int32 ``[rows, s_q]``.

        ``rows`` is 1, or the batch size if batch rows hold different documents. ``begin <= end``, both non-decreasing. Keys
        are counted within the part of the shard that is here.
        """
        return next(self.tables((shard,)))

    def tables(self, shards: Iterable[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The ``intervals`` of several shards, one after the other; where queries stay, the mask is asked once for all."""
        mine = self._clipped(self.q_positions) if self.travels == "keys" else ()
        for shard in shards:
            part = self.meeting(shard).part
            if self.travels == "keys":
                complete = part.tokens == self.keys.tokens(shard)
                found = [[self.keys.below(shard, x) for x in side] for side in mine]
                begin, end = (np.stack(x if complete else [part.below(y) for y in x]) for x in found)
            else:
                bounds = self._clipped(self._met_queries(part))
                begin, end = (np.stack([self.keys.below(self.rank, x) for x in side]) for side in bounds)
            yield begin, end

    def cells(self, shard: int) -> int:
        """Number of (query, key) pairs that this rank computes against ``shard``, over the batch rows of the mask."""
        begin, end = self.intervals(shard)
        return int((end.astype(np.int64) - begin).sum())

    @cached_property
    def _meeting_of(self) -> dict[int, Meeting]:
        return {meeting.shard: meeting for meeting in self.meetings}

    def _met_queries(self, part: Part) -> np.ndarray:
        return self._shifted(_of_part(self.queries.positions(part.shard), part))

    def _shifted(self, positions: np.ndarray) -> np.ndarray:
        return positions + self.q_offset if self.q_offset else positions

    def _clipped(self, positions: np.ndarray) -> tuple[list[np.ndarray], ...]:
        """For lo and hi of the mask: one int32 array for each batch row, of key positions or the number of keys."""
        bounds = [self.mask.bounds(positions, row) for row in range(self.mask.rows)]
        return tuple([x.clip(0, self.keys.length).astype(np.int32) for x in side] for side in zip(*bounds, strict=True))

    def __str__(self) -> str:
        head = f"rank {self.rank} of {self.ranks}: {len(self.q_positions)} queries, {self.mask}, {self.route}"
        table = [("step", "computes with", "sends onward", "sends home")]
        for number, step in enumerate(self.steps):
            work = ", ".join(f"shard {visit.shard} ({self.cells(visit.shard)} cells)" for visit in step.visits) or "-"
            table.append((f"{number:>4}", work, self._spell(step.onward), self._spell(step.home)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([head, *lines])

    def _spell(self, batches: tuple[Batch, ...]) -> str:
        spelled = []
        for batch in batches:
            for peer, part in batch.out:
                missing = self.moving.tokens(part.shard) - part.tokens
                some = f" ({part.tokens} tokens)" if missing else ""
                spelled.append(f"{part.shard}{some} to rank {peer}")
        return ", ".join(spelled) or "-"


@lru_cache(maxsize=128)
def derive(
    rank: int, queries: Layout, keys: Layout, mask: Mask, route: Route, q_offset: int = 0, travels: Side = "keys"
) -> Plan:
    """The plan of one rank. Equal arguments give the same object, with what it has worked out so far."""
    return Plan(rank, queries, keys, mask, route, q_offset, travels)


@lru_cache(maxsize=32)
def needs(queries: Layout, keys: Layout, mask: Mask, q_offset: int = 0, travels: Side = "keys") -> Needs:
    """The pieces of the side that travels, and which ranks compute with each."""
    if travels == "keys":
        return find_needs(keys, queries, lambda at, row: mask.bounds(at + q_offset, row), mask.rows)

    def seers(at: np.ndarray, row: int) -> tuple[np.ndarray, np.ndarray]:
        lo, hi = mask.seers(at, row)
        return lo - q_offset, hi - q_offset

    return find_needs(queries, keys, seers, mask.rows)


class Cost(NamedTuple):
    """Bytes per token of what travels onward, and of what comes home."""

    onward: int
    home: int


def tokens_moved(needs: Needs, route: Route) -> tuple[int, int]:
    """Tokens that all ranks together send onward and home, each hop counted."""
    tour = tour_of(route, needs.ranks)
    seen = visited(tour, needs)
    onward, home = (int((needs.tokens[:, None] * table[:, 1:]).sum()) for table in (carried(tour, seen), seen))
    return onward, home


@lru_cache(maxsize=64)
def _bytes_moved(problem: tuple[Any, ...], cost: Cost) -> int:
    *layouts_and_mask, route, q_offset, travels = problem
    onward, home = tokens_moved(needs(*layouts_and_mask, q_offset, travels), route)
    return onward * cost.onward + home * cost.home


@lru_cache(maxsize=256)
def cheaper_backward(plan: Plan, keys: Cost, queries: Cost) -> Plan:
    """The plan of this rank in which the side travels that takes fewer bytes, over all ranks; ``plan`` if none is better.

    All hops are counted, so masks and layouts have their say, and the answer is the same on every rank. Queries may go
    round the other way: under a causal mask keys are needed by those behind them, and queries by those ahead.
    """
    if plan.ranks == 1:
        return plan
    costs = {"keys": Cost(*keys), "queries": Cost(*queries)}
    turned = plan.turned
    around = plan.route.reversed if isinstance(plan.route, Ring | DoubleRing) else plan.route
    other = derive(plan.rank, plan.queries, plan.keys, plan.mask, around, plan.q_offset, turned.travels)
    return min((plan, turned, other), key=lambda way: _bytes_moved(way.problem, costs[way.travels]))


def _of_part(positions: np.ndarray, part: Part) -> np.ndarray:
    """The positions of a part, from those of its shard."""
    if part.tokens == len(positions):
        return positions
    return np.concatenate([np.zeros(0, np.int64), *(positions[a:b] for a, b in part.spans)])


def _by_step(items: Iterable[tuple[int, _Item]]) -> dict[int, list[_Item]]:
    steps: dict[int, list[_Item]] = defaultdict(list)
    for step, item in items:
        steps[step].append(item)
    return steps
