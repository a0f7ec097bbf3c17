"""Where a NaN began: the step that went wrong is replayed once, with every module watched, on every rank.

Watching costs a synchronisation per module, too much for every step. But a step whose gradients are not finite is not taken,
so the weights are still there, and with the same inputs and random states it goes wrong again:

    forward     embedding . block 0 . norm . attention X block 1 X ...      the first X, in the order of execution
    backward    ... X block 0 X attention X . norm . loss                   if there is none: the first from the loss on

Attention carries a NaN from one rank to the others, a reduction to all. But ranks execute the same modules in the same order,
so what comes first in that order, on whichever rank, is where it began.

The replay of a backward asks for the gradients of activations and of whole parameters alone: nothing is accumulated, so no
engine reduces anything, and nothing has to be undone.
"""

from __future__ import annotations

import contextlib
import random
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ranks import Ranks

Finding = dict[str, Any]


def random_states() -> tuple[Any, ...]:
    """The states of all random generators that a step may draw from; for ``locate``."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def spoil(loss: Tensor) -> Tensor:
    """The same loss; if it is not finite, neither will any gradient be (an infinite loss may have finite ones)."""
    return loss * (loss.detach() * 0 + 1)


def locate(
    model: nn.Module, call: Callable[..., Any], inputs: Mapping[str, Any], states: tuple[Any, ...], ranks: Ranks
) -> str:
    """Replay a step and say where its first value that is not finite came from; the same on every rank, which all must call it.

    ``call(**inputs)`` is the forward of ``model`` in whatever is wrapped around it, ``states`` what ``random_states`` returned
    before the step. Random states and gradients are left as they are.
    """
    now = random_states()
    _restore(states)
    try:
        with _eagerly(), _Watch(model).watching() as watch:
            loss = call(**inputs).loss
            found = _first(ranks, watch.found)
            if found is None:
                watch.backward(loss)
                found = _first(ranks, watch.found)
    finally:
        _restore(now)
    if found is None:
        return (
            "in a replay every activation and every gradient of every rank was finite: a sum over ranks or the norm has "
            "overflowed, or a device made an error that it did not repeat"
        )
    return _describe(*found, ranks.size)


class _Watch:
    """The first tensor of this rank that is not finite, once in forward, and if there is none once in backward."""

    def __init__(self, model: nn.Module) -> None:
        self.found: Finding | None = None
        self._names = {module: name or "the model itself" for name, module in model.named_modules()}
        self._parameters = {
            name: p for name, p in model.named_parameters() if not isinstance(p, DTensor) and not hasattr(p, "ds_id")
        }
        self._order = 0
        self._forward = True
        self._source: Tensor | None = None  # the first activation: every later one is on the way from the loss to it

    @contextlib.contextmanager
    def watching(self) -> Iterator[_Watch]:
        hooks = [module.register_forward_hook(self._look, with_kwargs=True) for module in self._names]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def backward(self, loss: Tensor) -> None:
        """Look at gradients, from the loss on, and at what they add up to in parameters that are whole on this rank."""
        self._forward = False  # checkpointed layers compute again
        learning = {name: p for name, p in self._parameters.items() if p.requires_grad}
        wanted = [*learning.values(), *([] if self._source is None else [self._source])]
        if not wanted:
            return
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        for name, gradient in zip(learning, gradients, strict=False):
            if gradient is not None:
                self._note(gradient, 1, where=f"in backward, in the gradient of the parameter {name}")

    def _look(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._forward:
            return
        self._order += 1
        name, order = self._names[module], self._order
        for tensor in _tensors(output):
            if self.found is None and self._note(tensor, order, where=f"in forward, in the output of {name}"):
                self._explain(module, [*_tensors(args), *_tensors(kwargs)])
            if tensor.requires_grad:
                self._source = tensor if self._source is None else self._source
                tensor.register_hook(self._looks_back(name, order))

    def _looks_back(self, name: str, order: int) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            where = f"in backward, in the gradient that reaches the output of {name}"
            self._note(gradient, -order, where=where)

        return look

    def _note(self, tensor: Tensor, order: int, where: str) -> bool:
        if self.found is not None or bool(torch.isfinite(tensor).all()):
            return False
        index = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        self.found = dict(order=order, where=where, index=index, value=str(tensor[tuple(index)].item()))
        return True

    def _explain(self, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        assert self.found is not None
        self.found["inputs"] = all(bool(torch.isfinite(tensor).all()) for tensor in inputs)
        for name, parameter in module.named_parameters(recurse=False):
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if not bool(torch.isfinite(local).all()):
                self.found["parameter"] = name


def _eagerly() -> contextlib.AbstractContextManager[Any]:
    """Compiled layers call no hooks."""
    compiled = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def _first(ranks: Ranks, mine: Finding | None) -> tuple[Finding, list[list[Any]]] | None:
    """The finding that is first in the order of execution, and the [rank, host] of all ranks that have it."""
    told = ranks.collect("where a value is not finite", [mine, socket.gethostname()])
    findings = [(found, [rank, host]) for rank, (found, host) in enumerate(told) if found is not None]
    if not findings:
        return None
    order = min(found["order"] for found, _ in findings)
    first = [(found, who) for found, who in findings if found["order"] == order]
    return first[0][0], [who for _, who in first]


def _describe(found: Finding, who: list[list[Any]], size: int) -> str:
    rank, host = who[0]
    others = f" (and on {len(who) - 1} more: {', '.join(str(other) for other, _ in who[1:9])})" if who[1:] else ""
    text = (
        f"it began on rank {rank} of {size} ({host}){others}, {found['where']}, at {found['index']}: {found['value']}"
    )
    if "parameter" in found:
        return f"{text}; its parameter {found['parameter']} is not finite"
    if "inputs" in found:
        return (
            f"{text}; what went into it was {'finite' if found['inputs'] else 'not, nor was what the model was given'}"
        )
    return text


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in an argument or a result."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _restore(states: tuple[Any, ...]) -> None:
    cpu, cuda, numpy, python = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    np.random.set_state(numpy)
    random.setstate(python)
