"""Partials add up: the table of hard cases, the monoid laws, long chains, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ringflash as rf
from ringflash.partial import absorb, accumulation_dtype, nothing

INF, NAN = math.inf, math.nan
NOTHING = (0.0, -INF)


def one(out: float, lse: float, dtype: torch.dtype = torch.float32) -> rf.Partial:
    return rf.Partial(torch.full((1, 1, 1, 1), out, dtype=dtype), torch.full((1, 1, 1), lse, dtype=dtype))


def values(part: rf.Partial) -> tuple[float, float]:
    return part.out.item(), part.lse.item()


TABLE = [
    (NOTHING, NOTHING, NOTHING),
    ((1.5, 0.3), NOTHING, (1.5, 0.3)),
    ((1.5, 0.3), (NAN, -INF), (1.5, 0.3)),  # a block that nobody has written
    ((1.5, 0.3), (INF, -INF), (1.5, 0.3)),
    ((NAN, -INF), (NAN, -INF), NOTHING),
    ((1.5, 0.3), (0.0, INF), (1.5, 0.3)),  # FlashAttention 2's empty row
    ((0.0, INF), (0.0, INF), NOTHING),
    (NOTHING, (2.0, 5.0), (2.0, 5.0)),
    ((1.0, 0.0), (2.0, 100.0), (2.0, 100.0)),
    ((1.0, 0.0), (2.0, -1e4), (1.0, 0.0)),
    ((1.0, 1e4), (2.0, 1e4 + 1), (1.7310586, 10001.3133)),
    ((1e6, 0.0), (1e-3, 40.0), (1e-3, 40.0)),
    ((1.0, -3e38), (2.0, 3e38), (2.0, 3e38)),
    ((1.0, -3e38), (3.0, -3e38), (2.0, -3e38)),
    ((1.0, 0.0), (3.0, 0.0), (2.0, math.log(2))),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("a", "b", "expected"), TABLE)
def test_merge_table(a, b, expected, dtype):
    """Every formula for merging that people use fails one of these rows, with NaN, with inf or with a lost digit."""
    for left, right in ((a, b), (b, a)):
        merged = values(rf.merge(one(*left, dtype), one(*right, dtype)))
        assert merged == pytest.approx(expected, rel=1e-6)


partials = st.one_of(
    st.just(NOTHING),
    st.tuples(st.floats(-1e3, 1e3), st.floats(-1e4, 1e4)),
    st.tuples(st.floats(-1, 1), st.floats(-3, 3)),
)


def assert_close(a: rf.Partial, b: rf.Partial, size: float) -> None:
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.out, b.out, rtol=1e-10, atol=1e-10 * size)


@given(st.tuples(partials, partials, partials))
@settings(max_examples=300)
def test_partials_are_a_commutative_monoid(three):
    """A ring, a tree and a single device take the same sum in different orders."""
    a, b, c = (one(*values, dtype=torch.float64) for values in three)
    size = max(1.0, *(abs(x.out.item()) for x in (a, b, c)))
    identity = nothing(1, 1, 1, 1, torch.float64, torch.device("cpu"))
    assert_close(rf.merge(rf.merge(a, b), c), rf.merge(a, rf.merge(b, c)), size)
    assert values(rf.merge(a, b)) == values(rf.merge(b, a))
    assert values(rf.merge(a, identity)) == values(a) == values(rf.merge(identity, a))


@given(st.lists(partials, min_size=2, max_size=8))
@settings(max_examples=100)
def test_absorb_is_merge_in_place(parts):
    """The loop that owns its total gets the same bits without a copy."""
    first, *others = (one(*part) for part in parts)
    total = rf.Partial(first.out.clone(), first.lse.clone())
    homes = total.out.data_ptr(), total.lse.data_ptr()
    merged = first
    for other in others:
        merged = rf.merge(merged, other)
        absorb(total, other)
    assert torch.equal(total.out, merged.out) and torch.equal(total.lse, merged.lse)
    assert homes == (total.out.data_ptr(), total.lse.data_ptr())


def test_absorb_ignores_what_an_empty_part_holds():
    """A kernel that sees no key need not write its out."""
    total = one(1.5, 0.3)
    absorb(total, one(NAN, -INF))
    assert values(total) == pytest.approx((1.5, 0.3))


def chain(lse: Tensor, out: Tensor) -> rf.Partial:
    """The merge of n partials one after another: ``lse [n, rows]``, ``out [n, rows, d]``."""
    total = nothing(1, out.shape[1], 1, out.shape[2], out.dtype, out.device)
    for i in range(len(lse)):
        absorb(total, rf.Partial(out[i][None, :, None], lse[i][None, None]))
    return total


@pytest.mark.parametrize("spread", [1.0, 30.0, 3000.0])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 1024])
def test_long_chains_stay_exact(length, spread):
    """Error must not grow with the number of ranks: a thousand merges in float32 against one softmax in float64."""
    draw = torch.Generator().manual_seed(length)
    lse = torch.randn(length, 16, generator=draw, dtype=torch.float64) * spread
    out = torch.randn(length, 16, 8, generator=draw, dtype=torch.float64)
    lse32, out32 = lse.float(), out.float()
    total = chain(lse32, out32)
    weights = torch.softmax(lse32.double(), dim=0)
    expected_lse = torch.logsumexp(lse32.double(), dim=0)
    expected = (weights[..., None] * out32.double()).sum(0)
    unit = torch.finfo(torch.float32).eps * (1 + expected_lse.abs().max().item())
    # the running lse is rounded at every step, in either direction; these steps cancel in out
    torch.testing.assert_close(total.lse[0, 0].double(), expected_lse, rtol=0, atol=unit * length**0.5)
    torch.testing.assert_close(total.out[0, :, 0].double(), expected, rtol=0, atol=4 * unit)
    exact = chain(lse, out)
    weights = torch.softmax(lse, dim=0)
    torch.testing.assert_close(exact.out[0, :, 0], (weights[..., None] * out).sum(0), rtol=0, atol=1e-11)


def random_partial(seed: int, empty: tuple[int, ...] = ()) -> rf.Partial:
    draw = torch.Generator().manual_seed(seed)
    out = torch.randn(2, 3, 2, 2, generator=draw, dtype=torch.float64)
    lse = torch.randn(2, 2, 3, generator=draw, dtype=torch.float64)
    for row in empty:
        lse[:, :, row], out[:, row] = -INF, 0.0
    return rf.Partial(out.requires_grad_(), lse.requires_grad_())


@pytest.mark.parametrize("empty", [(), (1,), (0, 2)])
def test_merge_differentiates(empty):
    """Split attention is trained through merge, lse included; rows where one side has seen nothing included."""
    a, b = random_partial(0), random_partial(1, empty)

    def merged(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(rf.merge(rf.Partial(*tensors[:2]), rf.Partial(*tensors[2:])))

    assert torch.autograd.gradcheck(merged, (*a, *b))


@pytest.mark.parametrize("held", [0.0, NAN, INF])
def test_gradients_pass_by_a_side_that_saw_nothing(held):
    """What an empty block holds must not reach the gradient of the other side, nor its own."""
    a, b = random_partial(0), random_partial(1)
    with torch.no_grad():
        b.out[:, 1], b.lse[:, :, 1] = held, -INF
    merged = rf.merge(a, b)
    g_out, g_lse = random_partial(2)
    grads = torch.autograd.grad((merged.out * g_out).sum() + (merged.lse * g_lse).sum(), (*a, *b))
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(grads[0][:, 1], g_out[:, 1])  # all the weight of row 1 is on a
    torch.testing.assert_close(grads[1][:, :, 1], g_lse[:, :, 1])
    assert not grads[2][:, 1].any() and not grads[3][:, :, 1].any()


def test_gradients_of_two_sides_that_saw_nothing_are_zero():
    """A query of padding must not poison a whole batch with NaN."""
    a, b = random_partial(0, (1,)), random_partial(1, (1,))
    merged = rf.merge(a, b)
    g_out, g_lse = random_partial(2)
    lse = torch.where(merged.lse == -INF, 0.0, merged.lse)
    for grad in torch.autograd.grad((merged.out * g_out).sum() + (lse * g_lse).sum(), (*a, *b)):
        assert grad.isfinite().all()
        rows = grad[:, 1] if grad.ndim == 4 else grad[:, :, 1]
        assert not rows.any()


def test_a_sink_is_a_key_of_value_zero():
    """It takes its part of the softmax and adds nothing, one logit for each head."""
    logits = torch.tensor([0.5, -INF], dtype=torch.float64)
    part = random_partial(0)
    merged = rf.merge(part, rf.sink(logits))
    expected = torch.logaddexp(part.lse, logits[None, :, None])
    torch.testing.assert_close(merged.lse, expected)
    share = torch.exp(part.lse - expected).transpose(1, 2)[..., None]
    torch.testing.assert_close(merged.out, part.out * share)
    assert torch.equal(merged.out[:, :, 1], part.out[:, :, 1])  # a sink of -inf is no sink


def test_a_sink_on_an_empty_row_leaves_zero():
    """A query that sees nothing but the sink gets 0, and the sink's logit for lse."""
    empty = nothing(1, 2, 3, 4, torch.float32, torch.device("cpu"))
    merged = rf.merge(empty, rf.sink(torch.tensor([1.0, 2.0, 3.0])))
    assert not merged.out.any()
    assert merged.lse.tolist() == [[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]]


def test_a_sink_differentiates():
    """Sinks are learned."""
    part = random_partial(0)
    logits = torch.tensor([0.5, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: tuple(rf.merge(rf.Partial(*map(Tensor.detach, part)), rf.sink(x))), logits
    )


def test_partials_of_disjoint_keys_merge_to_the_whole():
    """What all of this is for: attention over two halves of the keys, merged, is attention over all."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    halves = [
        rf.Partial(*rf.flash_attention(q, k[:, at], v[:, at], rf.full, return_lse=True))
        for at in (slice(5), slice(5, 9))
    ]
    whole = rf.Partial(*rf.flash_attention(q, k, v, rf.full, return_lse=True))
    for mine, expected in zip(rf.merge(*halves), whole, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_partials_are_kept_in_float32_at_least(dtype):
    """Partials rounded to bfloat16 at every hop lose digits with every rank."""
    assert accumulation_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.ones(1, 2, 1, 4, dtype=dtype)
    out, lse = rf.flash_attention(x, x, x, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, accumulation_dtype(dtype))
