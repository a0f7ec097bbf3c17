"""One immutable object says how a sequence is spread over ranks. Every rank builds it alone.

A sharding is a length, a group, a mask, a layout and a route. From these each rank derives what it holds and does; equal
arguments give equal answers everywhere, so nothing needs to be sent to agree.

Ranks may stand in a grid (``heads_axis``): then the layout and the route are those of the rings, which are its columns, and
the ranks of a row hold neighbouring parts of one shard. Zigzag, 12 positions, rings of 2, and 2 ranks to a shard:

    ring rank 0    0 1 2 9 10 11    held by    rank 0:  0 1 2    rank 1:  9 10 11
    ring rank 1    3 4 5 6  7  8               rank 2:  3 4 5    rank 3:  6  7  8
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from ringflash.accord import accord_of
from ringflash.check import settle
from ringflash.groups import Group, address, connect_all, connect_axes, destroyed, resolve_axes
from ringflash.layout import Layout
from ringflash.mask import Mask, causal, full
from ringflash.numbers import brief, said_by, whole
from ringflash.plan import Plan, derive
from ringflash.recipe import Bound, Watched, recipes
from ringflash.route import Route
from ringflash.settled import lay_out, settle_layout, settle_route
from ringflash.tensors import require_dense
from ringflash.terms import terms_of
from ringflash.ulysses import Swap


@dataclass(frozen=True)
class Sharding:
    """How ``length`` positions are spread over the ranks of ``group``, and who may see whom.

    ``group``: a ProcessGroup, a DeviceMesh, a group of ``local_world``, ``(rank, ranks)`` to plan only, or None for the
    default group. ``layout``: ``"contiguous"``, ``"zigzag"``, ``"striped"``, ``"balanced"`` (for packed documents),
    ``"auto"`` or a ``Layout``; ``route``: ``"ring"``, ``"ring_down"``, ``"gather"``, ``"needed_only"``, ``"auto"`` or a
    route such as ``rf.double_ring(nodes, per_node)``. ``auto`` depends on nothing that differs between ranks.
    ``keys``: number of keys if they are not the queries' own (cross-attention, a cached prefix); ``q_offset`` is then the
    global position of the first query, and required unless the mask is full.

    ``heads_axis``: so many neighbouring ranks share a shard, and swap heads for positions around the ring (Ulysses); or,
    where ``group`` is a mesh with two axes, the name of the axis on which they stand. Layout and route are for
    ``ring_ranks``, the rest of the ranks; query heads must be a multiple of the degree, key heads need not.

    ``check``: how closely ranks watch each other, ``"off"``, ``"first"`` (compare what is new before it is sent), ``"always"``
    (and label messages) or ``"verify"`` (and look at numbers; slow); None is what ``RINGFLASH_CHECK`` says, else "first".

    Raises ``ValueError`` or ``TypeError`` for what does not fit together, before anything is sent.

    >>> s = Sharding(8, (0, 2), layout="zigzag")
    >>> s.positions
    tensor([0, 1, 6, 7])
    >>> s.shard(torch.arange(80, 88)[None], dim=1)
    tensor([[80, 81, 86, 87]])
    """

    length: int
    group: Group = None
    mask: Mask = causal
    layout: str | Layout = "auto"
    route: str | Route = "auto"
    keys: int | None = field(default=None, kw_only=True)
    q_offset: int | None = field(default=None, kw_only=True)
    heads_axis: str | int | None = field(default=None, kw_only=True)
    check: str | None = field(default=None, kw_only=True)

    local_length: int = field(init=False, compare=False, repr=False)
    """Number of positions that this rank holds."""
    local_keys: int = field(init=False, compare=False, repr=False)
    """Number of keys that this rank holds."""
    rows: int = field(init=False, compare=False, repr=False)
    """Number of batch rows that the mask tells apart; 1 if all rows share it."""
    handle: Tensor = field(init=False, compare=False, repr=False)
    """What operators know this sharding by."""
    heads_degree: int = field(init=False, compare=False, repr=False)
    """Number of ranks that share each shard; 1 without Ulysses."""
    _asked_route: str | Route = field(init=False, compare=False, repr=False)
    _layouts: tuple[Layout, Layout] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise TypeError(
                f"Sharding: mask is {brief(self.mask)}; a mask is a value such as rf.causal & rf.window(4095, 0)"
            )
        length = _count(self.length, "length")
        keys = length if self.keys is None else _count(self.keys, "keys")
        if keys != length and self.q_offset is None and self.mask != full:
            raise ValueError(
                f"Sharding: {length} queries and {keys} keys under {self.mask}; say where the first query stands: "
                f"q_offset={keys - length} aligns the ends, q_offset=0 the beginnings"
            )
        offset = 0 if self.q_offset is None else whole(self.q_offset, "Sharding: q_offset")
        if self.mask.length is not None and self.mask.length != keys:
            raise ValueError(f"Sharding: the documents of the mask cover {self.mask.length} positions, the keys {keys}")
        with said_by("Sharding"):
            group, degree = resolve_axes(self.group, self.heads_axis)
            rings = address(group)[1] // degree
        check = settle(self.check)
        layout = settle_layout(self.layout, length, keys, rings, self.mask)
        queries, held = lay_out(layout, length, rings), lay_out(layout, keys, rings)
        settled = dict(
            length=length,
            group=group,
            layout=layout,
            route=settle_route(self.route, queries, held, self.mask, offset, group),
            keys=keys,
            q_offset=offset,
            heads_axis=degree,
            check=check.name,
            heads_degree=degree,
            _asked_route=self.route,
            _layouts=(queries, held),
        )
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        # plain numbers and a tensor: what a captured graph reads of a sharding
        known = dict(
            local_length=queries.split(degree).tokens(self.rank),
            local_keys=held.split(degree).tokens(self.rank),
            rows=self.mask.rows,
            handle=recipes.add(self),
        )
        for name, value in known.items():
            object.__setattr__(self, name, value)

    @property
    def rank(self) -> int:
        return address(self.group)[0]

    @property
    def ranks(self) -> int:
        return address(self.group)[1]

    @property
    def ring_rank(self) -> int:
        """The rank whose plan this is, in its ring: the number of the shard that this rank holds some or all of."""
        return self.rank // self.heads_degree

    @property
    def ring_ranks(self) -> int:
        """Number of ranks of a ring, and of shards."""
        return self.ranks // self.heads_degree

    @cached_property
    def plan(self) -> Plan:
        """What this rank does in its ring."""
        return self._plan_of(self.ring_rank)

    @property
    def positions(self) -> Tensor:
        """The global positions that this rank holds, int64 ``[local_length]``, ascending."""
        return torch.tensor(self._held.positions(self.rank))

    @cached_property
    def most_tokens(self) -> int:
        """The most positions that any rank holds: what all ranks can agree on where their own numbers differ."""
        return max(map(self._held.tokens, range(self.ranks)))

    @property
    def key_sharding(self) -> Sharding:
        """How the keys are spread: this sharding itself, unless ``keys`` is another length."""
        if self.keys == self.length:
            return self
        given = (self.keys, self.group, full, self.layout, self.route)
        return Sharding(*given, heads_axis=self.heads_axis, check=self.check)  # type: ignore[arg-type]

    def with_mask(self, mask: Mask) -> Sharding:
        """The same layout under another mask, with a plan of its own. Equal to passing ``mask=`` to a call.

        A route of ``"auto"`` is chosen anew.
        """
        if not isinstance(mask, Mask):
            raise TypeError(
                f"with_mask: mask is {brief(mask)}; a mask is a value such as rf.causal & rf.window(4095, 0)"
            )
        if mask is self.mask or mask == self.mask:
            return self
        other = self._relatives.get(mask)
        if other is None:
            given = (self.length, self.group, mask, self.layout, self._asked_route)
            more = dict(keys=self.keys, q_offset=self.q_offset, heads_axis=self.heads_axis, check=self.check)
            other = Sharding(*given, **more)  # type: ignore[arg-type]
            if len(self._relatives) >= 8:  # documents change every batch
                self._relatives.pop(next(iter(self._relatives)))
            self._relatives[mask] = other
        return other

    def handle_under(self, mask: Mask) -> Tensor:
        """The handle of ``with_mask(mask)``. A captured graph finds it when it runs: another mask is another input."""
        if torch.compiler.is_compiling():
            return _find_under(self.handle, torch.from_numpy(mask.table))
        return self.with_mask(mask).handle

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of ``x``, whose ``dim`` is the whole sequence. Contiguous; differentiable."""
        dim = _dim(x, dim, "shard")
        if x.shape[dim] != self.length:
            raise ValueError(
                f"shard: x: dim {dim} of a tensor of shape {tuple(x.shape)}; this sharding has {self.length} positions"
                + ("" if self.keys == self.length else "; keys go through key_sharding.shard")
            )
        return x.index_select(dim, self.positions.to(x.device)).contiguous()

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """The whole sequence from every rank's part, on every rank. Collective.

        Differentiable: the gradient of a position is summed over the ranks' whole sequences, so a loss that every rank
        computes alike counts once per rank.
        """
        dim = _dim(x, dim, "unshard")
        if x.shape[dim] != self.local_length:
            raise ValueError(
                f"unshard: x: dim {dim} of a tensor of shape {tuple(x.shape)} should have this rank's positions; "
                f"this rank holds {self.local_length} of {self.length}"
            )
        whole: Tensor = _Unshard.apply(x, self, dim % x.ndim)
        return whole

    def __deepcopy__(self, memo: dict[int, object]) -> Sharding:
        return self  # nothing in it changes, and a process group cannot be copied

    def __reduce__(self) -> tuple[object, ...]:
        if not isinstance(self.group, tuple):
            raise TypeError(
                "a Sharding with a process group cannot be pickled; build it on each rank from the same arguments"
            )
        more = dict(keys=self.keys, q_offset=self.q_offset, heads_axis=self.heads_axis, check=self.check)
        make = partial(Sharding, **more)  # type: ignore[arg-type]
        return make, (self.length, self.group, self.mask, self.layout, self._asked_route)

    def bind(self, queries: int, keys: int) -> Bound:
        """What an operator needs to run. The numbers of local tokens were checked before."""
        return self._bound

    @property
    def over(self) -> bool:
        """Its group was destroyed."""
        return destroyed(self.group)

    def _plan_of(self, rank: int) -> Plan:
        queries, keys = self._layouts
        return derive(rank, queries, keys, self.mask, self.route, self.q_offset)

    @cached_property
    def _bound(self) -> Bound:
        ring, row = connect_axes(self.group, self.heads_degree)
        if row.ranks == 1:
            return Bound(self.plan, ring, None, self._watched)
        members = range(self.ring_rank * row.ranks, (self.ring_rank + 1) * row.ranks)
        queries, keys = (tuple(map(x.split(row.ranks).tokens, members)) for x in self._layouts)
        return Bound(self.plan, ring, Swap(row, queries, keys, rings=self.ring_ranks), self._watched)

    @cached_property
    def _watched(self) -> Watched | None:
        """Who watches this sharding's calls, if anybody does."""
        check = settle(self.check)
        if self.ranks == 1 or not check.compares:
            return None
        layout, route = self.layout, self.route
        assert not isinstance(route, str)
        terms = terms_of(self._layouts, layout, self.mask, route, self.q_offset or 0, self.heads_degree, check.name)
        return Watched(accord_of(self.group), check, terms)

    def _compare_part(self, x: Tensor, dim: int) -> None:
        """All ranks are to unshard parts that fit: a gather of others would end a process, or give noise."""
        if self._watched is None:
            return
        accord, check, terms = self._watched
        shape = (*x.shape[:dim], -1, *x.shape[dim + 1 :])
        texts = {"shape": str(list(shape)), "dim": str(dim), "dtype": str(x.dtype), "device": x.device.type}
        accord.enter("unshard", ("unshard", shape, dim, x.dtype, x.is_cuda), terms, texts, check.every_call)

    @property
    def _held(self) -> Layout:
        """What each rank holds, of all that there are."""
        return self._layouts[0].split(self.heads_degree)

    @cached_property
    def _relatives(self) -> dict[Mask, Sharding]:
        return {}


@torch.library.custom_op("ringflash::find_under", mutates_args=())
def _find_under(handle: Tensor, table: Tensor) -> Tensor:
    sharding = recipes[handle]
    assert isinstance(sharding, Sharding)
    return sharding.with_mask(Mask.read(table.numpy(force=True))).handle.clone()


@_find_under.register_fake
def _(handle: Tensor, table: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def plan(s: Sharding) -> Plan:
    """What this rank does under ``s``; print it.

    >>> print(plan(Sharding(8, (1, 2), layout="contiguous", route="ring")))
    rank 1 of 2: 4 queries, causal, ring
    step  computes with       sends onward  sends home
       0  shard 1 (10 cells)  -             -
       1  shard 0 (16 cells)  -             0 to rank 0
    """
    s = _sharding(s, "plan")
    return s.plan


def plans(s: Sharding) -> list[Plan]:
    """The plans of all ranks of a ring, for :func:`ringflash.verify` and pictures. Nothing is sent: each is derived here."""
    s = _sharding(s, "plans")
    return [s._plan_of(rank) for rank in range(s.ring_ranks)]


def _sharding(s: object, caller: str) -> Sharding:
    if not isinstance(s, Sharding):
        raise TypeError(f"{caller}: s is {brief(s)} of type {type(s).__name__}; an rf.Sharding is needed")
    return s


def _dim(x: Tensor, dim: int, caller: str) -> int:
    """``dim`` of a dense tensor, if it has that."""
    ndim = require_dense(x, f"{caller}: x").ndim
    dim = whole(dim, f"{caller}: dim")
    if not -ndim <= dim < ndim:
        raise ValueError(f"{caller}: dim is {dim}; a dim of a tensor x of shape {tuple(x.shape)} is needed")
    return dim


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, s: Sharding, dim: int) -> Tensor:
        ctx.sharding, ctx.dim = s, dim  # type: ignore[attr-defined]
        s._compare_part(x, dim)
        layout = s._held
        longest = max(map(layout.tokens, range(s.ranks)))
        padded = x.new_zeros(longest, *x.shape[:dim], *x.shape[dim + 1 :])  # gathers need equal shapes
        padded[: x.shape[dim]] = x.movedim(dim, 0)
        parts = [part[: layout.tokens(rank)] for rank, part in enumerate(connect_all(s.group).all_gather(padded))]
        order = np.concatenate([layout.positions(rank) for rank in range(s.ranks)])
        whole = torch.empty_like(torch.cat(parts))
        whole[torch.from_numpy(order).to(x.device)] = torch.cat(parts)
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        s, dim = ctx.sharding, ctx.dim  # type: ignore[attr-defined]
        connect_all(s.group).all_reduce(total)
        return s.shard(total, dim), None, None


def _count(value: object, name: str) -> int:
    return whole(value, f"Sharding: {name}", least=0, needed="a number of positions is 0 or more")
