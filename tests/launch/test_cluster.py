"""Templates for clusters: they parse, they pass options that exist, every setting is explained, and they run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import attempts
import finetune_options
import options

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "launch" / "cluster"
GUIDE = (ROOT / "docs" / "cluster.md").read_text()
SHELL = ("settings.sh", "torchrun.sh", "slurm.sbatch")
TEXTS = {**{name: (CLUSTER / name).read_text() for name in (*SHELL, "pytorchjob.yaml")}, "cluster.md": GUIDE}
SETTING = re.compile(r"^ *#? *(?:export |- name: )([A-Z]+_[A-Z_]+)\b", re.M)


def settings(text: str) -> set[str]:
    """The settings of NCCL, torch and threads that a template makes, also those behind a #."""
    return set(SETTING.findall(text))


@pytest.mark.parametrize("name", SHELL)
def test_a_script_parses(name: str) -> None:
    """A misplaced quote would show only when the job has waited for its nodes."""
    done = subprocess.run(["bash", "-n", CLUSTER / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_job_is_what_the_operator_expects() -> None:
    """Two kinds of replicas with one template; a container of the one name that the operator looks for."""
    job = pytest.importorskip("yaml").safe_load(TEXTS["pytorchjob.yaml"])
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert job["spec"]["nprocPerNode"] == str(gpus)  # text, as the operator's schema has it
    ranks = gpus * sum(replica["replicas"] for replica in replicas.values())
    grid = [int(re.search(rf"--{axis} (\d+)", container["args"][0]).group(1)) for axis in ("data", "context")]  # type: ignore[union-attr]
    assert grid[0] * grid[1] == ranks
    assert all(isinstance(setting["value"], str) for setting in container["env"])


def test_every_setting_is_explained_in_its_place_and_in_the_guide() -> None:
    """Settings that nobody can explain are copied for ever."""
    named = {name: settings(TEXTS[name]) for name in ("settings.sh", "pytorchjob.yaml")}
    assert len(named["settings.sh"]) > 6
    assert named["pytorchjob.yaml"] == named["settings.sh"] | {"OMP_NUM_THREADS"}
    assert "OMP_NUM_THREADS" in settings(TEXTS["torchrun.sh"]) & settings(TEXTS["slurm.sbatch"])
    for setting in set.union(*named.values()):
        assert re.search(rf"^\| `{setting}` \| .+ \| .+ \|$", GUIDE, re.M), setting
    lines = TEXTS["settings.sh"].splitlines()
    for before, line in pairwise(lines):
        assert not SETTING.match(line) or before.startswith("# "), line
    for line in TEXTS["pytorchjob.yaml"].splitlines():
        assert not SETTING.match(line) or line.count("#") == 1 + line.lstrip().startswith("#"), line


def test_settings_of_torch_exist() -> None:
    """A misspelt variable does nothing, and says nothing."""
    folder = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    headers = "".join((folder / name).read_text() for name in ("ProcessGroupNCCL.hpp", "FlightRecorder.hpp"))
    named = set(re.findall(r"\bTORCH_(?:NCCL|FR)_[A-Z_]+", "".join(TEXTS.values()))) - {"TORCH_FR_DUMP_TEMP_FILE"}
    assert len(named) >= 5 and all(f'"{name}"' in headers for name in named), named


def test_options_of_the_guide_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Also those that stand in a sentence."""
    with pytest.raises(SystemExit):
        options.parse(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"`(--[a-z-]+)(?: [^`]*)?`", GUIDE)) <= known


def test_commands_are_accepted() -> None:
    """Whoever copies a line of a template or of the guide gets a run, and not a sentence about what does not fit."""
    parsers = {"train": options.parse, "finetune_hf": finetune_options.parse}
    used = [
        found
        for text in TEXTS.values()
        for found in re.findall(r"launch/(train|finetune_hf)\.py((?: +[^`\n|;\"']+)?)", text)
    ]
    commands = [(script, rest.split()) for script, rest in used if rest.strip().startswith("--")]
    assert len(commands) > 4
    for script, words in commands:
        if script == "train" or importlib.util.find_spec("transformers"):
            parsers[script](words)


TRAIN = ("launch/train.py", "--device", "cpu", "--steps", "2", "--seq-length", "64", "--layers", "1")


def run(script: str, *arguments: object, environment: dict[str, str], status: int = 0) -> str:
    """What a template prints, run on this machine's CPU."""
    variables = {
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", str(CLUSTER / script), *map(str, arguments)]
    environment = {**os.environ, **variables, **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_template_without_a_script_says_how_to_use_it(tmp_path: Path) -> None:
    """The script's options alone are the likely mistake."""
    assert "usage: launch/cluster/torchrun.sh SCRIPT" in run("torchrun.sh", "--check", environment={}, status=2)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path)}
    for given in ((), ("launch/train.py", "--check")):  # without --out a requeued job could not go on
        assert "usage: sbatch launch/cluster/slurm.sbatch SCRIPT --out DIR" in run(
            "slurm.sbatch", *given, environment=slurm, status=2
        )


def program(path: Path, text: str) -> Path:
    """A shell script that plays a program."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def launcher(tmp_path: Path) -> dict[str, str]:
    """An interpreter that sees 4 GPUs, and shows what it is called with."""
    python = program(tmp_path / "python", 'if [[ $1 == -c ]]; then echo 4; else printf "[%s]" "$@"; fi')
    return {"PYTHON": str(python), "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "hangs" / "rank_")}


def slurm(tmp_path: Path) -> dict[str, str]:
    """Slurm as played by two scripts: a step of a job starts once per node, here all on this machine."""
    program(tmp_path / "bin" / "scontrol", "printf 'localhost\\nlocalhost\\n'")
    steps = 'while [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=1 "$@" &\nSLURM_NODEID=0 "$@" && wait $!'
    program(tmp_path / "bin" / "srun", steps)
    job = {"SUBMIT_DIR": str(ROOT), "GPUS_PER_NODE": "cpu:1", "CPUS_PER_TASK": "1", "NNODES": "2"}
    job |= {"JOB_NODELIST": "node[1-2]", "JOB_ID": str(os.getpid())}
    return {f"SLURM_{name}": value for name, value in job.items()} | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "hangs" / "rank_"),
    }


def test_there_is_a_process_for_each_gpu_that_torch_sees(tmp_path: Path) -> None:
    """Other programs also count GPUs that CUDA_VISIBLE_DEVICES hides. Words with blanks stay what they are."""
    out = run("torchrun.sh", "my script.py", "--out", "a b", environment=launcher(tmp_path))
    assert out.endswith("[--standalone][--nproc-per-node][4][--max-restarts][0][my script.py][--out][a b]")


@pytest.mark.parametrize("out", [("--out", "{}"), ("--out={}",)])
@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_requeued_job_goes_on_if_there_is_a_checkpoint(tmp_path: Path, out: tuple[str, ...], restarts: str) -> None:
    """Which the run itself finds out, on all ranks alike; a run that began anew would be a night lost."""
    environment = slurm(tmp_path) | launcher(tmp_path) | {"SLURM_RESTART_COUNT": restarts}
    words = [word.format(tmp_path / "my run") for word in out]
    found = run("slurm.sbatch", "train.py", *words, environment=environment)
    again = ["--resume", "auto"] if restarts == "1" else []
    given = "".join(f"[{word}]" for word in ("train.py", *words, *again))
    assert found.count(f"{given}[-m]") + found.endswith(given) == 2, found


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("state", ["interrupted", "running", "ended"])
def test_a_job_that_was_told_to_stop_goes_back_into_the_queue(tmp_path: Path, state: str, before: bool) -> None:
    """Only that, and not what an earlier job has left, or a run that fails would come back for ever."""
    environment = slurm(tmp_path) | launcher(tmp_path)
    attempts.write(tmp_path / "run", state)
    program(tmp_path / "bin" / "scontrol", f'echo "$@" >> {tmp_path / "asked"}; echo localhost')
    file = tmp_path / "run" / "run.json"
    write = f"cp {file} {tmp_path / 'copy'}; exit 1" if before else f"cp {tmp_path / 'written'} {file}; exit 1"
    (tmp_path / "written").write_text(file.read_text())
    if not before:
        file.write_text("{}")
    program(Path(environment["PYTHON"]), write)
    run("slurm.sbatch", "train.py", "--out", tmp_path / "run", environment=environment, status=1)
    asked = (tmp_path / "asked").read_text()
    assert (f"requeue {environment['SLURM_JOB_ID']}" in asked) == (state == "interrupted" and not before)


def test_the_signal_before_the_end_does_not_end_the_launcher(tmp_path: Path) -> None:
    """Slurm sends it to all processes of a job's step, and torchrun would die of it and leave the others alone."""
    environment = slurm(tmp_path) | launcher(tmp_path)
    program(Path(environment["PYTHON"]), 'if [[ $1 == -c ]]; then echo 1; else kill -USR1 $$; echo "alive"; fi')
    assert "alive" in run("slurm.sbatch", "train.py", "--out", tmp_path / "run", environment=environment)
    assert "alive" in run("torchrun.sh", "train.py", environment=environment)


@pytest.mark.slow
def test_one_machine_trains(tmp_path: Path) -> None:
    """Two processes of a CPU share a sample, with the settings of the template."""
    environment = {"PROCESSES": "2", "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "hangs" / "rank_")}
    out = run("torchrun.sh", *TRAIN, "--validation-samples", 1, "--out", tmp_path / "out", environment=environment)
    assert "2 process(es) on cpu: data 1 x context 2" in out and "step     2/2  loss" in out
    assert (tmp_path / "hangs").is_dir()


@pytest.mark.slow
def test_two_nodes_train_and_a_requeued_job_goes_on(tmp_path: Path) -> None:
    """Every node starts its own launcher; the second time the run goes on at its second step."""
    environment = slurm(tmp_path)
    command = (*TRAIN, "--validation-samples", 1, "--out", tmp_path / "out")
    first = run("slurm.sbatch", *command, "--stop-at", 1, environment=environment)
    assert "2 process(es) on cpu: data 1 x context 2" in first and "step     1/2  loss" in first
    again = run("slurm.sbatch", *command, environment=environment | {"SLURM_RESTART_COUNT": "1"})
    assert "1 steps, 1 samples done" in again and "step     2/2  loss" in again
