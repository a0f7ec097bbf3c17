"""Where packed documents begin, as Transformers is told it: positions that restart, or ``cu_seq_lens``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringflash.mask import Mask, documents


def documents_of(inputs: dict[str, Any], padding: Tensor | None, mask: Mask, length: int) -> Mask:
    """``mask``, narrowed to the packed documents of the whole ``inputs``; entries that only name them are removed.

    Positions pack documents where no ``attention_mask`` is given, as for Transformers' own attentions.
    """
    offsets = [inputs.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    for name in ("max_length_q", "max_length_k"):
        inputs.pop(name, None)
    positions = inputs.get("position_ids")
    if positions is not None and positions.ndim == 3:  # one row per axis of rotation; those of text come first, if any
        positions = positions[0] if positions.shape[0] == 4 else None
    given = [x for x in offsets if x is not None]
    if given:
        return mask & _from_offsets(given, padding, inputs, length)
    if positions is None or positions.shape[-1] != length:  # another length is refused where it is sharded
        return mask
    positions = positions.reshape(-1, length)
    if padding is not None:
        _refuse_two_meanings(positions, padding)
        return mask
    rows = _from_positions(positions, length)
    return mask if rows is None else mask & documents(rows)


def _from_offsets(given: list[Any], padding: Tensor | None, inputs: dict[str, Any], length: int) -> Mask:
    tables = [torch.as_tensor(x).tolist() for x in {id(x): x for x in given}.values()]
    whole = next(x for name in ("input_ids", "inputs_embeds") if (x := inputs.get(name)) is not None)
    if any(table != tables[0] for table in tables):
        raise ValueError(
            "SequenceParallel: cu_seq_lens_q and cu_seq_lens_k differ; queries and keys are the same documents"
        )
    if whole.shape[0] != 1 or tables[0][-1] != length:
        raise ValueError(
            f"SequenceParallel: cu_seq_lens_q ends at {tables[0][-1]} and the batch is {whole.shape[0]} x {length}; offsets "
            "describe one packed row, from 0 to its length"
        )
    if padding is not None:
        raise ValueError("SequenceParallel: cu_seq_lens_q and attention_mask were given; a packed row has no padding")
    return documents(tables[0])


def _from_positions(positions: Tensor, length: int) -> list[list[int]] | None:
    """Offsets for each row, from one copy to the host; None if nothing restarts."""
    restarts = (torch.diff(positions, dim=-1) != 1).cpu().numpy()
    if not restarts.any():
        return None
    return [[0, *(np.flatnonzero(row) + 1).tolist(), length] for row in restarts]


def _refuse_two_meanings(positions: Tensor, padding: Tensor) -> None:
    """Positions that restart between tokens pack documents for some attentions of Transformers, and not for others."""
    real = padding.to(positions.device) != 0
    inside = (torch.diff(positions, dim=-1) != 1) & real[:, 1:] & real[:, :-1]
    if bool(inside.any()):
        raise ValueError(
            "SequenceParallel: position_ids restart between tokens that attention_mask keeps; for packed documents leave "
            "attention_mask out"
        )


def takes_positions_from_padding(sources: list[str]) -> bool:
    """Does a model count positions over ``attention_mask`` where it is given none (OPT, BioGPT)?"""
    return any("cumsum(attention_mask" in text for text in sources)
