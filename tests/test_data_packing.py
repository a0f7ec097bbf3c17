"""Planning of packed rows: laws that hold for any lengths, and the collator that packs one row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ringflash as rf
from ringflash.data import PackingCollator, Piece, pack
from ringflash.data.packing import offsets, used

LENGTHS = st.lists(st.integers(1, 40), max_size=40)
CHOICES = st.fixed_dictionaries({"fit": st.sampled_from(["cut", "best"]), "open_rows": st.integers(1, 5)})


@given(LENGTHS, st.integers(1, 20), CHOICES)
def test_every_token_is_in_exactly_one_row(lengths: list[int], length: int, choices: dict[str, Any]) -> None:
    """A token lost or trained on twice would never be noticed."""
    rows = list(pack(lengths, length, **choices))
    found = Counter((piece.document, at) for row in rows for piece in row for at in range(piece.start, piece.stop))
    assert found == Counter((document, at) for document, tokens in enumerate(lengths) for at in range(tokens))
    assert all(0 < used(row) <= length for row in rows)
    assert rows == list(pack(iter(lengths), length, **choices))


@given(LENGTHS, st.integers(1, 20))
def test_cutting_leaves_room_in_the_last_row_only(lengths: list[int], length: int) -> None:
    """Without a token for padding, nothing but that row can be left out."""
    assert all(used(row) == length for row in list(pack(lengths, length))[:-1])


@given(LENGTHS, st.integers(1, 20), st.integers(1, 5))
def test_best_fit_keeps_a_document_whole_unless_it_is_longer_than_a_row(
    lengths: list[int], length: int, open_rows: int
) -> None:
    """A longer one begins with full rows, and no document has more than one piece that is not."""
    pieces = [piece for row in pack(lengths, length, "best", open_rows=open_rows) for piece in row]
    for document, tokens in enumerate(lengths):
        sizes = sorted(piece.stop - piece.start for piece in pieces if piece.document == document)
        assert sizes == [rest for rest in [tokens % length] if rest] + [length] * (tokens // length)


@given(LENGTHS, st.integers(1, 20), CHOICES)
def test_rows_come_before_much_else_is_known(lengths: list[int], length: int, choices: dict[str, Any]) -> None:
    """Lengths may be an endless stream: what is neither yielded nor being cut fits into the open rows."""
    taken: list[int] = []

    def stream() -> Iterator[int]:
        for tokens in lengths:
            taken.append(tokens)
            yield tokens

    given_out = 0
    for row in pack(stream(), length, **choices):
        open_rows = 1 if choices["fit"] == "cut" else choices["open_rows"]
        assert sum(taken) - given_out <= open_rows * length + taken[-1]
        given_out += used(row)


def test_more_open_rows_leave_less_room() -> None:
    """What best fit is for: one open row packs greedily."""
    lengths = np.random.RandomState(0).randint(1, 100, 2000).tolist()
    greedy, best = (len(list(pack(lengths, 128, "best", open_rows=rows))) for rows in (1, 16))
    assert best * 128 < 1.04 * sum(lengths) < 1.15 * sum(lengths) < greedy * 128


def test_offsets_are_those_of_the_pieces_and_the_padding() -> None:
    """The documents of the mask: padding is one of them."""
    row = (Piece(3, 0, 4), Piece(7, 10, 12))
    assert offsets(row, 6) == [0, 4, 6] and offsets(row, 9) == [0, 4, 6, 9] and offsets((), 5) == [0, 5]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(lengths=[3, 0], length=4), "document 1 has 0 tokens"),
        (dict(lengths=[3, 5], length=4, overflow="error"), "document 1 has 5 tokens and a row 4"),
        (dict(lengths=np.array([3, -1]), length=4), "length of document 1 is -1"),
        (dict(lengths=[], length=0), "length is 0"),
        (dict(lengths=[], length=4, open_rows=0), "open_rows is 0"),
        (dict(lengths=[], length=4, fit="first"), "accepted are 'cut' and 'best'"),
        (dict(lengths=[], length=4, overflow="truncate"), "accepted are 'split' and 'error'"),
    ],
)
def test_what_cannot_be_packed_is_refused(wrong: dict[str, Any], message: str) -> None:
    """No document is left out or shortened without a word."""
    with pytest.raises(ValueError, match=message):
        list(pack(**wrong))


def test_lengths_that_are_no_integers_are_refused() -> None:
    """2.7 tokens were 2, and the rest of the document was gone."""
    for lengths, length in (([2.7], 4), ([2], 4.0)):
        with pytest.raises(TypeError, match="an integer is needed"):
            list(pack(lengths, length))  # type: ignore[arg-type]
    assert list(pack(torch.tensor([2, 3]), np.int64(8))) == list(pack([2, 3], 8))  # type: ignore[arg-type]


EXAMPLES = [
    {"input_ids": [11, 12, 13], "labels": [11, -100, 13]},
    torch.tensor([21, 22]),
    np.array([31], dtype=np.uint16),
]


def test_a_collated_row_has_positions_and_labels_per_document() -> None:
    """Whoever shifts these labels predicts nothing across documents, and nothing from padding."""
    batch = PackingCollator(8, pad_token=9)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22, 31, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 13, -100, 22, -100, -100, -100]]
    assert all(x.dtype == torch.int64 for x in batch.values())


def test_the_mask_of_a_collated_row_has_its_documents() -> None:
    """What a model that does not read positions needs; in workers of a DataLoader as well."""
    collate = PackingCollator(8, pad_token=9, mask=rf.causal & rf.window(3, 0))
    loader = torch.utils.data.DataLoader(EXAMPLES, batch_size=3, collate_fn=collate)  # type: ignore[arg-type]
    (batch,) = loader
    assert batch["mask"] == rf.causal & rf.window(3, 0) & rf.documents([0, 3, 5, 6, 8])


def test_examples_that_no_longer_fit_are_counted() -> None:
    """Left out only if that was asked for, and then whole; shorter ones behind them still fit."""
    collate = PackingCollator(4, overflow="drop")
    assert collate(EXAMPLES)["input_ids"].tolist() == [[11, 12, 13, 31]] and collate.dropped == 1


@pytest.mark.parametrize(
    ("collate", "examples", "error", "message"),
    [
        (dict(length=8), EXAMPLES, ValueError, "have 6 tokens and a row 8; pass pad_token"),
        (dict(length=4), EXAMPLES, ValueError, "example 1 has 2 tokens, and the row has room for 1 of 4"),
        (dict(length=4, pad_token=0), [[1], []], ValueError, "example 1 is empty"),
        (dict(length=4, pad_token=0), [[1.5]], TypeError, "float64 of shape"),
        (dict(length=4, pad_token=0.7), [[1]], TypeError, "pad_token is 0.7; an integer is needed"),
        (dict(length=4, pad_token=-1), [[1]], ValueError, "pad_token is -1; a number of 0 or more"),
        (dict(length=4, pad_token=0), ["text"], TypeError, "integers in one dimension"),
        (dict(length=4, pad_token=0), [{"text": "a"}], ValueError, "input_ids, its tokens, are needed"),
        (dict(length=4), [{"input_ids": [1, 2], "labels": [1]}], ValueError, "1 labels and 2 tokens"),
        (dict(length=4, overflow="truncate"), [], ValueError, "accepted are 'error' and 'drop'"),
        (dict(length=0), [], ValueError, "length is 0"),
        (dict(length=4, mask="causal"), [], TypeError, "a mask is a value such as rf.causal"),
    ],
)
def test_what_cannot_be_collated_is_refused(
    collate: dict[str, Any], examples: list[Any], error: type[Exception], message: str
) -> None:
    """Nothing is padded, cut or cast unless somebody said so."""
    with pytest.raises(error, match=message):
        PackingCollator(**collate)(examples)
