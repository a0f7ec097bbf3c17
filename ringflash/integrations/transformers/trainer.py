"""Transformers' Trainer over data and context ranks: its model, its batches and its count of tokens, made to agree.

Trainer wants to see a PreTrainedModel, so nothing is wrapped: hooks before and after the model's forward do what
``rf.SequenceParallel`` does around it. Trainer believes that every rank has a batch of its own. Told of a mesh with an axis
"cp" it gives neighbours on it the same batch, but still counts its tokens once for each of them:

    Trainer's count n = context x tokens          here: share of rank r = sum_r / (n / context)
    Trainer: loss x ranks, DDP: gradients / ranks     =>    the sum over ranks of sum_r / tokens, as on one device
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ringflash.groups import Group, address, connect_all
from ringflash.layout import Layout
from ringflash.mask import Mask, causal
from ringflash.route import Route
from ringflash.spread import Spread

if TYPE_CHECKING:
    from transformers import Trainer  # imports much else, which who has no Trainer does without

AXES = ("dp_replicate", "dp_shard", "cp")  # the names that accelerate knows, in its order


def shard_trainer(
    trainer: Trainer,
    mesh: Any,
    mask: Mask = causal,
    layout: str | Layout = "auto",
    route: str | Route = "auto",
    loss_tile: int | None = None,
) -> Trainer:
    """Let ``trainer`` train and evaluate with each sequence spread over the ranks of the axis "cp" of ``mesh``.

    Call it before ``trainer.train()``, on every rank. ``mesh``: a DeviceMesh over all ranks whose axes are "cp", or
    "dp_replicate" and/or "dp_shard" before it: ``init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp_replicate", "cp"))``.
    The model is loaded with ``attn_implementation="ring_attn"``; the other arguments are those of ``rf.SequenceParallel``.

    Loss, gradients, clipping and accumulation are those of one device per data rank. Evaluation gives the loss alone:
    logits of a spread sequence are not gathered. Trainer's own figures of speed count each sequence once per rank.

    Returns ``trainer``. Raises ``ValueError`` for what would look at a shard as if it were the sequence:
    ``compute_metrics``, ``compute_loss_func``, label smoothing, noisy embeddings (NEFTune), a parallelism of accelerate's own.
    """
    group = _context(trainer, mesh)
    for name, given in (
        ("compute_metrics", trainer.compute_metrics),
        ("compute_loss_func", trainer.compute_loss_func),
        ("neftune_noise_alpha", trainer.args.neftune_noise_alpha),
        ("label_smoothing_factor", trainer.args.label_smoothing_factor or None),
        ("parallelism_config", trainer.args.parallelism_config),
    ):
        if given is not None:
            raise ValueError(
                f"shard_trainer: {name} is {given!r}; it would see this rank's shard alone, or shard it again"
            )
    if trainer.model_wrapped is not trainer.model:
        raise ValueError("shard_trainer: the model is wrapped already; call it before trainer.train()")
    model = trainer.model
    assert isinstance(model, nn.Module)
    spread = Spread(model, group, mask, layout=layout, route=route, engine=True, loss_tile=loss_tile)
    around = _Around(spread, trainer.accelerator)
    model.register_forward_pre_hook(around.enter, with_kwargs=True, prepend=True)
    model.register_forward_hook(around.leave)
    trainer.accelerator.state.device_mesh = mesh
    return trainer


class _Around:
    """The hooks: a model's forward on this rank's part of the sequence."""

    def __init__(self, spread: Spread, accelerator: Any) -> None:
        self._spread, self._ranks, self._accelerator = spread, address(spread.group)[1], accelerator
        self._compared: set[bool] = set()

    def enter(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if model.training not in self._compared:
            self._compare_batches(kwargs)
            self._compared.add(model.training)
        count = kwargs.get("num_items_in_batch")
        if count is not None:
            kwargs = {**kwargs, "num_items_in_batch": count / self._ranks}
        return (), self._spread.enter(args, kwargs)

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        try:
            output = self._spread.leave(output)
        finally:
            self._spread.forget()
        if output.loss is None:
            raise ValueError(
                "shard_trainer: the batch has no labels; logits of a spread sequence are not gathered, so there is nothing to "
                "return: evaluate with labels, or predict with the model alone"
            )
        if model.training:
            return output
        self._weigh_the_last_batch()
        return type(output)(loss=self._mean(output.loss))  # Trainer gathers whatever else is there

    def _compare_batches(self, inputs: dict[str, Any]) -> None:
        """Once: do all context ranks have the same batch? Loaders that deal out single rows do not know the axis "cp"."""
        wide = [x.double().flatten() for _, x in sorted(inputs.items()) if isinstance(x, Tensor) and x.ndim > 1]
        whole = torch.cat(wide)
        places = torch.arange(len(whole), dtype=whole.dtype, device=whole.device)
        mine = torch.stack([whole.new_tensor(len(whole)), whole.sum(), (whole * places).sum()])
        if any(not torch.equal(mine, other) for other in connect_all(self._spread.group).all_gather(mine)):
            raise ValueError(
                "shard_trainer: the ranks of a sequence were given different batches; for an iterable dataset pass "
                "TrainingArguments(accelerator_config={'dispatch_batches': False})"
            )

    def _weigh_the_last_batch(self) -> None:
        """Trainer gathers a loss per row and rank, and of an incomplete last round as many as rows were left: per rank, too."""
        loader = self._accelerator.gradient_state.active_dataloader
        if loader is not None and loader.end_of_dataloader and loader.remainder > 0:
            rows = getattr(loader.dataset, "total_dataset_length", None) or len(loader.dataset)
            loader.remainder = rows % loader.total_batch_size * self._ranks

    def _mean(self, loss: Tensor) -> Tensor:
        """In evaluation every context rank returns what a rank with the whole batch would: Trainer may drop some of them."""
        total: Tensor = loss.detach().clone()
        connect_all(self._spread.group).all_reduce(total)
        return total / self._ranks


def _context(trainer: Trainer, mesh: Any) -> Group:
    axes = getattr(mesh, "mesh_dim_names", None)
    if not axes or axes[-1] != "cp" or any(axis not in AXES for axis in axes):
        raise ValueError(
            f"shard_trainer: mesh is {mesh!r}; a DeviceMesh is needed whose last axis is 'cp' and whose others are "
            "'dp_replicate' or 'dp_shard': the names by which accelerate deals out batches"
        )
    if mesh.size() != trainer.args.world_size:
        raise ValueError(f"shard_trainer: mesh has {mesh.size()} ranks, the trainer {trainer.args.world_size}")
    group: Group = mesh["cp"]
    return group
