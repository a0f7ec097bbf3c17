"""N ranks in one process, on one device, without a launcher.

Every rank is a thread, and a baton sees to it that only one of them runs at a time: it is handed over when its holder
has to wait for another rank. So a run is deterministic, needs no free cores, and can use code that is not thread-safe. If
everybody waits, nobody ever will send: that is raised at once, with who waits for whom.

    rank 0  ▶──── exchange, wait ┐                    ┌─▶ ...
    rank 1                       └▶── exchange, wait ┐│
    rank 2                                           └┴ ...
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ringflash.errors import DeadlockError, WireError
from ringflash.numbers import whole
from ringflash.wire import Message

Lane = tuple[int, int, int]
"""Who sends, who receives, and the channel."""

_MOST = 1 << 16  # each rank is a thread


class LocalWorld:
    """``ranks`` ranks in this process; made by :func:`local_world`."""

    def __init__(self, ranks: int) -> None:
        self.ranks = whole(ranks, "local_world: ranks", least=1, most=_MOST, needed="a world has at least one")

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``fn(group, *args)`` once per rank and return the results in the order of the ranks.

        ``group`` goes wherever a ProcessGroup goes. Threads inherit grad mode and autocast; backward runs in the thread
        that called it. The first exception of any rank ends the world and is raised here. Whatever ``fn`` uses from
        outside is shared by all ranks: a model belongs inside it, one for each.

        >>> local_world(ranks=3).run(lambda group, x: group.rank * x, 10)
        [0, 10, 20]
        """
        state = _State(self.ranks)
        results: list[Any] = [None] * self.ranks
        inherited = _settings_of_this_thread()

        def live(rank: int) -> None:
            group = LocalGroup(rank, state)
            try:
                state.take_baton(rank)
                with inherited():
                    results[rank] = fn(group, *args)
            except BaseException as error:  # of any kind: the other ranks must not wait for this one
                state.fail(rank, error)
            state.leave(rank)

        threads = [threading.Thread(target=live, args=(r,), name=f"rank {r}", daemon=True) for r in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if state.error is not None:
            raise state.error
        return results


def local_world(ranks: int) -> LocalWorld:
    """A world of ``ranks`` ranks in this process: tests, debugging and numerics on a laptop.

    >>> local_world(ranks=2).ranks
    2
    """
    return LocalWorld(ranks)


class LocalGroup:
    """Stands where a ProcessGroup stands, for one rank of a :class:`LocalWorld`."""

    def __init__(self, rank: int, state: _State) -> None:
        self.rank, self.ranks = rank, state.ranks
        self.wire = LocalWire(rank, state)

    def __repr__(self) -> str:
        return f"LocalGroup(rank {self.rank} of {self.ranks})"


class LocalWire:
    """Messages between threads. What is sent is copied at once, as a network would."""

    def __init__(self, rank: int, state: _State) -> None:
        self.rank, self.ranks, self._state = rank, state.ranks, state
        self.board = LocalBoard(rank, state)
        self._rounds = 0

    def warm_up(self, device: torch.device, channels: int = 1) -> None:
        """Nothing to connect."""

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], channel: int = 0, about: object = ""
    ) -> _LocalPending:
        for peer, buffer in sends:
            self._state.mail[self.rank, peer, channel].append(buffer.detach().clone())
        tickets = []
        for peer, buffer in receives:  # the n-th receive from a peer gets its n-th message on this channel
            lane = peer, self.rank, channel
            tickets.append((lane, self._state.asked[lane], buffer))
            self._state.asked[lane] += 1
        return _LocalPending(self, tickets, about)

    def all_reduce(self, tensor: Tensor) -> None:
        everyone = self.all_gather(tensor)
        with torch.no_grad():
            total = everyone[0].clone()
            for other in everyone[1:]:
                total += other
            tensor.copy_(total)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        self._rounds += 1
        table = self._state.tables[self._rounds]
        table[self.rank] = tensor.detach().clone()
        self._state.wait_until(self.rank, lambda: len(table) == self.ranks, f"collective {self._rounds}")
        everyone = [table[rank].clone() for rank in range(self.ranks)]
        self._state.read[self._rounds] += 1
        if self._state.read[self._rounds] == self.ranks:
            del self._state.tables[self._rounds], self._state.read[self._rounds]
        return everyone

    def receive(self, lane: Lane, number: int, buffer: Tensor, about: object) -> None:
        """Wait for the message of this number that comes by ``lane``, and copy it into ``buffer``."""
        peer, _, channel = lane
        box, taken = self._state.mail[lane], self._state.taken[lane]
        if number >= taken + len(box):
            what = f"message {number} of rank {peer}" + (f" on channel {channel}" if channel else "")
            what += f" ({text})" if (text := str(about)) else ""
            self._state.wait_until(self.rank, lambda: number < taken + len(box), what)
        message = box[number - taken]
        if message.shape != buffer.shape or message.dtype != buffer.dtype:
            raise WireError(
                f"rank {self.rank} expects {tuple(buffer.shape)} {buffer.dtype} from rank {peer}, "
                f"which sent {tuple(message.shape)} {message.dtype}"
            )
        buffer.copy_(message)
        box[number - taken] = None
        while box and box[0] is None:
            box.popleft()
            self._state.taken[lane] += 1


class LocalBoard:
    """Notes between threads. Nobody waits in vain here: the world says so at once, so there is nothing to tell others."""

    seconds = math.inf
    session = ""

    def __init__(self, rank: int, state: _State) -> None:
        self.rank, self.ranks, self._state = rank, state.ranks, state

    def post(self, key: str, note: str) -> None:
        self._state.notes[key] = note

    def read(self, keys: Sequence[str]) -> list[str]:
        return [self._state.notes[key] for key in keys]

    def missing(
        self, keys: Sequence[str], seconds: float, what: str, meanwhile: Callable[[], None] | None = None
    ) -> list[str]:
        notes = self._state.notes

        def ready() -> bool:
            if meanwhile is not None:
                meanwhile()
            return all(key in notes for key in keys)

        if seconds:
            self._state.wait_until(self.rank, ready, what)
        return [key for key in keys if key not in notes]

    def remove(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._state.notes.pop(key, None)

    def waiting(self, what: str) -> None:
        """Nobody has to be told."""

    def report(self, trouble: str) -> None:
        """The world ends with the first error."""

    def distress(self, trouble: str) -> str:
        return ""


@dataclass
class _LocalPending:
    wire: LocalWire
    tickets: list[tuple[Lane, int, Tensor]]
    about: object

    def wait(self) -> None:
        for lane, number, buffer in self.tickets:
            self.wire.receive(lane, number, buffer, self.about)
        self.tickets = []


@dataclass
class _State:
    """What the ranks of one run share. Only the holder of the baton touches it."""

    ranks: int
    mail: dict[Lane, deque[Any]] = field(default_factory=lambda: defaultdict(deque))
    asked: dict[Lane, int] = field(default_factory=lambda: defaultdict(int))
    taken: dict[Lane, int] = field(default_factory=lambda: defaultdict(int))
    tables: dict[int, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    notes: dict[str, str] = field(default_factory=dict)
    read: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    error: BaseException | None = None
    batons: list[threading.Semaphore] = field(init=False)
    waiting: dict[int, tuple[Callable[[], bool], str]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.batons = [threading.Semaphore(1 if rank == 0 else 0) for rank in range(self.ranks)]

    def take_baton(self, rank: int) -> None:
        self.batons[rank].acquire()
        self._stop_if_failed()

    def wait_until(self, rank: int, ready: Callable[[], bool], what: str) -> None:
        """Hand the baton over until ``ready()``; raise :class:`DeadlockError` if nobody is left to make it so."""
        if ready():
            return
        self.waiting[rank] = (ready, what)
        self._pass_on(rank)
        self.batons[rank].acquire()
        self.waiting.pop(rank, None)
        self._stop_if_failed()

    def fail(self, rank: int, error: BaseException) -> None:
        if self.error is None:
            self.error = error
            error.add_note(f"(rank {rank} of a local world of {self.ranks})") if hasattr(error, "add_note") else None

    def leave(self, rank: int) -> None:
        self.gone.add(rank)
        self._pass_on(rank)

    def _pass_on(self, rank: int) -> None:
        """Give the baton to the next rank that can run; after a failure to anybody who is left."""
        others = [(rank + i) % self.ranks for i in range(1, self.ranks + 1)]
        alive = [r for r in others if r not in self.gone]
        for other in alive:
            ready = self.waiting[other][0] if other in self.waiting else lambda: True
            if self.error is not None or ready():
                self.batons[other].release()
                return
        if alive:
            who = "; ".join(f"rank {r} waits for {self.waiting[r][1]}" for r in sorted(alive))
            left = f"; ranks {sorted(self.gone)} have returned" if self.gone else ""
            self.error = DeadlockError(f"local_world: everybody waits: {who}{left}")
            self.batons[alive[0]].release()

    def _stop_if_failed(self) -> None:
        if self.error is not None:
            raise WireError("local_world: another rank failed") from self.error


def _settings_of_this_thread() -> Callable[[], AbstractContextManager[None]]:
    """The caller's grad mode and autocast, for threads that would start with the defaults.

    Backward must run in the thread of its rank: with a worker thread for all ranks, the first one to wait would block it.
    """
    grad = torch.is_grad_enabled()
    casts = {d: torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}

    @contextmanager
    def inherited() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            for device, dtype in casts.items():
                stack.enter_context(torch.autocast(device, dtype=dtype))
            yield

    return inherited
