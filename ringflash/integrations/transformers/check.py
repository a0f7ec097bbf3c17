"""Is this model right on a spread sequence? One batch on one device, and the same one over the ranks.

    model ── copy, attn_implementation="eager" ── whole batch ── logits, raw gradients ──┐
      └───── copy, rf.SequenceParallel ────────── shards ─────── logits, raw gradients ──┴── compare

Raw gradients, since clipping and Adam would hide a wrong factor.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ringflash.groups import Group, connect_all
from ringflash.integrations.transformers.refusals import text_config
from ringflash.partial import accumulation_dtype
from ringflash.sequence_parallel import SequenceParallel


@dataclass(frozen=True)
class Agreement:
    """The largest differences from one device, each relative to the largest value there; and where the worst gradient is.

    A parameter whose whole gradient is less than a thousandth of the model's largest is measured by that: some gradients are
    zero but for rounding (a bias of keys, which softmax does not see).
    """

    loss: float
    logits: float
    gradients: float
    worst_parameter: str

    @property
    def worst(self) -> float:
        return max(self.loss, self.logits, self.gradients)


def check(
    model: nn.Module,
    group: Group = None,
    inputs: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    reference: str = "eager",
    **options: Any,
) -> Agreement:
    """Compare ``model`` over ``group`` with itself on one device. Collective; every rank gets the same figures.

    ``model`` is a Transformers model (or PEFT around one) that is not wrapped yet; copies are compared, in evaluation mode,
    and it is left as it was. ``inputs`` are those of a call on the whole batch (default: two random rows of 96 tokens, partly
    without targets). Where tokens are padded no logits are compared; the target of a row's first real token after padding
    should be -100, since it is predicted from padding. ``options`` are those of ``rf.SequenceParallel``. ``reference``: the
    attention on one device, which may hold scores of length x length.

    Raises ``ValueError`` if a difference exceeds ``tolerance`` (default: 1000 roundings of the model's dtype, but not less
    than those of float32, in which eager attention takes its softmax).
    """
    if isinstance(model, SequenceParallel):
        raise TypeError("check: model is an rf.SequenceParallel; pass the model that it wraps, before it trains")
    spread = SequenceParallel(copy.deepcopy(model).eval(), group, **options)
    alone = copy.deepcopy(model).eval()
    inner = next(module for module in alone.modules() if isinstance(module, PreTrainedModel))
    inner.set_attn_implementation(reference)
    given = _random_batch(inner) if inputs is None else dict(inputs)
    if given.get("labels") is None:
        raise ValueError(f"check: inputs are {sorted(given)}; labels are needed, without which there are no gradients")
    want = alone(**given, use_cache=False)
    want.loss.backward()
    got = spread(**given)
    got.loss.backward()
    assert spread.sharding is not None
    found = _compare(got, want, spread, alone, spread.sharding.positions, given.get("attention_mask"))
    table = torch.tensor([found.loss, found.logits, found.gradients], dtype=torch.float64, device=want.loss.device)
    loss, logits, gradients = torch.stack(connect_all(spread.spread.group).all_gather(table)).amax(0).tolist()
    agreement = Agreement(loss, logits, gradients, found.worst_parameter)
    rounding = max(torch.finfo(dtype).eps for dtype in (next(model.parameters()).dtype, torch.float32))
    limit = 1000 * rounding if tolerance is None else tolerance
    if not agreement.worst <= limit:
        raise ValueError(
            f"check: {inner.config.model_type} differs from one device by more than {limit:.1e}: {agreement}"
        )
    return agreement


def _compare(
    got: Any, want: Any, spread: nn.Module, alone: nn.Module, positions: Tensor, padding: Tensor | None
) -> Agreement:
    gradients = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    mine = {name: p.grad for name, p in spread.named_parameters() if p.requires_grad}
    least = max([float(g.abs().amax()) for g in gradients.values() if g is not None], default=0.0) / 1000
    errors = {name: _error(mine[name], gradient, least=least) for name, gradient in gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    logits = 0.0
    if got.logits is not None:
        real = torch.ones(want.logits.shape[:2], device=want.logits.device) if padding is None else padding != 0
        whole = want.logits.detach().where(real[:, :, None].bool(), 0)  # what a padded row says is nobody's business
        here = positions.to(whole.device)
        logits = _error(got.logits.detach().where(real[:, here, None].bool(), 0), whole[:, here], whole)
    return Agreement(_error(got.loss, want.loss), logits, errors[worst], worst)


def _error(mine: Tensor | None, want: Tensor | None, scale: Tensor | None = None, least: float = 0.0) -> float:
    """The largest difference over the largest value of ``scale`` (default ``want``), or ``least`` if that is more."""
    if mine is None or want is None:
        return 0.0 if mine is want else float("inf")
    wide = accumulation_dtype(want.dtype)
    difference = (mine.detach().to(wide) - want.detach().to(wide)).abs()
    largest = float((want if scale is None else scale).detach().abs().amax())
    return float(difference.amax()) / max(largest, least, torch.finfo(wide).tiny) if difference.numel() else 0.0


def _random_batch(model: PreTrainedModel) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    ids = torch.randint(0, text_config(model).vocab_size, (2, 96), generator=make)
    labels = ids.clone()
    labels[0, :40] = -100
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "labels": labels.to(device)}
