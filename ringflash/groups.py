"""Which ranks are together.

Whatever stands for a group of ranks is resolved here: a ProcessGroup, a DeviceMesh, an in-process group, or ``(rank,
ranks)``, which can plan and draw but not communicate. A group may have two axes: its ranks stand in a grid, in which
columns are rings and the ranks of a row share one shard of the ring. Rows and columns of a flat group are slices of its
one wire, those of a mesh are groups of their own. Six ranks, of which two at a time share a shard:

    0  1        a row: neighbours, which swap heads for positions
    2  3        a column: a ring
    4  5

This module and ``distributed.py`` are the only ones that mention ``torch.distributed``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringflash.board import Board
from ringflash.distributed import wire_of
from ringflash.numbers import brief, whole
from ringflash.wire import Collectives, Crossing, Slice, Trunk, Unconnected, Wire


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
        degree = whole(value, "heads_axis")
    except TypeError:
        raise TypeError(f"heads_axis is {brief(value)}; the name of an axis of a mesh, or a number of ranks") from None
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
        promised = os.environ.get("WORLD_SIZE", "1")
        if not promised.isdecimal():
            raise ValueError(f"group is None and WORLD_SIZE is {promised!r}, which is no number of ranks")
        if int(promised) > 1:
            raise ValueError(
                f"group is None and WORLD_SIZE is {promised}: call torch.distributed.init_process_group() "
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
        try:
            rank, ranks = (whole(x, "group", least=0) for x in group)
        except (TypeError, ValueError):
            rank = ranks = 0
        if not rank < ranks:
            raise ValueError(f"group is {brief(group)}; a pair means (rank, ranks), with 0 <= rank < ranks")
        return (rank, ranks)
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


def destroyed(group: Group) -> bool:
    """Whether ``torch.distributed`` made a resolved group and has destroyed it since."""
    if isinstance(group, Grid):
        return destroyed(group.ring) or destroyed(group.heads)
    return isinstance(group, dist.ProcessGroup) and group not in dist.distributed_c10d._world.pg_map


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
    return wire_of(group)


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


def boards(group: Group) -> list[tuple[Board, list[list[int]]]]:
    """The boards of a resolved group, one along each axis; and for each rank of a board, the ranks of the group that it knows
    of once the boards before it have been read.
    """
    if isinstance(group, tuple):
        return []
    if not isinstance(group, Grid):
        board = connect(group).board
        return [(board, [[rank] for rank in range(board.ranks)])]
    heads, ring = connect(group.heads).board, connect(group.ring).board
    row = [[ring.rank * heads.ranks + column] for column in range(heads.ranks)]
    return [
        (heads, row),
        (ring, [[r * heads.ranks + column for column in range(heads.ranks)] for r in range(ring.ranks)]),
    ]


def libraries() -> list[str]:
    """The communication libraries that this build of torch has, of those that a ring can use."""
    if not dist.is_available():
        return []
    present = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return [name for name, here in present.items() if here]
