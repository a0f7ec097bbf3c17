"""Where a call of attention comes in, before anything of it is sent: is it the same on all ranks?

Most calls come again. Then this is one look into a table, in about a microsecond; so what is looked up is a plain tuple, and
the texts that people would compare are only made when somebody has to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ringflash.backend import select
from ringflash.errors import RingflashError
from ringflash.guard import Guard, unfit
from ringflash.recipe import Bound
from ringflash.reference import Scoring

_UNWATCHED = Guard()


def enter(
    name: str,
    bound: Bound,
    tensors: tuple[Tensor, Tensor, Tensor],
    scoring: Scoring,
    sinks: Tensor | None,
    backend: str,
    deterministic: bool,
    more: Mapping[str, Tensor] | None = None,
) -> Guard:
    """The guard of a call of this ``name``, once all ranks are known to make it.

    ``tensors`` are q, k, v. Nothing of the key and the texts depends on how many tokens a rank holds. ``more`` tensors are
    looked at where numbers are. Raises what :meth:`Accord.enter` raises, and :class:`RingflashError` where messages should
    have labels and a CUDA graph is captured.
    """
    watched = bound.watched
    if watched is None:
        return _UNWATCHED
    accord, check, terms = watched
    q, k, v = tensors
    if check.labels and q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RingflashError(
            f"ring_attention: check is '{check}' while a CUDA graph is captured: every replay would send the labels of this "
            "one call, and read none; capture with check='first'"
        )
    batch, _, heads, dim = q.shape
    _, _, kv_heads, value_dim = v.shape
    scale, softcap, dropout_p, slopes = scoring.scale, scoring.softcap, scoring.dropout_p, scoring.alibi_slopes
    if backend == "auto":  # of a captured graph; an eager call has settled it
        backend = select(backend, q, v, scoring).name
    shapes = (name, batch, heads, dim, kv_heads, value_dim, q.dtype, q.is_cuda)
    key = (shapes, scale, softcap, dropout_p, backend, deterministic, sinks is None, slopes is None or slopes.ndim)
    if not check.every_call:
        number = accord.recall(key, terms.digest)
        if number:
            return accord.guard(check, number, name, terms.number)

    def texts() -> dict[str, str]:
        return {
            "dtype": str(q.dtype).removeprefix("torch."),
            "device": q.device.type,
            "batch": str(batch),
            "query heads": str(heads),
            "key heads": str(kv_heads),
            "head_dim": str(dim),
            "head_dim of value": str(value_dim),
            "scale": repr(scale),
            "softcap": repr(softcap),
            "dropout_p": repr(dropout_p),
            "seed": str(scoring.seed) if dropout_p else "",
            "backend": backend,
            "deterministic": str(deterministic),
            "sinks": _spell(sinks, check.numbers),
            "alibi_slopes": _spell(slopes, check.numbers),
        }

    fault = ""
    if check.numbers:
        fault = unfit({"query": q, "key": k, "value": v, **(more or {})})
    number = accord.enter(name, key, terms, texts(), check.every_call, fault)
    return accord.guard(check, number, name, terms.number)


def _spell(tensor: Tensor | None, numbers: bool) -> str:
    """A tensor that all ranks have alike; with its numbers, where they are looked at."""
    if tensor is None:
        return "none"
    text = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if not numbers:
        return text
    content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{text} #{hashlib.blake2b(content, digest_size=4).hexdigest()}"
