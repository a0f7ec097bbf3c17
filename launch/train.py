"""Train a byte-level transformer with ring attention, on one process or many.

    torchrun --nproc-per-node 2 launch/train.py --check                           real text, a loss that falls
    torchrun --nproc-per-node 2 launch/train.py --task passkey                    solved: the ring carries the key
    torchrun --nproc-per-node 2 launch/train.py --task passkey --attention local  at chance: nothing carries it
    torchrun --nproc-per-node 4 launch/train.py --batch 2 --data 2 --engine fsdp  2 x 2 ranks, weights sharded
    torchrun --nproc-per-node 2 launch/train.py --engine deepspeed --zero-stage 3 the same by DeepSpeed
    torchrun --nproc-per-node 2 launch/train.py --profile                         what every rank did in steps 3 to 5
    torchrun --max-restarts 3 --nproc-per-node 2 launch/train.py --save-every 50  goes on by itself if a process dies
    accelerate launch --multi_gpu --num_processes 2 launch/train.py               another launcher
    python launch/train.py                                                        one process, no launcher

The result does not depend on how many processes there are: the samples of a step, the loss and the gradients are those
of one process. ``--check`` proves it before it trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from byte_transformer import ByteTransformer, ModelConfig
from corpus import TextTask, read_corpus
from exactness import prove
from loop import Run, attempt
from options import Options, UsageError, parse
from passkey import PasskeyTask
from ranks import Ranks, finish, fit, start
from weights import spread

Task = TextTask | PasskeyTask


def main(options: Options) -> int:
    """One run from start to end; its last lines are the validation loss, the curve's file and the exactness.

    Returns the exit status: 0; 1 if the run was to be checked and is not exact, or its last checkpoint could not be written;
    75 if it was told to stop, and can go on.
    """
    model_config, task = _model_config(options), _task(options)
    options.check_against(fit(options.data, options.context))
    ranks = start(options.data, options.context, options.device, options.timeout)
    verdict = "exactness: not checked (--check does)"
    if options.check:
        exact, verdict = prove(ranks, options)
        ranks.say(verdict)
        if not exact:
            return 1
    run = _run(options, model_config, task, ranks)
    status = run.train()
    if status:
        return status
    title = f"{task.name}: {options.seq_length} tokens over {ranks.context} ranks, {options.attention} attention"
    return run.close(title, verdict)


def _run(options: Options, model_config: ModelConfig, task: Task, ranks: Ranks) -> Run:
    torch.manual_seed(options.seed)
    model = ByteTransformer(model_config).to(ranks.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    mask = options.mask(options.seq_length, ranks.context)
    wrapped = spread(model, ranks, mask, options.placement)
    sharding = options.placement.sharding(options.seq_length, ranks.grid["context"], mask)
    settled = {"layout": str(sharding.layout), "route": str(sharding.route)}  # "auto" decided
    lesson = Samples(task, options, ranks)
    run = Run(options, lesson, wrapped, ranks, dataclasses.asdict(model_config), settled)
    if isinstance(task, TextTask):
        corpus = task.corpus
        ranks.say(f"text: {corpus.source}, {len(corpus.train):,} bytes and {len(corpus.validation):,} to validate on")
        ranks.say(f"text: sha256 {corpus.sha256}")
    ranks.say(
        f"model: {parameters:,} parameters; step: {options.batch} x {options.seq_length} tokens; "
        f"{ranks.size} process(es) on {ranks.device.type}: data {ranks.data} x context {ranks.context}, "
        f"{options.engine_name}, {options.attention} attention, layout {sharding.layout}, route {sharding.route}, "
        f"{options.heads_degree} rank(s) to a shard; folder: {options.out}"
    )
    return run


class Samples:
    """A task's samples in the order of their numbers, as a ``Lesson``: one integer says where it stands."""

    def __init__(self, task: Task, options: Options, ranks: Ranks) -> None:
        self.name, self.chance, self.scores = task.name, task.chance, task.scores
        self.identity: Mapping[str, Any] = task.identity
        self._task, self._ranks, self._size = task, ranks, options.batch
        self._validation = -(-options.validation_samples // options.batch)  # in batches
        self._sample = 0

    def batch(self) -> dict[str, Any]:
        """The next samples, whole; ranks that share a sample get the same."""
        rows = self._ranks.rows(self._sample, self._size)
        self._sample += self._size
        return self._inputs(self._task.batch(rows))

    def validation(self) -> Iterator[dict[str, Any]]:
        """The same samples at every call."""
        for batch in range(self._validation):
            rows = self._ranks.rows(batch * self._size, self._size)
            yield self._inputs(self._task.validation(rows, self._validation * self._size))

    def state_dict(self) -> dict[str, Any]:
        """The number of the next sample."""
        return {"sample": self._sample}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._sample = state["sample"]

    def _inputs(self, samples: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
        inputs, targets = (tensor.to(self._ranks.device) for tensor in samples)
        return {"input_ids": inputs, "shift_labels": targets}


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


if __name__ == "__main__":
    finish(attempt("train.py", lambda: main(parse())))
