"""train.py or finetune_hf.py with one thing that goes wrong at one step on one rank, in its first attempt alone.

faulty.py kill:1:6 train.py ARGUMENTS          rank 1 is killed when step 6 begins
faulty.py signal:1:3:SIGTERM train.py ...      rank 1 gets a signal when step 3 begins
faulty.py launcher:0:3:SIGTERM train.py ...    rank 0 sends it to the launcher
faulty.py forward:1:3:blocks.1 train.py ...    one number that this module returns on rank 1 is NaN in step 3
faulty.py backward:1:3:blocks.1 train.py ...   one number of the gradient of what it returns is NaN
faulty.py once:1:3:blocks.1 train.py ...       as forward, but a second time all is well
faulty.py weight:1:3:NAME train.py ...         a number of a parameter is NaN on rank 1 from step 3 on
faulty.py full:0:3-5 train.py ...              no file can be longer than 4 kB while steps 3 to 5 are saved
faulty.py rows:FILE train.py ...               nothing goes wrong; the samples of each step are listed in FILE
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "launch"))
import loop
import ranks
from preemption import Preemption

FIRST = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
RANK = int(os.environ.get("RANK", "0"))


def at_step(rank: int, step: int, act: Any) -> None:
    """Have this rank call ``act(run, preemption)`` when that batch is taken, and what it returned when its step has ended."""
    take = loop.Run._train_step

    def watched(run: loop.Run, preemption: Preemption) -> bool:
        undo = act(run, preemption) if FIRST and (rank, step) == (RANK, run.step + run._skipped + 1) else None
        try:
            return take(run, preemption)
        finally:
            if undo is not None:
                undo()

    loop.Run._train_step = watched  # type: ignore[method-assign]


def spoilt(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, with a NaN in its last place."""
    out = tensor.clone()
    out.view(-1)[-1] = torch.nan
    return out


def in_module(kind: str, name: str) -> Any:
    """What spoils the output of a module, or the gradient of it, until it is undone."""

    def act(run: loop.Run, preemption: Preemption) -> Any:
        left = [1 if kind == "once" else 99]

        def hook(module: Any, inputs: Any, output: torch.Tensor) -> Any:
            left[0] -= 1
            if left[0] < 0:
                return None
            if kind == "backward":
                output.register_hook(spoilt)
                return None
            return spoilt(output)

        return run.engine.model.get_submodule(name).register_forward_hook(hook).remove

    return act


def in_weight(name: str) -> Any:
    """What spoils a parameter."""

    def act(run: loop.Run, preemption: Preemption) -> None:
        with torch.no_grad():
            run.engine.model.get_parameter(name).view(-1)[-1] = torch.nan

    return act


def flip_and_die(run: loop.Run, preemption: Preemption) -> None:
    """Damage the newest checkpoint, then this process."""
    file = sorted((run.options.out / "checkpoints").glob("step-*/model.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_signal(run: loop.Run, preemption: Preemption) -> None:
    """Until one has come, or two minutes."""
    for _ in range(1200):
        if preemption.asked:
            break
        time.sleep(0.1)


def fill_disk(steps: str) -> None:
    """Let no file grow beyond 4 kB while rank 0 saves one of these steps."""
    first, last = map(int, steps.split("-"))
    save = loop.Run._save

    def limited(run: loop.Run) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if RANK == 0 and first <= run.step <= last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            save(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    loop.Run._save = limited  # type: ignore[method-assign]


def list_rows(file: Path) -> None:
    """Add a line to ``file`` for each batch of this rank: steps done, data rank, context rank, numbers of its rows."""
    rows = ranks.Ranks.rows
    asked: list[range] = []

    def listed(self: ranks.Ranks, first: int, batch: int) -> range:
        asked.append(rows(self, first, batch))
        return asked[-1]

    ranks.Ranks.rows = listed  # type: ignore[method-assign]

    take = loop.Run._train_step

    def watched(run: loop.Run, preemption: Preemption) -> bool:
        taken, step = len(asked), run.step
        done = take(run, preemption)
        data, context = (run.ranks.grid[axis].get_local_rank() for axis in ("data", "context"))
        with file.open("a") as stream:  # one short write: lines of several processes do not mix
            stream.write(f"{step} {data} {context} {' '.join(map(str, asked[taken]))}\n")
        return done

    loop.Run._train_step = watched  # type: ignore[method-assign]


def print_timeouts() -> None:
    """Of each group of the grid, when the run has been made."""
    make = loop.Run.__init__

    def made(run: loop.Run, *arguments: Any) -> None:
        make(run, *arguments)
        groups = [dist.group.WORLD, *run.ranks.grid.get_all_groups(), run.ranks.everyone.get_group()]
        seconds = [group._get_backend(run.ranks.device).options._timeout.total_seconds() for group in groups if group]
        run.ranks.say(f"time-outs: {seconds}")

    loop.Run.__init__ = made  # type: ignore[method-assign]


def plant(fault: str) -> None:
    """Prepare what goes wrong."""
    kind, *where = fault.split(":")
    if kind == "none":
        return None
    if kind == "timeouts":
        return print_timeouts()
    if kind == "rows":
        return list_rows(Path(where[0]))
    if kind == "full":
        return fill_disk(where[1])
    acts = {
        "kill": lambda run, preemption: os.kill(os.getpid(), signal.SIGKILL),
        "kill+flip": flip_and_die,
        "signal": lambda run, preemption: os.kill(os.getpid(), getattr(signal, where[2])),
        "wait": wait_for_signal,
    }
    act = acts.get(kind) or (in_weight(where[2]) if kind == "weight" else in_module(kind, where[2]))
    at_step(int(where[0]), int(where[1]), act)


if __name__ == "__main__":
    _, fault, script, *rest = sys.argv
    sys.argv = [script, *rest]
    plant(fault)
    program = importlib.import_module(script.removesuffix(".py"))
    ranks.finish(loop.attempt(script, lambda: program.main(program.parse())))
