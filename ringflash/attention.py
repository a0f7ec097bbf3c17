"""Exact attention, on one device and on many: the public functions, and the checks that precede all communication.

``flash_attention`` is ``ring_attention`` on a ring of one. Whatever is wrong with the arguments is said here, on values
that are equal on all ranks, in one sentence: which argument, what came, what is accepted.

Liu et al. 2023 (arXiv 2310.01889); Dao et al. 2022 (arXiv 2205.14135).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ringflash.backend import select
from ringflash.errors import RingflashError
from ringflash.layout import contiguous
from ringflash.mask import Mask, causal, full
from ringflash.numbers import FAR, brief, real, whole
from ringflash.operator import attend
from ringflash.partial import accumulation_dtype
from ringflash.plan import derive
from ringflash.recipe import Bound, recipes
from ringflash.reference import Scoring
from ringflash.route import ring
from ringflash.shard import Sharding
from ringflash.tensors import require_dense
from ringflash.ulysses import head_share
from ringflash.wire import Unconnected

if TYPE_CHECKING:
    from typing_extensions import Unpack

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LARGEST = {dtype: torch.finfo(accumulation_dtype(dtype)).max for dtype in DTYPES}
_SOFTCAPS = {dtype: (torch.finfo(accumulation_dtype(dtype)).tiny ** 0.5, _LARGEST[dtype] ** 0.5) for dtype in DTYPES}
"""Between these, quotients of scores and softcap neither vanish nor lose digits."""


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

    Raises ``ValueError`` or ``TypeError`` for arguments that do not fit. Differentiable once, by backward: not by the
    transforms of ``torch.func`` (``RingflashError``).

    ``torch.compile(fullgraph=True)`` captures it as one step. Lengths, ``q_offset``, ``seed`` and masks may change from
    call to call; each ``scale``, ``softcap`` and ``dropout_p`` is a graph of its own. So is each mask written *inside* the
    compiled function: build masks that change outside, and pass them in or keep them as an attribute of a module.

    >>> q = k = v = torch.ones(1, 4, 2, 8)
    >>> out, lse = flash_attention(q, k, v, mask=causal, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 4, 2, 8]), torch.Size([1, 2, 4]))
    """
    if not isinstance(mask, Mask):
        raise TypeError(
            f"flash_attention: mask is {brief(mask)}; a mask is a value such as rf.causal & rf.window(4095, 0)"
        )
    given = scale, softcap, alibi_slopes, sinks, dropout_p, seed, backend, deterministic, return_lse
    options = _Given("flash_attention", *given)
    _check_tensors("flash_attention", q, k, v, mask.rows)
    if q.shape[1] != k.shape[1] and q_offset is None and mask != full:
        raise ValueError(
            f"flash_attention: {q.shape[1]} queries and {k.shape[1]} keys under {mask}; say where the first query stands: "
            f"q_offset={k.shape[1] - q.shape[1]} aligns the ends, q_offset=0 the beginnings"
        )
    if mask.length is not None and mask.length != k.shape[1]:
        raise ValueError(f"flash_attention: the documents of mask cover {mask.length} positions, key has {k.shape[1]}")
    offset = 0 if q_offset is None else _settle_integer(q_offset, "flash_attention: q_offset")
    if torch.compiler.is_compiling():
        handle = _find_one_device(torch.from_numpy(mask.table), offset)
    else:
        handle = _one_device(mask, offset).handle
    return _run(q, k, v, handle, options)


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
        raise TypeError(
            f"ring_attention: mask is {brief(mask)}; a mask is a value such as rf.causal & rf.window(4095, 0)"
        )
    given = scale, softcap, alibi_slopes, sinks, dropout_p, seed, backend, deterministic, return_lse
    options = _Given("ring_attention", *given)
    _check_tensors("ring_attention", q, k, v, s.rows if mask is None else mask.rows)
    for name, tensor, held, total in (("query", q, s.local_length, s.length), ("key", k, s.local_keys, s.keys)):
        if tensor.shape[1] != held:
            raise ValueError(
                f"ring_attention: {name} has {tensor.shape[1]} positions; rank {s.rank} of {s.ranks} holds "
                f"{held} of {total} in the {s.layout} layout: use s.shard(x, dim=1)"
            )
    if q.shape[2] % s.heads_degree:
        try:
            head_share(q.shape[2], k.shape[2], s.heads_degree, 0, s.ranks)
        except ValueError as error:
            raise ValueError(f"ring_attention: {error}") from None
    return _run(q, k, v, s.handle if mask is None else s.handle_under(mask), options)


class _OneDevice:
    """A mask on one device, for any number of queries and keys."""

    def __init__(self, mask: Mask, q_offset: int) -> None:
        self.mask, self.q_offset = mask, whole(q_offset, "flash_attention: q_offset")  # also of a captured graph
        self.handle = recipes.add(self)

    @property
    def over(self) -> bool:
        return False

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


class _Given(NamedTuple):
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
    return_lse: bool

    def settle_scoring(self, q: Tensor) -> Scoring:
        """What these options make of a score, without the seed. Raises for what cannot be meant."""
        caller, dtype = self.caller, q.dtype
        for name in ("deterministic", "return_lse"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{caller}: {name} is {brief(value)}; True or False is needed")
        if not isinstance(self.backend, str):
            raise TypeError(f"{caller}: backend is {brief(self.backend)}; a name is needed, as 'auto'")
        scale = q.shape[3] ** -0.5 if self.scale is None else real(self.scale, f"{caller}: scale")
        if self.scale is not None and abs(scale) > _LARGEST[dtype]:
            largest = f"{_LARGEST[dtype]:.3g}"
            raise ValueError(f"{caller}: scale is {brief(self.scale)}; for {dtype} a number up to {largest} is needed")
        softcap = real(self.softcap, f"{caller}: softcap", "a finite number is needed, 0 for none")
        if softcap and not _SOFTCAPS[dtype][0] <= softcap <= _SOFTCAPS[dtype][1]:
            needed = "a finite number is needed, 0 for none, else for {} from {:.3g} to {:.3g}"
            raise ValueError(f"{caller}: softcap is {brief(self.softcap)}; {needed.format(dtype, *_SOFTCAPS[dtype])}")
        dropout_p = real(self.dropout_p, f"{caller}: dropout_p", "a probability below 1 is needed")
        if not 0 <= dropout_p < 1:
            raise ValueError(f"{caller}: dropout_p is {brief(self.dropout_p)}; a probability below 1 is needed")
        if dropout_p and self.seed is None:
            raise ValueError(f"{caller}: dropout_p is {dropout_p} without seed; pass one integer, equal on all ranks")
        if self.sinks is not None:
            self._check_heads(q, "sinks", self.sinks)
        if self.alibi_slopes is not None:
            self._check_heads(q, "alibi_slopes", self.alibi_slopes)
            if self.alibi_slopes.requires_grad:
                raise ValueError(
                    f"{caller}: alibi_slopes requires a gradient, and slopes have none; pass alibi_slopes.detach()"
                )
        return Scoring(scale, softcap, self.alibi_slopes, dropout_p)

    def settle_seed(self) -> Tensor:
        """The seed as a 0-dim tensor on the CPU; 0 without one."""
        seed, what = self.seed, f"{self.caller}: seed"
        if not isinstance(seed, Tensor):
            number = 0 if seed is None else _settle_integer(seed, what, -(1 << 63), (1 << 63) - 1)
            return torch.tensor(number, device="cpu")
        require_dense(seed, what)
        if seed.ndim or seed.dtype != torch.int64 or seed.device.type != "cpu":
            raise ValueError(
                f"{what} is a tensor, {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}; it must be 0-dim, int64 "
                "and on the CPU"
            )
        return seed

    def _check_heads(self, q: Tensor, name: str, tensor: Tensor) -> None:
        """Is this one number per query head?"""
        what, (batch, _, heads, _) = f"{self.caller}: {name}", q.shape
        require_dense(tensor, what)
        accepted: list[tuple[int, ...]] = [(heads,)] if name == "sinks" else [(heads,), (batch, heads)]
        if tuple(tensor.shape) not in accepted:
            wanted = " or ".join(map(str, accepted))
            raise ValueError(f"{what} has shape {tuple(tensor.shape)}; one value per query head, {wanted}")
        if tensor.dtype not in DTYPES or tensor.device != q.device:
            raise ValueError(f"{what} is {tensor.dtype} on {tensor.device}; one of {_spell_dtypes()} on {q.device}")


def _settle_integer(value: int, what: str, least: int = -FAR, most: int = FAR) -> int:
    """``value``, if it is an integer. In a captured graph it may stand for any, and looking closer would pin it to one."""
    return value if torch.compiler.is_compiling() and type(value) is int else whole(value, what, least, most)


def _spell_dtypes() -> str:
    return ", ".join(str(x).removeprefix("torch.") for x in DTYPES)


def _check_tensors(caller: str, q: Tensor, k: Tensor, v: Tensor, rows: int) -> None:
    named = {"query": q, "key": k, "value": v}
    for name, x in named.items():
        if type(x) is not Tensor or x.layout is not torch.strided or x.is_nested:
            require_dense(x, f"{caller}: {name}")
        if x.ndim != 4:
            raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}; [batch, seq, heads, head_dim] is needed")
        if 0 in (x.shape[0], x.shape[2], x.shape[3]):
            raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}; batch, heads and head_dim must not be 0")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"{caller}: query, key, value are {q.dtype}, {k.dtype}, {v.dtype}; one dtype is needed, of "
            + _spell_dtypes()
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


def _run(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, options: _Given) -> Tensor | tuple[Tensor, Tensor]:
    scoring = options.settle_scoring(q)
    backend = options.backend
    if not torch.compiler.is_compiling():  # the operator chooses again, and for a captured graph alone
        _refuse_transforms(options.caller, q, k, v)
        try:
            backend = select(backend, q, v, scoring).name
        except ValueError as error:
            raise ValueError(f"{options.caller}: {error}") from None
        handle = torch.ops.aten.lift_fresh.default(handle)  # itself; where all tensors are fake, a fake one
    out, lse = attend(
        q,
        k,
        v,
        handle,
        options.sinks,
        options.alibi_slopes,
        options.settle_seed(),
        scoring.scale,
        scoring.softcap,
        scoring.dropout_p,
        backend,
        options.deterministic,
    )
    return (out, lse) if options.return_lse else out


def _refuse_transforms(caller: str, *tensors: Tensor) -> None:
    """Other ways to differentiate than backward; torch would say so far from here."""
    level = torch._C._functorch.peek_interpreter_stack()
    if level is not None and level.key() != torch._C._functorch.TransformType.Functionalize:
        raise RingflashError(f"{caller}: transforms of torch.func (grad, jvp, vmap) are not implemented; use backward")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RingflashError(f"{caller}: forward-mode derivatives (jvp) are not implemented; use backward")
