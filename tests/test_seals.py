"""Labels and checksums: what is not what was sent is refused, by name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ringflash as rf
from ringflash import guard as guards
from ringflash.check import MODES, VARIABLE, settle
from ringflash.errors import IntegrityError, NonFiniteError
from ringflash.freight import Freight, Parcel
from ringflash.guard import KEYS, QUERIES, Guard, checksum, unfit
from ringflash.laws import obey
from ringflash.needs import Part
from ringflash.reference import Scoring
from ringflash.wire import Unconnected

CPU = torch.device("cpu")
PART = Part(2, ((3, 5), (8, 9)))


def definition(words: np.ndarray) -> int:
    """The sum of all words, each with an odd weight of its own, modulo 2^64."""
    weights = (2 * np.arange(len(words), dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return int((words.astype(np.int64).view(np.uint64) * weights).sum(dtype=np.uint64))


@pytest.mark.parametrize("block", [4, guards._BLOCK])
def test_a_checksum_counts_every_word_with_a_weight_of_its_own(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first to the last, also where one block of words ends and the next begins."""
    monkeypatch.setattr(guards, "_BLOCK", block)
    step = 2 * block * guards._GOLDEN
    monkeypatch.setattr(guards, "_STRIDE", (step + (1 << 63)) % (1 << 64) - (1 << 63))
    draw = np.random.default_rng(0)
    for words in (1, block - 1, block, block + 1, 2 * block + 3):
        content = draw.integers(-(1 << 31), 1 << 31, words).astype(np.int32)
        found = checksum(torch.from_numpy(content).view(torch.uint8))
        assert found.dtype == torch.int64 and int(found) & (1 << 64) - 1 == definition(content)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=9), st.data())
@settings(max_examples=30)
def test_a_changed_bit_and_swapped_words_change_the_checksum(words: list[int], data: st.DataObject) -> None:
    """Whichever they are: one bit, two bits, two words that are not equal."""
    content = torch.tensor(words, dtype=torch.int32)
    i, j = (data.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    changed, swapped = content.clone(), content.clone()
    for bit in data.draw(st.sets(st.integers(0, 32 * len(words) - 1), min_size=1, max_size=2)):
        changed.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    swapped[i], swapped[j] = content[j], content[i]
    before, after, other = (int(checksum(x.view(torch.uint8))) for x in (content, changed, swapped))
    assert after != before
    assert (other != before) == (words[i] != words[j])


def packed(guard: Guard, *tensors: Tensor) -> Parcel:
    return Freight.like(tensors, label=guard.label).pack(tensors)


def watched(mode: str, **more: Any) -> Guard:
    return Guard(MODES[mode], **{"call": 7, "name": "forward", "digest": -5, "rank": 1, "ranks": 3} | more)


def key_and_value() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 3, 2, 5, generator=torch.Generator().manual_seed(0)), torch.ones(1, 3, 2, 4)


@pytest.mark.parametrize("mode", ["always", "verify"])
@pytest.mark.parametrize(
    ("field", "sender", "kind", "source", "part"),
    [
        ("call 8, not 7", {"call": 8}, KEYS, 2, PART),
        ("agreement -6, not -5", {"digest": -6}, KEYS, 2, PART),
        ("kind 2, not 1", {}, QUERIES, 2, PART),
        ("source 1, not 2", {}, KEYS, 1, PART),
        ("tokens 2, not 3", {}, KEYS, 2, Part(2, ((3, 5),))),
        ("first token 2, not 3", {}, KEYS, 2, Part(2, ((2, 4), (8, 9)))),
    ],
    ids=lambda x: x.split(" ")[0] if isinstance(x, str) else "",
)
def test_another_message_than_the_plan_says_is_refused(
    mode: str, field: str, sender: dict[str, int], kind: guards.Kind, source: int, part: Part
) -> None:
    """Swapped hops, an older call, another ring: each field is compared, and named with both values."""
    parcel = packed(watched(mode), *key_and_value())
    guard = watched(mode)
    guard.seal(parcel, KEYS, 2, PART)
    guard.admit(parcel, KEYS, 2, PART, "from rank 0")
    watched(mode, **sender).seal(parcel, kind, source, part)
    with pytest.raises(
        IntegrityError, match=rf"rank 1 of 3: call 7 \(forward\): from rank 0: another message .*: {field}"
    ):
        guard.admit(parcel, KEYS, 2, PART, "from rank 0")


def test_memory_that_was_written_over_is_no_message() -> None:
    """Where the label should be stands something else."""
    guard = watched("always")
    parcel = guard.seal(packed(guard, *key_and_value()), KEYS, 2, PART)
    parcel.buffer.fill_(1)
    with pytest.raises(IntegrityError, match="no message of ringflash, or its memory was written over"):
        guard.admit(parcel, KEYS, 2, PART, "")


def test_labels_move_no_tensor_and_cost_nothing_where_they_are_off() -> None:
    """Kernels give other bits for other alignments; and an empty part has no message at all."""
    for mode in ("off", "first", "always"):
        guard = watched(mode)
        parcel = packed(guard, *key_and_value())
        assert parcel.buffer.nbytes == 128 + 128 + guard.label and guard.label == (64 if mode == "always" else 0)
        assert all(x.data_ptr() % 64 == parcel.buffer.data_ptr() % 64 for x in parcel.tensors)
        assert guard.seal(parcel, KEYS, 2, PART) is parcel
        assert packed(guard, *(x[:, :0] for x in key_and_value())).buffer.nbytes == 0


@pytest.mark.parametrize("at", [0, 60, 119, 128, 223])
def test_one_flipped_bit_is_noticed(at: int) -> None:
    """In a key or a value, first or last; named with the tensors that are of no use."""
    guard = watched("verify")
    parcel = guard.seal(packed(guard, *key_and_value()), KEYS, 2, PART)
    parcel.payload[at] ^= 1
    with pytest.raises(
        IntegrityError, match=r"the checksum of keys and values \(\[1, 3, 2, 5\] float32, \[1, 3, 2, 4\]"
    ):
        guard.admit(parcel, KEYS, 2, PART, "")


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_number_that_is_none_is_named_with_its_place(name: str, number: float) -> None:
    """The first of them, and how many there are."""
    tensors = dict(zip(("key", "value"), key_and_value(), strict=True))
    tensors[name][0, 1, 1, 2:4] = number
    assert unfit(tensors) == f"{name}[0, 1, 1, 2] is {number}, 2 of {tensors[name].numel()} are not finite"
    guard = watched("verify")
    parcel = guard.seal(packed(guard, *tensors.values()), KEYS, 2, PART)
    with pytest.raises(NonFiniteError, match=rf"from rank 0: {name}\[0, 1, 1, 2\]"):
        guard.admit(parcel, KEYS, 2, PART, "from rank 0")


def test_a_row_that_has_seen_nothing_is_fit() -> None:
    """Its lse is -inf, and nothing else may be."""
    assert not unfit({"query": torch.ones(2), "lse": torch.tensor([0.0, -torch.inf])})
    assert unfit({"lse": torch.tensor([0.0, torch.inf])}) and unfit({"lse": torch.tensor([torch.nan])})
    assert unfit({"delta": torch.tensor([-torch.inf])})


def test_every_visit_is_computed_twice_in_its_turn() -> None:
    """In each call one, and after as many calls as there are visits all of them; without numbers none."""
    for mode, expected in (("verify", {0, 1, 2}), ("always", set())):
        twice = [[n for n in range(3) if watched(mode, call=call).repeats(n, 3)] for call in range(1, 4)]
        assert (
            all(len(some) == (mode == "verify") for some in twice) and {n for some in twice for n in some} == expected
        )


@pytest.mark.parametrize("which", ["out", "lse"])
def test_a_device_that_computes_twice_and_differently_is_named(which: str) -> None:
    """By one bit: even the sign of a zero; and NaN that comes twice is the same."""
    guard = watched("verify")
    one = rf.Partial(torch.zeros(1, 2, 1, 3), torch.tensor([[[0.0, torch.nan]]]))
    guard.same("visit of shard 2", one, rf.Partial(*(x.clone() for x in one)))
    other = one._replace(**{which: -getattr(one, which)})
    with pytest.raises(
        IntegrityError, match=f"visit of shard 2: computed twice from the same numbers, {which} differs"
    ):
        guard.same("visit of shard 2", one, other)


class Tampered:
    """A group whose messages pass a hand that can change them."""

    def __init__(self, group: Any, change: Any) -> None:
        self.rank, self.ranks, self.wire, self._wire, self._change = group.rank, group.ranks, self, group.wire, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wire, name)

    def exchange(self, sends: Sequence[Any], receives: Sequence[Any], channel: int = 0, about: object = "") -> Any:
        return self._wire.exchange([(peer, self._change(x.clone())) for peer, x in sends], receives, channel, about)


def attend(group: Any, check: str | None, heads_axis: int | None = None) -> list[Tensor]:
    s = rf.Sharding(24, group, layout="zigzag", check=check, heads_axis=heads_axis)
    make = torch.Generator().manual_seed(0)
    q, k, v, g = (s.shard(torch.randn(1, 24, n, 8, generator=make), 1).requires_grad_() for n in (4, 2, 2, 4))
    out = rf.ring_attention(q, k, v, s)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), g.detach())]


@pytest.mark.parametrize("heads_axis", [None, 2])
def test_no_check_changes_a_bit_of_the_result(heads_axis: int | None) -> None:
    """Who turns checks on to find a fault must see the same run."""
    plain = rf.local_world(4).run(attend, "off", heads_axis)
    for mode in ("always", "verify"):
        for ours, theirs in zip(rf.local_world(4).run(attend, mode, heads_axis), plain, strict=True):
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("heads_axis", [None, 2])
def test_a_byte_that_changes_on_the_way_never_becomes_a_result(heads_axis: int | None) -> None:
    """In a ring and in a swap of heads: the checksum says so."""

    def flip(x: Tensor) -> Tensor:
        x[-64] ^= 16
        return x

    with pytest.raises(IntegrityError, match=r"the checksum of .* is [0-9a-f]{16}, and its label says [0-9a-f]{16}"):
        rf.local_world(2).run(lambda group: attend(Tampered(group, flip), "verify", heads_axis))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_that_are_no_numbers_obey_no_law(which: int) -> None:
    """NaN is not larger than what is allowed, and not smaller either."""
    q, k, v, out, dout = (torch.randn(1, 5, 1, 4, generator=torch.Generator().manual_seed(i)) for i in range(5))
    lse = torch.zeros(1, 1, 5)
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    gradients[which][0, 2, 0, 1] = torch.nan
    wire = Unconnected(0, 1)
    with pytest.raises(IntegrityError, match=r"nan .*of this rank, (dquery|dkey|dvalue)\[0, 2, 0, 1\] is nan"):
        obey(Guard(), wire, Scoring(0.5), False, (q, k, v), tuple(gradients), (out, lse, dout * 0, lse))


def test_the_environment_decides_where_a_sharding_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a mode that does not exist is refused with the place that names it."""
    monkeypatch.delenv(VARIABLE, raising=False)
    assert rf.Sharding(4, (0, 2)).check == "first"
    monkeypatch.setenv(VARIABLE, "verify")
    assert rf.Sharding(4, (0, 2)).check == "verify" and rf.Sharding(4, (0, 2), check="off").check == "off"
    with pytest.raises(ValueError, match="check is 'sometimes'; accepted are 'off', 'first', 'always', 'verify'"):
        settle("sometimes")
    monkeypatch.setenv(VARIABLE, "loud")
    with pytest.raises(ValueError, match="the environment variable RINGFLASH_CHECK is 'loud'"):
        settle(None)


def test_each_mode_is_the_one_before_and_more() -> None:
    """So that whoever asks for more never gets less."""
    flags = [(x.compares, x.every_call, x.labels, x.numbers) for x in MODES.values()]
    assert list(MODES) == ["off", "first", "always", "verify"]
    assert all(a <= b for low, high in pairwise(flags) for a, b in zip(low, high, strict=True))
    assert len({*flags}) == 4
