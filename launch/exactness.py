"""Proof, on this machine and in seconds, that a sharded step is a step of one process.

The same small model sees the same samples twice: whole, on this device alone, and spread over all ranks exactly as
the training will be (data x context grid, layout, route, shared heads, engine). Compared are the loss, the logits and
the *raw* gradient of every parameter. Raw, because clipping and Adam hide a gradient that is wrong by a factor; of every
parameter, because a mean hides a wrong one.

The samples are unkind: an odd length, so that shards are uneven; a row with three targets only, so that ranks have very
different numbers of them, and some none.

A check that cannot fail proves nothing. So a control computes what shards would give if each attended to itself alone,
and prints how far off that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ringflash as rf
from byte_transformer import VOCABULARY, ByteTransformer, ModelConfig
from options import Options
from ranks import Ranks
from ringflash.mask import Mask
from run_options import RunOptions
from weights import comparable, share, spread

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
CONFIG = ModelConfig(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, hidden=48)
IGNORED = -100
Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Exactness:
    """Relative errors of one comparison, each the worst over ranks; ``parameter`` has the worst gradient.

    ``logits`` and ``control`` are None where there are none to compare.
    """

    dtype: torch.dtype
    loss: float
    logits: float | None
    gradients: float
    parameter: str
    control: float | None

    @property
    def exact(self) -> bool:
        """True if every error is within the tolerance of the dtype (a NaN is not)."""
        errors = (self.loss, self.logits or 0.0, self.gradients)
        return all(error <= TOLERANCES[self.dtype] for error in errors)


def prove(ranks: Ranks, options: Options) -> tuple[bool, str]:
    """Compare in float64 and in float32, where the engine knows both; return the verdict and the closing line."""
    return report(ranks, options, [compare(ranks, options, dtype) for dtype in comparable(options.engine)])


def report(ranks: Ranks, options: RunOptions, results: Sequence[Exactness]) -> tuple[bool, str]:
    """Print one line per quantity; return whether all is exact, and the closing line of the run."""
    for result in results:
        kind = f"check {_name(result.dtype)}"
        ranks.say(f"{kind}  loss           relative error {result.loss:.1e}")
        if result.logits is not None:
            ranks.say(f"{kind}  logits         relative error {result.logits:.1e}")
        ranks.say(f"{kind}  raw gradients  relative error {result.gradients:.1e} (worst: {result.parameter})")
        if result.control is not None:
            ranks.say(f"{kind}  control: without the ring gradients would be {result.control:.1e} off")
    exact = all(result.exact for result in results)
    figures = "; ".join(
        f"{_name(result.dtype)} loss {result.loss:.1e}, raw gradients {result.gradients:.1e}, "
        f"allowed {TOLERANCES[result.dtype]:.0e}"
        for result in results
    )
    grid = f"data {ranks.data} x context {ranks.context}, {options.engine_name}"
    place = f"{ranks.size} rank(s) ({grid}) against one process"
    return exact, f"exactness: {'equal' if exact else 'NOT EQUAL'}, {place}, worst relative errors: {figures}"


def compare(ranks: Ranks, options: Options, dtype: torch.dtype) -> Exactness:
    """One step of one process against the same step over all ranks (every rank must call it)."""
    length = min(160, 4096 // ranks.context) * ranks.context + (5 if options.attention == "ring" else 0)
    mask = options.mask(length, ranks.context)
    config = replace(CONFIG, heads=lcm(CONFIG.heads, options.heads_degree))
    inputs, targets = _samples(2 * ranks.data, length, ranks.device)
    reference = _model(config, mask, ranks.device, dtype)
    logits, loss = _alone(reference, inputs, targets)
    expected = raw_gradients(reference)

    wrapped = spread(_model(config, None, ranks.device, dtype), ranks, mask, options.placement)
    engine = share(wrapped, ranks, options.engine, still, zero_stage=options.stage)
    mine = ranks.rows(0, len(inputs))
    out = engine.forward(input_ids=inputs[mine.start : mine.stop], shift_labels=targets[mine.start : mine.stop])
    engine.backward(out.loss)
    error, parameter = worst(dict(engine.gradients()), expected)
    assert wrapped.sharding is not None  # the forward has set it
    unsharded = wrapped.sharding.unshard(out.logits.detach(), dim=1)
    return Exactness(
        dtype,
        ranks.largest(distance(out.loss, loss)),
        ranks.largest(distance(unsharded, logits[mine.start : mine.stop])),
        ranks.largest(error),
        parameter,
        _control(ranks, options, config, mask, (inputs, targets), dtype, expected),
    )


def _control(
    ranks: Ranks,
    options: Options,
    config: ModelConfig,
    mask: Mask,
    samples: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    expected: Gradients,
) -> float | None:
    if options.attention == "local" or ranks.context == 1:
        return None
    shard = -(-samples[0].shape[1] // ranks.context)
    lonely = _model(config, mask & rf.chunks(shard), ranks.device, dtype)
    _alone(lonely, *samples)
    return worst(raw_gradients(lonely), expected)[0]


def _model(config: ModelConfig, mask: Mask | None, device: torch.device, dtype: torch.dtype) -> ByteTransformer:
    """The same weights at every call; drawn without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return ByteTransformer(config, mask).to(device, dtype)


def _samples(rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    stream = torch.randint(VOCABULARY, (rows, length + 1), generator=random)
    targets = stream[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=random) < 0.2] = IGNORED
    targets[0, 3:] = IGNORED
    return stream[:, :-1].to(device), targets.to(device)


def _alone(model: ByteTransformer, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and loss of one device, and gradients in the parameters; nothing but PyTorch beside the model."""
    logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    loss.backward()
    return logits.detach(), loss.detach()


def still(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer for an engine that is to compute gradients and take no step."""
    return torch.optim.AdamW(model.parameters(), lr=0.0)


def raw_gradients(model: nn.Module) -> Gradients:
    """By name, of a model that no engine shares."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def worst(gradients: Gradients, expected: Gradients) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient, and the name of the parameter."""
    lost = {name: torch.full_like(expected[name], torch.nan) for name in expected.keys() - gradients.keys()}
    errors = {name: distance({**gradients, **lost}[name], expected[name]) for name in expected}
    name = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return errors[name], name


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
