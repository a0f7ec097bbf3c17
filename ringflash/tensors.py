"""What attention can read: tensors whose numbers stand in memory, one after the other, at some stride.

Torch calls many other things tensors: sparse, nested and quantized ones, those of other libraries' layouts, parameters
that do not know their shape yet. They have no shape to check, or fail somewhere in a kernel; so each is refused here, by name.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

_SHAPELESS = (UninitializedParameter, UninitializedBuffer)


def require_dense(x: object, what: str) -> Tensor:
    """``x`` itself, if it is a dense tensor; else ``TypeError``. ``what`` is the caller and the argument.

    >>> require_dense(torch.eye(2).to_sparse(), "shard: x")
    Traceback (most recent call last):
    TypeError: shard: x is a sparse_coo tensor; a dense one is needed
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} is a {type(x).__name__}; a tensor is needed")
    kind = ""
    if type(x) in _SHAPELESS:
        kind = "uninitialized"
    elif x.is_nested:
        kind = "nested"
    elif x.layout != torch.strided:
        kind = str(x.layout).removeprefix("torch.").lstrip("_")
    elif x.is_quantized:
        kind = "quantized"
    if kind:
        raise TypeError(f"{what} is {'an' if kind[0] == 'u' else 'a'} {kind} tensor; a dense one is needed")
    return x
