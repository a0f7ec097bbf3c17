"""A checkpoint gives back what was saved, survives an interrupted successor and refuses to be mistaken for another."""

from __future__ import annotations

import hashlib
import json
import random
import re
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
from engines import Engine
from options import UsageError

# What checkpoints need of the ranks of one process.
ALONE: Any = SimpleNamespace(
    first=True, once=lambda what, work: work(), collect=lambda what, mine: [mine], say=lambda text: print(text)
)


def newest(folder: Path) -> Path:
    """The newest good checkpoint."""
    return checkpoint.newest_good(folder, checkpoint.steps(folder), ALONE)[0]


def restore(folder: Path, engine: Engine) -> dict[str, Any]:
    """Load the newest good checkpoint, as the trainer does."""
    path, state = checkpoint.newest_good(folder, checkpoint.steps(folder), ALONE)
    checkpoint.load(path, engine, state)
    return state


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

    def save(self, folder: Path, step: int, keep: int = 9, **state: Any) -> str | None:
        """Save as the trainer does."""
        return checkpoint.save(folder, self.engine, {"step": step, **state}, ALONE, keep)


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    """Parameters, moments, group scalars and random states come back to the bit: later losses are equal."""
    original = Training(seed=0, steps=3)
    original.save(tmp_path, 3, sample=12)
    drawn = (random.random(), np.random.rand())
    expected = [original.step() for _ in range(3)]

    resumed = Training(seed=1, steps=1)
    resumed.optimizer.param_groups[1].update(lr=5.0, betas=(0.1, 0.1))
    random.seed(5), np.random.seed(5)
    state = restore(tmp_path, resumed.engine)
    assert (state["step"], state["sample"]) == (3, 12)
    assert resumed.optimizer.param_groups[1]["betas"] == (0.8, 0.9)
    assert (random.random(), np.random.rand()) == drawn
    assert [resumed.step() for _ in range(3)] == expected


def test_nothing_on_disk_is_a_pickle(tmp_path: Path) -> None:
    """A checkpoint from a stranger is safe to open: safetensors and JSON, nothing else."""
    Training(seed=0, steps=1).save(tmp_path, 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == [
        "SHA256SUMS",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
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

    assert restore(tmp_path, training.engine)["step"] == 1
    assert all(torch.equal(value, saved[name]) for name, value in training.model.state_dict().items())
    training.save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Old checkpoints go, by their number and not by their name's spelling, and the newest is the latest."""
    training = Training(seed=0, steps=1)
    for step in (2, 9, 10, 100):
        training.save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert newest(tmp_path).name == "step-00000100"


def flip(file: Path, place: int) -> None:
    """Change one bit."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    """Lose the second half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def say_again(checkpoint_folder: Path, text: str) -> None:
    """Another state.json, with the checksum that belongs to it."""
    (checkpoint_folder / "state.json").write_text(text)
    sums = [line.split("  ") for line in (checkpoint_folder / "SHA256SUMS").read_text().splitlines()]
    digest = hashlib.sha256(text.encode()).hexdigest()
    new = [f"{digest if name == 'state.json' else old}  {name}\n" for old, name in sums]
    (checkpoint_folder / "SHA256SUMS").write_text("".join(new))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of a weight": (lambda f: flip(f / "model.safetensors", -1), r"model\.safetensors is damaged"),
    "a bit of a header": (lambda f: flip(f / "optimizer.safetensors", 20), r"optimizer\.safetensors is damaged"),
    "a digit of the step": (
        lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace('"step": 2', '"step": 3')),
        r"state\.json is damaged",
    ),
    "a digit of a checksum": (lambda f: flip(f / "SHA256SUMS", 3), r"model\.safetensors is damaged"),
    "a letter of a name": (lambda f: flip(f / "SHA256SUMS", 70), "does not list model"),
    "half of a file": (lambda f: cut(f / "model.safetensors"), r"model\.safetensors is damaged: its [\d,]+ bytes"),
    "half of the state": (lambda f: cut(f / "state.json"), r"state\.json is damaged"),
    "half of the checksums": (lambda f: cut(f / "SHA256SUMS"), "does not list model"),
    "a file": (lambda f: (f / "optimizer.safetensors").unlink(), r"optimizer\.safetensors cannot be read"),
    "the checksums": (lambda f: (f / "SHA256SUMS").unlink(), "SHA256SUMS cannot be read"),
    "bytes for text": (lambda f: (f / "SHA256SUMS").write_bytes(b"\xff\xfe"), "SHA256SUMS cannot be read"),
    "no JSON": (lambda f: say_again(f, "{"), r"state\.json is not JSON"),
    "another format": (lambda f: say_again(f, '{"format": 1, "step": 2}'), "has format 1; this program reads 2"),
    "no object": (lambda f: say_again(f, "[2]"), "has format list; this program reads 2"),
    "no step": (lambda f: say_again(f, '{"format": 2, "random": {}}'), "has no optimizer_groups, step"),
    "a step in words": (
        lambda f: say_again(f, '{"format": 2, "step": "2", "random": {}, "optimizer_groups": []}'),
        "is of step 2: the folder",
    ),
    "a state without an end": (lambda f: say_again(f, "[" * 200_000), r"state\.json is not JSON"),
    "a state of a thousand states": (
        lambda f: say_again(f, " " * (65 << 20) + "{}"),
        "more than 67,108,864 are not read",
    ),
    "its name": (lambda f: f.rename(f.with_name("step-00000007")), "is of step 2: the folder has been renamed"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """Whatever is wrong with it, of which one flipped bit is the least: said, with the reason, and no step of it is loaded."""
    training = Training(seed=0, steps=1)
    training.save(tmp_path, 1)
    training.step()
    training.save(tmp_path, 2)
    damage, reason = DAMAGES[what]
    damage(tmp_path / "step-00000002")
    assert newest(tmp_path).name == "step-00000001"
    assert re.search(rf"checkpoint refused: \S+step-0000000\d: .*{reason}.*\(rank 0, ", capsys.readouterr().out)


def test_if_no_checkpoint_is_good_each_is_named_with_its_reason(tmp_path: Path) -> None:
    """Beginning anew without a word would lose the run."""
    training = Training(seed=0, steps=1)
    training.save(tmp_path, 1), training.save(tmp_path, 2)
    cut(tmp_path / "step-00000001" / "state.json")
    flip(tmp_path / "step-00000002" / "model.safetensors", -1)
    with pytest.raises(
        UsageError, match=r"step-00000002: model.safetensors is damaged.*; step-00000001: state.json is"
    ):
        newest(tmp_path)


def test_one_rank_that_reads_damage_is_enough(tmp_path: Path) -> None:
    """A network disk may show a node what it shows no other; all go back together, or ranks would differ."""
    training = Training(seed=0, steps=1)
    training.save(tmp_path, 1), training.save(tmp_path, 2)
    seen = [["", "a"], ["model.safetensors is damaged", "b"]]
    told = iter([seen, [["", "a"], ["", "b"]]])
    said: list[str] = []
    ranks: Any = SimpleNamespace(collect=lambda what, mine: next(told), say=said.append)
    assert checkpoint.newest_good(tmp_path, [2, 1], ranks)[0].name == "step-00000001"
    assert len(said) == 1 and "model.safetensors is damaged (rank 1, b)" in said[0]


def test_a_checkpoint_is_what_sha256sum_checks(tmp_path: Path) -> None:
    """Whoever copies one to another machine can see without this program that it is whole."""
    Training(seed=0, steps=1).save(tmp_path, 1)
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=newest(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 3, done


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """Half of a checkpoint is removed, since others need its place; the reason comes back; the next one is written again."""
    training = Training(seed=0, steps=1)
    training.save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # no file may be longer: a write fails half-way
    try:
        failure = training.save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failure is not None and "File too large" in failure
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert newest(tmp_path).name == "step-00000001"
    assert training.save(tmp_path, 2) is None
    assert newest(tmp_path).name == "step-00000002"


def test_a_damaged_newer_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    """After going back from a damaged step 9 the new step 5 is not the oldest of those to keep, but the one to keep."""
    training = Training(seed=0, steps=1)
    training.save(tmp_path, 4), training.save(tmp_path, 9)
    cut(tmp_path / "step-00000009" / "state.json")
    training.save(tmp_path, 5, keep=1)
    assert newest(tmp_path).name == "step-00000005"
    training.save(tmp_path, 9, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009"]


def test_a_checkpoint_of_another_model_is_refused_field_by_field(tmp_path: Path) -> None:
    """Resuming with another model or other data says what differs, with both values."""
    Training(seed=0, steps=1).save(tmp_path, 1, model={"dim": 5, "layers": 2}, data={"seed": 0})
    state = checkpoint.read_state(newest(tmp_path))
    checkpoint.refuse_mismatch(state, {"model": {"dim": 5, "layers": 2}, "data": {"seed": 0}})
    with pytest.raises(UsageError, match=r"model dim: 5 there, 6 here; data seed: 0 there, 1 here") as raised:
        checkpoint.refuse_mismatch(state, {"model": {"dim": 6, "layers": 2}, "data": {"seed": 1}})
    assert "layers" not in str(raised.value)


def spoil_tensor(name: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Another tensor in a file, with a checksum that belongs to it."""

    def act(folder: Path) -> None:
        content = load_file(folder / name)
        content[key] = change(content[key])
        save_file(content, folder / name)
        checkpoint.seal(folder, checkpoint.FILES)

    return act


def change_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Another state, with a checksum that belongs to it."""

    def act(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        change(state)
        say_again(folder, json.dumps(state))

    return act


MISFITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight of one number": (
        spoil_tensor("model.safetensors", "0.bias", lambda t: t[:1].clone()),
        r"0\.bias is \(1,\)",
    ),
    "a weight of integers": (
        spoil_tensor("model.safetensors", "0.bias", lambda t: t.long()),
        r"0\.bias .* torch\.int64",
    ),
    "a moment of one number": (
        spoil_tensor("optimizer.safetensors", "0.bias/exp_avg", lambda t: t[:1].clone()),
        r"0\.bias/exp_avg is \(1,\)",
    ),
    "a moment of nothing": (spoil_tensor("optimizer.safetensors", "0.bias/step", lambda t: t.long()), "int64"),
    "other parameters in a group": (
        change_state(lambda s: s["optimizer_groups"][0].update(params=[])),
        "other settings of groups",
    ),
    "a group less": (change_state(lambda s: s["optimizer_groups"].pop()), "other groups"),
    "half of a random state": (change_state(lambda s: s["random"].update(torch="00")), "other random states"),
    "no random state": (change_state(lambda s: s["random"].pop("python")), "other random states: KeyError"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_changes_nothing(tmp_path: Path, what: str) -> None:
    """Copying would broadcast one number over a tensor and cast integers, and nobody would know."""
    training = Training(seed=0, steps=1)
    training.save(tmp_path, 1)
    misfit, reason = MISFITS[what]
    misfit(tmp_path / "step-00000001")
    other = Training(seed=1, steps=1)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    drawn = torch.get_rng_state()
    with pytest.raises(UsageError, match=reason):
        restore(tmp_path, other.engine)
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_checkpoint_of_the_same_step_stays_until_its_successor_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one to keep it is all there is: a disk that fails between the two names must not cost it."""
    training = Training(seed=0, steps=1)
    training.save(tmp_path, 1, keep=1)
    rename = Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path.name.startswith(".writing"):
            raise OSError("no more names")
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        assert "no more names" in str(training.save(tmp_path, 1, keep=1))
    assert newest(tmp_path).name == "step-00000001"
    rename(tmp_path / "step-00000001", tmp_path / ".replaced-00000001")  # as a process that was killed there leaves it
    checkpoint.recover(tmp_path)
    assert newest(tmp_path).name == "step-00000001"


def test_one_that_cannot_be_removed_is_not_one_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new checkpoint is safe, so the run has lost nothing and must not end as if it had."""
    training, warned = Training(seed=0, steps=1), []
    training.save(tmp_path, 1)

    def refuse(path: Path, **how: Any) -> None:
        if path.name == "step-00000001":
            raise OSError("busy")

    monkeypatch.setattr("shutil.rmtree", refuse)
    ranks: Any = SimpleNamespace(**vars(ALONE), warn=warned.append)
    assert checkpoint.save(tmp_path, training.engine, {"step": 2}, ranks, keep=1) is None
    assert len(warned) == 1 and "step-00000001 is not needed any more and cannot be removed: busy" in warned[0]
