"""From a launch to what the compiler made of it, with no GPU.

Triton's own launch path derives types, specialisations and options from the arguments. A driver that is not there answers
what it asks on the way, and the last step, compiling for the device, is recorded instead of done. What is compiled later is
thus what is launched; no signature is written down, and none can fall behind.

    kernel[grid](...)  ->  Triton's binder  ->  Launch  ->  compiled()  ->  ptxas's log and the listing (SASS)  ->  Compiled
"""

from __future__ import annotations

import collections
import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launch:
    """A kernel as it would have been launched: all that the compiler needs to know."""

    kernel: str
    source: Any  # triton.compiler.ASTSource, or Gluon's
    options: dict[str, Any]
    target: GPUTarget


class _Absent:
    """The driver of a GPU that is not here: it answers what Triton asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch  # Triton remembers the target of a device by its number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """Inside, a launch of a kernel adds to the list and does nothing else."""
    launches: list[Launch] = []

    def keep(
        kernel: Any, key: Any, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> None:
        source = kernel.ASTSource(kernel, signature, constexprs, attrs)
        launches.append(Launch(kernel.__name__, source, dict(options.__dict__), GPUTarget("cuda", arch, 32)))

    with mock.patch.object(JITFunction, "_do_compile", keep), mock.patch.object(driver, "_active", _Absent(arch)):
        yield launches


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch. Sizes in bytes."""

    kernel: str
    arch: int
    tile: str
    registers: int
    spills: int  # stored and loaded again
    shared: int
    tensor_columns: int = 0  # of Blackwell's tensor memory
    scratch: int = 0  # global memory that the kernel wants beside its tensors
    hot: int = 0  # of the instructions that store and load spills, those inside the loops that multiply
    mma: dict[str, int] = field(default_factory=dict)  # instructions by family: HMMA, HGMMA (wgmma), UTCHMMA (tcgen05)
    copies: dict[str, int] = field(default_factory=dict)  # by the copy engine: UTMALDG, UTMASTG, UTMAREDG
    overlap: list[list[int]] = field(default_factory=list)  # see exponentials
    serialised: list[str] = field(default_factory=list)  # why ptxas made each wgmma wait for the last: C7510 and so on

    def row(self) -> dict[str, Any]:
        """As it stands in the table: without what is empty, or in the name of the row."""
        row = {name: value for name, value in asdict(self).items() if value or name == "spills"}
        return {name: value for name, value in row.items() if name not in ("kernel", "arch")}


def compiled(launch: Launch) -> tuple[Compiled, str]:
    """Compile it; also the listing of its instructions."""
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True  # the very command that makes the binary prints what it did, to stdout
        with contextlib.redirect_stdout(log):
            made = triton.compile(launch.source, target=launch.target, options=launch.options)
        sass = _listing(made.asm["cubin"], Path(folder))
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    used = re.search(r"Used (\d+) registers", log.getvalue())
    if not spilled or not used:
        raise RuntimeError(f"ptxas did not say what it used; it said:\n{log.getvalue()}")
    operations = collections.Counter(operation.split(".")[0] for operation, _ in _instructions(sass))
    found = Compiled(
        kernel=launch.kernel,
        arch=launch.target.arch,
        tile=_tile(launch),
        registers=int(used[1]),
        spills=int(spilled[1]) + int(spilled[2]),
        shared=made.metadata.shared,
        tensor_columns=made.metadata.tmem_size or 0,
        scratch=made.metadata.global_scratch_size,
        mma={name: n for name, n in sorted(operations.items()) if name.endswith("MMA")},
        copies={name: n for name, n in sorted(operations.items()) if re.fullmatch("UTMA(LDG|STG|REDG)", name)},
        overlap=exponentials(sass),
        hot=sum(operation.startswith(("LDL", "STL")) for body in loops(sass) for operation, _ in body),
        serialised=sorted(set(re.findall(r"(C75\d\d).*serializ", log.getvalue()))),
    )
    return found, sass


def _tile(launch: Launch) -> str:
    constants = {launch.source.fn.arg_names[at[0]]: value for at, value in launch.source.constants.items()}
    blocks = "x".join(
        str(value) for name, value in sorted(constants.items(), reverse=True) if name.startswith("BLOCK_")
    )
    return f"{blocks} w{launch.options['num_warps']} s{launch.options['num_stages']}".strip()


def _listing(cubin: bytes, folder: Path) -> str:
    binary = folder / "kernel.cubin"
    binary.write_bytes(cubin)
    command = [knobs.nvidia.nvdisasm.path, "-c", binary]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


_LINE = re.compile(r"\s*(?:/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);|(\.L_x_\d+):)")


def _instructions(sass: str) -> list[tuple[str, str]]:
    """Operation and operands (a predicate stands before them), in order; a label is an operation of its own."""
    lines = (found for line in sass.splitlines() if (found := _LINE.match(line)))
    return [(found[2] or found[4], (found[1] or "") + (found[3] or "").strip()) for found in lines]


def exponentials(sass: str) -> list[list[int]]:
    """For each loop with wgmma and exponentials: how many of these [run under a product, run while nothing multiplies].

    A wgmma runs on until somebody waits for it. Where the waits stand, the compiler alone decides; innocent edits change
    its mind, and the matrix units then idle through the softmax. Read off the order of the instructions, round the loop.
    """
    found = []
    for body in loops(sass):
        busy, counts = False, [0, 0]
        for lap in range(2):  # what is in flight when the loop comes round is known only after the first lap
            for operation, operands in body:
                if operation.startswith(("HGMMA", "QGMMA")):
                    busy = True
                elif operation.startswith("WARPGROUP.DEPBAR") and operands.endswith("0x0"):
                    busy = False
                elif operation.startswith("MUFU.EX2"):
                    counts[not busy] += lap
        if any(counts) and any("GMMA" in operation for operation, _ in body):
            found.append(counts)
    return found


def loops(sass: str) -> list[list[tuple[str, str]]]:
    """The innermost loops that multiply, in order: a branch back to a label, and what lies between.

    Behind the program's end stands what waits for barriers; its jumps back into the program are no loops.
    """
    code = _instructions(sass)
    label = {operation: at for at, (operation, _) in enumerate(code) if operation.startswith(".L_x_")}
    end = next((at for at, instruction in enumerate(code) if instruction == ("EXIT", "")), len(code))
    spans = []
    for at, (operation, operands) in enumerate(code[:end]):
        target = re.search(r"\.L_x_\d+", operands) if operation.startswith("BRA") else None
        if target and label.get(target[0], at) < at:
            spans.append((label[target[0]], at))
    kept: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda span: span[1] - span[0]):
        multiplies = any(operation.split(".")[0].endswith("MMA") for operation, _ in code[start:end])
        if multiplies and all(end < other or start > stop for other, stop in kept):
            kept.append((start, end))
    return [code[start:end] for start, end in sorted(kept)]
