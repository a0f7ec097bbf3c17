"""What a run will take, before it runs: seconds, bytes and memory of a set of plans on a described machine.

``estimate`` plays the schedule (``timeline.py``) with the rates and links of a machine (``hardware.py``), forward and backward:

    seconds of a pass  =  compute     what the mean rank computes
                        + imbalance   what it would take longer on links that cost nothing: somebody has more to do
                        + exposed     what transfers, latencies and the host add to that

and says which of these terms is the largest, and which change would help, by playing that change too. All of it is a
model; ``benchmarks/virtual_ring.py`` puts measured visits in the place of rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ringflash.forecast.advice import Change, degrees, layouts, more_ranks, routes
from ringflash.forecast.hardware import Hardware, load_hardware
from ringflash.forecast.holding import peak
from ringflash.forecast.model import Model, Pass, StepCost, spell_rate, without_latency, without_links
from ringflash.forecast.timeline import Pace, Schedule, Span, play, schedule
from ringflash.forecast.workload import Workload
from ringflash.numbers import said_by, whole
from ringflash.plan import Plan, derive
from ringflash.units import spell_bytes, spell_count, spell_tokens
from ringflash.verify import require_plans

__all__ = ["Estimate", "Pass", "Span", "StepCost", "estimate"]

_HIDDEN = 0.9  # a call that computes this share of its time is limited by computing
WORTH = 1.02  # advice has to gain this much


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` expects of one attention call, forward and backward: a model, not a measurement.

    ``memory`` are the bytes of each kind of tensor at the peak of the fullest rank. ``limit`` is the term that decides.
    ``problem`` is what the plans have in common (``Plan.problem``), of rings on nodes of ``ranks_per_node`` ranks.
    """

    forward: Pass
    backward: Pass
    memory: dict[str, int]
    limit: str
    hardware: Hardware
    workload: Workload
    tokens: int
    ranks: int
    ranks_per_node: int
    problem: tuple[Any, ...] = field(repr=False)

    @cached_property
    def advice(self) -> tuple[str, ...]:
        """What would help and by how much, best first; tried when it is first asked for, which may take a second."""
        plans = [derive(rank, *self.problem) for rank in range(self.problem[0].ranks)]
        model = Model(self.hardware, self.workload, self.ranks_per_node)
        return tuple(_advise(model, plans, self.forward, self.backward))

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks and batch rows that pass through one such call, forward and backward, in a second."""
        return self.tokens * self.workload.batch / self.seconds if self.seconds else 0.0

    @property
    def summary(self) -> str:
        """All that is expected, without the advice, which takes longer than the rest."""
        work, machine = self.workload, self.hardware
        shape = (
            f"{work.heads} heads, {work.kv_heads} key heads, head dim {work.head_dim}, {work.dtype}, batch {work.batch}"
        )
        swap = f", heads over {work.degree} ranks" if work.degree > 1 else ""
        memory = ", ".join(f"{name} {spell_bytes(n)}" for name, n in self.memory.items() if n) or "nothing"
        lines = [
            f"model, not a measurement: {spell_tokens(self.tokens)} tokens on {self.ranks} x {machine.name} "
            f"({machine.within.name} within nodes, {machine.between.name} between)",
            f"one attention call: {shape}{swap}",
            *str(self.forward).splitlines(),
            *str(self.backward).splitlines(),
            f"tokens   {spell_count(self.tokens_per_second)} per second, forward and backward, all ranks",
            f"memory   {spell_bytes(sum(self.memory.values()))} on the fullest rank: {memory}",
            f"peak     {self._share_of_peak(self.forward)} forward, {self._share_of_peak(self.backward)} backward, of "
            f"{spell_rate(machine.peak)} in bfloat16",
            f"rates    forward {self.forward.rate}; backward {self.backward.rate}",
            f"limit    {self.limit}",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"advice   {line}" for line in self.advice)])

    def _share_of_peak(self, phase: Pass) -> str:
        return f"{phase.flops_per_second / self.hardware.peak:.0%}"


def estimate(
    plans: Sequence[Plan],
    hardware: Hardware | str,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int = 128,
    value_dim: int | None = None,
    batch: int = 1,
    dtype: str = "bfloat16",
    heads_degree: int = 1,
    ranks_per_node: int | None = None,
) -> Estimate:
    """Seconds, bytes and peak memory of one attention call on a machine; a model, not a measurement.

    ``plans`` are those of all ranks of the ring (``rf.plans(s)``), ``hardware`` a name or a :class:`Hardware`. With
    ``heads_degree`` n each rank of the ring is n ranks that share its heads (Ulysses). Ranks fill nodes in order,
    ``ranks_per_node`` (default: the machine's) in each. Raises ``ValueError`` for shapes that attention would refuse.

    >>> import ringflash as rf
    >>> s = rf.Sharding(65536, (0, 8), rf.causal, "zigzag")
    >>> print(estimate(rf.plans(s), "h100", heads=32, kv_heads=8).limit)
    compute
    """
    require_plans(plans, "estimate")
    ranks = [plan.rank for plan in plans]
    if ranks != list(range(plans[0].ranks if plans else 1)):
        raise ValueError(f"estimate: got plans of ranks {ranks}; one plan for every rank, as of rf.plans(s)")
    if plans[0].travels != "keys":
        raise ValueError("estimate: the plans are of a backward in which queries travel; pass those of rf.plans(s)")
    if any(plan.problem != plans[0].problem for plan in plans):
        raise ValueError("estimate: the plans are of several problems; pass those of one sharding, rf.plans(s)")
    with said_by("estimate"):
        machine = load_hardware(hardware)
    per_node = machine.gpus_per_node if ranks_per_node is None else ranks_per_node
    per_node = whole(per_node, "estimate: ranks_per_node", least=1)
    first = plans[0]
    workload = Workload(
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
        batch=batch,
        dtype=dtype,
        degree=heads_degree,
        rows=first.mask.rows,
    )
    model = Model(machine, workload, per_node)
    phases = model.plans_of(plans)
    tables = {name: schedule(of) for name, of in phases.items()}
    forward, backward = (model.run(name, of, tables[name]) for name, of in phases.items())
    return Estimate(
        forward=forward,
        backward=backward,
        memory=peak(phases["forward"], phases["backward"], workload),
        limit=_limit(model, phases, tables, forward, backward),
        hardware=machine,
        workload=workload,
        tokens=first.queries.length,
        ranks=first.ranks * workload.degree,
        ranks_per_node=per_node,
        problem=first.problem,
    )


def _limit(
    model: Model, phases: Mapping[str, Sequence[Plan]], tables: Mapping[str, Schedule], forward: Pass, backward: Pass
) -> str:
    """The term that decides, of both passes together."""
    both = (forward, backward)
    total, compute, imbalance, exposed = (
        sum(getattr(phase, name) for phase in both) for name in ("seconds", "compute", "imbalance", "exposed")
    )
    if compute >= _HIDDEN * total:
        return "compute"
    if imbalance >= exposed:
        busy = [sum(pair) for pair in zip(forward.busy, backward.busy, strict=True)]
        rank = max(range(len(busy)), key=busy.__getitem__)
        factor = busy[rank] * len(busy) / sum(busy)
        if factor - 1 >= 0.5 * imbalance / compute:
            return f"imbalance: rank {rank} has {factor:.2f} x the mean area"
        return (
            f"imbalance: ranks have unequal work in a step, and wait {imbalance / total:.0%} of the time for each other"
        )
    left = dict.fromkeys(_REMEDIES, 0.0)  # seconds without each of these
    for name, of in phases.items():
        table, pace = tables[name], model.pace(name, of)
        for term, free in _REMEDIES.items():
            left[term] += play(table, free(pace))
    return min(left, key=left.__getitem__)


_REMEDIES: dict[str, Callable[[Pace], Pace]] = {
    "links within nodes": lambda pace: without_links(pace, 0),
    "links between nodes": lambda pace: without_links(pace, 1),
    "latency": without_latency,
    "heads for tokens": lambda pace: replace(pace, before=0.0, after=0.0),
}
"""What may be in the way of computing, and the same pace without it."""


def _advise(model: Model, plans: Sequence[Plan], forward: Pass, backward: Pass) -> Iterator[str]:
    """What would help, best first: changes that fit the terms that cost something, each played; then more ranks."""
    total, degree = forward.seconds + backward.seconds, model.workload.degree
    lost = {name: sum(getattr(phase, name) for phase in (forward, backward)) for name in ("imbalance", "exposed")}
    tried: list[Change] = []
    if max(lost.values()) > (1 - 1 / WORTH) * total:
        tried += routes(plans, model.ring_per_node, degree)
    if lost["exposed"] > (1 - 1 / WORTH) * total:
        tried += degrees(plans, model.workload, model.per_node)
    if lost["imbalance"] > (1 - 1 / WORTH) * total:
        tried += layouts(plans, degree)
    gains = sorted(((total / _trial(model, change), change.label) for change in tried), reverse=True)
    yield from (f"{label}: {gain:.2f} x as fast" for gain, label in gains if gain >= WORTH)
    larger = next(more_ranks(plans, degree), None)
    if larger is not None:
        gain, label = total / _trial(model, larger), larger.label
    elif lost["imbalance"] > (1 - _HIDDEN) * total:
        return
    else:  # planning twice as many ranks takes four times as long; each visit has half the queries and half the keys
        steps = [step for phase in (forward, backward) for step in phase.steps]
        halved = sum(2 * max(step.compute / 4, step.transfer / 2) for step in steps)
        gain = sum(step.seconds for step in steps) / halved if halved else 1.0
        label = f"about {2 * forward.ranks} ranks instead of {forward.ranks}"
    if gain >= WORTH:
        yield f"{label}: {gain:.2f} x as fast"


def _trial(model: Model, change: Change) -> float:
    """Seconds of forward and backward together if somebody made that change."""
    changed = replace(model, workload=replace(model.workload, degree=change.degree))
    return max(changed.seconds(change.plans()), 1e-12)
