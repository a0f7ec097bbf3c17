"""A checkpoint gives back what was saved, survives an interrupted successor and refuses to be mistaken for another."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
from engines import Engine
from options import UsageError

ALONE: Any = SimpleNamespace(first=True)  # what save() needs to know of the ranks of one process


class Training:
    """A small model and optimizer that have made some steps."""

    def __init__(self, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.RMSNorm(5), nn.Linear(5, 2))
        matrices, vectors = ([p for p in self.model.parameters() if (p.ndim > 1) == many] for many in (True, False))
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))
        self.engine = Engine(self.model, self.optimizer, self.model)
        for _ in range(steps):
            self.step()

    def step(self) -> float:
        """One step on random data, so that the random state matters too."""
        loss = self.model(torch.randn(4, 3)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self, folder: Path, step: int, keep: int = 9, **state: Any) -> None:
        """Save as the trainer does."""
        checkpoint.save(folder, self.engine, {"step": step, **state}, ALONE, keep)


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    """Parameters, moments, group scalars and random states come back to the bit: later losses are equal."""
    original = Training(seed=0, steps=3)
    original.save(tmp_path, 3, sample=12)
    drawn = (random.random(), np.random.rand())
    expected = [original.step() for _ in range(3)]

    resumed = Training(seed=1, steps=1)
    resumed.optimizer.param_groups[1].update(lr=5.0, betas=(0.1, 0.1))
    random.seed(5), np.random.seed(5)
    state = checkpoint.load(checkpoint.latest(tmp_path), resumed.engine)
    assert (state["step"], state["sample"]) == (3, 12)
    assert resumed.optimizer.param_groups[1]["betas"] == (0.8, 0.9)
    assert (random.random(), np.random.rand()) == drawn
    assert [resumed.step() for _ in range(3)] == expected


def test_nothing_on_disk_is_a_pickle(tmp_path: Path) -> None:
    """A checkpoint from a stranger is safe to open: safetensors and JSON, nothing else."""
    Training(seed=0, steps=1).save(tmp_path, 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert not any(b"torch._utils" in path.read_bytes() for path in files)


@pytest.mark.parametrize("moment", ["while a tensor file is written", "before the folder gets its name"])
def test_an_interrupted_write_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Losing power while a checkpoint is written costs the steps since the one before it, nothing more."""
    training = Training(seed=0, steps=1)
    training.save(tmp_path, 1)
    saved = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.step()

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "while a tensor file is written":
            patch.setattr(checkpoint, "save_file", lambda tensors, file: (file.write_bytes(b"half"), die()))
        else:
            patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            training.save(tmp_path, 2)

    assert checkpoint.latest(tmp_path).name == "step-00000001"
    checkpoint.load(checkpoint.latest(tmp_path), training.engine)
    assert all(torch.equal(value, saved[name]) for name, value in training.model.state_dict().items())
    training.save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Old checkpoints go, by their number and not by their name's spelling, and the newest is the latest."""
    training = Training(seed=0, steps=1)
    for step in (2, 9, 10, 100):
        training.save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert checkpoint.latest(tmp_path).name == "step-00000100"


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    """One flipped bit in a tensor is an error that names the file, not a slightly different model."""
    Training(seed=0, steps=1).save(tmp_path, 1)
    file = checkpoint.latest(tmp_path) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.safetensors is damaged"):
        checkpoint.read_state(checkpoint.latest(tmp_path))


def test_a_checkpoint_of_another_model_is_refused_field_by_field(tmp_path: Path) -> None:
    """Resuming with another model or other data says what differs, with both values."""
    Training(seed=0, steps=1).save(tmp_path, 1, model={"dim": 5, "layers": 2}, data={"seed": 0})
    state = checkpoint.read_state(checkpoint.latest(tmp_path))
    checkpoint.refuse_mismatch(state, {"model": {"dim": 5, "layers": 2}, "data": {"seed": 0}})
    with pytest.raises(UsageError, match=r"model dim: 5 there, 6 here; data seed: 0 there, 1 here") as raised:
        checkpoint.refuse_mismatch(state, {"model": {"dim": 6, "layers": 2}, "data": {"seed": 1}})
    assert "layers" not in str(raised.value)


def test_resuming_where_nothing_was_saved_is_refused(tmp_path: Path) -> None:
    """A mistyped folder is an error, not a new run."""
    with pytest.raises(UsageError, match="there is no checkpoint"):
        checkpoint.latest(tmp_path / "nowhere")
