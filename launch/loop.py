"""The loop that ``train.py`` and ``finetune_hf.py`` share: steps, validation, checkpoints, and what is shown of them.

    options     how long, how fast, where to                    (run_options.py)
    lesson      what the model is to learn, batch after batch   (the script's own)
    wrapped     the model; an engine shares its weights         (weights.py)

A run is these three and a number of steps. It can be interrupted and go on, on another number of ranks and under another
engine: its curve has no seam. What can happen on the way, and what becomes of it:

    a process dies                the launcher restarts all: on from the newest undamaged checkpoint (attempts.py)
    SIGTERM, SIGUSR1              all ranks stop after the same step, with a checkpoint              (preemption.py)
    a loss or gradient is NaN     the step is not taken; where it began is said                       (nonfinite.py)
    a checkpoint is not written   said on every rank; tried again at the next one                    (checkpoint.py)
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import attempts
import checkpoint
import ringflash as rf
from attempts import INTERRUPTED, ToldToStop
from curve import draw_curve
from nonfinite import locate, random_states, spoil
from preemption import Preemption, listen
from profiling import Profiler
from progress import Progress, describe
from ranks import Ranks, peak_bytes
from run_options import RunError, RunOptions, UsageError
from weights import share

SKIPS = 5  # batches in a row that --on-nonfinite skip leaves out


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
        self._skipped = self._in_a_row = self._told = 0
        self._unsaved: str | None = None  # why the last checkpoint could not be written
        profile = self._begin()
        self._profiler = Profiler(profile, options.profile_steps, ranks)
        self._progress: Progress | None = None
        self._validated: bool = ranks.once("files of the run", lambda: self._open(settled))

    def train(self) -> int:
        """Steps up to ``--steps`` or ``--stop-at``, with validation and checkpoints on the way and one at the end.

        Returns 0, or ``INTERRUPTED`` if the launcher has told any rank to stop; then that is all that is left to do.
        """
        options, last, taken = self.options, self.options.last_step, 0
        if not self._validated and self.step < last:  # it was interrupted before that
            self.validate()
        with listen() as preemption:
            while self.step < last:
                taken += 1
                with self._profiler.watch(taken):
                    learned = self._train_step(preemption)
                if self._told:
                    return self._interrupted()
                if learned and self.step % options.validate_every == 0 and self.step < last:
                    self.validate()
                if learned and options.save_every and self.step % options.save_every == 0 and self.step < last:
                    self._save()
            if taken:
                self._save()
        return 0

    def close(self, title: str, verdict: str) -> int:
        """Validate a last time; the last lines are the validation loss, the curve's file and the verdict.

        Returns the exit status: 0, or 1 if the last checkpoint or the records of some steps could not be written.
        """
        closing = self.validate()
        self._mark("ended" if self._unsaved is None else "failed")
        complete = self.ranks.once("files of the run", self._close_files)
        if self._unsaved is not None:
            self.ranks.warn(f"the last checkpoint is missing, and with it what was learned since: {self._unsaved}")
        # all wait for the last line: a launcher ends all ranks when the first one ends with another status than 0
        self.ranks.once("the last lines", lambda: self._conclude(closing, title, verdict))
        return 0 if complete and self._unsaved is None else 1

    def _conclude(self, closing: Mapping[str, Any], title: str, verdict: str) -> None:
        chance = self.lesson.chance
        curve = draw_curve(self.options.out, title, self.step_tokens, chance)
        beside = "" if chance is None else f"; chance level of accuracy: {chance:.3f}"
        print(f"final validation {describe(closing)}{beside}")
        print(f"loss curve: {curve or 'not drawn (matplotlib is not installed)'}")
        print(verdict, flush=True)

    def _train_step(self, preemption: Preemption) -> bool:
        """One batch; returns False if its step was not taken. ``_told`` is the signal that has reached any rank, or 0."""
        began = time.perf_counter()
        rate = learning_rate(self.step, self.options)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.call.train()
        inputs, states = self.lesson.batch(), random_states()
        out = self.engine.forward(**inputs)
        self.engine.backward(spoil(out.loss))
        norm = self.engine.step()
        loss = out.loss.item()
        finite = math.isfinite(norm)
        bad, good, self._told = self.ranks.agree(not finite, finite, preemption.asked)
        record = {"split": "train", **self.lesson.scores(loss), "learning_rate": rate, "gradient_norm": norm}
        if bad:
            del out
            self._not_taken(record, inputs, states, agreed=not good)
            return False
        self.step += 1
        self._in_a_row = 0
        if self._progress is not None:
            speed = self.step_tokens / (time.perf_counter() - began)
            record |= {"tokens_per_second": speed, "peak_bytes": peak_bytes(self.ranks.device)}
            self._progress.trained({"step": self.step, **record})
        return True

    def _not_taken(self, record: dict[str, Any], inputs: dict[str, Any], states: Any, agreed: bool) -> None:
        """Say where it began; raise ``RunError`` if the run is not to go on."""
        number, loss, norm = self.step + 1, record["loss"], record["gradient_norm"]
        if not agreed:
            finite = self.ranks.collect("is the gradient finite", math.isfinite(norm))
            bad = [rank for rank, its in enumerate(finite) if not its]
            raise RunError(
                f"step {number}: the averaged gradient is not finite on rank(s) {bad} and finite on the others, where it "
                "should be the same: a device or its memory has failed; the last checkpoint is from before that"
            )
        where = locate(self.engine.model, self.engine.replay, inputs, states, self.ranks)
        text = f"step {number}: loss {loss}, gradient norm {norm}; {where}"
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        if self._progress is not None:
            batch = self.step + self._skipped
            self._progress.skipped({"step": number, **record, "split": "skipped", "batch": batch, "why": where})
        if self.options.on_nonfinite == "stop":
            raise RunError(
                f"{text}. The step was not taken; a lower --learning-rate may help, and --on-nonfinite skip leaves such a "
                "batch out"
            )
        if self._in_a_row > SKIPS:
            raise RunError(f"{text}. This is batch {self._in_a_row} in a row; --on-nonfinite skip leaves out {SKIPS}")
        self.ranks.warn(f"{text}. The batch is left out ({self._in_a_row} in a row, at most {SKIPS})")

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
        """Write a checkpoint; if that fails say so, and stop if it was asked for."""
        state = {"step": self.step, "skipped": self._skipped, **self.lesson.state_dict(), **self._identity}
        self._unsaved = checkpoint.save(self._checkpoints, self.engine, state, self.ranks, self.options.keep)
        if self._unsaved is None:
            return
        text = f"step {self.step}: no checkpoint could be written to {self._checkpoints}: {self._unsaved}"
        if self.options.on_save_error == "stop":
            raise RunError(f"{text}. The earlier ones are as they were")
        self.ranks.warn(f"{text}. The earlier ones are as they were; the run goes on and tries again at the next one")

    def _interrupted(self) -> int:
        name = signal.Signals(self._told).name
        self._save()
        self._mark("interrupted")
        self.ranks.once("files of the run", self._close_files)
        saved = "with a checkpoint" if self._unsaved is None else "WITHOUT a checkpoint"
        self.ranks.say(
            f"{name}: stopped after step {self.step} of {self.options.steps}, {saved}; the same command with --resume auto "
            f"goes on (exit status {INTERRUPTED})"
        )
        return INTERRUPTED

    def _close_files(self) -> bool:
        assert self._progress is not None  # of rank 0
        return self._progress.close()

    def _mark(self, state: str) -> None:
        """Say in the folder how the run stands; a full disk must not keep it from ending."""

        def write() -> None:
            try:
                attempts.write(self.options.out, state, step=self.step)
            except OSError as error:
                self.ranks.warn(f"run.json does not say that the run is {state}: {error}")

        self.ranks.once("how the run stands", write)

    def _begin(self) -> Path | None:
        """Go on from a checkpoint, or begin anew; returns the folder of the profile, if there is to be one."""
        options = self.options
        beginning = attempts.decide(options, self.ranks)
        if beginning.steps:
            path, state = checkpoint.newest_good(self._checkpoints, beginning.steps, self.ranks)
            checkpoint.refuse_mismatch(state, self._identity)
            checkpoint.load(path, self.engine, state)
            self.step, self._skipped = state["step"], state["skipped"]
            self.lesson.load_state_dict(state)
            samples = (self.step + self._skipped) * options.batch
            self.ranks.say(f"resumed from {path}: {self.step} steps, {samples} samples done")
        try:
            options.check_profile(self.step)
        except UsageError as error:
            if not beginning.restarted:
                raise
            self.ranks.say(f"no profile after this restart: {error}")
            return None
        return options.profile

    def _open(self, settled: Mapping[str, str]) -> bool:
        """Rank 0: the files of the run; returns False if a validation is due that an interruption has prevented."""
        options = self.options
        batches = self.step + self._skipped
        self._progress = Progress(
            options.out, self.step, options.steps, options.log_every, options.tensorboard, batches
        )
        config = dataclasses.asdict(options) | {"settled": dict(settled)}
        (options.out / "config.json").write_text(json.dumps(config, indent=1, default=str))
        due = self.step > 0 and self.step % options.validate_every == 0
        return not due or attempts.validated(options.out, self.step)


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
    """The exit status of ``main``, with mistakes of its user (2) and what ends a run (1) turned into one sentence."""
    try:
        return main()
    except ToldToStop:
        status, text = INTERRUPTED, "this launch was told to stop, and has; the same command with --resume auto goes on"
    except UsageError as error:
        status, text = 2, str(error)
    except RunError as error:
        status, text = 1, str(error)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{program}: {'' if status == INTERRUPTED else 'error: '}{text}", file=sys.stderr, flush=True)
    elif status != INTERRUPTED:
        time.sleep(10)  # a launcher ends all ranks when the first one ends: let that be the one that speaks
    return status
