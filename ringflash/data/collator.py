"""One packed row out of a list of examples: a ``collate_fn``, or Transformers' ``data_collator``.

examples        a b c d    e f g           length 9, pad token 0
input_ids       a b c d    e f g    0 0
position_ids    0 1 2 3    0 1 2    0 1
labels          - b c d    - f g    - -    not shifted, as Transformers wants them: whoever shifts loses the first of each
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from ringflash.data.documents import whole, wide
from ringflash.data.packing import number
from ringflash.mask import Mask, documents
from ringflash.spread import IGNORED


class PackingCollator:
    """Pack examples into one row of ``length`` tokens: ``input_ids``, ``position_ids`` and ``labels``, int64 ``[1, length]``.

    An example is a mapping with ``input_ids`` (and ``labels``, not shifted, where they are others), or its tokens alone.
    Positions begin anew with each document, which tells Transformers where documents are (outside of ``rf.SequenceParallel``
    and its Trainer it looks only with ``use_cache=False``); the label of a first token is -100, so that nothing is predicted
    across documents. With ``mask`` (such as ``rf.causal``) the result has ``mask`` too,
    narrowed to the documents: any other model in ``rf.SequenceParallel`` needs it.

    ``pad_token`` fills the row: padding is a document of its own, without labels. Without one, room left is an error.
    ``overflow``: more tokens than fit are an ``"error"``, or ``"drop"`` leaves out each example that no longer fits, and counts
    it in ``dropped``.

    >>> PackingCollator(5)([[7, 8, 9], [7, 8]])["labels"]
    tensor([[-100,    8,    9, -100,    8]])
    """

    def __init__(
        self,
        length: int,
        pad_token: int | None = None,
        overflow: Literal["error", "drop"] = "error",
        mask: Mask | None = None,
    ) -> None:
        if overflow not in ("error", "drop"):
            raise ValueError(f"PackingCollator: overflow is {overflow!r}; accepted are 'error' and 'drop'")
        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(f"PackingCollator: mask is {mask!r}; a mask is a value such as rf.causal")
        self.length = number(length, "PackingCollator: length", least=1)
        self.pad_token = None if pad_token is None else number(pad_token, "PackingCollator: pad_token", least=0)
        self.overflow, self.mask = overflow, mask
        self.dropped = 0
        """Number of examples that were left out, in this process."""

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        packed = self._fitting([whole(example, place) for place, example in enumerate(examples)])
        edges = np.cumsum([0, *(len(tokens) for tokens, _ in packed)])
        if edges[-1] < self.length:
            if self.pad_token is None:
                raise ValueError(
                    f"PackingCollator: {len(packed)} examples have {edges[-1]} tokens and a row {self.length}; pass pad_token "
                    "to fill the rest"
                )
            packed.append((np.full(self.length - edges[-1], self.pad_token), np.full(self.length - edges[-1], IGNORED)))
            edges = np.append(edges, self.length)
        input_ids, labels = (np.concatenate([part[i] for part in packed]) for i in (0, 1))
        labels[edges[:-1]] = IGNORED
        positions = np.arange(self.length) - np.repeat(edges[:-1], np.diff(edges))
        rows = {"input_ids": input_ids, "position_ids": positions, "labels": labels}
        batch: dict[str, Any] = {name: torch.from_numpy(row)[None] for name, row in rows.items()}
        return batch if self.mask is None else batch | {"mask": self.mask & documents(edges.tolist())}

    def _fitting(self, examples: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The examples that the row takes, in order."""
        taken, room = [], self.length
        for place, (tokens, labels) in enumerate(examples):
            tokens, labels = (wide(part, f"PackingCollator: example {place}") for part in (tokens, labels))
            if len(tokens) == 0:
                raise ValueError(f"PackingCollator: example {place} is empty; leave empty examples out")
            if len(tokens) <= room:
                taken.append((tokens, labels))
                room -= len(tokens)
            elif self.overflow == "drop":
                self.dropped += 1
            else:
                raise ValueError(
                    f"PackingCollator: example {place} has {len(tokens)} tokens, and the row has room for {room} of "
                    f"{self.length}; pass fewer examples, or overflow='drop' to leave out what does not fit"
                )
        return taken
