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
from collections.abc import Callable, Mapping, Sequence
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

    def zeros(self, tokens: int) -> Parcel:
        """The parcel of a shard of so many tokens to which nobody has added."""
        parcel = self.blank(tokens)
        parcel.buffer.zero_()
        return parcel

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
    rank, freight = plan.rank, Freight.like(cargo)
    if plan.ranks > 1:
        wire.warm_up(freight.device)
    held = {rank: freight.pack(cargo)} if any(m.shard == rank for m in plan.legs.onward_out) else {}
    own: tuple[Tensor, ...] | None = None  # this rank's share of its own total, which never travels
    coming: dict[int, tuple[Pending, Parcel]] = {}  # totals on their way to this rank
    leaving: deque[Pending] = deque()
    for step in plan.steps:
        arriving = {move.shard: freight.blank(plan.keys.tokens(move.shard)) for move in step.onward_in}
        onward = _post(wire, step.onward_out, held, step.onward_in, arriving)
        totals: dict[int, Parcel] = {}
        for shard in step.visits:
            share = visit(shard, tuple(cargo) if shard == rank else held[shard].tensors)
            if shard == rank:
                own = share
            elif home and share is not None:
                totals[shard] = _add_up(_awaited(coming, shard), share, home)
        if home:
            rooms = {move.shard: home.blank(plan.keys.tokens(move.shard)) for move in step.home_in}
            homeward = _post(wire, step.home_out, totals, step.home_in, rooms)
            coming |= {shard: (homeward, room) for shard, room in rooms.items()}
            leaving.append(homeward)
            if len(leaving) > 2:
                leaving.popleft().wait()
        onward.wait()
        held |= arriving
        for shard in step.done_with:
            held.pop(shard, None)
    for pending in leaving:
        pending.wait()
    if home is None:
        return None
    arrived = _awaited(coming, rank)
    if own is None:
        return arrived.tensors if arrived else home.zeros(cargo[0].shape[1]).tensors
    return own if arrived is None else _add_up(arrived, own, home).tensors


def _post(
    wire: Wire,
    out: Sequence[Transfer],
    parcels: Mapping[int, Parcel],
    back: Sequence[Transfer],
    rooms: Mapping[int, Parcel],
) -> Pending:
    """One batch: what leaves from ``parcels``, and what comes into ``rooms``, both by shard."""
    return wire.exchange(
        [(move.peer, parcels[move.shard].buffer) for move in out],
        [(move.peer, rooms[move.shard].buffer) for move in back],
    )


def _awaited(coming: dict[int, tuple[Pending, Parcel]], shard: int) -> Parcel | None:
    """The total of ``shard`` that earlier visitors have sent, once it is here; None if this rank is the first."""
    if shard not in coming:
        return None
    pending, parcel = coming.pop(shard)
    pending.wait()
    return parcel


def _add_up(total: Parcel | None, share: Sequence[Tensor], home: Freight | None) -> Parcel:
    """The total with a share added to it in place; the first share becomes the total."""
    if total is None:
        assert home is not None
        return home.pack(share)
    for tensor, mine in zip(total.tensors, share, strict=True):
        tensor.add_(mine)
    return total
