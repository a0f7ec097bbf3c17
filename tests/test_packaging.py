"""The wheel is what users get: build it, hide the sources, and use it. What CI installs is known to the byte."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LOCKS = sorted((ROOT / "locked").glob("*.txt"))
SUITE = {"python_version": "3.11", "python_full_version": "3.11.9", "sys_platform": "linux", "platform_system": "Linux"}


def locked(file: Path) -> dict[Requirement, list[str]]:
    """The requirements of a lock file, with the SHA-256 of each of their files."""
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", file.read_text(), flags=re.M).strip())
    return {
        Requirement(entry.splitlines()[0].rstrip(" \\")): re.findall(
            r"--hash=sha256:([0-9a-f]{64})(?= \\$|$)", entry, re.M
        )
        for entry in entries
    }


def versions(requirements: list[Requirement]) -> dict[str, str]:
    """Name to version of those that the suite's machine installs, build tags of torch left out."""
    here = [r for r in requirements if r.marker is None or r.marker.evaluate(SUITE)]
    return {r.name.lower(): str(r.specifier).removeprefix("==").removesuffix("+cpu") for r in here}


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.stem)
def test_every_locked_package_is_one_version_with_hashes(file: Path) -> None:
    """A line without a hash, with a range or with an address would let an index choose what CI runs."""
    names = re.findall(r"^[^#\s].*", file.read_text(), flags=re.M)
    assert names and all(re.fullmatch(r"[a-z0-9-]+==[^\s;*]+( ; [^\\]+)? \\", line) for line in names)
    assert all(hashes and len(set(hashes)) == len(hashes) for hashes in locked(file).values())
    assert file.read_text().count("--hash") == sum(map(len, locked(file).values()))


def test_locks_and_constraints_agree() -> None:
    """Somebody who installs by constraints gets the versions that CI has verified, and the other way round."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = versions([Requirement(line) for line in lines if line and not line.startswith("#")])
    found = {file.stem: versions(list(locked(file))) for file in LOCKS}
    assert wanted == found["all"] | found["torch"] == found["all"] | found["torch_cpu"]
    assert found["train"].items() <= found["all"].items()
    assert all(re.match("(nvidia|cuda)-", name) for name in found["cuda"])


def test_what_the_project_requires_is_locked() -> None:
    """A dependency that is added to pyproject.toml and not locked would be missing in CI, or come unverified."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    train = project["build-system"]["requires"] + project["project"]["dependencies"] + extras["train"]
    suite = train + [line for name in extras if name != "tensorboard" for line in extras[name]]
    torch = versions(list(locked(ROOT / "locked" / "torch.txt")))
    for file, required in (("train", train), ("all", suite)):
        found = versions(list(locked(ROOT / "locked" / f"{file}.txt"))) | torch
        for requirement in map(Requirement, required):
            if requirement.name != "ringflash" and (requirement.marker is None or requirement.marker.evaluate(SUITE)):
                assert requirement.specifier.contains(found[requirement.name]), requirement


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


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    """Tests, launch scripts and benchmarks stay in the repository; the type markers and the licence travel."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ringflash", "ringflash_kernels"}
    assert {"ringflash/py.typed", "ringflash_kernels/py.typed", "ringflash/forecast/hardware.toml"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_holds_every_module_of_the_sources(wheel):
    """A file that the build leaves out is missed only by users."""
    packages = (ROOT / "ringflash", ROOT / "kernels" / "ringflash_kernels")
    written = {str(file.relative_to(package.parent)) for package in packages for file in package.rglob("*.py")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert packed == {name.replace("\\", "/") for name in written}


@pytest.mark.slow
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
