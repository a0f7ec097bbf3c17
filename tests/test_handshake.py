"""When ranks compare their calls, and what they compare beside the texts: digests, numbers, and waiting that ends."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringflash as rf
from ringflash.backend import select
from ringflash.board import StoreBoard
from ringflash.check import MODES
from ringflash.door import enter
from ringflash.errors import DisagreementError, NonFiniteError, RingflashError
from ringflash.reference import Scoring

LENGTH = 24
DOCUMENTS = tuple(range(0, 4 * LENGTH + 1, 4))


class Overheard:
    """A group that counts the notes and the messages of its rank."""

    def __init__(self, group: Any) -> None:
        self.rank, self.ranks, self.wire, self.board = group.rank, group.ranks, self, self
        self._wire, self.notes, self.sent = group.wire, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wire if hasattr(self._wire, name) else self._wire.board, name)

    def post(self, key: str, note: str) -> None:
        self.notes += 1
        self._wire.board.post(key, note)

    def exchange(self, sends: Sequence[Any], *rest: Any, **more: Any) -> Any:
        self.sent += len(sends)
        return self._wire.exchange(sends, *rest, **more)


def call(
    group: Any,
    *,
    length: int = LENGTH,
    mask: rf.Mask = rf.causal,
    layout: Any = "zigzag",
    route: Any = "ring",
    check: str | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    v_dim: int = 8,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    poison: str = "",
    **options: Any,
) -> torch.Tensor:
    """One forward; what is not said is the same on all ranks."""
    s = rf.Sharding(length, group, mask, layout, route, check=check)
    shapes = {"query": (heads, dim), "key": (kv_heads, dim), "value": (kv_heads, v_dim)}
    q, k, v = (torch.ones(batch, s.local_length, *shape, dtype=dtype) for shape in shapes.values())
    if poison:
        {"query": q, "key": k, "value": v}[poison][0, -1] = torch.nan
    return rf.ring_attention(q, k, v, s, **options)


def what_ranks_say(
    odd: int, kind: type[Exception], usual: dict[str, Any], differs: dict[str, Any], ranks: int = 3
) -> list[str]:
    """The errors of all ranks, of which one makes another call than the others; nothing may have been sent."""

    def one_rank(group: Any) -> str:
        overheard = Overheard(group)
        with pytest.raises(kind) as raised:
            call(overheard, **usual, **(differs if group.rank == odd else {}))
        assert overheard.sent == 0
        return str(raised.value)

    return rf.local_world(ranks).run(one_rank)


def what_two_say(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The same of two ranks, each with a call of its own."""

    def one_rank(group: Any) -> str:
        with pytest.raises(DisagreementError) as raised:
            call(group, **(second if group.rank else first))
        return str(raised.value)

    return rf.local_world(2).run(one_rank)


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "key heads": ({"kv_heads": 4}, "key heads: 2 on {others} and 4 on rank {odd}"),
    "head_dim of value": ({"v_dim": 16}, "head_dim of value: 8 on {others} and 16 on rank {odd}"),
    "dropout_p": ({"dropout_p": 0.5, "seed": 1}, "dropout_p: 0.0 on {others} and 0.5 on rank {odd}"),
    "deterministic": ({"deterministic": True}, "deterministic: False on {others} and True on rank {odd}"),
    "sinks": ({"sinks": torch.zeros(4)}, "sinks: none on {others} and [4] float32 on rank {odd}"),
    "alibi_slopes": ({"alibi_slopes": torch.ones(4)}, "alibi_slopes: none on {others} and [4] float32 on rank {odd}"),
}


@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("field", DIFFERENCES)
def test_options_that_differ_are_named_before_anything_is_sent(field: str, odd: int) -> None:
    """In peers each of these runs to its end and returns wrong numbers, or hangs."""
    differs, words = DIFFERENCES[field]
    others = "ranks " + ", ".join(str(rank) for rank in range(3) if rank != odd)
    if odd == 0:  # whoever posted first is named first
        words = words.partition(": ")[0]
    for rank, said in enumerate(what_ranks_say(odd, DisagreementError, {}, differs)):
        assert f"rank {rank} of 3" in said and words.format(others=others, odd=odd) in said
        assert f"on rank {odd}" in said and f"on {others}" in said


def test_documents_that_look_alike_differ() -> None:
    """Of a thousand offsets a text shows a few: a digest is compared."""
    moved = list(DOCUMENTS)
    moved[12] += 1
    usual, other = ({"length": 4 * LENGTH, "mask": rf.causal & rf.documents(x)} for x in (DOCUMENTS, moved))
    assert str(usual["mask"]) == str(other["mask"])
    for said in what_two_say(usual, other):
        assert "mask (by digest): " in said


def test_layouts_of_the_same_name_differ() -> None:
    """Zigzag of one's own, whose second half is another: what counts is who holds what."""
    mine, theirs = (
        {"layout": rf.Layout((tuple(map(range, a, b)), (range(*c),)), "mine")}
        for a, b, c in (((0, 18), (6, 24), (6, 18)), ((0, 20), (8, 24), (8, 20)))
    )
    for said in what_two_say(mine, theirs):
        assert "layout (by digest): " in said


def test_layouts_that_are_shown_alike_differ() -> None:
    """A layout shows its first ranks: those that it leaves out are compared, too."""
    runs = [(range(4 * rank, 4 * rank + 4),) for rank in range(6)]
    mine, theirs = (rf.Layout(tuple(runs[i] for i in order)) for order in ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 5, 4)))

    def one_rank(group: Any) -> str:
        with pytest.raises(DisagreementError) as raised:
            call(group, layout=theirs if group.rank == 5 else mine)
        return str(raised.value)

    for said in rf.local_world(6).run(one_rank):
        assert "layout (by digest): " in said


def test_a_route_of_ones_own_is_what_it_does() -> None:
    """What Python calls an object that says nothing of itself is another text in every process."""

    class Mine:
        def tour(self, ranks: int) -> Any:
            return rf.double_ring(1, ranks).tour(ranks)

    rf.local_world(ranks=2).run(lambda group: call(group, route=Mine()))


@pytest.mark.parametrize(("check", "compared"), [("off", [0, 0, 0, 0]), (None, [1, 0, 1, 0]), ("always", [1, 1, 1, 1])])
def test_what_was_agreed_is_not_compared_again(check: str | None, compared: list[int]) -> None:
    """Each new call and each new mask once; in every call only where that is asked for."""

    def one_rank(group: Any) -> list[int]:
        overheard, notes = Overheard(group), []
        for mask in (rf.causal, rf.causal, rf.window(5, 0), rf.causal):
            before = overheard.notes
            call(overheard, mask=mask, check=check)
            notes.append(int(overheard.notes > before))
        return notes

    assert rf.local_world(3).run(one_rank) == [compared] * 3


@pytest.mark.parametrize("check", [None, "always"])
def test_a_disagreement_after_agreement_is_found_too(check: str | None) -> None:
    """The second call is not like the first: every rank knows it anew, or compares every time."""

    def one_rank(group: Any) -> str:
        overheard = Overheard(group)
        call(overheard, check=check, backend="reference")
        with pytest.raises(DisagreementError) as raised:
            call(overheard, check=check, backend="reference", softcap=1.0 + (group.rank == 1))
        return str(raised.value)

    for said in rf.local_world(3).run(one_rank):
        assert "call 2 (forward): softcap: 1.0 on ranks 0, 2 and 2.0 on rank 1" in said


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_nan_is_reported_by_all_before_it_travels(name: str) -> None:
    """With the rank that has it, and where."""
    for said in what_ranks_say(1, NonFiniteError, {"check": "verify"}, {"poison": name}):
        assert f"is not made. rank 1: {name}[0, 7, 0, 0] is nan" in said


def test_a_captured_call_and_an_eager_one_are_the_same() -> None:
    """One rank may fall back to eager (its shard has another length): what a graph leaves to "auto" is settled alike."""

    def one_rank(group: Any) -> torch.Tensor:
        s = rf.Sharding(LENGTH, group)
        q = torch.ones(1, s.local_length, 2, 8)
        backend = "auto" if group.rank else select("auto", q, q, Scoring(1.0)).name
        given = (q, q, q, s.handle, None, None, torch.tensor(0), 1.0, 0.0, 0.0, backend, False)
        return torch.ops.ringflash.attend(*given)[0]

    rf.local_world(2).run(one_rank)


@pytest.mark.parametrize("check", ["always", "verify"])
def test_a_call_that_a_graph_would_repeat_is_not_labelled(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replay would send the labels of the call that was captured, and read none."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    q: Any = SimpleNamespace(is_cuda=True, shape=(1, 4, 2, 8), dtype=torch.float32)
    watched: Any = (None, MODES[check], None)
    bound: Any = SimpleNamespace(watched=watched)
    with pytest.raises(RingflashError, match=f"check is '{check}' while a CUDA graph is captured"):
        enter("forward", bound, (q, q, q), Scoring(1.0), None, "triton", False)


def test_a_board_waits_no_longer_than_it_is_told() -> None:
    """And names the notes that are not there, of many."""
    store = dist.HashStore()
    board = StoreBoard(store, rank=0, ranks=5, seconds=0.05)
    for rank in (0, 2, 3):
        board.post(f"note/{rank}", "here")
    keys = [f"note/{rank}" for rank in range(5)]
    assert board.missing(keys, 0.05, "everybody") == ["note/1", "note/4"]
    assert board.missing(keys[2:4], 0.05, "some") == [] and board.read(keys[2:4]) == ["here", "here"]
