"""Each backend against the textbook in float64, on every option that it has, and on what is known to break kernels."""

from __future__ import annotations

import math
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
from ringflash import aten, reference
from ringflash.backend import BACKENDS, select
from ringflash.intervals import Intervals
from ringflash.reference import Scoring

NAMES = ["aten", "reference"]  # triton has a suite of its own, tests/kernels
PLAIN = Scoring(scale=0.3)
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative to the largest element of the expected tensor


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


def inputs(
    queries: int,
    keys: int | None = None,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 8),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v, dout, dlse."""
    keys = queries if keys is None else keys
    (h, n), (d, d_v) = heads, dims
    shapes = (
        (batch, queries, h, d),
        (batch, keys, n, d),
        (batch, keys, n, d_v),
        (batch, queries, h, d_v),
        (batch, h, queries),
    )
    return draw(*shapes, dtype=dtype, seed=seed)


def answer(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor, **options: Any) -> Answer:
    """Of ``flash_attention``, for the loss ``(out * dout).sum() + (lse * dlse).sum()`` over rows that see something."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = rf.flash_attention(*leaves, return_lse=True, **options)
    loss = (out * dout).sum() + torch.where(lse == -torch.inf, 0.0, lse * dlse).sum()
    return Answer(out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves))


def assert_close(ours: Answer, expected: Answer, dtype: torch.dtype = torch.float64) -> None:
    for name, mine, right in zip(Answer._fields, ours, expected, strict=True):
        finite = right[right.isfinite()]
        most = LIMIT[dtype] * max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
        assert mine.dtype == dtype
        torch.testing.assert_close(
            mine.double(), right, rtol=0, atol=most, msg=lambda text, name=name: f"{name}: {text}"
        )


MASKS = {
    "full": (rf.full, oracle.full()),
    "causal": (rf.causal, oracle.causal()),
    "window": (rf.window(9, 4), oracle.window(9, 4)),
    "causal window": (rf.window(40, 0), oracle.window(40, 0)),
    "prefix": (rf.prefix(50), oracle.prefix(50)),
    "chunks": (rf.chunks(16), oracle.chunks(16)),
}


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", NAMES)
def test_masks(backend, name, dtype):
    """Long enough for every kind of tile and odd in every size; float32 inputs are read exactly by the oracle."""
    mask, sees = MASKS[name]
    tensors = inputs(117, dtype=dtype)
    expected = oracle.answer(*tensors[:3], oracle.table(sees, 117), *tensors[3:], scale=0.3)
    assert_close(answer(*tensors, mask=mask, scale=0.3, backend=backend), expected, dtype)


@st.composite
def small(draw: st.DrawFn) -> tuple[Masked, tuple[int, int], int, int]:
    """A mask, numbers of queries and keys, where the queries begin, and how many batch rows."""
    keys, batch = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    queries = keys if draw(st.booleans()) else draw(st.integers(1, 40))
    return draw(masks(keys, batch)), (queries, keys), draw(st.integers(-12, 12)), batch


@pytest.mark.parametrize("backend", NAMES)
@given(
    case=small(),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3)]),
    dim=st.sampled_from([1, 3, 8, 17]),
    d_v=st.integers(1, 9),
)
@settings(max_examples=80)
def test_random_masks_sizes_and_heads(backend, case, heads, dim, d_v):
    """Grouped and single key heads, odd and differing head dims, documents of each row, queries before the keys."""
    masked, (queries, keys), offset, batch = case
    tensors = inputs(queries, keys, batch, heads, (dim, dim if backend == "aten" else d_v))
    expected = oracle.answer(*tensors[:3], masked.table(queries, keys, offset), *tensors[3:])
    assert_close(answer(*tensors, mask=masked.mask, q_offset=offset, backend=backend), expected)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("amplitude", [1e-4, 30.0, 1e4])
def test_scores_of_any_size(backend, amplitude):
    """From a mean of all values to one value alone, without overflow; and equal logits stay equal."""
    q, k, v, dout, dlse = inputs(33)
    q, k = q * amplitude, k * amplitude
    expected = oracle.answer(q, k, v, oracle.table(oracle.causal(), 33), dout, dlse)
    ours = answer(q, k, v, dout, dlse, backend=backend)
    for mine, right in zip(ours[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-13 * (1 + amplitude**2))
    assert all(x.isfinite().all() for x in ours)
    flat = answer(q, torch.ones_like(k), v, dout, dlse, mask=rf.full, backend=backend)
    torch.testing.assert_close(
        flat.out, v.mean(1).repeat_interleave(2, 1)[:, None].expand_as(q), rtol=0, atol=1e-14 * (100 + amplitude)
    )


def options_of(name: str, heads: int, batch: int, seen: Tensor, offset: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an option is called here, and what it means to the oracle."""
    queries, keys = seen.shape[-2:]
    at, to = torch.arange(queries) + offset, torch.arange(keys)
    distance = (at[:, None] - to).abs().double()
    slopes = draw((heads,), (batch, heads), seed=5)
    kept = reference.keep_mask(7, batch, heads, at, to, 0.25)
    sinks = draw((heads,), seed=6)[0]
    return {
        "scale": ({"scale": -0.7}, {"scale": -0.7}),
        "softcap": ({"softcap": 1.3}, {"softcap": 1.3}),
        "alibi": ({"alibi_slopes": slopes[0]}, {"bias": -slopes[0][:, None, None] * distance}),
        "alibi for each row": ({"alibi_slopes": slopes[1]}, {"bias": -slopes[1][:, :, None, None] * distance}),
        "dropout": ({"dropout_p": 0.25, "seed": 7}, {"keep": kept / 0.75}),
        "sinks": ({"sinks": sinks}, {"sinks": sinks}),
        "all": (
            {"softcap": 1.3, "alibi_slopes": slopes[0], "dropout_p": 0.25, "seed": 7, "sinks": sinks},
            {"softcap": 1.3, "bias": -slopes[0][:, None, None] * distance, "keep": kept / 0.75, "sinks": sinks},
        ),
    }[name]


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("offset", [0, -9, 30])
@pytest.mark.parametrize("name", ["scale", "softcap", "alibi", "alibi for each row", "dropout", "sinks", "all"])
def test_options_of_the_reference(name, offset, dtype):
    """Each alone and all together, with queries that begin before the keys and behind them."""
    masked = rf.window(11, 3) & rf.prefix(20), oracle.both(oracle.window(11, 3), oracle.prefix(20))
    seen = oracle.table(masked[1], 23, 31, offset)
    tensors = inputs(23, 31, dtype=dtype)
    ours, theirs = options_of(name, 4, 2, seen, offset)
    expected = oracle.answer(*tensors[:3], seen, *tensors[3:], **theirs)
    assert_close(answer(*tensors, mask=masked[0], q_offset=offset, backend="reference", **ours), expected, dtype)


@pytest.mark.parametrize("name", ["scale", "sinks"])
def test_options_of_aten(name):
    """It has these two; the sink is added outside of any kernel."""
    seen = oracle.table(oracle.window(11, 3), 50)
    tensors = inputs(50)
    ours, theirs = options_of(name, 4, 2, seen, 0)
    expected = oracle.answer(*tensors[:3], seen, *tensors[3:], **theirs)
    assert_close(answer(*tensors, mask=rf.window(11, 3), backend="aten", **ours), expected)


@pytest.mark.parametrize("option", [{"softcap": 1.0}, {"alibi_slopes": torch.ones(4)}, {"dropout_p": 0.1, "seed": 1}])
def test_what_aten_lacks_is_refused_by_name(option):
    """Nothing is ignored; auto takes a backend that has it."""
    q, k, v, *_ = inputs(5, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"backend='aten' has no {next(iter(option))}; use backend='auto'"):
        rf.flash_attention(q, k, v, backend="aten", **option)
    auto = rf.flash_attention(q, k, v, **option)
    assert torch.equal(auto, rf.flash_attention(q, k, v, backend="reference", **option))
    with pytest.raises(ValueError, match="one head_dim, and query has 8, value 7"):
        rf.flash_attention(q, k, v[..., :7], backend="aten")
    with pytest.raises(ValueError, match="backend is 'best'; accepted are 'auto'"):
        rf.flash_attention(q, k, v, backend="best")


def test_auto_is_the_first_that_can():
    """The fast one for a plain call on a CPU."""
    q, _, v, *_ = inputs(5)
    assert select("auto", q, v, PLAIN).name == "aten"
    assert select("auto", q, v, Scoring(1.0, softcap=2.0)).name == "reference"


@pytest.mark.parametrize("backend", NAMES)
def test_the_gradient_of_sinks(backend):
    """A sink's value is 0, so that only its share of the softmax counts, through out and through lse."""
    q, k, v, dout, dlse = inputs(19)
    seen = oracle.table(oracle.window(3, 0), 19, 19, 4)
    gradients = []
    for attention in (
        lambda sinks: rf.flash_attention(
            q, k, v, rf.window(3, 0), q_offset=4, sinks=sinks, return_lse=True, backend=backend
        ),
        lambda sinks: oracle.attention(q, k, v, seen, sinks=sinks),
    ):
        sinks = torch.linspace(-1, 2, 4, dtype=torch.float64, requires_grad=True)
        out, lse = attention(sinks)
        gradients.append(torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), sinks)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_philox_has_its_known_answer():
    """Philox4x32-10 of counter 0 and key 0 begins with 0x6627e8d5 (Salmon et al. 2011); a p on either side decides."""
    zero, first = torch.zeros(1, dtype=torch.int64), 0x6627E8D5
    assert reference.keep_mask(0, 1, 1, zero, zero, first / 2**32).item()
    assert not reference.keep_mask(0, 1, 1, zero, zero, (first + 1) / 2**32).item()


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> int:
    """The first word, in plain integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b % 2**32, a >> 32 ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-5, 2**31), st.integers(0, 2**31), st.floats(0.05, 0.95))
@settings(max_examples=60)
def test_dropout_is_philox_of_position_head_and_row(seed, query, key, p):
    """The counter is (key, query, head, row) and the key the seed: whoever writes a kernel can read it here."""
    kept = reference.keep_mask(seed, 2, 3, torch.tensor([query]), torch.tensor([key]), p)
    for b in range(2):
        for h in range(3):
            word = philox((key % 2**32, query % 2**32, h, b), (seed % 2**32, (seed >> 32) % 2**32))
            assert kept[b, h, 0, 0].item() == (word >= int(p * 2**32))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_fraction_that_was_asked(p):
    """Within four standard deviations, in every head and every batch row, and no two of them alike."""
    kept = reference.keep_mask(3, 2, 3, torch.arange(100), torch.arange(100), p).flatten(0, 1).flatten(1).double()
    assert ((kept.mean(1) - (1 - p)).abs() < 4 * math.sqrt(p * (1 - p) / 1e4)).all()
    assert ((torch.corrcoef(kept) - torch.eye(6)).abs() < 0.05).all()
    other = reference.keep_mask(4, 2, 3, torch.arange(100), torch.arange(100), p).flatten().double()
    assert abs(torch.corrcoef(torch.stack([kept.flatten(), other]))[0, 1]) < 0.05


@given(st.integers(1, 11), st.integers(1, 11), st.integers(-20, 20))
@settings(max_examples=40)
def test_dropout_does_not_depend_on_how_cells_are_split(cut_queries, cut_keys, offset):
    """Blocks, shards and ranks all drop the same weights."""
    queries, keys = torch.arange(12) + offset, torch.arange(12)
    whole = reference.keep_mask(11, 2, 2, queries, keys, 0.5)
    parts = [
        torch.cat([reference.keep_mask(11, 2, 2, q, k, 0.5) for k in (keys[:cut_keys], keys[cut_keys:])], dim=-1)
        for q in (queries[:cut_queries], queries[cut_queries:])
    ]
    assert torch.equal(torch.cat(parts, dim=-2), whole)


def visit(mask: rf.Mask, queries: int, keys: int, offset: int = 0) -> Intervals:
    """The table of the one visit of a world of one."""
    s = rf.Sharding(queries, (0, 1), mask, "contiguous", keys=keys, q_offset=offset)
    return Intervals(rf.plan(s), 0, torch.device("cpu"))


def run(backend: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor, table: Intervals) -> Answer:
    """The two functions of a backend, as the loop calls them."""
    chosen = BACKENDS[backend]
    total = chosen.attend(q, k, v, table, PLAIN, None, q.dtype)
    delta = chosen.delta(dout, total.out, dlse)
    return Answer(
        *total, *chosen.attend_backward(dout, q, k, v, total.lse, delta, table, PLAIN, None, (q.dtype, q.dtype))
    )


@pytest.mark.parametrize("backend", NAMES)
def test_rows_that_see_nothing_are_the_identity(backend):
    """Out 0, lse -inf, gradients 0, never NaN: whole tiles of them, and single ones inside a tile."""
    masked = Masked(rf.window(2, 0), (oracle.window(2, 0),))
    tensors = inputs(70, 50)
    tensors[4][:, :, 52:] = 0.0  # nobody differentiates an lse of -inf
    table = visit(masked.mask, 70, 50)
    ours = run(backend, *tensors, table)
    assert_close(ours, oracle.answer(*tensors[:3], masked.table(70, 50)[0], *tensors[3:], scale=PLAIN.scale))
    assert (ours.lse[:, :, 52:] == -torch.inf).all() and not ours.out[:, 52:].any() and not ours.dq[:, 52:].any()


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("backend", NAMES)
def test_nothing_to_do_is_done(backend, queries, keys):
    """Empty queries or keys kill the process in PyTorch's operator; here they give empty tensors, or empty rows."""
    ours = run(backend, *inputs(queries, keys), visit(rf.full, queries, keys))
    assert ours.out.shape == ours.dq.shape == (2, queries, 4, 8)
    assert ours.dk.shape == ours.dv.shape == (2, keys, 2, 8)
    assert not ours.out.any() and not ours.dq.any() and not ours.dk.any() and (ours.lse == -torch.inf).all()


def strange(x: Tensor, how: str) -> Tensor:
    """The same numbers, laid out in memory as models lay them out."""
    match how:
        case "last dim strided":
            return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
        case "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "sequence first":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        case "head dim first":
            return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        case "slice of a projection":
            wide = torch.full((*x.shape[:2], 3 * x.shape[2], x.shape[3]), torch.nan, dtype=x.dtype)
            wide[:, :, x.shape[2] : 2 * x.shape[2]] = x
            return wide[:, :, x.shape[2] : 2 * x.shape[2]]
        case "misaligned":
            flat = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
            flat[1:] = x.flatten()
            return flat[1:].view(x.shape)
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    ["last dim strided", "heads first", "sequence first", "head dim first", "slice of a projection", "misaligned"],
)
@pytest.mark.parametrize("backend", NAMES)
def test_any_strides(backend, how):
    """A last dimension that is not contiguous gives silently wrong numbers in the operator of PyTorch."""
    tensors = inputs(70)
    odd = [strange(x, how) for x in tensors[:4]]
    assert all(torch.equal(a, b) for a, b in zip(odd, tensors[:4], strict=True))
    table = visit(rf.causal, 70, 70)
    expected = run(backend, *tensors, table)
    for mine, right in zip(run(backend, *odd, tensors[4], table), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", NAMES)
def test_expanded_tensors(backend):
    """Stride 0 along the batch and the heads, as from ``expand``, in inputs and in the incoming gradient."""
    q, k, v, dout, dlse = inputs(20, batch=1, heads=(1, 1))
    wide = [x.expand(3, -1, h, -1) for x, h in ((q, 4), (k, 2), (v, 2), (dout, 4))]
    table = visit(rf.causal, 20, 20)
    ours = run(backend, *wide, dlse.expand(3, 4, -1), table)
    expected = run(backend, *(x.contiguous() for x in wide), dlse.expand(3, 4, -1).contiguous(), table)
    for mine, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows", ["one", "all", "every other head"])
@pytest.mark.parametrize("backend", NAMES)
def test_a_gradient_of_lse_alone_arrives(backend, rows):
    """Where dout is zero and dlse is not, an operator that forms rowsum(dout * out) by itself has nothing to scale."""
    tensors = inputs(40)
    where = {
        "one": (slice(None), 7),
        "all": (slice(None),),
        "every other head": (slice(None), slice(None), slice(0, 4, 2)),
    }
    tensors[3][where[rows]] = 0.0
    expected = oracle.answer(*tensors[:3], oracle.table(oracle.causal(), 40), *tensors[3:], scale=0.3)
    assert_close(run(backend, *tensors, visit(rf.causal, 40, 40)), expected)


@pytest.mark.parametrize("backend", NAMES)
def test_rows_that_the_loss_leaves_out_get_zero(backend):
    """Prompts and padding have no gradient at all, neither of out nor of lse: 0 / 0 must not spoil the keys of the others."""
    tensors = inputs(40)
    tensors[3][:, 5:9], tensors[4][:, :, 5:9] = 0.0, 0.0
    ours = run(backend, *tensors, visit(rf.causal, 40, 40))
    assert_close(ours, oracle.answer(*tensors[:3], oracle.table(oracle.causal(), 40), *tensors[3:], scale=0.3))
    assert not ours.dq[:, 5:9].any()


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e150])
@pytest.mark.parametrize("backend", NAMES)
def test_a_gradient_of_any_size_arrives(backend, size):
    """Loss scaling makes gradients tiny or huge; squares of them must not vanish or overflow on the way."""
    tensors = inputs(20)
    seen = oracle.table(oracle.causal(), 20)
    plain = oracle.answer(*tensors[:3], seen, *tensors[3:], scale=0.3)
    ours = run(backend, *tensors[:3], tensors[3] * size, tensors[4] * size, visit(rf.causal, 20, 20))
    for mine, right in zip(ours[2:], plain[2:], strict=True):
        torch.testing.assert_close(mine / size, right, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [1e-20, 1e-30, 2e-38, 1e-39])
@pytest.mark.parametrize("backend", NAMES)
def test_a_gradient_of_lse_arrives_beside_a_vanishing_one_of_out(backend, size):
    """In float32 the multiple of dout that stands for delta must not overflow where dout is next to nothing."""
    tensors = inputs(20, dtype=torch.float32)
    tensors[3].sign_().mul_(size)
    expected = oracle.answer(*tensors[:3], oracle.table(oracle.causal(), 20), *tensors[3:], scale=0.3)
    assert_close(run(backend, *tensors, visit(rf.causal, 20, 20)), expected, torch.float32)


@pytest.mark.parametrize("backend", NAMES)
def test_a_carry_is_added_to_and_dq_too(backend):
    """Keys may come in any number of visits; what was there before stays."""
    q, k, v, dout, dlse = inputs(30, 24)
    chosen, whole = BACKENDS[backend], run(backend, q, k, v, dout, dlse, visit(rf.full, 30, 24))
    total = dq = None
    parts = []
    for at in (slice(0, 7), slice(7, 24)):
        table = visit(rf.full, 30, at.stop - at.start)
        total = chosen.attend(q, k[:, at], v[:, at], table, PLAIN, total, q.dtype)
    delta = chosen.delta(dout, whole.out, dlse)
    for at in (slice(0, 7), slice(7, 24)):
        table, double = visit(rf.full, 30, at.stop - at.start), (q.dtype, q.dtype)
        dq, *share = chosen.attend_backward(dout, q, k[:, at], v[:, at], whole.lse, delta, table, PLAIN, dq, double)
        parts.append(share)
    dk, dv = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    for mine, right in zip((*total, dq, dk, dv), whole, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)], ids=str)
@pytest.mark.parametrize("backend", NAMES)
def test_half_precision_is_computed_in_float32(backend, dtype, rounding):
    """Inputs are rounded once, by who made them, and outputs once, at the end; delta is formed with the rounded out."""
    tensors = inputs(60, dtype=dtype)
    exact = oracle.answer(*tensors[:3], oracle.table(oracle.causal(), 60), *tensors[3:])
    ours = answer(*tensors[:4], tensors[4].float(), backend=backend)
    assert ours.lse.dtype == torch.float32
    torch.testing.assert_close(ours.lse.double(), exact.lse, rtol=0, atol=1e-5)
    for name in ("out", "dq", "dk", "dv"):
        mine, right = getattr(ours, name), getattr(exact, name)
        assert mine.dtype == dtype
        for head in range(right.shape[2]):
            error = (mine.double() - right)[:, :, head].norm() / right[:, :, head].norm()
            assert error <= 2.5 * rounding, (name, head)


@pytest.mark.parametrize("mask", [rf.full, rf.causal, rf.documents([[0, 4096], [0, 2000, 4096]])], ids=str)
def test_the_reference_never_holds_all_scores(mask, monkeypatch):
    """Tens of megabytes at most, at any length: no block is larger than it is allowed to be."""
    q = torch.zeros(2, 4096, 8, 1)
    table = visit(mask, 4096, 4096)
    monkeypatch.setattr(reference, "_CELLS_AT_ONCE", 1 << 20)
    rows = 0
    for block in reference._blocks(q, table):
        cells = (
            q.shape[0] * q.shape[2] * (block.rows.stop - block.rows.start) * (block.columns.stop - block.columns.start)
        )
        assert cells <= 1 << 20
        assert block.seen.numel() <= cells
        rows += block.rows.stop - block.rows.start
    assert rows == 4096


@pytest.mark.parametrize("cells", [1, 50, 1000])
def test_the_reference_gives_the_same_in_blocks_of_any_size(cells, monkeypatch):
    """Blocks are an economy, nothing else; with dropout and ALiBi, whose positions must follow the block."""
    tensors = inputs(23, 31)
    options = {"dropout_p": 0.25, "seed": 7, "alibi_slopes": torch.linspace(0, 1, 4).double()}
    mask = rf.documents([[0, 9, 9, 31], [0, 14, 31]]) & rf.window(7, 3)
    whole = answer(*tensors, mask=mask, q_offset=-2, backend="reference", **options)
    monkeypatch.setattr(reference, "_CELLS_AT_ONCE", cells)
    assert_close(answer(*tensors, mask=mask, q_offset=-2, backend="reference", **options), whole)


def test_key_heads_are_not_expanded(monkeypatch):
    """The operator of PyTorch and the reference both take fewer key heads as they are: dk has their number."""
    seen = []
    forward = aten._forward
    monkeypatch.setattr(
        aten, "_forward", lambda q, k, v, *a, **b: (seen.append(k.shape[1]), forward(q, k, v, *a, **b))[1]
    )
    q, k, v, dout, dlse = inputs(9, heads=(6, 2))
    ours = answer(q, k, v, dout, dlse, backend="aten")
    assert set(seen) == {2}
    assert ours.dk.shape == k.shape


def test_a_hidden_nan_stays_behind_a_block_that_nobody_sees(monkeypatch):
    """NaN at a key of another document never crosses a skipped block; inside a block that is partly seen it spreads."""
    monkeypatch.setattr(reference, "_CELLS_AT_ONCE", 50 * 2 * 600)
    q, k, v, *_ = inputs(600, heads=(1, 1), dims=(2, 2))
    k[:, 300:], v[:, 300:] = torch.nan, torch.nan
    mask = rf.documents([0, 300, 600])
    for backend in NAMES:
        out = rf.flash_attention(q, k, v, mask, backend=backend)
        assert out[:, :256].isfinite().all(), backend


def test_backends_change_nothing_but_what_they_are_given():
    """Inputs of autograd are shared with the rest of the model."""
    for backend in NAMES:
        tensors = inputs(40)
        copies = [x.clone() for x in tensors]
        run(backend, *tensors, visit(rf.window(5, 2), 40, 40))
        assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True)), backend


@pytest.mark.parametrize("mask", [rf.full, rf.window(0, 0)], ids=str)
@pytest.mark.parametrize("backend", NAMES)
def test_sinks_of_one_row_are_not_written_over(backend, mask):
    """One query of one batch row: the sinks broadcast to themselves, and a carry is consumed. This is decoding."""
    q, k, v = draw((1, 1, 4, 8), (1, 8, 2, 8), (1, 8, 2, 8), dtype=torch.float32)
    sinks = draw((4,), dtype=torch.float32)[0]
    before = sinks.clone()
    ours = rf.flash_attention(q, k, v, mask, q_offset=7, sinks=sinks, backend=backend, return_lse=True)
    exact = oracle.attention(*(x.double() for x in (q, k, v)), mask_of_last(mask), sinks=before.double())
    assert torch.equal(sinks, before)
    for mine, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=1e-5)


def mask_of_last(mask: rf.Mask) -> Tensor:
    """What the last of eight positions sees."""
    return torch.arange(8)[None] >= (0 if mask == rf.full else 7)


def test_gradients_of_nothing_have_the_strides_that_were_announced():
    """A captured graph plans memory by the fake kernel; queries that see nothing once came back with strides of their own."""
    q = torch.randn(2, 4, 3, 8).transpose(1, 2).requires_grad_()
    k = v = torch.randn(2, 5, 2, 8)
    attend = torch.compile(rf.flash_attention, fullgraph=True, backend="aot_eager")
    attend(q, k, v, rf.causal, q_offset=-9).sum().backward()
    assert not q.grad.any()


def test_pytorchs_own_switch_asks_for_determinism(monkeypatch):
    """Who sets torch.use_deterministic_algorithms expects it of everything."""
    asked = []
    kernel = BACKENDS["reference"]

    def watched(*args: Any) -> Any:
        asked.append(args[-1])
        return kernel.attend_backward(*args)

    monkeypatch.setitem(BACKENDS, "reference", kernel._replace(attend_backward=watched))
    q, k, v = (x.requires_grad_() for x in draw((1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)))
    rf.flash_attention(q, k, v, backend="reference").sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        rf.flash_attention(q, k, v, backend="reference").sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]
