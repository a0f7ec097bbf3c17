"""Who shares the weights: DDP, FSDP2 or DeepSpeed's ZeRO, behind one interface.

Every rank of the grid computes gradients from its own tokens. An engine averages them over all ranks, and keeps on each
rank the whole of a thing or a part of it:

                          parameters    gradients    optimizer state
    ddp                     whole         whole          whole
    fsdp                    part          part           part
    deepspeed  stage 1      whole         whole          part
               stage 2      whole         part           part
               stage 3      part          part           part

A loop, a check and a checkpoint must not depend on that. So an engine also gives back whole values by the names that the
bare model has, and takes them: what one engine has written on four ranks, another reads on three.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

Groups = list[dict[str, Any]]


class Engine:
    """A model and its optimizer, ready for steps: the common case, where tensors are whole or DTensors.

    ``call`` is what computes (``model`` inside wrappers); ``clip`` the largest gradient norm; ``autocast`` the device whose
    matrix products run in bfloat16, None for none.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, call: nn.Module, clip: float = 1.0, autocast: str | None = None
    ) -> None:
        self.model, self.optimizer, self.call = model, optimizer, call
        self._clip, self._autocast = clip, autocast

    def forward(self, **inputs: Any) -> Any:
        """The model's output for this rank's inputs; its loss averages over ranks to what is meant."""
        return self._compute(self.call, inputs)

    def replay(self, **inputs: Any) -> Any:
        """As ``forward``, for a backward in which no gradient is averaged or kept: ``nonfinite.locate``."""
        call = self.call.module if isinstance(self.call, DistributedDataParallel) else self.call
        return self._compute(call, inputs)

    def backward(self, loss: Tensor) -> None:
        """Make the gradients of a step, averaged over ranks."""
        loss.backward()

    def step(self) -> float:
        """Clip the gradients, take the optimizer's step, forget the gradients; returns their norm before clipping.

        Where the norm is not finite nothing changes, but that the gradients are forgotten.
        """
        norm = _whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)).item()
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _compute(self, call: nn.Module, inputs: dict[str, Any]) -> Any:
        low = self._autocast is not None
        with torch.autocast(self._autocast or "cpu", torch.bfloat16) if low else contextlib.nullcontext():
            return call(**inputs)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter whole, one after the other (a collective: every rank must take all of them)."""
        for name, parameter in self.model.named_parameters():
            yield name, _whole(parameter)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Each raw gradient whole, between ``backward`` and ``step`` (a collective)."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                yield name, _whole(parameter.grad)

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer remembers, whole, by "parameter name/kind" (a collective)."""
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{name}/{kind}", _whole(value)

    def groups(self) -> Groups:
        """The settings of the optimizer's groups (learning rate, decay, ...), without their parameters."""
        return [
            {k: v for k, v in group.items() if k in self.optimizer.defaults} for group in self.optimizer.param_groups
        ]

    def fill(self, parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor], groups: Groups) -> None:
        """Take whole values as ``parameters``, ``moments`` and ``groups`` gave them. Every rank passes the same."""
        mine = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(_spread_like(parameter, parameters[name]))
        for key, value in moments.items():
            name, _, kind = key.rpartition("/")
            parameter = mine[name]
            spread = _spread_like(parameter, value) if value.shape == parameter.shape else value.clone()
            self.optimizer.state[parameter][kind] = spread
        set_groups(self.optimizer, groups)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that repeat: what the outermost lists of modules hold.

    >>> [type(block).__name__ for block in blocks(nn.Sequential(nn.ModuleList([nn.Tanh(), nn.ReLU()]), nn.Linear(1, 1)))]
    ['Tanh', 'ReLU']
    """
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP2 has spread over ranks; any other as it is (a collective in the first case)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _spread_like(parameter: Tensor, value: Tensor) -> Tensor:
    """This rank's part of ``value``, laid out as ``parameter`` is. Every rank holds ``value``: nothing is sent."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    return value.to(parameter.device, copy=True)


def set_groups(optimizer: Optimizer, groups: Groups) -> None:
    """Give an optimizer's groups the settings that ``Engine.groups`` returned, read from JSON or not."""
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})  # JSON has no tuples
