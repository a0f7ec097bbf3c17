"""Arguments as flash-attn spells them, read into ours.

    causal, window_size=(l, r)                   a mask             -1 is no limit there, None here
    cu_seqlens                                   host integers      copied once per tensor, not once per call
    func(q, k, v, ...)                           func(q, kv, ...)   and func(qkv, ...): a packed variant is derived, not written

What cannot be honoured raises here, before anything is computed or sent, with the name of the argument.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ringflash.mask import Mask, causal, documents, full, window

Function = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """The options of one call of ``caller``, under the names that flash-attn gives them."""

    caller: str
    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: Sequence[int]
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool
    softcap: float = 0.0

    def __post_init__(self) -> None:
        limits = self.window_size
        if not isinstance(limits, tuple | list) or len(limits) != 2 or not all(_is_limit(x) for x in limits):
            raise ValueError(
                f"{self.caller}: window_size is {limits!r}; a pair (left, right) of distances is needed, -1 for no limit"
            )
        if not (self.alibi_slopes is None or isinstance(self.alibi_slopes, Tensor)):
            raise ValueError(f"{self.caller}: alibi_slopes is {self.alibi_slopes!r}; a tensor is needed")
        if self.return_attn_probs and self.dropout_p:
            raise ValueError(
                f"{self.caller}: return_attn_probs with dropout_p {self.dropout_p} asks for the pattern of dropout "
                "as a matrix, which is not made; without dropout the answer is (out, lse, None)"
            )

    def mask(self, cu_seqlens: tuple[int, ...] | None = None) -> Mask:
        """Who sees whom; with offsets of documents, inside each document only."""
        captured = torch.compiler.is_compiling()  # which warns of caches, and needs none
        make = _mask.__wrapped__ if captured else _mask
        return make(bool(self.causal), *self.window_size, cu_seqlens)

    def options(self, seed: int | Tensor | None) -> dict[str, Any]:
        """What ``rf.flash_attention`` and ``rf.ring_attention`` are to be told."""
        return dict(
            scale=self.softmax_scale,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            dropout_p=self.dropout_p,
            seed=seed,
            deterministic=bool(self.deterministic),
        )

    def answer(self, out: Tensor, lse: Tensor) -> Any:
        """``out``, or ``(out, lse, None)`` if that was asked for."""
        return (out, lse, None) if self.return_attn_probs else out


def check_ndim(caller: str, ndim: int, shape: str, **named: Tensor) -> None:
    """Raise unless every tensor has so many dimensions."""
    for name, x in named.items():
        if not isinstance(x, Tensor) or x.ndim != ndim:
            came = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
            raise ValueError(f"{caller}: {name} {came}; {shape} is needed")


def read_offsets(caller: str, name: str, cu_seqlens: Tensor | Sequence[int], total: int) -> tuple[int, ...]:
    """The offsets of packed documents as host integers, from 0 to ``total`` tokens.

    A tensor on a device is copied to the host when it is first seen, and again after autograd counted a write to it: once per
    batch if all layers get the same tensor. ``torch.distributed``, ``.data`` and kernels of one's own write uncounted: after
    them, pass another tensor (a view, ``x[:]``, is one). Host integers (a list, a CPU tensor) cost nothing.
    """
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{caller}: {name} is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; offsets are int32 [documents + 1]"
            )
        offsets = tuple(to_host(cu_seqlens))
    elif isinstance(cu_seqlens, list | tuple):
        offsets = tuple(map(operator.index, cu_seqlens))
    else:
        raise TypeError(f"{caller}: {name} is {cu_seqlens!r}; a tensor of offsets is needed, or a list of integers")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != total or any(b < a for a, b in pairwise(offsets)):
        shown = str(list(offsets)) if len(offsets) < 10 else f"{list(offsets[:4])} ... {offsets[-1]}"
        raise ValueError(f"{caller}: {name} is {shown}; offsets rise from 0 to the number of tokens, here {total}")
    return offsets


def check_longest(caller: str, name: str, max_seqlen: int | Tensor, longest: int) -> None:
    """Raise if the longest document is longer than the caller says. Nothing else depends on ``max_seqlen``."""
    most = to_host(max_seqlen) if isinstance(max_seqlen, Tensor) else max_seqlen
    if not hasattr(most, "__index__"):
        raise TypeError(f"{caller}: {name} is {most!r}; an integer is needed")
    if most < longest:
        raise ValueError(f"{caller}: {name} is {most}, and the longest document has {longest} tokens")


def longest_of(offsets: Sequence[int]) -> int:
    """Tokens of the longest document."""
    return max(b - a for a, b in pairwise(offsets))


def to_host(x: Tensor) -> Any:
    """``x.tolist()``, without waiting for a device that was asked before."""
    if x.device.type == "cpu" or x.is_inference():  # a CPU tensor costs nothing to read; inference keeps no count
        return x.tolist()
    return copied_once(x)


def copied_once(x: Tensor) -> Any:
    """``x.tolist()``, kept as long as ``x`` lives and autograd's count says that nobody has written to it."""
    known = _copies.get(x)
    if known is None or known[0] != x._version:
        known = _copies[x] = (x._version, x.tolist())
    return known[1]


_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def kvpacked(function: Function, without: str = "") -> Function:
    """``f(q, kv, ...)`` for a ``function(q, k, v, ...)``; kv is ``[..., 2, heads, head_dim]``.

    ``without``: a parameter that the packed variant does not have.
    """

    def packed(q: Tensor, kv: Tensor, *rest: Any, **options: Any) -> Any:
        k, v = _unstack(packed.__name__, "kv", kv)
        return function(q, k, v, *rest, **options)

    return _named(packed, function, ("q", "kv"), without)


def qkvpacked(function: Function, without: str = "") -> Function:
    """``f(qkv, ...)`` for a ``function(q, k, v, ...)``; qkv is ``[..., 3, heads, head_dim]``. Otherwise as :func:`kvpacked`."""

    def packed(qkv: Tensor, *rest: Any, **options: Any) -> Any:
        q, k, v = _unstack(packed.__name__, "qkv", qkv)
        return function(q, k, v, *rest, **options)

    return _named(packed, function, ("qkv",), without)


def christen(function: Function, name: str, doc: str) -> Function:
    """``function``, known to the user and to ``pickle`` as ``name``."""
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


def _named(packed: Function, function: Function, tensors: tuple[str, ...], without: str) -> Function:
    """``packed`` under the name and the signature that its packing gives to ``function``."""
    stacked = tensors[-1]
    packed.__module__ = function.__module__
    rest = [p for p in list(inspect.signature(function).parameters.values())[3:] if p.name != without]
    first = [inspect.Parameter(x, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Tensor") for x in tensors]
    packed.__signature__ = inspect.Signature([*first, *rest])  # type: ignore[attr-defined]
    name = function.__name__.replace("_func", f"_{stacked}packed_func")
    return christen(
        packed, name, f":func:`{function.__name__}` of ``{stacked} [..., {len(stacked)}, heads, head_dim]``."
    )


def _unstack(caller: str, name: str, stacked: Tensor) -> tuple[Tensor, ...]:
    """The tensors that the letters of ``name`` stand for."""
    if not isinstance(stacked, Tensor) or stacked.ndim < 4 or stacked.shape[-3] != len(name):
        came = f"has shape {tuple(stacked.shape)}" if isinstance(stacked, Tensor) else f"is a {type(stacked).__name__}"
        raise ValueError(f"{caller}: {name} {came}; [..., {len(name)}, heads, head_dim] is needed")
    return stacked.unbind(-3)


def _is_limit(value: object) -> bool:
    return isinstance(value, int) and value >= -1


@lru_cache(maxsize=64)
def _mask(looks_back_only: bool, left: int, right: int, cu_seqlens: tuple[int, ...] | None) -> Mask:
    band = window(None if left < 0 else left, None if right < 0 else right)
    band &= causal if looks_back_only else full
    return band if cu_seqlens is None else band & documents(cu_seqlens)
