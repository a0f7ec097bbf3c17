"""Packed documents are dealt out evenly, and whoever counts work and keys counts exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash.balance import areas, balance_of, balanced
from ringflash.layout import LAYOUTS, Layout, contiguous, striped, zigzag
from ringflash.mask import Mask, causal, chunks, documents, full, prefix, window

RANKS = st.integers(1, 12)
LENGTHS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 300)), max_size=24)
DISTANCE = st.one_of(st.none(), st.integers(0, 40))


def packed(lengths: list[int]) -> Mask:
    return documents([0, *accumulate(lengths)] if lengths else [0, 0])


@st.composite
def growing(draw: st.DrawFn) -> Mask:
    """A mask whose rows do not shrink along a document."""
    return draw(st.sampled_from([causal, full, prefix(draw(st.integers(0, 400))), window(draw(DISTANCE), 0)]))


@st.composite
def any_mask(draw: st.DrawFn, length: int) -> Mask:
    """Any mixture of terms, with documents for up to three batch rows."""
    mask = window(draw(DISTANCE), draw(DISTANCE))
    for made in (st.integers(0, 50).map(prefix), st.integers(1, 20).map(chunks)):
        mask = mask & draw(st.one_of(st.just(full), made))
    cuts = st.lists(st.integers(0, length), max_size=6).map(lambda cut: [0, *sorted(cut), length])
    return mask & draw(st.one_of(st.just(full), st.lists(cuts, min_size=1, max_size=3).map(documents)))


@st.composite
def any_layout(draw: st.DrawFn, length: int) -> Layout:
    """A named layout, or solid runs in any hands."""
    ranks = draw(RANKS)
    if draw(st.booleans()):
        return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](length, ranks)
    cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=12))})
    runs = [(draw(st.integers(0, ranks - 1)), range(a, b)) for a, b in pairwise(cuts)]
    return Layout(tuple(tuple(run for owner, run in runs if owner == rank) for rank in range(ranks)))


@given(LENGTHS, RANKS, st.integers(0, 40), st.integers(0, 40), st.sampled_from(["causal", "both", "window", "ahead"]))
@settings(max_examples=100)
def test_every_position_is_on_one_rank_and_tokens_are_even(lengths, ranks, left, right, kind):
    """For empty documents, more ranks than tokens, windows to either side: one token apart, and no run to spare."""
    mask = {"causal": causal, "both": full, "window": window(left, right), "ahead": window(None, right)}[kind]
    layout = balanced(sum(lengths), ranks, mask & packed(lengths))
    layout.check()
    assert (layout.ranks, layout.length) == (ranks, sum(lengths))
    tokens = [layout.tokens(rank) for rank in range(ranks)]
    assert max(tokens) - min(tokens) <= 1
    for runs in layout.runs:
        assert all(run.step == 1 for run in runs)
        assert all(a.stop < b.start for a, b in pairwise(runs)), "neighbours are joined"


@given(LENGTHS, RANKS, growing(), st.sampled_from([0.0, 0.05, 0.3]))
@settings(max_examples=150)
def test_no_rank_has_more_than_the_allowed_area_and_one_row(lengths, ranks, mask, slack):
    """Whatever the documents: also when the last ranks get what the first ones left."""
    mask = mask & packed(lengths)
    length = sum(lengths)
    lo, hi = mask.bounds(np.arange(length))
    longest_row = int((hi.clip(0, length) - lo).max(initial=0))
    held = areas(balanced(length, ranks, mask, slack), mask)
    assert held.max() <= (1 + slack) * held.mean() + longest_row


@given(st.data(), st.integers(0, 80), st.integers(-30, 30), st.integers(-10, 30))
@settings(max_examples=150)
def test_areas_are_what_counting_rows_gives(data, length, q_offset, more_keys):
    """Closed forms, for any mask and layout, wherever the queries stand among however many keys."""
    layout, mask = data.draw(any_layout(length)), data.draw(any_mask(length))
    keys = max(0, length + more_keys)
    counted = [
        sum(int((hi.clip(0, keys) - lo.clip(0, keys)).sum()) for lo, hi in bounds)
        for positions in map(layout.positions, range(layout.ranks))
        for bounds in [[mask.bounds(positions + q_offset, row) for row in range(mask.rows)]]
    ]
    assert areas(layout, mask, q_offset, keys).tolist() == counted


@given(st.data(), st.integers(0, 60))
@settings(max_examples=80)
def test_foreign_keys_are_those_seen_and_not_held(data, length):
    """Per rank, a key that several rows or batch rows see counts once, and one that the rank holds does not."""
    layout, mask = data.draw(any_layout(length)), data.draw(any_mask(length))
    columns = np.arange(length)
    found = balance_of(layout, mask)
    for rank in range(layout.ranks):
        mine, needed = layout.positions(rank), np.zeros(length, dtype=bool)
        for row in range(mask.rows):
            lo, hi = mask.bounds(mine, row)
            needed |= ((columns >= lo[:, None]) & (columns < hi[:, None])).any(axis=0)
        needed[mine] = False
        assert found.foreign[rank] == needed.sum()
    assert found.tokens == tuple(map(layout.tokens, range(layout.ranks)))


@pytest.mark.parametrize("mask", [causal, full, window(30, 0)], ids=repr)
@pytest.mark.parametrize(("each", "ranks"), [(1, 4), (3, 5), (7, 2)])
def test_documents_that_fit_stay_whole(mask, each, ranks):
    """Equal ones, several for each rank: nobody needs a key of anybody else."""
    mask = mask & packed([100] * (each * ranks))
    found = balance_of(balanced(100 * each * ranks, ranks, mask), mask)
    assert (found.foreign_keys, found.area_ratio, found.token_ratio) == (0, 1, 1)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_one_document_is_a_zigzag(ranks):
    """Nothing else balances its tokens and its area with as few keys."""
    length = 40 * ranks
    mask = causal & documents([0, length])
    found, other = balance_of(balanced(length, ranks, mask, 0), mask), balance_of(zigzag(length, ranks), mask)
    assert found.areas == other.areas
    assert found.foreign_keys == other.foreign_keys


def test_neighbours_stay_together_where_that_is_even_and_no_dearer():
    """A cut costs a window: two long documents are sliced, five are dealt out so that fewer of them are cut."""
    long, five = window(252, 0) & packed([650, 300]), window(99, 0) & packed([700, 1400, 1200, 1000, 700])
    assert balanced(950, 2, long) == contiguous(950, 2)
    assert balance_of(contiguous(5000, 4), five).area_ratio < 1.05
    assert balance_of(balanced(5000, 4, five), five).foreign_keys < balance_of(contiguous(5000, 4), five).foreign_keys


def heavy_tail(seed: int) -> list[int]:
    """Documents of 2K tokens on average and up to 128K, log-normal, about 500 in 2^20 tokens."""
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(np.log(2048) - 2, 2, 4096).astype(int).clip(1, 1 << 17)
    kept = lengths[: np.searchsorted(lengths.cumsum(), 1 << 20)].tolist()
    return [*kept, (1 << 20) - sum(kept)]


def fewest_foreign_keys(lengths: list[int], ranks: int, slack: float) -> float:
    """What no layout with this balance can undercut.

    The rows of a document from y on have (n^2 - y^2) / 2 cells. Each rank can hold only so many cells and so many rows of
    them, which says how many ranks at least need its keys up to y.
    """
    n = np.array(lengths)
    most, tokens = (1 + slack) * (n * (n + 1) // 2).sum() / ranks, n.sum() / ranks
    needed = 0.0
    for document in lengths:
        y = np.arange(document) + 1
        holders = np.maximum((document**2 - y**2) / 2 / most, (document - y) / (tokens + 1))
        needed += np.ceil(holders).clip(1).sum()
    return needed - n.sum()


@pytest.mark.parametrize("ranks", [8, 16, 32, 64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_heavy_tail_is_balanced_with_few_foreign_keys(seed, ranks):
    """At most 1.05 of the mean area, and within a third of the fewest keys that any such layout fetches.

    Cutting every document over all ranks fetches many times as many. Contiguous slices and a zigzag of the whole sequence
    fetch fewer than the bound, and leave one rank with several times the mean area.
    """
    lengths = heavy_tail(seed)
    mask = causal & packed(lengths)
    found = balance_of(balanced(1 << 20, ranks, mask), mask)
    assert found.token_ratio == 1
    assert found.area_ratio <= 1.05
    everywhere = sum(n * (2 * ranks - r) // (2 * ranks) for n in lengths for r in range(ranks)) - sum(lengths)
    fewest = fewest_foreign_keys(lengths, ranks, 0.05)
    assert fewest <= found.foreign_keys <= min(fewest * 4 / 3, everywhere / 8)
    for plain in (contiguous, zigzag):
        assert balance_of(plain(1 << 20, ranks), mask).area_ratio > 1.5


@pytest.mark.parametrize("seed", [0, 1])
def test_documents_about_as_long_as_a_share_cost_little_more_than_they_must(seed):
    """Where most documents are cut, what is cut off is what costs least: heads of one's own, or nearly whole documents."""
    lengths = np.random.default_rng(seed).integers(3000, 9000, 150).tolist()
    mask = causal & packed(lengths)
    found = balance_of(balanced(sum(lengths), 200, mask), mask)
    assert found.area_ratio <= 1.05
    assert found.foreign_keys <= 2 * fewest_foreign_keys(lengths, 200, 0.05)


def test_less_slack_is_kept_too():
    """The bound is an argument: at 64 ranks a hundredth, or nothing but the rounding to rows."""
    mask = causal & packed(heavy_tail(2))
    assert balance_of(balanced(1 << 20, 64, mask, 0.01), mask).area_ratio <= 1.0101
    assert balance_of(balanced(1 << 20, 64, mask, 0.0), mask).area_ratio <= 1.001


def calls_in(work: Callable[[], object]) -> int:
    """How many functions ``work`` calls, of Python or of C: an effort that is the same on every machine."""
    calls = 0

    def count(frame: object, event: str, called: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    watching = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(watching)
    return calls


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("kind", ["short", "equal", "one long"])
def test_effort_grows_with_the_number_of_documents(kind, ranks):
    """Four times as many documents are about four times the work: a loader packs ten thousand into every batch."""

    def effort(count: int) -> int:
        mean = (1 << 18) // count
        lengths = {
            "short": np.random.default_rng(count).exponential(mean, count).astype(int) + 1,
            "equal": np.full(count, mean),
            "one long": np.append(np.full(count - 1, mean // 2), 1 << 17),
        }[kind]
        mask = causal & packed(lengths.tolist())
        return calls_in(lambda: balanced.__wrapped__(int(lengths.sum()), ranks, mask))

    effort(50)  # what is only done once
    assert effort(2400) <= 5 * effort(600)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (causal, "mask is causal"),
        (documents([[0, 3, 8], [0, 8]]), "2 batch rows"),
        (documents([0, 3, 9]), "cover 9 positions, the sequence has 8"),
    ],
)
def test_masks_that_it_cannot_deal_out_are_refused(mask, said):
    """By the name under which users know it, before any work."""
    with pytest.raises(ValueError, match=f"layout='balanced'.*{said}"):
        balanced(8, 2, mask)
    with pytest.raises(ValueError, match="slack is -1"):
        balanced(8, 2, documents([0, 8]), -1)


def test_a_balance_prints_in_one_line():
    """With what one compares layouts by, also when there is nothing."""
    mask = causal & documents([0, 8, 12])
    assert str(balance_of(zigzag(12, 2), mask)) == (
        "2 ranks: tokens max/mean 1.000, area max/mean 1.348, 4 foreign keys (at most 3 on one rank)"
    )
    assert "area max/mean 1.000, 0 foreign keys" in str(balance_of(striped(0, 3), causal))
    with pytest.raises(ValueError, match="cover 12 positions, the layout has 13"):
        balance_of(zigzag(13, 2), mask)
