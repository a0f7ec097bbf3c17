"""Labels, checksums and looks at numbers: what is wrong is found and named, and what is right is left alone."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ringflash as rf
from ringflash import guard as module
from ringflash import operator
from ringflash.backend import Backend
from ringflash.check import MODES
from ringflash.errors import IntegrityError, NonFiniteError
from ringflash.freight import Freight, Parcel
from ringflash.guard import KEY_GRADIENTS, KEYS, Guard, Kind, checksum, unfit
from ringflash.needs import Part

PART = Part(2, ((3, 7),))


def parcel(label: int = 64, scale: float = 1.0) -> Parcel:
    """Keys and values of four tokens."""
    draw = torch.Generator().manual_seed(0)
    tensors = [scale * torch.randn(1, 4, 2, 8, generator=draw) for _ in range(2)]
    return Freight.like(tensors, label=label).pack(tensors)


def guard(mode: str = "verify", **what: Any) -> Guard:
    return Guard(MODES[mode], **({"call": 7, "name": "forward", "digest": 99, "rank": 1, "ranks": 3} | what))


@given(st.integers(0, 64 * 32 - 1))
@settings(max_examples=300)
def test_a_checksum_sees_every_flipped_bit(bit):
    """One bit on a link or in memory."""
    payload = torch.arange(256, dtype=torch.uint8)
    before = int(checksum(payload))
    payload[bit // 8] ^= 1 << bit % 8
    assert int(checksum(payload)) != before


@given(st.lists(st.integers(0, 64 * 32 - 1), min_size=2, max_size=2, unique=True), st.integers(0, 1000))
@settings(max_examples=300)
def test_a_checksum_sees_every_two_flipped_bits(bits, seed):
    """Two at once, above all the same bit of two words, as a bad lane would do: their changes must not cancel."""
    payload = torch.randint(0, 256, (256,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    before = int(checksum(payload))
    for bit in bits:
        payload[bit // 8] ^= 1 << bit % 8
    assert int(checksum(payload)) != before


@pytest.mark.parametrize("bit", [0, 31, 63])
@pytest.mark.parametrize("apart", [1, 2, 8, 1 << 10, (1 << 17) + 1])
def test_a_checksum_sees_one_lane_and_swapped_words(bit: int, apart: int) -> None:
    """The highest bits count as much as the lowest, also far apart, and across the blocks in which sums are taken."""
    words = torch.zeros(1 << 19, dtype=torch.int64)
    before = int(checksum(words.view(torch.uint8)))
    lane = torch.tensor(1 << bit if bit < 63 else -(1 << 63))
    words[[5, 5 + apart]] = lane
    assert int(checksum(words.view(torch.uint8))) != before
    words[5 + apart] = 0
    one = int(checksum(words.view(torch.uint8)))
    words[[5, 5 + apart]] = words[[5 + apart, 5]]
    assert int(checksum(words.view(torch.uint8))) != one


def test_a_checksum_is_the_sum_that_it_says() -> None:
    """Weights go on from block to block: the sum of a long message is that of its words, one by one."""
    payload = torch.randint(0, 256, (4 * (module._BLOCK + 10),), dtype=torch.uint8)
    whole = int(checksum(payload))
    words = payload.view(torch.int32).tolist()
    weights = ((2 * i + 1) * module._GOLDEN for i in range(len(words)))
    assert whole % 2**64 == sum(word * weight for word, weight in zip(words, weights, strict=True)) % 2**64


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"call": 8}, "call 7, not 8"),
        ({"digest": 98}, "agreement 99, not 98"),
        ({"kind": KEY_GRADIENTS}, "kind 1, not 3"),
        ({"source": 0}, "source 2, not 0"),
        ({"part": Part(2, ((3, 8),))}, "tokens 4, not 5"),
        ({"part": Part(2, ((4, 8),))}, "first token 3, not 4"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_another_message_is_named_field_by_field(wrong: dict[str, Any], says: str) -> None:
    """Stale, swapped or of another call: the error says what came and what should have."""
    message = guard("always").seal(parcel(), KEYS, 2, PART)
    here = guard("always", **{name: x for name, x in wrong.items() if name in ("call", "digest")})
    expected: dict[str, Any] = {"kind": KEYS, "source": 2, "part": PART} | wrong
    with pytest.raises(IntegrityError) as caught:
        here.admit(message, expected["kind"], expected["source"], expected["part"], "keys, from rank 0 of the ring")
    assert says in str(caught.value) and "from rank 0 of the ring" in str(caught.value)
    assert "rank 1 of 3: call" in str(caught.value)


def test_a_message_of_nobody_is_said_to_be_none() -> None:
    """Memory that was written over, or a sender that labels nothing."""
    message = parcel()
    message.buffer.zero_()
    with pytest.raises(IntegrityError, match="what came is no message of ringflash"):
        guard().admit(message, KEYS, 2, PART, "keys")


def test_what_is_right_is_let_in() -> None:
    """In every mode, and after a trip through a copy of the bytes."""
    for mode in MODES:
        here = guard(mode)
        sealed = here.seal(parcel(here.label), KEYS, 2, PART)
        room = Freight.like(sealed.tensors, label=here.label).blank(4)
        room.buffer.copy_(sealed.buffer)
        here.admit(room, KEYS, 2, PART, "keys")
        assert here.label == (64 if mode in ("always", "verify") else 0)


def test_a_changed_byte_names_tensors_and_both_sums_and_is_told_to_the_others() -> None:
    """Only the receiver can see it, and all others wait for it."""
    told: list[str] = []
    message = guard().seal(parcel(), KEYS, 2, PART)
    message.tensors[1].view(torch.uint8)[0, 2, 1, 5] ^= 16
    with pytest.raises(
        IntegrityError, match=r"keys and values \(\[1, 4, 2, 8\] float32.*changed after they were packed"
    ):
        guard(report=told.append).admit(message, KEYS, 2, PART, "keys")
    assert len(told) == 1 and told[0].startswith("call 7 (forward): keys: the checksum of")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named_with_its_place(bad: float) -> None:
    """The tensor and the first index: where to look."""
    tensors = {"query": torch.ones(2, 3), "value": torch.ones(2, 3)}
    tensors["value"][1, 2] = bad
    assert unfit(tensors) == f"value[1, 2] is {bad}, 1 of 6 are not finite"
    message = parcel()
    message.tensors[1][0, 3, 1, 4] = bad
    with pytest.raises(NonFiniteError, match=r"value\[0, 3, 1, 4\] is"):
        guard().admit(guard().seal(message, KEYS, 2, PART), KEYS, 2, PART, "keys")


def test_a_row_that_has_seen_no_key_is_no_fault() -> None:
    """Its lse is -inf by definition; +inf and NaN are not."""
    assert unfit({"lse": torch.tensor([-torch.inf, 0.0])}) == ""
    assert unfit({"lse": torch.tensor([torch.inf])}) and unfit({"lse": torch.tensor([torch.nan])})
    assert unfit({"query": torch.tensor([-torch.inf])})


class _OnDevice:
    """A label on the CPU that says it is on a GPU, whose copies come when they are let."""

    def __init__(self, label: Tensor) -> None:
        self.label, self.is_cuda = label, True

    def clone(self) -> Tensor:
        return self.label.clone()


class _Late(Parcel):
    @property
    def label(self) -> Any:
        return _OnDevice(super().label)


def test_labels_on_a_gpu_are_read_in_a_later_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the device: what came is set aside, copied when the call is over, and judged when it is there."""
    arrived: list[bool] = [False]

    class Event:
        def record(self) -> None: ...

        def query(self) -> bool:
            return arrived[0]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    unread: deque[Any] = deque()
    here = guard("always", unread=unread)
    for source in (2, 0):  # the second one is not what the plan says
        sealed = guard("always").seal(parcel(), KEYS, source, PART)
        here.admit(_Late(sealed.buffer, sealed.tensors, sealed.head), KEYS, 2, PART, "keys, from rank 0 of the ring")
    assert not unread
    here.close()
    here.close()  # nothing is left to hand over
    (read,) = unread
    assert read() is False
    arrived[0] = True
    with pytest.raises(IntegrityError, match=r"call 7 .forward.: keys, from rank 0 of the ring: .*source 0, not 2"):
        read()


def test_a_label_is_written_without_waiting_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from memory that is not pinned ends when the stream has done all before it: no hop would overlap any more."""
    copies: list[tuple[bool, bool]] = []

    class Label(_OnDevice):
        def copy_(self, says: Any, non_blocking: bool = False) -> None:
            copies.append((says.pinned, non_blocking))

    class Packed(Parcel):
        @property
        def label(self) -> Any:
            return Label(super().label)

    monkeypatch.setattr(torch, "tensor", lambda says, pin_memory=False: SimpleNamespace(pinned=pin_memory))
    plain = parcel()
    guard("always").seal(Packed(plain.buffer, plain.tensors, plain.head), KEYS, 2, PART)
    assert copies == [(True, True)]


def problem(group: Any, check: str, route: str, degree: int, kv_heads: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    s = rf.Sharding(29, group, rf.causal, "zigzag", route, heads_axis=degree, check=check)
    q, k, v, dout = (s.shard(torch.randn(1, 29, n, 8, generator=draw), 1) for n in (4, kv_heads, kv_heads, 4))
    out, lse = rf.ring_attention(*(x.requires_grad_() for x in (q, k, v)), s, return_lse=True)
    ((out * dout).sum() + lse.sum()).backward()
    return [out.detach(), lse.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("kv_heads", [1, 4], ids=["keys travel back", "queries travel back"])
@pytest.mark.parametrize(("route", "degree"), [("ring", 1), ("gather", 1), ("needed_only", 1), ("auto", 2)])
def test_bits_do_not_depend_on_the_mode(route: str, degree: int, kv_heads: int) -> None:
    """Labels and looks leave alignment, order and numbers as they are: nobody has to choose between checks and bits."""
    results = [rf.local_world(4).run(problem, mode, route, degree, kv_heads) for mode in MODES]
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_device_that_computes_one_bit_differently_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """verify computes one visit of each call twice, another one in each call: the second time one bit is another one."""
    select, turns = operator.select, iter(range(1000))

    def faulty(*given: Any) -> Backend:
        engine = select(*given)

        def attend(*arguments: Any) -> Any:
            result = engine.attend(*arguments)
            if next(turns) % 2:
                result.out.view(torch.int32)[0, 0, 0, 0] ^= 1
            return result

        return engine._replace(attend=attend)

    monkeypatch.setattr(operator, "select", faulty)

    def one_rank(group: Any) -> str:
        s = rf.Sharding(8, group, rf.full, "contiguous", "ring", check="verify")
        q = torch.randn(1, s.local_length, 2, 8, generator=torch.Generator().manual_seed(group.rank))
        with pytest.raises(IntegrityError) as caught:
            for _ in range(2):
                rf.ring_attention(q, q, q, s)
        return str(caught.value)

    assert "computed twice from the same numbers, out differs, first at" in rf.local_world(2).run(one_rank)[0]


def test_kinds_are_told_apart() -> None:
    """Two sorts of message with one number could be swapped unseen."""
    kinds = [x for x in vars(module).values() if isinstance(x, Kind)]
    assert len({kind.number for kind in kinds}) == len(kinds) >= 5


@pytest.mark.parametrize("tensor", ["value", "dout"])
def test_verify_stops_every_rank_for_a_number_of_one(tensor: str) -> None:
    """NaN in one rank's value, or in the gradient that comes into its backward."""

    def one_rank(group: Any) -> str:
        s = rf.Sharding(12, group, rf.full, "contiguous", check="verify")
        q, k, v = (torch.ones(1, 4, 2, 8, requires_grad=True) for _ in range(3))
        dout = torch.ones(1, 4, 2, 8)
        if group.rank == 1:
            (v.data if tensor == "value" else dout)[0, 2, 1, 3] = torch.nan
        with pytest.raises(NonFiniteError) as caught:
            rf.ring_attention(q, k, v, s).backward(dout)
        return str(caught.value)

    for rank, text in enumerate(rf.local_world(3).run(one_rank)):
        assert f"rank {rank} of 3" in text and f"rank 1: {tensor}[0, 2, 1, 3] is nan, 1 of 64 are not finite" in text
