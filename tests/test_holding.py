"""What a rank holds, foretold, beside what the real loop, the real operators and the real swap hold and send."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import ringflash as rf
from ringflash import operator
from ringflash.forecast.hardware import load_hardware
from ringflash.forecast.holding import in_flight, peak
from ringflash.forecast.memory import PARTS_IN_FLIGHT, TOTALS_IN_FLIGHT
from ringflash.forecast.model import Model
from ringflash.forecast.workload import Workload
from ringflash.freight import Freight, Parcel
from ringflash.local import LocalWire
from ringflash.plan import Plan
from ringflash.route import Ring, double_ring
from ringflash.ulysses import Swap


def plans_of(length: int, ranks: int, mask: rf.Mask, layout: str = "contiguous", route: object = "ring") -> list[Plan]:
    return rf.plans(rf.Sharding(length, (0, ranks), mask, layout, route=route))


def test_a_ring_holds_two_parts_and_a_gather_all_of_them():
    """Peak buffers, in shards: what memory.py counts for a ring, and what asking for everything at once costs."""
    ring = in_flight(plans_of(8 * 16, 8, rf.full)[3])
    assert max(now.parts for now in ring) == 2 * 16
    assert max(now.totals for now in ring) == 4 * 16
    assert (PARTS_IN_FLIGHT, TOTALS_IN_FLIGHT) == (2, 4)
    gather = in_flight(plans_of(8 * 16, 8, rf.full, route="gather")[3])
    assert max(now.parts for now in gather) == 8 * 16  # and its own shard, copied to be sent
    assert max(now.parts for now in in_flight(plans_of(16, 1, rf.full)[0])) == 0


@pytest.mark.parametrize("route", ["ring", "ring_down", "gather", "needed_only", double_ring(2, 2)], ids=str)
def test_parts_in_flight_are_those_that_the_loop_holds(route, monkeypatch):
    """Buffers of the real loop, counted while they live: on every rank what was foretold, but for copies on their way.

    Threads copy them at once, so where parts are cut out for several ranks the loop holds less here than between processes.
    """
    alive, most, blank = Counter[str](), Counter[str](), Freight.blank

    def counted(freight: Freight, tokens: int) -> Parcel:
        parcel, rank = blank(freight, tokens), threading.current_thread().name
        alive[rank] += tokens
        most[rank] = max(most[rank], alive[rank])
        weakref.finalize(parcel, alive.subtract, {rank: tokens})
        return parcel

    monkeypatch.setattr(Freight, "blank", counted)
    q, k = torch.randn(1, 64, 4, 8), torch.randn(1, 64, 2, 8)

    def forward(group: object) -> str:
        s = rf.Sharding(64, group, rf.causal, "zigzag", route=route)
        rf.ring_attention(*(s.shard(x, dim=1) for x in (q, k, k)), s)
        return threading.current_thread().name

    names = rf.local_world(4).run(forward)
    foretold = [in_flight(plan) for plan in plans_of(64, 4, rf.causal, "zigzag", route)]
    held, most_foretold = [most[name] for name in names], [max(now.parts for now in found) for found in foretold]
    assert all(a <= b for a, b in zip(held, most_foretold, strict=True))
    assert held == most_foretold or not isinstance(plans_of(4, 4, rf.full, route=route)[0].route, Ring)


def test_memory_is_that_of_the_fullest_rank():
    """One rank holds its tensors and their gradients; a ring adds what is in flight."""
    alone = plans_of(64, 1, rf.full)
    work = Workload(8, 2, 64, 64)
    row, narrow = 64 * 8 * 64, 64 * 2 * 64  # elements of q and of k
    assert peak(alone, alone, work) == {
        **{"q": 2 * row, "k, v": 4 * narrow, "out": 2 * row, "lse": 4 * 64 * 8, "partial out": 0},
        **{"dout": 2 * row, "dlse": 4 * 64 * 8, "delta": 4 * 64 * 8, "dq": 4 * row, "dk, dv": 8 * narrow},
        **{"shares of dk, dv": 0, "parts in flight": 0, "totals in flight": 0},
    }
    uneven = plans_of(65, 2, rf.full)
    held = peak(uneven, uneven, work)
    assert held["q"] == 2 * 33 * 8 * 64
    assert held["parts in flight"] > 0 and held["totals in flight"] > 0


INSIDE = {
    torch.ops.ringflash.attend.default: operator.attend._init_fn,
    torch.ops.ringflash.attend_backward.default: operator.attend_backward._init_fn,
}
"""What the operators do, in Python."""


class Live(TorchDispatchMode):
    """Bytes of the tensors that one thread has made and that are alive, inside of operators too; ``most`` of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in INSIDE:
            with self:
                made = INSIDE[op](*args, **kwargs or {})
        else:
            made = op(*args, **kwargs or {})
        for storage in (x.untyped_storage() for x in tree_leaves(made) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.known and storage.nbytes():
                self.known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata)
        return made

    def forget(self, number: int) -> None:
        self.now -= self.known.pop(number)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Live]]:
    """By thread: what is alive but for copies that are in the mail, and what a kernel needs while it runs."""
    found: dict[str, Live] = {}
    exchange, select = LocalWire.exchange, operator.select

    def unseen(*args: Any) -> Any:
        with _disable_current_modes():
            return exchange(*args)

    class Quiet:
        def __init__(self, engine: Any) -> None:
            self.engine = engine

        def __getattr__(self, name: str) -> Any:
            def call(*args: Any) -> Any:
                mine = found[threading.current_thread().name]
                most = mine.most
                made = getattr(self.engine, name)(*args)
                mine.most = max(most, mine.now)
                return made

            return call

    monkeypatch.setattr(LocalWire, "exchange", unseen)
    monkeypatch.setattr(operator, "select", lambda *args: Quiet(select(*args)))
    yield found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("ranks", "degree", "kv_heads"), [(4, 1, 2), (2, 2, 2), (4, 2, 2), (4, 4, 2), (6, 2, 8)], ids=str
)
def test_an_attention_call_holds_what_was_foretold(live, ranks, degree, kv_heads, dtype):
    """Every tensor that is alive at the peak of the fullest rank, forward and backward: no less is foretold, hardly more."""
    heads, dim, length = 8, 64, 384

    def train(group: Any) -> int:
        s = rf.Sharding(length, group, rf.causal, "zigzag", "ring", heads_axis=degree)
        with Live() as mine:
            live[threading.current_thread().name] = mine
            q, k, v = (
                torch.zeros(1, s.local_length, h, dim, dtype=dtype).requires_grad_()
                for h in (heads, kv_heads, kv_heads)
            )
            out = rf.ring_attention(q, k, v, s)
            torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
            return mine.most

    held = max(rf.local_world(ranks).run(train))
    work = Workload(heads, kv_heads, dim, dim, dtype=str(dtype).removeprefix("torch."), degree=degree)
    phases = Model(load_hardware("h100"), work, 8).plans_of(plans_of(length, ranks // degree, rf.causal, "zigzag"))
    foretold = sum(peak(phases["forward"], phases["backward"], work).values())
    assert held <= foretold * 1.005  # parcels are padded to 64 bytes
    assert foretold <= 1.15 * held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("ranks", "degree", "heads", "kv_heads"),
    [(4, 2, 8, 2), (4, 4, 8, 2), (4, 2, 8, 8), (4, 4, 12, 3), (6, 3, 6, 3)],
    ids=str,
)
def test_swaps_send_what_was_foretold(ranks, degree, heads, kv_heads, dtype, monkeypatch):
    """Bytes and messages of the real swap, from rank to rank, both passes; key heads that two blocks need go to both."""
    inside, sent, messages = set(), Counter[tuple[str, int, int]](), Counter[str]()
    trade, exchange, phase = Swap._trade, LocalWire.exchange, ["forward"] * ranks

    def traded(swap: Swap, *args: Any) -> Any:
        name = threading.current_thread().name
        inside.add(name)
        made = trade(swap, *args)
        inside.remove(name)
        return made

    def exchanged(wire: Any, sends: Any, *args: Any) -> Any:
        name = threading.current_thread().name
        if name in inside:
            rank = int(name.split()[-1])
            for peer, buffer in sends:
                sent[phase[rank], rank, peer] += buffer.numel()
                messages[phase[rank]] += 1
        return exchange(wire, sends, *args)

    monkeypatch.setattr(Swap, "_trade", traded)
    monkeypatch.setattr(LocalWire, "exchange", exchanged)
    length, dim = 16 * ranks, 64

    def train(group: Any) -> None:
        s = rf.Sharding(length, group, rf.full, "contiguous", "ring", heads_axis=degree)
        q, k, v = (
            torch.zeros(1, s.local_length, h, dim, dtype=dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)
        )
        out = rf.ring_attention(q, k, v, s)
        phase[group.rank] = "backward"
        torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))

    rf.local_world(ranks).run(train)
    work = Workload(heads, kv_heads, dim, dim, dtype=str(dtype).removeprefix("torch."), degree=degree)
    model = Model(load_hardware("h100"), work, 8)
    for name, plans in model.plans_of(plans_of(length, ranks // degree, rf.full)).items():
        foretold = {
            (name, ring * degree + a, ring * degree + b): int(before[a, b] + after[a, b])
            for ring, (before, after) in enumerate(model.swaps(name, plans))
            for a in range(degree)
            for b in range(degree)
            if a != b
        }
        assert {key: count for key, count in sent.items() if key[0] == name} == foretold
        counted = model._count_swaps(name, plans)
        assert counted["swapped"] == {"within": sum(foretold.values()), "between": 0}
        assert counted["swap_messages"] == messages[name]
