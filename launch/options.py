"""What a run of train.py can be asked for: its command line, and the sentences for what cannot be done.

Defaults depend on the task and fit two CPU cores: ``text`` learns in about two minutes, ``passkey`` is solved in
about as long.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ringflash as rf
from ringflash.mask import Mask
from run_options import Placement, RunOptions, UsageError, add_ranks, add_run, add_steps, at_least, fill_in

__all__ = ["Options", "Placement", "UsageError", "parse"]

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


@dataclass(frozen=True)
class Options(RunOptions):
    """A run of the byte-level transformer, completely specified: defaults are filled in, every value is checked."""

    task: str
    text: Path | None
    documents: tuple[int, ...]
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    attention: str

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        super().__post_init__()
        at_least("heads", self.heads, 1)
        if self.heads % self.heads_degree:
            raise UsageError(f"--heads-degree {self.heads_degree} ranks cannot share --heads {self.heads} equally")
        if self.attention == "local" and self.layout not in ("auto", "contiguous"):
            raise UsageError(f"--attention local cuts the sequence contiguously; --layout {self.layout} does not")
        if self.attention == "local" and (self.heads_degree > 1 or self.documents):
            name = "heads-degree" if self.heads_degree > 1 else "documents"
            raise UsageError(
                f"--attention local lets every shard attend to itself alone; --{name} is for --attention ring"
            )
        if self.layout == "balanced" and not self.documents:
            raise UsageError("--layout balanced deals out packed documents; --documents says how long they are")
        if self.text is not None and self.task != "text":
            raise UsageError(f"--text is for --task text; --task {self.task} makes its own samples")
        if self.documents and self.task != "text":
            raise UsageError(f"--documents is for --task text; --task {self.task} needs all of its sample")
        if sum(self.documents) > self.seq_length:
            raise UsageError(f"--documents are {sum(self.documents)} bytes long; --seq-length is {self.seq_length}")

    @property
    def placement(self) -> Placement:
        """How a sample is spread; the control cuts it contiguously, whatever is best for a ring."""
        given = super().placement
        return Placement("contiguous", given.route, given.heads_degree) if self.attention == "local" else given

    def mask(self, length: int, context: int) -> Mask:
        """Who sees whom in ``length`` positions: causal, within documents if there are any.

        For the control ``local``, within each of ``context`` equal contiguous shards. Samples of another length than
        ``seq_length`` (``--check`` has its own) have documents that take the same shares of them.
        """
        if self.attention == "local":
            return rf.causal & rf.chunks(length // context)
        if not self.documents:
            return rf.causal
        edges = {sum(self.documents[:i]) * length // self.seq_length for i in range(len(self.documents) + 1)}
        return rf.causal & rf.documents(sorted(edges | {length}))

    def check_against(self, context: int) -> None:
        """Refuse what does not fit the number of ranks that share a sample, which the launcher decides."""
        if self.attention == "local" and self.seq_length % context:
            raise UsageError(f"--attention local needs --seq-length {self.seq_length} to be a multiple of {context}")
        self.check_ranks(context, self.mask(self.seq_length, context))


def _read_documents(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        lengths = (0,)
    if not all(length > 0 for length in lengths):
        raise UsageError(f"--documents is {text!r}; lengths are needed, as 900,300,50")
    return lengths


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line (None: the process's own), fill in what depends on the task."""
    values = vars(_parser().parse_args(arguments))
    fill_in(values, TASK_DEFAULTS[values["task"]], Path("runs", values["task"]))
    values["documents"] = _read_documents(values["documents"])
    return Options(**values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a byte-level transformer with exact ring attention, on any number of processes: "
        "torchrun --nproc-per-node 2 launch/train.py --check",
    )
    learned = parser.add_argument_group("what is learned")
    _add_task(learned)
    add_steps(learned, {name: _default(name) for name in ("batch", "steps", "learning_rate", "warmup")})
    _add_model(parser.add_argument_group("the model"))
    spread = parser.add_argument_group("how it is spread over processes")
    add_ranks(spread, "; for passkey contiguous")
    spread.add_argument(
        "--attention", choices=("ring", "local"), default="ring",
        help="local is a control: every shard attends to itself alone (default: ring)",
    )  # fmt: skip
    add_run(parser.add_argument_group("the run"), "runs/TASK", _default("validation_samples"))
    return parser


def _default(name: str) -> str:
    return ", ".join(f"{values[name]:g} for {task}" for task, values in TASK_DEFAULTS.items())


def _add_task(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--task", choices=sorted(TASK_DEFAULTS), default="text", help="default: text")
    group.add_argument(
        "--text", type=Path, metavar="PATH", help="file or folder (default: the Python standard library's sources)"
    )
    group.add_argument(
        "--documents", default="", metavar="N,N,...",
        help="a sample is that many documents of such lengths, the last takes what is left (default: one)",
    )  # fmt: skip
    group.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help=f"bytes of a sample, over all shards; default: {_default('seq_length')}",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    for name, what in (
        ("layers", "number of blocks"),
        ("dim", "width of the residual stream"),
        ("heads", "query heads"),
        ("kv-heads", "key and value heads"),
        ("head-dim", "width of a head"),
        ("hidden", "width of the feed-forward"),
    ):
        group.add_argument(
            f"--{name}", type=int, metavar="N", help=f"{what}; default: {_default(name.replace('-', '_'))}"
        )
