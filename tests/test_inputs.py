"""Bad input: right, or one clear sentence before anything is sent, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ringflash as rf

X = torch.randn(2, 8, 4, 8)
S = rf.Sharding(8, (0, 2))
PART = rf.Partial(X, X[..., 0].transpose(1, 2))


def qkv(**changes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple({"q": X, "k": X, "v": X, **changes}.values())  # type: ignore[return-value]


CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "three dims": (lambda: rf.flash_attention(*qkv(q=X[0])), ValueError, r"query has shape \(8, 4, 8\); \[batch, seq"),
    "no tensor": (lambda: rf.flash_attention(None, X, X), TypeError, "query is a NoneType"),
    "dtypes": (lambda: rf.flash_attention(*qkv(k=X.double())), TypeError, "are torch.float32, torch.float64"),
    "integers": (lambda: rf.flash_attention(*(X.long(),) * 3), TypeError, "one dtype is needed, of float64"),
    "devices": (lambda: rf.flash_attention(*qkv(v=X.to("meta"))), ValueError, "on cpu, cpu, meta; one device"),
    "batches": (lambda: rf.flash_attention(*qkv(k=X[:1], v=X[:1])), ValueError, "batch 2, 1, 1"),
    "lengths": (lambda: rf.flash_attention(*qkv(v=X[:, :5])), ValueError, "key has 8 positions and 4 heads, value 5"),
    "heads": (
        lambda: rf.flash_attention(*qkv(k=X[:, :, :3], v=X[:, :, :3])),
        ValueError,
        "key has 3 heads and query 4",
    ),
    "head dims": (lambda: rf.flash_attention(*qkv(k=X[..., :4])), ValueError, "query has head_dim 8, key 4"),
    "empty heads": (lambda: rf.flash_attention(*(X[:, :, :0],) * 3), ValueError, "must not be 0"),
    "no offset": (
        lambda: rf.flash_attention(*qkv(q=X[:, :3])),
        ValueError,
        "q_offset=5 aligns the ends, q_offset=0 the beginnings",
    ),
    "backend": (
        lambda: rf.flash_attention(X, X, X, backend="fast"),
        ValueError,
        "accepted are 'auto', 'triton', 'aten', 'reference'",
    ),
    "triton": (
        lambda: rf.flash_attention(X, X, X, backend="triton"),
        ValueError,
        "backend='triton' cannot run: on a CPU",
    ),
    "softcap": (lambda: rf.flash_attention(X, X, X, softcap=2.0, backend="aten"), ValueError, "'aten' has no softcap"),
    "dropout": (
        lambda: rf.flash_attention(X, X, X, dropout_p=0.1, seed=1, backend="aten"),
        ValueError,
        "'aten' has no dropout_p",
    ),
    "alibi": (
        lambda: rf.flash_attention(X, X, X, alibi_slopes=torch.ones(4), backend="aten"),
        ValueError,
        "'aten' has no alibi_slopes",
    ),
    "value dim": (
        lambda: rf.flash_attention(*qkv(v=X[..., :4]), backend="aten"),
        ValueError,
        "needs one head_dim, and query has 8, value 4",
    ),
    "no seed": (lambda: rf.flash_attention(X, X, X, dropout_p=0.1), ValueError, "dropout_p is 0.1 without seed"),
    "certain dropout": (
        lambda: rf.flash_attention(X, X, X, dropout_p=1.0, seed=1),
        ValueError,
        "a probability below 1",
    ),
    "seed dtype": (
        lambda: rf.flash_attention(X, X, X, dropout_p=0.1, seed=torch.tensor(1.5)),
        ValueError,
        "0-dim, int64 and on the CPU",
    ),
    "seed without a number": (
        lambda: rf.flash_attention(X, X, X, dropout_p=0.1, seed=torch.tensor(1, device="meta")),
        ValueError,
        "seed is a tensor, torch.int64 of shape .* on meta; it must be 0-dim, int64 and on the CPU",
    ),
    "seed of two numbers": (
        lambda: rf.flash_attention(X, X, X, dropout_p=0.1, seed=[3]),
        TypeError,
        r"flash_attention: seed is \[3\] of type list; an integer is needed",
    ),
    "seed beyond int64": (
        lambda: rf.flash_attention(X, X, X, dropout_p=0.1, seed=2**63),
        ValueError,
        r"flash_attention: seed is 9223372036854775808; a number from -2\*\*63 to 2\*\*63 - 1",
    ),
    "sparse": (lambda: rf.flash_attention(*qkv(k=X.to_sparse())), TypeError, "key is a sparse_coo tensor; a dense one"),
    "of another library": (lambda: rf.flash_attention(*qkv(v=X.to_mkldnn())), TypeError, "value is a mkldnn tensor"),
    "uninitialized": (
        lambda: rf.flash_attention(*qkv(q=torch.nn.UninitializedParameter())),
        TypeError,
        "query is an uninitialized tensor",
    ),
    "listed sinks": (lambda: rf.flash_attention(X, X, X, sinks=[1.0] * 4), TypeError, "sinks is a list; a tensor"),
    "sinks of 8 bits": (
        lambda: rf.flash_attention(X, X, X, sinks=torch.ones(4).to(torch.float8_e4m3fn)),
        ValueError,
        "sinks is torch.float8_e4m3fn on cpu; one of float64, float32, bfloat16, float16 on cpu",
    ),
    "scale with a gradient": (
        lambda: rf.flash_attention(X, X, X, scale=torch.tensor(1.0, requires_grad=True)),
        TypeError,
        r"flash_attention: scale is tensor\(.*pass its .item\(\), which has no gradient",
    ),
    "scale in words": (lambda: rf.flash_attention(X, X, X, scale="3"), TypeError, "scale is '3' of type str; a number"),
    "scale beyond float32": (
        lambda: rf.flash_attention(X, X, X, scale=1e308),
        ValueError,
        r"scale is 1e\+308; for torch.float32 a number up to 3.4e\+38",
    ),
    "softcap beyond float32": (
        lambda: rf.flash_attention(X, X, X, softcap=1e308),
        ValueError,
        r"softcap is 1e\+308; .*for torch.float32 from 1.08e-19 to 1.84e\+19",
    ),
    "softcap below float64": (
        lambda: rf.flash_attention(*(X.double(),) * 3, softcap=1e-320),
        ValueError,
        "softcap is 1e-320; .*for torch.float64 from",
    ),
    "dropout in words": (lambda: rf.flash_attention(X, X, X, dropout_p=None), TypeError, "dropout_p is None of type"),
    "return_lse in words": (
        lambda: rf.ring_attention(X, X, X, rf.Sharding(8), return_lse="False"),
        TypeError,
        "ring_attention: return_lse is 'False'; True or False is needed",
    ),
    "deterministic in numbers": (
        lambda: rf.flash_attention(X, X, X, deterministic=3),
        TypeError,
        "deterministic is 3; True or False",
    ),
    "backend of no name": (lambda: rf.flash_attention(X, X, X, backend=[]), TypeError, r"backend is \[\]; a name"),
    "offset of nothing": (
        lambda: rf.flash_attention(X, X, X, q_offset=""),
        TypeError,
        "flash_attention: q_offset is '' of type str",
    ),
    "offset of truth": (
        lambda: rf.flash_attention(X, X, X, q_offset=False),
        TypeError,
        "q_offset is False of type bool",
    ),
    "offset beyond int64": (
        lambda: rf.flash_attention(X, X, X, q_offset=2**63 - 8),
        ValueError,
        r"q_offset is 9223372036854775800; a number from -2\*\*60 to 2\*\*60",
    ),
    "torch.func": (
        lambda: torch.func.grad(lambda q: rf.flash_attention(q, X, X).sum())(X),
        rf.RingflashError,
        "flash_attention: transforms of torch.func .* not implemented; use backward",
    ),
    "vmap": (
        lambda: torch.vmap(lambda q: rf.flash_attention(q, X, X))(X[None]),
        rf.RingflashError,
        "flash_attention: transforms of torch.func",
    ),
    "scale": (lambda: rf.flash_attention(X, X, X, scale=float("nan")), ValueError, "scale is nan"),
    "negative softcap": (lambda: rf.flash_attention(X, X, X, softcap=-1.0), ValueError, "softcap is -1.0"),
    "sinks": (lambda: rf.flash_attention(X, X, X, sinks=torch.ones(3)), ValueError, r"sinks has shape \(3,\).*\(4,\)"),
    "slopes": (
        lambda: rf.flash_attention(X, X, X, alibi_slopes=torch.ones(3, 4)),
        ValueError,
        r"alibi_slopes has shape \(3, 4\).*\(4,\) or \(2, 4\)",
    ),
    "slopes' gradient": (
        lambda: rf.flash_attention(X, X, X, alibi_slopes=torch.ones(4, requires_grad=True)),
        ValueError,
        "alibi_slopes requires a gradient",
    ),
    "mask": (lambda: rf.flash_attention(X, X, X, mask="causal"), TypeError, "mask is 'causal'; a mask is a value"),
    "rows": (
        lambda: rf.flash_attention(X, X, X, mask=rf.documents([[0, 8], [0, 3, 8], [0, 4, 8]])),
        ValueError,
        "documents for 3 batch rows, query has 2",
    ),
    "documents' length": (
        lambda: rf.flash_attention(X, X, X, mask=rf.documents([0, 9])),
        ValueError,
        "cover 9 positions, key has 8",
    ),
    "no sharding": (lambda: rf.ring_attention(X, X, X, None), TypeError, "the fourth argument is a NoneType"),
    "not a shard": (
        lambda: rf.ring_attention(X, X, X, rf.Sharding(8, (0, 2))),
        ValueError,
        "query has 8 positions; rank 0 of 2 holds 4 of 8 in the zigzag layout: use s.shard",
    ),
    "not a key shard": (
        lambda: rf.ring_attention(X[:, :4], X, X, rf.Sharding(8, (1, 2), keys=6, q_offset=0)),
        ValueError,
        "key has 8 positions; rank 1 of 2 holds 3 of 6",
    ),
    "pair cannot talk": (
        lambda: rf.ring_attention(*(X[:, :4],) * 3, rf.Sharding(8, (0, 2))),
        rf.WireError,
        r"the pair \(0, 2\), which can plan but not communicate",
    ),
    "unknown option": (lambda: rf.flash_attention(X, X, X, window_size=3), TypeError, "window_size"),
    "layout": (
        lambda: rf.Sharding(8, (0, 2), layout="zig"),
        ValueError,
        "layout is 'zig'; accepted are 'auto', 'contiguous', 'zigzag', 'striped', 'balanced', or a Layout",
    ),
    "balanced keys": (
        lambda: rf.Sharding(8, (0, 2), rf.documents([0, 3, 6]), "balanced", keys=6, q_offset=0),
        ValueError,
        "layout is 'balanced' and there are 6 keys for 8 queries",
    ),
    "route": (lambda: rf.Sharding(8, (0, 2), route="tree"), ValueError, "route is 'tree'; accepted are 'auto', 'ring'"),
    "route type": (
        lambda: rf.Sharding(8, (0, 2), route=rf.double_ring),
        TypeError,
        "a name is needed, or a value such as rf.double_ring",
    ),
    "route that does not fit": (
        lambda: rf.Sharding(8, (0, 12), route=rf.double_ring(2, 4), heads_axis=2),
        ValueError,
        r"Sharding: route is double_ring\(2, 4\), for 8 ranks; there are 6",
    ),
    "degree": (
        lambda: rf.Sharding(8, (0, 12), heads_axis=5),
        ValueError,
        "heads_axis is 5, and the group has 12 ranks; 12 can be cut by 1, 2, 3, 4, 6, 12$",
    ),
    "degree 0": (lambda: rf.Sharding(8, (0, 2), heads_axis=0), ValueError, "heads_axis is 0, and the group has 2"),
    "degree type": (
        lambda: rf.Sharding(8, (0, 2), heads_axis=1.5),
        TypeError,
        "heads_axis is 1.5; the name of an axis",
    ),
    "axis of no mesh": (
        lambda: rf.Sharding(8, (0, 2), heads_axis="heads"),
        ValueError,
        "heads_axis is 'heads'; only the axes of a DeviceMesh have names.*as heads_axis=2",
    ),
    "layout for all ranks": (
        lambda: rf.Sharding(8, (0, 4), layout=rf.Layout(((range(0, 8),), (), (), ())), heads_axis=2),
        ValueError,
        "layout has 8 positions on 4 ranks; needed are 8 on 2",
    ),
    "rank": (lambda: rf.Sharding(8, (2, 2)), ValueError, r"group is \(2, 2\); a pair means"),
    "group": (lambda: rf.Sharding(8, "world"), TypeError, "group is of type str; accepted are"),
    "length": (lambda: rf.Sharding(-1, (0, 2)), ValueError, "length is -1"),
    "length type": (lambda: rf.Sharding(8.5, (0, 2)), TypeError, "length is 8.5"),
    "mask type": (lambda: rf.Sharding(8, (0, 2), mask=None), TypeError, "mask is None; a mask is a value"),
    "sharding without offset": (lambda: rf.Sharding(8, (0, 2), keys=6), ValueError, "q_offset=-2 aligns the ends"),
    "sharding's documents": (
        lambda: rf.Sharding(8, (0, 2), rf.documents([0, 6])),
        ValueError,
        "documents of the mask cover 6 positions, the keys 8",
    ),
    "foreign layout": (
        lambda: rf.Sharding(8, (0, 2), layout=rf.Layout(((range(0, 3),), (range(3, 7),)))),
        ValueError,
        "layout has 7 positions on 2 ranks; needed are 8 on 2",
    ),
    "overlapping layout": (
        lambda: rf.Sharding(8, (0, 2), layout=rf.Layout(((range(0, 5),), (range(4, 8),)))),
        ValueError,
        "every position from 0 to the length must be on exactly one rank",
    ),
    "wrong length": (
        lambda: rf.Sharding(8, (0, 2)).shard(torch.ones(2, 9), dim=1),
        ValueError,
        r"dim 1 of a tensor of shape \(2, 9\); this sharding has 8 positions",
    ),
    "keys in the wrong place": (
        lambda: rf.Sharding(8, (0, 2), keys=6, q_offset=0).shard(torch.ones(2, 6), dim=1),
        ValueError,
        "keys go through key_sharding.shard",
    ),
    "length of truth": (lambda: rf.Sharding(True, (0, 2)), TypeError, "Sharding: length is True of type bool"),
    "endless length": (
        lambda: rf.Sharding(10**30, (0, 2)),
        ValueError,
        r"Sharding: length is 10+; a number of positions is 0 or more; 2\*\*60 is the most",
    ),
    "pair of truth": (lambda: rf.Sharding(8, (False, 2)), ValueError, r"Sharding: group is \(False, 2\); a pair means"),
    "sharding's offset": (
        lambda: rf.Sharding(8, (0, 2), q_offset={}),
        TypeError,
        "Sharding: q_offset is {} of type dict",
    ),
    "degree of truth": (lambda: rf.Sharding(8, (0, 2), heads_axis=True), TypeError, "Sharding: heads_axis is True"),
    "layout of no name": (
        lambda: rf.Sharding(8, (0, 2), layout=[]),
        TypeError,
        r"Sharding: layout is \[\] of type list",
    ),
    "check of no name": (lambda: rf.Sharding(8, (0, 2), check=[]), ValueError, r"Sharding: check is \[\]; accepted"),
    "mask of a relative": (lambda: S.with_mask([1]), TypeError, r"with_mask: mask is \[1\]; a mask is a value"),
    "no tensor to shard": (lambda: S.shard(3, 0), TypeError, "shard: x is a int; a tensor is needed"),
    "sparse shard": (lambda: S.shard(X.to_sparse(), 1), TypeError, "shard: x is a sparse_coo tensor"),
    "dim in words": (lambda: S.shard(X, "1"), TypeError, "shard: dim is '1' of type str; an integer"),
    "dim of truth": (lambda: S.unshard(X, True), TypeError, "unshard: dim is True of type bool"),
    "dim that is not there": (lambda: S.shard(X, 4), ValueError, r"shard: dim is 4; .* of shape \(2, 8, 4, 8\)"),
    "plan of nothing": (lambda: rf.plan(3), TypeError, "plan: s is 3 of type int; an rf.Sharding is needed"),
    "plans of nothing": (lambda: rf.plans(None), TypeError, "plans: s is None of type NoneType"),
    "verify no plans": (
        lambda: rf.verify([3]),
        TypeError,
        r"verify: plans is a list with a int in it; .*rf.plans\(s\)",
    ),
    "estimate no plans": (lambda: rf.estimate([1], "h100", heads=4), TypeError, "estimate: plans is a list with a int"),
    "estimate endless heads": (
        lambda: rf.estimate(rf.plans(S), "h100", heads=10**30),
        ValueError,
        r"estimate: heads is 10+; a number from 1 to 2\*\*20",
    ),
    "estimate no dtype": (
        lambda: rf.estimate(rf.plans(S), "h100", heads=4, dtype=[]),
        ValueError,
        r"estimate: dtype is \[\]; accepted are",
    ),
    "estimate no machine": (
        lambda: rf.estimate(rf.plans(S), 3, heads=4),
        ValueError,
        "estimate: hardware is 3; the name",
    ),
    "merge a pair": (
        lambda: rf.merge(PART, tuple(PART)),
        TypeError,
        r"merge: b is .* of type tuple; .*Partial\(\*pair\)",
    ),
    "merge integers": (
        lambda: rf.merge(PART, rf.Partial(X.long(), PART.lse)),
        ValueError,
        r"merge: b.out is torch.int64 of shape \(2, 8, 4, 8\); floats \[b, s, h, d\]",
    ),
    "merge without a batch": (
        lambda: rf.merge(rf.Partial(X[0], PART.lse[0]), PART),
        ValueError,
        r"merge: a.out is torch.float32 of shape \(8, 4, 8\)",
    ),
    "merge other rows": (
        lambda: rf.merge(PART, rf.Partial(X[:, :5], PART.lse)),
        ValueError,
        r"merge: b.lse has shape \(2, 4, 8\) .* needs \(2, 4, 5\)",
    ),
    "merge other heads": (
        lambda: rf.merge(PART, rf.Partial(X[:, :, :3], PART.lse[:, :3])),
        ValueError,
        r"merge: a.out has shape \(2, 8, 4, 8\), b.out \(2, 8, 3, 8\)",
    ),
    "merge devices": (
        lambda: rf.merge(PART, rf.Partial(*(x.to("meta") for x in PART))),
        ValueError,
        "a is on cpu, b on meta",
    ),
    "sink": (lambda: rf.sink(torch.ones(4).long()), ValueError, r"sink: logits is torch.int64 of shape \(4,\)"),
    "sink of a number": (lambda: rf.sink(1.0), TypeError, "sink: logits is a float; a tensor"),
    "layout of words": (lambda: rf.Layout(("ab",)), TypeError, "Layout: runs: rank 0 holds 'ab'; a tuple of ranges"),
    "endless layout": (
        lambda: rf.Layout(((range(10**30),),)),
        ValueError,
        r"Layout: runs: .*positions go up to 2\*\*60",
    ),
    "endless depth": (lambda: rf.direct(10**30), ValueError, r"direct: depth is 10+; a number from 1, or None for all"),
    "world in words": (lambda: rf.local_world("3"), TypeError, "local_world: ranks is '3' of type str; an integer"),
    "endless world": (lambda: rf.local_world(10**9), ValueError, r"local_world: ranks is 10+; .*65536 is the most"),
    "unshard": (lambda: rf.Sharding(8, (0, 2)).unshard(torch.ones(2, 8), dim=1), ValueError, "this rank holds 4 of 8"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_input_is_refused_in_one_clear_sentence(name: str) -> None:
    """The message says which argument, what came and what is accepted."""
    call, kind, sentence = CALLS[name]
    with pytest.raises(kind, match=sentence):
        call()


def test_what_is_a_number_is_taken_as_that_number() -> None:
    """Numbers of other libraries are numbers: whoever reads a length from an array need not convert it."""
    s = rf.Sharding(np.int64(8), [0, np.int32(2)], keys=torch.tensor(6), q_offset=np.int64(-2), heads_axis=np.int8(1))
    assert s == rf.Sharding(8, (0, 2), keys=6, q_offset=-2)
    assert all(type(x) is int for x in (s.length, s.keys, s.q_offset, s.heads_axis, *s.group))
    assert rf.direct(np.int64(3)) == rf.direct(3) and rf.local_world(np.int64(2)).ranks == 2
    exact = rf.flash_attention(X, X, X, scale=0.5, softcap=2.0, q_offset=0, dropout_p=0.5, seed=3)
    alike = dict(scale=np.float32(0.5), softcap=2, q_offset=np.int64(0), dropout_p=np.float64(0.5), seed=np.uint8(3))
    assert torch.equal(rf.flash_attention(X, X, X, **alike), exact)


@pytest.mark.parametrize("far", [2**60, 2**59 + 1])
def test_nothing_wraps_at_the_end_of_the_numbers(far: int) -> None:
    """int64 begins anew behind its end: a window that is too wide must not become one that sees nothing."""
    everything = rf.flash_attention(X, X, X, rf.full)
    assert torch.equal(rf.flash_attention(X, X, X, rf.window(far, far)), everything)
    assert torch.equal(rf.flash_attention(X, X, X, rf.window(None, far), q_offset=far), everything)
    assert not rf.flash_attention(X, X, X, rf.causal, q_offset=-far).any()
    assert torch.equal(rf.flash_attention(X, X, X, rf.prefix(far), q_offset=far), everything)


def test_heads_that_a_row_cannot_share_are_refused_before_anything_is_sent() -> None:
    """On every rank, with the degrees that would do."""

    def one_rank(group: Any) -> bool:
        s = rf.Sharding(8, group, heads_axis=4)
        x = torch.ones(1, s.local_length, 6, 8)
        with pytest.raises(
            ValueError, match=r"cannot share 6 query heads .*: 1 \(in rings of 8\), 2 \(in rings of 4\)"
        ):
            rf.ring_attention(x, x, x, s)
        return group.wire._state.asked == group.wire._state.mail == {}

    assert all(rf.local_world(8).run(one_rank))


def test_nothing_is_sent_before_an_error() -> None:
    """A call that is wrong on every rank leaves no message behind: the next, right one is not confused by it."""

    def one_rank(group: Any) -> bool:
        s = rf.Sharding(8, group)
        x = s.shard(X, 1)
        with pytest.raises(ValueError, match="head_dim 8, key 4"):
            rf.ring_attention(x, x[..., :4], x, s)
        with pytest.raises(ValueError, match="cover 7 positions"):
            rf.ring_attention(x, x, x, s, mask=rf.documents([0, 7]))
        return torch.equal(s.unshard(rf.ring_attention(x, x, x, s), 1), expected)

    expected = rf.local_world(3).run(lambda g: _whole(g))[0]
    assert all(rf.local_world(3).run(one_rank))


def _whole(group: Any) -> Tensor:
    s = rf.Sharding(8, group)
    x = s.shard(X, 1)
    return s.unshard(rf.ring_attention(x, x, x, s), 1)


def test_a_launcher_without_a_process_group_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun, forgetting init_process_group would make every rank attend to its own shard alone."""
    assert rf.Sharding(8).ranks == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2: call torch.distributed.init_process_group"):
        rf.Sharding(8)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match=r"Sharding: group is None and WORLD_SIZE is 'two', which is no number"):
        rf.Sharding(8)


def test_too_many_live_shardings_are_named() -> None:
    """A recipe that was pushed out of the bounded table between forward and backward is an error, not a wrong plan."""
    from ringflash.recipe import Recipes

    few = Recipes(most=2)
    kept = rf.Sharding(3, (0, 1))
    handles = [few.add(s) for s in (kept, *(rf.Sharding(n, (0, 1)) for n in (4, 5)))]
    assert few[handles[0]] is kept
    for length in (6, 7, 8):
        s = rf.Sharding(length, (0, 1))
        handles.append(few.add(s))
        assert few[handles[-1]] is s
    assert few[handles[0]] is kept  # somebody still holds it
    assert few[handles[-1]].length == 8  # nobody does, but it was just used
    with pytest.raises(rf.RingflashError, match="among the last 2 used"):
        few[handles[3]]
