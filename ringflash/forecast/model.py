"""One pass of a set of plans on a machine: seconds, bytes, and everything that happens.

A ``Model`` turns the numbers of a machine (``hardware.py``) and of an attention call (``workload.py``) into what a cell and a
token cost, and lets ``timeline.py`` play the schedule with them. ``cost.py`` asks it the questions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ringflash.forecast.hardware import Hardware, Link, Rate, bare
from ringflash.forecast.timeline import Channel, Pace, Schedule, Span, play, schedule
from ringflash.forecast.traffic import crossing
from ringflash.forecast.workload import Workload
from ringflash.plan import Plan, cheaper_backward
from ringflash.units import spell_bytes, spell_count, spell_seconds

KINDS = ("within", "between")
"""Kinds of links: inside a node, and from node to node."""


class StepCost(NamedTuple):
    """The longest visit of one step, and the longest that one rank sends for it; seconds, and bytes of all ranks."""

    compute: float
    transfer: float
    bytes: int

    @property
    def seconds(self) -> float:
        return max(self.compute, self.transfer)


@dataclass(frozen=True)
class Pass:
    """The forward, or the backward, of one attention call.

    ``seconds`` until the last rank is done = ``compute`` (of the mean rank) + ``imbalance`` + ``exposed``. ``busy`` are the
    seconds that each rank of the ring computes, ``flops`` dense operations of all ranks. ``bytes`` are those of the ring's
    messages by kind of link, ``busiest`` those that one rank sends at most, and ``messages`` their number. Swaps of heads
    (Ulysses) are counted apart, the same three. ``rate`` says where the kernel's rate is from.
    Ranks of spans are those of the ring; where several share each shard (Ulysses), a span stands for all of these.
    """

    name: str
    travels: str
    seconds: float
    flops: int
    ranks: int
    busy: tuple[float, ...]
    exposed: float
    bytes: dict[str, int]
    busiest: int
    messages: int
    rate: str
    steps: tuple[StepCost, ...] = field(repr=False)
    spans: tuple[Span, ...] = field(repr=False)
    swapped: dict[str, int] = field(default_factory=dict)
    swap_busiest: int = 0
    swap_messages: int = 0

    @property
    def compute(self) -> float:
        return sum(self.busy) / max(1, len(self.busy))

    @property
    def imbalance(self) -> float:
        return max(0.0, self.seconds - self.exposed - self.compute)

    @property
    def busy_share(self) -> float:
        """The share of its time that the mean rank computes."""
        return self.compute / self.seconds if self.seconds else 1.0

    @property
    def flops_per_second(self) -> float:
        """Dense operations per second of one rank, over the whole pass."""
        return self.flops / (self.seconds * self.ranks) if self.seconds else 0.0

    def __str__(self) -> str:
        terms = f"compute {self.busy_share:.0%}, imbalance {self._share(self.imbalance)}, exposed {self._share(self.exposed)}"
        lines = [
            f"{self.name:<9}{spell_seconds(self.seconds)}  ({terms}), {spell_rate(self.flops_per_second)} per rank",
            f"{'':<9}{self.travels} travel{_spell_sent(self.messages, self.bytes, self.busiest)}",
        ]
        if self.swap_messages:
            sent = _spell_sent(self.swap_messages, self.swapped, self.swap_busiest)
            lines.append(f"{'':<9}heads are swapped{sent}")
        return "\n".join(lines)

    def _share(self, seconds: float) -> str:
        return f"{seconds / self.seconds:.0%}" if self.seconds else "0%"


def spell_rate(flops_per_second: float) -> str:
    """Three digits.

    >>> spell_rate(6.48e14), spell_rate(0)
    ('648 TFLOP/s', '0 FLOP/s')
    """
    number, _, prefix = spell_count(flops_per_second).partition(" ")
    return f"{number} {prefix}FLOP/s"


def _spell_sent(messages: int, sent: dict[str, int], busiest: int) -> str:
    if not messages:
        return ": nothing sent"
    kinds = ", ".join(f"{spell_bytes(n)} {kind} nodes" for kind, n in sent.items() if n)
    return f" in {messages} messages: {kinds}; busiest rank {spell_bytes(busiest)}"


@dataclass(frozen=True)
class Model:
    """Where plans are played: a machine, what a call computes, and how many ranks (of rings and heads) a node has."""

    machine: Hardware
    workload: Workload
    per_node: int

    @property
    def ring_per_node(self) -> int:
        """Ranks of the ring in one node; 1 where nodes hold no whole number of them."""
        inside, left_over = divmod(self.per_node, self.workload.degree)
        return 1 if left_over else inside

    def plans_of(self, plans: Sequence[Plan]) -> dict[str, Sequence[Plan]]:
        """The plans of each pass: the backward moves what takes fewer bytes, as the library does."""
        keys, queries = self.workload.keys, self.workload.queries
        return {"forward": plans, "backward": [cheaper_backward(plan, keys, queries) for plan in plans]}

    def pace(self, name: str, plans: Sequence[Plan]) -> Pace:
        """What visits and messages of a pass cost."""
        machine, work, first = self.machine, self.workload, plans[0]
        per_token = work.keys if first.travels == "keys" else work.queries
        home = per_token.home if name == "backward" else 0
        swaps = [
            self.links[self.swap_kind(len(plans))].seconds(sent) if sent else 0.0
            for sent in self.exchanged(name, plans)
        ]
        return Pace(
            per_cell=work.flops[name] * work.pairs_per_cell / self.rate(name).flops_per_second,
            bytes_per_token={"onward": per_token.onward * work.batch, "home": home * work.batch},
            links=tuple(Channel(x.latency, 1 / (x.bytes_per_second * x.attained)) for x in self.links),
            link_of=partial(_link_of, self.per_node, work.degree),
            host=machine.step_overhead,
            runs_ahead=machine.runs_ahead,
            before=swaps[0],
            after=swaps[1],
        )

    @property
    def links(self) -> tuple[Link, ...]:
        """In the order of ``KINDS``."""
        return self.machine.within, self.machine.between

    def swap_kind(self, ranks: int) -> int:
        """The kind of link over which a ring of so many ranks swaps heads: within nodes, if each group is on one."""
        ends = ((at * self.workload.degree, (at + 1) * self.workload.degree - 1) for at in range(ranks))
        return int(any(first // self.per_node != last // self.per_node for first, last in ends))

    def rate(self, name: str) -> Rate:
        """That of a pass; keys and values of different dims run at the rate of the dim between them."""
        work = self.workload
        mean = (work.head_dim + work.value_dim) / 2
        rate = self.machine.rate(name, mean, work.dtype)
        if work.head_dim == work.value_dim:
            return rate
        return replace(rate, source=f"assumed: as at head dim {mean:g} ({bare(rate.source)})")

    def exchanged(self, name: str, plans: Sequence[Plan]) -> tuple[int, int]:
        """Bytes that the fullest rank sends to those with which it shares heads, before and after the ring."""
        swaps = self.swaps(name, plans)
        before, after = (max(int(swap[end].sum(axis=1).max()) for swap in swaps) for end in (0, 1))
        return before, after

    def swaps(self, name: str, plans: Sequence[Plan]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each rank of the ring: bytes that those who share its shard send each other (``Workload.exchanged``)."""
        first, work = plans[0], self.workload
        held = [(first.queries.tokens(rank), first.keys.tokens(rank)) for rank in range(len(plans))]
        found = {pair: work.exchanged(name, *map(work.share, pair)) for pair in set(held)}
        return [found[pair] for pair in held]

    def seconds(self, plans: Sequence[Plan]) -> float:
        """Of forward and backward together."""
        return sum(play(schedule(of), self.pace(name, of)) for name, of in self.plans_of(plans).items())

    def run(self, name: str, plans: Sequence[Plan], table: Schedule) -> Pass:
        """One pass, with all that can be said of it."""
        pace, degree = self.pace(name, plans), self.workload.degree
        spans: list[Span] = []
        seconds = play(table, pace, spans)
        spans += self._swaps(name, plans, pace, seconds)
        cells = table.cells()
        sent = Counter[int]()
        kinds = dict.fromkeys(KINDS, 0)
        for span in spans:
            if span.peer is None:
                continue
            sent[span.rank] += span.bytes
            leaving = crossing(span.rank, span.peer, self.per_node, degree)
            kinds["within"] += span.bytes * (degree - leaving)
            kinds["between"] += span.bytes * leaving
        return Pass(
            name=name,
            travels=table.travels,
            seconds=seconds,
            flops=round(sum(cells) * self.workload.flops[name] * self.workload.pairs_per_cell) * degree,
            ranks=len(plans) * degree,
            busy=tuple(count * pace.per_cell for count in cells),
            exposed=max(0.0, seconds - play(table, ideal(pace))),
            bytes=kinds,
            busiest=max(sent.values(), default=0),
            messages=sum(span.lane in ("onward", "home") for span in spans) * degree,
            rate=self.rate(name).source,
            steps=_step_costs(spans),
            spans=tuple(spans),
            **self._count_swaps(name, plans),
        )

    def _count_swaps(self, name: str, plans: Sequence[Plan]) -> dict[str, Any]:
        """Both swaps of all ranks: bytes by kind of link, those of the busiest rank, and messages; empty ones are not sent."""
        degree, kinds, busiest, messages = self.workload.degree, dict.fromkeys(KINDS, 0), 0, 0
        if degree == 1:
            return {}
        for rank, (before, after) in enumerate(self.swaps(name, plans)):
            nodes = np.arange(rank * degree, (rank + 1) * degree) // self.per_node
            both, leaving = before + after, nodes[:, None] != nodes
            kinds["within"] += int(both[~leaving].sum())
            kinds["between"] += int(both[leaving].sum())
            busiest = max(busiest, int(both.sum(axis=1).max()))
            messages += int((before > 0).sum() + (after > 0).sum())
        return dict(swapped=kinds, swap_busiest=busiest, swap_messages=messages)

    def _swaps(self, name: str, plans: Sequence[Plan], pace: Pace, seconds: float) -> Iterator[Span]:
        """The swaps of heads for tokens around the ring, on every rank."""
        sent, last = self.exchanged(name, plans), max(len(plan.steps) for plan in plans)
        for rank in range(len(plans)) if any(sent) else ():
            yield Span(rank, "exchange", 0, 0.0, pace.before, "heads for tokens", sent[0])
            yield Span(rank, "exchange", last, seconds - pace.after, seconds, "tokens for heads", sent[1])


def _link_of(per_node: int, degree: int, source: int, target: int) -> int:
    """The number, in ``KINDS``, of the link between two ranks of the ring.

    Ranks that share a shard wait for each other in the swap, so the hop is between nodes if it is for any of them.
    """
    return int(crossing(source, target, per_node, degree) > 0)


def ideal(pace: Pace) -> Pace:
    """The same pace where only computing takes time."""
    return replace(without_latency(without_links(pace, 0, 1)), before=0.0, after=0.0)


def without_links(pace: Pace, *kinds: int) -> Pace:
    """The same pace with some kinds of links that cost nothing."""
    links = [Channel(0.0, 0.0) if kind in kinds else channel for kind, channel in enumerate(pace.links)]
    return replace(pace, links=tuple(links))


def without_latency(pace: Pace) -> Pace:
    """The same pace with neither latencies nor a host."""
    return replace(pace, host=0.0, links=tuple(Channel(0.0, channel.per_byte) for channel in pace.links))


def _step_costs(spans: Sequence[Span]) -> tuple[StepCost, ...]:
    """The longest visit of each step, and the longest time that one rank sends in it."""
    steps = 1 + max((span.step for span in spans), default=-1)
    compute, volume = [0.0] * steps, [0] * steps
    sending: list[defaultdict[int, float]] = [defaultdict(float) for _ in range(steps)]
    for span in spans:
        if span.lane == "compute":
            compute[span.step] = max(compute[span.step], span.end - span.start)
        else:
            sending[span.step][span.rank] += span.end - span.start
            volume[span.step] += span.bytes
    return tuple(StepCost(c, max(s.values(), default=0.0), b) for c, s, b in zip(compute, sending, volume, strict=True))
