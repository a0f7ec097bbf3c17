"""What is local to a token can be computed a few tokens at a time, and then its intermediate results never exist at once.

Attention aside, a model is local to a token. Long sequences run out of memory in two such places: the logits (32K tokens
of a vocabulary of 128K are 16 GiB in float32, several times over) and the widened middle of an MLP. Here both run tile by
tile, forward and backward; what a tile needs for its gradients is computed again when backward comes to it:

    tokens    ████████████████        hidden [b, s, dim], kept
    forward   ████ -> loss            logits of one tile, forgotten
                  ████ -> loss        of the next
    backward              ████ <-     computed once more, turned into gradients, forgotten

The head and the MLP are *called as modules*: biases, adapters, quantised weights and tied embeddings need no code here,
and the hooks of engines that gather parameters run as ever. Such an engine talks at every call. So ranks whose shards
differ by a token must agree on the number of calls: ``calls`` says it, and a ``Tiled`` that is told its sharding knows it.

Tiled logits: Wijmans et al. 2024 (arXiv 2411.09009); tiled MLPs: Bekman et al. 2025 (arXiv 2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ringflash.partial import accumulation_dtype
from ringflash.shard import Sharding


def tiled_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    tile: int,
    reduction: Literal["sum", "mean"] = "sum",
    ignore_index: int = -100,
    *,
    calls: int | None = None,
) -> Tensor:
    """Cross entropy of ``head(hidden)``, of which never more than ``tile`` tokens exist. 0-dim; float32 (float64 for float64).

    ``hidden [b, s, dim]``; ``labels [b, s]``, shifted already: position i holds the target of token i, ``ignore_index``
    where there is none. ``head`` maps ``[1, n, dim]`` to ``[1, n, vocab]`` and is called as often as needed, and again in
    backward. ``"mean"`` is over the tokens that have a target, 0 if there are none.

    ``calls``: how often to call ``head``; the tokens are then cut evenly. It must be equal on all ranks where a call of
    ``head`` communicates (FSDP, ZeRO-3), also for a rank that holds no token. Default: just enough, and at least once.

    The gradients of the head's parameters are added up in their own dtype, one tile after the other.

    >>> head, hidden, labels = nn.Linear(8, 32), torch.ones(2, 5, 8), torch.zeros(2, 5, dtype=torch.int64)
    >>> whole = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    >>> torch.allclose(tiled_cross_entropy(head, hidden, labels, tile=3), whole)
    True
    """
    if hidden.ndim != 3 or not hidden.is_floating_point():
        raise ValueError(
            f"tiled_cross_entropy: hidden is {tuple(hidden.shape)} of {hidden.dtype}; floats [batch, seq, dim] are needed"
        )
    if labels.shape != hidden.shape[:2] or labels.dtype != torch.int64:
        raise ValueError(
            f"tiled_cross_entropy: labels is {tuple(labels.shape)} of {labels.dtype}; hidden has shape "
            f"{tuple(hidden.shape)}, so int64 of shape {tuple(hidden.shape[:2])} is needed"
        )
    if reduction not in ("sum", "mean"):
        raise ValueError(f"tiled_cross_entropy: reduction is {reduction!r}; accepted are 'sum' and 'mean'")
    calls = _calls("tiled_cross_entropy", labels.numel(), tile, calls)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = _checked("tiled_cross_entropy: head", head(tokens), tokens)
        logits = logits.flatten(0, 1).to(accumulation_dtype(logits.dtype))
        return F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="sum")

    tiles = zip(_cut(hidden, calls), _cut(labels, calls), strict=True)
    total: Tensor = torch.stack([checkpoint(loss, *both, use_reentrant=False) for both in tiles]).sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum().clamp_min(1)


class Tiled(nn.Module):
    """``module``, a map ``[b, s, dim] -> [b, s, dim']`` that is local to a token, run on ``tile`` tokens at a time.

    What ``module`` keeps for backward is computed again there, tile by tile (inside a checkpoint for the third time). It sees
    ``[1, n, dim]`` with n up to ``tile``, over the rows of a batch. It takes and returns one tensor.

    It stands in the place of ``module``: the parameters, buffers and children of both are the same dictionaries, so the
    names in ``state_dict`` and ``named_parameters`` are unchanged, other attributes are those of ``module``, and what
    replaces a child of one replaces it in both. ``sharding`` is set by ``SequenceParallel``; with it, all ranks call
    ``module`` equally often.

    >>> mlp = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
    >>> x = torch.ones(2, 5, 4)
    >>> torch.allclose(Tiled(mlp, tile=3)(x), mlp(x)), list(Tiled(mlp, tile=3).state_dict()) == list(mlp.state_dict())
    (True, True)
    """

    sharding: Sharding | None

    def __init__(self, module: nn.Module, tile: int) -> None:
        super().__init__()
        if isinstance(module, Tiled):
            raise ValueError("Tiled: module is tiled already")
        _calls("Tiled", 1, tile, None)
        self.__dict__["inner"] = module  # past nn.Module, which would make it a child and its parameters' names longer
        for shared in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[shared] = module.__dict__[shared]
        self.training = module.training
        self.tile = tile
        self.most_tokens = 0
        self.sharding = None

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, dim] -> [b, s, dim']``, what ``module`` makes of ``x``."""
        if x.ndim != 3:
            raise ValueError(f"Tiled: input has shape {tuple(x.shape)}; [batch, seq, dim] is needed")
        needed = _calls("Tiled", max(x.shape[1], self.most_tokens) * x.shape[0], self.tile, None)

        def one(tokens: Tensor) -> Tensor:
            return _checked(f"Tiled: {type(self.inner).__name__}", self.inner(tokens), tokens)

        tiles = [checkpoint(one, tokens, use_reentrant=False) for tokens in _cut(x, needed)]
        out = torch.cat(tiles, dim=1)
        return out.view(*x.shape[:2], out.shape[-1])

    def train(self, mode: bool = True) -> Tiled:
        """Also tells ``module``, which is nobody's child."""
        self.inner.train(mode)
        self.training = mode
        return self

    def extra_repr(self) -> str:
        return f"{type(self.inner).__name__}, tile={self.tile}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "sharding":  # counted here, so that a captured forward reads a plain number
            self.__dict__["most_tokens"] = 0 if value is None else value.most_tokens
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "inner" not in self.__dict__:  # while it is being copied
                raise
            return getattr(self.__dict__["inner"], name)


def tile_modules(model: nn.Module, name: str, tile: int) -> int:
    """Put a ``Tiled`` in the place of every submodule of ``model`` that is called ``name``; returns how many there were.

    ``name`` is the last part of a path: ``"mlp"`` is ``layers.0.mlp``, ``layers.1.mlp`` and so on.

    >>> model = nn.ModuleDict({"first": nn.ModuleDict({"mlp": nn.Linear(4, 4)}), "mlp": nn.Linear(4, 4)})
    >>> tile_modules(model, "mlp", tile=1024)
    2
    """
    owners = [owner for owner in model.modules() if owner._modules.get(name) is not None]
    if not owners:
        names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        raise ValueError(
            f"tile_modules: no submodule of {type(model).__name__} is called {name!r}; there are "
            + ", ".join(sorted(x for x in names if x and not x.isdigit()))
        )
    for owner in owners:
        setattr(owner, name, Tiled(getattr(owner, name), tile))
    return len(owners)


def _calls(caller: str, tokens: int, tile: int, calls: int | None) -> int:
    """How many tiles there are to be, if that can be."""
    if not isinstance(tile, int) or tile < 1:
        raise ValueError(f"{caller}: tile is {tile!r}; a number of tokens is needed, 1 or more")
    needed = max(1, -(-tokens // tile))
    if calls is not None and calls < needed:
        raise ValueError(
            f"{caller}: calls is {calls}; {tokens} tokens in tiles of {tile} need {needed} calls, on the rank with most tokens"
        )
    return needed if calls is None else calls


def _cut(x: Tensor, calls: int) -> tuple[Tensor, ...]:
    """``[b, s, ...]`` as so many ``[1, n, ...]`` of about equal n; some are empty if there are fewer tokens than calls."""
    tokens = x.shape[0] * x.shape[1]
    sizes = [(i + 1) * tokens // calls - i * tokens // calls for i in range(calls)]
    return x.flatten(0, 1)[None].split(sizes, dim=1)


def _checked(what: str, out: Any, tokens: Tensor) -> Tensor:
    if not isinstance(out, Tensor):
        raise TypeError(f"{what} returned a {type(out).__name__}; a tensor is needed")
    if out.ndim != 3 or out.shape[:2] != tokens.shape[:2]:
        raise ValueError(
            f"{what} made {tuple(out.shape)} of {tuple(tokens.shape)}; one row per token is needed, "
            f"{(*tokens.shape[:2], '...')}"
        )
    return out
