"""What the steps of all ranks would take: the loop of ``circulate.py``, played with seconds instead of tensors.

A rank waits for what a step uses, posts what goes onward, computes, and posts what goes home:

    rank 0   compute   [ shard 0 ][ shard 1 ]~~~[ shard 2 ]     ~~~ waits: shard 2 has not come yet
             onward    [ 0 -> 1 ]--[ 2 -> 1 ]                   messages of one rank, link and direction follow each other

A message takes the latency of its link and its bytes over the bandwidth. It starts when both ends have posted it, when the
earlier batches of its channel are done at both, and when both links are free; those of one batch go in the order of ranks.
A visit takes its cells over the rate of the kernel. Where every rank has the same work and one message per step, this is

    T = sum over steps of max(compute, latency + bytes / bandwidth), the last step without a message.

It is a model: links are never shared with others, kernels never slowed down by messages, and a cell costs the same
wherever it lies (the masked half of a tile on the edge of a mask costs nothing).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from ringflash.layout import Layout
from ringflash.mask import Mask
from ringflash.plan import Batch, Plan

Lane = Literal["compute", "onward", "home", "exchange"]


@dataclass(frozen=True)
class Span:
    """From ``start`` to ``end`` (seconds) ``rank`` computes, or sends ``bytes`` to ``peer``.

    ``exchange`` is the swap of heads for tokens around a ring (Ulysses). Messages of one lane can overlap where a rank has
    several links.
    """

    rank: int
    lane: Lane
    step: int
    start: float
    end: float
    label: str
    bytes: int = 0
    peer: int | None = None


class Hop(NamedTuple):
    """A message that ``source`` and ``target`` post in the same step, and await in step ``due``."""

    source: int
    target: int
    shard: int
    tokens: int
    due: int


class Visit(NamedTuple):
    """``rank`` computes ``cells`` (query, key) pairs against ``shard``; afterwards it hands totals on if it ``sends``."""

    rank: int
    shard: int
    cells: int
    sends: bool


class Move(NamedTuple):
    """One step of all ranks: batches of messages by channel, in the order in which everybody posts them, around visits."""

    onward: tuple[tuple[int, tuple[Hop, ...]], ...]
    visits: tuple[Visit, ...]
    home: tuple[tuple[int, tuple[Hop, ...]], ...]
    active: tuple[int, ...]
    """The ranks that have anything to do in this step."""


@dataclass(frozen=True)
class Schedule:
    """The plans of all ranks, turned inside out: what happens in each step."""

    ranks: int
    travels: str
    moves: tuple[Move, ...]

    def hops(self, lane: Lane) -> list[Hop]:
        """All messages of one lane."""
        return [hop for move in self.moves for _, hops in getattr(move, lane) for hop in hops]

    def cells(self) -> list[int]:
        """How many cells each rank computes."""
        total = [0] * self.ranks
        for move in self.moves:
            for visit in move.visits:
                total[visit.rank] += visit.cells
        return total


class Channel(NamedTuple):
    """What a message costs on one kind of link: latency in seconds, and seconds per byte."""

    latency: float
    per_byte: float


@dataclass(frozen=True)
class Pace:
    """What a schedule costs: seconds per cell, bytes per token of each lane, links, and the host's share.

    ``link_of(source, target)`` numbers the kind of link in ``links``. ``before`` and ``after`` are seconds that every rank
    spends outside the ring. ``host`` are seconds per step, ahead of the device if it ``runs_ahead``.
    """

    per_cell: float
    bytes_per_token: dict[str, int]
    links: tuple[Channel, ...]
    link_of: Callable[[int, int], int]
    host: float = 0.0
    runs_ahead: bool = True
    before: float = 0.0
    after: float = 0.0


def schedule(plans: Sequence[Plan]) -> Schedule:
    """The schedule of a complete set of plans, one for each rank in order."""
    first = plans[0]
    cells = cells_between(first.queries, first.keys, first.mask, first.q_offset)
    cells = cells if first.travels == "keys" else cells.T
    moves = []
    for number in range(max(len(plan.steps) for plan in plans)):
        steps = [(plan.rank, plan.steps[number]) for plan in plans if number < len(plan.steps)]
        visits = tuple(
            Visit(rank, meeting.shard, int(cells[rank, meeting.shard]), any(batch.out for batch in step.home))
            for rank, step in steps
            for meeting in step.visits
        )
        onward = _batches((rank, step.onward) for rank, step in steps)
        home = _batches((rank, step.home) for rank, step in steps)
        active = tuple(rank for rank, step in steps if step.onward or step.visits or step.home)
        moves.append(Move(onward, visits, home, active))
    return Schedule(len(plans), first.travels, tuple(moves))


def _batches(posted: Iterable[tuple[int, Sequence[Batch]]]) -> tuple[tuple[int, tuple[Hop, ...]], ...]:
    """The messages of one step and phase, by (due, channel): the order in which every rank posts its batches."""
    groups: dict[tuple[int, int], list[Hop]] = defaultdict(list)
    for rank, batches in posted:
        for batch in batches:
            for peer, part in batch.out:
                groups[batch.due, batch.channel].append(Hop(rank, peer, part.shard, part.tokens, batch.due))
    return tuple((channel, tuple(hops)) for (_, channel), hops in sorted(groups.items()))


def play(schedule: Schedule, pace: Pace, spans: list[Span] | None = None) -> float:
    """Seconds until the last rank is done. What happens when is added to ``spans``, if there is such a list."""
    clocks = _Clocks(schedule, pace, spans)
    for number, move in enumerate(schedule.moves):
        clocks.begin(number, move)
        for channel, hops in move.onward:
            clocks.send("onward", number, channel, hops)
        for visit in move.visits:
            clocks.compute(number, visit)
        for channel, hops in move.home if pace.bytes_per_token["home"] else ():
            clocks.send("home", number, channel, hops)
    return max(max(clocks.now, default=0.0), clocks.last) + pace.after


class _Clocks:
    """How far each rank has come, and when its links and channels will be free."""

    def __init__(self, schedule: Schedule, pace: Pace, spans: list[Span] | None) -> None:
        ranks = schedule.ranks
        self.pace, self.spans, self.last = pace, spans, pace.before
        self.now = [pace.before] * ranks
        self.host = [pace.before] * ranks
        self.due: list[dict[int, float]] = [{} for _ in range(ranks)]  # [rank][step]: when what it awaits is done
        self.totals: list[dict[int, float]] = [{} for _ in range(ranks)]  # [rank][shard]: when its totals are here
        self.free_out = [[0.0] * ranks for _ in pace.links]
        self.free_in = [[0.0] * ranks for _ in pace.links]
        self.channels: defaultdict[int, list[float]] = defaultdict(lambda: [0.0] * ranks)

    def begin(self, number: int, move: Move) -> None:
        """Every rank waits for the batches that are due in this step; the host issues the step."""
        now, host, pace = self.now, self.host, self.pace
        for rank, due in enumerate(self.due):
            now[rank] = max(now[rank], due.pop(number, 0.0))
        for rank in move.active:
            host[rank] += pace.host
            now[rank] = max(now[rank], host[rank]) if pace.runs_ahead else now[rank] + pace.host

    def compute(self, number: int, visit: Visit) -> None:
        rank, start = visit.rank, self.now[visit.rank]
        end = self.now[rank] = start + visit.cells * self.pace.per_cell
        if self.spans is not None:
            self.spans.append(Span(rank, "compute", number, start, end, f"shard {visit.shard}"))
        if visit.sends and visit.shard != rank:  # the total that this share is added to has to be here
            self.now[rank] = max(end, self.totals[rank].pop(visit.shard, 0.0))

    def send(self, lane: Lane, number: int, channel: int, hops: Sequence[Hop]) -> None:
        """One batch of all ranks: its messages start when both ends are there and their links are free."""
        free, now, pace = self.channels[channel], self.now, self.pace
        width = pace.bytes_per_token[lane]
        done: dict[int, float] = {}
        for source, target, shard, tokens, _ in hops:
            kind = pace.link_of(source, target)
            out, back, link = self.free_out[kind], self.free_in[kind], pace.links[kind]
            start = max(now[source], now[target], free[source], free[target], out[source], back[target])
            end = out[source] = back[target] = start + link.latency + tokens * width * link.per_byte
            done[source] = max(done.get(source, 0.0), end)
            done[target] = max(done.get(target, 0.0), end)
            if self.spans is not None:
                label = f"shard {shard} to rank {target}"
                self.spans.append(Span(source, lane, number, start, end, label, tokens * width, target))
        for rank, end in done.items():
            free[rank] = end
        self.last = max(self.last, *done.values())
        self._remember(lane, hops, done)

    def _remember(self, lane: Lane, hops: Sequence[Hop], done: dict[int, float]) -> None:
        """When a batch is done decides over whoever awaits it: all of it, as one batch is awaited as a whole."""
        for source, target, shard, _, due in hops:
            for rank in (source, target):
                self.due[rank][due] = max(self.due[rank].get(due, 0.0), done[rank])
            if lane == "home":  # a next visitor awaits it himself, once he has computed
                self.totals[target][shard] = max(self.totals[target].get(shard, 0.0), done[target])


@lru_cache(maxsize=16)
def cells_between(queries: Layout, keys: Layout, mask: Mask, q_offset: int = 0) -> np.ndarray:
    """``[r, s]``: how many keys of rank s the queries of rank r see together, over the batch rows of the mask. int64.

    For sorted range ends ``x`` and a run of keys ``[a, b)`` the sum of ``clip(x - a, 0, b - a)`` needs only the place of a and
    of b among them, and running sums.

    >>> from ringflash.layout import zigzag
    >>> from ringflash.mask import causal
    >>> cells_between(zigzag(8, 2), zigzag(8, 2), causal)
    array([[10,  8],
           [ 8, 10]])
    """
    table = np.zeros((queries.ranks, keys.ranks), dtype=np.int64)
    runs = [(rank, run) for rank, held in enumerate(keys.runs) for run in held]
    owner = np.array([rank for rank, _ in runs], dtype=np.int64)
    first = np.array([run.start for _, run in runs], dtype=np.int64)
    past = np.array([run.stop for _, run in runs], dtype=np.int64)
    strided = [(rank, run) for rank, run in runs if run.step != 1]
    for rank in range(queries.ranks):
        positions = queries.positions(rank) + q_offset
        for row in range(mask.rows):
            for ends, sign in zip(mask.bounds(positions, row), (-1, 1), strict=True):
                edges = ends.clip(0, keys.length)
                if not strided:
                    np.add.at(table[rank], owner, sign * _sum_below(edges, first, past))
                    continue
                for shard, run in runs:
                    count = -((run.start - edges) // run.step)
                    table[rank, shard] += sign * int(count.clip(0, len(run)).sum())
    table.setflags(write=False)
    return table


def _sum_below(edges: np.ndarray, first: np.ndarray, past: np.ndarray) -> np.ndarray:
    """For each run ``[first, past)``: the sum over the sorted ``edges`` of how much of it lies below each."""
    sums = np.concatenate([[0], np.cumsum(edges)])
    begun, over = np.searchsorted(edges, first, side="right"), np.searchsorted(edges, past, side="left")
    return sums[over] - sums[begun] - (over - begun) * first + (len(edges) - over) * (past - first)
