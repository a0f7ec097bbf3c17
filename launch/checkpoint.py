"""Checkpoints: everything a run needs to go on as if it had never stopped, on any number of ranks.

    runs/text/checkpoints/
        step-00000100/   model.safetensors      parameters by name, whole (no trace of ranks or shards)
                         optimizer.safetensors  "parameter name/exp_avg", ...
                         state.json             step, data position, configs, RNG states, scalars
                         SHA256SUMS             of these three, as `sha256sum --check` reads them
        step-00000200/
        .writing-00000300/                      an interrupted write: never read, removed by the next one

A folder is written aside, flushed to disk, then renamed: under its final name it is complete. What is read is compared with
its checksums on every rank; if one rank finds damage, all go back to the checkpoint before. Nothing is pickled, so a
checkpoint from a stranger can do no more harm than wrong numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines import Engine
from ranks import Ranks
from run_options import UsageError

FORMAT = 2
FOLDER = re.compile(r"step-(\d{8})")
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
SUMS = "SHA256SUMS"
LARGEST = 64 << 20  # bytes of state.json: random states are some 30 kB


class DamagedError(UsageError):
    """A checkpoint is not what was written; the message says in which way."""


def save(folder: Path, engine: Engine, state: Mapping[str, Any], ranks: Ranks, keep: int) -> str | None:
    """Write ``folder/step-N`` (N is ``state["step"]``), then remove all older ones but the ``keep - 1`` newest.

    Every rank must call it: whole tensors are gathered, one at a time, where an engine has spread them; rank 0 alone writes,
    and the others wait for what becomes of it. Returns None, or on every rank why it could not be written: then the
    earlier checkpoints are as they were. Names in the files are those of the bare model, whatever is wrapped around it.
    """
    tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for kind, values in (("model", engine.parameters()), ("optimizer", engine.moments())):
        for name, value in values:
            if ranks.first:
                tensors[kind][name] = value.to("cpu", copy=True).contiguous()
    groups = engine.groups()

    def write() -> str | None:
        step = int(state["step"])
        try:
            _write(folder, step, tensors, {**state, "optimizer_groups": groups, "random": _random_states()})
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder / _aside(step), ignore_errors=True)  # what it takes is needed elsewhere
            return f"{type(error).__name__}: {error}"
        older = [other for other in steps(folder) if other < step]
        for other in older[keep - 1 :]:
            try:
                shutil.rmtree(folder / _name(other))
            except OSError as error:  # the new one is safe all the same; tried again after the next one
                ranks.warn(f"{folder / _name(other)} is not needed any more and cannot be removed: {error}")
        return None

    failure: str | None = ranks.once("checkpoint", write)
    return failure


def _write(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    for stale in (*folder.glob(".writing-*"), *folder.glob(".replaced-*")):
        shutil.rmtree(stale)
    aside, final, replaced = (folder / name for name in (_aside(step), _name(step), f".replaced-{step:08d}"))
    aside.mkdir()
    for name, content in tensors.items():
        save_file(content, aside / f"{name}.safetensors")
    (aside / "state.json").write_text(json.dumps({"format": FORMAT, **state}, indent=1, allow_nan=False) + "\n")
    seal(aside, FILES)
    if final.exists():  # the same step of the same run, reached a second time after a resume
        final.rename(replaced)
    try:
        aside.rename(final)
        _flush(folder)
    except OSError:
        recover(folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def recover(folder: Path) -> None:
    """Give a checkpoint its name back whose successor of the same step did not get it (rank 0 alone, before ``steps``)."""
    for replaced in folder.glob(".replaced-*"):
        final = folder / f"step-{replaced.name.removeprefix('.replaced-')}"
        if not final.exists():
            replaced.rename(final)


def seal(folder: Path, files: Sequence[str]) -> None:
    """Write ``SHA256SUMS`` of these files of a folder beside them, and have the system write all to the disk."""
    (folder / SUMS).write_text("".join(f"{_sha256(folder / name)}  {name}\n" for name in files))
    for path in (*folder.iterdir(), folder):
        _flush(path)


def steps(folder: Path) -> list[int]:
    """The steps of which there is a complete checkpoint in a folder, damaged or not; the newest first."""
    found = [FOLDER.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest_good(folder: Path, candidates: Sequence[int], ranks: Ranks) -> tuple[Path, dict[str, Any]]:
    """The first of these steps whose checkpoint every rank can read undamaged, and its state.

    Rank 0 says of each other one why not (a collective: every rank must call it, with the same candidates). Raises
    ``UsageError`` on every rank, with each reason, if there is no good one.
    """
    refused = []
    for step in candidates:
        path = folder / _name(step)
        state, damage = None, ""
        try:
            state = read_state(path)
        except DamagedError as error:
            damage = str(error)
        damages = [
            f"{text} (rank {rank}, {host})"
            for rank, (text, host) in enumerate(ranks.collect("checkpoint", [damage, socket.gethostname()]))
            if text
        ]
        if not damages and state is not None:
            return path, state
        more = f" and {len(damages) - 1} more rank(s)" if len(damages) > 1 else ""
        refused.append(f"{path.name}: {damages[0]}{more}")
        ranks.say(f"checkpoint refused: {path}: {damages[0]}{more}; the one before it is tried")
    raise UsageError(f"--resume: no checkpoint in {str(folder)!r} is undamaged: {'; '.join(refused)}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON half, after checking that all files are those that were written; raises ``DamagedError``."""
    damage = damaged(checkpoint, FILES)
    if damage is not None:
        raise DamagedError(damage)
    return _parse(checkpoint)


def damaged(folder: Path, files: Sequence[str]) -> str | None:
    """In which way the files of a folder are not those that ``seal`` has seen; None if they are."""
    try:
        sums = (folder / SUMS).read_text()
    except (OSError, UnicodeDecodeError) as error:
        return f"{SUMS} cannot be read ({error})"
    lines = [line.split("  ") for line in sums.splitlines()]
    if sorted(line[-1] for line in lines) != list(files) or not all(len(line) == 2 for line in lines):
        return f"{SUMS} does not list {', '.join(files)}"
    for digest, name in lines:
        if (folder / name).is_symlink():  # what was verified must be what is kept and removed here
            return f"{name} is a link"
        try:
            found = _sha256(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error})"
        if found != digest:
            size = (folder / name).stat().st_size
            return f"{name} is damaged: its {size:,} bytes have another SHA-256 than was written"
    return None


def _parse(checkpoint: Path) -> dict[str, Any]:
    size = (checkpoint / "state.json").stat().st_size
    if size > LARGEST:
        raise DamagedError(f"state.json has {size:,} bytes; more than {LARGEST:,} are not read")
    try:
        state = json.loads((checkpoint / "state.json").read_text())
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"state.json is not JSON ({error})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise DamagedError(f"state.json has format {found}; this program reads {FORMAT}")
    missing = {"step", "optimizer_groups", "random"} - state.keys()
    if missing:
        raise DamagedError(f"state.json has no {', '.join(sorted(missing))}")
    if type(state["step"]) is not int or checkpoint.name != _name(state["step"]):
        raise DamagedError(f"state.json is of step {state['step']}: the folder has been renamed")
    return state


def refuse_mismatch(state: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise if a checkpoint belongs to another model or other data, naming every field that differs.

    ``expected`` maps the name of a section of the state (say, ``model``) to what this run was asked for.
    """
    missing = sorted(section for section in expected if not isinstance(state.get(section), dict))
    if missing:
        raise UsageError(f"--resume: the checkpoint does not say what its {', '.join(missing)} was")
    differences = [
        f"{section} {field}: {state[section].get(field)!r} there, {fields.get(field)!r} here"
        for section, fields in expected.items()
        for field in sorted({*fields, *state[section]})
        if state[section].get(field) != fields.get(field)
    ]
    if differences:
        raise UsageError(f"--resume: the checkpoint is of another run ({'; '.join(differences)})")


def load(checkpoint: Path, engine: Engine, state: Mapping[str, Any]) -> None:
    """Fill a model and its optimizer from a checkpoint with this state, and restore the random states.

    Every rank reads the same files. Works on another number of ranks and under another engine than the writer's. The
    model must have the same parameters: call ``refuse_mismatch`` on the configs first for a sentence that helps. Nothing is
    changed if something does not fit: that is a ``UsageError``.
    """
    saved = load_file(checkpoint / "model.safetensors")
    moments, groups = load_file(checkpoint / "optimizer.safetensors"), state["optimizer_groups"]
    misfit = _misfit(saved, moments, groups, engine)
    if misfit is not None:
        raise UsageError(f"--resume: {checkpoint} has other {misfit}")
    before = _random_states()
    try:
        _restore_random(state["random"])
    except (RuntimeError, ValueError, TypeError, KeyError, OverflowError) as error:
        _restore_random(before)
        raise UsageError(f"--resume: {checkpoint} has other random states: {type(error).__name__}: {error}") from None
    engine.fill(saved, moments, groups)


def _misfit(saved: Mapping[str, Tensor], moments: Mapping[str, Tensor], groups: Any, engine: Engine) -> str | None:
    """What of a checkpoint does not fit, in words; copies would cast another dtype, and broadcast another shape."""
    mine = dict(engine.model.named_parameters())
    if saved.keys() != mine.keys():
        return f"parameters: {sorted(saved.keys() ^ mine.keys())}"
    # the shape that ZeRO 3 has taken away is in ds_shape
    shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in mine.items()}
    for name, value in saved.items():
        if tuple(value.shape) != shapes[name] or value.dtype != mine[name].dtype:
            there, here = f"{tuple(value.shape)}, {value.dtype}", f"{shapes[name]}, {mine[name].dtype}"
            return f"parameters: {name} is {there} there, and {here} here"
    kinds = {key.rpartition("/")[2] for key in moments}
    having = {key.rpartition("/")[0] for key in moments}
    if moments.keys() != {f"{name}/{kind}" for name in having & mine.keys() for kind in kinds}:
        return "moments: not the same kinds for each parameter, or of parameters that are not there"
    for key, value in moments.items():
        if (value.ndim and tuple(value.shape) != shapes[key.rpartition("/")[0]]) or not value.is_floating_point():
            return f"moments: {key} is {tuple(value.shape)}, {value.dtype}"
    known = engine.optimizer.defaults.keys()
    if not isinstance(groups, list) or len(groups) != len(engine.optimizer.param_groups):
        return "groups of parameters"
    if not all(isinstance(group, dict) and group.keys() <= known for group in groups):
        return f"settings of groups than {', '.join(sorted(known))}"
    return None


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


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _aside(step: int) -> str:
    return f".writing-{step:08d}"


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
