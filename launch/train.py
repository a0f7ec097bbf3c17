"""Train a byte-level transformer with ring attention, on one process or many.

    torchrun --nproc-per-node 2 launch/train.py --check                           real text, a loss that falls
    torchrun --nproc-per-node 2 launch/train.py --task passkey                    solved: the ring carries the key
    torchrun --nproc-per-node 2 launch/train.py --task passkey --attention local  at chance: nothing carries it
    torchrun --nproc-per-node 4 launch/train.py --batch 2 --data 2 --engine fsdp  2 x 2 ranks, weights sharded
    torchrun --nproc-per-node 2 launch/train.py --profile                         what every rank did in steps 3 to 5
    python launch/train.py                                                        one process, no launcher

The result does not depend on how many processes there are: the samples of a step, the loss and the gradients are those
of one process. ``--check`` proves it before it trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

import checkpoint
from byte_transformer import ByteTransformer, ModelConfig
from corpus import TextTask, read_corpus
from curve import draw_curve
from exactness import prove
from options import Options, UsageError, parse
from passkey import PasskeyTask
from profiling import Profiler
from progress import Progress, describe
from ranks import Ranks, finish, fit, peak_bytes, spread, start, whole

Task = TextTask | PasskeyTask


def main(options: Options) -> int:
    """One run from start to end; its last lines are the validation loss, the curve's file and the exactness.

    Returns the exit status: 0, or 1 if the run was to be checked and is not exact.
    """
    model_config, task = _model_config(options), _task(options)
    options.check_against(fit(options.data, options.context))
    ranks = start(options.data, options.context, options.device)
    verdict = "exactness: not checked (--check does)"
    if options.check:
        exact, verdict = prove(ranks, options)
        ranks.say(verdict)
        if not exact:
            return 1
    run = Run(options, model_config, task, ranks)
    run.train()
    closing = run.validate()
    if ranks.first:
        assert run.progress is not None
        run.progress.close()
        title = f"{task.name}: {options.seq_length} tokens over {ranks.context} ranks, {options.attention} attention"
        curve = draw_curve(options.out, title, run.step_tokens, task.chance)
        print(f"final validation {describe(closing)}" + _beside_chance(task))
        print(f"loss curve: {curve or 'not drawn (matplotlib is not installed)'}")
        print(verdict, flush=True)
    return 0


class Run:
    """A model, its optimizer and its place in the data: what a checkpoint holds, and the loop that moves it on."""

    def __init__(self, options: Options, model_config: ModelConfig, task: Task, ranks: Ranks) -> None:
        self.options, self.task, self.ranks = options, task, ranks
        self.step, self.sample = 0, 0  # steps done; the number of the next sample to read
        self.step_tokens = options.batch * options.seq_length
        self.checkpoints = options.out / "checkpoints"
        self.identity = {"model": dataclasses.asdict(model_config), "data": task.identity}
        torch.manual_seed(options.seed)
        self.model = ByteTransformer(model_config).to(ranks.device)
        mask = options.mask(options.seq_length, ranks.context)
        self.sharding = options.placement.sharding(options.seq_length, ranks.grid["context"], mask)
        self.spread_model, self.wrapper = spread(self.model, ranks, options.engine, mask, options.placement)
        self.optimizer = _optimizer(self.model, options)
        if options.resume:
            self._resume()
        else:
            _set_aside(options.out, ranks)
        options.check_profile(self.step)
        self.profiler = Profiler(options.profile, options.profile_steps, ranks)
        self.progress: Progress | None = None
        if ranks.first:
            self.progress = Progress(options.out, self.step, options.steps, options.log_every, options.tensorboard)
            settled = {"layout": str(self.sharding.layout), "route": str(self.sharding.route)}  # "auto" decided
            config = dataclasses.asdict(options) | {"settled": settled}
            (options.out / "config.json").write_text(json.dumps(config, indent=1, default=str))
            _introduce(self)

    def train(self) -> None:
        """Steps up to ``--steps`` or ``--stop-at``, with validation and checkpoints on the way and one at the end."""
        options, last, began = self.options, self.options.last_step, self.step
        while self.step < last:
            with self.profiler.watch(self.step - began + 1):
                record = self._train_step()
            if self.progress is not None:
                self.progress.trained(record)
            if self.step % options.validate_every == 0 and self.step < last:
                self.validate()
            if options.save_every and self.step % options.save_every == 0 and self.step < last:
                self._save()
        if self.step > began:
            self._save()

    def _train_step(self) -> dict[str, Any]:
        options = self.options
        began = time.perf_counter()
        rate = learning_rate(self.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = self.task.batch(self.ranks.rows(self.sample, options.batch))
        self.spread_model.train()
        out = self._forward(inputs, targets)
        out.loss.backward()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)).item()
        loss = out.loss.item()
        if not math.isfinite(loss + norm):  # the same on every rank: all of them stop
            raise UsageError(f"step {self.step + 1}: loss {loss}, gradient norm {norm}; try a lower --learning-rate")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.sample += options.batch
        return {
            "step": self.step,
            "split": "train",
            **self.task.scores(loss),
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": self.step_tokens / (time.perf_counter() - began),
            "peak_bytes": peak_bytes(self.ranks.device),
        }

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Loss and accuracy, on the same samples at every call and for every number of ranks."""
        batches = -(-self.options.validation_samples // self.options.batch)
        self.spread_model.eval()
        losses, right, asked = 0.0, 0.0, 0.0
        for batch in range(batches):
            rows = self.ranks.rows(batch * self.options.batch, self.options.batch)
            inputs, targets = self.task.validation(rows, batches * self.options.batch)
            out = self._forward(inputs, targets)
            losses += out.loss.item()  # of all ranks; batches have equally many targets
            assert self.wrapper.sharding is not None  # the forward has set it
            mine = self.wrapper.sharding.shard(targets.to(self.ranks.device), dim=1)
            right += float((out.logits.argmax(-1) == mine).sum())
            asked += float((mine >= 0).sum())
        right, asked = self.ranks.total([right, asked])
        record = {"step": self.step, "split": "validation", **self.task.scores(losses / batches, right / asked)}
        if self.progress is not None:
            self.progress.validated(record)
        return record

    def _forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
        device, dtype = self.ranks.device, self.options.dtype
        low = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
        with torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext():
            return self.spread_model(input_ids=inputs.to(device), shift_labels=targets.to(device))

    def _save(self) -> None:
        state = {"step": self.step, "sample": self.sample, **self.identity}
        checkpoint.save(self.checkpoints, self.model, self.optimizer, state, self.ranks, self.options.keep)

    def _resume(self) -> None:
        newest = checkpoint.latest(self.checkpoints)
        checkpoint.refuse_mismatch(checkpoint.read_state(newest), self.identity)
        state = checkpoint.load(newest, self.model, self.optimizer)
        self.step, self.sample = state["step"], state["sample"]
        self.ranks.say(f"resumed from {newest}: {self.step} steps, {self.sample} samples done")


def learning_rate(step: int, options: Options) -> float:
    """Linear warm-up, then half a cosine down to zero: a pure function of the step, so nothing of it is saved.

    ``step`` counts from 0, so the first step already learns; a short run warms up for a fifth of its steps at most.
    """
    warmup = min(options.warmup, options.steps // 5)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, options.steps - warmup)))


def _model_config(options: Options) -> ModelConfig:
    fields = {field.name for field in dataclasses.fields(ModelConfig)} & vars(options).keys()
    try:
        return ModelConfig(**{name: getattr(options, name) for name in fields})
    except ValueError as error:
        raise UsageError(str(error)) from None


def _task(options: Options) -> Task:
    if options.task == "passkey":
        return PasskeyTask(options.seq_length, options.seed)
    return TextTask(read_corpus(options.text), options.seq_length, options.seed)


def _optimizer(model: ByteTransformer, options: Options) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))


def _set_aside(out: Path, ranks: Ranks) -> None:
    """Keep an earlier run of the same folder under a numbered name: starting anew must not destroy anything."""
    if ranks.first and (out / "metrics.jsonl").exists():
        number = next(n for n in range(1, sys.maxsize) if not out.with_name(f"{out.name}.{n}").exists())
        out.rename(out.with_name(f"{out.name}.{number}"))
        ranks.say(f"the run that was in {out} is now in {out}.{number} (--resume would have continued it)")


def _introduce(run: Run) -> None:
    ranks, options, task = run.ranks, run.options, run.task
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    if isinstance(task, TextTask):
        corpus = task.corpus
        print(f"text: {corpus.source}, {len(corpus.train):,} bytes and {len(corpus.validation):,} to validate on")
        print(f"text: sha256 {corpus.sha256}")
    print(
        f"model: {parameters:,} parameters; step: {options.batch} x {options.seq_length} tokens; "
        f"{ranks.size} process(es) on {ranks.device.type}: data {ranks.data} x context {ranks.context}, "
        f"{options.engine}, {options.attention} attention, layout {run.sharding.layout}, route {run.sharding.route}, "
        f"{options.heads_degree} rank(s) to a shard; folder: {options.out}",
        flush=True,
    )


def _beside_chance(task: Task) -> str:
    return "" if task.chance is None else f"; chance level of accuracy: {task.chance:.3f}"


def _run() -> int:
    """main() with the mistakes of its user turned into one sentence and status 2."""
    try:
        return main(parse())
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(10)  # a launcher ends all ranks when the first one ends: let that be the one that speaks
        return 2


if __name__ == "__main__":
    finish(_run())
