"""The processes of a run: who they are and what they run on.

Ranks form a grid. Along ``context`` ranks hold shards of the same samples; along ``data`` they hold other samples:

                context 0    context 1
    data 0        rank 0       rank 1        the same rows, each rank half of every row
    data 1        rank 2       rank 3        other rows

Weights are the same everywhere, so their gradients are averaged over the whole grid (``engines.py``). Without a launcher
(plain ``python train.py``) the same program is a grid of one.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from corpus import share
from meeting import meet
from notices import PATIENCE, Notices
from run_options import UsageError

# PyTorch's flight recorder: what each rank was waiting for when a hang has timed out (docs/cluster.md has the reasons).
FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "20000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_DUMP_TEMP_FILE": "runs/hangs/rank_",
}


@dataclass(frozen=True)
class Ranks:
    """This process's place in the grid; ``everyone`` is the grid as one axis, over which weights are shared."""

    device: torch.device
    rank: int
    grid: DeviceMesh
    everyone: DeviceMesh
    notices: Notices

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.everyone.size()

    @property
    def data(self) -> int:
        """Number of ranks along the data axis."""
        return self.grid["data"].size()

    @property
    def context(self) -> int:
        """Number of ranks that share a sequence."""
        return self.grid["context"].size()

    @property
    def first(self) -> bool:
        """True on the one rank that prints and writes files."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.first:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a line to stderr, once for every machine."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"WARNING: {text}", file=sys.stderr, flush=True)

    def rows(self, first_sample: int, batch: int) -> range:
        """The sample numbers that this rank reads of the ``batch`` samples from ``first_sample`` on."""
        return share(first_sample, batch, self.grid["data"].get_local_rank(), self.data)

    def once(self, what: str, work: Callable[[], Any]) -> Any:
        """What ``work`` returns on rank 0, however long it takes: see ``notices.Notices.once``."""
        return self.notices.once(what, work)

    def collect(self, what: str, mine: Any) -> list[Any]:
        """Every rank's plain value, by rank: see ``notices.Notices.collect``."""
        return self.notices.collect(what, mine)

    def agree(self, *values: int) -> list[int]:
        """The largest of the ranks' values in each place: one small message (a collective: every rank must call it)."""
        tensor = torch.tensor(values, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.everyone.get_group())
        return [int(value) for value in tensor.tolist()]

    def largest(self, value: float) -> float:
        """The largest of the ranks' values, NaN if one is (a collective: every rank must call it)."""
        tensor = torch.tensor([value, float(value != value)], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.everyone.get_group())
        return float("nan") if tensor[1] else float(tensor[0])

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64 (a collective: every rank must call it)."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, group=self.everyone.get_group())
        return [float(value) for value in tensor.tolist()]


def fit(data: int, context: int | None) -> int:
    """How many ranks share a sample; ``context=None`` takes what ``data`` leaves of the processes. Sends nothing."""
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise UsageError(
            "accelerate launch --cpu starts one process, whatever --num_processes is; --multi_gpu --num_processes N starts N, "
            "on a CPU too"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    context = world // max(1, data) if context is None else context
    if data < 1 or data * context != world:
        raise UsageError(
            f"--data {data} x --context {context} is {data * context} ranks, but {world} process(es) were started; "
            f"the product must be {world} (torchrun --nproc-per-node sets the number of processes)"
        )
    return context


def start(data: int, context: int | None, device: str, timeout: float | None = None) -> Ranks:
    """Join the other processes of the launcher, in a grid of ``data`` times ``fit(data, context)`` ranks.

    Everything that can be wrong is checked before the first message, on values that all ranks share, so that no rank
    waits for one that has already given up. ``timeout`` is how many seconds a rank waits for another in a collective; None
    is PyTorch's default.
    """
    context = fit(data, context)
    world = data * context
    place = _device(device)
    backend, device_id = ("nccl", place) if place.type == "cuda" else ("gloo", None)
    if place.type == "cuda":
        _record_flights()
    patience = None if timeout is None else timedelta(seconds=timeout)
    store, rank = meet()
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("groups", store),
        rank=rank,
        world_size=world,
        timeout=patience,
        device_id=device_id,
    )
    grid = init_device_mesh(place.type, (data, context), mesh_dim_names=("data", "context"))
    everyone = init_device_mesh(place.type, (world,), mesh_dim_names=("everyone",))
    if patience is not None:  # groups do not inherit it
        for group in (*grid.get_all_groups(), everyone.get_group()):
            dist.distributed_c10d._set_pg_timeout(patience, group)
    notices = Notices(dist.PrefixStore("notices", store), rank, world, timeout or PATIENCE)
    return Ranks(place, rank, grid, everyone, notices)


def _record_flights() -> None:
    """Have every rank write what it waited for if a collective times out, unless the environment has it otherwise."""
    for name, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)
    Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"]).parent.mkdir(parents=True, exist_ok=True)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > gpus:
        raise UsageError(
            f"{processes} processes on this machine but {gpus} GPU(s): one each is needed, or --device cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def finish(status: int = 0) -> NoReturn:
    """End the process at once, with this exit status.

    After success, and when all ranks were told to stop, the group is left in good order first: rank 0 may hold the store that
    the others read. Then the interpreter's own shutdown is skipped: while it drops the last gloo objects, about one loaded
    run in ten dies of "terminate called without an active exception", all work done.
    """
    if status in (0, os.EX_TEMPFAIL):
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: on the GPU if it has one, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
