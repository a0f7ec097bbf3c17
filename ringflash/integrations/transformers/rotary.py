"""Rotary frequencies that depend on the longest position: dynamic NTK scaling and LongRoPE.

They look at ``max(position_ids)`` in every forward. A rank that holds the beginning of a sequence would see a short one,
and turn its queries by other angles than the next rank turns its keys. So each rank is shown one position more, the last
of the whole sequence, and what is computed for it is taken off again. Nothing waits for the device.

    position_ids  [.., s]   ->   [.., s + 1]   ->   rotary   ->   cos, sin [.., s + 1, d]   ->   [.., s, d]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ringflash.integrations.transformers.attention import TOLD


def asks_for_the_last_position(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or "longrope" in kind) for kind in named)


def show_the_last_position(module: nn.Module) -> None:
    """Hook a rotary module, once."""
    if "ringflash_shows" not in vars(module):
        vars(module)["ringflash_shows"] = True
        module.register_forward_pre_hook(_append, with_kwargs=True)
        module.register_forward_hook(_strip)


def _append(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    last = vars(module)[TOLD].last
    if last is None:
        return None
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": _longer(kwargs["position_ids"], last)}
    return (args[0], _longer(args[1], last), *args[2:]), kwargs


def _longer(position_ids: Tensor, last: Tensor) -> Tensor:
    more = last.to(position_ids).expand(*position_ids.shape[:-1], 1)
    return torch.cat([position_ids, more], dim=-1)


def _strip(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if vars(module)[TOLD].last is None:
        return None
    return output[..., :-1, :] if isinstance(output, Tensor) else tuple(x[..., :-1, :] for x in output)
