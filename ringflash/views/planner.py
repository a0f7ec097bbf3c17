"""Which layout, which route, how many ranks to a shard: every way to run one attention call, estimated.

A question is what somebody knows before a run: length, ranks, mask, shapes of the heads, machine. The answer compares what
the library would do with other layouts, routes and divisions of the heads:

      layout         area max/mean   steps max/mean   forward   backward   together   most sent
    * zigzag                  1.00             1.00   42.3 ms     101 ms     143 ms    1.20 GiB    * what was asked for,
      contiguous              1.98             1.99   80.1 ms     190 ms     270 ms    1.20 GiB      or "auto" chose

All times are modelled (``cost.py``); nothing is sent, and no device is touched. ``report.py`` writes it down.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from ringflash.auto import choose_route
from ringflash.forecast.advice import more_ranks
from ringflash.forecast.cost import WORTH, Estimate, estimate
from ringflash.forecast.hardware import Hardware, load_hardware
from ringflash.forecast.holding import in_flight
from ringflash.forecast.model import Model
from ringflash.forecast.timeline import Lane, Schedule, play, schedule
from ringflash.forecast.workload import Workload
from ringflash.layout import LAYOUTS
from ringflash.mask import Mask, causal
from ringflash.plan import Plan
from ringflash.route import ROUTES, Route, double_ring
from ringflash.shard import Sharding, plans
from ringflash.units import spell_tokens

LONGEST = 64 << 20
"""Tokens up to which plans are made: their cells are counted position by position."""

_LANES: tuple[Lane, ...] = ("onward", "home")

ROUTE_NAMES = ("auto", *ROUTES, "double_ring")
LAYOUT_NAMES = ("auto", *LAYOUTS, "balanced")


class Flight(NamedTuple):
    """What a rank holds of others at most: parts and totals, in the keys and the gradients of the tokens of one rank."""

    parts: float
    totals: float


@dataclass(frozen=True)
class Question:
    """One attention call over ``length`` tokens on ``ranks`` devices; names as in ``rf.Sharding`` and ``rf.estimate``.

    ``ulysses`` ranks share a shard (``heads_axis``); ``route`` may also be "double_ring", whose nodes have
    ``ranks_per_node`` ranks. Raises ``ValueError`` for what does not fit together.
    """

    length: int
    ranks: int
    mask: Mask = causal
    layout: str = "auto"
    route: str = "auto"
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    dtype: str = "bfloat16"
    hardware: str | Hardware = "h100"
    ranks_per_node: int | None = None
    ulysses: int = 1
    spelling: str = field(default="", compare=False)
    """The mask as it was asked for, in Python, where that is known; ``offsets`` stands for the cumulative lengths in
    ``offsets_from``."""
    offsets_from: str = field(default="", compare=False)

    machine: Hardware = field(init=False, compare=False, repr=False)
    model: Model = field(init=False, compare=False, repr=False)
    """What plays plans on that machine."""
    sharding: Sharding = field(init=False, compare=False, repr=False)
    """The sharding of rank 0."""

    def __post_init__(self) -> None:
        if self.length > LONGEST:
            raise ValueError(
                f"length is {spell_tokens(self.length)} tokens; plans count position by position, up to "
                f"{spell_tokens(LONGEST)} tokens"
            )
        object.__setattr__(self, "machine", load_hardware(self.hardware))
        if type(self.per_node) is not int or self.per_node < 1:
            raise ValueError(f"ranks_per_node is {self.per_node!r}; a whole number from 1 is needed")
        object.__setattr__(self, "model", Model(self.machine, self._workload, self.per_node))
        s = Sharding(self.length, (0, self.ranks), self.mask, self.layout, "ring", heads_axis=self.ulysses)
        object.__setattr__(self, "sharding", replace(s, layout=s.layout, route=self._settle_route(s)))

    @cached_property
    def plans(self) -> list[Plan]:
        """Those of all ranks of a ring."""
        return plans(self.sharding)

    @cached_property
    def estimate(self) -> Estimate:
        return estimate(
            self.plans,
            self.machine,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            batch=self.batch,
            dtype=self.dtype,
            heads_degree=self.ulysses,
            ranks_per_node=self.per_node,
        )

    @cached_property
    def in_flight(self) -> Flight:
        """In the backward, on the rank and in the step where both together are most; in the half precision of training."""
        work = replace(self._workload, dtype="bfloat16")
        whole, held = replace(work, degree=1).keys, max(1, -(-self.length // self.ranks))
        found = [Flight(0.0, 0.0)]
        for plan in self.model.plans_of(self.plans)["backward"]:
            onward, home = work.keys if plan.travels == "keys" else work.queries
            for now in in_flight(plan):
                found.append(
                    Flight(now.parts * onward / (whole.onward * held), now.totals * home / (whole.home * held))
                )
        return max(found, key=lambda flight: flight.parts * whole.onward + flight.totals * whole.home)

    @property
    def per_node(self) -> int:
        """Ranks of a node."""
        return self.machine.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node

    @property
    def nodes(self) -> int:
        """Nodes over which every ring is spread evenly, as a sharding counts them that a launcher starts; 1 if unevenly."""
        nodes = self.ranks // self.per_node if self.ranks % self.per_node == 0 else 1
        return nodes if self.ranks // self.ulysses % nodes == 0 else 1

    @property
    def layout_name(self) -> str:
        """The name of the layout, with "auto" decided."""
        return str(self.sharding.layout)

    @property
    def _workload(self) -> Workload:
        return Workload(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            batch=self.batch,
            dtype=self.dtype,
            degree=self.ulysses,
            rows=self.mask.rows,
        )

    def _settle_route(self, s: Sharding) -> Route | str:
        if self.route == "auto":
            return choose_route(s.plan.queries, s.plan.keys, self.mask, 0, self.nodes)
        if self.route != "double_ring":
            return self.route
        if self.nodes == 1:
            if self.ranks <= self.per_node:
                why = f"{self.ranks} ranks, {self.per_node} to a node, are in one node"
            elif self.ranks % self.per_node:
                why = f"{self.ranks} ranks do not fill nodes of {self.per_node} evenly"
            else:
                why = f"shards of {self.ulysses} ranks do not fill nodes of {self.per_node} ranks evenly"
            raise ValueError(f"route is 'double_ring', for rings that are spread evenly over several nodes; {why}")
        return double_ring(self.nodes, s.ring_ranks // self.nodes)


@dataclass(frozen=True)
class Candidate:
    """One way to run the same call; ``chosen`` is the way that was asked for. Seconds are modelled."""

    ranks: int
    layout: str
    route: str
    ulysses: int
    area: float
    """Visible cells of the fullest rank over the mean."""
    steps: float
    """Cells of the longest visit of each step, added up, over the cells of the mean rank: 1 if nobody ever waits."""
    forward: float
    backward: float
    sent: int
    """Bytes that the busiest rank sends in its ring in both passes."""
    swapped: int
    """Bytes that it swaps, besides, with those who share its shard (Ulysses)."""
    chosen: bool

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Answer:
    """What is compared for a question, and what is best."""

    question: Question

    @cached_property
    def layouts(self) -> list[Candidate]:
        """Other layouts, each on the route that was asked for (or the one that suits it)."""
        asked = self.question
        packed = ["balanced"] if asked.mask.documents and asked.mask.rows == 1 else []
        return self._weigh(replace(asked, layout=name) for name in (*LAYOUTS, *packed) if name != "striped")

    @cached_property
    def routes(self) -> list[Candidate]:
        """Other routes for the layout that was asked for."""
        asked = self.question
        names = (*ROUTES, *(["double_ring"] if asked.nodes > 1 else []))
        return self._weigh(replace(asked, layout=asked.layout_name, route=name) for name in names)

    @cached_property
    def divisions(self) -> list[Candidate]:
        """Other numbers of ranks that share a shard, each with the layout and route that suit it."""
        asked = self.question
        fits = (n for n in (1, 2, 4, 8, 16) if asked.ranks % n == 0 == asked.heads % n and n <= asked.per_node)
        return self._weigh(replace(asked, ulysses=n) for n in fits)

    @cached_property
    def sizes(self) -> list[Candidate]:
        """Twice as many ranks, where they are planned in little time."""
        asked = self.question
        quick = any(more_ranks(asked.plans, asked.ulysses))
        return self._weigh([replace(asked, ranks=2 * asked.ranks)] if quick else [])

    def _weigh(self, others: Iterable[Question]) -> list[Candidate]:
        """What was asked for, and other ways; none twice."""
        asked = self.question
        fresh = [other for other in others if other.sharding != asked.sharding]
        return [self.asked, *(_candidate(other, chosen=False) for other in fresh)]

    @cached_property
    def asked(self) -> Candidate:
        return _candidate(self.question, chosen=True)

    @property
    def best(self) -> Candidate:
        """The fastest on as many ranks; what was asked for, unless another gains something."""
        fastest = min([*self.layouts, *self.routes, *self.divisions], key=lambda candidate: candidate.seconds)
        return fastest if fastest.seconds * WORTH <= self.asked.seconds else self.asked


class Sent(NamedTuple):
    """What one rank sends in one pass: bytes and messages in its ring, and bytes swapped around it (Ulysses)."""

    ring: int
    messages: int
    swap: int


def count_sent(model: Model, name: str, plans: Sequence[Plan], table: Schedule) -> list[Sent]:
    """What each rank of a ring sends in the pass of that name, given its plans and their schedule.

    Of several that share a shard, the one that swaps most.
    """
    swapped = (int((before + after).sum(axis=1).max()) for before, after in model.swaps(name, plans))
    sent = [Sent(0, 0, swap) for swap in swapped]
    widths = model.pace(name, plans).bytes_per_token
    for hops, width in ((table.hops(lane), widths[lane]) for lane in _LANES):
        for hop in hops if width else ():
            before = sent[hop.source]
            sent[hop.source] = before._replace(ring=before.ring + hop.tokens * width, messages=before.messages + 1)
    return sent


def _candidate(question: Question, chosen: bool) -> Candidate:
    """Both passes played, without any detail."""
    model = question.model
    passes = model.plans_of(question.plans)
    tables = {name: schedule(of) for name, of in passes.items()}
    seconds = {name: play(tables[name], model.pace(name, of)) for name, of in passes.items()}
    sent = [count_sent(model, name, of, tables[name]) for name, of in passes.items()]
    cells = tables["forward"].cells()
    mean = max(1, sum(cells)) / len(cells)
    longest = sum(max((visit.cells for visit in move.visits), default=0) for move in tables["forward"].moves)
    busiest = max(zip(*sent, strict=True), key=lambda passes: sum(of.ring for of in passes))
    return Candidate(
        ranks=question.ranks,
        layout=question.layout_name,
        route=str(question.sharding.route),
        ulysses=question.ulysses,
        area=max(cells) / mean,
        steps=longest / mean,
        forward=seconds["forward"],
        backward=seconds["backward"],
        sent=sum(of.ring for of in busiest),
        swapped=sum(of.swap for of in busiest),
        chosen=chosen,
    )
