"""The one loop that moves shards: every distributed form of attention here is a choice of cargo.

                cargo that travels         what a visit returns     what comes home
    forward     k, v                       nothing                  nothing: the partial stays with the queries
    backward    k, v                       its share of dk, dv      dk, dv, by +
    or          q, dout, lse, delta        its share of dq          dq, by +

In every step a rank first posts the onward batches (what it holds leaves, what comes next arrives), then computes with
the shard that is here, then adds its share to the totals that have come after it and posts those. So transfers are under
way while it computes; a part is awaited in the step that uses it, and a total after the work that precedes it. Batches
are posted in the same order on every rank, onward before home: none can wait for a later one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.profiler import record_function

from ringflash.freight import Freight, Parcel
from ringflash.needs import Part, whole
from ringflash.plan import Batch, Meeting, Plan
from ringflash.wire import Pending, Wire

Visitor = Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...] | None]
"""``visit(shard, tensors)``: compute with what travelled, and return this rank's share of what comes home, if any."""


def circulate(
    plan: Plan, wire: Wire, cargo: Sequence[Tensor], visit: Visitor, home: Freight | None = None
) -> tuple[Tensor, ...] | None:
    """Carry out ``plan``: call ``visit`` for every shard that this rank computes with, and bring results home.

    ``cargo`` are this rank's own tensors that travel, ``[batch, tokens, ...]`` each. With ``home``, what visits return is
    added up piece by piece on its way, and the sum over all ranks for this rank's own shard is returned.
    """
    if plan.ranks > 1:
        wire.warm_up(cargo[0].device, plan.channels)
    hold = _Hold(plan, cargo)
    totals = _Totals(plan, home) if home else None
    for number, step in enumerate(plan.steps):
        hold.await_until(number)
        for batch in step.onward:
            with record_function(f"ringflash onward, for step {batch.due}"):
                hold.post(wire, batch)
        for meeting in step.visits:
            with record_function(f"ringflash visit, step {number}, shard {meeting.shard}"):
                share = visit(meeting.shard, hold.tensors(meeting.shard))
            if totals and share is not None:
                totals.add(meeting, share)
        if totals:
            for batch in step.home:
                with record_function(f"ringflash home, step {number}"):
                    totals.post(wire, batch)
            totals.let_go()
        for shard in step.done_with:
            hold.drop(shard)
    hold.await_until(len(plan.steps) + plan.ranks)
    return totals.arrive(cargo[0].shape[1]) if totals else None


class _Hold:
    """What travels, as far as it is here or on its way here."""

    def __init__(self, plan: Plan, cargo: Sequence[Tensor]) -> None:
        self._rank, self._cargo, self._freight = plan.rank, tuple(cargo), Freight.like(cargo)
        self._parts = {plan.rank: whole(plan.rank, cargo[0].shape[1])}
        self._parcels: dict[int, Parcel] = {}
        self._coming: defaultdict[int, list[Pending]] = defaultdict(list)  # by the step that uses them
        self._packed: tuple[Part, Parcel] | None = None  # the last part of a shard that was cut out to be sent

    def await_until(self, step: int) -> None:
        """What is used in this step, or was before, is here; what left for it is gone."""
        for due in sorted(due for due in self._coming if due <= step):
            for pending in self._coming.pop(due):
                pending.wait()

    def post(self, wire: Wire, batch: Batch) -> None:
        rooms = [(message, self._freight.blank(message.part.tokens)) for message in batch.back]
        sends = [(message.peer, self._cut(message.part).buffer) for message in batch.out]
        pending = wire.exchange(sends, [(m.peer, room.buffer) for m, room in rooms], batch.channel)
        self._coming[batch.due].append(pending)
        for message, room in rooms:
            self._parts[message.part.shard], self._parcels[message.part.shard] = message.part, room

    def tensors(self, shard: int) -> tuple[Tensor, ...]:
        return self._cargo if shard == self._rank else self._parcels[shard].tensors

    def drop(self, shard: int) -> None:
        self._parcels.pop(shard, None)
        if self._packed and self._packed[0].shard == shard:
            self._packed = None

    def _cut(self, part: Part) -> Parcel:
        """The parcel of a part of what is here: what came, if all of it goes on."""
        held = self._parts[part.shard]
        if part.shard != self._rank and part == held:
            return self._parcels[part.shard]
        if self._packed is None or self._packed[0] != part:
            parcel = self._freight.blank(part.tokens)
            for inside, tensor in zip(parcel.tensors, self.tensors(part.shard), strict=True):
                for to, here in part.inside(held):
                    inside[:, to].copy_(tensor[:, here])
            self._packed = part, parcel
        return self._packed[1]


class _Totals:
    """Sums on their way home: those that came to this rank, and this rank's shares of those that leave."""

    def __init__(self, plan: Plan, freight: Freight) -> None:
        self._rank, self._freight = plan.rank, freight
        self._shares: dict[int, tuple[Part, tuple[Tensor, ...]]] = {}
        self._coming: defaultdict[int, list[tuple[Pending, Part, Parcel]]] = defaultdict(list)
        self._leaving: deque[list[Pending]] = deque()
        self._posted: list[Pending] = []

    def add(self, meeting: Meeting, share: tuple[Tensor, ...]) -> None:
        """This rank's share of a shard; that of its own never travels."""
        self._shares[meeting.shard] = meeting.part, share

    def post(self, wire: Wire, batch: Batch) -> None:
        rooms = [(message, self._freight.blank(message.part.tokens)) for message in batch.back]
        sends = [(message.peer, self._total(message.part).buffer) for message in batch.out]
        pending = wire.exchange(sends, [(m.peer, room.buffer) for m, room in rooms], batch.channel)
        for message, room in rooms:
            self._coming[message.part.shard].append((pending, message.part, room))
        self._posted.append(pending)

    def let_go(self) -> None:
        """The step is over: buffers that left two steps ago are no longer needed."""
        self._leaving.append(self._posted)
        self._posted = []
        while len(self._leaving) > 2:
            for pending in self._leaving.popleft():
                pending.wait()
        for shard in [shard for shard in self._shares if shard != self._rank]:
            del self._shares[shard]
            self._coming.pop(shard, None)

    def arrive(self, tokens: int) -> tuple[Tensor, ...]:
        """All contributions to this rank's own shard: its own share, and the totals in the order in which they were posted."""
        for posted in self._leaving:
            for pending in posted:
                pending.wait()
        own = whole(self._rank, tokens)
        coming = self._coming.pop(self._rank, [])
        if self._rank in self._shares:
            total = self._shares[self._rank][1]
        elif len(coming) == 1 and coming[0][1] == own:
            return coming[0][2].tensors
        else:
            total = self._freight.zeros(tokens).tensors
        for _, part, parcel in coming:
            _add(total, own, parcel.tensors, part)
        return total

    def _total(self, part: Part) -> Parcel:
        """Of one part of the shard that this rank has just computed with: what came, plus its share."""
        held, share = self._shares[part.shard]
        coming = self._coming.get(part.shard, [])
        for pending, _, _ in coming:
            pending.wait()
        same = next((parcel for _, came, parcel in coming if came == part), None)
        if same is not None:
            _add(same.tensors, part, share, held)
            return same
        if part == held:
            total = self._freight.pack(share)
        else:
            total = self._freight.zeros(part.tokens)
            _add(total.tensors, part, share, held)
        for _, came, parcel in coming:
            _add(total.tensors, part, parcel.tensors, came)
        return total


def _add(total: Sequence[Tensor], part: Part, share: Sequence[Tensor], of: Part) -> None:
    """Add to the tensors of ``part`` those tokens of another part that it holds too."""
    for here, there in _common(part, of):
        for tensor, mine in zip(total, share, strict=True):
            tensor[:, here].add_(mine[:, there])


def _common(a: Part, b: Part) -> list[tuple[slice, slice]]:
    """Where the tokens that two parts share are in each of them, run by run."""
    if a == b:
        return [(slice(0, a.tokens), slice(0, b.tokens))]
    both, i, j = [], 0, 0
    while i < len(a.spans) and j < len(b.spans):
        (a0, a1), (b0, b1) = a.spans[i], b.spans[j]
        if max(a0, b0) < min(a1, b1):
            both.append((max(a0, b0), min(a1, b1)))
        i, j = (i + 1, j) if a1 <= b1 else (i, j + 1)
    shared = Part(a.shard, tuple(both))
    return [(x, y) for (_, x), (_, y) in zip(shared.inside(a), shared.inside(b), strict=True)]
