"""From intervals to kernels: the one place that decides who computes.

A backend is two functions, ``attend`` and ``attend_backward``, and a sentence about what it lacks. ``auto`` takes the
first that lacks nothing; a backend that is asked for by name and lacks something refuses, and names it.

    aten         CPU, float32 inside       PyTorch's own flash attention for CPUs; plain masks, any band
    reference    anywhere, any option      dense, in blocks of queries
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ringflash import aten, reference
from ringflash.reference import Scoring


class Backend(NamedTuple):
    """``attend`` adds to a carry in place; ``attend_backward`` adds to dq in place and returns dk and dv."""

    name: str
    attend: Callable[..., None]
    attend_backward: Callable[..., tuple[Tensor, Tensor]]
    lacks: Callable[[Tensor, Tensor, Scoring], str | None]


def select(name: str, q: Tensor, v: Tensor, scoring: Scoring) -> Backend:
    """The backend called ``name``, or for ``"auto"`` the first that can serve this call.

    Raises ``ValueError`` for an unknown name, and for a backend that lacks what the call asks for.
    """
    if name == "auto":
        return next(b for b in BACKENDS.values() if b.lacks(q, v, scoring) is None)
    if name == "triton":
        raise ValueError("backend='triton' has no kernels in this version; use backend='auto'")
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


BACKENDS = {
    "aten": Backend("aten", aten.attend, aten.attend_backward, _aten_lacks),
    "reference": Backend("reference", reference.attend, reference.attend_backward, lambda q, v, scoring: None),
}
