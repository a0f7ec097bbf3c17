"""Which layout, which route, how many ranks to a shard: every way to run one attention call, estimated.

A question is what somebody knows before a run: length, ranks, mask, shapes of the heads, machine. The answer compares what
the library would do with other layouts, routes and divisions of the heads:

      layout         area max/mean   forward   backward   together   most sent
    * zigzag                  1.00   42.3 ms     101 ms     143 ms    1.20 GiB    * what was asked for, or "auto" chose
      contiguous              1.98   80.1 ms     190 ms     270 ms    1.20 GiB

All times are modelled (``cost.py``); nothing is sent, and no device is touched. ``report.py`` writes it down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from ringflash.auto import choose_route
from ringflash.forecast.cost import Estimate, estimate
from ringflash.forecast.hardware import Hardware, load_hardware
from ringflash.forecast.model import Model
from ringflash.forecast.timeline import play, schedule
from ringflash.forecast.workload import Workload
from ringflash.layout import LAYOUTS
from ringflash.mask import Mask, causal
from ringflash.plan import Plan
from ringflash.route import ROUTES, Route, double_ring
from ringflash.shard import Sharding, plans

_WORTH = 1.02  # a recommendation has to gain this much
_FEW = 32  # ranks up to which twice as many are planned, too

ROUTE_NAMES = ("auto", *ROUTES, "double_ring")
LAYOUT_NAMES = ("auto", *LAYOUTS, "balanced")


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

    machine: Hardware = field(init=False, compare=False, repr=False)
    model: Model = field(init=False, compare=False, repr=False)
    """What plays plans on that machine."""
    sharding: Sharding = field(init=False, compare=False, repr=False)
    """The sharding of rank 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "machine", load_hardware(self.hardware))
        object.__setattr__(self, "model", Model(self.machine, self._workload, self.per_node))
        s = Sharding(self.length, (0, self.ranks), self.mask, self.layout, heads_axis=self.ulysses)
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

    @property
    def per_node(self) -> int:
        """Ranks of a node."""
        return self.machine.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node

    @property
    def nodes(self) -> int:
        """Nodes over which every ring is spread evenly; 1 if there is no such number."""
        rings, within = self.ranks // self.ulysses, max(1, self.per_node // self.ulysses)
        return rings // within if rings % within == 0 else 1

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
            raise ValueError(
                f"route is 'double_ring', for rings over several nodes; {self.ranks} ranks, {self.per_node} to a node and "
                f"{self.ulysses} to a shard, are a ring in one node"
            )
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
    forward: float
    backward: float
    sent: int
    """Bytes that the busiest rank sends in both passes."""
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
        return self._weigh([replace(asked, ranks=2 * asked.ranks)] if asked.ranks <= _FEW else [])

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
        return fastest if fastest.seconds * _WORTH <= self.asked.seconds else self.asked


def _candidate(question: Question, chosen: bool) -> Candidate:
    """Both passes played, without any detail."""
    model, cells = question.model, [0]
    seconds, sent = {}, Counter[int]()
    for name, of in model.plans_of(question.plans).items():
        table, pace = schedule(of), model.pace(name, of)
        seconds[name] = play(table, pace)
        cells = table.cells()
        sent.update({rank: sum(model.exchanged(name, of)) for rank in range(len(of))})
        for hops, lane in ((table.hops("onward"), "onward"), (table.hops("home"), "home")):
            for hop in hops:
                sent[hop.source] += hop.tokens * pace.bytes_per_token[lane]
    return Candidate(
        ranks=question.ranks,
        layout=question.layout_name,
        route=str(question.sharding.route),
        ulysses=question.ulysses,
        area=max(cells) * len(cells) / max(1, sum(cells)),
        forward=seconds["forward"],
        backward=seconds["backward"],
        sent=max(sent.values()),
        chosen=chosen,
    )
