"""Transformers over two real processes: the README's three lines, and a Trainer; both equal to one process.

Starting processes that import Transformers takes most of the time, so both run in the same ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from processes import torchrun

transformers = pytest.importorskip("transformers", minversion="5")
accelerate = pytest.importorskip("accelerate")

from programs import hf_trainer  # noqa: E402

from ringflash.integrations.transformers import shard_trainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What two processes printed, given a tiny Llama and what one process made of the Trainer's task."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "llama")
    try:
        one = hf_trainer.run(folder, spread=False)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    (folder / "one.json").write_text(json.dumps(one))
    return torchrun(2, hf_trainer.__file__, folder)


def test_the_three_lines_have_the_loss_and_raw_gradients_of_one_process(output: str) -> None:
    """As the README has them, in real processes."""
    assert output.count("three lines: equal to one process") == 2


def test_trainer_on_two_processes_is_trainer_on_one(output: str) -> None:
    """Three steps of two micro-batches with uneven targets, unclipped, then evaluation and a saved model; raw weights."""
    assert "trainer: equal to one process" in output


@pytest.mark.parametrize(
    ("mesh", "change", "reason"),
    [
        (None, lambda it: None, "last axis is 'cp'"),
        (2, lambda it: None, "mesh has 2 ranks, the trainer 1"),
        (1, lambda it: setattr(it, "compute_metrics", lambda _: {}), "compute_metrics"),
        (1, lambda it: setattr(it.args, "label_smoothing_factor", 0.1), "label_smoothing_factor"),
        (1, lambda it: setattr(it.args, "neftune_noise_alpha", 5.0), "neftune_noise_alpha"),
    ],
    ids=["no mesh", "another world", "metrics", "smoothing", "noise"],
)
def test_a_trainer_that_would_look_at_shards_is_refused(
    tmp_path: Path, mesh: int | None, change: Callable[[transformers.Trainer], None], reason: str
) -> None:
    """On values that all ranks have, before anything is hooked."""
    try:
        it = hf_trainer.trainer(tmp_path, "ring_attn")
        change(it)
        with pytest.raises(ValueError, match=reason):
            shard_trainer(it, None if mesh is None else _Mesh(mesh))
        assert not it.model._forward_pre_hooks
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class _Mesh:
    """As much of a DeviceMesh as is looked at before anything is sent."""

    mesh_dim_names = ("cp",)

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def size(self) -> int:
        return self._ranks

    def __getitem__(self, axis: str) -> tuple[int, int]:
        return (0, self._ranks)
