"""Where documents come from, and how a part of one is read without the rest.

    Documents        lengths, and read(document, start, stop): a part of one document, the others stay where they are
      Tokens         all tokens in one array, such as a memory-mapped file, and the offsets of the documents
      Columns        a Hugging Face dataset: slices of its Arrow table
      Examples       anything with len() and [i]: a whole document per read
    Stream           anything that can only be gone through: a document is kept until the rows that hold it were read

Hugging Face's package is not imported for this: a dataset is known by what it can do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import IterableDataset

from ringflash.data.packing import Row

Part = tuple[np.ndarray, np.ndarray]
"""Tokens ``[n]`` and their labels ``[n]``, not shifted: the label of a token is the token, unless the document has others."""


@runtime_checkable
class Documents(Protocol):
    """Documents that can be read in parts. A class of your own with these two is as good as any here."""

    lengths: Any
    """Number of tokens of each document, integers ``[documents]``."""

    def read(self, document: int, start: int, stop: int) -> Part:
        """Tokens and labels at ``[start, stop)`` of a document, integer arrays."""


class Tokens:
    """Documents in one array of tokens: document i is ``tokens[offsets[i]:offsets[i + 1]]``. Only what is read is loaded.

    ``tokens`` may be a ``np.memmap`` of any integer type. ``labels``: as many, where they are not the tokens themselves
    (-100: no target).

    >>> Tokens(np.arange(8), offsets=[0, 5, 8]).read(1, 0, 2)[0]
    array([5, 6])
    """

    def __init__(self, tokens: Any, offsets: Any, labels: Any = None) -> None:
        tokens = integers(np.asarray(tokens), "Tokens: tokens")
        labels = tokens if labels is None else integers(np.asarray(labels), "Tokens: labels")
        edges = integers(np.asarray(offsets), "Tokens: offsets").astype(np.int64)
        if len(edges) < 1 or edges[0] != 0 or edges[-1] != len(tokens) or (np.diff(edges) < 0).any():
            raise ValueError(
                f"Tokens: offsets has {len(edges)} numbers ({edges[:3]} to {edges[-1:]}); they begin with 0, do not decrease, "
                f"and end with the number of tokens, {len(tokens)}"
            )
        if len(labels) != len(tokens):
            raise ValueError(f"Tokens: there are {len(labels)} labels for {len(tokens)} tokens; each token has one")
        self._tokens, self._labels, self._offsets = tokens, labels, edges
        self.lengths = np.diff(edges)

    def read(self, document: int, start: int, stop: int) -> Part:
        first = int(self._offsets[document])
        return self._tokens[first + start : first + stop], self._labels[first + start : first + stop]


class Examples:
    """Anything with ``len()`` and ``[i]``. To read a part of an example, the whole example is taken from it."""

    def __init__(self, examples: Any, lengths: Any) -> None:
        if lengths is None and not isinstance(examples, list | tuple) and getattr(examples, "ndim", 0) != 2:
            raise TypeError(
                f"documents is a {type(examples).__name__}; only reading all of it would tell how long its documents are: "
                "pass lengths=, their numbers of tokens"
            )
        self._examples = examples
        self.lengths = [len(whole(x, i)[0]) for i, x in enumerate(examples)] if lengths is None else lengths

    def read(self, document: int, start: int, stop: int) -> Part:
        tokens, labels = whole(self._examples[document], document)
        _agree(document, len(tokens), self.lengths)
        return tokens[start:stop], labels[start:stop]


class Columns:
    """A Hugging Face dataset with a column ``input_ids``, and ``labels`` where they are others. Reads slices of its Arrow
    table. Lengths come from the table's offsets, without a look at the tokens; ``lengths``, or a column ``length``, must agree.
    """

    def __init__(self, dataset: Any, lengths: Any) -> None:
        names = dataset.column_names
        if "input_ids" not in names:
            raise ValueError(f"documents has the columns {names}; a column input_ids with the tokens is needed")
        columns = [name for name in ("input_ids", "labels", "attention_mask") if name in names]
        self._labels, self._padded = "labels" in names, "attention_mask" in names
        self._table = dataset.select_columns(columns).with_format("arrow")
        if not len(dataset):
            raise ValueError("documents: there are none")
        for name in columns:
            column = self._table.data.column(name)
            if not hasattr(column.chunk(0), "value_lengths") or "int" not in str(column.type.value_type):
                raise TypeError(
                    f"documents: column {name} is {column.type}; lists of integers are needed: tokenize first"
                )
        if lengths is None and "length" in names:
            lengths = dataset.select_columns(["length"]).with_format("numpy")[:]["length"]
        self.lengths = self._measure("input_ids") if lengths is None else np.asarray(lengths)
        for name in columns if len(self.lengths) == len(dataset) else []:  # on every rank, whatever it will read
            found = self._measure(name)
            for document in np.flatnonzero(found != self.lengths)[:1]:
                _agree(document, found[document], self.lengths, "tokens" if name == "input_ids" else name)

    def read(self, document: int, start: int, stop: int) -> Part:
        row = self._table[document]

        def part(name: str) -> np.ndarray:
            numbers = row.column(name).chunk(0).flatten()
            _agree(document, len(numbers), self.lengths)
            return integers(numbers[start:stop].to_numpy(zero_copy_only=False), f"documents[{document}]: {name}")

        if self._padded:
            _refuse_padding(part("attention_mask"), document)
        tokens = part("input_ids")
        return tokens, part("labels") if self._labels else tokens

    def _measure(self, name: str) -> np.ndarray:
        chunks = self._table.data.column(name).chunks
        counts = [chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False) for chunk in chunks]
        lengths = np.concatenate(counts)
        indices = getattr(self._table, "_indices", None)  # a shuffled dataset has its order beside the table
        return lengths if indices is None else lengths[indices.column(0).to_numpy()]


class Stream:
    """Anything that can be iterated. What was gone through is kept until it is released."""

    def __init__(self, examples: Iterable[Any]) -> None:
        self._examples, self._gone = examples, False
        self._held: dict[int, Part] = {}
        self._left: dict[int, int] = {}
        self.lengths: dict[int, int] = {}
        """Number of tokens of each document that is kept."""

    def go_through(self, epoch: int) -> Iterator[tuple[int, int]]:
        """The stream from its beginning, document by document: its number, and how many tokens it has."""
        self._held, self._left, self.lengths = {}, {}, {}
        if hasattr(self._examples, "set_epoch"):
            self._examples.set_epoch(epoch)
        examples = iter(self._examples)
        if examples is self._examples and self._gone:
            raise ValueError(
                f"documents is a {type(examples).__name__}, which can be gone through once; a second epoch, and going on "
                "within one, need what can be iterated anew, such as an object with __iter__"
            )
        self._gone = True
        for number, example in enumerate(examples):
            self._held[number] = whole(example, number)
            self._left[number] = self.lengths[number] = len(self._held[number][0])
            yield number, self.lengths[number]

    def read(self, document: int, start: int, stop: int) -> Part:
        tokens, labels = self._held[document]
        return tokens[start:stop], labels[start:stop]

    def release(self, row: Row) -> None:
        """Nobody will read this row any more. A document stays while any token of it may be read."""
        for document, start, stop in row:
            self._left[document] -= stop - start
            if not self._left[document]:
                del self._held[document], self._left[document], self.lengths[document]


Source = Documents | Stream


def find(documents: Any, lengths: Any = None) -> Source:
    """What ``documents`` is, with its lengths checked. See :class:`ringflash.data.PackedLoader` for what is accepted."""
    if isinstance(documents, Mapping | str | bytes):
        kind = f"a mapping with {sorted(documents)}" if isinstance(documents, Mapping) else type(documents).__name__
        raise TypeError(f"documents is {kind}; pass many documents: a list, a split of a dataset, or anything iterable")
    if getattr(documents, "ndim", 2) == 1:
        raise TypeError("documents is one array; rf.data.Tokens(tokens, offsets) says where the documents in it begin")
    only_iterable = isinstance(documents, IterableDataset)  # which inherits a [i] that does not work
    found: Documents
    if isinstance(documents, Documents):
        if lengths is not None:
            raise ValueError("lengths was given, and documents has lengths of its own; pass one of them")
        found = documents
    elif hasattr(documents, "__len__") and hasattr(documents, "__getitem__") and not only_iterable:
        dataset = hasattr(documents, "with_format") and hasattr(documents, "select_columns")
        found = Columns(documents, lengths) if dataset else Examples(documents, lengths)
    elif hasattr(documents, "__iter__"):
        if lengths is not None:
            raise ValueError("lengths was given, and documents can only be iterated; it tells its lengths itself")
        return Stream(documents)
    else:
        raise TypeError(
            f"documents is of type {type(documents).__name__}; pass a list, a dataset, or anything iterable"
        )
    counts = integers(np.asarray(found.lengths), "documents: lengths")
    if hasattr(documents, "__len__") and len(counts) != len(documents):
        raise ValueError(f"lengths has {len(counts)} numbers, and there are {len(documents)} documents")
    if len(counts) == 0 or counts.min() < 1:
        at = int(counts.argmin()) if len(counts) else 0
        raise ValueError(
            f"documents[{at}] is empty; leave empty documents out" if len(counts) else "documents: there are none"
        )
    return found


def whole(example: Any, number: int) -> Part:
    """Tokens and labels of one example: a mapping with ``input_ids``, or the tokens alone."""
    if not isinstance(example, Mapping):
        tokens = integers(np.asarray(example), f"documents[{number}]")
        return tokens, tokens
    if "input_ids" not in example:
        raise ValueError(f"documents[{number}] has {sorted(example)}; input_ids, its tokens, are needed")
    tokens = integers(np.asarray(example["input_ids"]), f"documents[{number}]: input_ids")
    if example.get("attention_mask") is not None:
        _refuse_padding(np.asarray(example["attention_mask"]), number)
    if example.get("labels") is None:
        return tokens, tokens
    labels = integers(np.asarray(example["labels"]), f"documents[{number}]: labels")
    if len(labels) != len(tokens):
        raise ValueError(
            f"documents[{number}] has {len(labels)} labels and {len(tokens)} tokens; each token has a label"
        )
    return tokens, labels


def integers(array: Any, name: str) -> np.ndarray:
    """``array`` itself, if it holds integers in one dimension."""
    if array.ndim == 1 and len(array) == 0:
        return np.zeros(0, np.int64)  # an empty list has no type
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"{name} is {array.dtype} of shape {array.shape}; integers in one dimension are needed")
    found: np.ndarray = array
    return found


def wide(array: Any, name: str) -> np.ndarray:
    """``array`` as int64, if it holds integers in one dimension that fit."""
    found = integers(np.asarray(array), name)
    if found.dtype == np.uint64 and len(found) and found.max() > np.iinfo(np.int64).max:
        raise ValueError(
            f"{name} is uint64 and has {found.max()}; tokens and labels are int64, and it would become negative"
        )
    return found.astype(np.int64, copy=False)


def _agree(document: int, count: int, lengths: Any, name: str = "tokens") -> None:
    if count != lengths[document]:
        raise ValueError(f"documents[{document}] has {count} {name}, and {lengths[document]} by its length")


def _refuse_padding(attention_mask: np.ndarray, number: int) -> None:
    if not attention_mask.all():
        raise ValueError(
            f"documents[{number}] is padded, by its attention_mask; tokenize without padding: rows are packed"
        )
