"""The trainer on real processes: however it is spread, interrupted and resumed, it draws one and the same curve."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import ROOT, torchrun

import exactness
import ranks
import ringflash as rf
from byte_transformer import ByteTransformer, ModelConfig
from engines import Engine
from loop import attempt, learning_rate
from options import UsageError, parse
from train import main

Train = Callable[..., str]
Curve = Callable[[Path], dict[str, list[float]]]
TOLERANCE = 2e-6  # relative, float32, eight AdamW steps


@pytest.fixture
def alone() -> Iterator[ranks.Ranks]:
    """This very process as a grid of one rank."""
    yield ranks.start(1, None, "cpu")
    dist.destroy_process_group()


def test_two_processes_check_train_and_report(stopped_run: tuple[Path, str]) -> None:
    """The last three lines are the validation loss, the curve's file and exactness figures that are really small."""
    folder, output = stopped_run
    validation, curve, exact = output.splitlines()[-3:]
    assert re.fullmatch(r"final validation loss \d\.\d+ \(\d\.\d+ bits per byte\)", validation)
    assert curve == f"loss curve: {folder / 'loss.png'}"
    assert exact.startswith("exactness: equal, 2 rank(s) (data 1 x context 2, ddp)")
    errors = [float(text) for text in re.findall(r"(?:loss|gradients) (\d\.\d+e[-+]\d+)", exact)]
    assert len(errors) == 4 and max(errors[:2]) < 1e-12 and max(errors[2:]) < 1e-5
    names = ("loss.png", "metrics.csv", "metrics.jsonl", "config.json", "checkpoints/step-00000004/state.json")
    assert all((folder / name).stat().st_size for name in names)
    assert json.loads((folder / "config.json").read_text())["settled"] == {"layout": "zigzag", "route": "ring"}
    control = re.search(r"without the ring gradients would be (\S+) off", output)
    assert control and float(control[1]) > 0.01


def test_two_processes_draw_the_curve_of_one(
    one_process_run: Path, stopped_run: tuple[Path, str], curve: Curve
) -> None:
    """Losses, raw gradient norms and validation losses are those of one process, and they fall."""
    one, two = curve(one_process_run), curve(stopped_run[0])
    assert two["loss"] == pytest.approx(one["loss"][:4], rel=TOLERANCE)
    assert two["gradient_norm"] == pytest.approx(one["gradient_norm"][:4], rel=10 * TOLERANCE)
    assert two["validation"][0] == pytest.approx(one["validation"][0], rel=TOLERANCE)
    assert one["loss"][0] == pytest.approx(5.545, abs=0.1)  # log 256: the guess of a model that knows nothing
    assert one["loss"][-1] < one["loss"][0] - 0.05


def test_a_run_resumes_under_another_engine_on_another_number_of_ranks(
    train: Train,
    small: list[str],
    text_folder: Path,
    one_process_run: Path,
    stopped_run: tuple[Path, str],
    curve: Curve,
    tmp_path: Path,
) -> None:
    """Begun on two ranks under DDP, resumed on 2 x 2 under ZeRO stage 3, ended on three under FSDP2: no seam, one curve."""
    out = tmp_path / "run"
    shutil.copytree(stopped_run[0], out)
    arguments = (*small, "--text", text_folder, "--steps", 8, "--out", out, "--resume")
    zero = ("--engine", "deepspeed", "--zero-stage", 3, "--data", 2, "--check")
    output = train(4, *arguments, *zero, "--stop-at", 6)
    assert "4 steps, 16 samples done" in output
    assert "exactness: equal, 4 rank(s) (data 2 x context 2, deepspeed stage 3)" in output
    assert "6 steps, 24 samples done" in train(3, *arguments, "--engine", "fsdp")
    resumed, uninterrupted = curve(out), curve(one_process_run)
    assert resumed["loss"] == pytest.approx(uninterrupted["loss"], rel=TOLERANCE)
    assert resumed["gradient_norm"] == pytest.approx(uninterrupted["gradient_norm"], rel=10 * TOLERANCE)
    assert resumed["validation"][-1] == pytest.approx(uninterrupted["validation"][-1], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        "fsdp",
        "ddp",
        "deepspeed --zero-stage 1",
        "deepspeed --zero-stage 2",
        "deepspeed --zero-stage 3",
    ],
)
def test_data_and_context_ranks_together_equal_one_process(
    train: Train,
    small: list[str],
    text_folder: Path,
    one_process_run: Path,
    curve: Curve,
    tmp_path: Path,
    engine: str,
) -> None:
    """A grid of 2 x 2 ranks takes the steps of one process on the whole batch, whoever shares the weights."""
    arguments = ("--text", text_folder, "--steps", 8, "--data", 2, "--context", 2, "--engine", *engine.split())
    stop = () if "deepspeed" in engine else ("--stop-at", 4)
    output = train(4, *small, *arguments, *stop, "--check", "--out", tmp_path / "run")
    assert f"exactness: equal, 4 rank(s) (data 2 x context 2, {engine.replace('--zero-', '')})" in output
    grid, one = curve(tmp_path / "run"), curve(one_process_run)
    steps = len(grid["loss"])
    assert grid["loss"] == pytest.approx(one["loss"][:steps], rel=TOLERANCE)
    assert grid["gradient_norm"] == pytest.approx(one["gradient_norm"][:steps], rel=10 * TOLERANCE)
    assert grid["validation"][0] == pytest.approx(one["validation"][0], rel=TOLERANCE)


@pytest.mark.slow
def test_what_ddp_has_written_every_stage_goes_on_with(
    train: Train,
    small: list[str],
    text_folder: Path,
    one_process_run: Path,
    stopped_run: tuple[Path, str],
    curve: Curve,
    tmp_path: Path,
) -> None:
    """Whole moments become parts of ZeRO's flat ones and whole again, stage after stage, on one, two and three ranks."""
    out = tmp_path / "run"
    shutil.copytree(stopped_run[0], out)
    for processes, stage, stop in ((3, 1, 5), (1, 2, 6), (2, 2, 7), (3, 3, 8)):
        arguments = ("--text", text_folder, "--steps", 8, "--stop-at", stop, "--out", out, "--resume")
        train(processes, *small, *arguments, "--engine", "deepspeed", "--zero-stage", stage)
    assert curve(out)["loss"] == pytest.approx(curve(one_process_run)["loss"], rel=TOLERANCE)


@pytest.mark.slow
def test_accelerate_launches_it(small: list[str], text_folder: Path, tmp_path: Path) -> None:
    """Its launcher sets what torchrun sets, if it is asked for processes; asked for a CPU, it starts one, and that is said."""
    program = (ROOT / "launch" / "train.py", *small, "--text", text_folder, "--steps", 2, "--out", tmp_path / "run")
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", 2, "--num_machines", 1)
    settled = ("--mixed_precision", "no", "--dynamo_backend", "no")
    assert "data 1 x context 2, ddp" in torchrun(1, *launcher, "--multi_gpu", *settled, *program)
    output = torchrun(1, *launcher, "--cpu", *settled, *program, status=1)
    assert "train.py: error: accelerate launch --cpu starts one process" in output


def test_a_mistake_is_one_sentence(
    small: list[str], stopped_run: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Resuming with another model ends with status 2 and a sentence, and leaves the run as it was."""
    before = (stopped_run[0] / "metrics.jsonl").read_text()
    other = [*small, "--dim", "64", "--task", "passkey", "--steps", "8", "--out", str(stopped_run[0]), "--resume"]
    try:
        assert attempt("train.py", lambda: main(parse(other))) == 2
    finally:
        dist.destroy_process_group()
    output = capsys.readouterr().err
    assert re.search(r"train\.py: error: --resume: .*model dim: 32 there, 64 here; .*task: 'text' there", output)
    assert (stopped_run[0] / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(("data", "context"), [(2, None), (1, 4), (3, 2), (0, None)])
def test_a_grid_that_does_not_fill_the_world_is_refused(
    monkeypatch: pytest.MonkeyPatch, data: int, context: int | None
) -> None:
    """A grid of another size than the number of processes is refused before any of them waits for another."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"the product must be 3"):
        ranks.start(data, context, "cpu")


@pytest.mark.parametrize("wrong", ["nothing", "gradients by the number of ranks", "one gradient lost", "loss"])
def test_the_check_notices_what_it_is_for(alone: ranks.Ranks, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """A check that cannot fail proves nothing: planted errors of the usual kinds are found, and only those."""
    share = exactness.share

    def sabotaged(wrapped: rf.SequenceParallel, *arguments: Any, **more: Any) -> Engine:
        for name, parameter in wrapped.module.named_parameters():
            if wrong == "gradients by the number of ranks":
                parameter.register_hook(lambda gradient: gradient / 2)
            if wrong == "one gradient lost" and name == "blocks.1.attention_norm.weight":
                parameter.register_hook(torch.zeros_like)
        if wrong == "loss":
            wrapped.register_forward_hook(lambda module, inputs, out: out._replace(loss=out.loss * 1.001))
        return share(wrapped, *arguments, **more)

    monkeypatch.setattr(exactness, "share", sabotaged)
    exact, line = exactness.prove(alone, parse([]))
    assert exact == (wrong == "nothing")
    assert line.startswith("exactness: equal" if exact else "exactness: NOT EQUAL")


def test_starting_anew_keeps_the_run_that_was_there(
    small: list[str], tmp_path: Path, curve: Curve, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command twice makes two runs, of which none is lost; the passkey task says its chance level."""
    earlier = tmp_path / "run"
    earlier.mkdir()
    (earlier / "metrics.jsonl").write_text("the earlier run\n")
    line = [*small, "--task", "passkey", "--attention", "local", "--steps", "2", "--out", str(earlier)]
    try:
        assert main(parse(line)) == 0
    finally:
        dist.destroy_process_group()
    output = capsys.readouterr().out
    assert re.search(r"final validation loss \S+, accuracy \S+; chance level of accuracy: 0.031", output)
    assert f"is now in {tmp_path / 'run.1'}" in output
    assert (tmp_path / "run.1" / "metrics.jsonl").read_text() == "the earlier run\n"
    assert len(curve(tmp_path / "run")["loss"]) == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 2


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    """Up in a straight line, down to nothing, the same wherever a run is stopped; a short run has a short warm-up."""
    options = parse(["--steps", "100", "--warmup", "10", "--learning-rate", "1"])
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
    stopped = parse(["--steps", "100", "--stop-at", "20", "--warmup", "10", "--learning-rate", "1"])
    assert [learning_rate(step, stopped) for step in range(20)] == rates[:20]
    assert learning_rate(0, parse(["--steps", "5", "--warmup", "100", "--learning-rate", "1"])) == 1.0


def test_a_model_that_cannot_be_built_is_refused() -> None:
    """Head counts that do not fit are refused with both numbers."""
    with pytest.raises(ValueError, match="head_dim 33 must be even"):
        ModelConfig(head_dim=33)
    with pytest.raises(ValueError, match="heads 4 must be a multiple of kv_heads 3"):
        ModelConfig(kv_heads=3)


def test_a_byte_is_predicted_from_what_came_before() -> None:
    """Changing one byte changes the logits at it and after it, and none before."""
    torch.manual_seed(0)
    model = ByteTransformer(ModelConfig(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, hidden=48))
    inputs = torch.randint(256, (2, 20))
    changed = inputs.clone()
    changed[:, 11] ^= 1
    with torch.no_grad():
        differs = (model(inputs) != model(changed)).any(-1)
    assert not differs[:, :11].any()
    assert differs[:, 11:].all()
