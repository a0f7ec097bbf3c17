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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from corpus import share
from run_options import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process's place in the grid; ``everyone`` is the grid as one axis, over which weights are shared."""

    device: torch.device
    rank: int
    grid: DeviceMesh
    everyone: DeviceMesh

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

    def rows(self, first_sample: int, batch: int) -> range:
        """The sample numbers that this rank reads of the ``batch`` samples from ``first_sample`` on."""
        return share(first_sample, batch, self.grid["data"].get_local_rank(), self.data)

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


def start(data: int, context: int | None, device: str) -> Ranks:
    """Join the other processes of the launcher, in a grid of ``data`` times ``fit(data, context)`` ranks.

    Everything that can be wrong is checked before the first message, on values that all ranks share, so that no rank
    waits for one that has already given up.
    """
    context = fit(data, context)
    world = data * context
    place = _device(device)
    backend, device_id = ("nccl", place) if place.type == "cuda" else ("gloo", None)
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=device_id)
    else:
        alone = dist.HashStore()
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, device_id=device_id)
    grid = init_device_mesh(place.type, (data, context), mesh_dim_names=("data", "context"))
    everyone = init_device_mesh(place.type, (world,), mesh_dim_names=("everyone",))
    return Ranks(place, dist.get_rank(), grid, everyone)


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

    After success the group is left in good order first. Then the interpreter's own shutdown is skipped: while it drops
    the last gloo objects, about one loaded run in ten dies of "terminate called without an active exception", all work
    done.
    """
    if status == 0:
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
