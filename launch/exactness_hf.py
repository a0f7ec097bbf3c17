"""Proof, on this machine, that a sharded step of a Transformers model is a step of one process.

The model and its weights are those of the run, so are the text, the grid, the layout, the engine, checkpointing and tiles.
One process computes the same packed rows, one by one, with Transformers' own attention, which learns of documents from
positions that begin anew. Compared are the loss and the raw gradient of every parameter (``exactness.py``). The control is
one process whose documents end where contiguous shards would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engines import share
from exactness import IGNORED, Exactness, distance, raw_gradients, report, still, worst
from finetune_options import FinetuneOptions
from packed_text import PackedText
from ranks import Ranks

LENGTH = 512  # of the rows that are compared, if those of the run are longer


def prove(ranks: Ranks, options: FinetuneOptions, lesson: PackedText, build: Callable[..., Any]) -> tuple[bool, str]:
    """Compare in float32; ``build`` makes the model of the run, or a bare one. Returns the verdict and the closing line."""
    length = min(options.seq_length, LENGTH)
    whole = lesson.samples(length, whole=True)
    torch.manual_seed(options.seed)
    alone = build(spread_over_ranks=False, attention="eager").eval()
    loss = _alone(alone, whole, length)
    expected = raw_gradients(alone)
    control = None
    if ranks.context > 1:
        alone.zero_grad(set_to_none=True)
        _alone(alone, whole, -(-length // ranks.context))
        control = worst(raw_gradients(alone), expected)[0]

    torch.manual_seed(options.seed)
    wrapped = build()
    engine = share(wrapped, ranks, options.engine, still, zero_stage=options.stage)
    engine.call.train()
    out = engine.forward(**lesson.samples(length, whole=False))
    engine.backward(out.loss)
    error, parameter = worst(dict(engine.gradients()), expected)
    errors = (ranks.largest(distance(out.loss, loss)), None, ranks.largest(error))
    return report(ranks, options, [Exactness(torch.float32, *errors, parameter, control)])


def _alone(model: nn.Module, batch: dict[str, Any], shard: int) -> Tensor:
    """The loss of all rows on one device, and gradients in the parameters; attention does not cross multiples of shard."""
    targets = batch["shift_labels"]
    count = (targets != IGNORED).sum()
    total = torch.zeros((), device=targets.device)
    here = torch.arange(targets.shape[1], device=targets.device)
    for row in range(len(targets)):
        document = here - batch["position_ids"][row]  # where it begins
        positions = here - torch.maximum(document, here // shard * shard)
        ids = batch["input_ids"][row : row + 1]
        logits = model(input_ids=ids, position_ids=positions[None], use_cache=False).logits
        loss = F.cross_entropy(logits[0].float(), targets[row], ignore_index=IGNORED, reduction="sum") / count
        loss.backward()
        total += loss.detach()
    return total
