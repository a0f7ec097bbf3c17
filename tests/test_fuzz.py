"""The public API under random use: what it answers is right, and what it refuses it refuses by name, on all ranks alike."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from soak import fuzz, machine
from soak.doors import Outcome, attempt, fault_of, judge
from soak.wild import CALLS, namespace, snippet
from soak.world import World

import ringflash as rf

LONG = {"flash_attention": pytest.mark.slow}  # it has the arguments of ring_attention, and one more


@pytest.mark.parametrize("name", [pytest.param(name, marks=LONG.get(name, ())) for name in CALLS])
def test_every_argument_is_read_or_refused_by_name(name):
    """Nothing is cast, ignored or left for torch to stumble over: not a string for a number, not a set for a list."""
    faults = fuzz.sweep(name)
    shown = "\n".join(f"    {fault}" for _, fault in faults[:12])
    assert not faults, f"{len(faults)} values are not dealt with:\n{shown}\n{snippet(faults[0][0])}"


def test_random_programs_are_right():
    """Shardings alive together, backwards that come late: each answer is the oracle's."""
    fuzz.run(programs=8, steps=8)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_many_random_programs_are_right(number):
    """The same, longer, from other seeds."""
    fuzz.run(programs=120, steps=20, number=number)


def broken_unshard(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rf.Sharding.unshard
    monkeypatch.setattr(rf.Sharding, "unshard", lambda s, x, dim: right(s, x, dim).flip(dim))


def broken_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rf.ring_attention

    def scaled(q: Any, *rest: Any, **options: Any) -> Any:
        q = q * 1 if not q.requires_grad else q + (0.001 * q - (0.001 * q).detach())
        return right(q, *rest, **options)

    monkeypatch.setattr(rf, "ring_attention", scaled)


def broken_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rf.ring_attention

    def refused(q: Any, k: Any, v: Any, s: Any, *rest: Any, **options: Any) -> Any:
        if s.ranks > 1 and s.rank == 1:
            raise ValueError("ring_attention: query is not to my liking")
        return right(q, k, v, s, *rest, **options)

    monkeypatch.setattr(rf, "ring_attention", refused)


def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rf.Sharding.shard

    def warned(s: Any, x: Any, dim: int) -> Any:
        warnings.warn("a shard was made", stacklevel=2)
        return right(s, x, dim)

    monkeypatch.setattr(rf.Sharding, "shard", warned)


@pytest.mark.parametrize(
    "plant", [broken_unshard, broken_gradient, broken_on_one_rank, noisy], ids=lambda f: f.__name__
)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch):
    """Random programs that pass whatever happens would prove nothing."""
    plant(monkeypatch)
    monkeypatch.setattr(machine.Calls, "call_wrongly", None)  # what is planted is found without
    monkeypatch.setattr(machine.Calls, "train_a_model", None)
    with pytest.raises((AssertionError, UserWarning)):
        fuzz.run(programs=30, steps=8, phases=fuzz.FIRST)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (IndexError("flash_attention: scale is '3'; a number is needed"), "lets through IndexError"),
        (ValueError("scale is '3'; a number is needed"), "does not say who speaks"),
        (ValueError("flash_attention: '3' is no number"), "does not name the argument"),
        (ValueError("flash_attention: scale is no number"), "does not say what came"),
        (ValueError("flash_attention: scale is '3'; a number is needed"), None),
        (rf.WireError("flash_attention: scale is '3'; a number is needed"), None),
    ],
)
def test_a_refusal_has_to_help(error, fault):
    """Who speaks, of which argument, and what came; of a kind that a caller can expect."""
    found = fault_of(error, CALLS["flash_attention"], {"scale": "'3'"}, namespace())
    assert found == fault if fault is None else found is not None and found.startswith(fault)


def test_a_wrong_answer_is_a_fault():
    """What is taken must be right, too; and what cannot be read must not be taken."""
    names, call = namespace(), CALLS["flash_attention"]
    outcome = attempt(call.write(scale="0.3"), names)
    assert judge(call, {"scale": "0.3"}, outcome, names) is None
    wrong = Outcome(outcome.value + 0.01)
    assert re.match("is wrong by 0.01", judge(call, {"scale": "0.3"}, wrong, names) or "")
    assert judge(call, {"scale": "'3'"}, outcome, names) == "takes what it cannot read as scale"


def test_a_world_takes_commands_and_keeps_what_they_leave():
    """Errors are outcomes of their rank, and the world goes on."""
    world = World(2)

    def remember(group: Any, memory: dict[str, Any]) -> int:
        memory["x"] = group.rank
        if group.rank:
            raise ValueError("one rank alone")
        return 7

    first, second = world.ask(remember)
    assert first.value == 7 and isinstance(second.error, ValueError)
    gathered = world.ask(lambda group, memory: rf.Sharding(2, group).unshard(torch.tensor([memory["x"]]), 0).tolist())
    assert [outcome.value for outcome in gathered] == [[0, 1], [0, 1]]
    world.end()
