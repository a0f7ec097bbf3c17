"""Ranks at their store: one works while the others wait, none waits for ever, and nothing of an earlier attempt is believed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist
from processes import ROOT

import notices
import preemption
from meeting import agree_on_name
from notices import Notices
from run_options import UsageError


@pytest.fixture
def store() -> dist.Store:
    """What torchrun would give them."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def on_ranks(
    store: dist.TCPStore, act: Callable[[Notices, int], Any], size: int = 3, patience: float = 30.0
) -> list[Any]:
    """What ``act`` returns on each rank, or what it raises; ranks are threads, each with a connection of its own."""

    def one(rank: int) -> Any:
        mine = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        try:
            return act(Notices(mine, rank, size, patience), rank)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_one_rank_works_and_all_know_what_came_of_it(store: dist.TCPStore) -> None:
    """Also many times in a row; and nothing is left at the store of what has been read."""
    calls: list[int] = []

    def act(ranks: Notices, rank: int) -> list[Any]:
        return [ranks.once("work", lambda n=n: calls.append(rank) or [n, None]) for n in range(3)] + [  # type: ignore[misc, func-returns-value]
            ranks.collect("what each has", {"rank": rank})
        ]

    everyone = [{"rank": rank} for rank in range(3)]
    assert on_ranks(store, act) == [[[0, None], [1, None], [2, None], everyone]] * 3
    assert calls == [0, 0, 0]
    assert store.num_keys() <= 2  # one of torch's own


@pytest.mark.parametrize(
    ("error", "type_"), [(UsageError("no such file"), UsageError), (OSError("full"), RuntimeError)]
)
def test_a_failure_of_the_one_is_an_error_of_all(store: dist.TCPStore, error: Exception, type_: type) -> None:
    """Or the others would wait in the next collective for a rank that has ended."""

    def fail() -> None:
        raise error

    first, *others = on_ranks(store, lambda ranks, rank: ranks.once("the index", fail))
    assert first is error
    assert all(type(other) is type_ and str(error) in str(other) for other in others)


def test_a_rank_that_stops_is_not_waited_for(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without signs of life waiting ends with a sentence; with them it lasts as long as the work."""
    monkeypatch.setattr(notices, "SIGN", 0.05)
    work = lambda: time.sleep(0.6)  # noqa: E731
    assert on_ranks(store, lambda ranks, rank: ranks.once("slow", work), patience=0.3) == [None] * 3

    def stopped(ranks: Notices, rank: int) -> Any:
        return None if rank == 0 else ranks.once("stopped", work)

    _, *others = on_ranks(store, stopped, patience=0.3)
    assert all("stopped: rank 0 has given no sign of life for 0.3 s" in str(error) for error in others)


def test_a_rank_that_does_not_speak_is_named(store: dist.TCPStore) -> None:
    """On every rank that does."""
    silent = on_ranks(store, lambda ranks, rank: None if rank == 1 else ranks.collect("it", rank), patience=0.3)
    assert all("rank 1 did not say 'it' within 0.3 s" in str(silent[rank]) for rank in (0, 2))


def test_an_attempt_gets_a_name_that_none_before_it_had(store: dist.TCPStore) -> None:
    """Processes of the attempt before have left their numbers at the store, one of them unanswered."""

    def name(rank: int) -> str:
        return agree_on_name(dist.TCPStore("127.0.0.1", store.port, is_master=False), rank, 3, 20.0)

    store.set("here/2", "a process that died before it was answered")
    seen = set()
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            names = set(pool.map(name, range(3)))
        assert len(names) == 1
        seen |= names
    assert len(seen) == 3


def test_ranks_that_do_not_start_are_named(store: dist.TCPStore) -> None:
    """By both sides."""
    with pytest.raises(RuntimeError, match=r"rank\(s\) \[1, 2\] did not start within 0.1 s of rank 0"):
        agree_on_name(store, 0, 3, 0.1)
    with pytest.raises(RuntimeError, match=r"rank 0 did not start within 0.1 s of rank 1"):
        agree_on_name(store, 1, 3, 0.1)


def heard(told: preemption.Preemption) -> int:
    """The signal, once the thread has read it."""
    for _ in range(500):
        if told.asked:
            break
        time.sleep(0.01)
    return told.asked


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_is_noted_and_does_nothing_else(number: signal.Signals) -> None:
    """And afterwards it does what it did before."""
    before = signal.getsignal(number)
    with preemption.listen() as told:
        assert told.asked == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # an echo: a launcher passes on what its processes have got already
        assert heard(told) == number
    assert signal.getsignal(number) == before


SECOND = """
import os, signal, sys, threading, time
import preemption
preemption.ECHO = 0.2
with preemption.listen() as told:
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print("goes on", told.asked, flush=True)
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    threading.Lock().acquire() and threading.Event().wait(60)
"""


def test_a_second_sigterm_ends_at_once() -> None:
    """Also while the main thread waits for something that does not come."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SECOND], cwd=ROOT / "launch", capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stdout) == (143, "goes on 15\n"), done
    assert "ends at once, without a checkpoint" in done.stderr
    assert time.monotonic() - began < 45


def test_rank_0_gives_signs_of_life_while_it_waits_for_a_slow_rank(
    store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the others would give up on it, who is well, and not on the one that does not come."""
    monkeypatch.setattr(notices, "SIGN", 0.05)

    def act(ranks: Notices, rank: int) -> Any:
        if rank == 1:
            time.sleep(1.0)
            return dist.TCPStore("127.0.0.1", store.port, is_master=False).add("signs", 0), ranks.collect("it", rank)
        return ranks.collect("it", rank)

    first, (signs, second) = on_ranks(store, act, size=2)
    assert first == second == [0, 1]
    assert signs > 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_told_for_itself() -> None:
    """A worker that is ended has not told its parent to stop, and ends."""
    with preemption.listen() as told:
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.2)
        assert (os.waitstatus_to_exitcode(status), told.asked) == (-signal.SIGTERM, 0)
