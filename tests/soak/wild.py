"""Values that nobody should pass, and calls to pass them to, all of them written as Python.

A call is a template with named holes, each hole has a right value and a *kind*, and a wild value has one word that says
what it is. The kind says which words it may take; everything else must be refused by name:

    scale     real     may take: integer real fraction        3 -> fine    "3", True, [1], nan -> refused

Because all is source code, what fails can be pasted: ``python -c "import torch, ...; rf.flash_attention(x, x, x, scale='3')"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SETUP = """\
import warnings; warnings.simplefilter("ignore")
import torch, numpy as np, ringflash as rf
from math import inf, nan; from fractions import Fraction; from decimal import Decimal
torch.manual_seed(0); x = torch.randn(2, 8, 4, 8); qint = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
part = rf.Partial(x, torch.randn(2, 4, 8)); s = rf.Sharding(8, (0, 2)); alone = rf.Sharding(8, (0, 1))
tall, wide = torch.randn(2, 8, 8, 4), torch.randn(2, 8, 4, 16)
csr, strided_nested = x[0, 0].to_sparse_csr(), torch.nested.as_nested_tensor([x[0], x[1]])
jagged_nested = torch.nested.as_nested_tensor([x[0], x[1]], layout=torch.jagged)
inference = torch.inference_mode()(x.clone)(); uninitialized = torch.nn.UninitializedParameter()
class Odd(torch.Tensor): __repr__ = lambda self: "Odd()"
class Nothing: __repr__ = lambda self: "Nothing()"
warnings.simplefilter("error")"""

NUMBERS = {
    "nan": "wild",
    "inf": "wild",
    "-inf": "wild",
    "10**30": "huge",
    "2**63": "huge",
    "-2**63 - 1": "huge",
    "2**62": "huge",
    "-3": "integer",
    "0": "integer",
    "2": "integer",
    "np.int64(2)": "integer",
    "np.int32(-1)": "integer",
    "-1.5": "real",
    "1.0": "real",
    "0.3": "real",
    "np.float64(0.5)": "real",
    "np.float32(0.5)": "real",
    "1e308": "extreme",
    "1e-320": "extreme",
    "Fraction(1, 2)": "fraction",
    "Decimal('0.5')": "fraction",
    "True": "boolean",
    "np.bool_(True)": "boolean",
    "torch.tensor(2)": "0-dim",
    "torch.tensor(1.0)": "0-dim",
    "np.array(1)": "0-dim",
    "torch.tensor(True)": "wild",
    "torch.tensor(1.0, requires_grad=True)": "wild",
    "torch.tensor(1, device='meta')": "wild",
    "torch.tensor(1.0, device='meta')": "wild",
    "torch.tensor(1).to_sparse()": "wild",
    "torch.ones(2)": "wild",
    "1j": "wild",
    "[1]": "wild",
    "[]": "wild",
    "()": "wild",
    "{}": "wild",
    "''": "wild",
    "'3'": "wild",
    "b'1'": "wild",
    "Nothing()": "wild",
    "int": "wild",
    "None": "none",
}
"""Numbers and what is passed for one, each with its word."""

TENSORS = {
    "x.clone()": "dense",
    "torch.nn.Parameter(x.clone())": "dense",
    "x[:1].expand(2, 8, 4, 8)": "dense",
    "x[..., :1].expand(2, 8, 4, 8)": "dense",
    "x.transpose(1, 2).contiguous().transpose(1, 2)": "dense",
    "tall.transpose(2, 3)": "dense",
    "wide[..., ::2]": "dense",
    "torch._neg_view(x)": "dense",
    "x.to(torch.complex64).conj().imag": "dense",
    "torch._efficientzerotensor((2, 8, 4, 8))": "dense",
    "inference": "dense",
    "x.as_subclass(Odd)": "dense",
    "None": "wild",
    "[1.0]": "wild",
    "'q'": "wild",
    "Nothing()": "wild",
    "np.ones((2, 8, 4, 8), np.float32)": "wild",
    "x.to('meta')": "meta",
    "x.to_sparse()": "wild",
    "x.to_sparse(2)": "wild",
    "csr": "wild",
    "x.to_mkldnn()": "wild",
    "x.to(torch.complex64)": "dtype",
    "x.long()": "dtype",
    "x.bool()": "dtype",
    "x.double()": "floating",
    "x.bfloat16()": "floating",
    "x.to(torch.float8_e4m3fn)": "dtype",
    "qint": "dtype",
    "jagged_nested": "wild",
    "strided_nested": "wild",
    "uninitialized": "wild",
    "torch.tensor(1.0)": "wild",
    "x[0]": "wild",
    "x[None]": "wild",
    "x[:, :0]": "wild",
    "x[:, :5]": "wild",
    "x[:, :, :0]": "shape",
    "x[:, :, :3]": "shape",
    "x[..., :3]": "head dim",
    "x[:0]": "shape",
}
"""What is passed for a tensor of shape [2, 8, 4, 8] and dtype float32; ``wild`` must be refused where that is needed."""

PER_HEAD = {
    "torch.ones(4)": "dense",
    "torch.ones(1).expand(4)": "dense",
    "torch.ones(4).double()": "dense",
    "torch.ones(4).bfloat16()": "dense",
    "torch.ones(4).as_subclass(Odd)": "dense",
    "torch.ones(4, device='meta')": "meta",
    "torch.ones(4).to_sparse()": "wild",
    "torch.ones(4, dtype=torch.complex64)": "wild",
    "torch.ones(4).long()": "wild",
    "torch.ones(4).bool()": "wild",
    "torch.ones(4).to(torch.float8_e4m3fn)": "wild",
    "qint[0, 0, :, 0]": "wild",
    "uninitialized": "wild",
    "np.ones(4)": "wild",
    "[1.0] * 4": "wild",
    "'1'": "wild",
    "1.0": "wild",
    "torch.ones(3)": "shape",
    "torch.ones(4, 1)": "wild",
    "torch.tensor(1.0)": "wild",
    "None": "none",
}
"""What is passed for one number per query head."""

OFFSETS = {
    "[0, 3, 8]": "offsets",
    "(0, 3, 3, 8)": "offsets",
    "range(0, 9, 4)": "offsets",
    "np.array([0, 3, 8])": "offsets",
    "np.array([0, 3, 8], dtype=np.int32)": "offsets",
    "torch.tensor([0, 3, 8])": "offsets",
    "torch.tensor([[0, 3, 8], [0, 4, 8]])": "offsets",
    "[[0, 3, 8], [0, 8]]": "offsets",
    "[torch.tensor(0), torch.tensor(8)]": "offsets",
    "[]": "wild",
    "[[]]": "wild",
    "[0, 5, 3, 8]": "wild",
    "[1, 8]": "wild",
    "[0, -3]": "wild",
    "[0, 10**30]": "wild",
    "[0, 2**62]": "wild",
    "[0, 8.0]": "wild",
    "[0, nan]": "wild",
    "[0, None]": "wild",
    "[0, '8']": "wild",
    "[False, True]": "wild",
    "[[0, 8], [0, 9]]": "wild",
    "[[0, 8], []]": "wild",
    "[[0, 8], 3]": "wild",
    "[0, [3, 8]]": "wild",
    "[[[0, 8]]]": "wild",
    "np.array([0.0, 8.0])": "wild",
    "torch.tensor([0.0, 8.0])": "wild",
    "torch.tensor([False, True])": "wild",
    "torch.tensor(8)": "wild",
    "torch.zeros(1, 1, 2, dtype=torch.int64)": "wild",
    "torch.tensor([0, 8], device='meta')": "wild",
    "torch.tensor([0, 8]).to_sparse()": "wild",
    "{0, 8}": "wild",
    "{0: 1, 8: 2}": "wild",
    "b'\\x00\\x08'": "wild",
    "'08'": "wild",
    "8": "wild",
    "None": "wild",
    "Nothing()": "wild",
}
"""What is passed for the offsets of packed documents."""

THINGS = {
    **NUMBERS,
    "x": "wild",
    "rf.causal": "mask",
    "part": "part",
    "s": "sharding",
    "[s]": "wild",
    "[Nothing()]": "wild",
}
"""What is passed for an object of this library."""


@dataclass(frozen=True)
class Kind:
    """Which words a hole may take, of which table."""

    table: Mapping[str, str]
    takes: frozenset[str]


def _kind(table: Mapping[str, str], *words: str) -> Kind:
    return Kind(table, frozenset(words))


# ``huge``, ``extreme`` and ``0-dim`` may be taken or refused by name; what takes them must be right.
INTEGER = _kind(NUMBERS, "integer", "huge", "0-dim")
INTEGER_OR_NONE = _kind(NUMBERS, "integer", "huge", "0-dim", "none")
REAL = _kind(NUMBERS, "integer", "real", "huge", "extreme", "fraction", "0-dim")
REAL_OR_NONE = _kind(NUMBERS, "integer", "real", "huge", "extreme", "fraction", "0-dim", "none")
BOOLEAN = _kind(NUMBERS, "boolean")
NAME = _kind(NUMBERS)
NAME_OR_NONE = _kind(NUMBERS, "none")
TENSOR = _kind(TENSORS, "dense")
VALUE = _kind(TENSORS, "dense", "head dim")  # which has a head_dim of its own
SEQUENCE = _kind(TENSORS, "dense", "dtype", "floating", "shape", "head dim", "meta")
PARTIAL_OUT = _kind(TENSORS, "dense", "floating")
PER_HEAD_OR_NONE = _kind(PER_HEAD, "dense", "none")
DOCUMENTS = _kind(OFFSETS, "offsets")
MASK = _kind(THINGS, "mask")
MASK_OR_NONE = _kind(THINGS, "mask", "none")
SHARDING = _kind(THINGS, "sharding")
GROUP = _kind(NUMBERS, "none")
PLANS = _kind(THINGS)
PARTIAL = _kind(THINGS, "part")


@dataclass(frozen=True)
class Call:
    """``template`` with holes; each hole has a kind. ``says``: the names by which the hole is called in errors."""

    template: str
    right: Mapping[str, str]
    kinds: Mapping[str, Kind]
    callers: tuple[str, ...]
    says: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def write(self, **wild: str) -> str:
        """The call as Python, with these holes filled and the others right."""
        return self.template.format(**{**self.right, **wild})

    def names(self, hole: str) -> tuple[str, ...]:
        """What an error about this hole may call it."""
        return (hole, *self.says.get(hole, ()))


_QKV = {"q": ("query",), "k": ("key",), "v": ("value", "key"), "s": ("fourth argument",)}
_OPTIONS = "scale={scale}, return_lse={return_lse}, backend={backend}, softcap={softcap}, alibi_slopes={alibi_slopes}, "
_OPTIONS += "sinks={sinks}, dropout_p={dropout_p}, seed={seed}, deterministic={deterministic}"
_RIGHT = dict(
    scale="None",
    return_lse="False",
    backend="'auto'",
    softcap="0.0",
    alibi_slopes="None",
    sinks="None",
    dropout_p="0.0",
)
_RIGHT |= dict(seed="3", deterministic="False", q="x", k="x", v="x")
_KINDS = dict(q=TENSOR, k=TENSOR, v=VALUE, scale=REAL_OR_NONE, return_lse=BOOLEAN, backend=NAME, softcap=REAL)
_KINDS |= dict(alibi_slopes=PER_HEAD_OR_NONE, sinks=PER_HEAD_OR_NONE, dropout_p=REAL, seed=INTEGER_OR_NONE)
_KINDS |= dict(deterministic=BOOLEAN)

_SHARDING = "rf.Sharding({length}, {group}, {mask}, {layout}, {route}, keys={keys}, q_offset={q_offset}, "
_SHARDING += "heads_axis={heads_axis})"

CALLS = {
    "flash_attention": Call(
        "rf.flash_attention({q}, {k}, {v}, {mask}, q_offset={q_offset}, " + _OPTIONS + ")",
        {**_RIGHT, "mask": "rf.causal", "q_offset": "None"},
        {**_KINDS, "mask": MASK, "q_offset": INTEGER_OR_NONE},
        ("flash_attention",),
        _QKV,
    ),
    "ring_attention": Call(
        "rf.ring_attention({q}, {k}, {v}, {s}, {mask}, " + _OPTIONS + ")",
        {**_RIGHT, "mask": "None", "s": "alone"},
        {**_KINDS, "mask": MASK_OR_NONE, "s": SHARDING},
        ("ring_attention",),
        _QKV,
    ),
    "Sharding": Call(
        "rf.verify(rf.plans(" + _SHARDING + "))",
        dict(length="8", group="(0, 2)", mask="rf.causal", layout="'auto'", route="'auto'", keys="None")
        | dict(q_offset="0", heads_axis="None"),
        dict(length=INTEGER, group=GROUP, mask=MASK, layout=NAME, route=NAME, keys=INTEGER_OR_NONE)
        | dict(q_offset=INTEGER_OR_NONE, heads_axis=INTEGER_OR_NONE),
        ("Sharding",),
        {"keys": ("q_offset",), "length": ("q_offset",)},
    ),
    "with_mask": Call("s.with_mask({mask})", {"mask": "rf.full"}, {"mask": MASK}, ("with_mask", "Sharding")),
    "shard": Call(
        "s.shard({x}, {dim})", dict(x="x", dim="1"), dict(x=SEQUENCE, dim=INTEGER), ("shard",), {"x": ("tensor",)}
    ),
    "unshard": Call(
        "alone.unshard({x}, {dim})",
        dict(x="x", dim="1"),
        dict(x=SEQUENCE, dim=INTEGER),
        ("unshard",),
        {"x": ("tensor",)},
    ),
    "plan": Call("rf.plan({s})", dict(s="s"), dict(s=SHARDING), ("plan",)),
    "plans": Call("rf.plans({s})", dict(s="s"), dict(s=SHARDING), ("plans",)),
    "verify": Call("rf.verify({plans})", dict(plans="rf.plans(s)"), dict(plans=PLANS), ("verify",)),
    "estimate": Call(
        "rf.estimate({plans}, {hardware}, heads={heads}, kv_heads={kv_heads}, head_dim={head_dim}, batch={batch})",
        dict(plans="rf.plans(s)", hardware="'h100'", heads="4", kv_heads="2", head_dim="64", batch="1"),
        dict(plans=PLANS, hardware=NAME, heads=INTEGER, kv_heads=INTEGER_OR_NONE, head_dim=INTEGER, batch=INTEGER),
        ("estimate",),
        {"kv_heads": ("heads",), "hardware": ("hardware", "machine")},
    ),
    "merge": Call("rf.merge({a}, {b})", dict(a="part", b="part"), dict(a=PARTIAL, b=PARTIAL), ("merge",)),
    "merge out": Call(
        "rf.merge(part, rf.Partial({out}, {lse}))",
        dict(out="x", lse="part.lse"),
        dict(out=PARTIAL_OUT, lse=_kind(TENSORS)),
        ("merge",),
        {"out": ("b",), "lse": ("b",)},
    ),
    "sink": Call(
        "rf.sink({logits})",
        dict(logits="torch.ones(4)"),
        dict(logits=_kind(PER_HEAD, "dense", "shape", "meta")),
        ("sink",),
    ),
    "window": Call(
        "rf.window({left}, {right})",
        dict(left="2", right="0"),
        dict(left=INTEGER_OR_NONE, right=INTEGER_OR_NONE),
        ("window",),
    ),
    "prefix": Call("rf.prefix({n})", dict(n="2"), dict(n=INTEGER), ("prefix",)),
    "chunks": Call("rf.chunks({n})", dict(n="2"), dict(n=INTEGER), ("chunks",)),
    "documents": Call(
        "rf.documents({cu_seqlens})",
        dict(cu_seqlens="[0, 8]"),
        dict(cu_seqlens=DOCUMENTS),
        ("documents",),
        {"cu_seqlens": ("batch rows",)},
    ),
    "draw a mask": Call(
        "rf.documents([[0, 3], [0, 1, 3]]).draw({length}, {keys}, q_offset={q_offset}, row={row})",
        dict(length="3", keys="3", q_offset="0", row="0"),
        dict(length=_kind({k: v for k, v in NUMBERS.items() if v != "huge"}, "integer", "0-dim"))
        | dict(keys=_kind({k: v for k, v in NUMBERS.items() if v != "huge"}, "integer", "0-dim", "none"))
        | dict(q_offset=INTEGER, row=INTEGER),
        ("draw", "Mask.draw"),
    ),
    "local_world": Call(
        "rf.local_world({ranks})",
        dict(ranks="1"),
        dict(ranks=INTEGER),
        ("local_world",),
    ),
    "direct": Call(
        "rf.Sharding(8, (0, 2), route=rf.direct({depth}))",
        dict(depth="1"),
        dict(depth=INTEGER_OR_NONE),
        ("direct", "Sharding"),
    ),
    "double_ring": Call(
        "rf.Sharding(8, (0, 2), route=rf.double_ring({nodes}, {per_node}))",
        dict(nodes="1", per_node="2"),
        dict(nodes=INTEGER, per_node=INTEGER),
        ("double_ring", "Sharding"),
        {"nodes": ("route",), "per_node": ("route",)},
    ),
    "Layout": Call(
        "rf.Sharding(8, (0, 2), layout=rf.Layout({runs}))",
        dict(runs="((range(0, 4),), (range(4, 8),))"),
        dict(runs=_kind({**NUMBERS, "(3, 4)": "wild", "('ab', 'cd')": "wild", "((3,), (4,))": "wild"})),
        ("Layout", "layout", "Sharding"),
        {"runs": ("layout", "rank 0", "positions")},
    ),
}
"""Public calls, by a name of their own."""


def namespace(**more: Any) -> dict[str, Any]:
    """What the sources of this module are evaluated in."""
    names: dict[str, Any] = dict(more)
    exec(SETUP, names)
    return names


def snippet(source: str) -> str:
    """A command line that makes one call."""
    lines = SETUP.splitlines()
    return "python - <<'END'\n" + "\n".join([*lines, source]) + "\nEND"
