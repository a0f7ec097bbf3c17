"""The wire and the board of a process group: ``torch.distributed`` moves the tensors.

Every wait has an end. Where waiting blocks this thread (gloo) the transport is told how long; where it does not, since only
the GPU's stream waits (NCCL), a thread looks after what is under way (``watch.py``). Either way the error comes before the
group's own time-out, and it names the hop and the rank that did not come.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.board import StoreBoard, printable
from ringflash.errors import PeerError, WireError
from ringflash.watch import watch
from ringflash.wire import Done, Message, Pending

VARIABLE = "RINGFLASH_TIMEOUT"
_LONGEST = 600.0  # seconds, where the group would wait for longer
_SHARE = 0.8  # of the group's own time-out: our error, which knows more, comes first


class DistributedWire:
    """Point-to-point messages over process groups that belong to the ring alone, one per channel; collectives over the parent.

    Nobody else's messages can then slip between a send and its receive, and a slow link holds up nothing on another
    channel. A group is made when all ranks first ask for its channel, and warmed up by one tiny exchange in which every
    rank takes part, as NCCL asks.
    """

    def __init__(self, parent: dist.ProcessGroup) -> None:
        self.rank, self.ranks = dist.get_rank(parent), dist.get_world_size(parent)
        self.parent = weakref.ref(parent)
        self._groups: list[dist.ProcessGroup] = []  # by channel
        self._warm: set[tuple[str, int]] = set()
        self._failure: str | None = None

    @cached_property
    def board(self) -> StoreBoard:
        """Notes in the store of the parent group."""
        parent = self._living_parent()
        store = dist.distributed_c10d._get_process_group_store(parent)
        world = dist.get_process_group_ranks(parent)
        store.set(_HOST.format(self.rank), socket.gethostname())

        hosts = {self.rank: socket.gethostname()}

        def name(rank: int) -> str:
            with contextlib.suppress(RuntimeError):  # the store may be gone
                if rank not in hosts and store.check([_HOST.format(rank)]):
                    hosts[rank] = printable(store.get(_HOST.format(rank))[:80].decode(errors="replace"))
            also = "" if world[rank] == rank else f"{world[rank]} of the world, "
            return f"rank {rank} ({also}{hosts.get(rank, 'an unknown host')})"

        return StoreBoard(store, self.rank, self.ranks, self.seconds, name)

    def warm_up(self, device: torch.device, channels: int = 1) -> None:
        if self.ranks == 1:
            return
        for channel in range(channels):
            if (device.type, channel) in self._warm:
                continue
            if channel == len(self._groups):
                self._groups.append(_ring_group(self._living_parent(), device))
            out, back = torch.zeros(2, 1, dtype=torch.uint8, device=device)
            sends, receives = [((self.rank + 1) % self.ranks, out)], [((self.rank - 1) % self.ranks, back)]
            self.exchange(sends, receives, channel, "the first message of a ring").wait()
            for peer, _ in sends + receives:
                self.board.name(peer)  # looked up while the store is there
            self._warm.add((device.type, channel))

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], channel: int = 0, about: object = ""
    ) -> Pending:
        if not sends and not receives:
            return Done()
        if self._failure is not None:
            raise PeerError(f"this ring has failed before, and its group is of no use any more: {self._failure}")
        group = self._groups[channel]
        moves = [(dist.isend, m) for m in sends] + [(dist.irecv, m) for m in receives]
        batch = [dist.P2POp(move, buffer, group=group, group_peer=peer) for move, (peer, buffer) in moves]
        whom = [_Move(move is dist.isend, peer, buffer.nbytes) for move, (peer, buffer) in moves]
        try:
            works = dist.batch_isend_irecv(batch)
        except RuntimeError as error:
            raise self._lost(about, whom, error) from error
        return _Batch(self, works, batch, whom, about)

    def all_reduce(self, tensor: Tensor) -> None:
        if self.ranks > 1:
            work = dist.all_reduce(tensor, group=self._living_parent(), async_op=True)
            self.wait_for(work, tensor.is_cuda, f"sum over all ranks of {_spell(tensor)}")

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        if self.ranks == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.ranks)]
        work = dist.all_gather(gathered, tensor, group=self._living_parent(), async_op=True)
        self.wait_for(work, tensor.is_cuda, f"gathering of {_spell(tensor)} from all ranks")
        return gathered

    def wait_for(self, work: dist.Work, on_gpu: bool, about: object, whom: Sequence[_Move] = ()) -> None:
        """Wait for the work, or have the stream wait for it; raises :class:`PeerError` if that takes too long."""
        try:
            work.wait() if on_gpu else work.wait(timedelta(seconds=self.seconds))
        except RuntimeError as error:
            raise self._lost(about, whom, error) from error
        if on_gpu and not torch.cuda.is_current_stream_capturing():  # a captured transfer is of every replay
            said = str(about)  # now: what it is about holds buffers, and serves later calls
            watch.add(work, self.seconds, lambda: self._overdue(said, whom))

    @cached_property
    def seconds(self) -> float:
        """How long a rank waits for another: ``RINGFLASH_TIMEOUT``, or 4/5 of the group's time-out, 600 at most."""
        limit = _timeout(self._living_parent())
        theirs = limit.total_seconds() if limit else math.inf
        given = os.environ.get(VARIABLE)
        if given is None:
            return min(_LONGEST, _SHARE * theirs)
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < theirs:
            raise ValueError(
                f"the environment variable {VARIABLE} is {given!r}; a number of seconds is needed, more than 0 and less than "
                f"the group's own time-out, which is {theirs:g} (init_process_group(timeout=...) sets it)"
            )
        return seconds

    def leave(self) -> None:
        """Destroy the groups that the ring has made (none where it runs on its parent), and take away this rank's notes."""
        if "board" in vars(self):
            with contextlib.suppress(RuntimeError):  # the store may be gone
                self.board.remove([_HOST.format(self.rank)])
        for group in self._groups:
            if group in dist.distributed_c10d._world.pg_map:
                dist.destroy_process_group(group)
        self._groups, self._warm = [], set()

    def _lost(self, about: object, whom: Sequence[_Move], error: RuntimeError) -> PeerError:
        """The error for a transfer that has failed, with what other ranks have to say."""
        late = "timed out" in str(error).lower()
        self._failure = self._trouble(about, whom, None if late else str(error))
        why = _IF_LATE if late else " It has died, or ended before the others: its own output says why."
        return PeerError(f"{self._me}: {self._failure}.{why}{self.board.distress(_brief(about, self._failure))}")

    def _overdue(self, about: object, whom: Sequence[_Move]) -> None:
        """The same, said by the thread that watches; once, since what is behind it on the stream is its echo."""
        if self._failure is not None:
            return
        self._failure = self._trouble(about, whom, None)
        text = f"{self._me}: {self._failure}.{_IF_LATE}{self.board.distress(_brief(about, self._failure))}"
        print(text, file=sys.stderr, flush=True)

    def _trouble(self, about: object, whom: Sequence[_Move], error: str | None) -> str:
        moves = " or ".join(move.spell(self.board.name, error is None) for move in whom[:4])
        moves = moves or ("not all ranks came" if error is None else "a rank was lost")
        reason = f"within {self.seconds:g} s" if error is None else f"({_first_sentence(error)})"
        return f"{about}: {moves} {reason}"

    @property
    def _me(self) -> str:
        return f"ringflash, {self.board.name(self.rank)} of {self.ranks}"

    def _living_parent(self) -> dist.ProcessGroup:
        parent = self.parent()
        if parent is None or parent not in dist.distributed_c10d._world.pg_map:
            raise WireError("the process group of this ring was destroyed; build shardings and wrappers anew")
        return parent


_HOST = "ringflash/host/{}"
_IF_LATE = (
    " It may be dead, stopped, far behind, or have left this call out: its own output says what it does; if it is only slow, "
    f"raise {VARIABLE}."
)


class _Move(NamedTuple):
    """One transfer of a batch, as an error speaks of it."""

    leaves: bool
    peer: int
    nbytes: int

    def spell(self, name: Callable[[int], str], late: bool) -> str:
        what, peer = f"{self.nbytes:,} bytes", name(self.peer)
        if not late:
            return f"the connection to {peer} broke under {what}"
        return f"{peer} did not take {what}" if self.leaves else f"{what} did not come from {peer}"


@dataclass
class _Batch:
    wire: DistributedWire
    works: list[dist.Work]
    holding: list[dist.P2POp]  # the buffers live until the batch is done
    whom: list[_Move]
    about: object

    def wait(self) -> None:
        one_each = len(self.works) == len(self.whom)  # gloo; NCCL has one work for all
        on_gpu = any(op.tensor.is_cuda for op in self.holding)
        for number, work in enumerate(self.works):
            self.wire.wait_for(work, on_gpu, self.about, self.whom[number : number + 1] if one_each else self.whom)
        self.works, self.holding = [], []


def wire_of(group: dist.ProcessGroup) -> DistributedWire:
    """The wire of a group, made once and kept as long as the group."""
    wire = _wires.get(group)
    if wire is None:
        _leave_dead_groups()
        wire = _wires[group] = DistributedWire(group)
        _made.append(wire)
    return wire


_wires: weakref.WeakKeyDictionary[dist.ProcessGroup, DistributedWire] = weakref.WeakKeyDictionary()
_made: list[DistributedWire] = []


def _leave_dead_groups() -> None:
    """Destroy the rings' own groups of parents that were destroyed: torch keeps their sockets and threads otherwise."""
    known = dist.distributed_c10d._world.pg_map
    for wire in [wire for wire in _made if wire.parent() not in known]:
        _made.remove(wire)
        wire.leave()


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


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """The parent's timeout: ``new_group`` would fall back to half an hour, whatever ``init_process_group`` was told."""
    for device in ("cuda", "cpu"):
        try:
            limit: timedelta = group._get_backend(torch.device(device)).options._timeout
            return limit
        except (RuntimeError, AttributeError):
            continue
    return None


def _brief(about: object, trouble: str) -> str:
    """A trouble without the details of the hop."""
    text = str(about)
    return text.partition(", ")[0] + trouble[len(text) :] if trouble.startswith(text) else trouble


def _first_sentence(error: str) -> str:
    """Of an error of gloo, without the place in its sources."""
    return error.partition("] ")[2].partition(". ")[0] or error.partition("\n")[0]


def _spell(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
