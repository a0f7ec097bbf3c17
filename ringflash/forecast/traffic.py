"""How much the ranks of a plan send, counted message by message, beside what others would send for the same problem.

A *plain ring* sends every shard on P - 1 times, whole, whatever the mask; its gradients come home in as many hops. An
*all-gather* brings every shard to every other rank, which is the same number of bytes: it differs in who sends them, in how
many of them leave their node (each copy by itself), and in that everything is held at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import NamedTuple

from ringflash.numbers import whole
from ringflash.plan import Plan
from ringflash.units import spell_bytes
from ringflash.verify import require_plans


class Load(NamedTuple):
    """Bytes of all ranks together, those of the ranks that send and receive most, and those that leave their node."""

    total: int
    sent: int
    received: int
    between: int


@dataclass(frozen=True)
class Traffic:
    """What plans send, and what a plain ring and an all-gather would send for the same problem. ``str`` is one line."""

    ours: Load
    ring: Load
    gather: Load
    messages: int
    nodes: int

    def __str__(self) -> str:
        ours, ring, gather = self.ours, self.ring, self.gather
        if not (ours.total or ring.total):
            return "nothing is sent"
        line = (
            f"{spell_bytes(ours.total)} in {self.messages} messages, {_share(ours.total, ring.total)} of a plain ring "
            f"or an all-gather; busiest rank sends {spell_bytes(ours.sent)}, {_share(ours.sent, ring.sent)} of a plain ring's, "
            f"{_share(ours.sent, gather.sent)} of an all-gather's"
        )
        if self.nodes > 1:
            line += (
                f"; between nodes {spell_bytes(ours.between)}, {_share(ours.between, ring.between)} of a plain ring, "
                f"{_share(ours.between, gather.between)} of an all-gather"
            )
        return line


def traffic(
    plans: Sequence[Plan], onward: int = 1, home: int = 0, *, ranks_per_node: int | None = None, degree: int = 1
) -> Traffic:
    """Count what a complete set of plans sends, at ``onward`` bytes per token that travels and ``home`` per token of a total.

    The forward has nothing that comes home. ``Workload.keys`` and ``Workload.queries`` are such pairs of numbers. Ranks fill
    nodes in order; ``ranks_per_node`` None puts all of them on one. Where ``degree`` ranks share each shard (Ulysses), the
    rings of all of them are counted, without the swaps of heads; ``sent`` and ``received`` stay those of one rank.

    >>> import ringflash as rf
    >>> traffic(rf.plans(rf.Sharding(4096, (0, 4), rf.full, "contiguous")), onward=2).ours
    Load(total=24576, sent=6144, received=6144, between=0)
    """
    require_plans(plans, "traffic")
    if not plans or [plan.rank for plan in plans] != list(range(plans[0].ranks)):
        raise ValueError(f"traffic: got plans of ranks {[p.rank for p in plans]}; one plan for every rank, in order")
    ranks = plans[0].ranks
    per_node = ranks * degree if ranks_per_node is None else ranks_per_node
    per_node, degree = whole(per_node, "traffic: ranks_per_node", least=1), whole(degree, "traffic: degree", least=1)
    tokens = [plans[0].moving.tokens(rank) for rank in range(ranks)]
    ours = list(_messages(plans, onward, home))
    return Traffic(
        ours=_load(ours, per_node, degree),
        ring=_load(_plain_ring(tokens, onward, home), per_node, degree),
        gather=_load(_all_gather(tokens, onward, home), per_node, degree),
        messages=len(ours) * degree,
        nodes=-(-ranks * degree // per_node),
    )


@lru_cache(maxsize=1 << 16)
def crossing(source: int, target: int, per_node: int, degree: int = 1) -> int:
    """Of the ``degree`` ranks that share each shard, how many leave their node on a hop between two ranks of the ring.

    Rank l of those that share the shard of ring rank r is rank ``r * degree + l`` of all.

    >>> [crossing(0, 1, per_node, degree=4) for per_node in (4, 6, 8)]
    [4, 2, 0]
    """
    alike = gcd(per_node, degree)  # so many neighbours are always on one node
    lanes = range(0, degree, alike)
    return alike * sum((source * degree + at) // per_node != (target * degree + at) // per_node for at in lanes)


Sent = tuple[int, int, int]
"""Source, target, bytes."""


def _messages(plans: Sequence[Plan], onward: int, home: int) -> Iterator[Sent]:
    for plan in plans:
        for step in plan.steps:
            for batches, width in ((step.onward, onward), (step.home, home)):
                for batch in batches if width else ():
                    for peer, part in batch.out:
                        yield plan.rank, peer, part.tokens * width


def _plain_ring(tokens: Sequence[int], onward: int, home: int) -> Iterator[Sent]:
    """Every shard goes once round; its total starts at the first visitor and ends at its owner."""
    ranks = len(tokens)
    for owner, count in enumerate(tokens):
        for hop in range(ranks - 1):
            yield (owner + hop) % ranks, (owner + hop + 1) % ranks, count * onward
            yield (owner + hop + 1) % ranks, (owner + hop + 2) % ranks, count * home


def _all_gather(tokens: Sequence[int], onward: int, home: int) -> Iterator[Sent]:
    """Every owner sends its shard to all others; totals come from each of them (a reduce-scatter)."""
    for owner, count in enumerate(tokens):
        for other in range(len(tokens)):
            if other != owner:
                yield owner, other, count * onward
                yield other, owner, count * home


def _load(messages: Iterator[Sent] | Sequence[Sent], per_node: int, degree: int) -> Load:
    sent, received, between = Counter[int](), Counter[int](), 0
    for source, target, count in messages:
        sent[source] += count
        received[target] += count
        between += count * crossing(source, target, per_node, degree)
    return Load(sent.total() * degree, max(sent.values(), default=0), max(received.values(), default=0), between)


def _share(ours: int, theirs: int) -> str:
    if not theirs:
        return "-"
    share = ours / theirs
    return f"{share:.2f}" if share >= 0.1 else f"{share:.2g}"
