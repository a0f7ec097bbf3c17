"""The laws of gradients: no false alarm, and an alarm for what a broken ring does to gradients.

Planted bugs are made of the textbook's P and dS, block by block: a ring of four is that matrix cut into four times four.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ringflash as rf
from ringflash import circulate, laws
from ringflash.errors import IntegrityError
from ringflash.reference import Scoring
from ringflash.wire import Unconnected

TOKENS, BLOCKS, HEADS, KV_HEADS, DIM = 32, 4, 4, 2, 8
HALF_AND_WHOLE = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Backward:
    """A textbook backward in float64, causal, whose steps can be told wrong numbers; answers are in ``dtype``."""

    def __init__(self, dtype: torch.dtype, pulls_lse: bool = False) -> None:
        draw = torch.Generator().manual_seed(3)
        shapes = [(1, TOKENS, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
        given = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).double() for shape in shapes]
        self.dtype, (self.q, self.k, self.v, self.dout) = dtype, given
        dlse = torch.randn(1, HEADS, TOKENS, generator=draw, dtype=torch.float64)
        self.dlse = dlse if pulls_lse else torch.zeros_like(dlse)
        self.scale, self.seen = DIM**-0.5, oracle.table(oracle.causal(), TOKENS)
        self.out, self.lse = oracle.attention(self.q, self.k, self.v, self.seen)
        self.p = self.weights(self.k)
        self.delta = (self.dout * self.out).sum(-1).transpose(1, 2) - self.dlse

    def weights(self, k: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", self.q, self.spread(k)) * self.scale
        return torch.exp(scores - self.lse[..., None]) * self.seen

    def ds(self, p: Tensor, delta: Tensor | None = None) -> Tensor:
        dp = torch.einsum("bqhd,bkhd->bhqk", self.dout, self.spread(self.v))
        return p * (dp - (self.delta[..., None] if delta is None else delta))

    def spread(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(HEADS // KV_HEADS, dim=2)

    def gather(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (KV_HEADS, -1)).sum(3)

    def dq(self, ds: Tensor) -> Tensor:
        return self.scale * torch.einsum("bhqk,bkhd->bqhd", ds, self.spread(self.k))

    def dk(self, ds: Tensor) -> Tensor:
        return self.scale * self.gather(torch.einsum("bhqk,bqhd->bkhd", ds, self.q))

    def dv(self, p: Tensor) -> Tensor:
        return self.gather(torch.einsum("bhqk,bqhd->bkhd", p, self.dout))

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        ds = self.ds(self.p)
        return self.dq(ds), self.dk(ds), self.dv(self.p)

    def imbalances(self, gradients: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
        """By law, L1 to L4, how many roundings it is off."""
        q, k, v, dq, dk, dv, out, dout = (
            x.to(self.dtype) for x in (self.q, self.k, self.v, *gradients, self.out, self.dout)
        )
        rows = out, self.lse, dout, self.dlse
        found = laws.imbalances(Unconnected(0, 1), Scoring(self.scale), False, (q, k, v), (dq, dk, dv), rows)
        return {law[:2]: off / laws.rounding(q) for law, off in found.items()}


def hop(rows: int, columns: int, factor: float) -> Tensor:
    """What multiplies P or dS if one block of them, where queries of one rank meet keys of another, counts so often."""
    size = TOKENS // BLOCKS
    often = torch.ones(TOKENS, TOKENS, dtype=torch.float64)
    often[rows * size : (rows + 1) * size, columns * size : (columns + 1) * size] = factor
    return often


def lost_on_the_way_home(b: Backward) -> tuple[Tensor, ...]:
    return b.dq(b.ds(b.p)), b.dk(b.ds(b.p) * hop(3, 0, 0)), b.dv(b.p * hop(3, 0, 0))


def lost_in_dq(b: Backward) -> tuple[Tensor, ...]:
    return b.dq(b.ds(b.p) * hop(3, 0, 0)), *b.gradients()[1:]


def counted_twice(b: Backward) -> tuple[Tensor, ...]:
    return b.dq(b.ds(b.p)), b.dk(b.ds(b.p) * hop(2, 1, 2)), b.dv(b.p * hop(2, 1, 2))


def stale_keys(b: Backward) -> tuple[Tensor, ...]:
    """The last hop of the backward uses the keys of the hop before."""
    size = TOKENS // BLOCKS
    stale = b.k.clone()
    stale[:, :size] = b.k[:, size : 2 * size]
    p = torch.where(hop(3, 0, 0) == 0, b.weights(stale), b.p)
    return b.dq(b.ds(p)), b.dk(b.ds(p)), b.dv(p)


def wrong_owner(b: Backward) -> tuple[Tensor, ...]:
    dq, dk, dv = b.gradients()
    return dq, *(x.roll(TOKENS // BLOCKS, dims=1) for x in (dk, dv))


def delta_of_a_part(b: Backward) -> tuple[Tensor, ...]:
    """Each block takes the share of delta that its own keys have in it, and not the row's."""
    products = b.p * torch.einsum("bqhd,bkhd->bhqk", b.dout, b.spread(b.v))
    shares = products.unflatten(-1, (BLOCKS, -1)).sum(-1).repeat_interleave(TOKENS // BLOCKS, dim=-1)
    ds = b.ds(b.p, shares - b.dlse[..., None])
    return b.dq(ds), b.dk(ds), b.dv(b.p)


def no_pull_of_lse(b: Backward) -> tuple[Tensor, ...]:
    ds = b.ds(b.p, (b.delta + b.dlse)[..., None])
    return b.dq(ds), b.dk(ds), b.dv(b.p)


def wrong_scale(b: Backward) -> tuple[Tensor, ...]:
    dq, dk, dv = b.gradients()
    return dq * 1.25, dk, dv


BUGS = {
    lost_on_the_way_home: {"L1", "L2", "L3", "L4"},
    lost_in_dq: {"L3"},
    counted_twice: {"L1", "L2", "L3", "L4"},
    stale_keys: {"L1", "L2", "L4"},
    wrong_owner: {"L3", "L4"},
    delta_of_a_part: {"L1"},
    no_pull_of_lse: {"L1"},
    wrong_scale: {"L3"},
}


@pytest.mark.parametrize("dtype", HALF_AND_WHOLE, ids=str)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_what_a_broken_ring_does_to_gradients_breaks_a_law(bug: Any, dtype: torch.dtype) -> None:
    """Each planted bug breaks just the laws that it must: an alarm that names the wrong law would mislead."""
    backward = Backward(dtype, pulls_lse=bug is no_pull_of_lse)
    broken = {law for law, off in backward.imbalances(bug(backward)).items() if not off <= laws.ALLOWANCE}
    if dtype == torch.bfloat16:  # of 32 tokens and numbers of 8 bits, less shows
        assert broken <= BUGS[bug] and bool(broken) is (bug not in (lost_in_dq, wrong_scale))
    elif dtype == torch.float16:
        assert broken and broken <= BUGS[bug]
    else:
        assert broken == BUGS[bug]


@pytest.mark.parametrize("dtype", HALF_AND_WHOLE, ids=str)
@pytest.mark.parametrize("pulls_lse", [False, True])
def test_the_textbook_obeys(dtype: torch.dtype, pulls_lse: bool) -> None:
    """The right gradients are no further off than a rounding or two, or the bugs above would prove nothing."""
    backward = Backward(dtype, pulls_lse)
    assert max(backward.imbalances(backward.gradients()).values()) < 2


MASKS = [
    rf.full,
    rf.causal,
    rf.window(0, 0),
    rf.window(3, 1),
    rf.causal & rf.documents([0, 1, 9, 24]),
    rf.documents([0, 0, 24]),
    rf.prefix(2),
    rf.chunks(5),
]


PROBLEMS = st.tuples(
    st.sampled_from(MASKS),
    st.sampled_from(HALF_AND_WHOLE),
    st.sampled_from([(2, 1), (3, 1), (4, 2), (5, 1)]),
    st.sampled_from([1e-3, 1.0, 100.0]),
    st.sampled_from(["random", "alike", "constant", "zero"]),
    st.sampled_from(["", "", "softcap", "dropout_p", "sinks", "alibi_slopes"]),
    st.booleans(),
    st.integers(0, 1000),
)


@given(PROBLEMS)
@settings(max_examples=8)
def test_no_false_alarm(problem):
    """A right backward passes whatever the mask, dtype, option, amplitude or input is: an alarm stops a training run."""
    assert obeys(*problem)


@pytest.mark.slow
@given(PROBLEMS)
@settings(max_examples=150)
def test_no_false_alarm_anywhere(problem):
    """The same, oftener."""
    assert obeys(*problem)


def obeys(
    mask: rf.Mask,
    dtype: torch.dtype,
    world: tuple[int, int],
    amplitude: float,
    kind: str,
    option: str,
    pulls_lse: bool,
    seed: int,
) -> bool:
    """Whether a call and its backward pass on all ranks of a world, of which so many share a shard."""
    ranks, degree = world
    amplitude = min(amplitude, 10.0) if dtype == torch.float16 else amplitude
    options: dict[str, Any] = {
        "softcap": {"softcap": 5.0},
        "dropout_p": {"dropout_p": 0.3, "seed": 1},
        "sinks": {"sinks": torch.linspace(-1, 1, 4)},
        "alibi_slopes": {"alibi_slopes": torch.linspace(0.1, 0.5, 4)},
    }.get(option, {})

    def one_rank(group: Any) -> bool:
        draw = torch.Generator().manual_seed(seed)
        s = rf.Sharding(24, group, mask, "zigzag", heads_axis=degree, check="verify")

        def tensor(heads: int, size: float) -> Tensor:
            x = torch.randn(2, 24, heads, 4, generator=draw)
            x = {"random": x, "alike": x[:, :1].expand_as(x), "constant": torch.ones_like(x), "zero": x * 0}[kind]
            return s.shard((x * size).to(dtype), 1)

        q, k, v, dout = tensor(4, amplitude), tensor(2, amplitude), tensor(2, 1.0), tensor(4, 1.0)
        out, lse = rf.ring_attention(*(x.requires_grad_() for x in (q, k, v)), s, return_lse=True, **options)
        loss = (out * dout).sum()
        if pulls_lse:
            loss = loss + (lse * torch.linspace(-1, 1, lse.shape[2])).where(lse != -torch.inf, 0).sum()
        loss.backward()
        return True

    return all(rf.local_world(ranks).run(one_rank))


def test_a_ring_that_loses_a_gradient_stops_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes a step with it: the error comes on all ranks, and says which law and which call."""
    monkeypatch.setattr(circulate, "_add", lambda *_: None)  # a total that comes by is passed on as it came

    def one_rank(group: Any) -> str:
        s = rf.Sharding(24, group, rf.full, "contiguous", "ring", check="verify")
        draw = torch.Generator().manual_seed(group.rank)
        q, k, v = (torch.randn(1, s.local_length, n, 4, generator=draw).requires_grad_() for n in (4, 1, 1))
        with pytest.raises(IntegrityError) as caught:
            rf.ring_attention(q, k, v, s).square().sum().backward()
        return str(caught.value)

    said = rf.local_world(3).run(one_rank)
    for rank, text in enumerate(said):
        assert f"rank {rank} of 3: call 2 (backward): gradients break a law: L1: sum dkey" in text
        assert "L2: sum dvalue = sum dout is off by" in text and "take no step with them" in text
