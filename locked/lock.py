"""Write the files of this folder: every package that CI installs, with the SHA-256 of each file that its release has.

    constraints.txt   versions, chosen by hand      ->   torch.txt       torch alone, as its release lists it
    pyproject.toml    what needs what                    torch_cpu.txt   torch alone, in builds without CUDA
    BUILDS, below     builds that no release lists       cuda.txt        what torch.txt needs beside it on Linux
                                                         train.txt       what training needs, without these
                                                         all.txt         what the suite needs, without these

A constraint says which version; a hash says which bytes, whoever serves them. The files hold every platform's wheels, so they
serve Linux and macOS, x86-64 and arm64, from Python 3.10 on. torch stands apart because its builds differ from one index to
another, and because whoever installs its CUDA parts without need downloads gigabytes.

    python locked/lock.py        after a change of constraints.txt or of the dependencies; needs Python 3.11, uv and an index
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SETS = {"train": ("train",), "all": ("train", "test", "dev")}
CUDA = re.compile(r"(nvidia|cuda)-")
HEADER = "# Made by locked/lock.py from constraints.txt and pyproject.toml: run it again, do not edit.\n"

BUILDS = {
    "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
    ),
}
"""Builds of torch without CUDA, with their SHA-256: those that the suite has run with."""


def resolve(extras: tuple[str, ...]) -> list[str]:
    """The requirements of the project with these extras and of its build, each with the lines of its hashes."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        sys.exit("lock.py: there is no uv beside this Python or on the path; pip install uv, then run this again")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    what = ["pyproject.toml", "-", *(f"--extra={extra}" for extra in extras), "--constraint=constraints.txt"]
    how = ["--universal", "--python-version=3.10", "--generate-hashes"]
    plain = ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--quiet"]
    command = [uv, "pip", "compile", *what, *how, *plain]
    found = subprocess.run(command, cwd=ROOT, check=True, input="\n".join(build), stdout=subprocess.PIPE, text=True)
    return re.split(r"\n(?=\S)", found.stdout.strip())


def main() -> None:
    for name, extras in SETS.items():
        packages = resolve(extras)
        torch = [package for package in packages if package.startswith("torch==")]
        cuda = [package for package in packages if CUDA.match(package)]
        write(name, [package for package in packages if package not in torch and package not in cuda])
    write("torch", torch)
    write("cuda", cuda)
    version = torch[0].split()[0]
    builds = [digest for file, digest in BUILDS.items() if file.startswith(version.replace("==", "-") + "+cpu-")]
    write("torch_cpu", [" \\\n".join([f"{version}+cpu", *(f"    --hash=sha256:{digest}" for digest in builds)])])


def write(name: str, packages: list[str]) -> None:
    (HERE / f"{name}.txt").write_text(HEADER + "\n".join(packages) + "\n")
    print(f"locked/{name}.txt: {len(packages)} packages")


if __name__ == "__main__":
    main()
