"""One immutable object says how a sequence is spread over ranks. Every rank builds it alone.

A sharding is a length, a group, a mask, a layout and a route. From these each rank derives what it holds and does; equal
arguments give equal answers everywhere, so nothing needs to be sent to agree.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from ringflash import layout as layouts
from ringflash.layout import LAYOUTS, Layout
from ringflash.mask import Mask, causal, full
from ringflash.plan import Plan, derive
from ringflash.recipe import recipes
from ringflash.route import ROUTES, Route
from ringflash.wire import Group, Wire, address, connect, resolve


@dataclass(frozen=True)
class Sharding:
    """How ``length`` positions are spread over the ranks of ``group``, and who may see whom.

    ``group``: a ProcessGroup, a DeviceMesh with one axis, a group of ``local_world``, ``(rank, ranks)`` to plan only, or
    None for the default group. ``layout``: ``"contiguous"``, ``"zigzag"``, ``"striped"``, ``"auto"`` or a ``Layout``;
    ``route``: ``"ring"``, ``"auto"`` or a route. ``auto`` depends on nothing that differs between ranks.
    ``keys``: number of keys if they are not the queries' own (cross-attention, a cached prefix); ``q_offset`` is then the
    global position of the first query, and required unless the mask is full.

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

    local_length: int = field(init=False, compare=False, repr=False)
    """Number of positions that this rank holds."""
    local_keys: int = field(init=False, compare=False, repr=False)
    """Number of keys that this rank holds."""
    rows: int = field(init=False, compare=False, repr=False)
    """Number of batch rows that the mask tells apart; 1 if all rows share it."""
    handle: Tensor = field(init=False, compare=False, repr=False)
    """What operators know this sharding by."""

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise TypeError(
                f"Sharding: mask is {self.mask!r}; a mask is a value such as rf.causal & rf.window(4095, 0)"
            )
        length, keys = _count(self.length, "length"), _count(self.length if self.keys is None else self.keys, "keys")
        if keys != length and self.q_offset is None and self.mask != full:
            raise ValueError(
                f"Sharding: {length} queries and {keys} keys under {self.mask}; say where the first query stands: "
                f"q_offset={keys - length} aligns the ends, q_offset=0 the beginnings"
            )
        offset = operator.index(self.q_offset or 0)
        if self.mask.length is not None and self.mask.length != keys:
            raise ValueError(f"Sharding: the documents of the mask cover {self.mask.length} positions, the keys {keys}")
        group = resolve(self.group)
        ranks = address(group)[1]
        chosen = _settle_layout(self.layout, length, keys, ranks, self.mask)
        route = _settle_route(self.route)
        settled = dict(length=length, group=group, layout=chosen, route=route, keys=keys, q_offset=offset)
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        queries, held = self._layouts
        # plain numbers and a tensor: what a captured graph reads of a sharding
        known = dict(
            local_length=queries.tokens(self.rank),
            local_keys=held.tokens(self.rank),
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
    def wire(self) -> Wire:
        return connect(self.group)

    @cached_property
    def plan(self) -> Plan:
        """What this rank does."""
        return self._plan_of(self.rank)

    @property
    def positions(self) -> Tensor:
        """The global positions that this rank holds, int64 ``[local_length]``, ascending."""
        return torch.tensor(self.plan.queries.positions(self.rank))

    @property
    def key_sharding(self) -> Sharding:
        """How the keys are spread: this sharding itself, unless ``keys`` is another length."""
        if self.keys == self.length:
            return self
        return Sharding(self.keys, self.group, full, self.layout, self.route)  # type: ignore[arg-type]

    def with_mask(self, mask: Mask) -> Sharding:
        """The same layout under another mask, with a plan of its own. Equal to passing ``mask=`` to a call."""
        if mask == self.mask:
            return self
        other = self._relatives.get(mask)
        if other is None:
            other = replace(self, mask=mask)
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
        if not -x.ndim <= dim < x.ndim or x.shape[dim] != self.length:
            raise ValueError(
                f"shard: dim {dim} of a tensor of shape {tuple(x.shape)}; this sharding has {self.length} positions"
                + ("" if self.keys == self.length else "; keys go through key_sharding.shard")
            )
        return x.index_select(dim, self.positions.to(x.device)).contiguous()

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """The whole sequence from every rank's part, on every rank. Collective.

        Differentiable: the gradient of a position is summed over the ranks' whole sequences, so a loss that every rank
        computes alike counts once per rank.
        """
        if x.shape[dim] != self.local_length:
            raise ValueError(
                f"unshard: dim {dim} of a tensor of shape {tuple(x.shape)} has {x.shape[dim]} positions; this rank "
                f"holds {self.local_length} of {self.length}"
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
        make = partial(Sharding, keys=self.keys, q_offset=self.q_offset)
        return make, (self.length, self.group, self.mask, self.layout, self.route)

    def bind(self, queries: int, keys: int) -> tuple[Plan, Wire]:
        """What an operator needs to run: the plan and the wire. The numbers of local tokens were checked before."""
        return self.plan, self.wire

    def _plan_of(self, rank: int) -> Plan:
        queries, keys = self._layouts
        return derive(rank, queries, keys, self.mask, self.route, self.q_offset)  # type: ignore[arg-type]

    @cached_property
    def _layouts(self) -> tuple[Layout, Layout]:
        if isinstance(self.layout, Layout):
            return self.layout, self.layout
        return _laid_out(self.layout, self.length, self.ranks), _laid_out(self.layout, self.keys, self.ranks)

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


def _settle_layout(wanted: str | Layout, length: int, keys: int, ranks: int, mask: Mask) -> str | Layout:
    """The name of a layout with "auto" decided, or a layout that fits."""
    if isinstance(wanted, Layout):
        wanted.check()
        if (wanted.length, wanted.ranks) != (length, ranks) or keys != length:
            raise ValueError(
                f"Sharding: layout has {wanted.length} positions on {wanted.ranks} ranks; needed are {length} "
                f"on {ranks}" + ("" if keys == length else f", and {keys} keys can only be laid out by name")
            )
        return wanted
    if wanted == "auto":
        return layouts.choose(length, ranks, mask)
    if wanted not in LAYOUTS:
        raise ValueError(f"Sharding: layout is {wanted!r}; accepted are 'auto', {', '.join(map(repr, LAYOUTS))}")
    return wanted


def _settle_route(wanted: str | Route) -> Route:
    if not isinstance(wanted, str):
        return wanted
    if wanted != "auto" and wanted not in ROUTES:
        raise ValueError(f"Sharding: route is {wanted!r}; accepted are 'auto', {', '.join(map(repr, ROUTES))}")
    return ROUTES["ring" if wanted == "auto" else wanted]


@lru_cache(maxsize=128)
def _laid_out(name: str, length: int, ranks: int) -> Layout:
    return LAYOUTS[name](length, ranks)


def plan(s: Sharding) -> Plan:
    """What this rank does under ``s``; print it.

    >>> print(plan(Sharding(8, (1, 2), layout="contiguous")))
    rank 1 of 2: 4 queries, causal, Ring()
    step  computes with               sends onward      sends home
       0  shard 1 (10 cells)          -                 -
       1  shard 0 (16 cells)          -                 0 to rank 0
    """
    return s.plan


def plans(s: Sharding) -> list[Plan]:
    """The plans of all ranks, for :func:`ringflash.verify` and pictures. Nothing is sent: each is derived here."""
    return [s._plan_of(rank) for rank in range(s.ranks)]


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, s: Sharding, dim: int) -> Tensor:
        ctx.sharding, ctx.dim = s, dim  # type: ignore[attr-defined]
        layout = s.plan.queries
        longest = max(map(layout.tokens, range(s.ranks)))
        padded = x.new_zeros(longest, *x.shape[:dim], *x.shape[dim + 1 :])  # gathers need equal shapes
        padded[: x.shape[dim]] = x.movedim(dim, 0)
        parts = [part[: layout.tokens(rank)] for rank, part in enumerate(s.wire.all_gather(padded))]
        order = np.concatenate([layout.positions(rank) for rank in range(s.ranks)])
        whole = torch.empty_like(torch.cat(parts))
        whole[torch.from_numpy(order).to(x.device)] = torch.cat(parts)
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        ctx.sharding.wire.all_reduce(total)  # type: ignore[attr-defined]
        return ctx.sharding.shard(total, ctx.dim), None, None  # type: ignore[attr-defined]


def _count(value: object, name: str) -> int:
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"Sharding: {name} is {value!r}; a number of positions is needed") from None
    if count < 0:
        raise ValueError(f"Sharding: {name} is {count}; a number of positions is 0 or more")
    return count
