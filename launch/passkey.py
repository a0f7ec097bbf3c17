r"""The passkey task: a key is hidden early in noise, and the last position asks for it.

    n n n n K n n n n n n n | n n n n n n n n n n n n n ?        n noise (32 bytes), K one of 32 keys, ? the question
            \_____________________ attention ________/           target of ?: the key; no other position has a target

The key lies in the first half. On two ranks with a contiguous layout that is the shard which the question is not in:
no model can answer unless attention crosses the shards, however well it is trained. So the task is the plainest proof
that a ring works (accuracy 1) and its control, ``--attention local``, that nothing else does (accuracy 1 / 32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from corpus import random_state
from run_options import UsageError

KEYS = 32
NOISE = 32
FIRST_KEY = 64
QUESTION = 128
IGNORED = -100


class PasskeyTask:
    """Endless samples, each a pure function of (seed, sample number); validation samples come from another stream.

    ``batch`` and ``validation`` return ``input_ids`` and ``shift_labels``, int64 [b, s]. All targets but the last of
    each row are ignored (-100): a loss that averaged over positions instead of targets would be wrong by a factor s.
    """

    name = "passkey"
    chance: float | None = 1 / KEYS

    def __init__(self, length: int, seed: int) -> None:
        if length < 4:
            raise UsageError(f"--seq-length {length} is too short for a key and a question; at least 4 is needed")
        self.length, self.seed = length, seed
        self.identity = {"task": self.name, "seq_length": length, "seed": seed}

    def scores(self, loss: float, accuracy: float | None = None) -> dict[str, float]:
        """What to record of a loss in nats per answer, and of the share of right answers where it was measured."""
        return {"loss": loss} if accuracy is None else {"loss": loss, "accuracy": accuracy}

    def batch(self, samples: range) -> tuple[Tensor, Tensor]:
        """The training rows of these sample numbers."""
        return self._rows("train", samples)

    def validation(self, samples: range, count: int) -> tuple[Tensor, Tensor]:
        """Rows of the validation stream; ``count`` is not needed, for there is no end to them."""
        return self._rows("validation", samples)

    def _rows(self, stream: str, samples: range) -> tuple[Tensor, Tensor]:
        inputs = torch.empty(len(samples), self.length, dtype=torch.long)
        targets = torch.full((len(samples), self.length), IGNORED)
        for row, sample in enumerate(samples):
            random = random_state("passkey", stream, self.seed, sample)
            key = FIRST_KEY + int(random.randint(KEYS))
            inputs[row] = torch.from_numpy(random.randint(NOISE, size=self.length))
            inputs[row, int(random.randint(self.length // 2))] = key
            inputs[row, -1] = QUESTION
            targets[row, -1] = key
        return inputs, targets
