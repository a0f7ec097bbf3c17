"""The kernels that ringflash ships compile well for GPUs that this machine does not have; see ``aot``.

In the usual suite a few of them, those that matter most. All of them, minutes of work: ``pytest -m slow``. For a second
version of Triton, name a Python that has it: ``RINGFLASH_OTHER_PYTHON=/somewhere/bin/python pytest -m slow``.
"""

from __future__ import annotations

import functools
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aot
import compiler
import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ringflash_kernels import config

ROOT = Path(__file__).resolve().parents[2]
FEW = (
    *(aot.Case(90, "forward", d, d, options=("carry",)) for d in (64, 128, 256)),
    *(aot.Case(90, "backward", d, d, options=("carry",)) for d in (64, 128)),
    aot.Case(90, "decode", 128, 128, options=("one",)),
    aot.Case(80, "forward", 128, 128, options=("carry",)),
    aot.Case(100, "forward", 128, 128, options=("carry",)),
)
OTHER = os.environ.get("RINGFLASH_OTHER_PYTHON", "")


# -------------------------------------------------------------------------------------------------------- what is shipped


@pytest.fixture(scope="module")
def few() -> dict[str, Any]:
    return {str(case): found for case, found in aot.measure(FEW, os.cpu_count() or 1)}


@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_kernels_that_matter_most_compile_as_accepted(few, case):
    """A spill or a lost overlap costs a third of the speed, changes no number, and so no other test would see it."""
    _accepted(case, few[str(case)])


@pytest.mark.slow
def test_every_shipped_kernel_compiles_as_accepted():
    """An entry of the table that nobody compiled is found by the first user who needs it."""
    wrong = []
    for case, found in aot.measure(aot.cases(), os.cpu_count() or 1):
        try:
            _accepted(case, found)
        except pytest.fail.Exception as failure:
            wrong.append(str(failure))
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="RINGFLASH_OTHER_PYTHON names no Python with another Triton")
def test_every_shipped_kernel_compiles_as_accepted_with_another_triton():
    """Users have the Triton that came with their PyTorch, and each has its own ptxas."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [OTHER, ROOT / "tests" / "kernels" / "aot.py"]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout


def test_the_list_of_cases_reaches_every_entry_of_the_configuration_table(monkeypatch):
    """A new tile shape must not ship before somebody has compiled it."""
    reached, choose = set(), config.choose

    def noted(direction: Any, arch: int, head_dim: int, value_dim: int, work: Any) -> config.Config:
        chosen = choose(direction, arch, head_dim, value_dim, work)
        reached.add((arch, direction, work, chosen))
        return chosen

    monkeypatch.setattr(config, "choose", noted)
    for case in aot.cases():
        case.launches()
    table = {(*key, tiles) for key, rows in config.TABLE.items() for _, tiles in rows}
    table |= {(90, direction, "float32", tiles) for direction, rows in config.FLOAT32.items() for _, tiles in rows}
    table |= {(120, "forward", "plain", tiles) for _, tiles in config.ELSEWHERE}
    assert table <= reached, f"no case compiles {table - reached}"


def test_the_accepted_table_has_a_row_for_each_case_and_no_other():
    """A row of a kernel that is gone would be carried along for ever; a case without a row is accepted by nobody."""
    rows = {name.partition(": ")[0] for name in _table()}
    assert rows == {str(case) for case in aot.cases()}


def _table() -> dict[str, Any]:
    if not (rows := aot.table()):
        pytest.fail(
            f"{aot.TABLE.name} has no table for Triton {aot.VERSION}: write one with `python tests/kernels/aot.py --write` "
            f"under that version, read it, and commit it"
        )
    return rows


def _accepted(case: aot.Case, found: list[compiler.Compiled] | str) -> None:
    if isinstance(found, str):
        pytest.fail(f"{case} {found}")
    rows = _table()
    wrong = [
        f"{name} {fault}"
        for name, kernel in zip(aot.names(case, found), found, strict=True)
        for fault in aot.faults(kernel, rows.get(name), case.wgmma)
    ]
    if wrong:
        pytest.fail("\n".join(wrong))


# ------------------------------------------------------------------------------------------------ the harness can be trusted


@triton.jit
def _all_kinds(X, D, NOTHING, one, sixteen, seventeen, large, real, flag, SIZE: tl.constexpr):
    block = D.load([0, 0])
    tl.store(X + tl.arange(0, SIZE), tl.sum(block, 1) + one + sixteen + seventeen + large + real)


def test_a_recorded_launch_has_the_signature_of_a_real_one():
    """What is compiled here must be the very specialisation that Triton would compile on a GPU."""
    x = torch.empty(16)
    descriptor = TensorDescriptor(torch.empty(16, 16), [16, 16], [16, 1], [16, 16])
    values = (x[1:], descriptor, None, 1, 16, 17, 2**40, 0.5, True)
    with compiler.recorded(90) as launches:
        _all_kinds[(1,)](*values, SIZE=16, num_warps=2)
    (launch,) = launches
    assert launch.source.signature == dict(
        X="*fp32", D="tensordesc<fp32[16, 16]>", NOTHING="constexpr", one="constexpr", sixteen="i32", seventeen="i32",
        large="i64", real="fp32", flag="u1", SIZE="constexpr",
    )  # fmt: skip
    assert launch.source.constants == {(2,): None, (3,): 1, (9,): 16}
    aligned = {_all_kinds.arg_names[at] for (at,), attributes in launch.source.attrs.items() if attributes}
    assert aligned == {"sixteen", "large"}
    assert (launch.target, launch.options["num_warps"]) == (GPUTarget("cuda", 90, 32), 2)


def test_a_launch_is_recorded_in_place_of_a_compilation_and_only_inside():
    """Recording must not leave Triton with a driver of a GPU that is not there."""
    before = JITFunction._do_compile, triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), compiler.recorded(80):
        raise ZeroDivisionError
    assert before == (JITFunction._do_compile, triton.runtime.driver._active)


@triton.jit
def _attention(Q, K, V, OUT, keys, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, SKEWED: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    key = tl.arange(0, KEYS)[:, None]
    d = tl.arange(0, D)[None, :]
    q = tl.load(Q + row * D + d)
    acc = tl.zeros([ROWS, D], tl.float32)
    p = tl.zeros([ROWS, KEYS], tl.float32)
    for first in tl.range(0, keys, KEYS):
        s = tl.dot(q, tl.load(K + (first + key) * D + d).T)
        if SKEWED:
            acc = tl.dot(p.to(tl.bfloat16), tl.load(V + (first + key) * D + d), acc)
        p = tl.math.exp2(s - tl.max(s, 1)[:, None])
        if not SKEWED:
            acc = tl.dot(p.to(tl.bfloat16), tl.load(V + (first + key) * D + d), acc)
    tl.store(OUT + row * D + d, acc)


@dataclass(frozen=True)
class Sketch:
    """The smallest attention in which everything can go wrong that the gates look for."""

    rows: int = 128
    skewed: bool = True
    registers: int | None = None

    def launches(self) -> list[compiler.Launch]:
        x = torch.empty(16, dtype=torch.bfloat16)
        sizes = dict(ROWS=self.rows, KEYS=64, D=64, SKEWED=self.skewed)
        with compiler.recorded(90) as launches:
            _attention[(1,)](
                x, x, x, x.float(), 4096, **sizes, num_warps=8 if self.rows > 64 else 4, maxnreg=self.registers
            )
        return launches


@pytest.fixture(scope="module")
def good() -> compiler.Compiled:
    return _compiled(Sketch())


@functools.cache
def _compiled(sketch: Sketch) -> compiler.Compiled:
    (launch,) = sketch.launches()
    return compiler.compiled(launch)[0]


def test_a_good_kernel_has_no_faults(good):
    """Gates that always close would teach everybody to open them by hand."""
    assert aot.faults(good, good.row(), wgmma=True) == []
    assert (good.spills, good.serialised, good.overlap) == (0, [], [[32, 0]])
    assert good.mma.keys() == {"HGMMA"} and good.registers > 64


BAD = {
    "without wgmma": Sketch(rows=32),  # wgmma takes 64 rows
    "runs exponentials": Sketch(skewed=False),  # softmax between the products
    "spills": Sketch(registers=64),
    "serialised by ptxas": Sketch(registers=64),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_kernel_is_seen_to_be_bad(good, fault):
    """A gate that nobody has seen closed may be painted on."""
    assert any(fault in found for found in aot.faults(_compiled(BAD[fault]), good.row(), wgmma=True))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (dict(registers=129 + aot.SLACK), "takes 137 registers"),
        (dict(hot=1), "spills 1 times in its loops"),
        (dict(overlap=[[31, 1]]), "runs exponentials"),
        (dict(overlap=[[32, 0], [32, 0]]), "runs exponentials"),
        (dict(copies={}), "no longer uses the copy engine: UTMALDG"),
        (dict(mma={"HGMMA": 1, "HMMA": 1}), "without wgmma"),
        (dict(mma={}), "multiplies with []"),
        (dict(serialised=["C7510"]), "C7510"),
        (dict(shared=232449), "232449 bytes of shared memory"),
        (dict(tensor_columns=513), "513 columns of tensor memory"),
        (dict(tile="64x64 w4 s2"), "runs tiles of 64x64 w4 s2"),
    ],
)
def test_each_figure_is_held_to_the_accepted_row(good, changes, fault):
    """A figure that is written down and not compared is decoration."""
    good = replace(good, registers=128, copies={"UTMALDG": 2})
    (found,) = aot.faults(replace(good, **changes), good.row(), wgmma=True)[:1]
    assert fault in found


def test_what_was_accepted_once_is_no_fault(good):
    """A spill in an epilogue may be the better of two evils, if a person has said so."""
    spilling = replace(good, spills=40, serialised=["C7510"], overlap=[[0, 32]])
    assert aot.faults(spilling, spilling.row(), wgmma=True) == []
    assert aot.faults(replace(spilling, spills=44), spilling.row())
    assert aot.faults(good, spilling.row(), wgmma=True) == []


def test_a_kernel_without_a_row_is_a_fault(good):
    """What nobody has looked at is not accepted."""
    assert aot.faults(good, None) == ["is not in the table"]


@dataclass(frozen=True)
class Ending:
    """A compiler that ends its process, raises, or prints while it works."""

    how: str

    def launches(self) -> list[compiler.Launch]:
        print("a thousand lines of IR", flush=True)
        if self.how == "abort":
            os.abort()
        if self.how == "raise":
            raise RuntimeError("PassManager::run failed")
        return []


def test_a_compiler_that_dies_takes_nobody_with_it(capfd):
    """Some failures are assertions in C++: the other cases must go on, and the report must say which one it was."""
    asked = [Ending("abort"), Ending("raise"), Ending("return")]
    found = dict(aot.measure(asked, workers=1))
    assert found[asked[0]] == "ended the compiler with status -6: a thousand lines of IR"
    assert found[asked[1]] == "does not compile: RuntimeError: PassManager::run failed"
    assert found[asked[2]] == []
    assert capfd.readouterr() == ("", "")


def test_a_written_table_reads_as_it_was_measured(good, tmp_path, monkeypatch):
    """The rows of other Triton versions must survive, and a row must be one line, or no diff can be reviewed."""
    monkeypatch.setattr(aot, "TABLE", tmp_path / "compiled.json")
    assert aot.table() == {}
    monkeypatch.setattr(aot, "VERSION", "3.6")
    aot.write({"a: b": good.row()})
    monkeypatch.setattr(aot, "VERSION", "3.7")
    aot.write({"c: d": good.row(), "e: f": good.row()})
    assert list(aot.table()) == ["c: d", "e: f"]
    assert aot.table()["c: d"] == good.row()
    assert len(aot.TABLE.read_text().splitlines()) == 9
    monkeypatch.setattr(aot, "VERSION", "3.6")
    assert aot.table() == {"a: b": good.row()}
