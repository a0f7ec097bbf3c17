"""Tiny models, a batch, and both of them spread over the ranks of one process: what the tests beside this file share."""

from __future__ import annotations

import copy
from typing import Any

import models
import torch
import transformers
from torch import Tensor, nn

import ringflash as rf
import ringflash.integrations.transformers as integration

LENGTH = 96
BATCH = models.batch()
IDS = BATCH["input_ids"]
PACKED = torch.cat([torch.arange(n) for n in (30, 41, 25)])[None].expand(2, -1)
PADDED = torch.ones(2, LENGTH, dtype=torch.int64)
PADDED[0, -20:], PADDED[1, :9] = 0, 0
ROPE = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 70,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
    },
}


def built(name: str = "llama", **changes: Any) -> transformers.PreTrainedModel:
    return models.build(models.tiny(name, **changes))


def agrees(model: nn.Module, inputs: dict[str, Any] | None = None, **options: Any) -> float:
    """The worst figure of ``check`` over 2 ranks, zigzag unless said otherwise."""

    def one_rank(group: Any) -> float:
        given = {"layout": "zigzag", **options}
        return integration.check(model, group, BATCH if inputs is None else inputs, models.TOLERANCE, **given).worst

    with models.wide_softmax():
        return max(rf.local_world(2).run(one_rank))


def spread(
    model: nn.Module, ranks: int = 2, backward: bool = True, **inputs: Any
) -> list[tuple[float, Tensor, list[Tensor]]]:
    """Loss, whole logits and gradients of every rank."""

    def one_rank(group: Any) -> tuple[float, Tensor, list[Tensor]]:
        wrapped = rf.SequenceParallel(copy.deepcopy(model), group, layout="zigzag")
        out = wrapped(**({"labels": BATCH["labels"]} | inputs))
        out.loss.backward()
        whole = wrapped.sharding.unshard(out.logits.detach(), dim=1)
        return out.loss.item(), whole, [p.grad for p in wrapped.parameters() if p.grad is not None]

    return rf.local_world(ranks).run(one_rank)
