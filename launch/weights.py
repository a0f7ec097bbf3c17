"""How a model is laid over the grid of ranks: its sequences are spread, its weights shared.

    wrapped = spread(model, ranks, mask, placement)        a sequence over the ranks of a row, a loss over all
    engine = share(wrapped, ranks, "fsdp", optimizer)      weights over all ranks, by the engine of that name

Outside of this file and the options nobody asks which engine it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import ringflash as rf
from engines import Engine, blocks
from ranks import Ranks
from ringflash.mask import Mask
from run_options import ENGINES, Placement


def spread(model: nn.Module, ranks: Ranks, mask: Mask, placement: Placement, **more: Any) -> rf.SequenceParallel:
    """Shard the sequences of a model over ``context``. The loss is the mean over all targets of the grid.

    ``gradients="engine"`` scales it so that an engine's average over the grid is its gradient. ``more`` goes to
    ``rf.SequenceParallel``.
    """
    return rf.SequenceParallel(
        model,
        ranks.grid["context"],
        mask=mask,
        layout=placement.layout,
        gradients="engine",
        tokens_group=ranks.everyone.get_group(),
        route=placement.route,
        heads_axis=placement.heads_degree,
        **more,
    )


def share(
    wrapped: rf.SequenceParallel,
    ranks: Ranks,
    engine: str,
    optimizer: Callable[[nn.Module], Optimizer],
    *,
    zero_stage: int = 2,
    clip: float = 1.0,
    autocast: bool = False,
) -> Engine:
    """Share the weights of a model that ``spread`` has wrapped over all ranks; ``optimizer`` makes one for the bare model.

    FSDP2 and ZeRO change the model in place.
    """
    if engine not in ENGINES:
        raise ValueError(f"share: engine is {engine!r}; accepted are {', '.join(ENGINES)}")
    place = ranks.device.type if autocast else None
    if engine == "deepspeed":
        from zero import Zero  # DeepSpeed is an extra

        return Zero(wrapped, ranks, optimizer, stage=zero_stage, clip=clip, autocast=autocast)
    model = wrapped.module
    if engine == "fsdp":
        for block in blocks(model):
            fully_shard(block, mesh=ranks.everyone)
        fully_shard(model, mesh=ranks.everyone)
        return Engine(model, optimizer(model), wrapped, clip, place)
    call = DistributedDataParallel(wrapped, process_group=ranks.everyone.get_group())
    return Engine(model, optimizer(model), call, clip, place)


def comparable(engine: str) -> tuple[torch.dtype, ...]:
    """In which dtypes an engine's gradients can be compared: DeepSpeed returns all of them in float32."""
    return (torch.float32,) if engine == "deepspeed" else (torch.float64, torch.float32)
