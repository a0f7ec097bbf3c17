"""Summing a model's gradients over ranks, once at the end of every backward.

A gradient that was there before (an earlier micro-batch) has been summed already and must not be summed again. So while a
backward runs, earlier gradients are set aside; when it is over, what is new is summed over the ranks and added to them.

    hook of p            p.grad (earlier) is set aside, p.grad = None
    torch accumulates    p.grad = new
    end of backward      new is summed over ranks, in one buffer per dtype;  p.grad = earlier + sum, in place
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ringflash.errors import RingflashError
from ringflash.wire import Collectives


@dataclass
class _Backward:
    """What one backward has set aside, and the parameters whose new gradient is there, both by index."""

    earlier: dict[int, Tensor | None] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)


class GradientSum:
    """Sums the gradients of ``model`` over ``wire``. Ranks reduce in the order of the parameters.

    A parameter that only some ranks used counts as zero on the others; one that nobody used keeps no gradient.
    ``torch.autograd.grad`` accumulates nothing, so nothing is summed for it. Hooks of others that run while a backward is
    under way see this rank's share.
    """

    def __init__(self, model: nn.Module, wire: Collectives) -> None:
        self._model, self._wire = weakref.ref(model), wire  # whoever sums must not keep what it sums
        self._parameters: list[nn.Parameter] = []
        self._hooks: list[RemovableHandle] = []
        self._under_way: dict[int, _Backward] = {}  # by torch's number: reentrant checkpointing runs one inside another

    def watch(self) -> None:
        """Before a forward: hook the parameters that the model has now, if they are not those it had."""
        if torch._C._current_graph_task_id() < 0:  # an exception may have ended the last backward before its time
            for backward in self._under_way.values():
                for index, gradient in backward.earlier.items():
                    self._parameters[index].grad = gradient
            self._under_way = {}
        model = self._model()
        assert model is not None  # it is about to run
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self._wire.ranks == 1 or [id(p) for p in parameters] == [id(p) for p in self._parameters]:
            return
        self._compare(model)
        for hook in self._hooks:
            hook.remove()
        self._parameters, self._hooks = parameters, []
        me = weakref.ref(self)
        for index, parameter in enumerate(parameters):
            self._hooks += [
                parameter.register_hook(lambda gradient, index=index: _of(me)._set_aside(index, gradient)),
                parameter.register_post_accumulate_grad_hook(lambda _, index=index: _of(me)._arrived(index)),
            ]

    def _compare(self, model: nn.Module) -> None:
        """Called when a model has other parameters than before; raises where those of ranks differ."""

    def _set_aside(self, index: int, gradient: Tensor) -> None:
        if gradient.is_sparse:
            raise ValueError("SequenceParallel: a gradient is sparse; make the embedding with sparse=False")
        number = torch._C._current_graph_task_id()
        if number not in self._under_way:
            self._under_way[number] = _Backward()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._reduce(number))
        earlier = self._under_way[number].earlier
        if index not in earlier:
            earlier[index] = self._parameters[index].grad
            self._parameters[index].grad = None

    def _arrived(self, index: int) -> None:
        self._under_way[torch._C._current_graph_task_id()].fresh.add(index)

    @torch.no_grad()
    def _reduce(self, number: int) -> None:
        backward = self._under_way.pop(number)
        earlier, fresh = backward.earlier, backward.fresh
        for index in earlier.keys() - fresh:  # autograd.grad took the gradient elsewhere
            self._parameters[index].grad = earlier[index]
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


def _of(me: weakref.ref[GradientSum]) -> GradientSum:
    found = me()
    if found is None:
        raise RingflashError("SequenceParallel: the model of this backward is gone; keep it until its backward is over")
    return found
