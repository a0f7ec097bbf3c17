"""What a run of finetune_hf.py can be asked for. Without arguments it learns in about a minute on two CPU cores."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ringflash as rf
from run_options import RunOptions, UsageError, add_ranks, add_run, add_steps, at_least, fill_in, need

CHECKPOINTING = ("none", "full", "keep", "keep-cpu")
DEFAULTS: dict[str, Any] = {
    "seq_length": 1024,
    "batch": 2,
    "steps": 100,
    "learning_rate": 5e-3,
    "warmup": 10,
    "validation_samples": 8,
    "layout": "auto",
}


@dataclass(frozen=True)
class FinetuneOptions(RunOptions):
    """A fine-tune of a Transformers model, completely specified: defaults are filled in, every value is checked."""

    model: Path | None
    model_type: str
    text: Path | None
    checkpointing: str
    loss_tile: int | None
    mlp_tile: int | None
    compile: bool

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        super().__post_init__()
        need("transformers", "transformers", "finetune_hf.py")
        for name in ("loss_tile", "mlp_tile"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if self.model is not None and not (self.model / "config.json").is_file():
            raise UsageError(f"--model: there is no config.json in {str(self.model)!r}; a folder of a model is needed")
        if self.layout == "balanced" and self.batch > self.data:
            raise UsageError(
                f"--layout balanced deals out the documents of one sample to a rank; --batch {self.batch} on --data "
                f"{self.data} ranks gives each {self.batch // self.data}"
            )
        if self.compile and self.engine == "deepspeed" and self.stage == 3:
            raise UsageError(
                "--compile: ZeRO stage 3 gathers weights inside of layers; use --zero-stage 2, or --engine fsdp"
            )
        if self.compile and self.checkpointing == "keep-cpu":
            raise UsageError(
                "--compile: a compiled layer keeps things where it computes them; use --checkpointing keep"
            )
        compiler = os.environ.get("CXX", "g++")
        if self.compile and self.device != "cuda" and shutil.which(compiler) is None:
            raise UsageError(f"--compile needs a C++ compiler on a CPU, and there is no {compiler}")

    def check_against(self, context: int) -> None:
        """Refuse what does not fit the number of ranks that share a sample, which the launcher decides."""
        middle = self.seq_length // 2
        self.check_ranks(context, rf.causal & rf.documents([0, middle, self.seq_length]) if middle else rf.causal)


def parse(arguments: Sequence[str] | None = None) -> FinetuneOptions:
    """Read the command line (None: the process's own), fill in what was left out."""
    values = vars(_parser().parse_args(arguments))
    fill_in(values, DEFAULTS, Path("runs", "finetune"))
    return FinetuneOptions(**values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune_hf.py",
        description="Fine-tune a Transformers model on packed text with exact ring attention, on any number of processes: "
        "torchrun --nproc-per-node 2 launch/finetune_hf.py --check",
    )
    learned = parser.add_argument_group("what is learned")
    learned.add_argument("--model", type=Path, metavar="DIR", help="a saved causal language model and its tokenizer")
    learned.add_argument(
        "--model-type", default="qwen3", metavar="NAME",
        help="without --model: a small one of this type with random weights, that reads bytes (default: qwen3)",
    )  # fmt: skip
    learned.add_argument(
        "--text", type=Path, metavar="PATH",
        help="file or folder; each file is a document (default: the Python standard library's sources)",
    )  # fmt: skip
    learned.add_argument(
        "--seq-length", type=int, metavar="N",
        help=f"tokens of a sample, over all shards; documents are packed into it; default: {DEFAULTS['seq_length']}",
    )  # fmt: skip
    add_steps(learned, {name: str(DEFAULTS[name]) for name in ("batch", "steps", "learning_rate", "warmup")})
    add_ranks(parser.add_argument_group("how it is spread over processes"))
    memory = parser.add_argument_group("memory and speed")
    memory.add_argument(
        "--checkpointing", choices=CHECKPOINTING, default="none",
        help="what layers do not keep for backward: nothing, all, all but attention's results, or these in CPU memory "
        "(default: none)",
    )  # fmt: skip
    memory.add_argument("--loss-tile", type=int, metavar="N", help="compute logits and loss of N tokens at a time")
    memory.add_argument("--mlp-tile", type=int, metavar="N", help="compute feed-forwards of N tokens at a time")
    memory.add_argument("--compile", action="store_true", help="compile each layer with torch.compile")
    add_run(parser.add_argument_group("the run"), "runs/finetune", str(DEFAULTS["validation_samples"]))
    return parser
