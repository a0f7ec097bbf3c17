"""The same bits every time: whoever comes first, in one process or many. docs/deterministic.md says what equals what."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from processes import torchrun

import ringflash as rf
from ringflash.backend import BACKENDS

PROGRAMS = Path(__file__).parent / "programs"
sys.path.insert(0, str(PROGRAMS))

from deterministic_bits import LENGTH, Case, answers, cases, digest, everything, in_any_order  # noqa: E402


@pytest.mark.parametrize("case", cases(4), ids=lambda case: case.name)
def test_a_ring_gives_the_same_bits_whoever_comes_first(case: Case) -> None:
    """Sums are rounded, so an order that depends on which rank is fast would change the last bits from run to run."""
    first, second = (rf.local_world(4).run(in_any_order(answers, seed), case) for seed in (1, 2))
    assert [digest(rank) for rank in first] == [digest(rank) for rank in second]


@pytest.mark.parametrize("check", ["off", "always", "verify"])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4)], ids=["keys travel", "queries travel"])
def test_what_is_checked_does_not_change_the_bits(check: str, heads: tuple[int, int]) -> None:
    """Whoever switches checks on to find a fault must see the run that has it."""
    case = Case("a ring of three", heads=heads)
    first, other = (
        rf.local_world(3).run(lambda group, how=how: answers(group, case, check=how)) for how in ("first", check)
    )
    assert [digest(rank) for rank in first] == [digest(rank) for rank in other]


@pytest.mark.parametrize("how", ["argument", "torch's switch", "neither"])
def test_both_switches_reach_the_kernels(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deterministic mode that stops on the way is found by nobody who runs on a CPU, where every kernel is."""
    told, plain = [], BACKENDS["reference"]

    def attend_backward(*arguments: object) -> object:
        told.append(arguments[-1])
        return plain.attend_backward(*arguments)

    monkeypatch.setitem(BACKENDS, "reference", plain._replace(attend_backward=attend_backward))
    q = torch.randn(1, 6, 2, 4, requires_grad=True)
    torch.use_deterministic_algorithms(how == "torch's switch")
    try:
        rf.flash_attention(q, q, q, backend="reference", deterministic=how == "argument").sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert told == [how != "neither"]


def test_heads_that_ranks_share_change_no_bits() -> None:
    """Ulysses moves heads and adds nothing: out, lse and dq of 2 x 2 ranks are those of a ring of two."""

    def whole(group: object, ulysses: int) -> list[torch.Tensor]:
        case = Case("a grid", layout="contiguous", ulysses=ulysses)
        s = rf.Sharding(LENGTH, group, case.mask, case.layout, case.route, heads_axis=ulysses)
        out, lse, dq, *_ = answers(group, case)
        return [s.unshard(x, 1) for x in (out, lse.transpose(1, 2), dq)]

    ring, grid = rf.local_world(2).run(whole, 1)[0], rf.local_world(4).run(whole, 2)[0]
    assert digest(ring) == digest(grid)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_two_launches_give_the_same_bits(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other delays and another order of sets rings keep their bits, those of one process; and a model its gradients."""
    local = [digest(rank) for rank in rf.local_world(ranks).run(everything)]
    steps = []
    for seed in (1, 2):
        monkeypatch.setenv("PYTHONHASHSEED", str(seed))
        output = torchrun(ranks, PROGRAMS / "deterministic_bits.py", seed, seconds=300)
        said = rf"rank (\d) of {ranks}: attention (\w{{64}}) model (\w{{64}}) \(hash seed {seed}\)"
        _, rings, models = zip(*sorted(re.findall(said, output)), strict=True)
        assert list(rings) == local
        steps.append(models)
    assert steps[0] == steps[1] and len(set(steps[0])) == 1
