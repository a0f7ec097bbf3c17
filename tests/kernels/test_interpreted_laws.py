"""Laws that kernels keep under the interpreter: who is not seen has no influence, memory is safe, tiles do not matter.

Run as test_interpreted.py says. The laws themselves stand in laws.py, where the GPU suite finds them too.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import laws
import numpy as np
import pytest
import torch
from cases import BACKEND, STORAGES, Case, Lengths, problem
from oracle import Answer

import ringflash as rf
from ringflash import machine

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # of a masked score
BUSY = Case("bf16", (24, 40), (2, 1), "several", "everything", Lengths(45, 45, 0))  # all that a kernel can do at once
BOTH_WAYS = pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "deterministic"])


@pytest.mark.parametrize("seed", [0, 2**32 + 7, -1, -(2**63)])
def test_dropout_drops_what_the_reference_drops(seed):
    """The same cells for every seed, so that a ring that mixes backends is still one softmax."""
    laws.check_dropout(seed)


def test_dropout_counts_all_heads_where_ranks_share_them():
    """Forward and backward of two ranks with half the heads each drop what one device drops."""
    make = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, 40, heads, 16, generator=make) for heads in (4, 2, 2, 4)]

    def one_rank(group: object) -> list[torch.Tensor]:
        s = rf.Sharding(40, group, rf.causal, heads_axis=2 if getattr(group, "ranks", 1) == 2 else 1)
        q, k, v, dout = (s.shard(x, 1) for x in whole)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = rf.ring_attention(*leaves, s, dropout_p=0.5, seed=3, backend=BACKEND, deterministic=True)
        (out * dout).sum().backward()
        return [s.unshard(x, 1) for x in (out.detach(), *(x.grad for x in leaves))]

    alone, shared = (rf.local_world(ranks).run(one_rank)[0] for ranks in (1, 2))
    for a, b in zip(alone, shared, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("seed", [2**40 + 3, -5])
def test_a_seed_in_a_tensor_is_the_same_seed(seed):
    """The seed of a captured graph arrives as a tensor."""
    p = problem(replace(BUSY, option="dropout"))
    given, boxed = ({**p.arguments, "seed": x} for x in (seed, torch.tensor(seed)))
    assert not laws.same(laws.answer(p._replace(arguments=given))[0], laws.answer(p._replace(arguments=boxed))[0])


@pytest.mark.parametrize(
    "case",
    [
        replace(BUSY, mask="causal", deterministic=True),
        replace(BUSY, dtype="fp32", mask="sliding", option="plain"),
        replace(BUSY, mask="documents", option="sinks", deterministic=True),
        replace(BUSY, dtype="fp16", mask="causal", option="dropout", lengths=Lengths(3, 300, 250)),
    ],
    ids=str,
)
def test_a_key_reaches_only_who_sees_it(case):
    """A key out of sight may hold anything finite: no bit of the rows that do not see it changes."""
    laws.check_influence(case, [0, 32, case.lengths.keys - 1])


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@BOTH_WAYS
def test_nan_stays_in_its_document(deterministic):
    """What overflowed in one document must not spoil the next one in the pack: not through a block that nobody there sees."""
    p = problem(Case(mask="documents", lengths=Lengths(128, 128, 0), dims=(16, 16), deterministic=deterministic))
    half = {**p.arguments, "mask": rf.documents([0, 64, 128])}
    k, v = p.k.clone(), p.v.clone()
    k[:, 64:], v[:, 64:] = torch.nan, torch.nan
    ours, _ = laws.answer(p._replace(k=k, v=v, arguments=half))
    plain, _ = laws.answer(p._replace(arguments=half))
    for name in Answer._fields:
        a, b = (getattr(x, name)[:, :, :64] if name == "lse" else getattr(x, name)[:, :64] for x in (ours, plain))
        assert torch.equal(a, b), name
        assert getattr(ours, name).isnan().any(), name  # and it is not hidden either


@pytest.mark.parametrize("number", range(len(STORAGES)), ids=STORAGES)
def test_memory_is_left_alone(number):
    """Inputs stand between NaN, outputs between walls of NaN: nothing outside is read or written, nothing inside forgotten."""
    laws.check_margins(replace(BUSY, storage=STORAGES[number], deterministic=number % 2 == 0))


@pytest.mark.parametrize(("mask", "deterministic"), [("causal", False), ("blind", True)])
def test_memory_is_left_alone_by_single_rows(mask, deterministic):
    """One query against many keys takes kernels and buffers of its own."""
    laws.check_margins(Case("bf16", (40, 40), (8, 2), mask, "plain", Lengths(1, 300, 299), deterministic=deterministic))


@BOTH_WAYS
def test_inputs_are_not_changed(deterministic):
    """They are shared with the rest of the model."""
    p = problem(replace(BUSY, deterministic=deterministic))
    tensors = [p.q, p.k, p.v, p.dout, p.dlse, p.sinks, p.arguments["alibi_slopes"]]
    copies = [x.clone() for x in tensors]
    laws.answer(p)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@BOTH_WAYS
def test_bits_repeat(deterministic):
    """The same call gives the same bits."""
    p = problem(replace(BUSY, deterministic=deterministic))
    first, sinks = laws.answer(p)
    again, sinks_again = laws.answer(p)
    assert not laws.same(first, again) and torch.equal(sinks, sinks_again)


@pytest.mark.parametrize(("mask", "deterministic"), [("several", False), ("blind", True)])
@pytest.mark.parametrize("shape", [(16, 32), (32, 16), (64, 16), (16, 64), (128, 128)], ids=str)
def test_tiles_of_any_shape_give_the_same(shape, mask, deterministic):
    """Every entry of the table is as right as the one that the interpreter takes."""
    with laws.tiles(*shape):
        laws.check(replace(BUSY, mask=mask, deterministic=deterministic))


@pytest.mark.parametrize("block_k", [16, 128])
def test_decoding_with_tiles_of_any_shape(block_k):
    """Wherever the keys are cut."""
    with laws.tiles(16, block_k):
        keys = 8 * block_k + 13  # just enough for them to be split
        laws.check(Case("fp32", (40, 24), (8, 2), "sliding", "everything", Lengths(3, keys, keys - 30)))


BEYOND = """
from triton.runtime import interpreter
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)  # raises where an int32 overflows
import laws
laws.check_far_apart()
"""


def test_tensors_beyond_two_to_the_31():
    """Offsets that pass 2**31 reach the right elements; in a process of its own, since a wrong one may end it."""
    here = Path(__file__).resolve().parent
    roots = [here, here.parent, here.parent.parent, here.parent.parent / "kernels"]
    subprocess.run(
        [sys.executable, "-c", BEYOND],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))},
        check=True,
        timeout=300,
    )


@pytest.mark.parametrize(("needing", "deterministic"), [("q", False), ("k", True), ("v", False), ("kv", True)])
def test_gradients_of_some(needing, deterministic):
    """Inputs that need no gradient get none, and the others the same as ever."""
    p = problem(replace(BUSY, deterministic=deterministic))
    whole, _ = laws.answer(p)
    leaves = {name: getattr(p, name).detach().requires_grad_(name in needing) for name in "qkv"}
    out, lse = rf.flash_attention(*leaves.values(), return_lse=True, sinks=p.sinks, **p.arguments)
    wanted = [leaves[name] for name in needing]
    for name, gradient in zip(needing, torch.autograd.grad((out, lse), wanted, (p.dout, p.dlse)), strict=True):
        assert torch.equal(gradient, getattr(whole, f"d{name}"))


@BOTH_WAYS
def test_a_gradient_without_memory_of_its_own(deterministic):
    """The gradient of a sum is one number, expanded: stride 0 in every dimension, the last one too."""
    p = problem(replace(BUSY, deterministic=deterministic))
    one = torch.ones((), dtype=p.dout.dtype)
    expanded, _ = laws.answer(p._replace(dout=one.expand(p.dout.shape), dlse=torch.zeros(()).expand(p.dlse.shape)))
    written, _ = laws.answer(p._replace(dout=torch.ones_like(p.dout), dlse=torch.zeros_like(p.dlse)))
    assert not laws.same(expanded, written)


@pytest.mark.parametrize("which", "qkv")
def test_a_head_dim_that_is_not_contiguous(which):
    """Every second number of a wider tensor is taken as what it is."""
    p = problem(BUSY)
    x = getattr(p, which)
    spread = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    assert spread.stride(-1) == 2
    assert not laws.same(laws.answer(p._replace(**{which: spread}))[0], laws.answer(p)[0])


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
@BOTH_WAYS
def test_nothing_to_do_is_done(queries, keys, deterministic):
    """Empty shards are ordinary in a ring: they give empty tensors, or rows that have seen nothing."""
    q, k, v = (torch.ones(2, n, h, 16, requires_grad=True) for n, h in ((queries, 4), (keys, 2), (keys, 2)))
    out, lse = rf.flash_attention(q, k, v, rf.full, return_lse=True, backend=BACKEND, deterministic=deterministic)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert out.shape == (2, queries, 4, 16) and lse.shape == (2, 4, queries)
    assert not out.any() and (lse == -math.inf).all() and not any(x.any() for x in gradients)


@pytest.mark.parametrize("amplitude", [0.0, 30.0, 300.0])
@BOTH_WAYS
def test_scores_of_any_size(amplitude, deterministic):
    """From a mean of all values to one value alone, nothing overflows, and out stays between the values."""
    p = problem(replace(BUSY, dtype="fp32", option="plain", mask="full", deterministic=deterministic))
    ours, _ = laws.answer(p._replace(q=p.q * amplitude, k=p.k * amplitude))
    assert all(x.isfinite().all() for x in ours)
    low, high = (x.repeat_interleave(2, 1)[:, None] for x in (p.v.amin(1), p.v.amax(1)))
    assert ((ours.out >= low - 1e-5) & (ours.out <= high + 1e-5)).all()
    if not amplitude:
        torch.testing.assert_close(ours.lse, torch.full_like(ours.lse, math.log(p.k.shape[1])))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("layout", "mask", "deterministic"), [("zigzag", "window", False), ("striped", "chunks", True)]
)
def test_rows_in_the_middle_may_see_nothing(layout, mask, ranks, deterministic):
    """Between rows that see something of a visiting shard lie rows that do not: they keep what they had."""
    case = Case("fp32", (16, 16), (2, 1), mask, "plain", Lengths(96, 96, 0), deterministic=deterministic)
    plans = rf.plans(rf.Sharding(96, (0, ranks), problem(case).arguments["mask"], layout))
    seeing = [np.flatnonzero(np.greater(*plan.intervals(shard)[::-1])[0]) for plan in plans for shard in range(ranks)]
    assert any((np.diff(rows) > 1).any() for rows in seeing), "no visit is of this kind"
    laws.check_ring(case, ranks, layout)


@pytest.mark.parametrize("dims", [(1, 1), (8, 5)])
def test_head_dims_below_a_tile(dims):
    """Padding with zeros is not noticed."""
    laws.check(replace(BUSY, dims=dims, dtype="fp32"))


@pytest.mark.parametrize("dims", [(257, 257), (64, 320)])
def test_head_dims_beyond_the_kernels_are_refused(dims):
    """Before anything runs, with the limit and what came."""
    q, v = torch.ones(1, 4, 1, dims[0]), torch.ones(1, 4, 1, dims[1])
    with pytest.raises(ValueError, match=f"backend='triton' has head dims up to 256, and this one is {dims[1]}"):
        rf.flash_attention(q, q, v, backend=BACKEND)


def test_double_precision_is_refused():
    """Matrix units have none; the reference has."""
    q = torch.ones(1, 4, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="backend='triton' computes in float32, and query is float64"):
        rf.flash_attention(q, q, q, backend=BACKEND)


@BOTH_WAYS
def test_a_gradient_that_is_no_number_stays_with_the_row_that_sees_nothing(deterministic):
    """lse of such a row is -inf, and who merges it with another -inf sends back NaN: 0 times that is still not 0."""
    p = problem(Case(mask="causal", lengths=Lengths(40, 40, -5), dims=(16, 16), deterministic=deterministic))
    ours, _ = laws.answer(p)
    spoilt = p.dlse.clone()
    spoilt[:, :, :5] = torch.nan
    again, _ = laws.answer(p._replace(dlse=spoilt))
    assert not laws.same(ours, again)


@pytest.mark.parametrize("softcap", [1.0, 30.0, 1e4])
def test_a_softcap_far_above_the_scores_changes_little(softcap):
    """tanh of next to nothing keeps its digits; what it loses is multiplied by the cap."""
    q, k, v = (torch.randn(1, 40, 2, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    ours, exact = (
        rf.flash_attention(*(x.to(dtype) for x in (q, k, v)), softcap=softcap, backend=backend).double()
        for dtype, backend in ((torch.float32, BACKEND), (torch.float64, "reference"))
    )
    assert (ours - exact).abs().max() < 2e-6


def test_the_self_test_of_the_machine_proves_the_kernels_too():
    """``python -m ringflash check`` is what a user runs first, and on a GPU it meets these kernels."""
    proof = machine.prove("cpu", BACKEND)
    assert proof.exact and proof.dtype == torch.float32
