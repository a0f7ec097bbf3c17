"""DeepSpeed's ZeRO as an engine, told nothing of sequences.

DeepSpeed has a notion of sequence-parallel ranks, and its stages disagree about it: stages 1 and 2 sum gradients over
them, stage 3 averages. So it is given plain data-parallel ranks, all of them, over which every stage averages; that
a loss of shards is right after an average is what ``gradients="engine"`` sees to.

Two of its habits would change results without a word, and are seen to here: it clips gradients to norm 1 unless told
otherwise, and switches off inside what autocast has been switched on around its forward. Nothing is compiled: the optimizer
is PyTorch's, and messages between processes of a CPU go through gloo, not through an extension in C++.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import ringflash as rf
from engines import Engine, Groups, set_groups
from ranks import Ranks

BUCKET = 500_000_000  # elements of a reduction, DeepSpeed's own default; no more than the model has


class Zero(Engine):
    """ZeRO stage 1, 2 or 3 over all ranks, for a model in float32."""

    def __init__(
        self,
        wrapped: rf.SequenceParallel,
        ranks: Ranks,
        optimizer: Callable[[nn.Module], Optimizer],
        stage: int,
        clip: float,
        autocast: bool,
    ) -> None:
        deepspeed = _deepspeed(ranks.device.type)
        size = sum(parameter.numel() for parameter in wrapped.parameters())
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own figures of speed depend on it
            "gradient_clipping": clip if math.isfinite(clip) else 0.0,
            "steps_per_print": None,
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": min(size, BUCKET),
                "stage3_prefetch_bucket_size": min(size, BUCKET) // 10,
                "stage3_param_persistence_threshold": min(size // 100, 100_000),
            },
        }
        if autocast:  # reduced in float32 all the same
            low = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            config["torch_autocast"] = low
        made = optimizer(wrapped.module)
        with _quiet():
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=wrapped, optimizer=made, model_parameters=wrapped.parameters(), config=config
            )
        super().__init__(wrapped.module, made, self._engine, clip)
        self._tools, self._stage, self._ranks = deepspeed, stage, ranks
        self._wrapped, self._low = wrapped, ranks.device.type if autocast else None

    def replay(self, **inputs: Any) -> Any:
        """As ``forward``, without DeepSpeed's engine: it would take what follows for the backward of a step."""
        low = self._low is not None
        with torch.autocast(self._low or "cpu", torch.bfloat16) if low else contextlib.nullcontext():
            return self._wrapped(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Make the gradients of a step, averaged over ranks."""
        self._engine.backward(loss)

    def step(self) -> float:
        """Clip, step, forget the gradients; returns their norm, inf if one was not finite (then nothing has changed)."""
        self._engine.step()
        return math.inf if self._zero.overflow else float(self._engine.get_global_grad_norm())

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter whole, one after the other (a collective: every rank must take all of them)."""
        for name, parameter in self.model.named_parameters():
            yield name, self._tools.utils.safe_get_full_fp32_param(parameter).to(parameter.dtype)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Each raw gradient whole, between ``backward`` and ``step`` (a collective)."""
        for name, parameter in self.model.named_parameters():
            yield name, self._tools.utils.safe_get_full_grad(parameter)

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer remembers, whole, by "parameter name/kind" (a collective)."""
        self._link()
        remembered: Mapping[str, Tensor] = next(iter(self.optimizer.state.values()), {})
        for name, parameter in self.model.named_parameters():
            for kind, value in remembered.items():
                get = self._tools.utils.safe_get_full_optimizer_state
                yield f"{name}/{kind}", get(parameter, kind) if value.ndim else value

    def fill(self, parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor], groups: Groups) -> None:
        """Take whole values as any engine's ``parameters``, ``moments`` and ``groups`` gave them."""
        kinds: dict[str, Tensor] = {key.rpartition("/")[2]: value for key, value in moments.items()}
        self._make_room(kinds)
        for name, parameter in self.model.named_parameters():
            with self._tools.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
                if self._stage < 3 or self._ranks.first:
                    parameter.copy_(parameters[name])
            self._put(parameter, parameters[name], None)
            for kind in (kind for kind, value in kinds.items() if value.ndim):
                self._put(parameter, moments[f"{name}/{kind}"], kind)
        set_groups(self.optimizer, groups)

    def _make_room(self, kinds: Mapping[str, Tensor]) -> None:
        """Moments for every part of every parameter; an optimizer has none before its first step."""
        flats = (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        for flat in flats:
            self.optimizer.state[flat] = {k: torch.zeros_like(flat) if v.ndim else v.clone() for k, v in kinds.items()}
        self._link()

    def _link(self) -> None:
        """Let stages 1 and 2 find moments by parameter; DeepSpeed does it when only the first group has made its own."""
        if self._stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _put(self, parameter: nn.Parameter, value: Tensor, kind: str | None) -> None:
        """Set this rank's part of one whole value: of the parameter's float32 copy, or of a moment."""
        tools, rest = self._tools.utils, () if kind is None else (kind,)
        value = value.to(parameter.device, torch.float32)
        if self._stage < 3:
            put = tools.safe_set_full_fp32_param if kind is None else tools.safe_set_full_optimizer_state
            put(parameter, value, *rest)
            return
        part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # ceil(numel / ranks); the last ones are padded
        flat = torch.nn.functional.pad(value.flatten(), (0, part * self._ranks.size - value.numel()))
        put = tools.safe_set_local_fp32_param if kind is None else tools.safe_set_local_optimizer_state
        put(parameter, flat[part * self._ranks.rank :][:part], *rest)


def _deepspeed(device: str) -> Any:
    """DeepSpeed, imported for this kind of device, without its compiled messages and its talk."""
    os.environ["DS_ACCELERATOR"] = device
    os.environ.setdefault("LOCAL_RANK", "0")  # one process without a launcher
    with _quiet():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its own calls
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that say that all is well."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
