"""`python -m ringflash check`: the inventory tells the truth, and a wrong ring cannot pass the self-test."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ringflash as rf
import ringflash_kernels
from ringflash import machine
from ringflash.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


def test_the_report_names_every_group_and_the_versions_that_run():
    """Whoever reads a bug report needs these lines first."""
    text = machine.report()
    for needed in ("devices", "between processes", "attention backends", "optional extras", torch.__version__, "gloo"):
        assert needed in text


def test_an_absent_extra_is_named_with_the_command_that_adds_it(monkeypatch):
    """Saying that something is missing without saying how to get it is half a message."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tqdm" else find(name))
    rows = dict(machine.extras())
    assert rows["train"].startswith("missing tqdm: pip install")
    assert "[train]" in rows["train"]
    assert rows["draw"] == "installed"


def test_the_command_installs_into_the_clone_only_where_there_is_one(monkeypatch, tmp_path):
    """A user of the wheel has no clone, and a user of a clone must not replace it with the wheel."""
    assert machine.install_command("draw") == f'pip install -e "{"." if Path.cwd() == ROOT else ROOT}[draw]"'
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "site-packages" / "ringflash" / "machine.py"))
    assert machine.install_command("draw") == 'pip install "ringflash[draw]"'


def test_the_table_of_extras_is_that_of_the_package():
    """The report keeps a table of its own, because an installed package may have been built from other metadata."""
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    declared = toml.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    modules = {"pytest-xdist": "xdist"}
    for extra, requirements in declared.items():
        names = [requirement.split(">=")[0] for requirement in requirements if not requirement.startswith("ringflash[")]
        assert sorted(modules.get(name, name) for name in names) == sorted(machine.EXTRAS[extra])
    assert set(declared) == set(machine.EXTRAS)


def test_a_cuda_device_is_listed_with_what_decides_how_fast_it_is(monkeypatch):
    """Name, memory and compute capability, one line for each device."""
    card = SimpleNamespace(name="NVIDIA Something", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    rows = dict(machine.devices())
    assert rows["cuda:0"] == rows["cuda:1"] == "NVIDIA Something, 80 GiB, sm_90"
    assert "cuda" not in rows


def test_missing_triton_is_a_sentence_and_no_exception(monkeypatch):
    """macOS has no Triton at all, and everything but its kernels works there."""
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not ringflash_kernels.available()
    assert "not installed" in ringflash_kernels.why_not()
    assert "Triton is not installed" in dict(machine.backends())["triton"]


def test_missing_cuda_is_a_sentence(monkeypatch):
    """The reason must name the build of torch: a CPU build on a GPU machine is the usual mistake."""
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch.__version__ in ringflash_kernels.why_not()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ringflash_kernels.available()


def test_a_device_that_the_kernels_do_not_know_is_named(monkeypatch):
    """An old card, or one of another make, must fall back to the reference and not fail in a compiler."""
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0, and this device has 7.5" in ringflash_kernels.why_not()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in ringflash_kernels.why_not()


def test_the_kernel_package_imports_without_triton_and_without_torch():
    """Importing is free; only asking costs something."""
    code = "import sys; sys.modules.update(triton=None, torch=None); import ringflash_kernels"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "kernels", timeout=60)


@pytest.mark.parametrize("ranks", [1, 3, 40], ids="{} ranks".format)
def test_the_ring_is_exact_on_this_machine(ranks):
    """The promise of the library, in the form in which a user checks it; 40 ranks leave some without a token."""
    proof = machine.prove(ranks=ranks)
    assert proof.exact, str(proof)
    assert set(proof.errors) == {"out", "lse", "dq", "dk", "dv"}


@pytest.mark.parametrize("name", machine.NAMES)
def test_the_report_says_of_every_backend_what_a_call_would_say(name):
    """A report that promises more than the library does is worse than none."""
    x = torch.ones(1, 4, 1, 16)
    if name in machine.serving("cpu"):
        rf.flash_attention(x, x, x, backend=name)
        assert dict(machine.backends())[name].startswith("yes")
    else:
        with pytest.raises(ValueError, match=f"backend='{name}'"):
            rf.flash_attention(x, x, x, backend=name)


@pytest.mark.parametrize("factor", [1 + 1e-8, float("nan")], ids=["wrong", "nan"])
def test_a_ring_that_is_wrong_ends_in_exit_code_1(monkeypatch, capsys, factor):
    """An error of 1e-8 in float64 is a bug, not rounding; NaN compares as nothing and must not slip through."""
    ring = rf.ring_attention

    def wrong(*tensors: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = ring(*tensors, **options)
        return out * factor, lse

    monkeypatch.setattr(rf, "ring_attention", wrong)
    assert main(["check"]) == 1
    assert "gives a ring whose out, dq, dk, dv differ from one device" in capsys.readouterr().out.splitlines()[-1]


def test_a_ring_that_raises_ends_in_exit_code_1_and_the_reason(monkeypatch, capsys):
    """The sentence comes last, after the traceback, where somebody who scrolls down finds it."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(rf, "ring_attention", broken)
    assert main(["check"]) == 1
    assert "raised RuntimeError: no such thing" in capsys.readouterr().out.splitlines()[-1]


def test_the_command_runs_as_users_type_it():
    """As a process of its own: exit code 0, and the verdict on the last line."""
    done = subprocess.run(
        [sys.executable, "-m", "ringflash", "check"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "All is right: the ring gives what one device gives."
