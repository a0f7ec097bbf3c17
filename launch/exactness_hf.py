"""Proof, on this machine, that a sharded step of a Transformers model is a step of one process.

The model and its weights are those of the run, so are the text, the grid, the layout, the engine, checkpointing and tiles.
One process computes the documents of the same packed rows, one by one, with Transformers' own attention: nothing can see
what is not there. Compared are the loss and the raw gradient of every parameter (``exactness.py``), without dropout. The
control is one process whose documents end where contiguous shards would.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exactness import IGNORED, Exactness, distance, raw_gradients, report, still, worst
from finetune_options import FinetuneOptions
from packed_text import PackedText
from ranks import Ranks
from weights import share

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
    count = (batch["shift_labels"] != IGNORED).sum()
    total = torch.zeros((), device=count.device)
    here = torch.arange(batch["input_ids"].shape[1], device=count.device)
    for ids, positions, targets in zip(batch["input_ids"], batch["position_ids"], batch["shift_labels"], strict=True):
        begins = (positions == 0) | (here % shard == 0)
        for start, end in pairwise([*begins.nonzero().flatten().tolist(), len(here)]):
            logits = model(input_ids=ids[None, start:end], use_cache=False).logits[0]
            loss = F.cross_entropy(logits.float(), targets[start:end], ignore_index=IGNORED, reduction="sum") / count
            loss.backward()
            total += loss.detach()
    return total
