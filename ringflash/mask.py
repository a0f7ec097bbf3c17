"""Who may see whom: masks are values with an algebra.

A mask is a *band*: two non-decreasing functions of the query position, and a query at global position ``p`` sees the
keys at global positions ``lo(p) <= k < hi(p)``. Bands are closed under ``&`` (the larger lo, the smaller hi), so causal,
sliding windows, packed documents, prefixes, chunks and every mixture of them are one kind of thing, and whoever knows
``lo`` and ``hi`` needs to know nothing else. For ``causal & window(2, 0) & documents((0, 5, 8))``:

    query 0  █ · · · · · · ·
    query 1  █ █ · · · · · ·
    query 2  █ █ █ · · · · ·
    query 3  · █ █ █ · · · ·
    query 4  · · █ █ █ · · ·
    query 5  · · · · · █ · ·     a new document
    query 6  · · · · · █ █ ·
    query 7  · · · · · █ █ █

A mask is written before any length is known, so it is kept as the few terms that define it, in a canonical form: two
masks that let the same queries see the same keys compare and hash equal, however they were written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from typing import Any

import numpy as np

from ringflash.numbers import FAR, brief, whole


@dataclass(frozen=True, repr=False)
class Mask:
    """A band over global positions. Made by ``full``, ``causal``, ``window`` and friends, and joined with ``&``.

    ``left`` and ``right`` bound the distance to a key (None: unlimited), ``prefix`` is the number of leading keys that
    everybody sees beside their past (None: no such limit), ``chunks`` are the sizes of aligned chunks, ``documents`` the
    offsets of packed documents: no row, one row for every batch row, or one row each.

    >>> causal & causal == causal
    True
    >>> window(None, 0) == causal and hash(window(None, 0)) == hash(causal)
    True
    >>> causal & window(2, 5) & documents([0, 5, 8])
    window(2, 0) & documents((0, 5, 8))
    """

    left: int | None = None
    right: int | None = None
    prefix: int | None = None
    chunks: tuple[int, ...] = ()
    documents: tuple[tuple[int, ...], ...] = ()

    # plain numbers and an array: what a captured graph reads of a mask
    rows: int = field(init=False, compare=False)
    """Number of batch rows that this mask tells apart; 1 if all rows share it."""
    length: int | None = field(init=False, compare=False)
    """Number of positions that the packed documents cover; None without documents, when any length fits."""
    table: np.ndarray = field(init=False, compare=False)
    """All terms as one row of int64, from which :meth:`read` makes the mask again."""

    def __post_init__(self) -> None:
        canonical = _canonical(*_checked(self.left, self.right, self.prefix, self.chunks, self.documents))
        documents = canonical[-1]
        derived = (max(1, len(documents)), documents[0][-1] if documents else None, _write(*canonical))
        for known, value in zip(fields(self), canonical + derived, strict=True):
            object.__setattr__(self, known.name, value)

    def __hash__(self) -> int:
        return self._hash

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(
            left=_least(self.left, other.left),
            right=_least(self.right, other.right),
            prefix=_least(self.prefix, other.prefix),
            chunks=self.chunks + other.chunks,
            documents=_join_documents(self.documents, other.documents),
        )

    @cached_property
    def _hash(self) -> int:  # documents may be thousands of offsets, hashed once
        return hash((self.left, self.right, self.prefix, self.chunks, self.documents))

    def __reduce__(self) -> tuple[Any, ...]:
        return Mask, (self.left, self.right, self.prefix, self.chunks, self.documents)  # a hash is of one process

    @staticmethod
    def read(table: np.ndarray) -> Mask:
        """The mask that wrote ``table``.

        >>> Mask.read((causal & documents([0, 5, 8])).table)
        causal & documents((0, 5, 8))
        """
        return _read(table.tobytes())

    def bounds(self, positions: np.ndarray, row: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """``lo`` and ``hi`` of the queries at ``positions`` (int64, any order) in batch row ``row``.

        Both are non-decreasing in the position, ``0 <= lo <= hi``; ``lo == hi`` where a query sees nothing. A query at
        a negative position stands before the sequence (cross-attention): it is in no document, chunk or prefix.

        >>> [list(map(int, x)) for x in causal.bounds(np.arange(3))]
        [[0, 0, 0], [1, 2, 3]]
        """
        row = self._row(row, "bounds")
        p = np.asarray(positions, dtype=np.int64)
        lo, hi = np.zeros_like(p), np.full_like(p, FAR)
        if self.left is not None:
            lo = np.maximum(lo, p - self.left)
        if self.right is not None:
            hi = np.minimum(hi, p + self.right + 1)
        if self.prefix is not None:
            hi = np.minimum(hi, np.where(p < 0, p + 1, np.maximum(p + 1, self.prefix)))
        for size in self.chunks:
            start = p // size * size
            lo, hi = np.maximum(lo, start), np.minimum(hi, start + size)
        if self.documents:
            offsets = np.asarray(self.documents[row], dtype=np.int64)
            document = np.searchsorted(offsets, p, side="right")  # 0 before the first, len(offsets) after the last
            lo = np.maximum(lo, np.concatenate([offsets[:1], offsets])[document])
            hi = np.minimum(hi, np.concatenate([offsets, offsets[-1:]])[document])
        return lo, np.maximum(lo, hi)

    def seers(self, positions: np.ndarray, row: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """``bounds``, the other way round: the queries ``[lo, hi)`` that see the keys at ``positions`` (0 or more).

        >>> [list(map(int, x)) for x in window(1, 0).seers(np.arange(3))]
        [[0, 1, 2], [2, 3, 4]]
        """
        row = self._row(row, "seers")
        k = np.asarray(positions, dtype=np.int64)
        lo, hi = np.full_like(k, -FAR), np.full_like(k, FAR)
        if self.left is not None:
            hi = np.minimum(hi, k + self.left + 1)
        if self.right is not None:
            lo = np.maximum(lo, k - self.right)
        if self.prefix is not None:
            lo = np.maximum(lo, np.where(k < self.prefix, 0, k))
        for size in self.chunks:
            start = k // size * size
            lo, hi = np.maximum(lo, start), np.minimum(hi, start + size)
        if self.documents:
            offsets = np.asarray(self.documents[row], dtype=np.int64)
            document = np.searchsorted(offsets, k, side="right")
            lo = np.maximum(lo, np.concatenate([offsets[:1], offsets])[document])
            hi = np.minimum(hi, np.concatenate([offsets, offsets[-1:]])[document])
        return lo, np.maximum(lo, hi)

    def draw(self, length: int, keys: int | None = None, *, q_offset: int = 0, row: int = 0) -> str:
        """The mask as text, one line per query: ``█`` a key that is seen, ``·`` one that is not.

        >>> print(window(1, 0).draw(4))
        █ · · ·
        █ █ · ·
        · █ █ ·
        · · █ █
        """
        length = whole(length, "draw: length", least=0)
        columns = np.arange(length if keys is None else whole(keys, "draw: keys", least=0))
        row = self._row(row, "draw")
        lo, hi = self.bounds(np.arange(length) + whole(q_offset, "draw: q_offset"), row)
        seen = (columns >= lo[:, None]) & (columns < hi[:, None])
        return "\n".join(" ".join("█" if cell else "·" for cell in line) for line in seen)

    def _row(self, row: int, caller: str) -> int:
        """Which of ``documents`` are those of this batch row."""
        rows = len(self.documents)
        row = whole(row, f"{caller}: row", 0, FAR if rows < 2 else rows - 1)
        return 0 if rows < 2 else row

    def __repr__(self) -> str:
        terms = []
        if self.left is not None:
            terms.append(f"window({self.left}, {self.right})")
        elif self.right is not None:
            terms.append("causal" if self.right == 0 else f"window(None, {self.right})")
        if self.prefix is not None:
            terms.append(f"prefix({self.prefix})")
        terms += [f"chunks({size})" for size in self.chunks]
        if self.documents:
            terms.append(f"documents({_brief(self.documents)})")
        return " & ".join(terms) or "full"


def window(left: int | None, right: int | None) -> Mask:
    """Sliding window: a query at ``p`` sees the keys from ``p - left`` to ``p + right``, both included.

    None is unlimited (not -1). A window of ``w`` tokens that ends at the query is ``window(w - 1, 0)``.
    """
    return Mask(left=left, right=right)


def prefix(n: int) -> Mask:
    """Prefix-LM: a query sees the first ``n`` keys and everything up to itself. It is causal already."""
    return Mask(prefix=whole(n, "prefix: n", 0, needed=_KEYS))


def chunks(n: int) -> Mask:
    """Chunked-local attention: positions are cut into chunks of ``n``, and a query sees its own chunk only."""
    return Mask(chunks=(n,))


def documents(cu_seqlens: Any) -> Mask:
    """Packed documents: a query sees its own document only.

    ``cu_seqlens`` are the offsets of the documents, from 0 to the length of the sequence, in order; empty documents are
    allowed. One list serves every batch row; a list of lists gives one to each batch row. They are host integers: the
    plan is made on the host, and reading a CUDA tensor would stop the device at every layer.

    >>> documents([0, 3, 3, 8]) == documents((0, 3, 8))
    True
    """
    if getattr(getattr(cu_seqlens, "device", None), "type", "cpu") != "cpu":
        raise TypeError(
            f"documents: cu_seqlens is a tensor on {cu_seqlens.device}; offsets are host integers, because the plan is "
            "made on the host. Keep the list that the loader packed, or copy once per batch with cu_seqlens.tolist()"
        )
    return Mask(documents=_offsets(cu_seqlens))


_UNORDERED = (Set, Mapping, str, bytes, bytearray)  # or not of offsets
_DISTANCE = "a distance is 0 or more, and None means unlimited"
_KEYS = "a number of keys is 0 or more"
_ENDS = "offsets start with 0 and end with the length"
_CHUNK = "a chunk holds at least one position"


def _checked(left: Any, right: Any, prefix: Any, chunks: Any, documents: Any) -> tuple[Any, ...]:
    """The terms of a mask as Python's own numbers, each called as in the function that makes it."""
    left, right = (
        n if n is None else whole(n, f"window: {name}", 0, needed=_DISTANCE)
        for name, n in (("left", left), ("right", right))
    )
    prefix = prefix if prefix is None else whole(prefix, "prefix: n", 0, needed=_KEYS)
    for name, value in (("chunks", chunks), ("documents", documents)):
        if not isinstance(value, tuple):
            raise TypeError(f"Mask: {name} is {brief(value)} of type {type(value).__name__}; a tuple is needed")
    chunks = tuple(whole(n, "chunks: n", 1, needed=_CHUNK) for n in chunks)
    for row in documents:
        _check_offsets(row)
    if len({row[-1] for row in documents}) > 1:
        raise ValueError(
            f"documents: the batch rows end at {sorted({row[-1] for row in documents})}; every row covers the same length"
        )
    return left, right, prefix, chunks, documents


def _offsets(cu_seqlens: Any) -> tuple[tuple[int, ...], ...]:
    """Offsets as they are given, as one row of integers, or one for each batch row."""
    what = "documents: cu_seqlens"
    table = cu_seqlens
    if hasattr(cu_seqlens, "tolist"):
        try:
            table = cu_seqlens.tolist()
        except Exception:  # a tensor that is not dense raises whatever it likes
            table = None
    if not isinstance(table, Iterable) or isinstance(table, _UNORDERED):
        raise TypeError(
            f"{what} is {brief(cu_seqlens)} of type {type(cu_seqlens).__name__}; offsets in an order are needed: a list, a "
            "tuple, an array or a tensor, or one of them for each batch row"
        )
    table = list(table)
    nested = len(table) > 0 and isinstance(table[0], Iterable) and getattr(table[0], "ndim", 1) != 0
    for row in table if nested else ():
        if not isinstance(row, Iterable) or isinstance(row, _UNORDERED):
            raise TypeError(f"{what} has the row {brief(row)}; each row is a list of offsets")
    rows = tuple(tuple(whole(x, what, 0) for x in row) for row in (table if nested else [table]))
    for row in rows:
        if len(row) < 2:  # a mask keeps those of an empty sequence as (0,)
            raise ValueError(f"{what} is {row}; {_ENDS}")
    return rows


def _check_offsets(row: Any) -> None:
    if not isinstance(row, tuple) or not all(type(x) is int for x in row):
        raise TypeError(f"Mask: documents has the row {brief(row)}; a tuple of int is needed: rf.documents makes it")
    if not row or row[0] != 0:
        raise ValueError(f"documents: cu_seqlens is {_shorten(row)}; {_ENDS}")
    if any(b < a for a, b in pairwise(row)):
        raise ValueError(f"documents: cu_seqlens is {_shorten(row)}; offsets must not decrease")
    if row[-1] > FAR:
        raise ValueError(f"documents: cu_seqlens is {_shorten(row)}; positions go up to 2**60")


def _canonical(
    left: int | None,
    right: int | None,
    prefix: int | None,
    chunks: tuple[int, ...],
    documents: tuple[tuple[int, ...], ...],
) -> tuple[Any, ...]:
    """The one way to write these terms: what another term implies is dropped."""
    length = documents[0][-1] if documents else 0
    if documents:  # chunks inside a known length are just more boundaries
        cuts = {c for size in chunks for c in range(0, length, size)}
        documents = tuple(tuple(sorted(cuts.union(row))) for row in documents)
        chunks = ()
    chunks = tuple(sorted(n for n in set(chunks) if not any(n % m == 0 for m in chunks if m < n)))
    if 1 in chunks or (documents and _longest(documents) <= 1):
        left = right = 0  # everybody sees itself alone
    if right == 0:
        prefix = 1  # the past alone
    elif left == 0 and documents:
        prefix = length if prefix is None else min(prefix, length)
    if prefix is not None:
        boundaries = [set(row) for row in documents]
        while prefix > 1 and (
            any((prefix - 1) % n == 0 for n in chunks) or (boundaries and all(prefix - 1 in b for b in boundaries))
        ):
            prefix -= 1  # the last key of the prefix opens a document: only queries behind it see it anyway
        if left == 0:  # nobody looks back, and nobody ahead of the prefix: no boundary behind it matters
            chunks = tuple(n for n in chunks if n < prefix)
            documents = tuple((*(b for b in row if b < min(length, max(prefix, 1))), length) for row in documents)
        if prefix <= 1:
            prefix, right = None, 0
        elif documents and not any(b > prefix and b - a > 1 for row in documents for a, b in pairwise(row)):
            prefix = None  # behind it are only documents of one position
        elif right is not None and prefix <= right + 1:
            right = None
    documents = documents[:1] if len(set(documents)) == 1 else documents
    if chunks or documents:
        longest = chunks[0] if chunks else _longest(documents)
        ahead = _longest(documents, prefix) if documents and prefix is not None else longest
        left = None if left is not None and left >= longest - 1 else left
        right = None if right is not None and right >= ahead - 1 else right
    return left, right, prefix, chunks, documents


def _write(
    left: int | None,
    right: int | None,
    prefix: int | None,
    chunks: tuple[int, ...],
    documents: tuple[tuple[int, ...], ...],
) -> np.ndarray:
    limits = (-1 if n is None else min(n, FAR) for n in (left, right, prefix))
    return np.array([*limits, len(chunks), *chunks, *chain.from_iterable(documents)], dtype=np.int64)


@lru_cache(maxsize=64)  # every layer of a captured graph reads the same one
def _read(table: bytes) -> Mask:
    numbers = np.frombuffer(table, dtype=np.int64).tolist()
    left, right, prefix = (None if n < 0 else n for n in numbers[:3])
    first = 4 + numbers[3]
    chunks, offsets = numbers[4:first], numbers[first:]
    starts = [i for i, offset in enumerate(offsets) if offset == 0]  # a row of documents has its only 0 in front
    documents = tuple(tuple(offsets[a:b]) for a, b in pairwise([*starts, len(offsets)]))
    return Mask(left, right, prefix, tuple(chunks), documents)


def _longest(documents: tuple[tuple[int, ...], ...], before: int = FAR) -> int:
    """The most positions of one document below ``before``."""
    return max([0, *(min(b, before) - a for row in documents for a, b in pairwise(row))])


def _join_documents(a: tuple[tuple[int, ...], ...], b: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    if not a or not b:
        return a or b
    if a[0][-1] != b[0][-1]:
        raise ValueError(f"&: documents of lengths {a[0][-1]} and {b[0][-1]}; both masks must cover the same sequence")
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise ValueError(f"&: documents for {len(a)} and {len(b)} batch rows; give one row, or equally many")
    rows = max(len(a), len(b))
    return tuple(tuple(sorted({*x, *y})) for x, y in zip(a * (rows // len(a)), b * (rows // len(b)), strict=True))


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _brief(rows: tuple[tuple[int, ...], ...]) -> str:
    shown = ", ".join(_shorten(row) for row in rows[:3])
    return shown if len(rows) == 1 else f"[{shown}{', ...' if len(rows) > 3 else ''}]"


def _shorten(row: tuple[int, ...]) -> str:
    return (
        str(row) if len(row) <= 9 else f"({', '.join(map(str, row[:4]))}, ... {len(row) - 1} documents ..., {row[-1]})"
    )


full = Mask()
"""Everybody sees everybody."""

causal = Mask(right=0)
"""A query sees itself and the keys before it."""
