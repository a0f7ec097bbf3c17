"""Transfers that only a GPU waits for, with works and a clock that a test holds in its hands."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringflash as rf
from ringflash import distributed
from ringflash.distributed import DistributedWire
from ringflash.errors import WireError
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
    assert watch.look() == 3
    for work in works:
        work.done = True
    clock.now += 1000
    assert watch.look() == 0


def test_what_is_overdue_is_reported_once(watch: Watch, clock: Clock) -> None:
    """One line about a rank that never came, not one a second."""
    said: list[str] = []
    watch.add(Work(), 5.0, lambda: said.append("overdue"))
    watch.add(Work(), 50.0, lambda: said.append("later"))
    clock.now += 4.9
    assert watch.look() == 2 and said == []
    clock.now += 0.2
    assert watch.look() == 1 and said == ["overdue"]
    assert watch.look() == 1 and said == ["overdue"]
    clock.now += 50
    assert watch.look() == 0 and said == ["overdue", "later"]


def test_a_work_of_a_group_that_is_gone_ends_neither_the_thread_nor_the_process(capsys: Any) -> None:
    """Asking it raises: it is nobody's any more, and the next group's transfers are looked after by the same thread."""
    rounds = iter(range(3))

    class Gone(Work):
        def is_completed(self) -> bool:
            raise RuntimeError("NCCL communicator was aborted")

    class Once(Watch):
        def look(self) -> int:
            if next(rounds) == 1:
                raise SystemExit
            return super().look()

    watch = Once()
    watch._under_way.append((0.0, Gone(), pytest.fail))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("time.sleep", lambda seconds: None)
        watch._look_after()
    assert watch._under_way == []
    assert "the watch over transfers met RuntimeError('NCCL communicator was aborted')" in capsys.readouterr().err


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
