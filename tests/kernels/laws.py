"""What a kernel promises, whatever it is given, and how far from exact it may be.

Every kernel rounds the same few things to the dtype of its inputs: p and ds where they enter a product, out and the
gradients where they leave. What that does to a row follows from the numbers themselves: its *noise*, computed here in
float64. It matters where terms cancel: a query that sees one key has a dq of nearly nothing, and there any fixed tolerance
is either blind or wrong. Kernels without errors show up to 1.2 times the noise over 64 rows, where chance evens out, and 3
times in the worst row of a hundred thousand; about twice that is allowed.

Run as a program (``python laws.py "1 Case(dtype='bf16')" "2 Case(...)"``), this plays cases on a GPU, alone or as a ring of so
many ranks, and checks nothing: what Triton compiles for them stays in its cache, so that many processes can share the work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import numpy as np
import oracle
import pytest
import torch
from cases import BACKEND, Case, Lengths, Problem, problem
from oracle import Answer
from test_attention import ring
from torch import Tensor

import ringflash as rf
from ringflash import reference
from ringflash_kernels import config

UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-18}  # half the roundoff; fp32: see noise
ROUNDED = ("out", "dq", "dk", "dv")
TILE = 64
LSE = 2e-5  # float32, of scores up to 60


def allowed(rows: Tensor) -> Tensor:
    """How many times its noise the error of so many rows together may be."""
    return 2 + 4 / rows**0.5


class Exact(NamedTuple):
    """In float64; ``noise`` is that of each row, ``[b, s, h]``."""

    answer: Answer
    noise: dict[str, Tensor]
    dsinks: Tensor | None


def exact(p: Problem) -> Exact:
    """The textbook, one batch row and one key head at a time, so that long sequences fit."""
    seen, options = p.seen(), p.options()
    tensors = [x.double() for x in (p.q, p.k, p.v, p.dout)]
    answer = Answer(*(torch.zeros_like(x, dtype=torch.float64) for x in (p.dout, p.dlse, p.q, p.k, p.v)))
    noise = {name: torch.zeros_like(getattr(answer, name)[..., 0]) for name in ROUNDED}
    dsinks = None if p.sinks is None else p.sinks.double() * 0
    group = p.q.shape[2] // p.k.shape[2]
    for b in range(len(p.q)):
        for n in range(p.k.shape[2]):
            of_q, of_k = slice(n * group, (n + 1) * group), slice(n, n + 1)
            here = dict(options)
            for name in {"bias", "keep"} & here.keys():
                table = here[name] if here[name].ndim == 4 else here[name][None]
                here[name] = table[b % len(table), of_q][None]
            if dsinks is not None:
                here["sinks"] = options["sinks"][of_q].requires_grad_()
            q, k, v, dout = (x[b : b + 1, :, h] for x, h in zip(tensors, (of_q, of_k, of_k, of_q), strict=True))
            found = _one(q, k, v, seen[b % len(seen)], dout, p.dlse[b : b + 1, of_q].double(), here, p.q.dtype)
            answer.lse[b, of_q] = found[0].lse[0]
            for name, h in zip(ROUNDED, (of_q, of_q, of_k, of_k), strict=True):
                getattr(answer, name)[b, :, h] = getattr(found[0], name)[0]
                noise[name][b, :, h] = found[1][name][0]
            if dsinks is not None:
                dsinks[of_q] += found[2]
    return Exact(answer, noise, dsinks)


def _one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    dout: Tensor,
    dlse: Tensor,
    options: dict[str, Any],
    dtype: torch.dtype,
) -> tuple[Answer, dict[str, Tensor], Tensor | None]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = oracle.attention(*leaves, seen, **options)
    loss = (out * dout).sum() + torch.where(lse == -torch.inf, 0.0, lse * dlse).sum()
    sinks = options.get("sinks")
    gradients = torch.autograd.grad(loss, leaves if sinks is None else [*leaves, sinks])
    right = Answer(out.detach(), lse.detach(), *gradients[:3])
    noise = _noise(q, k, v, seen, dout, dlse, right, options, dtype)
    return right, noise, gradients[3] if sinks is not None else None


@torch.no_grad()
def _noise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    dout: Tensor,
    dlse: Tensor,
    right: Answer,
    options: dict[str, Any],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """What roundings by one unit, independent of each other, add up to: the root mean square of each row's norm.

    A rounded out spoils delta, and with it all ds of a row at once. In float32 nothing is rounded on purpose; scores come
    with errors that grow with their size, and the unit is chosen to cover them.
    """
    scale = options.get("scale", q.shape[-1] ** -0.5)
    scores = torch.einsum("bqhd,bkzd->bhqk", q, k) * scale
    slope = torch.ones_like(scores[..., :1])
    if "softcap" in options:
        bent = torch.tanh(scores / options["softcap"])
        scores, slope = bent * options["softcap"], 1 - bent.square()
    scores = (scores + options.get("bias", 0.0)).masked_fill(~seen, -torch.inf)
    p = torch.exp(scores - torch.where(right.lse == -torch.inf, 0.0, right.lse)[..., None])
    keep = options.get("keep", 1.0)
    dp = torch.einsum("bqhd,bkzd->bhqk", dout, v) * keep
    products = dout * right.out
    ds = p * slope * (dp - (products.sum(-1).transpose(1, 2) - dlse)[..., None])
    wrong_delta = p * slope * products.norm(dim=-1).transpose(1, 2)[..., None]
    subnormal = torch.finfo(dtype).tiny ** 2 * seen  # below tiny, roundings are as large as at tiny
    ds2, kept2 = ds.square() + subnormal, (p * keep).square() + subnormal
    q2, k2, v2, dout2 = (x.square().sum(-1) for x in (q, k, v, dout))
    along_k = torch.einsum("bhqk,bkzd->bqhd", wrong_delta, k).square().sum(-1)
    inside = {
        "out": torch.einsum("bhqk,bkz->bqh", kept2, v2),
        "dq": scale**2 * (torch.einsum("bhqk,bkz->bqh", ds2, k2) + along_k),
        "dk": scale**2 * torch.einsum("bhqk,bqh->bk", ds2 + wrong_delta.square(), q2)[..., None],
        "dv": torch.einsum("bhqk,bqh->bk", kept2, dout2)[..., None],
    }
    outside = {name: (getattr(right, name).square() + torch.finfo(dtype).tiny ** 2).sum(-1) for name in ROUNDED}
    return {name: torch.where(x == 0, 0.0, x + outside[name]).sqrt() for name, x in inside.items()}


def answer(p: Problem, **changed: Any) -> tuple[Answer, Tensor | None]:
    """What the library says, with gradients for ``dout`` and ``dlse``; and the gradient of the sinks."""
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    sinks = None if p.sinks is None else p.sinks.detach().requires_grad_()
    out, lse = rf.flash_attention(*leaves, return_lse=True, sinks=sinks, **{**p.arguments, **changed})
    gradients = torch.autograd.grad((out, lse), leaves if sinks is None else [*leaves, sinks], (p.dout, p.dlse))
    return Answer(out.detach(), lse.detach(), *gradients[:3]), gradients[3] if sinks is not None else None


def assert_right(ours: Answer, dsinks: Tensor | None, right: Exact, dtype: torch.dtype) -> None:
    """Within the noise, everywhere; exactly zero where nothing is seen."""
    blind = right.answer.lse == -torch.inf
    assert torch.equal(ours.lse == -torch.inf, blind), "lse is -inf for other rows than those that see nothing"
    off = (ours.lse.double() - right.answer.lse)[~blind].abs()
    assert ours.lse.dtype == torch.float32 and not (off > LSE).any(), f"lse is off by {off.max()}"
    for name in ROUNDED:
        assert_within(name, getattr(ours, name), getattr(right.answer, name), right.noise[name], dtype)
    if right.dsinks is not None:
        assert dsinks is not None
        size = right.dsinks.abs().max() + right.noise["out"].max()
        assert (dsinks.double() - right.dsinks).abs().max() <= 4 * UNIT[dtype] * size, (dsinks, right.dsinks)


def assert_within(name: str, mine: Tensor, truth: Tensor, noise: Tensor, dtype: torch.dtype) -> None:
    """``[b, s, h, d]`` in each row and in each tile of rows."""
    assert mine.dtype == dtype and mine.shape == truth.shape, name
    assert mine.isfinite().all(), f"{name} has {(~mine.isfinite()).sum()} values that are not finite"
    error = (mine.double() - truth).norm(dim=-1)
    for rows in (1, TILE):
        held = _together(torch.ones_like(error), rows).square()
        over = _together(error, rows) / _together(noise, rows).clamp(min=1e-30) / UNIT[dtype] / allowed(held)
        assert over.max() <= 1, (
            f"{name}: {over.max():.3g} times the error that is allowed, at [batch, {rows} rows, head] {_where(over)}; "
            f"{(over > 1).sum()} of {over.numel()} are beyond"
        )


def _together(norms: Tensor, rows: int) -> Tensor:
    """The norm of every so many rows: ``[b, s / rows, h]``."""
    padded = torch.nn.functional.pad(norms.square(), (0, 0, 0, -norms.shape[1] % rows))
    return padded.unflatten(1, (-1, rows)).sum(2).sqrt()


def _where(x: Tensor) -> list[int]:
    return [int(i) for i in torch.unravel_index(x.argmax(), x.shape)]


def check(case: Case, device: str = "cpu", **changed: Any) -> None:
    """A case gives what the textbook gives."""
    p = problem(case, device)
    assert_right(*answer(p, **changed), exact(p), p.q.dtype)


def check_sampled(case: Case, tokens: int, device: str = "cpu", samples: int = 24) -> None:
    """Some rows of out, lse and dq, and some of dk and dv, where the whole textbook would not fit."""
    p = problem(replace(case, lengths=Lengths(tokens, tokens, 0)), device)
    (ours, _), mask, dtype = answer(p), p.arguments["mask"], p.q.dtype
    make = torch.Generator().manual_seed(0)
    edges = torch.tensor([0, 1, 127, 128, tokens // 2, tokens - 2, tokens - 1])
    chosen = torch.cat([edges, torch.randint(tokens, (samples,), generator=make)])
    lo, hi = (torch.from_numpy(x).to(device)[:, None] for x in mask.bounds(np.arange(tokens)))
    place = chosen.to(device)
    q, k, v, dout, dlse = (x.double() for x in (p.q, p.k, p.v, p.dout, p.dlse))

    key = torch.arange(tokens, device=device)
    some = (q[:, place], k, v, (lo[place] <= key) & (key < hi[place]), dout[:, place], dlse[..., place])
    right, noise, _ = _one(*some, {}, dtype)
    assert (ours.lse[..., place].double() - right.lse).abs().max() <= LSE
    for name in ("out", "dq"):
        assert_within(name, getattr(ours, name)[:, place], getattr(right, name), noise[name], dtype)

    # dk and dv of a key come from all rows: with lse and out as they were found, which the rows above vouch for
    k, v, seen, scale = k[:, place], v[:, place], (lo <= place) & (place < hi), q.shape[-1] ** -0.5
    out, lse = ours.out.double(), ours.lse.double()
    p_ij = torch.exp(torch.einsum("bqhd,bkzd->bhqk", q, k) * scale - lse[..., None]) * seen
    delta = (dout * out).sum(-1).transpose(1, 2) - dlse
    ds = p_ij * (torch.einsum("bqhd,bkzd->bhqk", dout, v) - delta[..., None])
    dk, dv = scale * torch.einsum("bhqk,bqhd->bkd", ds, q), torch.einsum("bhqk,bqhd->bkd", p_ij, dout)
    found = Answer(out, lse, q, dk[:, :, None], dv[:, :, None])
    noise = _noise(q, k, v, seen, dout, dlse, found, {}, dtype)
    for name in ("dk", "dv"):
        assert_within(name, getattr(ours, name)[:, place], getattr(found, name), noise[name], dtype)


def same(a: Answer, b: Answer, but: str = "") -> list[str]:
    """The names of tensors whose bits differ."""
    return [name for name in Answer._fields if name != but and not torch.equal(getattr(a, name), getattr(b, name))]


def answer_of_ring(p: Problem, ranks: int, layout: str) -> Answer:
    """What a ring of so many in-process ranks says; sinks get no gradient."""
    tensors = {name: getattr(p, name) for name in ("q", "k", "v", "dout", "dlse")}
    options = {name: x for name, x in p.arguments.items() if name not in ("mask", "q_offset")}
    if p.sinks is not None:
        options["sinks"] = p.sinks
    mask, q_offset = p.arguments["mask"], p.arguments["q_offset"]
    return ring(tensors, ranks, mask, layout, keys=p.at.keys, q_offset=q_offset, **options)


def check_ring(case: Case, ranks: int, layout: str, device: str = "cpu") -> None:
    """A ring gives what the textbook gives for the whole sequence."""
    p = problem(case, device)
    assert_right(answer_of_ring(p, ranks, layout), None, exact(p)._replace(dsinks=None), p.q.dtype)


def check_influence(case: Case, keys: list[int], device: str = "cpu") -> None:
    """Who does not see a key does not notice, bit for bit, when it becomes a thousand times larger; who sees it does."""
    p, (plain, _) = (x := problem(case, device)), answer(x)
    seen = p.seen().expand(len(p.q), -1, -1)
    for key in keys:
        k, v = p.k.clone(), p.v.clone()
        k[:, key], v[:, key] = k[:, key] * -3, v[:, key] * 1000
        changed, _ = answer(p._replace(k=k, v=v))
        blind = ~seen[:, :, key]
        for name in ("out", "lse", "dq") if case.deterministic or device == "cpu" else ("out", "lse"):
            before, after = (getattr(x, name) for x in (plain, changed))
            if name == "lse":
                before, after = before.transpose(1, 2), after.transpose(1, 2)
            assert torch.equal(before[blind], after[blind]), f"key {key} reached {name} of a row that does not see it"
        assert not torch.equal(plain.out, changed.out) or not seen[:, :, key].any(), f"nobody noticed key {key}"


def check_dropout(seed: int, device: str = "cpu") -> None:
    """With the unit vectors as values, out shows which weights were kept: those of ``reference.keep_mask``, in every cell."""
    make, n = torch.Generator().manual_seed(0), 40
    q, k = (torch.randn(2, n, h, 16, generator=make).to(device) for h in (4, 2))
    v = torch.eye(n, device=device)[None, :, None].expand(2, n, 2, n)
    for p in (0.1, 0.9):
        out = rf.flash_attention(q, k, v, rf.full, q_offset=-3, dropout_p=p, seed=seed, backend=BACKEND)
        queries, keys = torch.arange(n, device=device) - 3, torch.arange(n, device=device)
        kept = reference.keep_mask(seed, 2, 4, queries, keys, p)
        assert torch.equal((out != 0).transpose(1, 2), kept)


def check_margins(case: Case, device: str = "cpu") -> None:
    """Between walls of NaN, nothing is written outside of any tensor, and everything inside; and the bits stay the same."""
    p = problem(case, device)
    with walls() as outside:
        walled, dsinks = answer(p)
        assert len(outside) >= 2, "the kernels allocate by a function that this test does not know"
        assert all(x.isnan().all() for x in outside), "a kernel wrote beside a tensor"
    assert all(x.isfinite().all() for x in (walled.out, walled.dq, walled.dk, walled.dv))
    plain, dsinks_again = answer(p)
    bits = same(plain, walled, but="" if case.deterministic or device == "cpu" else "dq")
    assert not bits, f"{bits} depend on what was in memory before"
    assert dsinks is None or torch.equal(dsinks, dsinks_again)


@contextmanager
def tiles(block_q: int, block_k: int) -> Iterator[None]:
    """Every kernel in tiles of this shape, whatever the table says."""
    with ExitStack() as stack:
        for direction in get_args(config.Direction):
            stack.enter_context(config.use(direction, config.Config(block_q, block_k, 4, 1)))
        yield


@contextmanager
def walls(width: int = 512) -> Iterator[list[Tensor]]:
    """New floating-point tensors stand between two walls of NaN; ``torch.empty`` holds NaN. Yields the walls."""
    found: list[Tensor] = []

    def walled(make: Callable[..., Tensor], fill: bool) -> Callable[..., Tensor]:
        def made(*args: Any, **options: Any) -> Tensor:
            x = make(*args, **options)
            if not x.is_floating_point() or not x.is_contiguous():
                return x
            whole = torch.Tensor.new_full(x, (x.numel() + 2 * width,), torch.nan)
            inside = whole[width : whole.numel() - width].view(x.shape)
            found.extend((whole[:width], whole[whole.numel() - width :]))
            return inside if fill else inside.copy_(x)

        return made

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "zeros", "zeros_like", "full"):
            patch.setattr(torch, name, walled(getattr(torch, name), name.startswith("empty")))
        for name in ("new_empty", "new_zeros"):
            patch.setattr(Tensor, name, walled(getattr(Tensor, name), name.endswith("empty")))
        yield found


def check_far_apart(device: str = "cpu") -> None:
    """Tensors whose rows lie so far apart that offsets pass 2**31 give the bits of compact ones."""
    rows, gap = 9, 1 << 28
    whole = torch.empty(rows * gap, dtype=torch.bfloat16, device=device)  # 4.5 GiB, of which a few pages are touched
    make = torch.Generator().manual_seed(0)
    compact = [torch.randn(1, rows, h, 16, generator=make).to(device, torch.bfloat16) for h in (2, 1, 1, 2)]
    far = [whole.as_strided(x.shape, (gap, gap, 16, 1), 1024 * i) for i, x in enumerate(compact)]
    by_batch = [x.transpose(0, 1) for x in far]  # 9 batch rows of one position
    for x, y in zip(far, compact, strict=True):
        x.copy_(y)
    for views, copies in ((far, compact), (by_batch, [x.transpose(0, 1).contiguous() for x in compact])):
        results = []
        for *leaves, dout in (views, copies):
            leaves = [x.detach().requires_grad_() for x in leaves]
            out, lse = rf.flash_attention(*leaves, return_lse=True, backend=BACKEND, deterministic=True)
            results.append(Answer(out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)))
        assert not same(*results)


def play(words: str, device: str = "cuda") -> None:
    """``"1 Case(...)"``: once forward and backward."""
    ranks, case = words.split(" ", 1)
    p = problem(eval(case, {"Case": Case, "Lengths": Lengths}), device)
    if int(ranks) > 1:
        answer_of_ring(p, int(ranks), "contiguous")
    else:
        answer(p)


if __name__ == "__main__":
    for words in sys.argv[1:]:
        try:
            play(words)
        except Exception as error:  # the test of this case will fail too, and say more
            print(f"{words}: {type(error).__name__}: {error}", file=sys.stderr)
