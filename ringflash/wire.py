"""What moves tensors between ranks.

A wire sends and receives buffers in batches and sums small tensors; it knows nothing of attention. Two of them exist,
``torch.distributed`` here and the in-process world of ``local.py``, and the loop that uses them cannot tell them apart.
This is the only module that mentions ``torch.distributed``.

Whatever stands for a group of ranks is resolved here: a ProcessGroup, a DeviceMesh, an in-process group, or ``(rank,
ranks)``, which can plan and draw but not communicate. A group may have two axes: its ranks stand in a grid, in which
columns are rings and the ranks of a row share one shard of the ring. Rows and columns of a flat group are slices of its
one wire, those of a mesh are groups of their own. Six ranks, of which two at a time share a shard:

    0  1        a row: neighbours, which swap heads for positions
    2  3        a column: a ring
    4  5
"""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

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

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], channel: int = 0) -> Pending:
        """Start one batch. Messages between two ranks match in the order of their batches on one channel."""


class Collectives(Protocol):
    """What all ``ranks`` do together, with small tensors."""

    rank: int
    ranks: int

    def all_reduce(self, tensor: Tensor) -> None:
        """Collective: replace ``tensor`` by its sum over all ranks."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Collective: the ``tensor`` of every rank, all of one shape and dtype."""


class Trunk(Wire, Collectives, Protocol):
    """The wire of a whole group does both."""


class Addressed(Protocol):
    """A group that is not of ``torch.distributed`` brings its own wire."""

    rank: int
    ranks: int
    wire: Trunk


Group = Any  # ProcessGroup | DeviceMesh | Addressed | Grid | tuple[int, int] | None


@dataclass(frozen=True)
class Grid:
    """A resolved group of two axes: rank ``ring rank x heads ranks + heads rank`` of all of them."""

    ring: Group
    heads: Group


def resolve_axes(group: Group, heads_axis: str | int | None) -> tuple[Group, int]:
    """A resolved group, and how many neighbouring ranks of it share a shard of the ring. Sends nothing.

    ``heads_axis`` is the name of one of the two axes of a mesh, or a number for any other group; None and 1 say that
    nobody shares.
    """
    if isinstance(group, DeviceMesh) and isinstance(heads_axis, str):
        names = group.mesh_dim_names or ()
        if heads_axis not in names or len(names) > 2:
            raise ValueError(
                f"heads_axis is {heads_axis!r}, and group is a mesh with axes {names}; it names one of the two of a mesh such "
                "as mesh['ring', 'heads']"
            )
        heads = resolve(group[heads_axis])
        ring = next((resolve(group[name]) for name in names if name != heads_axis), (0, 1))
        ranks, degree = address(ring)[1], address(heads)[1]
        return (heads, degree) if ranks == 1 else (ring, 1) if degree == 1 else (Grid(ring, heads), degree)
    group = resolve(group)
    if isinstance(heads_axis, str):
        raise ValueError(
            f"heads_axis is {heads_axis!r}; only the axes of a DeviceMesh have names: of any other group, pass how many "
            "neighbouring ranks share a shard, as heads_axis=2"
        )
    degree = 1 if heads_axis is None else _degree(heads_axis, address(group)[1])
    if isinstance(group, Grid) and degree != address(group.heads)[1]:
        raise ValueError(f"heads_axis is {degree}; the mesh of this group has {address(group.heads)[1]} ranks on it")
    return group, degree


def _degree(value: object, ranks: int) -> int:
    try:
        degree = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"heads_axis is {value!r}; the name of an axis of a mesh, or a number of ranks") from None
    if degree < 1 or ranks % degree:
        fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise ValueError(f"heads_axis is {degree}, and the group has {ranks} ranks; {ranks} can be cut by {fitting}")
    return degree


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
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh with axes {group.mesh_dim_names}; pass one axis of it, as mesh['context'], or of two axes "
                "name the one whose ranks share heads, as heads_axis='heads'"
            )
        return group.get_group()
    if isinstance(group, tuple | list):
        if len(group) != 2 or not all(isinstance(x, int) for x in group) or not 0 <= group[0] < group[1]:
            raise ValueError(f"group is {group!r}; a pair means (rank, ranks), with 0 <= rank < ranks")
        return (group[0], group[1])
    if isinstance(group, dist.ProcessGroup | Grid) or hasattr(group, "wire"):
        return group
    raise TypeError(
        f"group is of type {type(group).__name__}; accepted are a ProcessGroup, a DeviceMesh, a group of local_world, a "
        "pair (rank, ranks), or None for the default group"
    )


def address(group: Group) -> tuple[int, int]:
    """This process's rank in a resolved group, and the number of ranks."""
    if isinstance(group, tuple):
        return group
    if isinstance(group, dist.ProcessGroup):
        if dist.get_rank(group) < 0:
            raise ValueError("group does not contain this process")
        return dist.get_rank(group), dist.get_world_size(group)
    if isinstance(group, Grid):
        (rank, ranks), (inner, degree) = address(group.ring), address(group.heads)
        return rank * degree + inner, ranks * degree
    return group.rank, group.ranks


def processes(group: Group) -> list[int]:
    """The ranks of the world in a resolved group, in its order (of a grid, the ring's and then those of the row), if
    ``torch.distributed`` made it; else none.
    """
    if isinstance(group, Grid):
        return processes(group.ring) + processes(group.heads)
    return list(dist.get_process_group_ranks(group)) if isinstance(group, dist.ProcessGroup) else []


def nodes(group: Group) -> int:
    """Over how many nodes a resolved group is spread evenly, in the order of its ranks; 1 if nothing says so.

    A launcher that says how many processes each node has (``LOCAL_WORLD_SIZE``) numbers them node by node. Of a grid this
    is asked of the ring.
    """
    if isinstance(group, Grid):
        return nodes(group.ring)
    local, world = (int(os.environ.get(name, "0")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    launched = int(os.environ.get("GROUP_WORLD_SIZE", "0"))
    ranks = processes(group)
    if not ranks or local < 1 or world % local or launched not in (0, world // local):
        return 1
    homes = [rank // local for rank in ranks]
    per_node, left_over = divmod(len(homes), len(set(homes)))
    even = not left_over and homes == [home for home in homes[::per_node] for _ in range(per_node)]
    return len(set(homes)) if even else 1


def connect(group: Group) -> Trunk:
    """The wire of a resolved group of one axis; for a ProcessGroup with groups of its own, made once and kept."""
    if isinstance(group, tuple):
        return Unconnected(*group)
    if not isinstance(group, dist.ProcessGroup):
        return group.wire
    wire = _wires.get(group)
    if wire is None:
        wire = _wires[group] = DistributedWire(group)
    return wire


def connect_axes(group: Group, degree: int) -> tuple[Wire, Wire]:
    """The wires of this rank's ring, and of the ``degree`` ranks that share a shard of it."""
    if isinstance(group, Grid):
        return connect(group.ring), connect(group.heads)
    whole = connect(group)
    if degree == 1:
        return whole, Unconnected(0, 1)
    row, column = divmod(whole.rank, degree)
    return Slice(whole, range(column, whole.ranks, degree)), Slice(whole, range(row * degree, (row + 1) * degree))


def connect_all(group: Group) -> Collectives:
    """What all ranks of a resolved group do together, on however many axes they stand."""
    return Crossing(connect(group.ring), connect(group.heads)) if isinstance(group, Grid) else connect(group)


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

    def warm_up(self, device: torch.device, channels: int = 1) -> None:
        if self.ranks > 1:
            raise WireError(
                f"group is the pair ({self.rank}, {self.ranks}), which can plan but not communicate; pass a ProcessGroup, "
                "a DeviceMesh or a group of local_world"
            )

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], channel: int = 0) -> Pending:
        self.warm_up(torch.device("cpu"))
        return _Done()

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

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], channel: int = 0) -> Pending:
        outward, inward = ([(self._members[peer], x) for peer, x in side] for side in (sends, receives))
        return self._whole.exchange(outward, inward, channel)


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


class DistributedWire:
    """Point-to-point messages over process groups that belong to the ring alone, one per channel; collectives over the parent.

    Nobody else's messages can then slip between a send and its receive, and a slow link holds up nothing on another
    channel. A group is made when all ranks first ask for its channel, and warmed up by one tiny exchange in which every
    rank takes part, as NCCL asks.
    """

    def __init__(self, parent: dist.ProcessGroup) -> None:
        self.rank, self.ranks = address(parent)
        self._parent = weakref.ref(parent)
        self._groups: list[dist.ProcessGroup] = []  # by channel
        self._warm: set[tuple[str, int]] = set()

    def warm_up(self, device: torch.device, channels: int = 1) -> None:
        if self.ranks == 1:
            return
        for channel in range(channels):
            if (device.type, channel) in self._warm:
                continue
            if channel == len(self._groups):
                self._groups.append(_ring_group(self._living_parent(), device))
            out, back = torch.zeros(2, 1, dtype=torch.uint8, device=device)
            self.exchange([((self.rank + 1) % self.ranks, out)], [((self.rank - 1) % self.ranks, back)], channel).wait()
            self._warm.add((device.type, channel))

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], channel: int = 0) -> Pending:
        if not sends and not receives:
            return _Done()
        group = self._groups[channel]
        moves = [(dist.isend, m) for m in sends] + [(dist.irecv, m) for m in receives]
        batch = [dist.P2POp(move, buffer, group=group, group_peer=peer) for move, (peer, buffer) in moves]
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
