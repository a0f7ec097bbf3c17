"""What any run can be asked for, whatever it learns: ranks, engine, placement, steps, files; and how mistakes are said.

``train.py`` and ``finetune_hf.py`` add what is theirs: a task and a model.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ringflash as rf
from ringflash.mask import Mask
from ringflash.route import ROUTES, Route

LAYOUTS = ("auto", "contiguous", "zigzag", "striped", "balanced")
ENGINES = ("ddp", "fsdp", "deepspeed")


class UsageError(ValueError):
    """Something was asked for that cannot be done; the message is one sentence for the person who asked."""


class RunError(RuntimeError):
    """A run cannot go on, by no fault of who asked for it; the message says why and what to do."""


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
class RunOptions:
    """One run, completely specified, but for what it learns: every value is checked alone and against the others."""

    seq_length: int
    batch: int
    steps: int
    stop_at: int | None
    learning_rate: float
    warmup: int
    weight_decay: float
    clip: float
    seed: int
    dtype: str
    data: int
    context: int | None
    engine: str
    zero_stage: int | None
    layout: str
    route: str
    heads_degree: int
    device: str
    out: Path
    resume: str
    on_nonfinite: str
    on_save_error: str
    timeout: float | None
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
        if self.zero_stage is not None and self.engine != "deepspeed":
            raise UsageError(f"--zero-stage is for --engine deepspeed; --engine {self.engine} has no stages")
        if self.engine == "deepspeed":
            need("deepspeed", "deepspeed", "--engine deepspeed")
        if self.tensorboard:
            need("tensorboard", "tensorboard", "--tensorboard")
        if self.resume == "never":
            self.check_profile(0)

    def _refuse_numbers(self) -> None:
        for name in (
            *("seq_length", "batch", "data", "heads_degree", "keep"),
            *("log_every", "validate_every", "validation_samples"),
        ):
            at_least(name, getattr(self, name), 1)
        for name in ("steps", "warmup", "save_every", "learning_rate", "weight_decay"):
            if getattr(self, name) < 0:
                raise UsageError(f"{option(name)} is {getattr(self, name)}; it must not be negative")
        if self.stop_at is not None:
            at_least("stop_at", self.stop_at, 0)
        if self.timeout is not None:
            at_least("timeout", self.timeout, 1)
        if not self.clip > 0:
            raise UsageError(f"--clip is {self.clip}; it must be positive (inf clips nothing)")

    @property
    def placement(self) -> Placement:
        """How a sample is spread."""
        return Placement(self.layout, read_route(self.route), self.heads_degree)

    @property
    def stage(self) -> int:
        """The stage of ZeRO, if there is to be one: 2 shards gradients too, and costs no more messages than 1."""
        return 2 if self.zero_stage is None else self.zero_stage

    @property
    def engine_name(self) -> str:
        """The engine in words."""
        return f"deepspeed stage {self.stage}" if self.engine == "deepspeed" else self.engine

    @property
    def last_step(self) -> int:
        """The step after which this run ends."""
        return self.steps if self.stop_at is None else min(self.steps, self.stop_at)

    def low_precision(self, device: str) -> bool:
        """True if matrix products of a "cpu" or "cuda" device are to run in bfloat16."""
        return self.dtype == "bfloat16" or (self.dtype == "auto" and device == "cuda")

    def check_ranks(self, context: int, mask: Mask) -> None:
        """Refuse what does not fit the number of ranks that share a sample, which the launcher decides."""
        if self.seq_length < 2 * context:
            raise UsageError(f"--seq-length {self.seq_length} is too short for {context} shards of at least 2 tokens")
        if context % self.heads_degree:
            raise UsageError(
                f"--heads-degree {self.heads_degree} ranks share a shard, and {context} rank(s) a sample; "
                f"{context} must be a multiple"
            )
        try:
            self.placement.sharding(self.seq_length, (0, context), mask)
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


def read_steps(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise UsageError(f"--profile-steps is {text!r}; FIRST-LAST is needed, as 3-5")
    first, last = match.groups()
    return int(first), int(last or first)


def option(name: str) -> str:
    """How a field is called on the command line."""
    return f"--{name.replace('_', '-')}"


def at_least(name: str, value: float, least: int) -> None:
    """Refuse a smaller number, by the name of its option."""
    if value < least:
        raise UsageError(f"{option(name)} is {value}; it must be at least {least}")


def need(package: str, extra: str, what: str) -> None:
    """Refuse ``what`` if a package is not installed, naming the extra of ringflash that installs it."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ValueError:  # a module that has been put aside has no spec
        found = False
    if not found:
        raise UsageError(f"{what} needs {package}, which is not installed: pip install 'ringflash[{extra}]'")


def fill_in(values: dict[str, Any], defaults: Mapping[str, Any], out: Path) -> None:
    """Replace what was not given by its default, and texts by what they stand for."""
    for name, value in defaults.items():
        if values[name] is None:
            values[name] = value
    if values["out"] is None:
        values["out"] = out
    if values["validate_every"] is None:
        values["validate_every"] = max(1, values["steps"] // 10)
    if values["profile"] is not None:
        values["profile"] = Path(values["profile"] or values["out"])
    read_route(values["route"])
    values["profile_steps"] = read_steps(values["profile_steps"])


def add_steps(group: argparse._ArgumentGroup, defaults: Mapping[str, str]) -> None:
    """Options of how long and how fast to learn; ``defaults`` says what they are, by option."""
    group.add_argument(
        "--batch", type=int, metavar="N", help=f"samples of a step, all ranks; default: {defaults['batch']}"
    )
    group.add_argument("--steps", type=int, metavar="N", help=f"optimizer steps; default: {defaults['steps']}")
    group.add_argument("--stop-at", type=int, metavar="N", help="save and stop after step N of --steps, as if killed")
    group.add_argument("--learning-rate", type=float, metavar="X", help=f"peak; default: {defaults['learning_rate']}")
    group.add_argument("--warmup", type=int, metavar="N", help=f"steps; at most a fifth; default: {defaults['warmup']}")
    group.add_argument("--weight-decay", type=float, default=0.1, metavar="X", help="of matrices; default: 0.1")
    group.add_argument("--clip", type=float, default=1.0, metavar="X", help="largest gradient norm; default: 1")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and samples; default: 0")
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of activations; weights stay float32 (default: bfloat16 on a GPU, float32 on a CPU)",
    )  # fmt: skip


def add_ranks(group: argparse._ArgumentGroup, layout_note: str = "") -> None:
    """Options of how a run is spread over processes."""
    group.add_argument("--data", type=int, default=1, metavar="N", help="ranks with different samples; default: 1")
    group.add_argument("--context", type=int, metavar="N", help="ranks that share a sample (default: all the others)")
    group.add_argument("--engine", choices=ENGINES, default="ddp", help="who shares the weights; default: ddp")
    group.add_argument(
        "--zero-stage", type=int, choices=(1, 2, 3),
        help="what DeepSpeed shards: 1 optimizer state, 2 gradients too, 3 weights too (default: 2)",
    )  # fmt: skip
    group.add_argument(
        "--layout", choices=LAYOUTS,
        help=f"which rank holds which positions (default: auto, the best for the mask{layout_note})",
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
        "--timeout", type=float, metavar="SECONDS",
        help="a rank that waits so long for another gives up (default: PyTorch's, 600 on GPUs and 1800 on CPUs)",
    )  # fmt: skip
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )


def add_run(group: argparse._ArgumentGroup, folder: str, validation: str) -> None:
    """Options of files, checks and what is shown. ``folder`` and ``validation`` say what their defaults are."""
    group.add_argument(
        "--check", action="store_true", help="first prove that loss and raw gradients equal one process's"
    )
    group.add_argument("--out", type=Path, metavar="DIR", help=f"folder of the run (default: {folder})")
    group.add_argument(
        "--resume", nargs="?", choices=("auto", "required"), const="required", default="never", metavar="auto",
        help="go on from the newest undamaged checkpoint in --out; with auto begin anew if there is none "
        "(a process that its launcher has restarted does so without being asked)",
    )  # fmt: skip
    group.add_argument("--save-every", type=int, default=100, metavar="N", help="steps; 0: at the end; default: 100")
    group.add_argument("--keep", type=int, default=2, metavar="N", help="checkpoints to keep; default: 2")
    group.add_argument(
        "--on-save-error", choices=("continue", "stop"), default="continue",
        help="if a checkpoint cannot be written: train on and try again at the next one, or stop (default: continue; either "
        "way the exit status is not 0 if the last one is missing)",
    )  # fmt: skip
    group.add_argument(
        "--on-nonfinite", choices=("stop", "skip"), default="stop",
        help="if a loss or gradient is NaN or infinite: stop, or leave that batch out, up to 5 in a row; either way say on "
        "which rank and in which module it began (default: stop)",
    )  # fmt: skip
    group.add_argument("--log-every", type=int, default=10, metavar="N", help="steps between lines; default: 10")
    group.add_argument("--validate-every", type=int, metavar="N", help="steps (default: a tenth of --steps)")
    group.add_argument(
        "--validation-samples", type=int, metavar="N", help=f"rounded up to batches; default: {validation}"
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
