"""Exactness of the ring: in-process worlds of every size against the float64 oracle, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from oracle import Answer
from torch import Tensor

import ringflash as rf
from ringflash import operator
from ringflash.plan import cheaper_backward

LAYOUTS = ("contiguous", "zigzag", "striped")
WORLDS = (1, 2, 3, 4, 5, 8)
LENGTH = 37
PACKED = ((0, 5, 5, 17, LENGTH), (0, 1, 30, LENGTH))

MASKS = {
    "full": (rf.full, [oracle.full()]),
    "causal": (rf.causal, [oracle.causal()]),
    "window": (rf.window(5, 3), [oracle.window(5, 3)]),
    "causal window": (rf.causal & rf.window(7, 0), [oracle.window(7, 0)]),
    "documents": (rf.documents(PACKED[0]), [oracle.documents(PACKED[0])]),
    "causal documents, a row each": (
        rf.causal & rf.documents(PACKED),
        [oracle.both(oracle.causal(), oracle.documents(row)) for row in PACKED],
    ),
    "prefix": (rf.prefix(7), [oracle.prefix(7)]),
    "causal chunks": (rf.causal & rf.chunks(6), [oracle.both(oracle.causal(), oracle.chunks(6))]),
    "everything": (
        rf.prefix(9) & rf.window(11, 4) & rf.documents(PACKED[0]),
        [oracle.both(oracle.prefix(9), oracle.window(11, 4), oracle.documents(PACKED[0]))],
    ),
}


def problem(
    queries: int = LENGTH,
    keys: int | None = None,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 8),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    batch: int = 2,
) -> dict[str, Tensor]:
    """Random inputs and random gradients of the outputs; randn times 3, so that the softmax is far from uniform."""
    make = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    shapes = {
        "q": (batch, queries, heads[0], dims[0]),
        "k": (batch, keys, heads[1], dims[0]),
        "v": (batch, keys, heads[1], dims[1]),
        "dout": (batch, queries, heads[0], dims[1]),
        "dlse": (batch, heads[0], queries),
    }
    return {
        name: (3 * torch.randn(shape, generator=make, dtype=torch.float64)).to(dtype) for name, shape in shapes.items()
    }


def ring(
    p: dict[str, Tensor],
    ranks: int,
    mask: rf.Mask,
    layout: str,
    *,
    keys: int | None = None,
    q_offset: int | None = None,
    **options: Any,
) -> Answer:
    """Out, lse, dq, dk, dv of the whole sequence, computed on so many in-process ranks."""

    def one_rank(group: object) -> list[Tensor]:
        s = rf.Sharding(p["q"].shape[1], group, mask, layout, keys=keys, q_offset=q_offset)
        side = s.key_sharding
        q, k, v = s.shard(p["q"], 1), side.shard(p["k"], 1), side.shard(p["v"], 1)
        for x in (q, k, v):
            x.requires_grad_()
        out, lse = rf.ring_attention(q, k, v, s, return_lse=True, **options)
        seen = torch.where(lse == -math.inf, 0.0, lse * s.shard(p["dlse"], 2))
        ((out * s.shard(p["dout"], 1)).sum() + seen.sum()).backward()
        return [
            s.unshard(out.detach(), 1),
            s.unshard(lse.detach(), 2),
            s.unshard(q.grad, 1),
            side.unshard(k.grad, 1),
            side.unshard(v.grad, 1),
        ]

    return Answer(*rf.local_world(ranks).run(one_rank)[-1])


def worst(got: Answer, want: Answer) -> float:
    for name, a, b in zip(Answer._fields, got, want, strict=True):
        assert a.shape == b.shape, name
        assert not a.isnan().any(), name
    empty = want.lse == -math.inf
    assert torch.equal(got.lse == -math.inf, empty)
    got, want = (x._replace(lse=x.lse.masked_fill(empty, 0.0)) for x in (got, want))
    return max((a.double() - b).abs().max().item() if a.numel() else 0.0 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASKS)
def test_a_ring_of_any_size_equals_dense_attention(name: str, layout: str, ranks: int) -> None:
    """Out, lse and all gradients in float64 agree with the textbook to 1e-10: every mask, layout and world size."""
    mask, predicates = MASKS[name]
    p = problem()
    seen = torch.stack([oracle.table(x, LENGTH) for x in predicates])
    want = oracle.answer(p["q"], p["k"], p["v"], seen, p["dout"], p["dlse"])
    assert worst(ring(p, ranks, mask, layout), want) < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_a_sequence_shorter_than_the_ring_leaves_ranks_empty(length: int, layout: str) -> None:
    """Ranks that hold nothing take part without computing, and the others are right."""
    p = problem(length)
    want = oracle.answer(p["q"], p["k"], p["v"], oracle.table(oracle.causal(), length), p["dout"], p["dlse"])
    assert worst(ring(p, 8, rf.causal, layout), want) < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("queries", "keys", "q_offset"), [(20, 31, 11), (31, 20, -11), (31, 20, 0), (3, 40, 36), (5, 9, 50)]
)
def test_keys_of_another_length(queries: int, keys: int, q_offset: int, layout: str) -> None:
    """Cross-attention under a causal mask, with either alignment; rows without keys give 0, -inf and no gradient."""
    p = problem(queries, keys)
    seen = oracle.table(oracle.causal(), queries, keys, q_offset)
    want = oracle.answer(p["q"], p["k"], p["v"], seen, p["dout"], p["dlse"])
    got = ring(p, 3, rf.causal, layout, keys=keys, q_offset=q_offset)
    assert worst(got, want) < 1e-10
    blind = ~seen.any(dim=1)
    assert (
        (got.out[:, blind] == 0).all() and (got.dq[:, blind] == 0).all() and (got.lse[:, :, blind] == -math.inf).all()
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "dims"), [((6, 6), (5, 5)), ((6, 2), (16, 16)), ((4, 1), (1, 1)), ((4, 2), (12, 7))])
def test_heads_and_head_dims(heads: tuple[int, int], dims: tuple[int, int], layout: str) -> None:
    """Multi-head, grouped and multi-query attention, odd head dims, and values of another head dim."""
    p = problem(heads=heads, dims=dims)
    want = oracle.answer(p["q"], p["k"], p["v"], oracle.table(oracle.causal(), LENGTH), p["dout"], p["dlse"])
    assert worst(ring(p, 4, rf.causal, layout), want) < 1e-10


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_softcap_and_alibi(layout: str, ranks: int) -> None:
    """Options that change a score give in the ring what they give in the textbook."""
    p = problem()
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64)
    place = torch.arange(LENGTH)
    bias = -slopes[:, None, None] * (place[:, None] - place).abs()
    seen = oracle.table(oracle.causal(), LENGTH)
    want = oracle.answer(p["q"], p["k"], p["v"], seen, p["dout"], p["dlse"], scale=0.2, softcap=3.0, bias=bias)
    assert worst(ring(p, ranks, rf.causal, layout, scale=0.2, softcap=3.0, alibi_slopes=slopes), want) < 1e-10


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_a_sink_counts_once_whatever_the_number_of_ranks(ranks: int, backend: str) -> None:
    """Sinks join the softmax of every row once; their gradient, summed over ranks, is the whole sequence's."""
    p = problem()
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    whole = sinks.clone().requires_grad_()
    seen = oracle.table(oracle.causal(), LENGTH)
    out, lse = oracle.attention(p["q"], p["k"], p["v"], seen, sinks=whole)
    ((out * p["dout"]).sum() + (lse * p["dlse"]).sum()).backward()

    def one_rank(group: object) -> tuple[float, Tensor]:
        s = rf.Sharding(LENGTH, group)
        logits = sinks.clone().requires_grad_()
        q, k, v = (s.shard(p[x], 1) for x in "qkv")
        o, lse_here = rf.ring_attention(q, k, v, s, return_lse=True, sinks=logits, backend=backend)
        ((o * s.shard(p["dout"], 1)).sum() + (lse_here * s.shard(p["dlse"], 2)).sum()).backward()
        assert logits.grad is not None
        error = (s.unshard(o, 1) - out).abs().max().item()
        return error, logits.grad

    results = rf.local_world(ranks).run(one_rank)
    assert max(error for error, _ in results) < 1e-10
    assert torch.allclose(sum(g for _, g in results), whole.grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_depends_neither_on_the_number_of_ranks_nor_on_the_layout(layout: str) -> None:
    """The same seed drops the same cells everywhere; another seed drops others."""
    p = problem()
    one = ring(p, 1, rf.causal, "contiguous", dropout_p=0.3, seed=5)
    assert worst(ring(p, 4, rf.causal, layout, dropout_p=0.3, seed=5), one) < 1e-10
    assert (ring(p, 4, rf.causal, layout, dropout_p=0.3, seed=6).out - one.out).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float32, "aten"),
        (torch.bfloat16, "reference"),
        *(
            pytest.param(dtype, backend, marks=pytest.mark.slow)
            for dtype, backend in (
                (torch.float32, "reference"),
                (torch.bfloat16, "aten"),
                (torch.float16, "aten"),
                (torch.float16, "reference"),
            )
        ),
    ],
    ids=str,
)
def test_half_precision_keeps_its_error_for_any_number_of_ranks(dtype: torch.dtype, backend: str) -> None:
    """The error against float64 at 64 ranks is at most 1.02 times that at one: partials never leave float32."""
    length = 384
    p = {name: (x / 3).to(dtype) for name, x in problem(length, heads=(2, 2), dims=(16, 16), batch=1).items()}
    want = oracle.answer(p["q"], p["k"], p["v"], oracle.table(oracle.causal(), length), p["dout"], p["dlse"])

    def errors(ranks: int) -> dict[str, float]:
        got = ring(p, ranks, rf.causal, "zigzag", backend=backend)
        assert got.out.dtype == got.dq.dtype == got.dk.dtype == got.dv.dtype == dtype and got.lse.dtype == torch.float32
        return {
            name: ((a.double() - b).norm() / b.norm()).item()
            for name, a, b in zip(Answer._fields, got, want, strict=True)
        }

    one, many = errors(1), errors(64)
    for name in ("out", "dq", "dk", "dv"):
        limit = 1e-6 if dtype == torch.float32 else 2.0**-8
        assert one[name] < limit, (name, one)
        assert many[name] <= max(1.02 * one[name], 1e-6), (name, one, many)


@pytest.mark.parametrize(("heads", "travels"), [((4, 1), "keys"), ((2, 2), "queries")])
def test_gradients_travel_in_float32_whichever_side_it_is(
    heads: tuple[int, int], travels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Totals that were rounded at each visitor would be twice as far off after eight."""
    p = {name: (x / 3).bfloat16() for name, x in problem(64, heads=heads, dims=(16, 16), batch=1).items()}
    want = oracle.answer(p["q"], p["k"], p["v"], oracle.table(oracle.full(), 64), p["dout"], p["dlse"])
    moved: set[str] = set()

    def choose(*question: Any) -> rf.Plan:
        plan = cheaper_backward(*question)
        moved.add(plan.travels)
        return plan

    def errors(ranks: int) -> dict[str, float]:
        got = ring(p, ranks, rf.full, "contiguous")
        return {
            name: ((getattr(got, name).double() - b).norm() / b.norm()).item()
            for name, b in want._asdict().items()
            if name.startswith("d")
        }

    one = errors(1)
    monkeypatch.setattr(operator, "cheaper_backward", choose)
    many = errors(8)
    assert moved == {travels}
    assert all(many[name] <= 1.05 * one[name] for name in one), (one, many)


def test_the_whole_is_one_sum_for_flash_attention_too() -> None:
    """One device is a ring of one: out, lse and gradients of flash_attention are bitwise those of ring_attention."""
    p = problem(dtype=torch.float32)
    q, k, v = (p[x].clone().requires_grad_() for x in "qkv")
    out, lse = rf.flash_attention(q, k, v, mask=rf.causal, return_lse=True)
    ((out * p["dout"]).sum() + (lse * p["dlse"]).sum()).backward()
    got = ring(p, 1, rf.causal, "contiguous")
    for a, b in zip(got, (out, lse, q.grad, k.grad, v.grad), strict=True):
        assert torch.equal(a, b)


def test_a_mask_in_the_call_equals_with_mask() -> None:
    """``ring_attention(..., mask=m)`` is the same layout under another mask, with its own plan."""
    p = problem()

    def one_rank(group: object) -> bool:
        s = rf.Sharding(LENGTH, group, layout="zigzag")
        q, k, v = (s.shard(p[x], 1) for x in "qkv")
        m = rf.causal & rf.window(4, 0)
        by_call, by_value = rf.ring_attention(q, k, v, s, mask=m), rf.ring_attention(q, k, v, s.with_mask(m))
        assert s.with_mask(m) is s.with_mask(m) and s.with_mask(m).layout == s.layout
        return torch.equal(by_call, by_value) and not torch.equal(by_call, rf.ring_attention(q, k, v, s))

    assert all(rf.local_world(3).run(one_rank))


@pytest.mark.parametrize("needing", ["q", "k", "v", "qk", "kv"])
def test_gradients_of_a_subset(needing: str) -> None:
    """Inputs that need no gradient get none, and the others the right one."""
    p = problem()
    want = oracle.answer(p["q"], p["k"], p["v"], oracle.table(oracle.causal(), LENGTH), p["dout"])

    def one_rank(group: object) -> dict[str, Tensor | None]:
        s = rf.Sharding(LENGTH, group)
        shards = {x: s.shard(p[x], 1).requires_grad_(x in needing) for x in "qkv"}
        (rf.ring_attention(*shards.values(), s) * s.shard(p["dout"], 1)).sum().backward()
        return {x: None if t.grad is None else s.unshard(t.grad, 1) for x, t in shards.items()}

    got = rf.local_world(3).run(one_rank)[0]
    for x in "qkv":
        if x in needing:
            assert (got[x] - getattr(want, f"d{x}")).abs().max() < 1e-10
        else:
            assert got[x] is None


def test_the_second_derivative_is_refused_in_our_words() -> None:
    """Double backward would be silently wrong or obscure; it says what it is."""
    q = torch.randn(1, 5, 1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(rf.flash_attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="ring_attention: attention can be differentiated once"):
        gradient.sum().backward()


def test_forward_mode_is_refused() -> None:
    """A tangent that nobody propagates would come out as zero."""
    q = torch.randn(1, 5, 1, 4)
    with pytest.raises(RuntimeError, match=r"transforms of torch\.func \(grad, jvp, vmap\)"):
        torch.func.jvp(lambda x: rf.flash_attention(x, x, x), (q,), (q,))


def test_strided_views_and_expanded_gradients() -> None:
    """Slices of a fused projection, transposed heads and an expanded output gradient need no copy by the user."""
    fused = torch.randn(2, LENGTH, 3, 4, 8, dtype=torch.float64)
    q, k, v = fused.unbind(2)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    odd = torch.randn(2, LENGTH, 4, 16, dtype=torch.float64)[..., ::2]
    for a, b, c in ((q, k, v), views, (odd, k, v), (q, odd, v), (q, k, odd)):
        a, b, c = (x.detach().requires_grad_() for x in (a, b, c))
        out = rf.flash_attention(a, b, c)
        out.backward(torch.ones(1, 1, 1, 1, dtype=torch.float64).expand_as(out))
        want = oracle.answer(a, b, c, oracle.table(oracle.causal(), LENGTH), torch.ones(out.shape))
        assert worst(Answer(out.detach(), want.lse, a.grad, b.grad, c.grad), want) < 1e-10


def test_the_operator_passes_the_checks_of_torch_library() -> None:
    """Schema, fake kernel, autograd registration and ahead-of-time dispatch agree with what the operator does."""

    q, k, v = (torch.randn(2, 9, h, 4, requires_grad=True) for h in (4, 2, 2))
    s = rf.Sharding(9, (0, 1))
    torch.library.opcheck(
        torch.ops.ringflash.attend.default,
        (q, k, v, s.handle, torch.zeros(4), None, torch.tensor(0), 0.5, 0.0, 0.0, "aten", False),
    )


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_gradients_are_contiguous_whatever_the_strides_of_the_inputs(backend: str) -> None:
    """A compiled graph counts on it; keys that are a view of ``[b, h, s, d]`` must not hand their strides on."""
    leaves = [torch.randn(2, heads, 12, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    out, s = rf.flash_attention(*leaves, backend=backend), rf.Sharding(12)
    gradients = torch.ops.ringflash.attend_backward(
        torch.ones_like(out),
        torch.zeros(2, 4, 12),
        *leaves,
        out.detach(),
        torch.zeros(2, 4, 12),
        s.handle,
        *(None, None, torch.tensor(0), 0.3, 0.0, 0.0, backend, False),
    )
    assert all(x.is_contiguous() for x in gradients)
