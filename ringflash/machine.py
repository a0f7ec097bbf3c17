"""What this machine has, what ringflash will use of it, and a proof that the answer comes out right here.

`python -m ringflash check` prints it. The first half is an inventory: versions, devices, ways to move tensors between
processes, attention backends, optional extras; whatever is absent says why, or how to get it. The second half runs the
real thing: ring attention over three ranks in this process, forward and backward in float64, against one device, with
every backend that serves here. Nothing is started, downloaded or written.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ringflash as rf
from ringflash.backend import BACKENDS, select
from ringflash.groups import libraries
from ringflash.reference import Scoring

__all__ = ["EXACT", "Proof", "device_kinds", "prove", "report", "serving"]

EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}
"""The largest error that counts as none, by the dtype that was computed in."""

EXTRAS = {
    "train": ("matplotlib", "safetensors", "tqdm"),
    "draw": ("matplotlib",),
    "tensorboard": ("tensorboard",),
    "transformers": ("accelerate", "transformers"),
    "deepspeed": ("deepspeed",),
    "data": ("datasets",),
    "test": ("hatchling", "hypothesis", "pytest", "xdist"),
    "dev": ("mypy", "ruff"),
}
"""Each optional extra, and the modules that it brings."""

NAMES = tuple(dict.fromkeys(["triton", *BACKENDS]))
"""What ``backend=`` accepts beside "auto"."""

Row = tuple[str, str]


def report() -> str:
    """The inventory of this machine: one line for each thing, in five groups."""
    groups = {
        f"ringflash {rf.__version__}": software(),
        "devices": devices(),
        "between processes": transports(),
        "attention backends": backends(),
        "optional extras": extras(),
    }
    lines: list[str] = []
    for title, rows in groups.items():
        lines += ["", title, *(f"  {name:<12} {value}" for name, value in rows)]
    return "\n".join(lines[1:])


def software() -> Iterator[Row]:
    yield "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    yield "torch", f"{torch.__version__}, built for {built}"
    yield "Triton", version("triton")
    yield "NumPy", np.__version__


def devices() -> Iterator[Row]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    vectors = torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"{usable} of {os.cpu_count()} cores usable, {torch.get_num_threads()} threads, {vectors}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
    if not torch.cuda.device_count():
        yield "cuda", "none"


def transports() -> Iterator[Row]:
    """How ranks in different processes can exchange tensors. (Ranks in one process need nothing.)"""
    absent = "no: not in this build of torch"
    yield "gloo", "yes, for CPU tensors" if "gloo" in libraries() else absent
    if "nccl" in libraries():
        use = "yes, for CUDA tensors" if torch.cuda.device_count() else "no: there is no CUDA device"
        yield "nccl", f"{use} (NCCL {'.'.join(map(str, torch.cuda.nccl.version()))})"
    else:
        yield "nccl", absent


def backends() -> Iterator[Row]:
    """Each attention backend: the kinds of device on which it serves a plain call, or what keeps it from serving."""
    kinds = device_kinds()
    for name in NAMES:
        where = [kind for kind in kinds if name in serving(kind)]
        yield name, f"yes, on {' and '.join(where)}" if where else f"no: {refusal(name, kinds[-1])}"


def device_kinds() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def serving(kind: str) -> list[str]:
    """The backends that serve plain attention on this kind of device."""
    return [name for name in NAMES if not refusal(name, kind)]


def refusal(name: str, kind: str) -> str:
    """What keeps a backend from serving plain attention on this kind of device; empty if nothing does."""
    x = torch.empty(1, 1, 1, 16, device=kind)
    try:
        select(name, x, x, Scoring(scale=1.0))
    except ValueError as error:
        reason = str(error).replace(f"backend={name!r}", "it").partition(";")[0]
        return "; ".join(filter(None, [reason, kernels_missing()])) if name == "triton" else reason
    return ""


def kernels_missing() -> str:
    """What keeps Triton kernels from running here; empty if nothing does."""
    try:
        import ringflash_kernels  # here, because a bare source tree does not have it on its path
    except ModuleNotFoundError:
        return "ringflash_kernels is not installed: pip install -e ."
    return ringflash_kernels.why_not()


def extras() -> Iterator[Row]:
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        yield extra, f"missing {', '.join(missing)}: {install_command(extra)}" if missing else "installed"


def install_command(extra: str) -> str:
    """The pip command that adds an extra: to the clone if this is one, else to the installed package."""
    clone = Path(__file__).resolve().parents[1]
    if not (clone / "pyproject.toml").exists():
        return f'pip install "ringflash[{extra}]"'
    return f'pip install -e "{"." if clone == Path.cwd() else clone}[{extra}]"'


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Proof:
    """The largest absolute error of each result of the ring, and how long it took to find."""

    device: str
    backend: str
    dtype: torch.dtype
    errors: dict[str, float]
    seconds: float

    @property
    def worst(self) -> float:
        return max(self.errors.values(), key=lambda error: math.inf if math.isnan(error) else error)

    @property
    def allowed(self) -> float:
        return EXACT[self.dtype]

    @property
    def exact(self) -> bool:
        return all(error <= self.allowed for error in self.errors.values())  # NaN is not

    def __str__(self) -> str:
        errors = "  ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        return f"{self.device} {self.backend:<11} {str(self.dtype).removeprefix('torch.'):<8} {errors}  in {self.seconds:.2f} s"


def prove(device: str = "cpu", backend: str = "auto", ranks: int = 3, length: int = 37) -> Proof:
    """Causal attention on a ring of ranks in this process, against the dense reference on one device, in float64.

    The ring computes in float64 too, if the backend can (Triton's kernels compute in float32).

    The length is odd, so that shards are uneven, and there are fewer key heads than query heads. The loss has random
    weights: under a sum or a mean whole classes of wrong gradients vanish.
    """
    began = time.perf_counter()
    random = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=random, device=device, dtype=torch.float64)
    q, k, v, g = (draw(2, length, heads, 16) for heads in (4, 2, 2, 4))
    single = select(backend, q.float(), v.float(), Scoring(1.0)).name == "triton"
    dtype = torch.float32 if single else torch.float64

    def one_rank(group: Any) -> list[Tensor]:
        s = rf.Sharding(length, group, mask=rf.causal)
        mine = [s.shard(x.to(dtype), dim=1) for x in (q, k, v, g)]
        return [s.positions, *results(partial(rf.ring_attention, s=s, return_lse=True, backend=backend), *mine)]

    alone = results(partial(rf.flash_attention, mask=rf.causal, return_lse=True, backend="reference"), q, k, v, g)
    together = [torch.full_like(x, torch.nan) for x in alone]  # a row that no rank computed stays NaN
    for positions, *shards in rf.local_world(ranks=ranks).run(one_rank):
        for whole, shard in zip(together, shards, strict=True):
            whole[:, positions.to(device)] = shard.double()
    errors = {
        name: (ours - theirs).abs().max().item()
        for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), together, alone, strict=True)
    }
    return Proof(device, backend, dtype, errors, time.perf_counter() - began)


def results(attention: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    """Out, lse, dq, dk and dv of the loss ``(out * g).sum()``, all ``[batch, seq, heads, ...]``."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves)
    gradients = torch.autograd.grad((out * g).sum(), leaves)
    return [out.detach(), lse.detach().transpose(1, 2), *gradients]
