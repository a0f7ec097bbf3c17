"""ring-flash-attn's functions: ``from ringflash.compat.ring_flash_attn import zigzag_ring_flash_attn_func``. Collective.

Each takes this rank's shard and gives this rank's part of what one device gives on the whole sequence, forward and backward.
The names say how the sequence is cut; of 12 tokens, rank 0 of 2 holds

    ring_*          0 1 2 3 4 5         slices
    zigzag_ring_*   0 1 2 9 10 11       chunk r of 2W and its mirror; the number of tokens per rank is even
    stripe_*        0 2 4 6 8 10        every W-th token
    *_varlen_*      each document cut in that way, one after the other; cu_seqlens and max_seqlen are the rank's own,
                    equal on all ranks: a W-th of the whole
    llama3_*        slices of a packed row, wherever its documents end

All ranks hold equally many tokens. ``group`` is whatever ``rf.Sharding`` takes, None for the default group. Windows,
ALiBi, ``deterministic`` and ``causal=False`` work in every one of them, and lse is differentiable. ``dropout_p`` needs
``seed``, which these functions have beside the arguments of the original: an integer that is equal on all ranks and new for
each layer and step.

Shardings are cached: a call per layer looks one up. ``torch.compile`` breaks the graph at these functions; it captures
``rf.ring_attention`` whole. Liu et al. 2023 (arXiv 2310.01889); Llama 3 (arXiv 2407.21783).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from torch import Tensor

from ringflash.attention import ring_attention
from ringflash.compat.arguments import (
    Call,
    Function,
    check_longest,
    check_ndim,
    christen,
    kvpacked,
    longest_of,
    qkvpacked,
    read_offsets,
)
from ringflash.groups import Group, address, resolve
from ringflash.layout import LAYOUTS, Layout, solid
from ringflash.mask import Mask, documents, full
from ringflash.shard import Sharding

__all__ = [
    "llama3_flash_attn_prepare_cu_seqlens",
    "llama3_flash_attn_varlen_func",
    "llama3_flash_attn_varlen_kvpacked_func",
    "llama3_flash_attn_varlen_qkvpacked_func",
    "ring_flash_attn_func",
    "ring_flash_attn_kvpacked_func",
    "ring_flash_attn_qkvpacked_func",
    "ring_flash_attn_varlen_func",
    "ring_flash_attn_varlen_kvpacked_func",
    "ring_flash_attn_varlen_qkvpacked_func",
    "stripe_flash_attn_func",
    "stripe_flash_attn_kvpacked_func",
    "stripe_flash_attn_qkvpacked_func",
    "stripe_flash_attn_varlen_func",
    "stripe_flash_attn_varlen_kvpacked_func",
    "stripe_flash_attn_varlen_qkvpacked_func",
    "zigzag_ring_flash_attn_func",
    "zigzag_ring_flash_attn_kvpacked_func",
    "zigzag_ring_flash_attn_qkvpacked_func",
    "zigzag_ring_flash_attn_varlen_func",
    "zigzag_ring_flash_attn_varlen_kvpacked_func",
    "zigzag_ring_flash_attn_varlen_qkvpacked_func",
]

Offsets = tuple[int, ...]


def _whole_rows(name: str, layout: str) -> tuple[Function, Function, Function]:
    """The function ``name`` for ``[b, s, h, d]`` and its packed variants, for sequences cut as ``layout`` says."""

    def function(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: Group = None,
        *,
        seed: int | Tensor | None = None,
    ) -> Any:
        given = (dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
        call = Call(name, *given)
        check_ndim(name, 4, "[batch, local seq, heads, head_dim]", q=q, k=k, v=v)
        group, mask = resolve(group), call.mask()
        for what, x in dict(q=q, k=k).items():
            _check_chunks(name, layout, (0, x.shape[1]), f"{what} has {x.shape[1]} tokens on each rank")
        if q.shape[1] != k.shape[1] and (mask != full or alibi_slopes is not None):
            raise ValueError(
                f"{name}: q has {q.shape[1]} tokens on each rank and k {k.shape[1]}; where causal, window_size or alibi_slopes "
                "compares their positions they must agree. rf.Sharding(length, keys=, q_offset=) says how others stand"
            )
        ranks = address(group)[1]
        s = _sharding(q.shape[1] * ranks, k.shape[1] * ranks, group, mask, layout)
        return call.answer(*ring_attention(q, k, v, s, return_lse=True, **call.options(seed)))

    christen(
        function,
        name,
        f"""This rank's part of attention over a sequence in the {layout} layout. Collective.

        ``q [b, s, h, d]``, ``k, v [b, s, h_kv, d]``: this rank's s tokens, as many as every rank's. Returns ``out`` as q, or
        with ``return_attn_probs`` ``(out, lse [b, h, s], None)``. Arguments as in ``ringflash.compat.flash_attn``, over
        the whole sequence; ``dropout_p`` needs ``seed``, equal on all ranks.
        """,
    )
    return function, kvpacked(function), qkvpacked(function)


def _packed_rows(name: str, layout: str) -> tuple[Function, Function, Function]:
    """The function ``name`` for ``[total, h, d]`` and its packed variants, for documents cut as ``layout`` says."""

    def function(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | Sequence[int],
        max_seqlen: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: Group = None,
        *,
        seed: int | Tensor | None = None,
    ) -> Any:
        given = (dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
        call = Call(name, *given)
        check_ndim(name, 3, "[local total, heads, head_dim]", q=q, k=k, v=v)
        offsets = read_offsets(name, "cu_seqlens", cu_seqlens, q.shape[0])
        check_longest(name, "max_seqlen", max_seqlen, longest_of(offsets))
        group = resolve(group)
        ranks = address(group)[1]
        _check_chunks(name, layout, offsets, f"cu_seqlens is {list(offsets[:9])}")
        s = _sharding(q.shape[0] * ranks, None, group, *_cut(call.mask(), layout, offsets, ranks))
        return _packed(call, q, k, v, s, seed)

    christen(
        function,
        name,
        f"""This rank's part of attention over packed documents, each of them in the {layout} layout. Collective.

        ``q [total, h, d]``, ``k, v [total, h_kv, d]``: this rank's parts of all documents, in order. ``cu_seqlens`` are the
        offsets of these parts, equal on all ranks: those of the whole row divided by the number of ranks. They are needed
        on the host: a CUDA tensor is copied once, and again after autograd counted a write to it (torch.distributed's are
        not: pass another tensor); a list of integers is as good. Returns ``out`` as q, or with ``return_attn_probs``
        ``(out, lse [h, total], None)``. ``dropout_p`` needs ``seed``.
        """,
    )
    return function, kvpacked(function), qkvpacked(function)


ring_flash_attn_func, ring_flash_attn_kvpacked_func, ring_flash_attn_qkvpacked_func = _whole_rows(
    "ring_flash_attn_func", "contiguous"
)
zigzag_ring_flash_attn_func, zigzag_ring_flash_attn_kvpacked_func, zigzag_ring_flash_attn_qkvpacked_func = _whole_rows(
    "zigzag_ring_flash_attn_func", "zigzag"
)
stripe_flash_attn_func, stripe_flash_attn_kvpacked_func, stripe_flash_attn_qkvpacked_func = _whole_rows(
    "stripe_flash_attn_func", "striped"
)
ring_flash_attn_varlen_func, ring_flash_attn_varlen_kvpacked_func, ring_flash_attn_varlen_qkvpacked_func = _packed_rows(
    "ring_flash_attn_varlen_func", "contiguous"
)
(
    zigzag_ring_flash_attn_varlen_func,
    zigzag_ring_flash_attn_varlen_kvpacked_func,
    zigzag_ring_flash_attn_varlen_qkvpacked_func,
) = _packed_rows("zigzag_ring_flash_attn_varlen_func", "zigzag")
stripe_flash_attn_varlen_func, stripe_flash_attn_varlen_kvpacked_func, stripe_flash_attn_varlen_qkvpacked_func = (
    _packed_rows("stripe_flash_attn_varlen_func", "striped")
)


class _Row(int):
    """The number 1, as the step of a slice of a packed row; it knows how the whole row was packed.

    A rank's own part of ``cu_seqlens`` does not say who needs its keys, and asking the others in every layer would cost
    a message. A slice passes unchanged through checkpoints and copies, where a tensor would become another one.
    """

    cu_seqlens: Offsets
    causal: bool
    address: tuple[int, int]
    documents: int
    """How many documents this rank's ``cu_seqlens_q`` and ``cu_seqlens_k`` count."""
    longest: tuple[int, int]
    """The most queries and keys that this rank has of a document."""


def llama3_flash_attn_prepare_cu_seqlens(
    cu_seqlens: Tensor, causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, slice]:
    """What rank ``rank`` of ``world_size`` passes to the llama3 functions for a packed row, cut into slices.

    Returns ``cu_seqlens_q, cu_seqlens_k`` (as ``cu_seqlens``: int32, on its device), ``max_seqlen_q, max_seqlen_k`` and
    ``local_k_slice``, as ring-flash-attn does; the slice also remembers the row, so pass this very object on. Copies
    ``cu_seqlens`` to the host. The number of tokens must be a multiple of ``world_size``.

    >>> from torch import tensor
    >>> prepared = llama3_flash_attn_prepare_cu_seqlens(tensor([0, 7, 14, 16]), causal=True, rank=1, world_size=2)
    >>> [x.tolist() for x in prepared[:2]], prepared[2:4], (prepared[4].start, prepared[4].stop)
    ([[0, 6, 8], [0, 7, 9]], (6, 7), (7, 16))
    """
    caller = "llama3_flash_attn_prepare_cu_seqlens"
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"{caller}: cu_seqlens is {cu_seqlens!r}; a tensor of offsets, int32 [documents + 1], is needed"
        )
    offsets = read_offsets(caller, "cu_seqlens", cu_seqlens, int(cu_seqlens[-1]))
    if not 0 <= rank < world_size or offsets[-1] % world_size or not offsets[-1]:
        raise ValueError(
            f"{caller}: {offsets[-1]} tokens for rank {rank} of {world_size}; world_size must divide the tokens, 1 or more, "
            "and rank be below it. rf.Sharding cuts any number of tokens"
        )
    local = offsets[-1] // world_size
    start, stop = rank * local, (rank + 1) * local
    first, last = bisect_left(offsets, start), bisect_left(offsets, stop)
    first -= offsets[first] != start
    queries = [0, *(x - start for x in offsets[first + 1 : last]), local]
    end = stop if causal else offsets[last]
    keys = [x - offsets[first] for x in (*offsets[first:last], end)]
    row = _Row(1)
    row.cu_seqlens, row.causal, row.address, row.documents = offsets, bool(causal), (rank, world_size), last - first
    most_queries, most_keys = row.longest = longest_of(queries), longest_of(keys)
    mine = slice(offsets[first], end, row)
    return cu_seqlens.new_tensor(queries), cu_seqlens.new_tensor(keys), most_queries, most_keys, mine


def llama3_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: Group = None,
    *,
    seed: int | Tensor | None = None,
) -> Any:
    """This rank's slice of attention over a packed row, wherever its documents end. Collective.

    ``q [total, h, d]``, ``k, v [total, h_kv, d]`` are this rank's slices of the row. ``cu_seqlens_*``, ``max_seqlen_*``
    and ``local_k_slice`` come from :func:`llama3_flash_attn_prepare_cu_seqlens`; the slice says all, and the numbers of
    documents and their longest are compared with it.
    ``heads_k_stride`` was how many key heads the original gathers at a time: it must divide them, and changes nothing
    here, where a rank is sent the keys that it needs and no others. Returns ``out`` as q, or with ``return_attn_probs``
    ``(out, lse [h, total], None)``. ``dropout_p`` needs ``seed``, equal on all ranks.
    """
    given = (dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs)
    call = Call("llama3_flash_attn_varlen_func", *given)
    check_ndim(call.caller, 3, "[local total, heads, head_dim]", q=q, k=k, v=v)
    if not isinstance(heads_k_stride, int) or heads_k_stride < 1 or k.shape[1] % heads_k_stride:
        raise ValueError(
            f"{call.caller}: heads_k_stride is {heads_k_stride!r}; a divisor of the {k.shape[1]} key heads"
        )
    group = resolve(group)
    row = _check_prepared(call, q, group, local_k_slice, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
    s = _sharding(row.cu_seqlens[-1], None, group, call.mask(row.cu_seqlens), "contiguous")
    return _packed(call, q, k, v, s, seed)


llama3_flash_attn_varlen_kvpacked_func = kvpacked(llama3_flash_attn_varlen_func)
llama3_flash_attn_varlen_qkvpacked_func = qkvpacked(llama3_flash_attn_varlen_func)


def _check_prepared(
    call: Call, q: Tensor, group: Group, prepared: slice, parts: tuple[Tensor, ...], longest: tuple[int, ...]
) -> _Row:
    """The packed row that ``prepared`` remembers, if it and what came with it belong to this call."""
    row = getattr(prepared, "step", None)
    if not isinstance(row, _Row):
        raise ValueError(
            f"{call.caller}: local_k_slice is {prepared!r}; the slice that llama3_flash_attn_prepare_cu_seqlens of this module "
            "returns is needed: it remembers the documents of the other ranks"
        )
    here, local = address(group), row.cu_seqlens[-1] // row.address[1]
    if row.address != here:
        raise ValueError(
            f"{call.caller}: local_k_slice was prepared for rank {row.address[0]} of {row.address[1]}; this is rank "
            f"{here[0]} of {here[1]}"
        )
    if row.causal != bool(call.causal):
        raise ValueError(
            f"{call.caller}: causal is {call.causal}, and local_k_slice was prepared for causal={row.causal}"
        )
    if q.shape[0] != local:
        raise ValueError(
            f"{call.caller}: q has {q.shape[0]} tokens; the row that was prepared has {local} on each rank"
        )
    for name, part in zip(("cu_seqlens_q", "cu_seqlens_k"), parts, strict=True):
        if not isinstance(part, Tensor) or len(part) != row.documents + 1:
            came = f"has {len(part) - 1} documents" if isinstance(part, Tensor) else f"is {part!r}"
            raise ValueError(f"{call.caller}: {name} {came}; local_k_slice was prepared for {row.documents} documents")
    for name, most, known in zip(("max_seqlen_q", "max_seqlen_k"), longest, row.longest, strict=True):
        check_longest(call.caller, name, most, known)
    return row


def _packed(call: Call, q: Tensor, k: Tensor, v: Tensor, s: Sharding, seed: int | Tensor | None) -> Any:
    out, lse = ring_attention(q[None], k[None], v[None], s, return_lse=True, **call.options(seed))
    return call.answer(out[0], lse[0])


def _check_chunks(caller: str, layout: str, offsets: Offsets, came: str) -> None:
    """A zigzag's shards are two equal chunks of each document."""
    if layout == "zigzag" and any((b - a) % 2 for a, b in pairwise(offsets)):
        raise ValueError(
            f"{caller}: {came}; a zigzag cuts into 2 equal chunks on each rank, so the number is even. "
            "rf.Sharding(length, layout='zigzag') cuts any length"
        )


@lru_cache(maxsize=64)
def _cut(band: Mask, layout: str, offsets: Offsets, ranks: int) -> tuple[Mask, Layout]:
    """The mask and the layout of documents that are cut one by one; ``offsets`` are those of a rank's parts."""
    held: list[list[range]] = [[] for _ in range(ranks)]
    for a, b in pairwise(offsets):
        for mine, runs in zip(held, LAYOUTS[layout]((b - a) * ranks, ranks).runs, strict=True):
            mine += [range(run.start + a * ranks, run.stop + a * ranks, run.step) for run in runs]
    mask = band & documents([x * ranks for x in offsets])
    return mask, Layout(tuple(solid(*runs) for runs in held), f"{layout} by document")


@lru_cache(maxsize=32)
def _sharding(length: int, keys: int | None, group: Group, mask: Mask, layout: str | Layout) -> Sharding:
    """One sharding for all layers and steps that cut alike. Documents change every batch, so few are kept."""
    return Sharding(length, group, mask, layout, keys=keys)
