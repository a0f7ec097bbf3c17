"""The wheel is what users get: build it, hide the sources, and use it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return what it printed; on failure the test shows all of it."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, built offline with the hatchling of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    """Tests, launch scripts and benchmarks stay in the repository; the type markers and the licence travel."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ringflash", "ringflash_kernels"}
    assert {"ringflash/py.typed", "ringflash_kernels/py.typed", "ringflash/forecast/hardware.toml"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_holds_every_module_of_the_sources(wheel):
    """A file that the build leaves out is missed only by users."""
    packages = (ROOT / "ringflash", ROOT / "kernels" / "ringflash_kernels")
    written = {str(file.relative_to(package.parent)) for package in packages for file in package.rglob("*.py")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert packed == {name.replace("\\", "/") for name in written}


def test_the_wheel_works_with_the_sources_hidden(wheel, tmp_path):
    """Both packages import from the unpacked wheel, and the ring is exact there."""
    target = tmp_path / "target"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, wheel, cwd=tmp_path)
    # -I ignores the working directory and PYTHONPATH; the sources of an editable install are dropped from the path.
    code = f"""
import sys
root = {str(ROOT)!r}
sys.path = [{str(target)!r}, *(path for path in sys.path if path not in (root, root + "/kernels"))]
import ringflash, ringflash_kernels
from ringflash import machine
assert machine.prove().exact
print(ringflash.__file__, ringflash_kernels.__file__, sep="\\n")
"""
    files = run(sys.executable, "-I", "-c", code, cwd=tmp_path).split()
    assert [Path(file) for file in files] == [
        target / "ringflash" / "__init__.py",
        target / "ringflash_kernels" / "__init__.py",
    ]
