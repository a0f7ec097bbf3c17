"""What travels in one message: several tensors in one contiguous buffer, and a label at its head where ranks check them.

Tensors start on 64-byte boundaries, where fresh ones would: kernels give other bits for other alignments, and every wire
must give the same. A label is 64 bytes, and moves none of them (``guard.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes
LABEL = _ALIGNMENT
"""Bytes of a label."""


@dataclass(frozen=True)
class Parcel:
    """One contiguous buffer (uint8), and the tensors that are views of it."""

    buffer: Tensor
    tensors: tuple[Tensor, ...]
    head: int = 0
    """Bytes of the buffer that are its label."""

    @property
    def label(self) -> Tensor:
        """int64 ``[head / 8]``, a view."""
        return self.buffer[: self.head].view(torch.int64)

    @property
    def payload(self) -> Tensor:
        """The buffer without its label."""
        return self.buffer[self.head :]

    @classmethod
    def blank(
        cls, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], device: torch.device, label: int = 0
    ) -> Parcel:
        """An unwritten parcel for tensors of such shapes and dtypes; ``label`` bytes at its head, if anything follows."""
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        starts = [label if any(sizes) else 0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        buffer = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        spans = zip(starts, sizes, dtypes, shapes, strict=False)
        tensors = tuple(buffer[at : at + n].view(dtype).view(*shape) for at, n, dtype, shape in spans)
        return cls(buffer, tensors, starts[0])


@dataclass(frozen=True)
class Freight:
    """For each tensor ``[batch, tokens, ...]`` its shape (tokens differ from message to message, written 0) and dtype."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    label: int = 0
    """Bytes at the head of each message."""

    @classmethod
    def like(cls, tensors: Sequence[Tensor], dtype: torch.dtype | None = None, label: int = 0) -> Freight:
        """The freight that carries such tensors, or their gradients in another ``dtype``."""
        shapes = tuple((x.shape[0], 0, *x.shape[2:]) for x in tensors)
        return cls(shapes, tuple(dtype or x.dtype for x in tensors), tensors[0].device, label)

    def blank(self, tokens: int) -> Parcel:
        """An unwritten parcel for so many tokens."""
        shapes = [(batch, tokens, *rest) for batch, _, *rest in self.shapes]
        return Parcel.blank(shapes, self.dtypes, self.device, self.label)

    def zeros(self, tokens: int) -> Parcel:
        """The parcel of so many tokens to which nobody has added."""
        parcel = self.blank(tokens)
        parcel.buffer.zero_()
        return parcel

    def pack(self, tensors: Sequence[Tensor]) -> Parcel:
        """A parcel that holds a copy of ``tensors``, cast to the dtypes of this freight."""
        parcel = self.blank(tensors[0].shape[1])
        for inside, tensor in zip(parcel.tensors, tensors, strict=True):
            inside.copy_(tensor)
        return parcel
