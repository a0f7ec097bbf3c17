"""Engines one at a time: what they are asked for on the command line, and what is said if a package is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import finetune_options
import options
import ranks
from engines import Engine, blocks
from loop import adamw
from run_options import UsageError
from weights import share


@pytest.mark.parametrize(
    ("package", "parse", "line", "sentence"),
    [
        (
            "deepspeed",
            options.parse,
            "--engine deepspeed",
            r"--engine deepspeed needs deepspeed.*'ringflash\[deepspeed\]'",
        ),
        ("transformers", finetune_options.parse, "", r"finetune_hf.py needs transformers.*'ringflash\[transformers\]'"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, parse: Callable[[list[str]], Any], line: str, sentence: str
) -> None:
    """Before any process waits for another, and with the line that installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=sentence):
        parse(line.split())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--zero-stage 3", "--zero-stage is for --engine deepspeed; --engine ddp has no stages"),
        ("--loss-tile 0", "--loss-tile is 0; it must be at least 1"),
        ("--stop-at -1", "--stop-at is -1; it must be at least 0"),
        ("--batch 3 --data 2", "--batch 3 samples cannot be shared equally by --data 2 ranks"),
        ("--model .", "there is no config.json in '.'"),
        ("--layout balanced", "--batch 2 on --data 1 ranks gives each 2"),
        ("--compile --checkpointing keep-cpu", "use --checkpointing keep"),
        ("--compile --engine deepspeed --zero-stage 3", "use --zero-stage 2, or --engine fsdp"),
    ],
)
def test_what_a_fine_tune_cannot_do_is_refused_by_name(line: str, sentence: str) -> None:
    """What no number of processes could run is refused before any of them starts."""
    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match=sentence):
        finetune_options.parse(line.split())


def test_a_launcher_that_starts_one_process_for_many_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate on a CPU would train one process, and nobody would know."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UsageError, match="starts one process"):
        ranks.fit(1, None)


def test_blocks_are_the_outermost_lists() -> None:
    """Experts in a layer are sharded with their layer, not one by one."""
    layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])}) for _ in range(3))
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 2), "body": nn.ModuleDict({"layers": layers})})
    assert list(blocks(model)) == list(layers)


def test_an_engine_forgets_the_gradients_it_has_used() -> None:
    """The norm is that before clipping, the step that after, and the next step begins from nothing."""
    model = nn.Linear(3, 1, bias=False)
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=1.0), model, clip=0.5)
    before = model.weight.detach().clone()
    engine.backward(engine.forward(input=torch.tensor([[3.0, 0.0, 4.0]])).sum())
    assert dict(engine.gradients())["weight"].tolist() == [[3.0, 0.0, 4.0]]
    assert engine.step() == pytest.approx(5.0)
    torch.testing.assert_close(before - model.weight, torch.tensor([[0.3, 0.0, 0.4]]))
    assert not dict(engine.gradients())


def test_only_matrices_decay() -> None:
    """Each parameter is in one group, and vectors (norms, biases) are in that which does not decay."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2), nn.RMSNorm(2))
    groups = adamw(options.parse(["--weight-decay", "0.3"]))(model).param_groups
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert [decay[parameter] for parameter in model.parameters()] == [0.3, 0.3, 0.0, 0.0]
    assert sum(len(group["params"]) for group in groups) == 4


def test_an_engine_that_does_not_exist_is_refused() -> None:
    """By name, with those that do."""
    nobody: Any = None
    with pytest.raises(ValueError, match="engine is 'zero'; accepted are ddp, fsdp, deepspeed"):
        share(nobody, nobody, "zero", nobody)
