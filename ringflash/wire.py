"""What moves tensors between ranks.

A wire sends and receives buffers in batches and sums small tensors; it knows nothing of attention. Two of them exist,
``torch.distributed`` (``distributed.py``) and the in-process world of ``local.py``, and the loop that uses them cannot tell
them apart. Here are their contract, and the wires that are made of other wires.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ringflash.board import Board
from ringflash.errors import WireError

Message = tuple[int, Tensor]
"""A peer's rank in the group, and the contiguous buffer that goes there or comes from there."""


class Pending(Protocol):
    """A batch on its way. Its buffers are neither read nor written before ``wait`` has returned."""

    def wait(self) -> None: ...


class Wire(Protocol):
    """Moves buffers between ``ranks`` ranks, of which this is number ``rank``.

    A *channel* is a queue of its own: what is slow on one does not hold up the others.
    """

    rank: int
    ranks: int

    def warm_up(self, device: torch.device, channels: int = 1) -> None:
        """Collective: connect channels 0 to ``channels - 1``, once. Every rank calls it before its first exchange."""

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], channel: int = 0, about: object = ""
    ) -> Pending:
        """Start one batch. Messages between two ranks match in the order of their batches on one channel.

        ``str(about)`` says what it is, in an error.
        """


class Collectives(Protocol):
    """What all ``ranks`` do together, with small tensors."""

    rank: int
    ranks: int

    def all_reduce(self, tensor: Tensor) -> None:
        """Collective: replace ``tensor`` by its sum over all ranks."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Collective: the ``tensor`` of every rank, all of one shape and dtype."""


class Trunk(Wire, Collectives, Protocol):
    """The wire of a whole group does both, and has a board for notes."""

    @property
    def board(self) -> Board: ...


@dataclass
class Unconnected:
    """The wire of ``(rank, ranks)``: a world of one needs none, a larger one cannot communicate."""

    rank: int
    ranks: int

    def warm_up(self, device: torch.device, channels: int = 1) -> None:
        if self.ranks > 1:
            raise WireError(
                f"group is the pair ({self.rank}, {self.ranks}), which can plan but not communicate; pass a ProcessGroup, "
                "a DeviceMesh or a group of local_world"
            )

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], channel: int = 0, about: object = ""
    ) -> Pending:
        self.warm_up(torch.device("cpu"))
        return Done()

    @property
    def board(self) -> Board:
        """Nobody reads it."""
        raise WireError(f"group is the pair ({self.rank}, {self.ranks}), which can plan but not communicate")

    def all_reduce(self, tensor: Tensor) -> None:
        self.warm_up(tensor.device)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        self.warm_up(tensor.device)
        return [tensor]


class Slice:
    """Some ranks of a wire, numbered anew: ``members[i]`` is what the whole wire calls the rank i of this one.

    Warming up is the whole wire's, in which every rank of it takes part.
    """

    def __init__(self, whole: Wire, members: Sequence[int]) -> None:
        self.rank, self.ranks = members.index(whole.rank), len(members)
        self._whole, self._members = whole, members

    def warm_up(self, device: torch.device, channels: int = 1) -> None:
        self._whole.warm_up(device, channels)

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], channel: int = 0, about: object = ""
    ) -> Pending:
        outward, inward = ([(self._members[peer], x) for peer, x in side] for side in (sends, receives))
        return self._whole.exchange(outward, inward, channel, about)


class Crossing:
    """The ranks of a grid together: along one axis, and then along the other."""

    def __init__(self, ring: Trunk, heads: Trunk) -> None:
        self.rank, self.ranks = ring.rank * heads.ranks + heads.rank, ring.ranks * heads.ranks
        self._ring, self._heads = ring, heads

    def all_reduce(self, tensor: Tensor) -> None:
        self._heads.all_reduce(tensor)
        self._ring.all_reduce(tensor)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        rows = self._ring.all_gather(torch.stack(self._heads.all_gather(tensor)))
        return [x for row in rows for x in row]


class Done:
    """A batch of nothing."""

    def wait(self) -> None: ...
