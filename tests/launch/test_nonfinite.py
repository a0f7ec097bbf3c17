"""Where a NaN began is found: in the right module, in the right direction, and without a trace in the training."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import loop
from engines import Engine
from nonfinite import _first, locate, random_states, spoil
from options import parse
from run_options import RunError

ALONE: Any = SimpleNamespace(collect=lambda what, mine: [mine], size=1)


class Out(NamedTuple):
    """What a wrapped model returns."""

    loss: Tensor


class Model(nn.Module):
    """Two blocks with dropout, so that a replay needs the same random states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh())

    def forward(self, x: Tensor) -> Out:
        """A loss."""
        return Out(self.last(self.middle(self.first(x))).square().mean())


def spoilt(tensor: Tensor) -> Tensor:
    """With an infinity in its place [1, 2]."""
    out = tensor.clone()
    out[1, 2] = torch.inf
    return out


def in_output(model: Model) -> None:
    """Spoil what a module returns."""
    model.middle[0].register_forward_hook(lambda module, inputs, output: spoilt(output))


def in_gradient(model: Model) -> None:
    """Spoil the gradient that reaches a module."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(spoilt)

    model.middle[0].register_forward_hook(hook)


def in_weight(model: Model) -> None:
    """Spoil a parameter."""
    with torch.no_grad():
        model.middle[0].bias[1] = torch.nan


def in_weight_gradient(model: Model) -> None:
    """Spoil the gradient of a parameter alone."""
    model.last.weight.register_hook(lambda gradient: gradient * torch.nan)


@pytest.mark.parametrize(
    ("plant", "inputs", "sentence"),
    [
        (in_output, 1.0, r"rank 0 of 1 \(.*\), in forward, in the output of middle.0, at \[1, 2\]: inf; .* was finite"),
        (in_weight, 1.0, r"in forward, in the output of middle.0, at \[0, 1\]: nan; its parameter bias is not finite"),
        (in_gradient, 1.0, r"in backward, in the gradient that reaches the output of middle.0, at \[1, 2\]: inf"),
        (in_weight_gradient, 1.0, r"in backward, in the gradient of the parameter last.weight, at \[0, 0\]: nan"),
        (lambda model: None, float("nan"), r"in forward, in the output of first, .* was not, nor was what the model"),
        (lambda model: None, 1.0, "in a replay every activation and every gradient of every rank was finite"),
    ],
)
def test_what_began_it_is_named(plant: Callable[[Model], None], inputs: float, sentence: str) -> None:
    """The first module in the order of execution, not one of those to which it has spread."""
    model = Model()
    plant(model)
    found = locate(model, model, {"x": torch.full((2, 3), inputs)}, random_states(), ALONE)
    assert re.search(sentence, found), found


def test_a_replay_leaves_no_trace() -> None:
    """It draws the random numbers of the step again, and the next ones are those that would have come; no gradient is left."""
    model, seen = Model(), []
    model.middle[1].register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    states = random_states()
    model(torch.ones(2, 3))
    torch.rand(5)  # as a backward may
    expected = torch.Generator()
    expected.set_state(torch.get_rng_state())
    locate(model, model, {"x": torch.ones(2, 3)}, states, ALONE)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in (model, model.first, model.last))


def test_the_earliest_of_all_ranks_began_it() -> None:
    """Attention carries a NaN to ranks that did nothing wrong; backward runs from the last module to the first."""

    def among(*orders: int | None) -> Any:
        told = [[None if order is None else {"order": order}, "host"] for order in orders]
        return _first(SimpleNamespace(collect=lambda what, mine: told), None)  # type: ignore[arg-type]

    assert among(7, 3, None, 9)[1] == [[1, "host"]]
    assert among(4, 3, 3)[1] == [[1, "host"], [2, "host"]]
    assert among(-4, -9, None)[1] == [[1, "host"]]
    assert among(None, None) is None


@pytest.mark.parametrize("loss", [float("inf"), float("nan"), -float("inf")])
def test_a_loss_that_is_not_finite_is_not_learned_from(loss: float) -> None:
    """Its gradients may be finite, and then a norm would not show it; a finite loss keeps its gradient to the bit."""
    weight = torch.tensor([0.1], requires_grad=True)
    (gradient,) = torch.autograd.grad(spoil((weight * 3).sum() + loss), weight)
    assert gradient.isnan().all()
    (gradient,) = torch.autograd.grad(spoil((weight * 0.3).sum() * 0.7), weight)
    assert torch.equal(gradient, torch.autograd.grad((weight * 0.3).sum() * 0.7, weight)[0])


def test_a_step_with_such_a_norm_is_not_taken() -> None:
    """Weights, moments and their count of steps stay as they are to the bit, and the gradients are gone."""
    model = nn.Linear(3, 2)
    engine = Engine(model, torch.optim.AdamW(model.parameters()), model)
    engine.backward(model(torch.ones(1, 3)).sum())
    engine.step()
    before = [value.clone() for _, value in (*engine.parameters(), *engine.moments())]
    engine.backward(spoil(model(torch.ones(1, 3)).sum() * torch.inf))
    assert not torch.isfinite(torch.tensor(engine.step()))
    assert all(map(torch.equal, before, (value for _, value in (*engine.parameters(), *engine.moments()))))
    assert not dict(engine.gradients())


class Told:
    """A run that has made a bad step, as far as ``_not_taken`` looks at it."""

    def __init__(self, line: str, verdicts: list[bool]) -> None:
        self.step, self._skipped, self._in_a_row, self._progress = 4, 0, 0, None
        self.options, self.engine = parse(line.split()), SimpleNamespace(model=None, replay=None)
        self.said: list[str] = []
        self.ranks = SimpleNamespace(collect=lambda what, mine: verdicts, warn=self.said.append)

    def bad_step(self, agreed: bool = True) -> None:
        """Another one."""
        record = {"loss": float("nan"), "gradient_norm": float("nan")}
        loop.Run._not_taken(self, record, {}, None, agreed)  # type: ignore[arg-type]


def test_batches_are_left_out_up_to_some_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose every batch is bad learns nothing, and must not look as if it did; without being asked none is left out."""
    monkeypatch.setattr(loop, "locate", lambda *arguments: "it began on rank 3")
    run = Told("--on-nonfinite skip", [])
    for number in range(loop.SKIPS):
        run.bad_step()
        assert f"it began on rank 3. The batch is left out ({number + 1} in a row" in run.said[-1]
    with pytest.raises(RunError, match="6 in a row"):
        run.bad_step()
    with pytest.raises(RunError, match=r"step 5: loss nan.*it began on rank 3\. The step was not taken"):
        Told("", []).bad_step()


def test_ranks_that_disagree_about_an_average_end_the_run() -> None:
    """All have the same gradient after an average; where not, weights differ from now on, and skipping would hide it."""
    with pytest.raises(RunError, match=r"not finite on rank\(s\) \[1\] and finite on the others.*has failed"):
        Told("--on-nonfinite skip", [True, False, True]).bad_step(agreed=False)
