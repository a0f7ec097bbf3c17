"""What a process holds, counted, and whether it grows.

A gauge is a number that must stay where it is once a program is warm. Samples are taken every few steps, after a garbage
collection, and the verdict compares medians, so that one sample with a garbage collection of somebody else does not decide:

    samples   |  warm-up  |  second quarter  |  third  |  last quarter  |
                              median a                     median b          grown = b - a, over half of the steps

Each gauge has an allowance per step and a constant one. ``heap`` is what malloc has handed out and not got back, tensors
included, and ``blocks`` what Python's own allocator has: both are exact, where resident memory is a staircase.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from statistics import median
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash import recipe

PAGE = os.sysconf("SC_PAGE_SIZE")


class Allowance(NamedTuple):
    """What a gauge may grow by: so much in each step, and so much altogether."""

    per_step: float
    once: float


ALLOWANCES = {
    "rss": Allowance(2048, 6 << 20),  # pages that malloc keeps: a staircase
    "heap": Allowance(256, 96 << 10),
    "blocks": Allowance(1, 1500),
    "files": Allowance(0, 0.5),
    "threads": Allowance(0, 1),
    "store keys": Allowance(0.02, 6),
    "works": Allowance(0, 8),
    "tensors": Allowance(0.01, 8),
    "tensor bytes": Allowance(16, 32 << 10),
}
OBJECTS = Allowance(0.02, 40)
"""Of one type."""
TABLES = Allowance(0.01, 16)
"""Of one container of the library."""


class Growth(NamedTuple):
    """One gauge, from its first to its last steps."""

    name: str
    early: float
    late: float
    per_step: float
    allowed: bool


class Gauges:
    """Samples of everything in this process; ``store`` counts keys of a process group's store.

    They are kept in a file: a list of them here would be what grows.
    """

    def __init__(self, store: Any = None) -> None:
        self.count = 0
        self._store = store
        self._works: weakref.WeakSet[Any] = weakref.WeakSet()
        self._file = TemporaryFile("w+")  # noqa: SIM115 - it lives as long as this
        self._watch_works()
        _shrink_tables()
        gc.collect()
        gc.freeze()  # what was imported stays, and is not looked at again

    def sample(self, step: int) -> dict[str, float]:
        """Look at everything now, but for what stands in a cache that has a bound: that is not held for ever."""
        settle()
        found = {"step": float(step), **dict(self._read())}
        json.dump(found, self._file)
        self._file.write("\n")
        self._file.flush()
        self.count += 1
        return found

    def growths(self) -> list[Growth]:
        """All gauges, those that have grown too much first."""
        self._file.seek(0)
        samples = [json.loads(line) for line in self._file]
        quarter = len(samples) // 4
        early, late = slice(quarter, 2 * quarter), slice(-quarter, None)

        def medians(name: str) -> tuple[float, float]:
            values = [sample.get(name, 0) for sample in samples]
            return median(values[early]), median(values[late])

        first, last = medians("step")
        found = []
        for name in sorted({name for sample in samples for name in sample} - {"step"}):
            a, b = medians(name)
            allowance = allowance_of(name)
            wobble = 0.01 * a if name.startswith("objects") else 0  # what is alive is of some sharding or other
            allowed = b - a <= allowance.per_step * (last - first) + allowance.once + wobble
            found.append(Growth(name, a, b, (b - a) / (last - first), allowed))
        return sorted(found, key=lambda growth: growth.allowed)

    def _read(self) -> Iterator[tuple[str, float]]:
        yield "rss", resident()
        yield "heap", malloced()
        yield "blocks", sys.getallocatedblocks()
        yield "files", len(os.listdir("/proc/self/fd"))
        yield "threads", len(os.listdir("/proc/self/task"))
        if self._store is not None:
            yield "store keys", self._store.num_keys()
        yield "works", len(self._works)
        objects = gc.get_objects()
        tensors = [x for x in objects if issubclass(type(x), Tensor)]
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.device.type == "cpu"
        }
        yield "tensors", len(tensors)
        yield "tensor bytes", sum(storages.values())
        for kind, count in Counter(type(x) for x in objects).items():
            yield f"objects: {kind.__module__}.{kind.__qualname__}", count
        for path, size in tables():
            yield f"table: {path}", size

    def _watch_works(self) -> None:
        """Every Work that torch.distributed hands out from now on is known for as long as it lives."""
        for name in ("batch_isend_irecv", "all_reduce", "all_gather"):
            setattr(dist, name, self._noting(getattr(dist, name)))

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            for work in result if isinstance(result, list) else [result]:
                if isinstance(work, dist.Work):
                    self._works.add(work)
            return result

        noting.__name__ = function.__name__
        return noting


def allowance_of(name: str) -> Allowance:
    """What the gauge of this name may grow by."""
    kind = name.partition(":")[0]
    return {"objects": OBJECTS, "table": TABLES}.get(kind) or ALLOWANCES[name]


def tables() -> Iterator[tuple[str, int]]:
    """Every container that the library's modules hold, and those inside its objects there: path and size."""
    seen: set[int] = set()
    for name, inside in _modules():
        for key, value in inside.items():
            if not key.startswith("__"):
                yield from _sizes(f"{name}.{key}", value, seen, depth=4)


def _sizes(path: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, int]]:
    if id(value) in seen or isinstance(value, type | Tensor):
        return
    if hasattr(value, "cache_info"):
        seen.add(id(value))
        yield path, value.cache_info().currsize
    elif isinstance(value, Mapping | list | set | frozenset | weakref.WeakSet | weakref.WeakValueDictionary):
        seen.add(id(value))
        yield path, len(value)
        inside = list(value.values()) if isinstance(value, Mapping) else list(value)
        total = Counter[str]()
        for x in inside:
            if depth and _ours(type(x)):
                for deeper, size in _sizes(f"{path}[{type(x).__name__}]", x, seen, depth - 1):
                    total[deeper] += size
        yield from total.items()
    elif depth and _ours(type(value)) and hasattr(value, "__dict__"):
        seen.add(id(value))
        for key, inner in list(vars(value).items()):
            yield from _sizes(f"{path}.{key}", inner, seen, depth - 1)


def _modules() -> Iterator[tuple[str, dict[str, Any]]]:
    """The library's modules that are imported, and what stands in them."""
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] in ("ringflash", "ringflash_kernels"):
            yield name, dict(vars(module))


def _caches() -> Iterator[tuple[str, Any]]:
    for name, inside in _modules():
        for key, value in inside.items():
            if hasattr(value, "cache_info"):
                yield f"{name}.{key}", value


def _shrink_tables() -> None:
    """Tables that are bounded, and which half of a short run would need to fill, hold less."""
    recipe.recipes._most = 8
    accord = sys.modules.get("ringflash.accord")
    if accord is not None:
        accord._MOST = 64  # type: ignore[attr-defined]


def _ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "ringflash" and not issubclass(kind, torch.nn.Module)


def settle() -> None:
    """Let go of what nobody needs, and of what stands in a cache that has a bound."""
    for _, cached in _caches():
        if cached.cache_info().maxsize is not None:
            cached.cache_clear()
    gc.collect()
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo2
    return libc


def malloced() -> int:
    """Bytes that malloc has handed out and not got back, in all arenas; 0 where the C library does not say."""
    try:
        info = _libc().mallinfo2()
    except AttributeError:
        return 0
    return int(info.uordblks + info.hblkhd)


def culprits(before: tracemalloc.Snapshot, after: tracemalloc.Snapshot, most: int = 8) -> list[str]:
    """The lines of Python that hold more than before, and how much."""
    differences = [d for d in after.compare_to(before, "lineno") if d.size_diff > 0]
    return [f"{d.size_diff:+,} B in {d.count_diff:+} blocks at {d.traceback}" for d in differences[:most]]


def spell(growths: Sequence[Growth], everything: bool = False) -> str:
    """A table for people: the gauges of a process, and of objects and tables those that grew."""
    shown = [g for g in growths if everything or not g.allowed or g.name in ALLOWANCES]
    width = max(len(g.name) for g in shown)
    lines = [f"{'':{width}}  {'early':>14} {'late':>14} {'a step':>12}"]
    for g in shown:
        mark = "" if g.allowed else "   GROWS"
        lines.append(f"{g.name:{width}}  {g.early:14,.0f} {g.late:14,.0f} {g.per_step:12,.4f}{mark}")
    return "\n".join(lines)
