"""Notes on stores of every sort, who is missing, and what ranks say to each other when something has failed."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash import board as module
from ringflash.board import StoreBoard, printable


@pytest.fixture(params=["hash", "file", "tcp", "prefix"])
def store(request: Any, tmp_path: Any) -> dist.Store:
    """What ``torch.distributed`` may have been started with."""
    if request.param == "file":
        return dist.FileStore(str(tmp_path / "store"), -1)
    if request.param == "tcp":
        return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return dist.PrefixStore("group/1", dist.HashStore()) if request.param == "prefix" else dist.HashStore()


@pytest.fixture(autouse=True)
def a_short_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOMENT", 0.1)


def test_notes_are_posted_read_and_removed(store: dist.Store) -> None:
    """Of one key and of many, whatever the store can do at once; and removing what is not there is no error."""
    board = StoreBoard(store, 0, 3, 1.0)
    keys = ["a/0", "a/1", "a/2"]
    for key in keys:
        board.post(key, f"note {key}")
    assert board.read(keys) == [f"note {key}" for key in keys] and board.read(keys[:1]) == ["note a/0"]
    assert board.missing(keys, 0.0, "") == []
    board.remove(keys)
    board.remove(["never there"])
    assert board.missing(keys, 0.0, "") == keys


def test_distress_works_on_every_store_or_says_that_it_does_not(store: dist.Store) -> None:
    """A store that cannot append must not hide the error that is being raised."""
    text = StoreBoard(store, 0, 2, 1.0).distress("call 3 (forward): rank 1 did not come")
    assert "Nothing has been heard of rank 1" in text or "nobody could be asked" in text


@given(st.sets(st.integers(0, 99)))
@settings(max_examples=40)
def test_who_is_missing_is_found(there):
    """Exactly those, though a store only says whether all of some keys are there."""
    board = StoreBoard(dist.HashStore(), 0, 100, 1.0)
    keys = [f"round/{rank}" for rank in range(100)]
    for rank in there:
        board.post(keys[rank], "")
    assert board.missing(keys, 0.0, "") == [key for rank, key in enumerate(keys) if rank not in there]


def test_a_note_that_comes_late_is_waited_for() -> None:
    """Lateness below the time-out is no fault."""
    board = StoreBoard(dist.HashStore(), 0, 2, 5.0)
    late = threading.Timer(0.2, lambda: board.post("late", "here"))
    late.start()
    assert board.missing(["late"], 20.0, "") == []
    late.join()


def test_what_others_said_comes_in_the_order_in_which_they_said_it() -> None:
    """The first trouble is the cause, and those after it are its echo; who waits is quoted, who is silent is named."""
    store = dist.HashStore()
    boards = [StoreBoard(store, rank, 4, 5.0, name=lambda rank: f"rank {rank} (node{rank})") for rank in range(4)]
    boards[2].distress("the checksum is wrong")
    boards[0].waiting("rank 2, in call 7")
    text = boards[1].distress("the connection to rank 2 broke")
    assert text.index("rank 2 (node2): the checksum is wrong") < text.index(
        "rank 0 (node0): waits for rank 2, in call 7"
    )
    assert text.endswith("Nothing has been heard of rank 3 (node3).")
    boards[0].waiting("")
    assert "waits for" not in boards[3].distress("late")


def test_trouble_of_long_ago_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that somebody caught yesterday has nothing to do with this one."""
    boards = [StoreBoard(dist.HashStore(), rank, 2, 5.0) for rank in range(1)]
    yesterday = StoreBoard(boards[0].store, 1, 2, 5.0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 1000.0)
        yesterday.report("old trouble")
    assert "old trouble" not in boards[0].distress("new trouble")


GARBAGE = [
    "",
    "no json",
    "[]",
    "3",
    '{"rank": 1}',
    '{"rank": 99, "at": 9e9, "trouble": "x"}',
    '{"rank": -1, "at": 9e9, "trouble": "x"}',
    '{"rank": 1e999, "at": 1, "trouble": "x"}',
    '{"rank": 1, "at": Infinity, "trouble": "x"}',
    '{"rank": 1, "at": NaN, "trouble": "x"}',
    "[" * 50_000,
    "\x00\x1b[2J",
]


@pytest.mark.parametrize("line", GARBAGE, ids=lambda line: ascii(line[:25]))
def test_garbage_between_the_lines_is_passed_over(line: str) -> None:
    """The error that is being raised is worth more than a complaint about a store."""
    store = dist.HashStore()
    store.set("ringflash/failures", line + "\n")
    other = StoreBoard(store, 1, 2, 5.0)
    other.report("a real trouble")
    assert "rank 1: a real trouble" in StoreBoard(store, 0, 2, 5.0).distress("mine")


def test_what_others_write_cannot_steer_a_terminal() -> None:
    """Whoever can write to the store writes into somebody's log."""
    assert printable("\x1b[2J\nhello") == "?[2J?hello"
    assert len(printable("x" * 10**6)) == 1000


def test_a_rank_that_goes_on_after_every_error_does_not_fill_the_store() -> None:
    """Its lines are counted."""
    store = dist.HashStore()
    board = StoreBoard(store, 0, 2, 5.0)
    for number in range(500):
        board.report(f"trouble {number}")
    assert len(store.get("ringflash/failures").splitlines()) <= 32


def test_a_store_that_has_died_is_said_to_be_dead() -> None:
    """And whose death that is likely to be."""

    class Dead:
        def append(self, key: str, value: str) -> None:
            raise dist.DistNetworkError("Broken pipe\nframe #0: ...")

    text = StoreBoard(Dead(), 1, 2, 5.0).distress("trouble")  # type: ignore[arg-type]
    assert (
        "The store is gone, which rank 0 holds unless a launcher does, so nobody could be asked (Broken pipe)" in text
    )


@pytest.mark.slow
def test_a_thousand_boards() -> None:
    """Notes of a thousand ranks are read at once, and who of them is missing takes ten questions each."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    boards = [StoreBoard(store, rank, 1000, 5.0) for rank in range(1000)]
    keys = [f"round/{rank}" for rank in range(1000)]
    for board, key in zip(boards, keys, strict=True):
        if board.rank % 100 != 7:
            board.post(key, json.dumps({"heads": "8"}))
    there = [key for rank, key in enumerate(keys) if rank % 100 != 7]
    assert len(boards[0].read(there)) == 990
    assert boards[0].missing(keys, 0.0, "") == [f"round/{rank}" for rank in range(7, 1000, 100)]
