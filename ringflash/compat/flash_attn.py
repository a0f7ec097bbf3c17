"""flash-attn's functions (version 2) on one device, on any device: ``from ringflash.compat.flash_attn import flash_attn_func``.

    [b, s, h, d]       flash_attn_func          flash_attn_kvpacked_func          flash_attn_qkvpacked_func
    [total, h, d]      flash_attn_varlen_func   flash_attn_varlen_kvpacked_func   flash_attn_varlen_qkvpacked_func

Causal masks, windows and ALiBi count from the *ends* if queries and keys are of different number, as flash-attn does from 2.1.
Where this is more than flash-attn: any dtype that ``rf.flash_attention`` takes, a CPU, a value head_dim of its own, softcap
together with dropout, and an lse that is differentiable. A row that sees no key gives out 0 and lse -inf (there: +inf).

``dropout_p`` draws its seed from torch's default generator on the CPU, so ``torch.manual_seed`` repeats it, and so does a
checkpoint that preserves the state of random numbers. Other weights fall than flash-attn's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ringflash.attention import flash_attention
from ringflash.compat.arguments import Call, check_longest, check_ndim, kvpacked, longest_of, qkvpacked, read_offsets

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

Offsets = tuple[int, ...]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of ``q [b, s_q, h, d]`` over ``k, v [b, s_k, h_kv, d]``; ``out``, or ``(out, lse, None)`` if asked for.

    ``lse [b, h, s_q]`` is float32 (float64 for float64). A query at i stands at key ``i + s_k - s_q``: it sees
    ``window_size = (left, right)`` keys before and behind that, -1 for all, and with ``causal`` none behind.

    >>> q = k = v = torch.ones(1, 4, 2, 8)
    >>> out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 4, 2, 8]), torch.Size([1, 2, 4]))
    """
    given = (dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, softcap)
    call = Call("flash_attn_func", *given)
    check_ndim(call.caller, 4, "[batch, seq, heads, head_dim]", q=q, k=k, v=v)
    return call.answer(*_attend(call, q, k, v))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: None = None,
) -> Any:
    """Packed documents: ``q [total_q, h, d]``, ``k, v [total_k, h_kv, d]``; ``out``, or ``(out, lse [h, total_q], None)``.

    ``cu_seqlens`` are offsets from 0 to the total. They are needed on the host: a CUDA tensor is copied once, and again after
    autograd counted a write to it (torch.distributed's are not: pass another tensor); a list of integers is as good, and
    copies nothing. Documents with as many queries as keys run in one call. Others, and ``alibi_slopes`` for each document,
    run document by document. ``max_seqlen`` is checked against the documents.

    Raises ``ValueError`` for ``block_table``: there is no paged cache.
    """
    given = (dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, softcap)
    call = Call("flash_attn_varlen_func", *given)
    if block_table is not None:
        raise ValueError(f"{call.caller}: block_table is given, and there is no paged cache; gather the keys first")
    check_ndim(call.caller, 3, "[total, heads, head_dim]", q=q, k=k, v=v)
    queries = read_offsets(call.caller, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    keys = read_offsets(call.caller, "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    check_longest(call.caller, "max_seqlen_q", max_seqlen_q, longest_of(queries))
    check_longest(call.caller, "max_seqlen_k", max_seqlen_k, longest_of(keys))
    if len(queries) != len(keys):
        raise ValueError(
            f"{call.caller}: cu_seqlens_q has {len(queries) - 1} documents, cu_seqlens_k {len(keys) - 1}; they come in pairs"
        )
    slopes_each = alibi_slopes is not None and alibi_slopes.ndim == 2
    if queries == keys and not slopes_each:
        out, lse = _attend(call, q[None], k[None], v[None], queries)
        return call.answer(out[0], lse[0])
    return call.answer(*_document_by_document(call, q, k, v, queries, keys))


flash_attn_kvpacked_func = kvpacked(flash_attn_func)
flash_attn_qkvpacked_func = qkvpacked(flash_attn_func)
flash_attn_varlen_kvpacked_func = kvpacked(flash_attn_varlen_func, without="block_table")
_stacked = qkvpacked(flash_attn_varlen_func)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` of ``qkv [total, 3, h, d]``, with one ``cu_seqlens`` for queries and keys."""
    given = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _stacked(qkv, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *given)


def _attend(
    call: Call, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Offsets | None = None, slopes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Out and lse of one call, its ends aligned; ``slopes`` stand in for the call's."""
    options = call.options(torch.randint(2**63 - 1, (), device="cpu") if call.dropout_p else None)
    if slopes is not None:
        options["alibi_slopes"] = slopes
    offset = k.shape[1] - q.shape[1]
    return flash_attention(q, k, v, call.mask(cu_seqlens), q_offset=offset, return_lse=True, **options)


def _document_by_document(
    call: Call, q: Tensor, k: Tensor, v: Tensor, queries: Offsets, keys: Offsets
) -> tuple[Tensor, Tensor]:
    """Out ``[total_q, h, d]`` and lse ``[h, total_q]``: each document as a call of its own, with its own ends aligned."""
    slopes = call.alibi_slopes
    rows = slopes if slopes is not None and slopes.ndim == 2 else None
    if rows is not None and rows.shape[0] != len(queries) - 1:
        raise ValueError(
            f"{call.caller}: alibi_slopes has shape {tuple(rows.shape)}, and there are {len(queries) - 1} documents; "
            "[heads] or [documents, heads] is needed"
        )
    parts = []
    for number, ((a, b), (c, d)) in enumerate(zip(pairwise(queries), pairwise(keys), strict=True)):
        own = None if rows is None else rows[number]
        parts.append(_attend(call, q[None, a:b], k[None, c:d], v[None, c:d], slopes=own))
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)
