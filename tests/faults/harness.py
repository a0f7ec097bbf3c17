"""Ranks as real processes over gloo, of which some come to grief, and what each of them said in the end.

this process      holds the store, as a launcher does; starts the ranks; kills what is left when the time is up
forkserver        has imported torch once; ranks are forked from it in milliseconds
rank 0 ... n-1    run one program each, and write down how it ended: a value, or an error and when it came
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 3.0  # RINGFLASH_TIMEOUT, in seconds
GRACE = 5.0  # seconds that may pass beyond it
_START = 120.0  # seconds for processes to start on a busy machine
_PARTS = ["torch.distributed.device_mesh", "ringflash.compat", "faults.programs"]
_PARTS += [
    "torch._dynamo",
    "torch._inductor.utils",
    "torch.fx.experimental.symbolic_shapes",
]  # what a first call imports


@dataclass(frozen=True)
class Ending:
    """How a rank ended."""

    status: int | None
    """Of the process, as ``multiprocessing`` has it: minus the signal that killed it; None if it had to be killed."""
    value: Any = None
    """What its program returned, through JSON."""
    error: str = ""
    """The name of what it raised."""
    text: str = ""
    seconds: float = 0.0
    """From the fault to the end."""


class Rank:
    """What a program knows of itself."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.began = time.monotonic()

    def now(self) -> None:
        """The fault comes now."""
        self.began = time.monotonic()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(os.getpid(), number)


Program = Callable[[Rank], Any]


def suffer(
    ranks: int,
    program: Program,
    *,
    environment: dict[str, str] | None = None,
    patience: float = PATIENCE,
    own_store: bool = False,
    seconds: float | None = None,
) -> list[Ending]:
    """Run ``program`` on so many ranks; how each ended. Nothing is left running.

    ``own_store``: rank 0 holds the store, as without a launcher. A rank that does not end within ``seconds`` after the first
    one (default: ``patience`` and a grace) is killed.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(_PARTS)
    limit = patience + GRACE if seconds is None else seconds
    with tempfile.TemporaryDirectory() as folder:
        store = None if own_store else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = _free_port() if store is None else store.port
        settings = {"RINGFLASH_TIMEOUT": str(patience), "OMP_NUM_THREADS": "1", **(environment or {})}
        arguments = (ranks, port, own_store, settings, folder, program)
        processes = [forks.Process(target=_live, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
        try:
            for process in processes:
                process.start()
            _wait(processes, time.monotonic() + _START, any)
            _wait(processes, time.monotonic() + limit, all)
            statuses = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [_ending(Path(folder, f"{rank}.json"), status) for rank, status in enumerate(statuses)]


def _wait(processes: list[Any], until: float, enough: Callable[[Any], bool]) -> None:
    while time.monotonic() < until and not enough(process.exitcode is not None for process in processes):
        time.sleep(0.02)


def _ending(path: Path, status: int | None) -> Ending:
    said = json.loads(path.read_text()) if path.exists() else {}
    return Ending(status, **said)


def _live(
    rank: int, ranks: int, port: int, own_store: bool, settings: dict[str, str], folder: str, program: Program
) -> None:
    os.environ.update(settings)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # the chatter of gloo and of torch about faults
    torch.set_num_threads(1)
    master = own_store and rank == 0
    store = dist.TCPStore("127.0.0.1", port, is_master=master, wait_for_workers=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    me = Rank(rank, ranks)
    try:
        said = {"value": program(me)}
    except Exception as error:
        said = {"error": type(error).__name__, "text": str(error)}
    said["seconds"] = time.monotonic() - me.began
    path = Path(folder, f"{rank}.json")
    path.with_suffix(".part").write_text(json.dumps(said))
    path.with_suffix(".part").rename(path)
    if "value" in said or master:
        _linger(store, rank, ranks)
    os._exit(0)


def _linger(store: dist.Store, rank: int, ranks: int) -> None:
    """A rank that is done does not look like one that is gone, as long as the others are at it."""
    store.set(f"done/{rank}", "")
    until = time.monotonic() + GRACE
    while time.monotonic() < until and not store.check([f"done/{other}" for other in range(ranks)]):
        time.sleep(0.02)


def _free_port() -> int:
    probe = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return int(probe.port)
