"""The one loop that moves shards: every distributed form of attention here is a choice of cargo.

                cargo that travels      what a visit returns     what comes home
    forward     k, v                    nothing                  nothing: the partial stays with the queries
    backward    k, v                    its share of dk, dv      dk, dv, by +

In every step a rank first posts the onward batch (the shard it holds leaves, the next one arrives), then computes with
the shard it holds, then adds its share to the total that has come after it and posts that. So the transfer for step
t + 1 is under way while step t computes, and a total is awaited only after the work that precedes it. At most two
batches per step, onward then home, in the same order on every rank: no batch can wait for a later one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ringflash.plan import Plan
from ringflash.route import Transfer
from ringflash.wire import Pending, Wire

Visitor = Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...] | None]
"""``visit(shard, tensors)``: compute with what travelled, and return this rank's share of what comes home, if any."""

_ALIGNMENT = 64  # bytes: tensors in a hop start where a fresh tensor would, so that every wire gives the same bits


@dataclass(frozen=True)
class Freight:
    """What travels: for each tensor ``[batch, tokens, ...]`` its shape (tokens is the shard's, written 0) and dtype."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    @classmethod
    def like(cls, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Freight:
        """The freight that carries such tensors, or their gradients in another ``dtype``."""
        shapes = tuple((x.shape[0], 0, *x.shape[2:]) for x in tensors)
        return cls(shapes, tuple(dtype or x.dtype for x in tensors), tensors[0].device)

    def blank(self, tokens: int) -> Parcel:
        """An unwritten parcel for a shard of so many tokens: one contiguous buffer, and the tensors inside it."""
        shapes = [(batch, tokens, *rest) for batch, _, *rest in self.shapes]
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, self.dtypes, strict=True)]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        buffer = torch.empty(starts[-1], dtype=torch.uint8, device=self.device)
        spans = zip(starts, sizes, self.dtypes, shapes, strict=False)
        return Parcel(buffer, tuple(buffer[at : at + n].view(dtype).view(shape) for at, n, dtype, shape in spans))

    def pack(self, tensors: Sequence[Tensor]) -> Parcel:
        """A parcel that holds a copy of ``tensors``, cast to the dtypes of this freight."""
        parcel = self.blank(tensors[0].shape[1])
        for inside, tensor in zip(parcel.tensors, tensors, strict=True):
            inside.copy_(tensor)
        return parcel


@dataclass(frozen=True)
class Parcel:
    """One contiguous buffer (uint8), and the tensors that are views of it."""

    buffer: Tensor
    tensors: tuple[Tensor, ...]


def circulate(
    plan: Plan, wire: Wire, cargo: Sequence[Tensor], visit: Visitor, home: Freight | None = None
) -> tuple[Tensor, ...] | None:
    """Carry out ``plan``: call ``visit`` for every shard that this rank computes with, and bring results home.

    ``cargo`` are this rank's own tensors that travel, ``[batch, tokens, ...]`` each. With ``home``, what visits return is
    added up per shard on its way, and the sum over all ranks for this rank's own shard is returned.
    """
    legs, rank = plan.legs, plan.rank
    freight = Freight.like(cargo)
    held: dict[int, Parcel] = {}
    if plan.ranks > 1:
        wire.warm_up(freight.device)
    if any(move.shard == rank for move in legs.onward_out):
        held[rank] = freight.pack(cargo)
    own = home.blank(cargo[0].shape[1]) if home else None
    for tensor in own.tensors if own else ():
        tensor.zero_()
    coming: dict[int, tuple[Pending, Parcel]] = {}  # totals on their way to this rank
    leaving: deque[tuple[Pending, Parcel | None]] = deque()
    for step in range(plan.steps):
        arriving = {move.shard: freight.blank(plan.keys.tokens(move.shard)) for move in _at(legs.onward_in, step)}
        onward = wire.exchange(
            [(move.peer, held[move.shard].buffer) for move in _at(legs.onward_out, step)],
            [(move.peer, arriving[move.shard].buffer) for move in _at(legs.onward_in, step)],
        )
        totals: dict[int, Parcel] = {}
        for shard in (v.shard for v in legs.visits if v.step == step):
            share = visit(shard, tuple(cargo) if shard == rank else held[shard].tensors)
            if home and share is not None:
                totals[shard] = _add_up(own if shard == rank else _awaited(coming, shard), share, home)
        if home:
            leaving.append(_post_home(plan, wire, step, totals, home, coming))
            while len(leaving) > 2:
                leaving.popleft()[0].wait()
        onward.wait()
        held = {shard: parcel for shard, parcel in (held | arriving).items() if _needed(plan, shard, step)}
    for pending, _ in leaving:
        pending.wait()
    if own is None:
        return None
    if rank in coming:
        arrived = _awaited(coming, rank)
        assert arrived is not None
        return tuple(mine.add_(theirs) for mine, theirs in zip(own.tensors, arrived.tensors, strict=True))
    return own.tensors


def _post_home(
    plan: Plan,
    wire: Wire,
    step: int,
    totals: dict[int, Parcel],
    home: Freight,
    coming: dict[int, tuple[Pending, Parcel]],
) -> tuple[Pending, Parcel | None]:
    """Hand on the total that was added to in this step, and make room for those that set out to this rank now."""
    out, back = _at(plan.legs.home_out, step), _at(plan.legs.home_in, step)
    rooms = {move.shard: home.blank(plan.keys.tokens(move.shard)) for move in back}
    batch = wire.exchange(
        [(move.peer, totals[move.shard].buffer) for move in out],
        [(move.peer, rooms[move.shard].buffer) for move in back],
    )
    coming |= {shard: (batch, room) for shard, room in rooms.items()}
    return batch, next(iter(totals.values()), None)


def _awaited(coming: dict[int, tuple[Pending, Parcel]], shard: int) -> Parcel | None:
    """The total of ``shard`` that earlier visitors have sent, once it is here; None if this rank is the first."""
    if shard not in coming:
        return None
    pending, parcel = coming.pop(shard)
    pending.wait()
    return parcel


def _add_up(total: Parcel | None, share: tuple[Tensor, ...], home: Freight) -> Parcel:
    if total is None:
        return home.pack(share)
    for tensor, mine in zip(total.tensors, share, strict=True):
        tensor.add_(mine)
    return total


def _at(moves: tuple[Transfer, ...], step: int) -> list[Transfer]:
    return [move for move in moves if move.step == step]


def _needed(plan: Plan, shard: int, after: int) -> bool:
    """Does this rank use ``shard`` in any step behind ``after``?"""
    return any(use.shard == shard and use.step > after for use in plan.legs.uses)
