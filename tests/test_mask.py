"""Masks: bounds say what the definitions say, equal masks are equal values, and `&` is an algebra."""

from __future__ import annotations

import itertools
import operator
from functools import reduce
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ringflash as rf

LENGTH = 12  # of packed documents here
POSITIONS = range(-5, 41)
FEW = range(-2, 14)  # enough to tell apart masks whose parameters are below 6


class Masked(NamedTuple):
    """A mask and, for each batch row that it may tell apart, the predicate of its definition."""

    mask: rf.Mask
    sees: tuple[oracle.Predicate, ...]

    def table(self, queries: int, keys: int | None = None, q_offset: int = 0) -> Tensor:
        """Which keys each query sees: bool ``[rows, queries, keys]``."""
        return torch.stack([oracle.table(sees, queries, keys, q_offset) for sees in self.sees])

    def __and__(self, other: Masked) -> Masked:
        pairs = zip(self.sees, other.sees, strict=True)
        return Masked(self.mask & other.mask, tuple(oracle.both(*pair) for pair in pairs))


def offsets(length: int, most: int = 5) -> st.SearchStrategy[list[int]]:
    """Offsets of packed documents, some of them empty."""
    return st.lists(st.integers(0, length), max_size=most).map(lambda cuts: [0, *sorted(cuts), length])


@st.composite
def terms(draw: st.DrawFn, length: int, rows: int = 1, most: int = 8) -> Masked:
    """One elementary mask, with parameters up to ``most``, for a sequence of this length and so many batch rows."""
    reach = st.none() | st.integers(0, most - 2)
    kind = draw(st.sampled_from(["full", "causal", "window", "prefix", "chunks", "documents"]))
    match kind:
        case "window":
            sides = draw(reach), draw(reach)
            return Masked(rf.window(*sides), (oracle.window(*sides),) * rows)
        case "prefix":
            n = draw(st.integers(0, most))
            return Masked(rf.prefix(n), (oracle.prefix(n),) * rows)
        case "chunks":
            n = draw(st.integers(1, most))
            return Masked(rf.chunks(n), (oracle.chunks(n),) * rows)
        case "documents":
            table = draw(st.lists(offsets(length), min_size=rows, max_size=rows))
            if rows == 1 or draw(st.booleans()):
                return Masked(rf.documents(table[0]), (oracle.documents(table[0]),) * rows)
            return Masked(rf.documents(table), tuple(map(oracle.documents, table)))
    return Masked(getattr(rf, kind), (getattr(oracle, kind)(),) * rows)


def joined(masked: list[Masked]) -> Masked:
    return reduce(operator.and_, masked)


def masks(length: int = LENGTH, rows: int = 1) -> st.SearchStrategy[Masked]:
    """Up to three elementary masks joined with ``&``."""
    return st.lists(terms(length, rows), min_size=1, max_size=3).map(joined)


@st.composite
def spellings(draw: st.DrawFn) -> tuple[Masked, Masked]:
    """Two masks of often the same meaning: one has a term more, which the others may imply."""
    length, rows = draw(st.integers(1, 7)), draw(st.integers(1, 2))
    several = draw(st.lists(terms(length, rows, most=5), min_size=2, max_size=4))
    return joined(several[1:]), joined(several)


def cells(masked: Masked, positions: range) -> list[list[list[bool]]]:
    """What a mask lets through by its definition, for queries at these positions and keys up to their end."""
    return [[[sees(q, k) for k in range(positions.stop)] for q in positions] for sees in masked.sees]


@given(st.integers(1, 2).flatmap(lambda rows: masks(rows=rows)))
@settings(max_examples=150)
def test_bounds_are_the_definition_in_every_cell(masked):
    """Whoever knows lo and hi needs to know nothing else: they must say what the words of each mask say."""
    for row, expected in enumerate(cells(masked, POSITIONS)):
        lo, hi = masked.mask.bounds(np.array(POSITIONS), row if masked.mask.rows > 1 else 0)
        keys = np.arange(POSITIONS.stop)
        assert ((keys >= lo[:, None]) & (keys < hi[:, None])).tolist() == expected


@given(st.integers(1, 2).flatmap(lambda rows: masks(rows=rows)))
def test_bounds_are_a_band(masked):
    """Plans and kernels count on lo and hi that never decrease, lo first, none below zero."""
    for row in range(masked.mask.rows):
        lo, hi = masked.mask.bounds(np.array(POSITIONS), row)
        assert (np.diff(lo) >= 0).all() and (np.diff(hi) >= 0).all()
        assert (lo >= 0).all() and (lo <= hi).all()


def test_bounds_take_positions_in_any_order():
    """A shard's positions are sorted, but nobody has to sort before asking."""
    mask = rf.causal & rf.window(3, 0) & rf.documents((0, 5, 12))
    positions = np.array([7, -2, 0, 11, 7, 30])
    for together, alone in zip(
        mask.bounds(positions), zip(*(mask.bounds(p) for p in positions), strict=True), strict=True
    ):
        assert together.tolist() == [int(x) for x in alone]


@given(spellings())
@settings(max_examples=500)
def test_masks_are_equal_iff_they_let_the_same_cells_through(pair):
    """Plans are cached by mask: two spellings of one must not be planned twice, and two masks never be mixed up."""
    a, b = pair
    assert (a.mask == b.mask) == (cells(a, FEW) == cells(b, FEW)), (a.mask, b.mask)
    if a.mask == b.mask:
        assert hash(a.mask) == hash(b.mask) and repr(a.mask) == repr(b.mask)


def test_every_small_mask_lets_its_cells_through_and_has_one_spelling():
    """Terms imply each other from one exact number on, which random numbers seldom hit: all numbers up to 6 are tried."""

    def table(sees: oracle.Predicate) -> np.ndarray:
        return np.array(cells(Masked(rf.full, (sees,)), FEW)[0])

    sides = [None, *range(7)]
    windows = [(rf.window(a, b), table(oracle.window(a, b))) for a in sides for b in sides]
    prefixes = [(rf.full, table(oracle.full())), *((rf.prefix(n), table(oracle.prefix(n))) for n in range(8))]
    cuts = [(rf.full, table(oracle.full()))]
    cuts += [(rf.chunks(n), table(oracle.chunks(n))) for n in (2, 3, 5)]
    cuts += [
        (rf.documents(row), table(oracle.documents(row))) for row in ((0, 6), (0, 2, 7), (0, 1, 5, 6), (0, 1, 2, 3))
    ]
    known: dict[bytes, rf.Mask] = {}
    keys = np.arange(FEW.stop)
    for (window, a), (prefix, b), (cut, c) in itertools.product(windows, prefixes, cuts):
        mask, seen = window & prefix & cut, a & b & c
        lo, hi = mask.bounds(np.array(FEW))
        assert (((keys >= lo[:, None]) & (keys < hi[:, None])) == seen).all(), (window, prefix, cut)
        assert known.setdefault(seen.tobytes(), mask) == mask, (window, prefix, cut)
    assert len(known) == len({*known.values()})


SPELLINGS = [
    (rf.window(None, 0), rf.causal),
    (rf.window(None, None), rf.full),
    (rf.causal & rf.full, rf.causal),
    (rf.causal & rf.window(4, 7), rf.window(4, 0)),
    (rf.prefix(0), rf.causal),
    (rf.prefix(1), rf.causal),
    (rf.prefix(9) & rf.causal, rf.causal),
    (rf.prefix(5) & rf.prefix(3), rf.prefix(3)),
    (rf.prefix(3) & rf.window(None, 2), rf.prefix(3)),
    (rf.chunks(4) & rf.chunks(8), rf.chunks(4)),
    (rf.chunks(4) & rf.window(3, None), rf.chunks(4)),
    (rf.chunks(1) & rf.prefix(7), rf.chunks(1)),
    (rf.chunks(4) & rf.prefix(5), rf.chunks(4) & rf.prefix(4)),
    (rf.chunks(4) & rf.documents((0, 12)), rf.documents((0, 4, 8, 12))),
    (rf.documents((0, 4, 4, 12)), rf.documents((0, 4, 12))),
    (rf.documents([(0, 4, 12), (0, 4, 12)]), rf.documents((0, 4, 12))),
    (rf.documents((0, 4, 12)) & rf.documents((0, 8, 12)), rf.documents((0, 4, 8, 12))),
    (rf.documents((0, 4, 12)) & rf.window(7, None), rf.documents((0, 4, 12))),
    (rf.documents((0, 5, 12)) & rf.prefix(12), rf.documents((0, 5, 12))),
    (rf.chunks(1), rf.window(0, 0)),
    (rf.chunks(4) & rf.window(0, 0), rf.window(0, 0)),  # who sees itself alone crosses no boundary
    (rf.documents((0, 4, 12)) & rf.window(0, 0), rf.documents(range(13))),
    # the prefix ends where only documents of one token are left: nobody is limited by it
    (rf.documents((0, 5, 6, 7)) & rf.prefix(5), rf.documents((0, 5, 6, 7))),
    # in the long document only two keys are ahead of anybody, and a reach of one covers them
    (rf.documents((0, 2, 8)) & rf.prefix(4) & rf.window(None, 2), rf.documents((0, 2, 8)) & rf.prefix(4)),
]


@pytest.mark.parametrize(("one", "other"), SPELLINGS, ids=lambda m: repr(m))
def test_spellings_of_one_mask_are_one_value(one, other):
    """The cases that the random test above may meet only once in a while."""
    assert one == other
    assert hash(one) == hash(other)


@given(st.tuples(masks(), masks(), masks()))
def test_and_is_associative_commutative_idempotent_with_full_as_identity(three):
    """Masks are joined in any order: by a user, by a layer, by a wrapper."""
    a, b, c = (masked.mask for masked in three)
    assert a & b == b & a
    assert (a & b) & c == a & (b & c)
    assert a & a == a
    assert a & rf.full == a


@given(masks(rows=2))
def test_rows_and_length_say_what_documents_fix(masked):
    """Attention refuses a batch or a length that does not fit, by these two numbers."""
    mask = masked.mask
    assert mask.rows in (1, 2)
    assert mask.length in (None, LENGTH)
    assert (mask.length is None) == (mask.documents == ())
    one, other = cells(masked, POSITIONS)
    assert (mask.rows == 1) == (one == other)


def test_and_with_something_else_is_a_type_error():
    """A boolean tensor is no mask."""
    with pytest.raises(TypeError):
        rf.causal & torch.ones(3, 3, dtype=torch.bool)


def test_masks_cannot_be_changed():
    """They are keys of caches."""
    with pytest.raises(AttributeError):
        rf.causal.right = 3


@pytest.mark.parametrize("give", [list, tuple, torch.tensor, np.array, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_documents_accept_every_host_sequence_of_integers(give):
    """Loaders keep offsets as lists, arrays or CPU tensors."""
    assert rf.documents(give([0, 3, 3, 8])) == rf.documents((0, 3, 8))
    assert rf.documents(give([[0, 3, 8], [0, 5, 8]])).rows == 2


def test_one_row_of_documents_joins_with_many():
    """One list serves every batch row, also when another term has a list for each."""
    joined = rf.documents([0, 4, 8]) & rf.documents([[0, 2, 8], [0, 8]])
    assert joined == rf.documents([[0, 2, 4, 8], [0, 4, 8]])


def test_documents_of_nothing_are_a_mask_of_nothing():
    """An empty sequence has one way to be packed, and it must not fail in a loader's last batch."""
    mask = rf.documents([0, 0])
    assert mask.length == 0
    lo, hi = mask.bounds(np.arange(-2, 3))
    assert (lo == hi).all()


REFUSED = [
    (lambda: rf.window(-1, 0), ValueError, "left is -1.*None means unlimited"),
    (lambda: rf.window(0, -2), ValueError, "right is -2"),
    (lambda: rf.window(1.0, 0), TypeError, r"left is 1\.0 of type float"),
    (lambda: rf.window("3", 0), TypeError, "integer is needed"),
    (lambda: rf.prefix(-1), ValueError, "n is -1"),
    (lambda: rf.prefix(2.5), TypeError, "prefix: n is 2.5"),
    (lambda: rf.chunks(0), ValueError, "at least one position"),
    (lambda: rf.chunks(None), TypeError, "chunks: n is None"),
    (lambda: rf.documents([1, 5]), ValueError, "start with 0"),
    (lambda: rf.documents([]), ValueError, "start with 0"),
    (lambda: rf.documents([0]), ValueError, "end with the length"),
    (lambda: rf.documents([0, 5, 3, 8]), ValueError, "must not decrease"),
    (lambda: rf.documents([[0, 5], [0, 6]]), ValueError, "every row covers the same length"),
    (lambda: rf.documents([0.0, 5.0]), TypeError, "integer is needed"),
    (lambda: rf.documents(torch.tensor([0.0, 5.0])), TypeError, "integer is needed"),
    (lambda: rf.window(2**60 + 1, 0), ValueError, r"None means unlimited; 2\*\*60 is the most"),
    (lambda: rf.window(True, 0), TypeError, "window: left is True of type bool"),
    (lambda: rf.chunks(torch.tensor(True)), TypeError, "chunks: n is tensor"),
    (lambda: rf.prefix(torch.tensor([3])), TypeError, "prefix: n is tensor"),
    (lambda: rf.documents({8, 0, 3}), TypeError, "of type set; offsets in an order are needed"),
    (lambda: rf.documents(b"\x00\x08"), TypeError, "of type bytes; offsets in an order"),
    (lambda: rf.documents(8), TypeError, "documents: cu_seqlens is 8 of type int"),
    (lambda: rf.documents([[0, 8], 3]), TypeError, "documents: cu_seqlens has the row 3"),
    (lambda: rf.documents([False, True]), TypeError, "documents: cu_seqlens is False of type bool"),
    (lambda: rf.documents(torch.tensor([0, 8]).to_sparse()), TypeError, "documents: cu_seqlens is tensor"),
    (lambda: rf.documents([0, 10**30]), ValueError, r"a number from 0 to 2\*\*60"),
    (lambda: rf.Mask(left="x"), TypeError, "window: left is 'x'"),
    (lambda: rf.Mask(chunks=(0,)), ValueError, "chunks: n is 0"),
    (lambda: rf.Mask(documents=3), TypeError, "Mask: documents is 3 of type int"),
    (lambda: rf.Mask(documents=((0, 3.0),)), TypeError, r"Mask: documents has the row \(0, 3.0\)"),
    (lambda: rf.causal.draw("3"), TypeError, "draw: length is '3'"),
    (lambda: rf.documents([[0, 3], [0, 1, 3]]).draw(3, row=2), ValueError, "draw: row is 2; a number from 0 to 1"),
    (lambda: rf.documents([[0, 3], [0, 1, 3]]).bounds([0], row=-1), ValueError, "bounds: row is -1"),
    (lambda: rf.documents([0, 5]) & rf.documents([0, 6]), ValueError, "lengths 5 and 6"),
    (lambda: rf.documents([[0, 5], [0, 1, 5]]) & rf.documents([[0, 2, 5], [0, 3, 5], [0, 5]]), ValueError, "2 and 3"),
]


@pytest.mark.parametrize(("call", "kind", "words"), REFUSED)
def test_what_is_no_mask_is_refused_in_words(call, kind, words):
    """A wrong argument names itself, what came and what is accepted."""
    with pytest.raises(kind, match=words):
        call()


def test_documents_on_a_gpu_are_refused_with_the_reason():
    """Reading a CUDA tensor would stop the device at every layer, so nobody may do it by accident."""
    on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), tolist=lambda: [0, 5])
    with pytest.raises(TypeError, match=r"host integers.*plan is made on the host"):
        rf.documents(on_gpu)


@given(masks(length=8))
def test_a_printed_mask_is_the_code_that_makes_it(masked):
    """What an error or a plan prints can be pasted."""
    names = {name: getattr(rf, name) for name in ("full", "causal", "window", "prefix", "chunks", "documents")}
    assert eval(repr(masked.mask), names) == masked.mask


def test_long_documents_print_short():
    """Thousands of offsets would bury the sentence that quotes them."""
    mask = rf.causal & rf.documents(range(0, 10_001, 10)) & rf.window(5, 0)
    assert repr(mask) == "window(5, 0) & documents((0, 10, 20, 30, ... 1000 documents ..., 10000))"
    assert len(repr(rf.documents([[0, i, 99] for i in range(1, 50)]))) < 100


@given(masks(), st.integers(0, 9), st.integers(0, 9), st.integers(-4, 4))
def test_a_drawing_shows_the_cells(masked, queries, keys, q_offset):
    """The picture is how people check what they wrote."""
    seen = masked.table(queries, keys, q_offset)[0].tolist()
    expected = "\n".join(" ".join("█" if cell else "·" for cell in line) for line in seen)
    assert masked.mask.draw(queries, keys, q_offset=q_offset) == expected


def test_a_drawing_of_one_batch_row():
    """Rows with different documents have different pictures."""
    mask = rf.documents([[0, 1, 3], [0, 2, 3]])
    assert mask.draw(3, row=0) == "█ · ·\n· █ █\n· █ █"
    assert mask.draw(3, row=1) == "█ █ ·\n█ █ ·\n· · █"
