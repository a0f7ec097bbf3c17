"""The functions of ringflash.compat give the numbers of one device on the whole sequence; and the page that tells of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from processes import torchrun
from torch import Tensor

import ringflash as rf
from ringflash.compat import flash_attn, ring_flash_attn

ROOT = Path(__file__).resolve().parents[1]

CUTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "ring": lambda x, rank, ranks: x.chunk(ranks)[rank],
    "zigzag_ring": lambda x, rank, ranks: torch.cat([x.chunk(2 * ranks)[i] for i in (rank, 2 * ranks - 1 - rank)]),
    "stripe": lambda x, rank, ranks: x[rank::ranks],
}
"""The tokens of dim 0 that a rank holds, as the tests of ring-flash-attn cut them."""

WINDOWS = [(-1, -1), (5, 0), (-1, 3), (4, 2)]


def functions() -> dict[str, Callable[..., Any]]:
    return {name: getattr(module, name) for module in (flash_attn, ring_flash_attn) for name in module.__all__}


def seen_by(causal: bool, window: tuple[int, int], queries: int, keys: int) -> Tensor:
    """Who sees whom if the ends are aligned: bool ``[queries, keys]``."""
    left, right = (None if x == -1 else x for x in window)
    predicate = oracle.both(oracle.window(left, right), oracle.causal() if causal else oracle.full())
    return oracle.table(predicate, queries, keys, keys - queries)


def distances(queries: int, keys: int) -> Tensor:
    return (torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)).abs().double()


def randoms(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Random float64, times 3, so that the softmax is far from uniform."""
    make = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes]


def whole(queries: int, keys: int, batch: int = 2, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    """q, k, v, dout, dlse."""
    return randoms(
        (batch, queries, heads, 8),
        (batch, keys, kv_heads, 8),
        (batch, keys, kv_heads, 8),
        (batch, queries, heads, 8),
        (batch, heads, queries),
    )


def gradients(function: Callable[..., Any], leaves: list[Tensor], dout: Tensor, dlse: Tensor) -> list[Tensor]:
    """Out, lse and the gradients of ``leaves`` for the loss ``(out * dout).sum() + (lse * dlse).sum()``."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out, lse, nothing = function(*leaves)
    assert nothing is None
    loss = (out * dout).sum() + torch.where(lse == -torch.inf, 0.0, lse * dlse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-10, atol=1e-10)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": dict(softcap=2.5),
    "alibi": dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.02], dtype=torch.float64)),
    "scale": dict(softmax_scale=0.2, deterministic=True),
}


def in_oracle(options: dict[str, Any], queries: int, keys: int) -> dict[str, Any]:
    """The same options as the oracle takes them."""
    slopes = options.get("alibi_slopes")
    return dict(
        softcap=options.get("softcap", 0.0),
        scale=options.get("softmax_scale"),
        bias=None if slopes is None else -slopes[:, None, None] * distances(queries, keys),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (7, 13), (13, 7)])
def test_ends_are_aligned(queries: int, keys: int, window: tuple[int, int], causal: bool) -> None:
    """From 2.1 flash-attn counts from the ends, and a row that sees nothing is zero; numbers and gradients of the textbook."""
    *tensors, dout, dlse = whole(queries, keys)
    expected = oracle.answer(*tensors, seen_by(causal, window, queries, keys), dout, dlse)
    got = gradients(
        lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=causal, window_size=window, return_attn_probs=True),
        tensors,
        dout,
        dlse,
    )
    assert_close(got, list(expected))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_of_flash_attn_counts(options: dict[str, Any]) -> None:
    """An option that is accepted and forgotten is the defect that this package exists to avoid."""
    *tensors, dout, dlse = whole(7, 13)
    expected = oracle.answer(*tensors, seen_by(True, (9, 0), 7, 13), dout, dlse, **in_oracle(options, 7, 13))
    got = gradients(
        lambda q, k, v: flash_attn.flash_attn_func(
            q, k, v, causal=True, window_size=(9, 0), return_attn_probs=True, **options
        ),
        tensors,
        dout,
        dlse,
    )
    assert_close(got, list(expected))


@pytest.mark.parametrize("asked", [False, True])
def test_deterministic_is_passed_on(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No result on a CPU shows it."""
    told = []
    q = torch.ones(1, 4, 2, 8)
    for module, name in ((flash_attn, "flash_attention"), (ring_flash_attn, "ring_attention")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *x, real=real, **o: (told.append(o["deterministic"]), real(*x, **o))[1]
        )
    flash_attn.flash_attn_func(q, q, q, deterministic=asked)
    flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], [0, 4], [0, 4], 4, 4, deterministic=asked)
    ring_flash_attn.ring_flash_attn_func(q, q, q, deterministic=asked, group=(0, 1))
    ring_flash_attn.ring_flash_attn_varlen_func(q[0], q[0], q[0], [0, 4], 4, deterministic=asked, group=(0, 1))
    assert told == [asked] * 4


@pytest.mark.parametrize("packing", ["_kvpacked", "_qkvpacked"])
def test_packed_tensors_are_their_parts(packing: str) -> None:
    """Stacked tensors give what their slices give, and one gradient for all of them, in each of the packed functions."""
    q, k, v, dout, _ = whole(10, 10, kv_heads=4)
    stacked = [q, torch.stack([k, v], 2)] if packing == "_kvpacked" else [torch.stack([q, k, v], 2)]
    for varlen in ("", "_varlen"):
        flat = [x[0] if varlen else x for x in (*stacked, dout)]
        parts = [x[0] if varlen else x for x in (q, k, v)]
        each = ([0, 4, 10], [0, 4, 10], 6, 6)
        for prefix, shared in (("", each[::2] if packing == "_qkvpacked" else each), ("ring_", each[::2])):
            arguments_of = (shared, each if not prefix else shared) if varlen else ((), ())
            leaves = [x.clone().requires_grad_() for x in flat[:-1]]
            out = functions()[f"{prefix}flash_attn{varlen}{packing}_func"](*leaves, *arguments_of[0], causal=True)
            alone = [x.clone().requires_grad_() for x in parts]
            plain = functions()[f"{prefix}flash_attn{varlen}_func"](*alone, *arguments_of[1], causal=True)
            torch.testing.assert_close(out, plain, rtol=0, atol=0)
            got = torch.autograd.grad((out * flat[-1]).sum(), leaves)
            apart = torch.autograd.grad((plain * flat[-1]).sum(), alone)
            joined = torch.stack(apart[1:], -3) if packing == "_kvpacked" else torch.stack(apart, -3)
            torch.testing.assert_close(got[-1], joined, rtol=0, atol=0)


VARLEN = {
    "as many keys as queries": ([0, 5, 5, 12], [0, 5, 5, 12]),
    "each its own number": ([0, 5, 8, 8, 12], [0, 3, 10, 14, 14]),
}


@pytest.mark.parametrize("slopes_each", [False, True])
@pytest.mark.parametrize(("queries", "keys"), VARLEN.values(), ids=VARLEN)
def test_documents_are_alone(queries: list[int], keys: list[int], slopes_each: bool) -> None:
    """Each document is attention of its own, with its own ends aligned, its own slopes, and its columns of lse [h, total]."""
    q, k, v, dout, dlse = (x[0] for x in whole(queries[-1], keys[-1]))
    slopes = torch.rand(len(queries) - 1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes = slopes if slopes_each else slopes[0]
    answers = []
    for number, ((a, b), (c, d)) in enumerate(zip(pairwise(queries), pairwise(keys), strict=True)):
        own = slopes[number] if slopes_each else slopes
        seen, bias = seen_by(True, (4, -1), b - a, d - c), -own[:, None, None] * distances(b - a, d - c)
        apart = (x[None] for x in (q[a:b], k[c:d], v[c:d]))
        answers.append(oracle.answer(*apart, seen, dout[None, a:b], dlse[None, :, a:b], bias=bias))
    expected = [torch.cat([x[i][0] for x in answers], dim=1 if i == 1 else 0) for i in range(5)]
    lengths = [max(b - a for a, b in pairwise(x)) for x in (queries, keys)]
    offsets = [torch.tensor(x, dtype=torch.int32) for x in (queries, keys)]
    options = dict(causal=True, window_size=(4, -1), alibi_slopes=slopes, return_attn_probs=True)
    got = gradients(
        lambda q, k, v: flash_attn.flash_attn_varlen_func(q, k, v, *offsets, *lengths, **options), [q, k, v], dout, dlse
    )
    assert_close(got, expected)


def test_dropout_repeats_with_the_generator() -> None:
    """flash-attn takes its randomness from torch: the same state the same weights, another state others."""
    q, k, v, *_ = whole(9, 9)
    results = []
    for state in (3, 3, 4):
        torch.manual_seed(state)
        results.append(flash_attn.flash_attn_func(q, k, v, 0.4))
        ragged = ([0, 4, 9], [0, 5, 9], 5, 5)
        results.append(flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], *ragged, dropout_p=0.4))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[4]) and not torch.equal(results[1], results[5])
    torch.manual_seed(3)
    assert torch.equal(
        results[0], rf.flash_attention(q, k, v, rf.full, dropout_p=0.4, seed=torch.randint(2**63 - 1, ()))
    )


def on_ranks(
    ranks: int, cut: Callable[[Tensor, int], Tensor], run: Callable[..., Any], whole_tensors: list[Tensor]
) -> list[list[Tensor]]:
    """Out, lse and gradients of every rank: ``run(group, rank, q, k, v)`` on its parts of q, k, v, dout, dlse."""

    def one_rank(group: Any) -> list[Tensor]:
        *tensors, dout, dlse = (cut(x, group.rank) for x in whole_tensors)
        return gradients(lambda *leaves: run(group, group.rank, *leaves), tensors, dout, dlse.movedim(0, -1))

    return rf.local_world(ranks=ranks).run(one_rank)


def assert_parts(got: list[list[Tensor]], expected: list[Tensor], cut: Callable[[Tensor, int], Tensor]) -> None:
    """Every rank has its part of the whole; the tokens of lse are its last dim, of everything else dim 0."""
    for rank, mine in enumerate(got):
        out, lse, *grads = expected
        parts = [cut(out, rank), cut(lse.movedim(-1, 0), rank).movedim(0, -1), *(cut(x, rank) for x in grads)]
        assert_close(mine, parts)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CUTS)
def test_a_ring_gives_the_numbers_of_one_device(name: str, ranks: int) -> None:
    """Every cut, with and without causal, with windows shorter than a shard and longer, ALiBi and grouped heads."""
    length = 4 * ranks
    *tensors, dout, dlse = whole(length, length, batch=1)
    function = functions()[f"{name}_flash_attn_func"]
    cases = [(True, (-1, -1), "plain"), (True, (2, 0), "alibi"), (True, (6, -1), "scale"), (False, (3, 5), "plain")]
    for causal, window, kind in cases:
        expected = oracle.answer(
            *tensors, seen_by(causal, window, length, length), dout, dlse, **in_oracle(OPTIONS[kind], length, length)
        )

        def run(group: Any, rank: int, *leaves: Tensor) -> Any:
            options = dict(causal=causal, window_size=window, return_attn_probs=True, group=group, **OPTIONS[kind])  # noqa: B023
            out, lse, nothing = function(*(x[None] for x in leaves), **options)
            return out[0], lse[0], nothing

        def cut(x: Tensor, rank: int) -> Tensor:
            return CUTS[name](x, rank, ranks)

        got = on_ranks(ranks, cut, run, [x[0] for x in (*tensors, dout)] + [dlse[0].movedim(-1, 0)])
        assert_parts(got, [x[0] for x in expected], cut)


PACKED = [0, 2, 2, 8, 10]
"""A rank's own offsets: each document is this long on every rank."""


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CUTS)
def test_documents_are_cut_one_by_one(name: str, ranks: int) -> None:
    """In the varlen functions a rank holds its part of every document, and attention ends with the document."""
    offsets = [x * ranks for x in PACKED]
    *tensors, dout, dlse = whole(offsets[-1], offsets[-1], batch=1)
    seen = oracle.table(oracle.both(oracle.causal(), oracle.window(7, None), oracle.documents(offsets)), offsets[-1])
    scoring = OPTIONS["alibi"] | dict(softmax_scale=0.2)
    expected = oracle.answer(*tensors, seen, dout, dlse, **in_oracle(scoring, offsets[-1], offsets[-1]))
    given = (torch.tensor(PACKED, dtype=torch.int32), 6)
    options = dict(causal=True, window_size=(7, -1), return_attn_probs=True, **scoring)

    def cut(x: Tensor, rank: int) -> Tensor:
        return torch.cat([CUTS[name](x[a:b], rank, ranks) for a, b in pairwise(offsets) if a < b])

    function = functions()[f"{name}_flash_attn_varlen_func"]
    got = on_ranks(
        ranks,
        cut,
        lambda group, rank, *leaves: function(*leaves, *given, group=group, **options),
        [x[0] for x in (*tensors, dout)] + [dlse[0].movedim(-1, 0)],
    )
    assert_parts(got, [x[0] for x in expected], cut)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_packed_row_is_cut_anywhere(ranks: int, causal: bool) -> None:
    """llama3: a slice of the row per rank, documents that span ranks, begin and end within them, and are empty."""
    offsets = [0, 7, 14, 14, 16, 24]
    *tensors, dout, dlse = whole(24, 24, batch=1)
    predicates = [oracle.documents(offsets), oracle.window(5, 4), *([oracle.causal()] if causal else [])]
    expected = oracle.answer(*tensors, oracle.table(oracle.both(*predicates), 24), dout, dlse)

    def run(group: Any, rank: int, *leaves: Tensor) -> Any:
        prepared = ring_flash_attn.llama3_flash_attn_prepare_cu_seqlens(
            torch.tensor(offsets, dtype=torch.int32), causal, rank, ranks
        )
        return ring_flash_attn.llama3_flash_attn_varlen_func(
            *leaves,
            *prepared[:4],
            heads_k_stride=1,
            local_k_slice=prepared[4],
            causal=causal,
            window_size=(5, 4),
            return_attn_probs=True,
            group=group,
        )

    def cut(x: Tensor, rank: int) -> Tensor:
        return x.chunk(ranks)[rank]

    got = on_ranks(ranks, cut, run, [x[0] for x in (*tensors, dout)] + [dlse[0].movedim(-1, 0)])
    assert_parts(got, [x[0] for x in expected], cut)


def test_dropout_in_a_ring_is_that_of_one_device() -> None:
    """With one seed on all ranks the same weights fall, however the sequence is cut."""
    q, k, v, *_ = whole(12, 12, batch=1)
    expected = rf.flash_attention(q, k, v, rf.causal, dropout_p=0.3, seed=5)[0]

    def one_rank(group: Any) -> bool:
        shards = [CUTS["stripe"](x[0], group.rank, 3)[None] for x in (q, k, v)]
        out = ring_flash_attn.stripe_flash_attn_func(*shards, 0.3, causal=True, group=group, seed=5)
        return torch.allclose(out[0], CUTS["stripe"](expected, group.rank, 3), rtol=1e-10, atol=1e-10)

    assert rf.local_world(ranks=3).run(one_rank) == [True] * 3


def test_keys_of_another_number_run_where_nothing_compares_positions() -> None:
    """Cross-attention in a ring, as ring-flash-attn computes it without causal."""
    *tensors, dout, dlse = whole(6, 12, batch=1)
    expected = oracle.answer(*tensors, oracle.table(oracle.full(), 6, 12), dout, dlse)

    def cut(x: Tensor, rank: int) -> Tensor:
        return x.chunk(3)[rank]

    def run(group: Any, rank: int, *leaves: Tensor) -> Any:
        out, lse, _ = ring_flash_attn.ring_flash_attn_func(
            *(x[None] for x in leaves), return_attn_probs=True, group=group
        )
        return out[0], lse[0], None

    got = on_ranks(3, cut, run, [x[0] for x in (*tensors, dout)] + [dlse[0].movedim(-1, 0)])
    assert_parts(got, [x[0] for x in expected], cut)


PROGRAM = r"""
import torch, torch.distributed as dist
import ringflash as rf
from ringflash.compat.ring_flash_attn import zigzag_ring_flash_attn_qkvpacked_func

dist.init_process_group("gloo")
torch.manual_seed(0)
qkv, dout = torch.randn(1, 16, 3, 2, 8).double(), torch.randn(1, 16, 2, 8).double()
chunks = (dist.get_rank(), 3 - dist.get_rank())
cut = lambda x: torch.cat([x.chunk(4, 1)[i] for i in chunks], 1)
whole, mine = qkv.clone().requires_grad_(), cut(qkv).requires_grad_()
one = rf.flash_attention(*whole.unbind(2), rf.causal & rf.window(5, 0))
(one * dout).sum().backward()
two = zigzag_ring_flash_attn_qkvpacked_func(mine, causal=True, window_size=(5, 0))
(two * cut(dout)).sum().backward()
assert torch.allclose(two, cut(one), atol=1e-12) and torch.allclose(mine.grad, cut(whole.grad), atol=1e-12)
print(f"rank {dist.get_rank()} is exact\n", end="", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_no_group_is_the_default_group(tmp_path: Path) -> None:
    """Code that never named a group runs on all processes of the job, and not on each of them alone."""
    program = tmp_path / "default_group.py"
    program.write_text(PROGRAM)
    printed = torchrun(2, program)
    assert all(f"rank {rank} is exact" in printed for rank in range(2))


def test_the_migration_page_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Every python block of docs/migration.md runs, in order, in one session; ``# prints`` lines are what it prints."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "migration.md").read_text(), flags=re.S)
    program = "\n".join(blocks)
    exec(compile(program, "migration.md", "exec"), {"__name__": "migration"})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^# prints (.*)$", program, flags=re.M) != []
