"""Ranks agree on what they are about to do: all raise alike, all ranks and fields are named, and nothing is left behind."""

from __future__ import annotations

import json
import threading
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import ringflash as rf
from ringflash import accord as module
from ringflash import board
from ringflash.accord import Accord, accord_of
from ringflash.board import StoreBoard
from ringflash.errors import DisagreementError, IntegrityError, NonFiniteError, PeerError
from ringflash.terms import Terms, digest_of


@pytest.fixture(autouse=True)
def short_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """That ranks give each other to say what happened to them."""
    monkeypatch.setattr(board, "_MOMENT", 0.1)
    monkeypatch.setattr(module, "_GRACE", 0.2)


TEXTS = {"dtype": "float32", "heads": "8", "mask": "causal"}


def on_boards(boards: list[StoreBoard], work: Any) -> list[Any]:
    """``work(rank, accord)`` of every rank, each in a thread of its own on a real store; what it returned or raised."""
    found: list[Any] = [None] * len(boards)

    def live(rank: int) -> None:
        try:
            found[rank] = work(rank, accord_on(boards[rank]))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(len(boards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def accord_on(board: StoreBoard, session: str = "") -> Accord:
    """An accord that has this board and no wire; and has met the others before, in a ``session``."""
    accord = Accord((board.rank, board.ranks))
    accord._levels = [(board, [[rank] for rank in range(board.ranks)])]
    if session:
        accord._sessions[0] = module._Session(board, "ringflash/1")
        accord._sessions[0].name = session
    return accord


def hash_boards(ranks: int, seconds: float = 20.0) -> list[StoreBoard]:
    store = dist.HashStore()
    return [StoreBoard(store, rank, ranks, seconds) for rank in range(ranks)]


def comes(accord: Accord, texts: dict[str, str], name: str = "forward", **more: Any) -> int:
    """A call of these texts, as the door makes it."""
    key = (name, *texts.items())
    terms = Terms(texts, digest_of(texts))
    return accord.recall(key, terms.digest) or accord.enter(name, key, terms, texts, **more)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.fixed_dictionaries(dict.fromkeys("abc", st.sampled_from("xy"))), min_size=n, max_size=n)
    )
)
@settings(max_examples=60)
def test_every_rank_raises_the_same_and_all_ranks_and_fields_are_named(held):
    """An exception on one rank only would be a hang on the others; one that names half of them would mislead."""

    def one_rank(group: Any) -> str:
        accord = accord_of(group)
        texts = held[group.rank]
        try:
            comes(accord, texts)
        except DisagreementError as error:
            return str(error)
        return ""

    said = rf.local_world(len(held)).run(one_rank)
    differing = [field for field in "abc" if len({texts[field] for texts in held}) > 1]
    if not differing:
        assert said == [""] * len(held)
        return
    assert len({text.partition(": ")[2] for text in said}) == 1 and all(
        f"rank {rank} of {len(held)}" in text for rank, text in enumerate(said)
    )
    for field in differing:
        for value in "xy":
            ranks = [rank for rank, texts in enumerate(held) if texts[field] == value]
            assert f"{value} on {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}" in said[0]
    assert [field for field in "abc" if f" {field}: " in said[0]] == differing


def test_after_an_error_that_was_caught_ranks_still_agree_on_the_next_call():
    """Whoever catches the error and goes on must not be one call ahead of the others for ever."""

    def one_rank(group: Any) -> list[int]:
        accord, numbers = accord_of(group), []
        for texts in (TEXTS, TEXTS | {"heads": str(group.rank)}, TEXTS, TEXTS | {"heads": "4"}):
            try:
                numbers.append(comes(accord, texts))
            except DisagreementError:
                numbers.append(0)
        return numbers

    assert rf.local_world(3).run(one_rank) == [[1, 0, 3, 4]] * 3


def test_a_fault_of_one_rank_is_raised_on_all():
    """NaN in one rank's numbers: nobody sends anything, and everybody knows whose they are."""

    def one_rank(group: Any) -> str:
        fault = "value[0, 3, 1, 2] is nan, 1 of 64 are not finite" if group.rank == 2 else ""
        with pytest.raises(NonFiniteError) as caught:
            comes(accord_of(group), TEXTS, every_call=True, fault=fault)
        return str(caught.value)

    for rank, text in enumerate(rf.local_world(4).run(one_rank)):
        assert f"rank {rank} of 4" in text and "rank 2: value[0, 3, 1, 2] is nan" in text and "call 1 (forward)" in text


def test_what_is_remembered_is_bounded_and_forgotten_alike(monkeypatch: pytest.MonkeyPatch):
    """Packed documents bring a new sharding with every batch: a table that differs between ranks would be a hang."""
    monkeypatch.setattr(module, "_MOST", 10)

    def one_rank(group: Any) -> list[list[Any]]:
        accord, tables = accord_of(group), []
        for batch in range(25):
            comes(accord, TEXTS | {"mask": str(batch % 9)})
            tables.append(list(accord._agreed))
        return tables

    tables = rf.local_world(3).run(one_rank)
    assert tables[0] == tables[1] == tables[2]
    assert max(map(len, tables[0])) <= 10


def test_a_grid_learns_of_everybody_on_both_axes():
    """A rank differs from those in its row and its column; ranks that share neither with it must raise, too."""
    stores = {name: dist.HashStore() for name in ("row 0", "row 1", "column 0", "column 1", "column 2")}
    found: list[str] = [""] * 6

    def live(rank: int) -> None:
        row, column = divmod(rank, 3)
        heads = StoreBoard(stores[f"row {row}"], column, 3, 20.0)
        ring = StoreBoard(stores[f"column {column}"], row, 2, 20.0)
        accord = Accord((rank, 6))
        known = [[3 * r + c for c in range(3)] for r in range(2)]
        accord._levels = [(heads, [[3 * row + c] for c in range(3)]), (ring, known)]
        try:
            comes(accord, TEXTS | ({"heads": "4"} if rank == 4 else {}))
        except DisagreementError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("heads: 8 on ranks 0, 1, 2, 3, 5 and 4 on rank 4" in text for text in found), found


def test_notes_are_taken_away():
    """A store serves a job for weeks: a thousand new shardings may not leave a thousand notes."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    ranks = 2
    clients = [dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False) for _ in range(ranks)]
    before = server.num_keys()

    def work(rank: int, accord: Accord) -> int:
        return [comes(accord, TEXTS | {"mask": str(batch)}) for batch in range(300)][-1]

    boards = [StoreBoard(store, rank, ranks, 20.0) for rank, store in enumerate(clients)]
    assert on_boards(boards, work) == [300] * ranks
    assert server.num_keys() - before <= 2 + ranks


@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_that_does_not_come_is_named_on_all_others(absent: int):
    """Whoever it is, and above all rank 0, who writes the verdicts: the others find out by themselves."""

    def work(rank: int, accord: Accord) -> int:
        return 0 if rank == absent else comes(accord, TEXTS)

    found = on_boards(hash_boards(3, seconds=0.3), work)
    for rank, error in enumerate(found):
        if rank != absent:
            assert isinstance(error, PeerError)
            assert f"rank {absent} did not come within 0.3 s" in str(error)
            assert f"Nothing has been heard of rank {absent}" in str(error)


def test_a_rank_that_comes_after_the_verdict_learns_of_it():
    """The late one must not wait for others that have given it up."""
    late = threading.Event()

    def work(rank: int, accord: Accord) -> int:
        comes(accord, TEXTS)
        if rank == 1:
            late.wait(20)
        try:
            return comes(accord, {**TEXTS, "dtype": "bfloat16"})
        finally:
            late.set()

    found = on_boards(hash_boards(2, seconds=2.0), work)
    assert all(isinstance(error, PeerError) and "rank 1 did not come" in str(error) for error in found)


def test_notes_of_all_are_no_verdict():
    """Rank 0 stopped after its own note: who waits for its verdict may not take silence for consent."""
    first, second = hash_boards(2, seconds=0.1)
    first.post("ringflash/1/session/1/0", json.dumps({json.dumps({"mask": "full"}): [0]}))
    with pytest.raises(PeerError, match=r"rank 0 did not come within 0\.1 s"):
        comes(accord_on(second, "session"), TEXTS)


def test_who_waits_with_something_new_says_what_is_new():
    """The others go on with what was agreed, and wait for this rank in a hop: this line is what they quote."""

    def work(rank: int, accord: Accord) -> int:
        comes(accord, TEXTS)
        return comes(accord, TEXTS | {"dtype": "float16"}) if rank == 1 else 0

    error = on_boards(hash_boards(2, seconds=0.3), work)[1]
    assert isinstance(error, PeerError)
    assert "call 2 (forward), which is new to it: dtype: float16 on rank 1 and float32 as agreed before" in str(error)
    assert "go on with what was agreed, or are dead" in str(error)


GARBAGE = [
    "",
    "{",
    "[]",
    "null",
    '{"a": 3}',
    '{"a": ["x"]}',
    '{"a": [1e999]}',
    '{"a": [NaN]}',
    '{"a": [99]}',
    '{"a": [-1]}',
    '{"a": [true]}',
    '{"no json": [1]}',
    '{"[1]": [1]}',
    '{"{\\"call\\": [1]}": [1]}',
    "[" * 100_000,
    '{"a": [' + "9" * 10_000 + "]}",
    "__import__('os').abort()",
    "\x80\x04\x95",
]


@pytest.mark.parametrize("note", GARBAGE, ids=lambda note: ascii(note[:20]))
@pytest.mark.parametrize("rank", [0, 1])
def test_a_note_that_is_none_is_refused_by_name(note: str, rank: int):
    """The store is open to the network that the job runs in: what stands in it is read as text, and nothing is run."""
    store = dist.HashStore()
    boards = [StoreBoard(store, r, 2, 0.3) for r in range(2)]
    store.set("ringflash/1/met/1/1" if rank == 0 else "ringflash/1/met/1/verdict", note)
    with pytest.raises((IntegrityError, DisagreementError)) as caught:
        comes(accord_on(boards[rank], "met"), TEXTS)
    assert f"rank {rank} of 2" in str(caught.value) and "no survey" in str(caught.value)


def test_a_note_of_a_gigabyte_is_not_read_as_one():
    """Sizes are capped on both sides."""
    store = dist.HashStore()
    store.set("ringflash/1/met/1/1", "x" * (2 << 20))
    with pytest.raises(IntegrityError, match="1,048,576 are allowed"):
        comes(accord_on(StoreBoard(store, 0, 2, 0.3), "met"), TEXTS)
    with pytest.raises(ValueError, match="1,048,576 are allowed"):
        StoreBoard(store, 0, 2, 0.3).post("key", "x" * (2 << 20))


def test_a_thousand_ranks_that_all_differ_still_make_one_readable_error():
    """A verdict tells so many texts apart and no more, and a sentence names so many ranks."""
    ranks = 200
    found = on_boards(hash_boards(ranks), lambda rank, accord: comes(accord, TEXTS | {"heads": str(rank)}))
    assert Counter(map(type, found)) == {DisagreementError: ranks}
    assert max(len(str(error)) for error in found) < 5_000


def test_a_call_that_is_known_asks_nobody():
    """One look into a table: the board is not touched, or the cost would be that of a message."""

    def one_rank(group: Any) -> int:
        accord = accord_of(group)
        comes(accord, TEXTS)
        rounds = accord._round
        for _ in range(5):
            comes(accord, TEXTS)
        return accord._round - rounds

    assert rf.local_world(2).run(one_rank) == [0, 0]


@pytest.mark.parametrize(
    "differs",
    [
        "dtype",
        "heads",
        "head_dim",
        "scale",
        "softcap",
        "seed",
        "backend",
        "batch",
        "mask",
        "layout",
        "route",
        "length",
        "check",
        "documents",
    ],
)
def test_whatever_differs_between_ranks_is_named_on_all(differs: str):
    """Through the public function: all that changes what a rank sends or expects is compared before it is sent."""
    many = [[0, *range(4 + i, 44, 2), 48] for i in range(2)]  # as texts they are cut short, and alike

    def one_rank(group: Any) -> str:
        odd = group.rank == 1 and differs
        mask = rf.window(3, 0) if odd == "mask" else rf.causal
        if differs == "documents":
            mask = rf.documents(many[group.rank == 1])
        s = rf.Sharding(
            51 if odd == "length" else 48,
            group,
            mask,
            "contiguous" if odd == "layout" else "striped",
            "gather" if odd == "route" else "ring",
            check="always" if odd == "check" else "first",
        )
        heads, dim = (2 if odd == "heads" else 4), (4 if odd == "head_dim" else 8)
        dtype = torch.float64 if odd == "dtype" else torch.float32
        q = torch.ones(2 if odd == "batch" else 1, s.local_length, heads, dim, dtype=dtype)
        options: dict[str, Any] = {"scale": 1.0, "backend": "reference", "dropout_p": 0.1, "seed": 3}
        options |= {"scale": {"scale": 0.5}, "softcap": {"softcap": 2.0}, "seed": {"seed": 4}}.get(odd or "", {})
        options |= {"backend": "auto", "dropout_p": 0.0} if differs == "backend" else {}
        options |= {"backend": "reference"} if odd == "backend" else {}
        with pytest.raises(DisagreementError) as caught:
            rf.ring_attention(q, q, q, s, **options)
        return str(caught.value)

    named = {"heads": "query heads", "documents": "mask"}.get(differs, differs)
    for text in rf.local_world(3).run(one_rank):
        assert "ranks disagree on call 1 (forward)" in text and f"{named}" in text
        assert "on ranks 0, 2" in text and "on rank 1" in text


def test_notes_name_no_code():
    """What ranks leave for each other is JSON of texts and numbers."""
    store = dist.HashStore()
    accord = accord_on(StoreBoard(store, 1, 2, 0.2), "met")
    with pytest.raises(PeerError):
        comes(accord, TEXTS)
    (text,) = json.loads(store.get("ringflash/1/met/1/1"))
    assert json.loads(text) == {"call": "1 (forward)", **TEXTS, "fault": ""}


@pytest.mark.parametrize("died_at", [1, 2, 3])
def test_notes_of_processes_that_died_are_not_taken_for_those_of_their_successors(died_at: int):
    """A launcher keeps its store over restarts: a verdict of the last attempt would pass for one on this call."""
    store = dist.HashStore()

    def attempt(texts: list[dict[str, str]], absent: int | None = None) -> list[Any]:
        boards = [StoreBoard(store, rank, 3, 5.0 if absent is None else 0.3) for rank in range(3)]

        def live(rank: int, accord: Accord) -> Any:
            for number in range(1, 5):
                if rank == absent and number == died_at:
                    return "died"
                comes(accord, {**texts[rank], "number": str(number)})
            return "done"

        return on_boards(boards, live)

    assert {type(x) for x in attempt([TEXTS] * 3, absent=died_at % 3)} == {PeerError, str}
    assert attempt([TEXTS] * 3) == ["done"] * 3
    other = {**TEXTS, "dtype": "float16"}
    for error in attempt([TEXTS, TEXTS, other]):
        assert isinstance(error, DisagreementError) and "float16 on rank 2" in str(error)
    assert attempt([other] * 3) == ["done"] * 3
