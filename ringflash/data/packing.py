"""Which documents go into which row, planned from their lengths alone.

A row has ``length`` positions and holds *pieces* of documents, one after the other. Rows of 8 from documents of 5, 2, 9, 3
and 1 tokens, named a to e:

    fit="cut"     a a a a a b b c    c c c c c c c c    d d d e . . . .     joined, and cut where a row ends
    fit="best"    c c c c c c c c    a a a a a b b c    d d d e . . . .     whole, each where it leaves least room

Rows come in one order, which depends on nothing but the lengths and these choices: not on the number of ranks, and not on
where a run stopped. Nothing is kept but the rows that are still open, so lengths may be a stream.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

Fit = Literal["cut", "best"]
Overflow = Literal["split", "error"]


class Piece(NamedTuple):
    """The tokens ``[start, stop)`` of a document, which are neighbours in one row."""

    document: int
    start: int
    stop: int


Row = tuple[Piece, ...]


def pack(
    lengths: Iterable[int | tuple[int, int]],
    length: int,
    fit: Fit = "cut",
    overflow: Overflow = "split",
    open_rows: int = 16,
) -> Iterator[Row]:
    """Rows of at most ``length`` tokens, in which every token of every document is exactly once.

    ``lengths``: the number of tokens of each document, or pairs (document, tokens), in the order in which they are packed.
    ``fit="cut"`` joins documents and cuts them where a row ends: only the last row has room left. ``fit="best"`` keeps
    documents whole, each in that of ``open_rows`` rows that it fills best; one row packs greedily, in order. A document
    that is longer than a row is ``"split"`` (``overflow``), its first pieces rows of their own, or an ``"error"``.

    >>> [sum(piece.stop - piece.start for piece in row) for row in pack([5, 2, 9, 3, 1], length=8, fit="best")]
    [8, 8, 4]
    """
    _refuse(length, fit, overflow, open_rows)
    documents = _counted(lengths, length, overflow)
    return _cut(documents, length) if fit == "cut" else _best(documents, length, open_rows)


def used(row: Row) -> int:
    """Number of tokens in a row."""
    return sum(piece.stop - piece.start for piece in row)


def offsets(row: Row, length: int) -> list[int]:
    """Where the pieces of a row begin, and the end: ``cu_seqlens`` of the row. Room left at the end is a document.

    >>> offsets((Piece(0, 0, 5), Piece(1, 0, 2)), length=8)
    [0, 5, 7, 8]
    """
    edges = [0]
    for piece in row:
        edges.append(edges[-1] + piece.stop - piece.start)
    return edges if edges[-1] == length else [*edges, length]


def number(value: Any, name: str, least: int) -> int:
    """``value`` as an int, if it is an integer (numpy's are) that is not too small."""
    try:
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; an integer is needed") from None
    if found < least:
        raise ValueError(f"{name} is {found}; a number of {least} or more is needed")
    return found


def _refuse(length: int, fit: str, overflow: str, open_rows: int) -> None:
    number(length, "pack: length", least=1)
    number(open_rows, "pack: open_rows", least=1)
    if fit not in ("cut", "best"):
        raise ValueError(f"pack: fit is {fit!r}; accepted are 'cut' and 'best'")
    if overflow not in ("split", "error"):
        raise ValueError(f"pack: overflow is {overflow!r}; accepted are 'split' and 'error'")


def _counted(lengths: Iterable[int | tuple[int, int]], length: int, overflow: str) -> Iterator[tuple[int, int]]:
    """Pairs of a document and its number of tokens, each of them possible."""
    for place, entry in enumerate(lengths):
        document, tokens = entry if isinstance(entry, tuple) else (place, entry)
        if type(tokens) is not int:
            tokens = number(tokens, f"pack: the length of document {document}", least=0)
        if tokens < 1:
            raise ValueError(f"pack: document {document} has {tokens} tokens; leave empty documents out")
        if tokens > length and overflow == "error":
            raise ValueError(
                f"pack: document {document} has {tokens} tokens and a row {length}; overflow='split' puts it into several "
                "rows, as documents of their own"
            )
        yield document, tokens


def _cut(documents: Iterator[tuple[int, int]], length: int) -> Iterator[Row]:
    row: list[Piece] = []
    room = length
    for document, tokens in documents:
        start = 0
        while start < tokens:
            stop = min(tokens, start + room)
            row.append(Piece(document, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield tuple(row)
                row, room = [], length
    if row:
        yield tuple(row)


def _best(documents: Iterator[tuple[int, int]], length: int, open_rows: int) -> Iterator[Row]:
    rooms: list[tuple[int, int]] = []  # of the open rows, ascending: the room, and the number of the row
    rows: dict[int, list[Piece]] = {}
    opened = 0
    for document, tokens in documents:
        start = tokens // length * length
        for first in range(0, start, length):
            yield (Piece(document, first, first + length),)
        if start == tokens:
            continue
        at = bisect_left(rooms, (tokens - start, 0))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            if len(rooms) == open_rows:
                yield tuple(rows.pop(rooms.pop(0)[1]))  # the fullest
            room, row, opened = length, opened, opened + 1
            rows[row] = []
        rows[row].append(Piece(document, start, tokens))
        room -= tokens - start
        if room == 0:
            yield tuple(rows.pop(row))
        else:
            insort(rooms, (room, row))
    yield from map(tuple, rows.values())
