"""From intervals to kernels: the one place that decides who computes.

A backend is three functions and a sentence about what it lacks. ``auto`` takes the first for the device that lacks nothing;
a backend that is asked for by name and lacks something refuses, and names it.

    triton       CUDA (a CPU only in Triton's interpreter)    ringflash_kernels: every option, float32 inside
    aten         CPU, float32 inside                          PyTorch's own flash attention for CPUs; plain masks, any band
    reference    anywhere, any option                         dense, in blocks of queries
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringflash import aten, reference
from ringflash.partial import Partial
from ringflash.reference import Scoring

_WIDEST = 256  # head dim of the Triton kernels


class Backend(NamedTuple):
    """Three functions, with the signatures and promises of those in ``ringflash.reference``.

    ``attend`` returns the sum of a carry and attention over more keys; ``attend_backward`` returns dq, added to a carry, with
    dk and dv; ``delta`` is what ds subtracts from dp. Carries are consumed.
    """

    name: str
    attend: Callable[..., Partial]
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    delta: Callable[[Tensor, Tensor, Tensor], Tensor]
    lacks: Callable[[Tensor, Tensor, Scoring], str | None]


def select(name: str, q: Tensor, v: Tensor, scoring: Scoring) -> Backend:
    """The backend called ``name``, or for ``"auto"`` the first that can serve this call.

    Raises ``ValueError`` for an unknown name, and for a backend that lacks what the call asks for.
    """
    if name == "auto":
        preferred = "triton" if q.device.type == "cuda" else "aten"
        return next(b for b in (BACKENDS[preferred], BACKENDS["reference"]) if b.lacks(q, v, scoring) is None)
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; accepted are 'auto', {', '.join(map(repr, BACKENDS))}")
    lack = BACKENDS[name].lacks(q, v, scoring)
    if lack is not None:
        raise ValueError(f"backend={name!r} {lack}; use backend='auto'")
    return BACKENDS[name]


def _aten_lacks(q: Tensor, v: Tensor, scoring: Scoring) -> str | None:
    if q.device.type != "cpu":
        return f"computes on a CPU, and query is on {q.device}"
    if q.shape[-1] != v.shape[-1]:
        return f"needs one head_dim, and query has {q.shape[-1]}, value {v.shape[-1]}"
    options = {
        "softcap": scoring.softcap,
        "alibi_slopes": scoring.alibi_slopes is not None,
        "dropout_p": scoring.dropout_p,
    }
    return next((f"has no {name}" for name, used in options.items() if used), None)


def _triton_lacks(q: Tensor, v: Tensor, scoring: Scoring) -> str | None:
    if q.device.type not in ("cuda", "cpu"):
        return f"computes on a CUDA device, and query is on {q.device}"
    missing = _kernels_missing(q.device)
    if missing:
        return missing
    if q.dtype == torch.float64:
        return "computes in float32, and query is float64"
    widest = max(q.shape[-1], v.shape[-1])
    return f"has head dims up to {_WIDEST}, and this one is {widest}" if widest > _WIDEST else None


@lru_cache(maxsize=64)
def _kernels_missing(device: torch.device) -> str:
    """What keeps the kernels from running on this device; empty if nothing does."""
    try:
        kernels = importlib.import_module("ringflash_kernels")
    except ModuleNotFoundError:
        return "needs ringflash_kernels, which is not installed"
    why_not: str = kernels.why_not(device)
    return f"cannot run: {why_not}" if why_not else ""


def _kernel(module: str, name: str) -> Callable[..., Any]:
    """A function of ``ringflash_kernels``, imported with Triton when it is first called, run on the device of its tensors."""

    def call(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):  # Triton launches on the current device
            return getattr(importlib.import_module(f"ringflash_kernels.{module}"), name)(first, *rest)

    return call


_forward = _kernel("forward", "attend")

BACKENDS = {
    "triton": Backend(
        "triton",
        lambda *args: Partial(*_forward(*args)),
        _kernel("backward", "attend_backward"),
        _kernel("delta", "delta"),
        _triton_lacks,
    ),
    "aten": Backend("aten", aten.attend, aten.attend_backward, reference.delta, _aten_lacks),
    "reference": Backend(
        "reference", reference.attend, reference.attend_backward, reference.delta, lambda q, v, scoring: None
    ),
}
