"""The loop that ``train.py`` and ``finetune_hf.py`` share: steps, validation, checkpoints, and what is shown of them.

    options     how long, how fast, where to                    (run_options.py)
    lesson      what the model is to learn, batch after batch   (the script's own)
    wrapped     the model; an engine shares its weights         (weights.py)

A run is these three and a number of steps. It can be interrupted and go on, on another number of ranks and under another
engine: its curve has no seam.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import checkpoint
import ringflash as rf
from curve import draw_curve
from profiling import Profiler
from progress import Progress, describe
from ranks import Ranks, peak_bytes
from run_options import RunOptions, UsageError
from weights import share


class Lesson(Protocol):
    """What is learned. Batches are keyword arguments of the model; the same on any number of ranks, taken together."""

    name: str
    chance: float | None
    """Accuracy of guessing; None if the lesson is judged by its loss."""
    identity: Mapping[str, Any]
    """What two runs must have in common if one is to continue the other; plain values."""

    def batch(self) -> dict[str, Any]:
        """This rank's inputs in the next step: whole sequences, or parts of them with their ``sharding``."""

    def validation(self) -> Iterator[dict[str, Any]]:
        """This rank's inputs of every validation; as many on all ranks."""

    def scores(self, loss: float, accuracy: float | None = None) -> dict[str, float]:
        """What to record of a mean loss and, where it was measured, of the share of right answers."""

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the next batch begins; plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class Run:
    """A lesson, a model that ``weights.spread`` has wrapped, and a number of steps: what a checkpoint holds, and the loop.

    ``model`` identifies the model, in plain values. ``settled`` goes to ``config.json``: what "auto" has chosen.
    """

    def __init__(
        self,
        options: RunOptions,
        lesson: Lesson,
        wrapped: rf.SequenceParallel,
        ranks: Ranks,
        model: Mapping[str, Any],
        settled: Mapping[str, str],
    ) -> None:
        self.options, self.lesson, self.ranks = options, lesson, ranks
        self.engine = share(
            wrapped,
            ranks,
            options.engine,
            adamw(options),
            zero_stage=options.stage,
            clip=options.clip,
            autocast=options.low_precision(ranks.device.type),
        )
        self.step = 0
        self.step_tokens = options.batch * options.seq_length
        self._wrapped = wrapped
        self._identity = {"model": dict(model), "data": dict(lesson.identity)}
        self._checkpoints = options.out / "checkpoints"
        if options.resume:
            self._resume()
        else:
            _set_aside(options.out, ranks)
        options.check_profile(self.step)
        self._profiler = Profiler(options.profile, options.profile_steps, ranks)
        self._progress: Progress | None = None
        if ranks.first:
            self._progress = Progress(options.out, self.step, options.steps, options.log_every, options.tensorboard)
            config = dataclasses.asdict(options) | {"settled": dict(settled)}
            (options.out / "config.json").write_text(json.dumps(config, indent=1, default=str))

    def train(self) -> None:
        """Steps up to ``--steps`` or ``--stop-at``, with validation and checkpoints on the way and one at the end."""
        options, last, began = self.options, self.options.last_step, self.step
        while self.step < last:
            with self._profiler.watch(self.step - began + 1):
                record = self._train_step()
            if self._progress is not None:
                self._progress.trained(record)
            if self.step % options.validate_every == 0 and self.step < last:
                self.validate()
            if options.save_every and self.step % options.save_every == 0 and self.step < last:
                self._save()
        if self.step > began:
            self._save()

    def close(self, title: str, verdict: str) -> None:
        """Validate a last time; the last lines are the validation loss, the curve's file and the verdict."""
        closing = self.validate()
        if self._progress is None:
            return
        self._progress.close()
        chance = self.lesson.chance
        curve = draw_curve(self.options.out, title, self.step_tokens, chance)
        beside = "" if chance is None else f"; chance level of accuracy: {chance:.3f}"
        print(f"final validation {describe(closing)}{beside}")
        print(f"loss curve: {curve or 'not drawn (matplotlib is not installed)'}")
        print(verdict, flush=True)

    def _train_step(self) -> dict[str, Any]:
        began = time.perf_counter()
        rate = learning_rate(self.step, self.options)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.call.train()
        out = self.engine.forward(**self.lesson.batch())
        self.engine.backward(out.loss)
        norm = self.engine.step()
        loss = out.loss.item()
        if not math.isfinite(loss + norm):  # the same on every rank: all of them stop
            raise UsageError(f"step {self.step + 1}: loss {loss}, gradient norm {norm}; try a lower --learning-rate")
        self.step += 1
        return {
            "step": self.step,
            "split": "train",
            **self.lesson.scores(loss),
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": self.step_tokens / (time.perf_counter() - began),
            "peak_bytes": peak_bytes(self.ranks.device),
        }

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Loss and accuracy, on the same samples at every call and for every number of ranks."""
        self.engine.call.eval()
        losses, right, asked = [], 0.0, []
        for inputs in self.lesson.validation():
            out = self.engine.forward(**inputs)
            losses.append(out.loss.item())  # of all ranks
            mine = self._local(inputs)
            asked.append(float((mine >= 0).sum()))
            if out.logits is not None:
                right += float((out.logits.argmax(-1) == mine).sum())
        right, *counts = self.ranks.total([right, *asked])
        loss = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
        accuracy = right / sum(counts)
        record = {"step": self.step, "split": "validation", **self.lesson.scores(loss, accuracy)}
        if self._progress is not None:
            self._progress.validated(record)
        return record

    def _local(self, inputs: Mapping[str, Any]) -> Tensor:
        """The targets of this rank's positions."""
        targets: Tensor = inputs["shift_labels"]
        if "sharding" in inputs:
            return targets
        assert self._wrapped.sharding is not None  # the forward has set it
        return self._wrapped.sharding.shard(targets, dim=1)

    def _save(self) -> None:
        state = {"step": self.step, **self.lesson.state_dict(), **self._identity}
        checkpoint.save(self._checkpoints, self.engine, state, self.ranks, self.options.keep)

    def _resume(self) -> None:
        newest = checkpoint.latest(self._checkpoints)
        checkpoint.refuse_mismatch(checkpoint.read_state(newest), self._identity)
        state = checkpoint.load(newest, self.engine)
        self.step = state["step"]
        self.lesson.load_state_dict(state)
        self.ranks.say(f"resumed from {newest}: {self.step} steps, {self.step * self.options.batch} samples done")


def learning_rate(step: int, options: RunOptions) -> float:
    """Linear warm-up, then half a cosine down to zero: a pure function of the step, so nothing of it is saved.

    ``step`` counts from 0, so the first step already learns; a short run warms up for a fifth of its steps at most.
    """
    warmup = min(options.warmup, options.steps // 5)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, options.steps - warmup)))


def adamw(options: RunOptions) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """What makes AdamW for a model; matrices decay, vectors do not."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))

    return make


def attempt(program: str, main: Callable[[], int]) -> int:
    """The exit status of ``main``, with the mistakes of its user turned into one sentence and status 2."""
    try:
        return main()
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(10)  # a launcher ends all ranks when the first one ends: let that be the one that speaks
        return 2


def _set_aside(out: Path, ranks: Ranks) -> None:
    """Keep an earlier run of the same folder under a numbered name: starting anew must not destroy anything."""
    if ranks.first and (out / "metrics.jsonl").exists():
        number = next(n for n in range(1, sys.maxsize) if not out.with_name(f"{out.name}.{n}").exists())
        out.rename(out.with_name(f"{out.name}.{number}"))
        ranks.say(f"the run that was in {out} is now in {out}.{number} (--resume would have continued it)")
