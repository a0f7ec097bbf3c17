"""Summing a model's gradients over ranks, once at the end of every backward.

A gradient that was there before (an earlier micro-batch) has been summed already and must not be summed again. So while a
backward runs, earlier gradients are set aside; when it is over, what is new is summed over the ranks and added to them.

    hook of p            p.grad (earlier) is set aside, p.grad = None
    torch accumulates    p.grad = new
    end of backward      new is summed over ranks, in one buffer per dtype;  p.grad = earlier + sum, in place
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ringflash.wire import Wire


class GradientSum:
    """Sums the gradients of ``model`` over ``wire``. Ranks reduce in the order of the parameters.

    A parameter that only some ranks used counts as zero on the others; one that nobody used keeps no gradient.
    ``torch.autograd.grad`` accumulates nothing, so nothing is summed for it. Hooks of others that run while a backward is
    under way see this rank's share.
    """

    def __init__(self, model: nn.Module, wire: Wire) -> None:
        self._model, self._wire = model, wire
        self._parameters: list[nn.Parameter] = []
        self._hooks: list[RemovableHandle] = []
        self._earlier: dict[int, Tensor | None] = {}
        self._fresh: set[int] = set()
        self._backward: int | None = None  # torch's number of the backward under way

    def watch(self) -> None:
        """Before a forward: hook the parameters that the model has now, if they are not those it had."""
        self._restore()  # an exception may have ended the last backward before its time
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        if self._wire.ranks == 1 or [id(p) for p in parameters] == [id(p) for p in self._parameters]:
            return
        for hook in self._hooks:
            hook.remove()
        self._parameters, self._hooks = parameters, []
        for index, parameter in enumerate(parameters):
            self._hooks += [
                parameter.register_hook(lambda gradient, index=index: self._set_aside(index, gradient)),
                parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._fresh.add(index)),
            ]

    def _set_aside(self, index: int, gradient: Tensor) -> None:
        if gradient.is_sparse:
            raise ValueError("SequenceParallel: a gradient is sparse; make the embedding with sparse=False")
        backward = torch._C._current_graph_task_id()
        if self._backward != backward:
            self._restore()
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self._reduce)
        if index not in self._earlier:
            self._earlier[index] = self._parameters[index].grad
            self._parameters[index].grad = None

    def _restore(self) -> None:
        """Put back what was set aside for gradients that never came."""
        for index, gradient in self._earlier.items():
            if index not in self._fresh:
                self._parameters[index].grad = gradient
        self._earlier, self._fresh, self._backward = {}, set(), None

    @torch.no_grad()
    def _reduce(self) -> None:
        earlier, fresh = self._earlier, self._fresh
        self._restore()
        used = torch.tensor(
            [float(i in fresh) for i in range(len(self._parameters))], device=self._parameters[0].device
        )
        self._wire.all_reduce(used)
        somewhere = [i for i, ranks in enumerate(used.tolist()) if ranks]
        for kind in dict.fromkeys((p.dtype, p.device) for p in self._parameters):
            mine = [i for i in somewhere if (self._parameters[i].dtype, self._parameters[i].device) == kind]
            if not mine:
                continue
            flat = torch.cat([self._share(i, i in fresh).reshape(-1) for i in mine])
            self._wire.all_reduce(flat)
            sizes = [self._parameters[i].numel() for i in mine]
            for i, total in zip(mine, flat.split(sizes), strict=True):
                self._add(i, total, earlier[i] if i in fresh else self._parameters[i].grad)

    def _share(self, index: int, fresh: bool) -> Tensor:
        parameter = self._parameters[index]
        return parameter.grad if fresh and parameter.grad is not None else torch.zeros_like(parameter)

    def _add(self, index: int, total: Tensor, before: Tensor | None) -> None:
        parameter = self._parameters[index]
        total = total.view_as(parameter)
        parameter.grad = total.clone() if before is None else before.add_(total)
