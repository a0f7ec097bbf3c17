"""A world of threads: one runs at a time, errors name their rank, and nobody waits for ever."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ringflash as rf

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 5, 12])
def test_results_stand_in_the_order_of_the_ranks(ranks):
    """Whoever finishes first, and whatever they return."""

    def one_rank(group: Any, a: int, b: str) -> tuple[int, int, int, str]:
        if group.rank:  # each waits for the next, so that the last one finishes first
            if group.rank + 1 < ranks:
                group.wire.exchange([], [(group.rank + 1, torch.zeros(1))]).wait()
            if group.rank > 1:
                group.wire.exchange([(group.rank - 1, torch.zeros(1))], []).wait()
        return group.rank, group.ranks, a, b

    assert rf.local_world(ranks).run(one_rank, 3, "x") == [(rank, ranks, 3, "x") for rank in range(ranks)]


def test_a_world_has_at_least_one_rank():
    """Zero ranks would return an empty list and compute nothing."""
    with pytest.raises(ValueError, match="ranks is 0; a world has at least one"):
        rf.local_world(0)


def test_one_rank_runs_at_a_time():
    """Code that is not thread-safe may be used: the baton is handed over only by who waits."""
    running, most = set(), []

    def one_rank(group: Any) -> None:
        for _ in range(5):
            running.add(group.rank)
            most.append(len(running))
            sum(range(20_000))  # long enough for another thread to cut in, if it could
            running.discard(group.rank)
            group.wire.all_gather(torch.zeros(1))

    rf.local_world(4).run(one_rank)
    assert max(most) == 1


def test_messages_arrive_as_they_were_sent():
    """In the order of their batches, copied when they are sent, whatever is done to the buffer then."""

    def one_rank(group: Any) -> list[float]:
        mine = torch.zeros(2)
        pending = []
        for i in range(3):
            mine.fill_(10 * group.rank + i)
            into = torch.full((2,), torch.nan)
            right, left = (group.rank + 1) % 3, (group.rank - 1) % 3
            pending.append((group.wire.exchange([(right, mine)], [(left, into)]), into))
        mine.fill_(torch.nan)
        for batch, _ in reversed(pending):  # waited for in any order
            batch.wait()
            batch.wait()
        return [into[0].item() for _, into in pending]

    assert rf.local_world(3).run(one_rank) == [[20, 21, 22], [0, 1, 2], [10, 11, 12]]


def test_channels_do_not_wait_for_each_other():
    """A slow link has a queue of its own: its messages match among themselves, in whatever order channels are used."""

    def one_rank(group: Any) -> list[float]:
        into = [torch.zeros(1) for _ in range(4)]
        for channel, value in ((1, 10.0), (0, 20.0), (1, 11.0), (0, 21.0)):
            group.wire.exchange([(1 - group.rank, torch.tensor([value + group.rank / 2]))], [], channel)
        pending = [group.wire.exchange([], [(1 - group.rank, x)], c) for x, c in zip(into, (0, 0, 1, 1), strict=True)]
        for batch in reversed(pending):
            batch.wait()
        return [x.item() for x in into]

    assert rf.local_world(2).run(one_rank) == [[20.5, 21.5, 10.5, 11.5], [20, 21, 10, 11]]


def test_a_deadlock_names_the_channel():
    """A message that was sent, but by another channel, is none."""

    def one_rank(group: Any) -> None:
        group.wire.exchange([(1 - group.rank, torch.zeros(1))], [(1 - group.rank, torch.zeros(1))], group.rank).wait()

    with pytest.raises(rf.DeadlockError, match=r"rank 0 waits for message 0 of rank 1; rank 1 waits .* on channel 1"):
        rf.local_world(2).run(one_rank)


def test_collectives_give_every_rank_the_same_bits():
    """Sums are taken in the order of the ranks, everywhere."""

    def one_rank(group: Any) -> tuple[Tensor, list[Tensor]]:
        x = torch.tensor([0.1 * 3**group.rank, 1e8 * (-1) ** group.rank])
        total = x.clone()
        group.wire.all_reduce(total)
        return total, group.wire.all_gather(x)

    results = rf.local_world(4).run(one_rank)
    for total, everyone in results:
        assert torch.equal(total, results[0][0])
        assert [x[0].item() for x in everyone] == pytest.approx([0.1, 0.3, 0.9, 2.7])
    assert len({x.data_ptr() for _, everyone in results for x in everyone}) == 16  # nobody shares memory


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("bad", [0, -1])
def test_the_exception_of_a_rank_ends_the_world(ranks, bad):
    """It is raised here as it is, and the ranks that wait for it are released."""
    bad %= ranks
    ended = []

    def one_rank(group: Any) -> None:
        try:
            if group.rank == bad:
                raise KeyError("broken")
            group.wire.all_reduce(torch.ones(1))
        finally:
            ended.append(group.rank)

    before = threading.active_count()
    with pytest.raises(KeyError, match="broken") as caught:
        rf.local_world(ranks).run(one_rank)
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == [f"(rank {bad} of a local world of {ranks})"]
    assert bad in ended
    assert threading.active_count() == before


def test_the_first_exception_is_the_one_that_is_raised():
    """What follows from it on other ranks is noise."""

    def one_rank(group: Any) -> None:
        if group.rank == 1:
            raise ValueError("first")
        try:
            group.wire.all_reduce(torch.ones(1))
        except rf.WireError as error:
            assert isinstance(error.__cause__, ValueError)
            raise RuntimeError("second") from error

    with pytest.raises(ValueError, match="first"):
        rf.local_world(3).run(one_rank)


def test_an_interrupt_ends_the_world_too():
    """Not only exceptions of the ordinary kind: nobody may be left waiting."""

    def one_rank(group: Any) -> None:
        if group.rank == 0:
            raise KeyboardInterrupt
        group.wire.all_reduce(torch.ones(1))

    with pytest.raises(KeyboardInterrupt):
        rf.local_world(2).run(one_rank)


def test_a_message_that_nobody_sends_is_a_deadlock():
    """Raised as soon as nobody can run, with who waits for whom, and who has gone."""

    def one_rank(group: Any) -> None:
        if group.rank == 0:
            group.wire.exchange([], [(1, torch.zeros(1))]).wait()

    with pytest.raises(rf.DeadlockError, match=r"rank 0 waits for message 0 of rank 1; ranks \[1, 2\] have returned"):
        rf.local_world(3).run(one_rank)


def test_waiting_in_a_circle_is_a_deadlock():
    """Everybody is named."""

    def one_rank(group: Any) -> None:
        into = torch.zeros(1)
        group.wire.exchange([], [((group.rank + 1) % 3, into)]).wait()
        group.wire.exchange([((group.rank - 1) % 3, into)], []).wait()

    with pytest.raises(rf.DeadlockError) as caught:
        rf.local_world(3).run(one_rank)
    for rank in range(3):
        assert f"rank {rank} waits for message 0 of rank {(rank + 1) % 3}" in str(caught.value)


def test_a_skipped_collective_is_a_deadlock():
    """The commonest mistake: one rank takes another branch."""

    def one_rank(group: Any) -> None:
        group.wire.all_reduce(torch.ones(1))
        if group.rank != 1:
            group.wire.all_reduce(torch.ones(1))

    with pytest.raises(
        rf.DeadlockError, match=r"rank 0 waits for collective 2; rank 2 waits for collective 2; .*\[1\]"
    ):
        rf.local_world(3).run(one_rank)


def test_attention_that_one_rank_skips_is_a_deadlock():
    """In backward as well: a rank whose loss does not use the output leaves the others waiting for its messages."""

    def one_rank(group: Any) -> None:
        s = rf.Sharding(8, group, rf.full)
        q = torch.zeros(1, 4, 1, 2, requires_grad=True)
        out = rf.ring_attention(q, q, q, s)
        if group.rank == 0:
            out.sum().backward()

    with pytest.raises(rf.DeadlockError, match=r"rank 0 waits for all ranks to compare call 2 \(backward\)"):
        rf.local_world(2).run(one_rank)


@pytest.mark.parametrize("sent", [torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(1, 2)])
def test_a_message_of_another_size_or_dtype_is_refused(sent):
    """A network would write past the buffer, or stop in the middle of it."""

    def one_rank(group: Any) -> None:
        group.wire.exchange([(1 - group.rank, sent)], [(1 - group.rank, torch.zeros(2))]).wait()

    with pytest.raises(rf.WireError, match=r"rank . expects \(2,\) torch.float32 from rank ., which sent"):
        rf.local_world(2).run(one_rank)


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_is_the_callers(enabled):
    """A thread would start with gradients switched on."""
    with torch.set_grad_enabled(enabled):
        assert rf.local_world(2).run(lambda group: torch.is_grad_enabled()) == [enabled, enabled]


def test_autocast_is_the_callers():
    """A thread would start without it, and a test under autocast would test something else."""

    def one_rank(group: Any) -> torch.dtype:
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    assert rf.local_world(2).run(one_rank) == [torch.float32] * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rf.local_world(2).run(one_rank) == [torch.bfloat16] * 2
    assert rf.local_world(2).run(one_rank) == [torch.float32] * 2


def test_the_mode_of_one_rank_does_not_reach_another():
    """Grad mode belongs to a thread, also when it waits inside of it."""

    def one_rank(group: Any) -> bool:
        with torch.set_grad_enabled(group.rank == 0):
            group.wire.all_reduce(torch.ones(1))
            return torch.is_grad_enabled()

    assert rf.local_world(3).run(one_rank) == [True, False, False]


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_within_backward(reentrant):
    """Activation checkpointing runs the forward again inside backward, and its own backward inside of that."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 9, 2, 4, generator=draw, dtype=torch.float64)
    g = torch.randn(2, 9, 2, 4, generator=draw, dtype=torch.float64)

    def one_rank(group: Any, checkpointed: bool) -> Tensor:
        s = rf.Sharding(9, group)
        x = s.shard(whole, dim=1).requires_grad_()

        def layer(y: Tensor) -> Tensor:
            return y + rf.ring_attention(y, 2 * y, y.sin(), s)

        y = x
        for _ in range(2):
            y = checkpoint(layer, y, use_reentrant=reentrant) if checkpointed else layer(y)
        (y * s.shard(g, dim=1)).sum().backward()
        return x.grad

    plain, again = (rf.local_world(3).run(one_rank, flag) for flag in (False, True))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_runs_repeat_bitwise_and_in_the_same_order():
    """Who runs when depends on nothing but the program."""

    def world() -> tuple[list[tuple[int, int]], list[Tensor]]:
        order: list[tuple[int, int]] = []

        def one_rank(group: Any) -> Tensor:
            s = rf.Sharding(13, group)
            x = s.shard(torch.linspace(-1, 1, 13 * 8).reshape(1, 13, 2, 4), dim=1).requires_grad_()
            for step in range(3):
                order.append((group.rank, step))
                rf.ring_attention(x, x, x, s).square().sum().backward()
            return x.grad

        return order, rf.local_world(4).run(one_rank)

    (order, grads), (order_again, grads_again) = world(), world()
    assert order == order_again
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


def test_a_world_can_be_run_again_after_a_failure():
    """Nothing of a run is left for the next one."""
    world = rf.local_world(2)

    def one_rank(group: Any, fails: bool) -> float:
        group.wire.exchange([(1 - group.rank, torch.ones(1))], [])
        if fails:
            raise ValueError("once")
        x = torch.ones(1)
        group.wire.all_reduce(x)
        return x.item()

    with pytest.raises(ValueError, match="once"):
        world.run(one_rank, True)
    assert world.run(one_rank, False) == [2.0, 2.0]


def test_worlds_nest():
    """A rank may run a world of its own: two rings in one process do not know each other."""

    def inner(group: Any, x: int) -> float:
        total = torch.tensor(float(group.rank + x))
        group.wire.all_reduce(total)
        return total.item()

    def outer(group: Any) -> list[float]:
        group.wire.all_reduce(torch.ones(1))
        return rf.local_world(3).run(inner, 10 * group.rank)

    assert rf.local_world(2).run(outer) == [[3.0] * 3, [33.0] * 3]


def test_a_group_prints_who_it_is():
    """It stands in error messages where a ProcessGroup would."""
    assert rf.local_world(3).run(repr)[1] == "LocalGroup(rank 1 of 3)"
