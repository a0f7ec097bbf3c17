"""Laws that hold for exact attention whatever the numbers are, over random problems on rings of one process.

A problem is lengths, heads, a mask, a layout and a number of ranks; ``ring`` answers it on that many ranks and puts the
shards together by position, so that nothing here depends on how the library does that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Answer
from test_mask import Masked, masks
from torch import Tensor

import ringflash as rf


@dataclass(frozen=True)
class Problem:
    ranks: int
    layout: str | rf.Layout
    masked: Masked
    queries: int
    keys: int
    q_offset: int
    batch: int
    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    scale: float
    amplitude: float
    seed: int
    backend: str = "reference"

    @property
    def seen(self) -> Tensor:
        """bool ``[batch, queries, keys]``, from the definition of the mask."""
        return self.masked.table(self.queries, self.keys, self.q_offset).expand(self.batch, -1, -1)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout, dlse in float64; q and k have the problem's amplitude."""
        draw = torch.Generator().manual_seed(self.seed)
        b, s_q, s_k, h, n = self.batch, self.queries, self.keys, self.heads, self.kv_heads
        shapes = (
            (b, s_q, h, self.dim),
            (b, s_k, n, self.dim),
            (b, s_k, n, self.v_dim),
            (b, s_q, h, self.v_dim),
            (b, h, s_q),
        )
        q, k, v, dout, dlse = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
        return q * self.amplitude, k * self.amplitude, v, dout, dlse

    def sharding(self, group: Any) -> rf.Sharding:
        return rf.Sharding(self.queries, group, self.masked.mask, self.layout, keys=self.keys, q_offset=self.q_offset)


@st.composite
def scattered(draw: st.DrawFn, length: int, ranks: int) -> rf.Layout:
    """A layout that nobody has a name for: each position goes to a random rank."""
    owner = draw(st.lists(st.integers(0, ranks - 1), min_size=length, max_size=length))
    return rf.Layout(tuple(tuple(range(p, p + 1) for p in range(length) if owner[p] == rank) for rank in range(ranks)))


@st.composite
def problems(draw: st.DrawFn, amplitudes: tuple[float, ...] = (1.0,), least: int = 0) -> Problem:
    """Anything goes: empty and uneven shards, more keys than queries or fewer, queries before and behind the keys."""
    ranks, batch = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    keys = draw(st.integers(least, 20))
    queries = keys if draw(st.booleans()) else draw(st.integers(least, 20))
    q_offset = draw(st.sampled_from([0, keys - queries]) | st.integers(-6, 6))
    masked = draw(masks(keys, batch) if keys else st.just(Masked(rf.causal, (oracle.causal(),) * batch)))
    layouts = st.sampled_from(["contiguous", "zigzag", "striped", "auto"])
    layout = draw(layouts if queries != keys else layouts | scattered(keys, ranks))
    kv_heads = draw(st.integers(1, 2))
    dim = draw(st.sampled_from([1, 3, 8]))
    v_dim = draw(st.sampled_from([dim, dim, 2]))
    return Problem(
        ranks=ranks,
        layout=layout,
        masked=masked,
        queries=queries,
        keys=keys,
        q_offset=q_offset,
        batch=batch,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        dim=dim,
        v_dim=v_dim,
        scale=draw(st.sampled_from([dim**-0.5, 0.37])),
        amplitude=draw(st.sampled_from(amplitudes)),
        seed=draw(st.integers(0, 10_000)),
        backend=draw(st.sampled_from(["reference", "aten"])) if v_dim == dim else "reference",
    )


def ring(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None, dlse: Tensor | None = None, **options: Any
) -> Answer:
    """Out, lse and gradients of ``(out * dout).sum() + (lse * dlse).sum()`` on all ranks, put together by position.

    Without dout there is no backward, and gradients stay NaN.
    """
    options = {"backend": p.backend, "scale": p.scale} | options

    def one_rank(group: Any) -> list[Tensor]:
        s = p.sharding(group)
        mine, theirs = s.positions, s.key_sharding.positions
        leaves = [x.detach()[:, at].requires_grad_(dout is not None) for x, at in ((q, mine), (k, theirs), (v, theirs))]
        out, lse = rf.ring_attention(*leaves, s, return_lse=True, **options)
        if dout is None:
            return [mine, theirs, out, lse, *(torch.full_like(x, torch.nan) for x in leaves)]
        loss = (out * dout[:, mine]).sum()
        if dlse is not None:
            loss = loss + torch.where(lse == -torch.inf, 0.0, lse * dlse[:, :, mine]).sum()
        return [mine, theirs, out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]

    with torch.enable_grad():
        ranks = rf.local_world(p.ranks).run(one_rank)
    shapes = (*q.shape[:3], v.shape[3]), (len(q), p.heads, p.queries), q.shape, k.shape, v.shape
    out, lse, dq, dk, dv = (torch.full(shape, torch.nan, dtype=torch.float64) for shape in shapes)
    for mine, theirs, *shards in ranks:
        out[:, mine], lse[:, :, mine], dq[:, mine], dk[:, theirs], dv[:, theirs] = shards
    return Answer(out, lse, dq, dk, dv)


def one_device(p: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor, **options: Any) -> Answer:
    """The same of ``flash_attention``."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    options = {"backend": p.backend, "scale": p.scale} | options
    out, lse = rf.flash_attention(*leaves, mask=p.masked.mask, q_offset=p.q_offset, return_lse=True, **options)
    loss = (out * dout).sum() + torch.where(lse == -torch.inf, 0.0, lse * dlse).sum()
    return Answer(out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves))


def assert_same(ours: Answer, expected: Answer, p: Problem) -> None:
    """Equal up to what rounding a score by one unit in the last place may change, at this problem's magnitudes."""
    q, k, v, dout, dlse = (x.abs().max().item() if x.numel() else 1.0 for x in p.tensors())
    largest_score = 1 + p.dim * q * k * abs(p.scale)
    unit = 8 * torch.finfo(torch.float64).eps * largest_score
    ds = (p.v_dim * dout * v * 2 + dlse) * abs(p.scale)
    rows = p.queries * p.heads
    allowed = Answer(out=unit * v, lse=unit, dq=unit * ds * k, dk=unit * ds * q * rows, dv=unit * dout * rows)
    for name, mine, right, most in zip(Answer._fields, ours, expected, allowed, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=most, msg=lambda text, name=name: f"{name}: {text}")


@given(problems(amplitudes=(1e-3, 1.0, 30.0, 1e4)))
@settings(max_examples=100)
def test_a_ring_is_the_textbook_on_one_device(p):
    """Out, lse, dq, dk and dv do not depend on the number of ranks or the layout, and are those of dense attention."""
    tensors = p.tensors()
    q, k, v, dout, dlse = tensors
    ours = ring(p, *tensors)
    assert_same(ours, oracle.answer(q, k, v, p.seen, dout, dlse, scale=p.scale), p)
    assert_same(ours, one_device(p, *tensors), p)


@given(problems(), st.sampled_from(["softcap", "alibi_slopes", "dropout_p", "sinks"]), st.data())
@settings(max_examples=60)
def test_no_option_notices_the_ring(p, option, data):
    """Biases and random numbers are keyed on global positions, and a sink counts once, however many ranks there are."""
    p = replace(p, backend="reference")
    values = {
        "softcap": {"softcap": 1.5},
        "alibi_slopes": {"alibi_slopes": torch.linspace(0.1, 0.7, p.heads, dtype=torch.float64)},
        "dropout_p": {"dropout_p": 0.3, "seed": data.draw(st.integers(-(2**63), 2**63 - 1))},
        "sinks": {"sinks": torch.linspace(-1, 1, p.heads, dtype=torch.float64)},
    }
    tensors = p.tensors()
    assert_same(ring(p, *tensors, **values[option]), one_device(p, *tensors, **values[option]), p)


@given(problems(amplitudes=(1.0, 100.0)))
@settings(max_examples=40)
def test_sink_gradients_of_the_ranks_add_up(p):
    """A sink is a parameter: each rank has its share of the gradient, and the sum is that of one device."""
    q, k, v, dout, dlse = p.tensors()
    sinks = torch.linspace(-1, 1, p.heads, dtype=torch.float64)

    def one_rank(group: Any) -> Tensor:
        s = p.sharding(group)
        mine, theirs = s.positions, s.key_sharding.positions
        logits = sinks.clone().requires_grad_()
        out, lse = rf.ring_attention(
            q[:, mine], k[:, theirs], v[:, theirs], s, sinks=logits, return_lse=True, scale=p.scale, backend=p.backend
        )
        loss = (out * dout[:, mine]).sum() + (lse * dlse[:, :, mine]).sum()
        return torch.autograd.grad(loss, logits)[0]

    ours = sum(rf.local_world(p.ranks).run(one_rank))
    logits = sinks.clone().requires_grad_()
    out, lse = oracle.attention(q, k, v, p.seen, scale=p.scale, sinks=logits)
    expected = torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), logits)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@given(problems(amplitudes=(1.0, 1e4)))
@settings(max_examples=40)
def test_a_mean_of_ones_is_one(p):
    """Weights add up to 1, on rows that see anything; and a mean never leaves the range of what is averaged."""
    q, k, v, *_ = p.tensors()
    sees = p.seen.any(-1)
    ones = ring(p, q, k, torch.ones_like(v)).out
    torch.testing.assert_close(ones, sees.double()[:, :, None, None].expand_as(ones), rtol=0, atol=1e-13)
    out = ring(p, q, k, v).out
    group = p.heads // p.kv_heads
    for b, i in sees.nonzero().tolist():
        values = v[b, p.seen[b, i]].repeat_interleave(group, dim=1)
        assert (out[b, i] <= values.amax(0) + 1e-12).all() and (out[b, i] >= values.amin(0) - 1e-12).all()


@given(problems(amplitudes=(1.0, 100.0), least=1))
@settings(max_examples=40)
def test_every_key_twice_adds_ln_2_to_lse_and_nothing_to_out(p):
    """A lost hop, a logarithm to the wrong base or a forgotten one breaks this."""
    p = replace(
        p,
        masked=Masked(rf.full, p.masked.sees[:1]),
        layout="contiguous" if isinstance(p.layout, rf.Layout) else p.layout,
    )
    q, k, v, *_ = p.tensors()
    once = ring(p, q, k, v)
    twice = ring(replace(p, keys=2 * p.keys), q, torch.cat([k, k], 1), torch.cat([v, v], 1))
    torch.testing.assert_close(twice.out, once.out, rtol=0, atol=1e-9)
    torch.testing.assert_close(twice.lse, once.lse + math.log(2), rtol=1e-11, atol=1e-9)


@given(problems(least=1), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_a_full_mask_does_not_know_the_order_of_keys(p, random):
    """Permuted keys give the same out and dq, and permuted dk and dv: every gradient comes home to its own key."""
    p = replace(p, masked=Masked(rf.full, (oracle.full(),)))
    q, k, v, dout, dlse = p.tensors()
    order = list(range(p.keys))
    random.shuffle(order)
    straight = ring(p, q, k, v, dout, dlse)
    shuffled = ring(p, q, k[:, order], v[:, order], dout, dlse)
    assert_same(shuffled, straight._replace(dk=straight.dk[:, order], dv=straight.dv[:, order]), p)


@given(problems(least=1), st.data())
@settings(max_examples=60)
def test_influence_is_the_mask_bitwise(p, data):
    """A key moves exactly the rows that see it; all others keep every bit of out, lse and dq, however large it is."""
    q, k, v, dout, dlse = p.tensors()
    key = data.draw(st.integers(0, p.keys - 1))
    before = ring(p, q, k, v, dout, dlse)
    louder_k, louder_v = k.clone(), v.clone()
    louder_v[:, key] += 1e6
    if moves_scores := data.draw(st.booleans()):
        louder_k[:, key] *= 1e5
    after = ring(p, q, louder_k, louder_v, dout, dlse)
    sees = p.seen[:, :, key]  # [batch, queries]
    for mine, old in (
        (after.out, before.out),
        (after.lse.transpose(1, 2), before.lse.transpose(1, 2)),
        (after.dq, before.dq),
    ):
        assert torch.equal(mine[~sees], old[~sees])
    if not moves_scores:  # weights stay, so that a larger value must show
        assert (after.out[sees] != before.out[sees]).all()


@given(problems(amplitudes=(0.1, 1.0)))
@settings(max_examples=60)
def test_conservation_laws(p):
    """Rows of ds add up to 0 and rows of p to 1: sums over all tokens that a lost or misdirected hop breaks."""
    q, k, v, dout, _ = p.tensors()
    out, _, dq, dk, dv = ring(p, q, k, v, dout)
    per_key_head = (dout * p.seen.any(-1)[:, :, None, None]).unflatten(2, (p.kv_heads, -1)).sum((1, 3))
    laws = {
        "L1: dk adds up to 0": (dk.sum(1), torch.zeros_like(dk.sum(1))),
        "L2: dv adds up to dout": (dv.sum(1), per_key_head),
        "L3: <dq, q> = <dk, k>": ((dq * q).sum(), (dk * k).sum()),
        "L4: <dv, v> = <dout, out>": ((dv * v).sum(), (dout * out).sum()),
    }
    for law, (one, other) in laws.items():
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, law=law: f"{law}: {text}")


@given(problems(), st.floats(-5, 5))
@settings(max_examples=40)
def test_a_constant_feature_shifts_lse_by_itself_times_scale(p, c):
    """Appending 1 to every query and c to every key adds c x scale to every score: lse moves, out and dv stay."""
    q, k, v, dout, dlse = p.tensors()
    plain = ring(p, q, k, v, dout, dlse, backend="reference")
    taller = replace(p, dim=p.dim + 1, backend="reference")
    q, k = torch.cat([q, torch.ones_like(q[..., :1])], -1), torch.cat([k, torch.full_like(k[..., :1], c)], -1)
    moved = ring(taller, q, k, v, dout, dlse)
    dk, dq = moved.dk[..., :-1], moved.dq[..., :-1]
    assert_same(Answer(moved.out, moved.lse - c * p.scale, dq, dk, moved.dv), plain, replace(p, amplitude=10.0))


@given(problems(amplitudes=(0.5,), least=1), st.booleans())
@settings(max_examples=40)
def test_gradients_are_the_slope_of_the_loss(p, uses_lse):
    """A step along a random direction changes the loss as dq, dk and dv say."""
    *inputs, dout, dlse = p.tensors()
    weights = dlse if uses_lse else torch.zeros_like(dlse)
    draw = torch.Generator().manual_seed(p.seed + 1)
    direction = [torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in inputs]

    def loss(step: float) -> float:
        a = ring(p, *(x + step * d for x, d in zip(inputs, direction, strict=True)))
        return ((a.out * dout).sum() + torch.where(a.lse == -torch.inf, 0.0, a.lse * weights).sum()).item()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    a = ring(p, *inputs, dout, weights)
    told = sum((g * d).sum().item() for g, d in zip((a.dq, a.dk, a.dv), direction, strict=True))
    assert told == pytest.approx(slope, rel=1e-6, abs=1e-6)


class _Whole(torch.autograd.Function):
    """The ring as one function of whole tensors, for gradcheck: forward and backward each run all ranks."""

    @staticmethod
    def forward(ctx: Any, p: Problem, sinks: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        ctx.p = p
        ctx.save_for_backward(q, k, v, sinks)
        a = ring(p, q, k, v, sinks=sinks)
        return a.out, torch.where(a.lse == -torch.inf, 0.0, a.lse)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
        q, k, v, sinks = ctx.saved_tensors
        a = ring(ctx.p, q, k, v, dout, dlse, sinks=sinks)
        return None, None, a.dq, a.dk, a.dv


GRADCHECKED = {
    "causal zigzag": Problem(3, "zigzag", Masked(rf.causal, (oracle.causal(),)), 7, 7, 0, 1, 2, 1, 3, 2, 0.6, 1.0, 1),
    "more ranks than tokens": Problem(
        4, "striped", Masked(rf.full, (oracle.full(),)), 3, 3, 0, 1, 1, 1, 2, 2, 0.7, 1.0, 2, "aten"
    ),
    "more keys than queries": Problem(
        3, "contiguous", Masked(rf.window(2, 1), (oracle.window(2, 1),)), 3, 6, 2, 2, 2, 2, 2, 2, 0.7, 1.0, 3, "aten"
    ),
    "documents": Problem(
        2,
        "contiguous",
        Masked(rf.documents([0, 2, 2, 6]), (oracle.documents([0, 2, 2, 6]),)),
        6,
        6,
        0,
        1,
        3,
        1,
        2,
        1,
        0.7,
        1.0,
        4,
    ),
}


@pytest.mark.parametrize("use", ["out", "lse", "sinks"])
@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck_through_the_ring(name, use):
    """Every element of every gradient, of out and of lse, against differences; also with sinks taking their part."""
    p = GRADCHECKED[name]
    inputs = [x.requires_grad_() for x in p.tensors()[:3]]
    sinks = torch.linspace(-0.5, 0.5, p.heads, dtype=torch.float64) if use == "sinks" else None

    def whole(*tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = _Whole.apply(p, sinks, *tensors)
        return (out,) if use == "out" else (out, lse)

    assert torch.autograd.gradcheck(whole, inputs, fast_mode=use == "sinks")
