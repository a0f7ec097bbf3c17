"""What users see: the public names, the import floors, and examples that run as they are printed."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ringflash as rf

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    0: {
        *(
            "errors",
            "numbers",
            "units",
            "mask",
            "layout",
            "needs",
            "balance",
            "route",
            "plan",
            "verify",
            "auto",
            "forecast",
            "views",
            "check",
            "board",
            "terms",
        ),
        *("forecast.workload", "forecast.hardware", "forecast.timeline", "forecast.model", "forecast.holding"),
        *("forecast.traffic", "forecast.advice", "forecast.cost", "forecast.memory"),
        *("views.chart", "views.draw", "views.trace", "views.reading"),
        "data.packing",
    },
    1: {
        *("tensors", "ranges", "freight", "partial", "intervals", "reference", "aten", "backend"),
        *(
            "watch",
            "wire",
            "distributed",
            "groups",
            "local",
            "guard",
            "accord",
            "ulysses",
            "recipe",
            "settled",
            "shard",
        ),
        "data.documents",
    },
    2: {"circulate"},
    3: {
        *("laws", "door", "operator", "attention", "modules", "gradients", "checkpointing", "tiling", "loss", "spread"),
        *("sequence_parallel", "data"),
    },
    4: {
        *("machine", "views.planner", "views.report", "__main__"),
        *("integrations", "compat"),
    },
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


def modules() -> dict[str, Path]:
    """Every module and subpackage by its name inside the library."""
    root = ROOT / "ringflash"
    paths = {
        ".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in root.rglob("*.py")
    }
    return {name: path for name, path in sorted(paths.items()) if name != "__init__"}


def floor_of(imported: str) -> int:
    """The floor of ``ringflash.x.y``: its own, or that of the package or module it is in."""
    parts = imported.split(".")[1:]
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((FLOOR_OF[name] for name in names if name in FLOOR_OF), 0)


def test_the_public_names_are_these() -> None:
    """Removing or renaming one breaks users; adding one is a promise: both happen here, on purpose."""
    assert set(rf.__all__) == {
        *("full", "causal", "window", "documents", "prefix", "chunks", "Mask", "Layout"),
        *("flash_attention", "ring_attention", "Sharding", "SequenceParallel", "RingAttention"),
        *("Partial", "merge", "sink", "Plan", "plan", "plans", "verify", "draw", "local_world"),
        *("double_ring", "direct", "estimate", "trace", "data"),
        *("keep_attention", "keep_attention_on_cpu", "Tiled", "tile_modules", "tiled_cross_entropy"),
        *("RingflashError", "PlanError", "WireError", "DeadlockError"),
        *("DisagreementError", "PeerError", "IntegrityError", "NonFiniteError"),
    }
    assert all(hasattr(rf, name) for name in rf.__all__)


def test_every_module_stands_on_a_floor() -> None:
    """A new module has to say where it belongs."""
    homeless = {name for name in modules() if not {name, name.partition(".")[0]} & FLOOR_OF.keys()}
    assert not homeless and FLOOR_OF.keys() <= set(modules())


@pytest.mark.parametrize("name", modules())
def test_imports_run_downwards(name: str) -> None:
    """No floor knows the ones above it; floor 0 knows no torch; groups and distributed alone talk to torch.distributed."""
    path, floor = modules()[name], floor_of(f"ringflash.{name}")
    names = imports(path)
    for imported in names:
        if imported.split(".")[0] == "ringflash":
            assert floor_of(imported) <= floor, f"{name} imports {imported} from above"
    if floor == 0:
        assert not any(imported.split(".")[0] == "torch" for imported in names)
    if name not in {"groups", "distributed"}:
        assert not any(imported.startswith("torch.distributed") for imported in names)
    if name not in {
        "layout",
        "attention",
        "shard",
        "auto",
        "forecast.advice",
        "compat.ring_flash_attn",
    }:  # who choose among layouts know their names
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


@pytest.mark.parametrize("name", [name for name in modules() if name != "__main__"])
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
