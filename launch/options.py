"""What a run can be asked for: the command line of train.py, and the sentences for what cannot be done.

Defaults depend on the task and fit two CPU cores: ``text`` learns in about two minutes, ``passkey`` is solved in
about as long.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {
        "seq_length": 2048,
        "batch": 1,
        "steps": 500,
        "learning_rate": 5e-3,
        "warmup": 20,
        "layers": 4,
        "dim": 96,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 32,
        "hidden": 256,
        "validation_samples": 24,
        "layout": "auto",
    },
    "passkey": {
        "seq_length": 128,
        "batch": 64,
        "steps": 300,
        "learning_rate": 3e-3,
        "warmup": 30,
        "layers": 2,
        "dim": 64,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 32,
        "hidden": 128,
        "validation_samples": 512,
        "layout": "contiguous",  # then the key is on another rank than the question
    },
}


class UsageError(ValueError):
    """Something was asked for that cannot be done; the message is one sentence for the person who asked."""


@dataclass(frozen=True)
class Options:
    """One run, completely specified: defaults are filled in, every value is checked alone and against the others."""

    task: str
    text: Path | None
    seq_length: int
    batch: int
    steps: int
    stop_at: int | None
    learning_rate: float
    warmup: int
    weight_decay: float
    clip: float
    seed: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    dtype: str
    data: int
    context: int | None
    engine: str
    layout: str
    attention: str
    device: str
    out: Path
    resume: bool
    save_every: int
    keep: int
    check: bool
    log_every: int
    validate_every: int
    validation_samples: int
    tensorboard: bool

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        for name in ("seq_length", "batch", "data", "keep", "log_every", "validate_every", "validation_samples"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        for name in ("steps", "warmup", "save_every", "learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        if not self.clip > 0:
            raise UsageError(f"--clip is {self.clip}; it must be positive (inf clips nothing)")
        if self.batch % self.data:
            raise UsageError(f"--batch {self.batch} samples cannot be shared equally by --data {self.data} ranks")
        if self.attention == "local" and self.layout not in ("auto", "contiguous"):
            raise UsageError(f"--attention local cuts the sequence contiguously; --layout {self.layout} does not")
        if self.text is not None and self.task != "text":
            raise UsageError(f"--text is for --task text; --task {self.task} makes its own samples")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UsageError("--tensorboard: TensorBoard is not installed; pip install tensorboard")

    @property
    def placement(self) -> str:
        """The layout that is used: the control cuts contiguously, whatever is best for a ring."""
        return "contiguous" if self.attention == "local" else self.layout

    def check_against(self, context: int) -> None:
        """Refuse what does not fit the number of shards, which is known once the processes are."""
        if self.seq_length < 2 * context:
            raise UsageError(f"--seq-length {self.seq_length} is too short for {context} shards of at least 2 tokens")
        if self.attention == "local" and self.seq_length % context:
            raise UsageError(f"--attention local needs --seq-length {self.seq_length} to be a multiple of {context}")


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line (None: the process's own), fill in what depends on the task."""
    values = vars(_parser().parse_args(arguments))
    for name, value in TASK_DEFAULTS[values["task"]].items():
        if values[name] is None:
            values[name] = value
    if values["out"] is None:
        values["out"] = Path("runs", values["task"])
    if values["validate_every"] is None:
        values["validate_every"] = max(1, values["steps"] // 10)
    return Options(**values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a byte-level transformer with exact ring attention, on any number of processes: "
        "torchrun --nproc-per-node 2 launch/train.py --check",
    )
    _add_task(parser.add_argument_group("what is learned"))
    _add_model(parser.add_argument_group("the model"))
    _add_ranks(parser.add_argument_group("how it is spread over processes"))
    _add_run(parser.add_argument_group("the run"))
    return parser


def _default(name: str) -> str:
    return "default: " + ", ".join(f"{values[name]:g} for {task}" for task, values in TASK_DEFAULTS.items())


def _add_task(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--task", choices=sorted(TASK_DEFAULTS), default="text", help="default: text")
    group.add_argument(
        "--text", type=Path, metavar="PATH", help="file or folder (default: the Python standard library's sources)"
    )
    group.add_argument(
        "--seq-length", type=int, metavar="N", help=f"bytes of a sample, over all shards; {_default('seq_length')}"
    )
    group.add_argument("--batch", type=int, metavar="N", help=f"samples of a step, all ranks; {_default('batch')}")
    group.add_argument("--steps", type=int, metavar="N", help=f"optimizer steps; {_default('steps')}")
    group.add_argument("--stop-at", type=int, metavar="N", help="save and stop after step N of --steps, as if killed")
    group.add_argument("--learning-rate", type=float, metavar="X", help=f"peak; {_default('learning_rate')}")
    group.add_argument("--warmup", type=int, metavar="N", help=f"steps; at most a fifth; {_default('warmup')}")
    group.add_argument("--weight-decay", type=float, default=0.1, metavar="X", help="of matrices; default: 0.1")
    group.add_argument("--clip", type=float, default=1.0, metavar="X", help="largest gradient norm; default: 1")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and samples; default: 0")


def _add_model(group: argparse._ArgumentGroup) -> None:
    for name, what in (
        ("layers", "number of blocks"),
        ("dim", "width of the residual stream"),
        ("heads", "query heads"),
        ("kv-heads", "key and value heads"),
        ("head-dim", "width of a head"),
        ("hidden", "width of the feed-forward"),
    ):
        group.add_argument(f"--{name}", type=int, metavar="N", help=f"{what}; {_default(name.replace('-', '_'))}")
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of activations; weights stay float32 (default: bfloat16 on a GPU, float32 on a CPU)",
    )  # fmt: skip


def _add_ranks(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data", type=int, default=1, metavar="N", help="ranks with different samples; default: 1")
    group.add_argument("--context", type=int, metavar="N", help="ranks that share a sample (default: all the others)")
    group.add_argument("--engine", choices=("ddp", "fsdp"), default="ddp", help="who shares the weights; default: ddp")
    group.add_argument(
        "--layout", choices=("auto", "zigzag", "contiguous", "striped"),
        help="which rank holds which positions (default: auto, the best for the mask; for passkey contiguous)",
    )  # fmt: skip
    group.add_argument(
        "--attention", choices=("ring", "local"), default="ring",
        help="local is a control: every shard attends to itself alone (default: ring)",
    )  # fmt: skip
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--check", action="store_true", help="first prove that loss and raw gradients equal one process's"
    )
    group.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/TASK)")
    group.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --out")
    group.add_argument("--save-every", type=int, default=100, metavar="N", help="steps; 0: at the end; default: 100")
    group.add_argument("--keep", type=int, default=2, metavar="N", help="checkpoints to keep; default: 2")
    group.add_argument("--log-every", type=int, default=10, metavar="N", help="steps between lines; default: 10")
    group.add_argument("--validate-every", type=int, metavar="N", help="steps (default: a tenth of --steps)")
    group.add_argument(
        "--validation-samples", type=int, metavar="N", help=f"rounded up to batches; {_default('validation_samples')}"
    )
    group.add_argument("--tensorboard", action="store_true", help="write TensorBoard events too")
