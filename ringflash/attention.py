"""Exact attention, on one device and on many: the public functions, and the checks that precede all communication.

``flash_attention`` is ``ring_attention`` on a ring of one. Whatever is wrong with the arguments is said here, on values
that are equal on all ranks, in one sentence: which argument, what came, what is accepted.

Liu et al. 2023 (arXiv 2310.01889); Dao et al. 2022 (arXiv 2205.14135).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ringflash.backend import select
from ringflash.layout import contiguous
from ringflash.mask import Mask, causal, full
from ringflash.operator import attend
from ringflash.plan import derive
from ringflash.recipe import Bound, recipes
from ringflash.reference import Scoring
from ringflash.route import ring
from ringflash.shard import Sharding
from ringflash.ulysses import head_share
from ringflash.wire import Unconnected

if TYPE_CHECKING:
    from typing_extensions import Unpack

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Options(TypedDict, total=False):
    """The options that both functions share, as a type checker sees them."""

    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    seed: int | Tensor | None
    deterministic: bool


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = ...,
    scale: float | None = ...,
    *,
    return_lse: Literal[True],
    q_offset: int | None = ...,
    backend: str = ...,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = ...,
    scale: float | None = ...,
    *,
    return_lse: Literal[False] = ...,
    q_offset: int | None = ...,
    backend: str = ...,
    **options: Unpack[Options],
) -> Tensor: ...
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = causal,
    scale: float | None = None,
    *,
    q_offset: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention on one device.

    ``q [b, s_q, h, d]``, ``k [b, s_k, h_kv, d]``, ``v [b, s_k, h_kv, d_v]``, of one dtype (float64, float32, bfloat16,
    float16) and device; ``h`` is a multiple of ``h_kv``, and keys are not expanded. Returns ``out [b, s_q, h, d_v]`` in
    the dtype of q, and with ``return_lse`` also the natural log-sum-exp ``[b, h, s_q]`` in float32 (float64 for float64),
    which is differentiable. A row that sees no key gives out 0, lse -inf, gradients 0.

    ``scale`` multiplies q k^T (default ``d ** -0.5``). ``q_offset``: position of the first query if ``s_q != s_k``.
    ``softcap`` bends scores to ``softcap * tanh(score / softcap)``. ``alibi_slopes [h]`` or ``[b, h]`` subtract slope x
    |distance|. ``sinks [h]`` are learnable logits of one more key per head with value 0; lse includes them. ``dropout_p``
    drops weights by a counter keyed on ``seed``, batch row, head and global positions. ``deterministic``, or
    ``torch.use_deterministic_algorithms(True)``, asks for bitwise repeatable gradients. ``backend``: "auto", "triton",
    "aten" or "reference".

    Raises ``ValueError`` or ``TypeError`` for arguments that do not fit. Differentiable once.

    ``torch.compile(fullgraph=True)`` captures it as one step. Lengths, ``q_offset``, ``seed`` and masks may change from
    call to call; each ``scale``, ``softcap`` and ``dropout_p`` is a graph of its own. So is each mask written *inside* the
    compiled function: build masks that change outside, and pass them in or keep them as an attribute of a module.

    >>> q = k = v = torch.ones(1, 4, 2, 8)
    >>> out, lse = flash_attention(q, k, v, mask=causal, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 4, 2, 8]), torch.Size([1, 2, 4]))
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"flash_attention: mask is {mask!r}; a mask is a value such as rf.causal & rf.window(4095, 0)")
    options = _Given("flash_attention", scale, softcap, alibi_slopes, sinks, dropout_p, seed, backend, deterministic)
    _check_tensors("flash_attention", q, k, v, mask.rows)
    if q.shape[1] != k.shape[1] and q_offset is None and mask != full:
        raise ValueError(
            f"flash_attention: {q.shape[1]} queries and {k.shape[1]} keys under {mask}; say where the first query stands: "
            f"q_offset={k.shape[1] - q.shape[1]} aligns the ends, q_offset=0 the beginnings"
        )
    if mask.length is not None and mask.length != k.shape[1]:
        raise ValueError(f"flash_attention: the documents of mask cover {mask.length} positions, key has {k.shape[1]}")
    # in a captured graph an int may stand for any integer, and index() would pin it to one
    offset = q_offset if isinstance(q_offset, int) else operator.index(q_offset or 0)
    if torch.compiler.is_compiling():
        handle = _find_one_device(torch.from_numpy(mask.table), offset)
    else:
        handle = _one_device(mask, offset).handle
    return _run(q, k, v, handle, options, return_lse)


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Sharding,
    mask: Mask | None = ...,
    scale: float | None = ...,
    *,
    return_lse: Literal[True],
    backend: str = ...,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Sharding,
    mask: Mask | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
    **options: Unpack[Options],
) -> Tensor: ...
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Sharding,
    mask: Mask | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    *,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence that is spread over ranks. Collective: every rank of ``s.group`` calls it.

    ``q``, ``k``, ``v`` are this rank's shards, ``[b, s.local_length, heads, head_dim]`` (keys: the local length of
    ``s.key_sharding``); batch, heads, head dims, dtype and options are equal on all ranks. ``mask`` replaces ``s.mask``
    for this call. Every other argument, and the answer, is that of :func:`flash_attention` on the whole sequence: it
    depends neither on the number of ranks nor on the layout. Gradients of q, k, v are those of the sum of all ranks'
    losses; those of ``sinks`` are this rank's share, to be summed like any parameter's.

    >>> import ringflash as rf
    >>> def one_rank(group):
    ...     s = rf.Sharding(6, group)
    ...     q = k = v = s.shard(torch.arange(6.0).reshape(1, 6, 1, 1), dim=1)
    ...     return s.unshard(rf.ring_attention(q, k, v, s), dim=1).shape
    >>> rf.local_world(ranks=3).run(one_rank)[0]
    torch.Size([1, 6, 1, 1])
    """
    if not isinstance(s, Sharding):
        raise TypeError(
            f"ring_attention: the fourth argument is a {type(s).__name__}; it is the rf.Sharding of q and k"
        )
    if not (mask is None or isinstance(mask, Mask)):
        raise TypeError(f"ring_attention: mask is {mask!r}; a mask is a value such as rf.causal & rf.window(4095, 0)")
    options = _Given("ring_attention", scale, softcap, alibi_slopes, sinks, dropout_p, seed, backend, deterministic)
    _check_tensors("ring_attention", q, k, v, s.rows if mask is None else mask.rows)
    for name, tensor, held, whole in (("query", q, s.local_length, s.length), ("key", k, s.local_keys, s.keys)):
        if tensor.shape[1] != held:
            raise ValueError(
                f"ring_attention: {name} has {tensor.shape[1]} positions; rank {s.rank} of {s.ranks} holds "
                f"{held} of {whole} in the {s.layout} layout: use s.shard(x, dim=1)"
            )
    if q.shape[2] % s.heads_degree:
        try:
            head_share(q.shape[2], k.shape[2], s.heads_degree, 0, s.ranks)
        except ValueError as error:
            raise ValueError(f"ring_attention: {error}") from None
    return _run(q, k, v, s.handle if mask is None else s.handle_under(mask), options, return_lse)


class _OneDevice:
    """A mask on one device, for any number of queries and keys."""

    def __init__(self, mask: Mask, q_offset: int) -> None:
        self.mask, self.q_offset = mask, q_offset
        self.handle = recipes.add(self)

    def bind(self, queries: int, keys: int) -> Bound:
        one = derive(0, contiguous(queries, 1), contiguous(keys, 1), self.mask, ring, self.q_offset)
        return Bound(one, Unconnected(0, 1))


_one_device = lru_cache(maxsize=256)(_OneDevice)


@torch.library.custom_op("ringflash::find_one_device", mutates_args=())
def _find_one_device(table: Tensor, q_offset: int) -> Tensor:
    """The handle of a mask on one device, found when a captured graph runs: another mask is another input of it."""
    return _one_device(Mask.read(table.numpy(force=True)), q_offset).handle.clone()


@_find_one_device.register_fake
def _(table: Tensor, q_offset: int) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class _Given:
    """The options of a call, as they were given."""

    caller: str
    scale: float | None
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    seed: int | Tensor | None
    backend: str
    deterministic: bool

    def check(self, q: Tensor) -> None:
        caller, (batch, _, heads, _) = self.caller, q.shape
        if self.scale is not None and not abs(self.scale) < math.inf:
            raise ValueError(f"{caller}: scale is {self.scale}; a finite number is needed")
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"{caller}: softcap is {self.softcap}; a finite number is needed, 0 for none")
        if not 0 <= self.dropout_p < 1:
            raise ValueError(f"{caller}: dropout_p is {self.dropout_p}; a probability below 1 is needed")
        if self.dropout_p and self.seed is None:
            raise ValueError(
                f"{caller}: dropout_p is {self.dropout_p} without seed; pass one integer, equal on all ranks"
            )
        if isinstance(self.seed, Tensor) and (self.seed.ndim or self.seed.dtype != torch.int64 or self.seed.is_cuda):
            raise ValueError(f"{caller}: seed is a tensor; it must be 0-dim, int64 and on the CPU")
        shapes: dict[str, list[tuple[int, ...]]] = {"sinks": [(heads,)], "alibi_slopes": [(heads,), (batch, heads)]}
        for name, accepted in shapes.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) not in accepted:
                wanted = " or ".join(map(str, accepted))
                raise ValueError(
                    f"{caller}: {name} has shape {tuple(tensor.shape)}; one value per query head, {wanted}"
                )
            if not tensor.is_floating_point() or tensor.device != q.device:
                raise ValueError(f"{caller}: {name} is {tensor.dtype} on {tensor.device}; floating point on {q.device}")
        if self.alibi_slopes is not None and self.alibi_slopes.requires_grad:
            raise ValueError(
                f"{caller}: alibi_slopes requires a gradient, and slopes have none; pass alibi_slopes.detach()"
            )


def _check_tensors(caller: str, q: Tensor, k: Tensor, v: Tensor, rows: int) -> None:
    named = {"query": q, "key": k, "value": v}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{caller}: {name} is a {type(x).__name__}; a tensor is needed")
        if x.ndim != 4:
            raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}; [batch, seq, heads, head_dim] is needed")
        if 0 in (x.shape[0], x.shape[2], x.shape[3]):
            raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}; batch, heads and head_dim must not be 0")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"{caller}: query, key, value are {q.dtype}, {k.dtype}, {v.dtype}; one dtype is needed, of "
            + ", ".join(str(x).removeprefix("torch.") for x in DTYPES)
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"{caller}: query, key, value are on {q.device}, {k.device}, {v.device}; one device is needed")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            f"{caller}: query, key, value have batch {q.shape[0]}, {k.shape[0]}, {v.shape[0]}; they must agree"
        )
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(
            f"{caller}: key has {k.shape[1]} positions and {k.shape[2]} heads, value {v.shape[1]} and {v.shape[2]}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{caller}: query has head_dim {q.shape[3]}, key {k.shape[3]}; they must agree")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{caller}: key has {k.shape[2]} heads and query {q.shape[2]}; query heads must be a multiple of key heads"
        )
    if rows not in (1, q.shape[0]):
        raise ValueError(f"{caller}: mask has documents for {rows} batch rows, query has {q.shape[0]}")


def _run(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor, options: _Given, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    options.check(q)
    scale = q.shape[3] ** -0.5 if options.scale is None else float(options.scale)
    scoring = Scoring(scale, options.softcap, options.alibi_slopes, options.dropout_p)
    backend = options.backend
    if not torch.compiler.is_compiling():  # the operator chooses again, and for a captured graph alone
        if any(unpack_dual(x).tangent is not None for x in (q, k, v)):
            raise RuntimeError(f"{options.caller}: forward-mode derivatives (jvp) are not implemented; use backward")
        try:
            backend = select(options.backend, q, v, scoring).name
        except ValueError as error:
            raise ValueError(f"{options.caller}: {error}") from None
        handle = torch.ops.aten.lift_fresh.default(handle)  # itself; where all tensors are fake, a fake one
    seed = (
        torch.tensor(0 if options.seed is None else options.seed, device="cpu")
        if not isinstance(options.seed, Tensor)
        else options.seed
    )
    out, lse = attend(
        q,
        k,
        v,
        handle,
        options.sinks,
        options.alibi_slopes,
        seed,
        scale,
        float(options.softcap),
        float(options.dropout_p),
        backend,
        options.deterministic,
    )
    return (out, lse) if return_lse else out
