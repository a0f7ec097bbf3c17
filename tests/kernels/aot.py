"""What the compiler makes of the kernels that ringflash ships, on a machine without a GPU.

A kernel that spills, or whose softmax no longer runs under the matrix products, is right and slow, and no test of numbers
sees it. So every shipped configuration is compiled for each architecture and the result read: registers, spills, shared
memory, matrix and copy instructions, and in which order they stand. ``compiled.json`` holds what a person has looked at.

What is compiled is what is launched: the public functions are called on small CPU tensors, and :mod:`compiler` records what
they launch. A case is compiled in a child process, because some failures of a compiler end the process.

    python tests/kernels/aot.py                            the report, and what is wrong against the table
    python tests/kernels/aot.py --case "forward d128" --arch 90    some of it
    python tests/kernels/aot.py --write                    the table of this Triton version: review the diff, then commit

PYTHONPATH needs the root of the repository and ``kernels/``, where the package is not installed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from unittest import mock

import torch
import triton
from compiler import Compiled, Launch, compiled, recorded
from torch import Tensor

from ringflash.reference import Scoring
from ringflash_kernels import backward, config, decode, delta, forward, merge
from ringflash_kernels.config import Config

TABLE = Path(__file__).with_name("compiled.json")
VERSION = ".".join(triton.__version__.split(".")[:2])
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # what one block of threads may have
TENSOR_COLUMNS = 512  # of Blackwell's tensor memory: of a kernel that wants more, Triton makes a trap, without a word
SLACK = 8  # registers that another patch release of the compiler may take
SECONDS = 300  # no kernel compiles that long

BATCH, TOKENS, HEADS = 2, 512, 4  # what strides and sizes are multiples of is all that matters
WIDTHS = (*((d, d) for d in (16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256)), (192, 128))
COMMON = ((128, 128), (64, 64), (256, 256))


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One public call, in the words of the configuration table; ``tiles`` instead of the table's, to try others."""

    arch: int
    call: str
    head_dim: int
    value_dim: int
    dtype: str = "bfloat16"
    options: tuple[str, ...] = ()
    tiles: Config | None = None

    def __str__(self) -> str:
        width = f"d{self.head_dim}" if self.head_dim == self.value_dim else f"d{self.head_dim}/{self.value_dim}"
        return " ".join([f"sm_{self.arch}", self.call, width, self.dtype, *self.options])

    def launches(self) -> list[Launch]:
        """What this call launches on that architecture; nothing runs."""
        high = "high" if "tf32x3" in self.options else "highest"
        with contextlib.ExitStack() as scope:
            scope.enter_context(mock.patch.object(config, "architecture", lambda device: self.arch))
            scope.enter_context(mock.patch.object(torch, "get_float32_matmul_precision", lambda: high))
            if self.tiles:
                for direction in CALLS[self.call].reads:
                    scope.enter_context(config.use(direction, self.tiles))
            launches = scope.enter_context(recorded(self.arch))
            CALLS[self.call].make(self)
        if not launches:
            raise RuntimeError(f"{self} launched nothing")
        return launches

    @property
    def wgmma(self) -> bool:
        """Must all its products be Hopper's own? Decoding multiplies too few rows, and float32 is no business of theirs."""
        return self.arch == 90 and self.dtype != "float32" and self.call != "decode"

    @property
    def carried(self) -> bool:
        return "carry" in self.options

    @property
    def out_dtype(self) -> torch.dtype:
        """In a ring, sums are float32; on one device a result has the dtype of the inputs."""
        return torch.float32 if self.carried else getattr(torch, self.dtype)

    @property
    def scoring(self) -> Scoring:
        return Scoring(
            scale=self.head_dim**-0.5,
            softcap=30.0 if "softcap" in self.options else 0.0,
            alibi_slopes=torch.ones(HEADS) if "alibi" in self.options else None,
            dropout_p=0.1 if "dropout" in self.options else 0.0,
            seed=2**62 + 1,
        )

    def tensor(self, tokens: int, heads: int, width: int) -> Tensor:
        start = 1 if "misaligned" in self.options else 0
        numbers = torch.empty(start + BATCH * tokens * heads * width, dtype=getattr(torch, self.dtype))
        return numbers[start:].view(BATCH, tokens, heads, width)

    def tensors(self, queries: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, two query heads to a key head."""
        q = self.tensor(queries, HEADS, self.head_dim)
        k, v = (self.tensor(TOKENS, HEADS // 2, width) for width in (self.head_dim, self.value_dim))
        return q, k, v

    def out(self) -> Tensor:
        return torch.empty(BATCH, TOKENS, HEADS, self.value_dim, dtype=self.out_dtype)

    def statistic(self) -> Tensor:
        return torch.empty(BATCH, HEADS, TOKENS)


class _Unread:
    """Intervals that nobody reads: only their types reach the compiler."""

    begin = end = torch.empty(1, TOKENS, dtype=torch.int32)
    query_positions = key_positions = torch.empty(TOKENS, dtype=torch.int32)

    def query_blocks(self, block_q: int, block_k: int) -> Tensor:
        return torch.empty(1, -(-TOKENS // block_q), 4, dtype=torch.int32)

    def key_blocks(self, block_q: int, block_k: int) -> Tensor:
        return torch.empty(1, -(-TOKENS // block_k), 4, dtype=torch.int32)

    def query_span(self, block_q: int, block_k: int) -> tuple[int, int]:
        return 0, -(-TOKENS // block_q)


def _forward(case: Case) -> None:
    carry = (case.out(), case.statistic()) if case.carried else None
    forward.attend(*case.tensors(), _Unread(), case.scoring, carry, case.out_dtype)


def _backward(case: Case, deterministic: bool = False) -> None:
    q, k, v = case.tensors()
    dout = case.tensor(TOKENS, HEADS, case.value_dim)
    carry = torch.empty(q.shape) if case.carried else None
    backward.attend_backward(
        dout, q, k, v, case.statistic(), case.statistic(), _Unread(), case.scoring, carry,
        (case.out_dtype, case.out_dtype), deterministic,
    )  # fmt: skip


def _deterministic(case: Case) -> None:
    _backward(case, deterministic=True)


def _delta(case: Case) -> None:
    delta.delta(case.tensor(TOKENS, HEADS, case.value_dim), case.out(), case.statistic())


def _decode(case: Case) -> None:
    queries = 1 if "one" in case.options else 64 // 2  # the fewest, and the most that fill a tile
    carry = (case.out()[:, :queries], case.statistic()[:, :, :queries]) if case.carried else None
    decode.attend(*case.tensors(queries), _Unread(), case.scoring, carry, case.out_dtype)


def _merge(case: Case) -> None:
    merge.merge(torch.stack([case.out()] * 3), torch.stack([case.statistic()] * 3), (case.out(), case.statistic()))


class Call(NamedTuple):
    """A public function, and the directions of the configuration table that it reads."""

    make: Callable[[Case], None]
    reads: tuple[config.Direction, ...] = ()


CALLS = {
    "forward": Call(_forward, ("forward",)),
    "backward": Call(_backward, ("backward",)),
    "deterministic": Call(_deterministic, ("dkdv", "dq")),
    "decode": Call(_decode, ("decode",)),
    "delta": Call(_delta),
    "merge": Call(_merge),
}


def cases() -> list[Case]:
    """Every head dim on every architecture, options at the common ones, the fallback; what matters most comes first."""
    found = []
    rare = [wide for wide in WIDTHS if wide not in COMMON]
    options = [("softcap",), ("alibi",), ("dropout",), ("misaligned",), ("softcap", "alibi", "dropout", "carry")]
    for arch in (90, 100, 80):
        for call in ("forward", "backward", "deterministic"):
            found += [Case(arch, call, *wide, options=("carry",)) for wide in COMMON]
            found += [Case(arch, call, *wide, options=options[-1]) for wide in COMMON]
            if arch == 90:
                found += [Case(arch, call, *wide) for wide in COMMON]
                found += [Case(arch, call, *wide, options=("carry",)) for wide in rare]
                found += [Case(arch, call, 128, 128, options=x) for x in options[:-1]]
                found += [Case(arch, call, 128, 128, "float16", ("carry",))]
            else:
                found += [Case(arch, call, 192, 128, options=("carry",))]
        for wide in COMMON:
            found += [Case(arch, "decode", *wide, options=x) for x in (("one",), options[-1])]
        found += [Case(arch, call, width, width) for call in ("delta", "merge") for width in (128, 256)]
    found += [Case(120, "backward", 128, 128, "float32", ("tf32x3",)), Case(120, "decode", 256, 256, "float32")]
    for call in ("forward", "backward", "deterministic", "decode"):
        found += [Case(120, call, *wide) for wide in COMMON]  # any architecture that is not in the table
        found += [Case(90, call, *wide, "float32") for wide in COMMON]
        found += [Case(90, call, 128, 128, "float32", ("tf32x3",))]
    return found


# -------------------------------------------------------------------------------------------------------------- judging


def faults(new: Compiled, row: dict[str, Any] | None, wgmma: bool = False) -> list[str]:
    """What is wrong with a kernel, by itself and against the row that a person has accepted; sentences, or nothing."""
    found = []
    if new.shared > SHARED_BYTES[new.arch]:
        found.append(f"takes {new.shared} bytes of shared memory, and a block has {SHARED_BYTES[new.arch]}")
    if new.tensor_columns > TENSOR_COLUMNS:
        found.append(f"takes {new.tensor_columns} columns of tensor memory, and there are {TENSOR_COLUMNS}")
    if wgmma and new.mma and ("HGMMA" not in new.mma or "HMMA" in new.mma):
        found.append(f"multiplies without wgmma: {new.mma}")
    if row is None:
        return [*found, "is not in the table"]
    if new.tile != row["tile"]:
        found.append(f"runs tiles of {new.tile}, accepted is {row['tile']}")
    if new.spills > row["spills"]:
        found.append(f"spills {new.spills} bytes, accepted are {row['spills']}")
    if new.hot > row.get("hot", 0):
        found.append(f"spills {new.hot} times in its loops, accepted are {row.get('hot', 0)}")
    if new.registers > row["registers"] + SLACK:
        found.append(f"takes {new.registers} registers, accepted are {row['registers']}")
    if more := sorted(set(new.serialised) - set(row.get("serialised", []))):
        found.append(f"has wgmma serialised by ptxas: {', '.join(more)}")
    if new.mma.keys() != row.get("mma", {}).keys():
        found.append(f"multiplies with {list(new.mma)}, accepted is {list(row.get('mma', {}))}")
    if lost := sorted(row.get("copies", {}).keys() - new.copies.keys()):
        found.append(f"no longer uses the copy engine: {', '.join(lost)}")
    old = row.get("overlap", [])
    if len(new.overlap) != len(old) or any(_share(a) < _share(b) - 0.02 for a, b in zip(new.overlap, old, strict=True)):
        found.append(f"runs exponentials [under, beside] its products {new.overlap}, accepted is {old}")
    return found


def _share(counts: list[int]) -> float:
    return counts[0] / sum(counts)


# ------------------------------------------------------------------------------------------------------------ measuring


class Asked(Protocol):
    """A case, or what a test puts in its place; a child process must be able to receive it."""

    def launches(self) -> list[Launch]: ...


AnyAsked = TypeVar("AnyAsked", bound=Asked)


def measure(asked: Sequence[AnyAsked], workers: int) -> Iterator[tuple[AnyAsked, list[Compiled] | str]]:
    """Compile each in a process of its own, so many at a time: some failures of a compiler end the process.

    In order; what a case launches, or in words why it does not compile.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton.compiler"])
    with ThreadPoolExecutor(workers) as pool:
        yield from zip(asked, pool.map(lambda case: _measured(context, case), asked), strict=True)


def _measured(context: Any, case: Asked) -> list[Compiled] | str:
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", errors="replace") as said:
        process = context.Process(target=_child, args=(case, sender, said.name))
        process.start()
        sender.close()
        try:
            if receiver.poll(SECONDS):
                return receiver.recv()
            return f"did not compile in {SECONDS} s"
        except EOFError:
            process.join()
            return f"ended the compiler with status {process.exitcode}: {said.read()[-400:].strip()}"
        finally:
            process.kill()
            process.join()


def _child(case: Asked, sender: Any, said: str) -> None:
    with open(said, "w") as file:  # a compiler that fails prints its whole program
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    try:
        sender.send([compiled(launch)[0] for launch in case.launches()])
    except Exception as error:
        sender.send(f"does not compile: {''.join(traceback.format_exception_only(error))[:400].strip()}")


def names(case: object, found: Sequence[Compiled]) -> list[str]:
    """The name of the row of each kernel: the case and the kernel."""
    seen = collections.Counter[str]()
    rows = []
    for kernel in found:
        seen[kernel.kernel] += 1
        rows.append(f"{case}: {kernel.kernel}" + (f" {seen[kernel.kernel]}" if seen[kernel.kernel] > 1 else ""))
    return rows


def table() -> dict[str, dict[str, Any]]:
    """The accepted rows of the running Triton version; empty if nobody has written them."""
    return json.loads(TABLE.read_text()).get(VERSION, {}) if TABLE.exists() else {}


def write(rows: dict[str, dict[str, Any]]) -> None:
    """Make these the rows of the running Triton version; a row is a line."""
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    tables[VERSION] = rows
    versions = []
    for version, lines in sorted(tables.items()):
        body = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in lines.items())
        versions.append(f"{json.dumps(version)}: {{\n{body}\n}}")
    TABLE.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def line(name: str, kernel: Compiled) -> str:
    """A row of the report."""
    spills = f"{kernel.spills}, {kernel.hot} hot" if kernel.hot else f"{kernel.spills}"
    parts = [
        f"{name:62s} {kernel.tile:16s} {kernel.registers:3d} regs  spill {spills:14s} {kernel.shared / 1024:5.1f} KiB ",
        " ".join(f"{n} {operation}" for operation, n in {**kernel.mma, **kernel.copies}.items()),
        f" overlap {' '.join(f'{under}/{beside}' for under, beside in kernel.overlap)}" if kernel.overlap else "",
        f" {kernel.tensor_columns} columns" if kernel.tensor_columns else "",
        f" scratch {kernel.scratch}" if kernel.scratch else "",
        f" SERIALISED {' '.join(kernel.serialised)}" if kernel.serialised else "",
    ]
    return " ".join(filter(None, parts))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels without a GPU and report what the compiler made.")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--arch", type=int, help="only this architecture: 80, 90 or 100")
    parser.add_argument(
        "--write", action="store_true", help="accept what is found: write the rows of this Triton version"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument(
        "--tiles", metavar="Q,K,WARPS,STAGES", help="try these instead of the table's, as in 128,64,8,3"
    )
    arguments = parser.parse_args()
    tiles = Config(*map(int, arguments.tiles.split(","))) if arguments.tiles else None
    if tiles and arguments.write:
        parser.error("--tiles tries; --write accepts what is shipped")
    chosen = [
        replace(case, tiles=tiles)
        for case in cases()
        if arguments.case in str(case) and arguments.arch in (None, case.arch)
    ]
    accepted, rows, wrong, began = table(), {}, 0, time.monotonic()
    print(f"Triton {triton.__version__}, {len(chosen)} cases", flush=True)
    for case, found in measure(chosen, arguments.workers):
        if isinstance(found, str):
            wrong += 1
            print(f"{case} {found}", flush=True)
            continue
        for name, kernel in zip(names(case, found), found, strict=True):
            rows[name] = kernel.row()
            print(line(name, kernel), flush=True)
            for fault in faults(kernel, (rows if arguments.write or tiles else accepted).get(name), case.wgmma):
                wrong += 1
                print(f"    {fault}", flush=True)
    if arguments.write:
        partly = arguments.case or arguments.arch
        write({**accepted, **rows} if partly else rows)
    print(f"{len(rows)} kernels, {wrong} faults, {time.monotonic() - began:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
