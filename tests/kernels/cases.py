"""What the kernels are tried on: a few hundred small problems in which every two choices meet.

A case is one choice on each of nine axes (dtype, head dims, heads, mask, option, lengths, memory layout, deterministic or
not). All combinations would be millions; bugs need one or two choices together, so a list is made, always the same, in which
every pair of choices occurs. A case becomes a problem: tensors, the arguments for the library, and what they mean to the
oracle. A case prints as the id of its test.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from oracle import Predicate
from torch import Tensor

import ringflash as rf
from ringflash import reference

BACKEND = "triton"
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIMS = (
    (16, 16), (40, 40), (64, 64), (72, 72), (80, 80), (96, 96), (112, 112), (128, 128), (160, 160),
    (192, 128), (256, 256),
    (17, 33),
)  # fmt: skip
HEADS = ((2, 2), (4, 2), (3, 1))  # multi-head, grouped, multi-query
STORAGES = ("contiguous", "heads first", "slice of a projection", "slice of head dims", "misaligned", "expanded batch")


class Lengths(NamedTuple):
    queries: int
    keys: int
    q_offset: int  # position of the first query

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys}" + (f"{self.q_offset:+}" if self.q_offset else "")


SHORT = tuple(Lengths(*x) for x in ((1, 1, 0), (17, 17, 0), (63, 63, 0), (100, 33, -40), (127, 45, 0), (17, 100, 83)))
LONG = tuple(
    Lengths(*x) for x in ((1, 1, 0), (63, 63, 0), (127, 1000, 873), (1000, 1000, 0), (4096, 4096, 0), (1, 4096, 4095))
)


def _cuts(keys: int, row: int) -> list[int]:
    """Documents of a batch row: an empty one, one of a single token, a few long ones."""
    return sorted([0, 0, min(1, keys), *(keys * (2 * i + row) // 9 for i in range(1, 4)), keys])


def _masks(at: Lengths) -> dict[str, tuple[rf.Mask, list[Predicate]]]:
    """Each mask, and for every batch row that it tells apart its definition."""
    keys, wide = at.keys, max(1, at.keys // 5)
    rows = [_cuts(keys, row) for row in range(2)]
    documents = [oracle.documents(row) for row in rows]
    return {
        "full": (rf.full, [oracle.full()]),
        "causal": (rf.causal, [oracle.causal()]),
        "window": (rf.window(wide, 4), [oracle.window(wide, 4)]),
        "sliding": (rf.window(wide, 0), [oracle.window(wide, 0)]),
        "documents": (rf.documents(rows), documents),
        "causal documents": (
            rf.causal & rf.documents(rows[0]),
            [oracle.both(oracle.causal(), documents[0])],
        ),
        "prefix": (rf.prefix(keys // 3), [oracle.prefix(keys // 3)]),
        "chunks": (rf.causal & rf.chunks(wide + 3), [oracle.both(oracle.causal(), oracle.chunks(wide + 3))]),
        "several": (
            rf.prefix(keys // 2) & rf.window(2 * wide, wide) & rf.documents(rows),
            [oracle.both(oracle.prefix(keys // 2), oracle.window(2 * wide, wide), row) for row in documents],
        ),
        "blind": (rf.window(3, 0), [oracle.window(3, 0)]),  # the queries begin before the keys, and go on behind them
    }


MASKS = tuple(_masks(SHORT[0]))
OPTIONS = (
    "plain", "softcap", "alibi", "alibi per row", "dropout", "sinks", "negative scale", "no scale", "everything"
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    dtype: str = "fp32"
    dims: tuple[int, int] = (64, 64)  # of q and k, of v
    heads: tuple[int, int] = (4, 2)  # of q, of k and v
    mask: str = "causal"
    option: str = "plain"
    lengths: Lengths = SHORT[2]
    storage: str = "contiguous"
    deterministic: bool = False
    amplitude: float = 2.0  # of q and k: the softmax is far from uniform

    def __str__(self) -> str:
        d, d_v = self.dims
        h, h_kv = self.heads
        names = [self.dtype, f"d{d}" if d == d_v else f"d{d},{d_v}", f"h{h},{h_kv}", self.mask, self.option]
        names += [str(self.lengths), self.storage] + ["deterministic"] * self.deterministic
        return "-".join(names).replace(" ", "_")

    @property
    def tile(self) -> tuple[int, int]:
        """For the interpreter, where a tile costs the same at any size: large ones for long sequences, else small ones."""
        large = self.lengths.queries * self.lengths.keys > 3000
        return (((64, 64), (64, 32), (32, 64)) if large else ((32, 32), (16, 32), (32, 16)))[self.number % 3]

    @property
    def number(self) -> int:
        return zlib.crc32(str(self).encode())

    @property
    def batch(self) -> int:
        """One row, unless something in the case tells rows apart."""
        apart = self.mask in ("documents", "several") or self.option in ("alibi per row", "everything")
        return 2 if apart or self.storage == "expanded batch" else 1


def covering(axes: Mapping[str, Sequence[Hashable]]) -> list[dict[str, Any]]:
    """Rows in which every two values of every two axes meet at least once; the same list every time.

    Greedy: each row begins with a pair that is still missing, and every other axis takes what meets most missing pairs.

    >>> rows = covering({"a": "xy", "b": "xy", "c": "xy"})
    >>> len(rows), len({(row["a"], row["b"]) for row in rows})
    (4, 4)
    """
    draw = random.Random(0)
    names = list(axes)
    missing = {
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(axes[a], axes[b])
    }
    order = sorted(missing, key=lambda pair: sorted(map(repr, pair)))
    draw.shuffle(order)
    rows = []
    for pair in order:
        if pair not in missing:
            continue
        row = dict(pair)
        for name in draw.sample(names, len(names)):
            if name not in row:
                values = draw.sample(axes[name], len(axes[name]))
                met = [sum(frozenset(((name, x), cell)) in missing for cell in row.items()) for x in values]
                row[name] = values[met.index(max(met))]
        missing -= {frozenset(cells) for cells in itertools.combinations(row.items(), 2)}
        rows.append({name: row[name] for name in names})
    return rows


def cases(lengths: Sequence[Lengths]) -> list[Case]:
    axes: dict[str, Sequence[Any]] = {
        "dtype": tuple(DTYPE), "dims": DIMS, "heads": HEADS, "mask": MASKS, "option": OPTIONS,
        "lengths": lengths, "storage": STORAGES, "deterministic": (False, True),
    }  # fmt: skip
    return [Case(**row) for row in covering(axes)]


def _decode() -> list[Case]:
    """Few queries at the end of many keys, as when a model writes; every option, and heads in groups."""
    found = []
    for i, option in enumerate(OPTIONS):
        queries, keys = ((1, 512), (2, 301), (5, 77), (8, 450))[i % 4]
        dtype, dims = tuple(DTYPE)[i % 3], ((64, 64), (16, 16), (192, 128), (80, 80), (40, 40))[i % 5]
        mask = ("causal", "full", "sliding", "documents", "several")[i % 5]
        lengths = Lengths(queries, keys, keys - queries)
        found.append(Case(dtype, dims, ((8, 1), (8, 2))[i % 2], mask, option, lengths, STORAGES[i % 6]))
    return found


DECODE = _decode()


class Problem(NamedTuple):
    """Tensors, laid out as the case says, and the other arguments of ``rf.flash_attention``."""

    case: Case
    at: Lengths
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    sinks: Tensor | None
    arguments: dict[str, Any]

    def seen(self) -> Tensor:
        """The visible cells, bool ``[rows, queries, keys]``: by the definition of the mask, or from its bounds if long."""
        mask, predicates = _masks(self.at)[self.case.mask]
        queries, keys, offset = self.at
        if queries * keys <= 1 << 16:
            return torch.stack([oracle.table(x, *self.at) for x in predicates]).to(self.q.device)
        bounds = [mask.bounds(np.arange(queries) + offset, row) for row in range(len(predicates))]
        lo, hi = (torch.from_numpy(np.stack(x)).to(self.q.device)[..., None] for x in zip(*bounds, strict=True))
        key = torch.arange(keys, device=self.q.device)
        return (lo <= key) & (key < hi)

    def options(self) -> dict[str, Any]:
        """The other arguments, as the oracle calls them."""
        given = self.arguments
        options: dict[str, Any] = {name: given[name] for name in ("scale", "softcap") if name in given}
        queries = torch.arange(self.at.queries, device=self.q.device) + self.at.q_offset
        keys = torch.arange(self.at.keys, device=self.q.device)
        if "alibi_slopes" in given:
            options["bias"] = -given["alibi_slopes"].double()[..., None, None] * (queries[:, None] - keys).abs()
        if "seed" in given:
            batch, heads, _ = self.dlse.shape
            kept = reference.keep_mask(given["seed"], batch, heads, queries, keys, given["dropout_p"])
            options["keep"] = kept.double() / (1 - given["dropout_p"])
        if self.sinks is not None:
            options["sinks"] = self.sinks.double()
        return options


def problem(case: Case, device: str = "cpu") -> Problem:
    """The same numbers for the same case, on any device."""
    (d, d_v), (h, h_kv), batch = case.dims, case.heads, case.batch
    at = case.lengths
    if case.mask == "blind":
        at = Lengths(at.queries, 1 + at.queries // 4, -(at.queries // 2))
    make = torch.Generator().manual_seed(case.number)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(device)

    def stored(*shape: int, amplitude: float = 1.0) -> Tensor:
        return place((amplitude * randn(*shape)).to(DTYPE[case.dtype]), case.storage)

    q = stored(batch, at.queries, h, d, amplitude=case.amplitude)
    k = stored(batch, at.keys, h_kv, d, amplitude=case.amplitude)
    v, dout = stored(batch, at.keys, h_kv, d_v), stored(batch, at.queries, h, d_v)
    arguments: dict[str, Any] = dict(
        mask=_masks(at)[case.mask][0], q_offset=at.q_offset, deterministic=case.deterministic, backend=BACKEND
    )
    everything = case.option == "everything"
    if case.option in ("negative scale", "no scale"):
        arguments["scale"] = -0.8 * d**-0.5 if case.option == "negative scale" else 0.0
    if case.option == "softcap" or everything:
        arguments["softcap"] = 5.0
    if case.option in ("alibi", "alibi per row") or everything:
        steep = 0.3 * min(1.0, 100 / at.keys)  # scores of a thousand would drown in their own rounding
        arguments["alibi_slopes"] = steep * (randn(h, 2)[:, 0] if case.option == "alibi" else randn(h, batch).T)
    if case.option == "dropout" or everything:
        arguments.update(dropout_p=0.3, seed=-(2**40) - 7 if everything else 2**35 + 11)
    sinks = randn(h) if case.option == "sinks" or everything else None
    return Problem(case, at, q, k, v, dout, randn(batch, at.queries, h).transpose(1, 2), sinks, arguments)


def place(x: Tensor, storage: str) -> Tensor:
    """The same numbers, laid out in memory as models lay them out, with NaN in every gap and on both sides."""
    b, s, h, d = x.shape
    shape, order, cut = {
        "contiguous": ((b, s, h, d), (0, 1, 2, 3), (0, 0)),
        "misaligned": ((b, s, h, d), (0, 1, 2, 3), (0, 0)),
        "heads first": ((b, h, s, d), (0, 2, 1, 3), (0, 0)),
        "slice of a projection": ((b, s, 3 * h, d), (0, 1, 2, 3), (h, 0)),
        "slice of head dims": ((b, s, h, d + 24), (0, 1, 2, 3), (0, 8)),
        "expanded batch": ((1, s, h, d), (0, 1, 2, 3), (0, 0)),
    }[storage]
    margin = 512 + (storage == "misaligned")
    whole = torch.full((torch.Size(shape).numel() + 2 * margin,), torch.nan, dtype=x.dtype, device=x.device)
    view = whole[margin:-margin].view(shape).permute(order)[:, :, cut[0] : cut[0] + h, cut[1] : cut[1] + d]
    view.copy_(x[: len(view)])
    return view.expand(x.shape)
