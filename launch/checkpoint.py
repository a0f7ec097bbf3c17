"""Checkpoints: everything a run needs to go on as if it had never stopped, on any number of ranks.

    runs/text/checkpoints/
        step-00000100/   model.safetensors      parameters by name, whole (no trace of ranks or shards)
                         optimizer.safetensors  "parameter name/exp_avg", ...
                         state.json             step, data position, configs, RNG states, scalars, checksums
        step-00000200/
        .writing-00000300/                      an interrupted write: never read, removed by the next one

A folder is written aside, flushed to disk, then renamed: under its final name it is complete. Nothing is pickled, so
a checkpoint from a stranger can do no more harm than wrong numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines import Engine
from ranks import Ranks
from run_options import UsageError

FORMAT = 1
FOLDER = re.compile(r"step-(\d{8})")


def save(folder: Path, engine: Engine, state: Mapping[str, Any], ranks: Ranks, keep: int) -> None:
    """Write ``folder/step-N`` (N is ``state["step"]``) and remove all but the ``keep`` newest.

    Every rank must call it: whole tensors are gathered, one at a time, where an engine has spread them. Rank 0 alone writes.
    Names in the files are those of the bare model, whatever is wrapped around it.
    """
    tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for kind, values in (("model", engine.parameters()), ("optimizer", engine.moments())):
        for name, value in values:
            if ranks.first:
                tensors[kind][name] = value.to("cpu", copy=True).contiguous()
    if ranks.first:
        _write(folder, tensors, {**state, "optimizer_groups": engine.groups(), "random": _random_states()})
        steps = _steps(folder)
        for step in steps[: max(0, len(steps) - keep)]:
            shutil.rmtree(folder / _name(step))


def _write(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".writing-*"):
        shutil.rmtree(stale)
    step = int(state["step"])
    aside, final = folder / f".writing-{step:08d}", folder / _name(step)
    aside.mkdir()
    checksums = {}
    for name, content in tensors.items():
        file = aside / f"{name}.safetensors"
        save_file(content, file)
        checksums[file.name] = _sha256(file)
    text = json.dumps({"format": FORMAT, **state, "sha256": checksums}, indent=1)
    (aside / "state.json").write_text(text + "\n")
    for path in (*aside.iterdir(), aside):
        _flush(path)
    if final.exists():  # the same step of the same run, reached a second time after a resume
        shutil.rmtree(final)
    aside.rename(final)
    _flush(folder)


def latest(folder: Path) -> Path:
    """The newest complete checkpoint in a folder."""
    steps = _steps(folder)
    if not steps:
        raise UsageError(f"--resume: there is no checkpoint in {str(folder)!r}; start without --resume")
    return folder / _name(steps[-1])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON half, after checking that the files are those that were written."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    if state.get("format") != FORMAT:
        raise UsageError(f"--resume: {checkpoint} has format {state.get('format')}; this program reads {FORMAT}")
    for name, digest in state["sha256"].items():
        if not (checkpoint / name).is_file() or _sha256(checkpoint / name) != digest:
            raise UsageError(f"--resume: {checkpoint / name} is damaged; remove {checkpoint} to use the one before it")
    return state


def refuse_mismatch(state: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise if a checkpoint belongs to another model or other data, naming every field that differs.

    ``expected`` maps the name of a section of the state (say, ``model``) to what this run was asked for.
    """
    differences = [
        f"{section} {field}: {state[section].get(field)!r} there, {fields.get(field)!r} here"
        for section, fields in expected.items()
        for field in sorted({*fields, *state[section]})
        if state[section].get(field) != fields.get(field)
    ]
    if differences:
        raise UsageError(f"--resume: the checkpoint is of another run ({'; '.join(differences)})")


def load(checkpoint: Path, engine: Engine) -> dict[str, Any]:
    """Fill a model and its optimizer from a checkpoint, restore the random states, return the JSON half.

    Every rank reads the same files. Works on another number of ranks and under another engine than the writer's. The
    model must have the same parameters: call ``refuse_mismatch`` on the configs first for a sentence that helps.
    """
    state = read_state(checkpoint)
    saved = load_file(checkpoint / "model.safetensors")
    names = {name for name, _ in engine.model.named_parameters()}
    if saved.keys() != names:
        raise UsageError(f"--resume: {checkpoint} has other parameters: {sorted(saved.keys() ^ names)}")
    engine.fill(saved, load_file(checkpoint / "optimizer.safetensors"), state["optimizer_groups"])
    _restore_random(state["random"])
    return state


def _random_states() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": _hex(torch.get_rng_state()),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        states["cuda"] = _hex(torch.cuda.get_rng_state())
    return states


def _restore_random(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(_unhex(states["torch"]))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unhex(states["cuda"]))


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _steps(folder: Path) -> list[int]:
    found = [FOLDER.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
