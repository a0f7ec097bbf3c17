"""Activation checkpointing that does not run the ring twice.

Checkpointing forgets what a region computed and computes it again in backward. For attention that is the wrong trade: it
is most of the work at long context, every hop of the ring would be made a second time, and what its backward needs of it is
small. So keep that, and compute the rest again:

    forward     norm   q, k, v   attend ──▶ out, lse   project   MLP
    kept         ·        ·        ·        out  lse      ·       ·        b s h d elements, and b h s of float32
    backward    norm   q, k, v     ·    ◀── out, lse   project   MLP       no forward hops

``keep_attention`` and ``keep_attention_on_cpu`` are what ``torch.utils.checkpoint`` calls a ``context_fn``, wherever one is
taken:

    checkpoint(block, x, use_reentrant=False, context_fn=rf.keep_attention)
    checkpoint_wrapper(block, context_fn=rf.keep_attention)
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": rf.keep_attention})

Of nested checkpoints the innermost decides. torch.compile may be around the checkpoint (then it is one graph) or inside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import ringflash.operator  # noqa: F401 - registers the operator

ATTENTION: list[Any] = [torch.ops.ringflash.attend.default]
"""What is kept. To keep more: ``partial(create_selective_checkpoint_contexts, [*ATTENTION, torch.ops.aten.mm.default])``."""


def keep_attention() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """A ``context_fn``: attention's out and lse stay in the memory of their device, the rest of the region is recomputed.

    Also under ``torch.compile(fullgraph=True)``.

    >>> block, x = torch.nn.Linear(4, 4), torch.ones(1, 4, requires_grad=True)
    >>> y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=keep_attention)
    """
    if _captured():  # a graph is told by marks that torch's own modes leave in it
        forward, recomputation = create_selective_checkpoint_contexts(ATTENTION)
        return forward, recomputation
    kept: list[tuple[_Held, ...]] = []
    return _Keep(_Here, kept), _GiveBack(kept)


# A graph with a checkpoint in it is cached on disk only under a name for what the checkpoint keeps.
keep_attention.cache_hash = "ringflash.keep_attention"  # type: ignore[attr-defined]


def keep_attention_on_cpu() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """:func:`keep_attention`, with out and lse in the memory of the CPU until backward comes to their region.

    On CUDA they are copied to pinned memory by a stream of their own while the rest of the region is computed, and back
    while the region is recomputed up to its attention. Raises ``RuntimeError`` where torch.compile captures the checkpoint.
    """
    if _captured():
        raise RuntimeError(
            "keep_attention_on_cpu: torch.compile is capturing this checkpoint, and a captured graph keeps things where it "
            "computes them; use keep_attention there, or compile inside of the checkpoint"
        )
    kept: list[tuple[_Held, ...]] = []
    return _Keep(_OnCPU, kept), _GiveBack(kept)


def _captured() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


class _Held(Protocol):
    """A copy of a tensor that attention returned, as long as the graph of its region lives.

    A copy, because the region may write to the tensor, and compiled code does so unseen once it needs it no more.
    """

    def load(self) -> Tensor:
        """One more copy, on the device of the tensor; on CUDA it may still be under way, see :func:`_await`."""


class _Mode(TorchDispatchMode):
    """Looks for attention alone, so that what is compiled in a region may stay so."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class _Keep(_Mode):
    """The forward of a region: ``hold`` gets what attention returns."""

    def __init__(self, hold: Callable[[Tensor], _Held], kept: list[tuple[_Held, ...]]) -> None:
        super().__init__()
        self._hold, self._kept = hold, kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ATTENTION:
            self._kept.append(tuple(self._hold(x) for x in result))
        return result


class _GiveBack(_Mode):
    """The recomputation of a region: in place of attending, returns what was kept. It may run more than once."""

    def __init__(self, kept: list[tuple[_Held, ...]]) -> None:
        super().__init__()
        self._kept = kept
        self._coming: list[tuple[Tensor, ...]] = []

    def __enter__(self) -> _GiveBack:
        self._coming = [tuple(held.load() for held in call) for call in self._kept]
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ATTENTION:
            return func(*args, **(kwargs or {}))
        if not self._coming:
            raise RuntimeError(
                f"keep_attention: the forward of a checkpointed region called attention {len(self._kept)} times, and its "
                "recomputation calls it once more; a region must do the same both times"
            )
        result = self._coming.pop(0)
        _await(result)
        return result

    def __exit__(self, *exception: Any) -> None:
        for rest in self._coming:  # never asked for, and its memory is about to be used for something else
            _await(rest)
        self._coming = []
        super().__exit__(*exception)


class _Here:
    """On the device of ``x``."""

    def __init__(self, x: Tensor) -> None:
        self._copy = x.clone()

    def load(self) -> Tensor:
        return self._copy.clone()


class _OnCPU:
    """In the memory of the CPU."""

    def __init__(self, x: Tensor) -> None:
        self._device = x.device
        if not x.is_cuda:
            self._copy = x.to("cpu", copy=True)
            return
        self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        ours, stream = x.clone(), _copies(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self._copy.copy_(ours, non_blocking=True)
        ours.record_stream(stream)  # its memory is free when the copy is made

    def load(self) -> Tensor:
        if self._device.type != "cuda":
            return self._copy.to(self._device, copy=True)
        x, stream = torch.empty(self._copy.shape, dtype=self._copy.dtype, device=self._device), _copies(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))  # which may still use what this memory was before
        with torch.cuda.stream(stream):
            x.copy_(self._copy, non_blocking=True)
        return x


def _await(tensors: tuple[Tensor, ...]) -> None:
    """Work queued from here on finds the values of ``tensors`` in their memory."""
    for x in tensors:
        if x.is_cuda:
            torch.cuda.current_stream(x.device).wait_stream(_copies(x.device))


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which copies from and to ``device`` are made, in their order."""
    return torch.cuda.Stream(device)
