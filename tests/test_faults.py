"""Faults in real processes: every rank ends in time, every survivor names the culprit, and no process is left over."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
from faults import programs
from faults.harness import GRACE, PATIENCE, Ending, suffer

import ringflash as rf

RANKS = 4
SURVIVORS = (0, 2, 3)


def survivors_know(endings: list[Ending], *parts: str, ranks: tuple[int, ...] = SURVIVORS, culprit: int = 1) -> None:
    """Each of them ended with an error, in time, that names the culprit, its own call and the host."""
    for rank in ranks:
        ending = endings[rank]
        assert ending.error, f"rank {rank} ended with {ending.status} and {ending.value!r}"
        assert ending.seconds <= PATIENCE + GRACE, ending
        for part in (f"rank {culprit}", *parts):
            assert part in ending.text, f"rank {rank}: {ending.text}"


@pytest.fixture(autouse=True)
def nothing_is_left_over() -> Any:
    """Not even the stopped one."""
    yield
    assert not multiprocessing.active_children()


def right(ranks: int = RANKS, **options: Any) -> list[str]:
    """The bits of every rank, of the in-process world."""
    return rf.local_world(ranks).run(lambda group: programs.call(group, **options))


def test_a_killed_rank_is_named_by_all_others() -> None:
    """kill -9 in the middle of a hop: nobody waits for the time-out, and nobody is told only of a broken address."""
    endings = suffer(RANKS, programs.killed_in_forward)
    survivors_know(endings, "call 3 (forward)", "hop for step", "Nothing has been heard of rank 1")
    assert endings[1].status == -9


def test_a_difference_is_an_error_on_all_ranks_and_the_next_call_is_right() -> None:
    """One rank in bfloat16: nothing is sent, all say the same, and whoever catches the error can go on."""
    for rank, (ending, bits) in enumerate(zip(suffer(RANKS, programs.another_dtype), right(), strict=True)):
        said, after = ending.value
        assert said.endswith("call 1 (forward): dtype: float32 on ranks 0, 2, 3 and bfloat16 on rank 1")
        assert said.startswith(f"ringflash, rank {rank} of 4") and after == bits


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["first", "verify"])
@pytest.mark.parametrize(
    ("program", "parts"),
    [
        (programs.killed_in_forward, ["call 3 (forward)", "hop for step", "float32"]),
        (programs.killed_in_backward, ["call 4 (backward)", "hop for step", "float32"]),
        (programs.stopped, ["call 3 (forward)", "within 3 s", "Nothing has been heard of rank 1"]),
        (programs.exits_early, ["call 3 (forward)", "Nothing has been heard of rank 1"]),
        (programs.raises, ["call 3 (forward)", "rank 1"]),
        (programs.skips_a_call_that_is_known, ["call 3 (forward)", "within 3 s"]),
        (programs.skips_a_call_that_is_new, ["call 3 (forward)", "within 3 s", "dtype: float64", "float32 as agreed"]),
        (programs.changes_while_others_go_on, ["call 3 (forward)"]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_every_survivor_names_the_culprit(program: Any, parts: list[str], mode: str) -> None:
    """Whatever became of rank 1, the others end within the time-out and a grace, and say who, where and in which call."""
    if mode == "verify":  # every call is compared, and who is gone is missed there or in the hop
        parts = [part for part in parts if part.startswith(("call", "rank"))]
    if mode == "verify" and program is programs.changes_while_others_go_on:
        parts = ["ranks disagree on call 3 (forward): dtype: float32 on ranks 0, 2, 3 and float64 on rank 1"]
    endings = suffer(RANKS, program, environment={"RINGFLASH_CHECK": mode})
    survivors_know(endings, *parts)
    hosts = [ending.text for ending in endings if ending.error == "PeerError"]
    assert all(f"({programs.HOST})" in text for text in hosts)


@pytest.mark.slow
def test_whoever_changed_while_others_go_on_is_quoted_with_what_is_new() -> None:
    """Three ranks wait in a hop, one to compare: the error says that it is about to do something else, and what."""
    endings = suffer(RANKS, programs.changes_while_others_go_on)
    survivors_know(endings, "dtype: float64 on rank 1 and float32 as agreed before")
    assert "go on with what was agreed" in endings[1].text and "ranks 0, 2, 3 did not come" in endings[1].text


@pytest.mark.slow
def test_a_slow_rank_changes_nothing() -> None:
    """Below the time-out lateness is no fault: the bits are those of the in-process world, three times."""
    endings = suffer(RANKS, programs.is_slow)
    assert [ending.value for ending in endings] == [[bits] * 3 for bits in right()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "says"),
    [
        (programs.another_dtype, "dtype: float32 on ranks 0, 2, 3 and bfloat16 on rank 1"),
        (programs.another_length, "length: 24 on ranks 0, 2, 3 and 28 on rank 1"),
        (programs.another_layout, "layout: contiguous on ranks 0, 2, 3 and zigzag on rank 1"),
        (programs.another_mask, "mask: full on ranks 0, 2, 3 and causal on rank 1"),
        (programs.another_scale, f"scale: {8**-0.5!r} on ranks 0, 2, 3 and 1.0 on rank 1"),
        (programs.another_number_of_heads, "query heads: 4 on ranks 0, 2, 3 and 8 on rank 1"),
        (programs.another_check, "check: first on ranks 0, 2, 3 and always on rank 1"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_difference_is_named_before_anything_is_sent(program: Any, says: str) -> None:
    """On all ranks alike; and the next call, in which all agree, has the right bits."""
    for ending, bits in zip(suffer(RANKS, program), right(), strict=True):
        said, after = ending.value
        assert says in said and after == bits


@pytest.mark.slow
def test_another_seed_is_named() -> None:
    """Dropout from two seeds is no mask that anybody could have meant."""
    endings = suffer(RANKS, programs.another_seed)
    assert all("seed: 3 on ranks 0, 2, 3 and 4 on rank 1" in ending.value[0] for ending in endings)


@pytest.mark.slow
def test_a_rank_that_checks_nothing_is_missed_by_the_others() -> None:
    """RINGFLASH_CHECK=off on one rank alone: the others wait to compare, and say who did not come."""
    survivors_know(suffer(RANKS, programs.checks_nothing), "rank 1 did not come within 3 s", "the first of its kind")


@pytest.mark.slow
def test_two_known_calls_in_another_order() -> None:
    """always says so before anything is sent; first lets it pass, with wrong numbers: docs/trust.md says so, too."""
    endings = suffer(RANKS, programs.another_order, environment={"RINGFLASH_CHECK": "always"})
    for ending in endings:
        assert ending.error == "DisagreementError"
        assert "call 3 (forward): mask: full on ranks 0, 2, 3 and causal on rank 1" in ending.text
    assert not any(ending.error for ending in suffer(RANKS, programs.another_order))


@pytest.mark.slow
def test_a_flipped_bit_in_a_hop() -> None:
    """verify names the sender, the tensors and the hop, on all ranks; the other modes do not look, and let it pass."""
    endings = suffer(RANKS, programs.flips_a_bit, environment={"RINGFLASH_CHECK": "verify"})
    survivors_know(endings, "keys and values", "step 2 of 4", "from rank 1 of the ring: the checksum of")
    assert endings[2].error == "IntegrityError"
    for mode in ("first", "always"):
        endings = suffer(RANKS, programs.flips_a_bit, environment={"RINGFLASH_CHECK": mode})
        assert not any(ending.error for ending in endings)
        assert [ending.value for ending in endings] != right()


@pytest.mark.slow
def test_a_dropped_hop_is_missed_by_who_waits_for_it() -> None:
    """The last message that never came: its receiver names the hop and the peer."""
    endings = suffer(RANKS, programs.drops_a_hop)
    survivors_know(endings, "call 3 (forward), hop for step", "did not come from rank 1", ranks=(2,))


@pytest.mark.slow
def test_swapped_hops() -> None:
    """always reads the labels, and says what came in place of what; first does not label, and lets it pass."""
    endings = suffer(RANKS, programs.swaps_hops, environment={"RINGFLASH_CHECK": "always"})
    survivors_know(endings, "from rank 1 of the ring: another message came than the plan says: source 0, not 1")
    endings = suffer(RANKS, programs.swaps_hops)
    assert not any(ending.error for ending in endings)
    assert [ending.value for ending in endings] != right(back=False)


@pytest.mark.slow
def test_rings_of_some_ranks() -> None:
    """Two rings in one process, and a ring of odd ranks: the bits are those of worlds of their size."""
    whole, pair = right(), right(2)
    expected = [[whole[rank], pair[rank // 2]] * 2 for rank in range(RANKS)]
    assert [ending.value for ending in suffer(RANKS, programs.two_rings)] == expected
    assert [ending.value for ending in suffer(RANKS, programs.odd_ranks)] == ["", pair[0], "", pair[1]]


@pytest.mark.slow
def test_a_rank_of_a_subgroup_is_named_by_both_its_numbers() -> None:
    """Rank 1 of the group is rank 3 of the world, which is what a launcher and its logs call it."""
    survivors_know(suffer(RANKS, programs.odd_ranks_die), "rank 1 (3 of the world, ", ranks=(1,))


@pytest.mark.slow
def test_a_rank_that_believes_in_another_world() -> None:
    """It says so itself, and the others miss it."""
    endings = suffer(RANKS, programs.believes_in_another_world)
    assert endings[1].error == "WireError" and "group is the pair (1, 5)" in endings[1].text
    survivors_know(endings, "rank 1 did not come within 3 s")


@pytest.mark.slow
@pytest.mark.parametrize("own_store", [False, True])
def test_rank_0_is_as_mortal_as_the_others(own_store: bool) -> None:
    """It writes the verdicts, and may hold the store: without it there is still an error of ours, in time."""
    endings = suffer(RANKS, programs.rank_0_dies, own_store=own_store)
    survivors_know(endings, "call 3 (forward), hop for step", ranks=(1, 2, 3), culprit=0)
    assert {ending.error for ending in endings[1:]} == {"PeerError"}
    if own_store:
        assert all("The store is gone, which rank 0 holds" in ending.text for ending in endings[1:])


@pytest.mark.slow
def test_one_rank_of_a_grid_differs() -> None:
    """Its row finds out first, and the columns carry it to everybody."""
    endings = suffer(RANKS, programs.differs_in_a_grid)
    expected = right(heads_axis=2)
    for ending, bits in zip(endings, expected, strict=True):
        said, after = ending.value
        assert "scale: 1.0 on ranks 0, 2, 3 and 0.5 on rank 1" in said and after == bits


@pytest.mark.slow
def test_a_number_that_is_not_finite() -> None:
    """verify names the rank, the tensor and the place on all ranks; without it NaN goes round, as the numbers say."""
    for ending in suffer(RANKS, programs.not_finite, environment={"RINGFLASH_CHECK": "verify"}):
        assert ending.error == "NonFiniteError"
        assert "rank 1: value[0, 2, 1, 5] is nan, 1 of 96 are not finite" in ending.text
    assert [ending.value for ending in suffer(RANKS, programs.not_finite)] == ["nan"] * RANKS


@pytest.mark.slow
def test_a_model_of_which_one_rank_differs() -> None:
    """Around a model: another number of heads is named before anything is sent, and a wrong label on all ranks."""
    for ending in suffer(RANKS, programs.another_model):
        assert ending.error == "DisagreementError" and "query heads: 2 on ranks 0, 2, 3 and 4 on rank 1" in ending.text
    for ending in suffer(RANKS, programs.a_label_outside_the_vocabulary):
        assert ending.error == "ValueError" and "outside the vocabulary" in ending.text
