"""Heads for positions: a change of coordinates around any ring.

Ranks that share a shard of the ring hold some of its positions each, with all heads. Before attention they swap, so that
each holds the whole shard with some of the heads; afterwards they swap back. A shard of 8 tokens with 4 heads on 2 ranks:

                tokens 0-3      tokens 4-7                        tokens 0-7
    heads 0-3   rank 0          rank 1        pool >   heads 0-1  rank 0
                                            < spread   heads 2-3  rank 1

In between, a ring knows nothing of it: positions of a shard are sorted, and so are those of its parts put in a row. Key
heads fewer than ranks are copied to those whose queries need them, and only to those; their gradients are summed.

DeepSpeed Ulysses: Jacobs et al. 2023 (arXiv 2309.14509); with a ring: Fang & Zhao 2024 (arXiv 2405.07719).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.freight import Parcel
from ringflash.guard import HEADS, Guard
from ringflash.ranges import profiled
from ringflash.wire import Message, Wire


class HeadShare(NamedTuple):
    """The query heads of one rank, and for each of its key heads the number of it among all key heads."""

    queries: slice
    keys: tuple[int, ...]


def head_share(heads: int, kv_heads: int, degree: int, rank: int, ranks: int | None = None) -> HeadShare:
    """The heads of ``rank``, of ``degree`` ranks that share a shard.

    Each has a block of the query heads. As in all grouped attention, each of its key heads serves equally many
    neighbouring queries: the most that fit on every rank. So a key head is on a rank once where its queries come as a
    whole, and more than once only where blocks cut them. ``heads`` is a multiple of ``kv_heads``; ``ValueError`` unless it
    is one of ``degree`` too, which names the degrees that fit ``ranks`` (default ``degree``), all ranks of the sharding.

    >>> head_share(28, 4, degree=2, rank=1)
    HeadShare(queries=slice(14, 28, None), keys=(2, 3))
    >>> head_share(8, 2, degree=4, rank=3).keys  # the 4 queries of a key head are on two ranks
    (1,)
    """
    if heads % degree:
        ranks = degree if ranks is None else ranks
        fitting = [n for n in range(1, ranks + 1) if ranks % n == 0 and heads % n == 0]
        raise ValueError(
            f"heads_axis is {degree}: {degree} ranks cannot share {heads} query heads equally; of {ranks} ranks, so many "
            f"can: {', '.join(f'{n} (in rings of {ranks // n})' for n in fitting)}"
        )
    block, group = heads // degree, heads // kv_heads
    first = rank * block
    served = range(first, first + block, gcd(block, group))
    return HeadShare(slice(first, first + block), tuple(query // group for query in served))


@dataclass(frozen=True)
class Swap:
    """Swaps between the ranks of ``wire``, of which rank i holds so many of the shard's tokens.

    Tensors are ``[batch, tokens, heads, ...]``, of any dtypes and strides, and on all ranks alike but for the tokens.
    Both verbs are collective, one exchange each; what they return is contiguous and shares no memory. They are steps of
    an operator, and not differentiable by themselves.
    """

    wire: Wire
    query_tokens: tuple[int, ...]
    key_tokens: tuple[int, ...]
    rings: int = 1
    """Number of ranks of the ring, for messages."""

    def share(self, heads: int, kv_heads: int, rank: int | None = None) -> HeadShare:
        """The heads of ``rank`` (default: this one); raises ``ValueError`` if they cannot be shared."""
        degree = self.wire.ranks
        return head_share(heads, kv_heads, degree, self.wire.rank if rank is None else rank, degree * self.rings)

    def pool(
        self, queries: Sequence[Tensor], keys: Sequence[Tensor], guard: Guard | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """All tokens with this rank's heads, from this rank's tokens with all heads.

        ``queries``, at least one, have the query heads and tokens, ``keys`` the key heads and tokens.
        """
        heads = queries[0].shape[2]
        sides = self._sides(heads, keys[0].shape[2] if keys else heads, len(queries), len(keys))
        cargo = list(zip((*queries, *keys), sides, strict=True))
        parts = self._trade(
            lambda peer: [x[:, :, side.heads[peer]] for x, side in cargo],
            lambda peer: [(side.tokens[peer], len(side.copies)) for side in sides],
            guard or Guard(),
        )
        pooled = []
        for i, (x, side) in enumerate(cargo):
            whole = x.new_empty(x.shape[0], side.places[-1].stop, sum(side.copies), *x.shape[3:])
            for part, place in zip(parts, side.places, strict=True):
                _unfold(part[i], side.copies, into=whole[:, place])
            pooled.append(whole)
        return pooled[: len(queries)], pooled[len(queries) :]

    def spread(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        heads: int,
        kv_heads: int,
        guard: Guard | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's tokens with all heads, from all tokens with this rank's heads.

        ``keys`` are gradients: a key head that is there more than once becomes the sum of them all, in the order of the
        ranks and in the dtype they come in.
        """
        sides, here = self._sides(heads, kv_heads, len(queries), len(keys)), self.wire.rank
        cargo = [(_fold(x, side.copies), side) for x, side in zip((*queries, *keys), sides, strict=True)]
        parts = self._trade(
            lambda peer: [x[:, side.places[peer]] for x, side in cargo],
            lambda peer: [(side.tokens[here], side.heads[peer].stop - side.heads[peer].start) for side in sides],
            guard or Guard(),
        )
        spread = []
        for i, (x, side) in enumerate(cargo):
            whole = x.new_empty(x.shape[0], side.tokens[here], side.heads[-1].stop, *x.shape[3:])
            written = 0
            for part, span in zip(parts, side.heads, strict=True):
                again = written - span.start  # the first key head of a rank may be the last one of the rank before
                whole[:, :, span.start : written].add_(part[i][:, :, :again])
                whole[:, :, written : span.stop].copy_(part[i][:, :, again:])
                written = span.stop
            spread.append(whole)
        return spread[: len(queries)], spread[len(queries) :]

    def _sides(self, heads: int, kv_heads: int, queries: int, keys: int) -> list[_Side]:
        """The side of each of so many tensors with query heads, and then of those with key heads."""
        shares = [self.share(heads, kv_heads, rank) for rank in range(self.wire.ranks)]
        blocks, spans = zip(*((x.queries, slice(x.keys[0], x.keys[-1] + 1)) for x in shares), strict=True)
        copies = [len(list(same)) for _, same in groupby(shares[self.wire.rank].keys)]
        whole = _Side(self.query_tokens, blocks, [1] * (heads // self.wire.ranks))
        return [whole] * queries + [_Side(self.key_tokens, spans, copies)] * keys

    def _trade(
        self, leaving: Callable[[int], list[Tensor]], coming: Callable[[int], list[tuple[int, int]]], guard: Guard
    ) -> list[Sequence[Tensor]]:
        """By rank, what comes from it: tensors with so many tokens and heads. ``leaving`` is what goes there."""
        mine, here = leaving(self.wire.rank), self.wire.rank
        dtypes, device = [x.dtype for x in mine], mine[0].device
        self.wire.warm_up(device)
        others = [peer for peer in range(self.wire.ranks) if peer != here]
        sends = [(peer, guard.seal(_pack(leaving(peer), guard.label), HEADS, here).buffer) for peer in others]
        rooms = {}
        for peer in others:
            shapes = [(x.shape[0], *size, *x.shape[3:]) for x, size in zip(mine, coming(peer), strict=True)]
            rooms[peer] = Parcel.blank(shapes, dtypes, device, guard.label)
        receives = [(peer, room.buffer) for peer, room in rooms.items()]
        about = f"{guard}, swap of heads"
        with profiled("ringflash swap of heads"):
            self.wire.exchange(_full(sends), _full(receives), about=about).wait()
        for peer, room in rooms.items():
            guard.admit(room, HEADS, peer, None, f"heads from rank {peer} of those that share a shard")
        return [mine if peer == here else rooms[peer].tensors for peer in range(self.wire.ranks)]


@dataclass(frozen=True)
class _Side:
    """What tensors with query heads, or those with key heads, have in common."""

    tokens: Sequence[int]
    """Of each rank, how many of the shard's tokens it holds."""
    heads: Sequence[slice]
    """Of each rank, the heads it needs, each once."""
    copies: Sequence[int]
    """How often this rank has each of its own."""

    @property
    def places(self) -> list[slice]:
        """Of each rank, where its tokens stand in the shard."""
        return [slice(a, b) for a, b in pairwise(accumulate(self.tokens, initial=0))]


def _pack(tensors: Sequence[Tensor], label: int) -> Parcel:
    parcel = Parcel.blank([x.shape for x in tensors], [x.dtype for x in tensors], tensors[0].device, label)
    for inside, x in zip(parcel.tensors, tensors, strict=True):
        inside.copy_(x)
    return parcel


def _full(messages: list[Message]) -> list[Message]:
    """Those that have something in them; both ends know of what is left out."""
    return [message for message in messages if message[1].numel()]


def _unfold(x: Tensor, copies: Sequence[int], into: Tensor) -> None:
    """Copy the heads of ``x``, each so many times."""
    if len(copies) == into.shape[2]:
        into.copy_(x)
        return
    for head, (a, b) in enumerate(pairwise(accumulate(copies, initial=0))):
        into[:, :, a:b].copy_(x[:, :, head : head + 1])


def _fold(x: Tensor, copies: Sequence[int]) -> Tensor:
    """Add up the heads that ``_unfold`` made from one."""
    if len(copies) == x.shape[2]:
        return x
    return torch.cat([some.sum(dim=2, keepdim=True, dtype=x.dtype) for some in x.split(list(copies), dim=2)], dim=2)
