"""What users see: the public names, the import floors, and examples that run as they are printed."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ringflash as rf

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    0: {"errors", "mask", "layout", "route", "plan", "draw"},
    1: {"partial", "intervals", "reference", "aten", "backend", "wire", "local", "recipe", "shard"},
    2: {"circulate"},
    3: {"operator", "attention", "modules", "gradients", "sequence_parallel"},
    4: {"machine", "__main__"},
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; ``from ringflash import x`` counts as ``ringflash.x``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[Path]:
    return sorted(p for p in (ROOT / "ringflash").glob("*.py") if p.stem != "__init__")


def test_the_public_names_are_these() -> None:
    """Removing or renaming one breaks users; adding one is a promise: both happen here, on purpose."""
    assert set(rf.__all__) == {
        *("full", "causal", "window", "documents", "prefix", "chunks", "Mask", "Layout"),
        *("flash_attention", "ring_attention", "Sharding", "SequenceParallel", "RingAttention"),
        *("Partial", "merge", "sink", "Plan", "plan", "plans", "verify", "draw", "local_world"),
        *("RingflashError", "PlanError", "WireError", "DeadlockError"),
    }
    assert all(hasattr(rf, name) for name in rf.__all__)


def test_every_module_stands_on_a_floor() -> None:
    """A new module has to say where it belongs."""
    assert {p.stem for p in modules()} == set(FLOOR_OF)


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_imports_run_downwards(path: Path) -> None:
    """No floor knows the ones above it; floor 0 knows no torch; only wire talks to torch.distributed."""
    names = imports(path)
    for name in names:
        parts = name.split(".")
        if parts[0] == "ringflash" and len(parts) > 1 and parts[1] in FLOOR_OF:
            assert FLOOR_OF[parts[1]] <= FLOOR_OF[path.stem], f"{path.stem} imports {name} from above"
    if FLOOR_OF[path.stem] == 0:
        assert not any(name.split(".")[0] == "torch" for name in names)
    if path.stem != "wire":
        assert not any(name.startswith("torch.distributed") for name in names)
    if path.stem not in {"layout", "attention", "shard"}:  # those two only in their documentation
        assert "zigzag" not in code_only(path)


def code_only(path: Path) -> str:
    """The source without docstrings and comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


def test_kernels_never_import_the_library() -> None:
    """ringflash_kernels is the lowest floor: it stands without ringflash."""
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.split(".")[0] == "ringflash" for name in imports(path)), path


def test_importing_the_library_imports_no_heavy_extras() -> None:
    """Triton, matplotlib and the compiler are loaded by those who use them."""
    program = "import sys, ringflash; print(sorted({'triton', 'matplotlib', 'torch._inductor'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(rf.__path__) if m.name != "__main__"])
def test_docstring_examples_run(name: str) -> None:
    """An example that does not run teaches something false."""
    module = importlib.import_module(f"ringflash.{name}")
    assert doctest.testmod(module).failed == 0


def test_readme_examples_run_and_print_what_they_say(tmp_path: Path) -> None:
    """Every python block of the README runs, in order, in one session; lines behind ``# prints`` are what it prints."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert blocks
    program = "\n".join(blocks)
    expected = re.findall(r"^# prints (.*)$", program, flags=re.M)
    path = tmp_path / "readme.py"
    path.write_text(program)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path, env=_environment())
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    for line in expected:
        assert line in printed, f"{line!r} is not in what the README's examples print:\n{printed}"


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
