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
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ringflash.freight import Freight, Parcel
from ringflash.guard import Guard, Kind
from ringflash.needs import Part, whole
from ringflash.plan import Batch, Meeting, Message, Plan
from ringflash.ranges import profiled
from ringflash.wire import Pending, Wire


class Cargo(NamedTuple):
    """What travels: this rank's own tensors, ``[batch, tokens, ...]`` each, and what people call them."""

    kind: Kind
    tensors: tuple[Tensor, ...]


class Home(NamedTuple):
    """What comes home: what it is, and of what shapes and dtypes."""

    kind: Kind
    freight: Freight


Visitor = Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...] | None]
"""``visit(shard, tensors)``: compute with what travelled, and return this rank's share of what comes home, if any."""


def circulate(
    plan: Plan, wire: Wire, cargo: Cargo, visit: Visitor, home: Home | None = None, guard: Guard | None = None
) -> tuple[Tensor, ...] | None:
    """Carry out ``plan``: call ``visit`` for every shard that this rank computes with, and bring results home.

    With ``home``, what visits return is added up piece by piece on its way, and the sum over all ranks for this rank's own
    shard is returned. ``guard`` labels and checks what is sent, if it checks anything.
    """
    guard = guard or Guard()
    if plan.ranks > 1:
        wire.warm_up(cargo.tensors[0].device, plan.channels)
    post = _Post(wire, guard, len(plan.steps))
    hold = _Hold(plan, cargo, post)
    totals = _Totals(plan, home, cargo.tensors[0].shape[1], post) if home else None
    for number, step in enumerate(plan.steps):
        post.await_until(number)
        if totals:
            totals.settle(number)
        for batch in step.onward:
            with profiled(f"ringflash onward, for step {batch.due}"):
                hold.send(batch)
        for meeting in step.visits:
            with profiled(f"ringflash visit, step {number}, shard {meeting.shard}"):
                share = visit(meeting.shard, hold.tensors(meeting.shard))
            if totals and share is not None:
                totals.add(meeting, share)
        if totals:
            for batch in step.home:
                with profiled(f"ringflash home, step {number}"):
                    totals.send(batch)
            totals.let_go()
        for shard in step.done_with:
            hold.drop(shard)
    post.drain()
    return totals.arrive() if totals else None


@dataclass(frozen=True)
class _Hop:
    """A batch, as an error speaks of it."""

    guard: Guard
    due: int
    steps: int
    kind: Kind
    parcels: Sequence[Parcel]

    def __str__(self) -> str:
        shapes = "; ".join(", ".join(f"{list(x.shape)}" for x in parcel.tensors) for parcel in self.parcels[:1])
        dtype = f" {self.parcels[0].tensors[0].dtype}".replace("torch.", "") if self.parcels else ""
        return f"{self.guard}, hop for step {self.due} of {self.steps}: {self.kind.what} {shapes}{dtype}".rstrip()


class _Coming:
    """A batch on its way here; what it brings is checked as soon as it has come."""

    def __init__(self, pending: Pending, check: Callable[[], None]) -> None:
        self._pending: Pending | None = pending
        self._check = check

    def wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()
            self._check()


class _Post:
    """Batches under way, each until the step that awaits it: what it brings is used then, and what it took is free."""

    def __init__(self, wire: Wire, guard: Guard, steps: int) -> None:
        self.guard = guard
        self._wire, self._steps = wire, steps
        self._due: defaultdict[int, list[_Coming]] = defaultdict(list)

    def send(
        self,
        batch: Batch,
        kind: Kind,
        freight: Freight,
        cut: Callable[[Part], Parcel],
        source: Callable[[Message], int],
    ) -> list[tuple[Part, Parcel, _Coming]]:
        """Post a batch, whose parts are ``cut`` from what is here; return what comes, each with what to wait for.

        ``source``: what the label of a message that comes names as its source.
        """
        rooms = [(message, freight.blank(message.part.tokens)) for message in batch.back]
        sends = [(message.peer, cut(message.part).buffer) for message in batch.out]
        hop = _Hop(self.guard, batch.due, self._steps, kind, [room for _, room in rooms])
        pending = self._wire.exchange(sends, [(m.peer, room.buffer) for m, room in rooms], batch.channel, hop)

        def check() -> None:
            for message, room in rooms:
                way = f"{kind.what} for step {batch.due} of {self._steps}, from rank {message.peer} of the ring"
                self.guard.admit(room, kind, source(message), message.part, way)

        coming = _Coming(pending, check)
        self._due[batch.due].append(coming)
        return [(message.part, room, coming) for message, room in rooms]

    def await_until(self, step: int) -> None:
        """Wait for all that is due in this step, or was before."""
        for due in sorted(due for due in self._due if due <= step):
            for coming in self._due.pop(due):
                coming.wait()

    def drain(self) -> None:
        """Wait for everything."""
        self.await_until(max(self._due, default=0))


class _Hold:
    """What travels, as far as it is here or on its way here."""

    def __init__(self, plan: Plan, cargo: Cargo, post: _Post) -> None:
        self._rank, self._cargo, self._post = plan.rank, cargo, post
        self._freight = Freight.like(cargo.tensors, label=post.guard.label)
        self._parts = {plan.rank: whole(plan.rank, cargo.tensors[0].shape[1])}
        self._parcels: dict[int, Parcel] = {}
        self._packed: tuple[Part, Parcel] | None = None  # the last part of a shard that was cut out to be sent

    def send(self, batch: Batch) -> None:
        coming = self._post.send(batch, self._cargo.kind, self._freight, self._cut, lambda message: message.part.shard)
        for part, parcel, _ in coming:
            self._parts[part.shard], self._parcels[part.shard] = part, parcel

    def tensors(self, shard: int) -> tuple[Tensor, ...]:
        return self._cargo.tensors if shard == self._rank else self._parcels[shard].tensors

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
                for to, here in _common(part, held):
                    inside[:, to].copy_(tensor[:, here])
            self._packed = part, self._post.guard.seal(parcel, self._cargo.kind, part.shard, part)
        return self._packed[1]


class _Totals:
    """Sums on their way home: those that came to this rank, and this rank's shares of those that leave."""

    def __init__(self, plan: Plan, home: Home, tokens: int, post: _Post) -> None:
        self._rank, self._kind, self._post = plan.rank, home.kind, post
        self._freight = replace(home.freight, label=post.guard.label)
        self._whole = whole(plan.rank, tokens)
        self._own: tuple[Tensor, ...] | None = None  # the sum for this rank's own shard, as far as it is known
        self._share: tuple[Part, tuple[Tensor, ...]] | None = None  # of the shard that was visited last
        self._passing: defaultdict[int, list[tuple[Part, Parcel, _Coming]]] = defaultdict(list)
        self._arriving: deque[tuple[int, Part, Parcel]] = deque()  # home, with the step that awaits them

    def add(self, meeting: Meeting, share: tuple[Tensor, ...]) -> None:
        """This rank's share of a shard; that of its own never travels."""
        if meeting.shard == self._rank:
            self._own = share
        else:
            self._share = meeting.part, share

    def send(self, batch: Batch) -> None:
        for part, parcel, coming in self._post.send(batch, self._kind, self._freight, self._seal, lambda m: m.peer):
            if part.shard == self._rank:
                self._arriving.append((batch.due, part, parcel))
            else:
                self._passing[part.shard].append((part, parcel, coming))

    def let_go(self) -> None:
        """The step is over: what has left is no longer needed here."""
        if self._share is not None:
            self._passing.pop(self._share[0].shard, None)
            self._share = None

    def settle(self, step: int) -> None:
        """Add what has come home by this step to the sum, in the order in which it was posted."""
        while self._arriving and self._arriving[0][0] <= step:
            _, part, parcel = self._arriving.popleft()
            if self._own is None and part == self._whole:
                self._own = parcel.tensors
            else:
                self._own = self._own or self._freight.zeros(self._whole.tokens).tensors
                _add(self._own, self._whole, parcel.tensors, part)

    def arrive(self) -> tuple[Tensor, ...]:
        """All contributions to this rank's own shard."""
        self.settle(max((due for due, _, _ in self._arriving), default=0))
        return self._own or self._freight.zeros(self._whole.tokens).tensors

    def _seal(self, part: Part) -> Parcel:
        """A total as it leaves."""
        return self._post.guard.seal(self._total(part), self._kind, self._rank, part)

    def _total(self, part: Part) -> Parcel:
        """Of one part of the shard that this rank has just computed with: what came, plus its share."""
        assert self._share is not None
        held, share = self._share
        coming = self._passing[part.shard]
        for _, _, pending in coming:
            pending.wait()
        same = next((parcel for came, parcel, _ in coming if came == part), None)
        if same is not None:
            _add(same.tensors, part, share, held)
            return same
        if part == held:
            total = self._freight.pack(share)
        else:
            total = self._freight.zeros(part.tokens)
            _add(total.tensors, part, share, held)
        for came, parcel, _ in coming:
            _add(total.tensors, part, parcel.tensors, came)
        return total


def _add(total: Sequence[Tensor], part: Part, share: Sequence[Tensor], of: Part) -> None:
    """Add to the tensors of ``part`` those tokens of another part that it holds too."""
    if part == of:
        for tensor, mine in zip(total, share, strict=True):
            tensor.add_(mine)
        return
    for here, there in _common(part, of):
        for tensor, mine in zip(total, share, strict=True):
            tensor[:, here].add_(mine[:, there])


@lru_cache(maxsize=1024)  # the same in every layer
def _common(a: Part, b: Part) -> list[tuple[slice, slice]]:
    """Where the tokens that two parts share are in each of them, run by run."""
    both, i, j = [], 0, 0
    while i < len(a.spans) and j < len(b.spans):
        (a0, a1), (b0, b1) = a.spans[i], b.spans[j]
        if max(a0, b0) < min(a1, b1):
            both.append((max(a0, b0), min(a1, b1)))
        i, j = (i + 1, j) if a1 <= b1 else (i, j + 1)
    shared = Part(a.shard, tuple(both))
    return [(x, y) for (_, x), (_, y) in zip(shared.inside(a), shared.inside(b), strict=True)]
