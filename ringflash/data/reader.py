"""This rank's tokens of packed rows: what is read, and nothing else.

A layout gives a rank some positions of a row, the row says which document each position belongs to. Neighbouring positions
of one document are one read, and one token more is read where the target of the last of them is another rank's:

    row            a a a a a b b b b b b c c c        pieces of documents a, b and c
    this rank            3 4 5 6 7                    reads a[3:5] and b[0:4]: b[3] is the target of b[2]
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ringflash.data.documents import Source, wide
from ringflash.data.packing import Row, offsets
from ringflash.layout import Layout
from ringflash.mask import Mask, documents
from ringflash.shard import Sharding
from ringflash.spread import IGNORED

Parts = tuple[Tensor, Tensor, Tensor]
"""``input_ids``, ``position_ids`` and ``shift_labels``, int64 ``[rows, local_length]``."""


@dataclass(frozen=True)
class Reader:
    """Reads its part of rows, as rank ``where[0]`` of ``where[1]``. Knows no process group, so it can work in any process."""

    source: Source
    length: int
    pad_token: int
    where: tuple[int, int]
    mask: Mask
    layout: str | Layout
    heads_degree: int

    def __getitem__(self, rows: tuple[Row, ...]) -> Parts:
        mask = narrowed(self.mask, rows, self.length)
        s = Sharding(self.length, self.where, mask, self.layout, "ring", heads_axis=self.heads_degree)
        parts = [self._part(row, s.positions.numpy()) for row in rows]
        input_ids, position_ids, labels = (torch.from_numpy(np.stack(each)) for each in zip(*parts, strict=True))
        return input_ids, position_ids, labels

    def _part(self, row: Row, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        edges = np.array(offsets(row, self.length))
        piece = np.searchsorted(edges, positions, side="right") - 1
        position_ids = positions - edges[piece]
        input_ids, labels = np.full(len(positions), self.pad_token), np.full(len(positions), IGNORED)
        # stripes are read over, wider gaps are not
        cuts = np.flatnonzero((np.diff(piece) != 0) | (np.diff(positions) > self.where[1])) + 1
        for a, b in pairwise([0, *cuts.tolist(), len(positions)]):
            if a < b and piece[a] < len(row):  # behind the pieces there is padding
                document, start, _ = row[piece[a]]
                input_ids[a:b], labels[a:b] = self._read(document, start + position_ids[a:b])
        return input_ids, position_ids, labels

    def _read(self, document: int, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a document at ``at`` (ascending), and the labels of the tokens that follow each."""
        end = int(self.source.lengths[document])
        first, past = int(at[0]), min(int(at[-1]) + 2, end)
        tokens, labels = (wide(part, f"documents[{document}]") for part in self.source.read(document, first, past))
        if len(tokens) != past - first or len(labels) != past - first:
            raise ValueError(
                f"documents: {past - first} tokens of document {document} are at {first} to {past}, by its length {end}; "
                f"{len(tokens)} tokens and {len(labels)} labels came"
            )
        targets = np.full(len(at), IGNORED)
        followed = at + 1 < end
        targets[followed] = labels[at[followed] + 1 - first]
        return tokens[at - first], targets


def narrowed(mask: Mask, rows: tuple[Row, ...], length: int) -> Mask:
    """``mask`` within the pieces of each row."""
    return mask & documents([offsets(row, length) for row in rows])
