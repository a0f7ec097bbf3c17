"""What a run can be asked for: the command line of train.py, and the sentences for what cannot be done.

Defaults depend on the task and fit two CPU cores: ``text`` learns in about two minutes, ``passkey`` is solved in
about as long.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ringflash as rf
from ringflash.mask import Mask
from ringflash.route import ROUTES, Route

LAYOUTS = ("auto", "contiguous", "zigzag", "striped", "balanced")
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
class Placement:
    """How a sample is spread over the ranks that share it: arguments of ``rf.Sharding``."""

    layout: str = "auto"
    route: str | Route = "auto"
    heads_degree: int = 1

    def sharding(self, length: int, group: Any, mask: Mask) -> rf.Sharding:
        """The sharding of so many positions over ``group``; raises ``ValueError`` for what does not fit together."""
        return rf.Sharding(length, group, mask, self.layout, self.route, heads_axis=self.heads_degree)


@dataclass(frozen=True)
class Options:
    """One run, completely specified: defaults are filled in, every value is checked alone and against the others."""

    task: str
    text: Path | None
    documents: tuple[int, ...]
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
    route: str
    heads_degree: int
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
    profile: Path | None
    profile_steps: tuple[int, int]

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        self._refuse_numbers()
        if self.batch % self.data:
            raise UsageError(f"--batch {self.batch} samples cannot be shared equally by --data {self.data} ranks")
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
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UsageError("--tensorboard: TensorBoard is not installed; pip install tensorboard")
        if not self.resume:
            self.check_profile(0)

    def _refuse_numbers(self) -> None:
        for name in (
            *("seq_length", "batch", "data", "heads", "heads_degree", "keep"),
            *("log_every", "validate_every", "validation_samples"),
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        for name in ("steps", "warmup", "save_every", "learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative")
        if not self.clip > 0:
            raise UsageError(f"--clip is {self.clip}; it must be positive (inf clips nothing)")

    @property
    def placement(self) -> Placement:
        """How a sample is spread; the control cuts it contiguously, whatever is best for a ring."""
        layout = "contiguous" if self.attention == "local" else self.layout
        return Placement(layout, read_route(self.route), self.heads_degree)

    @property
    def last_step(self) -> int:
        """The step after which this run ends."""
        return self.steps if self.stop_at is None else min(self.steps, self.stop_at)

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
        if self.seq_length < 2 * context:
            raise UsageError(f"--seq-length {self.seq_length} is too short for {context} shards of at least 2 tokens")
        if self.attention == "local" and self.seq_length % context:
            raise UsageError(f"--attention local needs --seq-length {self.seq_length} to be a multiple of {context}")
        if context % self.heads_degree:
            raise UsageError(
                f"--heads-degree {self.heads_degree} ranks share a shard, and {context} rank(s) a sample; "
                f"{context} must be a multiple"
            )
        try:
            self.placement.sharding(self.seq_length, (0, context), self.mask(self.seq_length, context))
        except ValueError as error:
            ring = f"a ring of {context // self.heads_degree} rank(s)"
            raise UsageError(f"--layout {self.layout} and --route {self.route} on {ring}: {error}") from None

    def check_profile(self, done: int) -> None:
        """Refuse to profile steps that this process, which begins after ``done`` of them, will not take."""
        first, last = self.profile_steps
        if not 2 <= first <= last:
            raise UsageError(
                f"--profile-steps is {first}-{last}; FIRST-LAST is needed, from 2 on (the first step also warms up)"
            )
        if self.profile is not None and done + last > self.last_step:
            raise UsageError(
                f"--profile-steps {first}-{last} are counted from the start of this process, which takes "
                f"{max(0, self.last_step - done)} step(s)"
            )


def read_route(text: str) -> str | Route:
    """The route of that name, or ``double_ring:NODESxPER``.

    >>> read_route("double_ring:2x4")
    double_ring(2, 4)
    """
    if text in ("auto", *ROUTES):
        return text
    match = re.fullmatch(r"double_ring:(\d+)x(\d+)", text)
    if match is None:
        names = ", ".join(("auto", *ROUTES))
        raise UsageError(f"--route is {text!r}; accepted are {names}, and double_ring:NODESxPER, as double_ring:2x4")
    return rf.double_ring(*map(int, match.groups()))


def _read_documents(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        lengths = (0,)
    if not all(length > 0 for length in lengths):
        raise UsageError(f"--documents is {text!r}; lengths are needed, as 900,300,50")
    return lengths


def _read_steps(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise UsageError(f"--profile-steps is {text!r}; FIRST-LAST is needed, as 3-5")
    first, last = match.groups()
    return int(first), int(last or first)


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
    if values["profile"] is not None:
        values["profile"] = Path(values["profile"] or values["out"])
    read_route(values["route"])
    values["documents"] = _read_documents(values["documents"])
    values["profile_steps"] = _read_steps(values["profile_steps"])
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
        "--documents", default="", metavar="N,N,...",
        help="a sample is that many documents of such lengths, the last takes what is left (default: one)",
    )  # fmt: skip
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
        "--layout", choices=LAYOUTS,
        help="which rank holds which positions (default: auto, the best for the mask; for passkey contiguous)",
    )  # fmt: skip
    group.add_argument(
        "--route", default="auto", metavar="NAME",
        help=f"how shards travel: auto, {', '.join(ROUTES)}, or double_ring:NODESxPER (default: auto)",
    )  # fmt: skip
    group.add_argument(
        "--heads-degree", type=int, default=1, metavar="N",
        help="neighbouring ranks that share a shard and swap heads for positions (Ulysses); default: 1",
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
    group.add_argument(
        "--profile", nargs="?", const="", metavar="DIR",
        help="write what every rank did in a few steps to DIR/trace-rank0.json and so on, for Perfetto (default: --out)",
    )  # fmt: skip
    group.add_argument(
        "--profile-steps",
        default="3-5",
        metavar="A-B",
        help="which, counted from the start of this process; default: 3-5",
    )
