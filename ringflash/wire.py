"""What moves tensors between ranks.

A wire sends and receives buffers in batches and sums small tensors; it knows nothing of attention. Two of them exist,
``torch.distributed`` here and the in-process world of ``local.py``, and the loop that uses them cannot tell them apart.
This is the only module that mentions ``torch.distributed``.

Whatever stands for a group of ranks is resolved here: a ProcessGroup, a DeviceMesh with one axis, an in-process group,
or ``(rank, ranks)``, which can plan and draw but not communicate.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.errors import WireError

Message = tuple[int, Tensor]
"""A peer's rank in the group, and the contiguous buffer that goes there or comes from there."""


class Pending(Protocol):
    """A batch on its way. Its buffers are neither read nor written before ``wait`` has returned."""

    def wait(self) -> None: ...


class Wire(Protocol):
    """Moves buffers between the ``ranks`` of a group, of which this is number ``rank``."""

    rank: int
    ranks: int

    def warm_up(self, device: torch.device) -> None:
        """Collective: make the ring's own connections, once. Every rank calls it before its first exchange."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start one batch. Messages between two ranks match in the order of their batches."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Collective: replace ``tensor`` by its sum over all ranks."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Collective: the ``tensor`` of every rank, all of one shape and dtype."""


class Addressed(Protocol):
    """A group that is not of ``torch.distributed`` brings its own wire."""

    rank: int
    ranks: int
    wire: Wire


Group = Any  # ProcessGroup | DeviceMesh | Addressed | tuple[int, int] | None


def resolve(group: Group) -> Group:
    """A hashable group: a ProcessGroup, an in-process group, or ``(rank, ranks)``. Sends nothing.

    None is the default process group, or a world of one where none was made and no launcher promises more.
    """
    if group is None:
        if dist.is_available() and dist.is_initialized():
            return dist.group.WORLD
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"group is None and WORLD_SIZE is {os.environ['WORLD_SIZE']}: call torch.distributed.init_process_group() "
                "first, or every rank would attend to its own shard alone"
            )
        return (0, 1)
    if isinstance(group, dist.device_mesh.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh with axes {group.mesh_dim_names}; pass one axis of it, as mesh['context']"
            )
        return group.get_group()
    if isinstance(group, tuple | list):
        if len(group) != 2 or not all(isinstance(x, int) for x in group) or not 0 <= group[0] < group[1]:
            raise ValueError(f"group is {group!r}; a pair means (rank, ranks), with 0 <= rank < ranks")
        return (group[0], group[1])
    if isinstance(group, dist.ProcessGroup) or hasattr(group, "wire"):
        return group
    raise TypeError(
        f"group is of type {type(group).__name__}; accepted are a ProcessGroup, a DeviceMesh with one axis, a group of "
        "local_world, a pair (rank, ranks), or None for the default group"
    )


def address(group: Group) -> tuple[int, int]:
    """This process's rank in a resolved group, and the number of ranks."""
    if isinstance(group, tuple):
        return group
    if isinstance(group, dist.ProcessGroup):
        if dist.get_rank(group) < 0:
            raise ValueError("group does not contain this process")
        return dist.get_rank(group), dist.get_world_size(group)
    return group.rank, group.ranks


def connect(group: Group) -> Wire:
    """The wire of a resolved group; for a ProcessGroup one ring group of its own, made once and kept."""
    if isinstance(group, tuple):
        return Unconnected(*group)
    if not isinstance(group, dist.ProcessGroup):
        return group.wire
    wire = _wires.get(group)
    if wire is None:
        wire = _wires[group] = DistributedWire(group)
    return wire


def libraries() -> list[str]:
    """The communication libraries that this build of torch has, of those that a ring can use."""
    if not dist.is_available():
        return []
    present = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return [name for name, here in present.items() if here]


_wires: weakref.WeakKeyDictionary[dist.ProcessGroup, DistributedWire] = weakref.WeakKeyDictionary()


@dataclass
class Unconnected:
    """The wire of ``(rank, ranks)``: a world of one needs none, a larger one cannot communicate."""

    rank: int
    ranks: int

    def warm_up(self, device: torch.device) -> None:
        if self.ranks > 1:
            raise WireError(
                f"group is the pair ({self.rank}, {self.ranks}), which can plan but not communicate; pass a ProcessGroup, "
                "a DeviceMesh or a group of local_world"
            )

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        self.warm_up(torch.device("cpu"))
        return _Done()

    def all_reduce(self, tensor: Tensor) -> None:
        self.warm_up(tensor.device)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        self.warm_up(tensor.device)
        return [tensor]


class DistributedWire:
    """Point-to-point messages over a process group that belongs to the ring alone; collectives over the parent.

    Nobody else's messages can then slip between a send and its receive. The group is made when all ranks first
    communicate, and warmed up by one tiny exchange in which every rank takes part, as NCCL asks.
    """

    def __init__(self, parent: dist.ProcessGroup) -> None:
        self.rank, self.ranks = address(parent)
        self._parent = weakref.ref(parent)
        self._group: dist.ProcessGroup | None = None
        self._warm: set[str] = set()

    def warm_up(self, device: torch.device) -> None:
        if device.type in self._warm or self.ranks == 1:
            return
        if self._group is None:
            self._group = _ring_group(self._living_parent(), device)
        out, back = torch.zeros(1, dtype=torch.uint8, device=device), torch.zeros(1, dtype=torch.uint8, device=device)
        self.exchange([((self.rank + 1) % self.ranks, out)], [((self.rank - 1) % self.ranks, back)]).wait()
        self._warm.add(device.type)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        if not sends and not receives:
            return _Done()
        moves = [(dist.isend, m) for m in sends] + [(dist.irecv, m) for m in receives]
        batch = [dist.P2POp(move, buffer, group=self._group, group_peer=peer) for move, (peer, buffer) in moves]
        return _Batch(dist.batch_isend_irecv(batch), batch)

    def all_reduce(self, tensor: Tensor) -> None:
        if self.ranks > 1:
            dist.all_reduce(tensor, group=self._living_parent())

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        if self.ranks == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.ranks)]
        dist.all_gather(gathered, tensor, group=self._living_parent())
        return gathered

    def _living_parent(self) -> dist.ProcessGroup:
        parent = self._parent()
        if parent is None or parent not in dist.distributed_c10d._world.pg_map:
            raise WireError("the process group of this ring was destroyed; build shardings and wrappers anew")
        return parent


def _ring_group(parent: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """A group of the same ranks as ``parent``, with its timeout and back ends. Collective.

    Where the parent is the whole world every rank is here, and torch's usual way works. Otherwise only members can take
    part, and torch then names the group by the number of groups that each process has: where those differ (somebody made
    a group of rank 0 alone) its ranks would wait for each other under different names. They compare first, and if the
    numbers differ the ring runs on its parent.
    """
    ranks = dist.get_process_group_ranks(parent)
    local = len(ranks) < dist.get_world_size()
    if local:
        mine = torch.tensor([len(dist.distributed_c10d._world.pg_names)], device=device)
        counts = [torch.empty_like(mine) for _ in ranks]
        dist.all_gather(counts, mine, group=parent)
        if len({int(count) for count in counts}) > 1:
            return parent
    return dist.new_group(
        ranks,
        timeout=_timeout(parent),
        backend=dist.get_backend_config(parent),
        use_local_synchronization=local,
        group_desc="ringflash",
    )


@dataclass
class _Batch:
    works: list[dist.Work]
    holding: list[dist.P2POp]  # the buffers live until the batch is done

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works, self.holding = [], []


class _Done:
    def wait(self) -> None: ...


def _timeout(group: dist.ProcessGroup) -> Any:
    """The parent's timeout: ``new_group`` would fall back to half an hour, whatever ``init_process_group`` was told."""
    for device in ("cuda", "cpu"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return None
