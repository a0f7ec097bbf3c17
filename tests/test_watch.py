"""Transfers that only a GPU waits for, with works and a clock that a test holds in its hands."""

from __future__ import annotations

import math
import weakref
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringflash as rf
from ringflash import distributed
from ringflash.distributed import DistributedWire
from ringflash.errors import PeerError, WireError
from ringflash.watch import Watch


class Work:
    def __init__(self) -> None:
        self.done = False

    def is_completed(self) -> bool:
        return self.done


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Looks when it is told to, and not by itself."""
    monkeypatch.setattr("threading.Thread.start", lambda thread: None)
    return Watch(now=clock)


def test_what_is_completed_is_forgotten(watch: Watch, clock: Clock) -> None:
    """Thousands of hops leave nothing behind, and a late look finds nothing wrong with them."""
    works = [Work() for _ in range(3)]
    for work in works:
        watch.add(work, 5.0, pytest.fail)
    assert len(watch._under_way) == 3
    for work in works:
        work.done = True
    watch.add(Work(), 5000.0, pytest.fail)
    assert len(watch._under_way) == 1
    clock.now += 1000
    watch.look()


def test_what_is_overdue_is_reported_once(watch: Watch, clock: Clock) -> None:
    """One line about a rank that never came, not one a second."""
    said: list[str] = []
    watch.add(Work(), 5.0, lambda: said.append("overdue"))
    watch.add(Work(), 50.0, lambda: said.append("later"))
    for seconds, expected in ((4.9, []), (0.2, ["overdue"]), (0.0, ["overdue"]), (50, ["overdue", "later"])):
        clock.now += seconds
        watch.look()
        assert said == expected


def test_a_work_is_asked_by_another_thread_only_when_its_time_is_up(watch: Watch, clock: Clock) -> None:
    """Asking is a call of CUDA, and a graph that the host captures meanwhile would be lost."""

    class Asked(Work):
        def is_completed(self) -> bool:
            raise AssertionError("asked")

    watch.add(Asked(), 5.0, pytest.fail)
    watch.look()
    clock.now += 6
    with pytest.raises(AssertionError, match="asked"):
        watch.look()


def test_a_work_of_a_group_that_is_gone_ends_the_watch_over_no_other(watch: Watch, clock: Clock) -> None:
    """Asking it raises: it is nobody's any more, and the transfers of other groups are looked after as before."""

    class Gone(Work):
        def is_completed(self) -> bool:
            raise RuntimeError("NCCL communicator was aborted")

    said: list[str] = []
    watch.add(Gone(), 5.0, pytest.fail)
    watch.add(Work(), 5.0, lambda: said.append("overdue"))
    clock.now += 6
    watch.look()
    assert said == ["overdue"]


class OnGpu(Work):
    def wait(self) -> None:
        if self.done:
            raise RuntimeError("NCCL communicator was aborted")


@pytest.fixture
def wire(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A wire without a group, whose transfers are looked after by ``watch``."""

    class Board:
        def name(self, rank: int) -> str:
            return f"rank {rank}"

        def distress(self, trouble: str) -> str:
            return ""

    monkeypatch.setattr(distributed, "watch", watch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    wire = DistributedWire.__new__(DistributedWire)
    wire.rank, wire.ranks, wire._failure = 0, 2, None
    vars(wire).update(seconds=5.0, board=Board())
    return wire


def test_what_is_under_way_holds_no_buffers(wire: Any, watch: Watch) -> None:
    """A thousand hops in the second between two looks: their names are kept, and not what they brought."""

    class Hop:
        def __init__(self) -> None:
            self.room = torch.ones(8)

        def __str__(self) -> str:
            return "hop"

    hop = Hop()
    room = weakref.ref(hop.room)
    wire.wait_for(OnGpu(), True, hop)
    del hop
    assert room() is None and len(watch._under_way) == 1


def test_a_wait_that_fails_on_a_gpu_names_the_peer(wire: Any) -> None:
    """NCCL's own error knows no hop."""
    work = OnGpu()
    work.done = True
    with pytest.raises(PeerError, match=r"hop 0: the connection to rank 1 broke under 8 bytes .NCCL communicator was"):
        wire.wait_for(work, True, "hop 0", [distributed._Move(False, 1, 8)])


def test_of_hops_behind_each_other_the_first_is_reported(wire: Any, watch: Watch, clock: Clock, capsys: Any) -> None:
    """The stream holds hundreds behind the one that did not come: they are its echo, and name other ranks."""
    for hop in range(3):
        wire.wait_for(OnGpu(), True, f"hop {hop}", [distributed._Move(False, hop, 8)])
    clock.now += 10
    watch.look()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "hop 0: 8 bytes did not come from rank 0 within 5 s" in said[0]
    assert wire._failure.startswith("hop 0")


@pytest.fixture
def seconds_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How long a rank waits, in a group with such a time-out and such an environment."""

    def seconds(theirs: float | None, given: str | None = None) -> float:
        limit = None if theirs is None else timedelta(seconds=theirs)
        monkeypatch.setattr(distributed, "_timeout", lambda group: limit)
        monkeypatch.setattr(DistributedWire, "_living_parent", lambda wire: None)
        monkeypatch.delenv("RINGFLASH_TIMEOUT", raising=False)
        if given is not None:
            monkeypatch.setenv("RINGFLASH_TIMEOUT", given)
        return DistributedWire.__new__(DistributedWire).seconds

    return seconds


def test_a_rank_waits_for_less_long_than_its_group(seconds_of: Any) -> None:
    """Our error knows hop, rank and host, so it has to come first; and nobody waits for half an hour."""
    assert seconds_of(60) == pytest.approx(48)
    assert seconds_of(1800) == 600
    assert seconds_of(None) == 600
    assert seconds_of(60, "3.5") == 3.5
    assert seconds_of(None, "100000") == 100_000


@pytest.mark.parametrize("given", ["0", "-1", "60", "61", "nan", "inf", "soon", ""])
def test_a_time_that_could_not_be_kept_is_refused(seconds_of: Any, given: str) -> None:
    """The group would end the wait first, or it would never end."""
    with pytest.raises(ValueError, match=r"RINGFLASH_TIMEOUT is .* less than the group's own time-out, which is 60"):
        seconds_of(60, given)
    assert math.isfinite(seconds_of(60))


def test_a_group_that_was_destroyed_is_named(tmp_path: Any) -> None:
    """And one that is made anew afterwards is another one, with a wire of its own."""

    def start(number: int) -> None:
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / str(number)), 1), rank=0, world_size=1)

    start(0)
    old = rf.Sharding(4)
    x = torch.ones(1, 4, 1, 8)
    rf.ring_attention(x, x, x, old)
    wire = distributed.wire_of(dist.group.WORLD)
    dist.destroy_process_group()
    with pytest.raises(WireError, match="was destroyed; build shardings and wrappers anew"):
        wire._living_parent()
    start(1)
    try:
        rf.ring_attention(x, x, x, rf.Sharding(4))
        assert distributed.wire_of(dist.group.WORLD) is not wire
    finally:
        dist.destroy_process_group()
