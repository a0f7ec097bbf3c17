"""Real text, and which bytes of it a step reads.

Two things must hold for a loss curve to mean anything: validation files are never trained on, and the bytes of a step
depend on the seed and on the *sample number* only: not on the number of ranks, not on the history of the process.

    sample number    0      1      2      3      4      5      6      7     ...      one integer is the data position
    step (batch 4)   |------------ 0 -----------| |------------ 1 -----------|
    data rank of 2   [--- rank 0 --] [-- rank 1 -]                                   all context ranks of a data rank
                                                                                     read the same rows

Samples walk through the corpus in a random order without replacement: epoch e shifts the grid of windows by a random
offset and permutes it. A run that resumes at sample n, on any number of ranks, so neither repeats nor skips a window.

The default text is the Python standard library's own sources, which every machine has: about 12 MB without its tests.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from run_options import UsageError

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HELD_OUT = 0.05  # share of the files (of the bytes, if there is one file only) that is kept for validation
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Corpus:
    """Documents joined by a zero byte: what is trained on, and whole other files to validate on."""

    train: Bytes
    validation: Bytes
    sha256: str
    source: str


@dataclass(frozen=True)
class Texts:
    """Whole documents: what is trained on, and others to validate on."""

    train: list[bytes]
    validation: list[bytes]
    source: str


def read_corpus(path: Path | None = None) -> Corpus:
    """The documents of ``read_texts``, joined."""
    texts = read_texts(path)
    halves = [np.frombuffer(b"\0".join(half), dtype=np.uint8) for half in (texts.train, texts.validation)]
    digest = hashlib.sha256(b"\0".join(half.tobytes() for half in halves)).hexdigest()
    return Corpus(halves[0], halves[1], digest, texts.source)


def read_texts(path: Path | None = None) -> Texts:
    """Read a file or a folder of text; None is the Python standard library.

    Empty files and copies of an earlier file are dropped, so that no text is in both halves. Whether a file is held
    out depends on its name relative to the folder alone: adding files moves no other file. A single file is cut: its
    last 5 % are the validation text. A folder's files with a zero byte near their start are taken for binary and
    skipped.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if path is None else path
    if not root.exists():
        raise UsageError(f"--text: there is no file or folder {str(root)!r}")
    if root.is_file():
        whole = root.read_bytes()
        cut = int(len(whole) * (1 - HELD_OUT))
        return Texts([whole[:cut]], [whole[cut:]], str(root))
    documents = _documents(root, ".py" if path is None else "")
    if len(documents) < 2:
        raise UsageError(f"--text: folder {str(root)!r} holds {len(documents)} text files; at least 2 are needed")
    held_out = {name for name in documents if _lot(name) < HELD_OUT} or {min(documents, key=_lot)}
    if len(held_out) == len(documents):
        held_out.remove(max(held_out, key=_lot))
    train = [text for name, text in documents.items() if name not in held_out]
    return Texts(train, [documents[name] for name in sorted(held_out)], str(root))


def _documents(root: Path, suffix: str) -> dict[str, bytes]:
    """Text files under root by relative name, sorted; each content once, under its first name."""
    documents: dict[str, bytes] = {}
    seen: set[bytes] = set()
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in LEFT_OUT and not name.startswith("."))
        for file in sorted(name for name in files if name.endswith(suffix) and not name.startswith(".")):
            full = Path(folder, file)
            text = full.read_bytes() if full.is_file() else b""
            digest = hashlib.sha256(text).digest()
            if text and digest not in seen and b"\0" not in text[:8192]:
                seen.add(digest)
                documents[full.relative_to(root).as_posix()] = text
    return dict(sorted(documents.items()))


def _lot(name: str) -> float:
    """A number in [0, 1) that a name draws once and for all."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def share(first_sample: int, batch: int, data_rank: int, data_ranks: int) -> range:
    """The sample numbers that one data rank reads of the ``batch`` samples from ``first_sample`` on.

    The ranks' shares are disjoint, and together always the same samples in the same order; ``data_ranks`` must divide
    ``batch``. All context ranks of a data rank read the same numbers.
    """
    rows = batch // data_ranks
    return range(first_sample + data_rank * rows, first_sample + (data_rank + 1) * rows)


def random_state(*key: object) -> np.random.RandomState:
    """A generator that is a pure function of the key, on every machine (numpy froze the streams of this class)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4").astype(np.uint32))


class TextTask:
    """Predict the next byte of real text; every position of a window is a target.

    ``batch(samples)`` takes sample numbers (any integers from 0) and returns ``input_ids`` and ``shift_labels``, both
    int64 [b, s]: the target of position i is the byte at i + 1, the last one included, already shifted.
    """

    name = "text"
    chance: float | None = None  # accuracy of guessing; None: this task is judged by its loss

    def __init__(self, corpus: Corpus, length: int, seed: int) -> None:
        for half, text in (("training", corpus.train), ("validation", corpus.validation)):
            if len(text) < 2 * length:
                raise UsageError(
                    f"--seq-length {length} needs at least {2 * length} bytes of {half} text; "
                    f"{corpus.source!r} has {len(text)}"
                )
        self.corpus, self.length, self.seed = corpus, length, seed
        self.identity = {"task": self.name, "seq_length": length, "seed": seed, "corpus_sha256": corpus.sha256}
        self.windows = (len(corpus.train) - 1) // length - 1  # per epoch; one is given up for the random offset

    def scores(self, loss: float, accuracy: float | None = None) -> dict[str, float]:
        """What to record of a loss in nats per byte."""
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    def batch(self, samples: range) -> tuple[Tensor, Tensor]:
        """The training windows of these sample numbers."""
        return self._cut(self.corpus.train, [self.start(sample) for sample in samples])

    def start(self, sample: int) -> int:
        """Offset in the training text where the window of a sample begins."""
        epoch, index = divmod(sample, self.windows)
        offset, order = _epoch(self.seed, epoch, self.length, self.windows)
        return offset + int(order[index]) * self.length

    def validation(self, samples: range, count: int) -> tuple[Tensor, Tensor]:
        """Windows ``samples`` of ``count`` that lie evenly spaced over the validation text: the same in every run."""
        room = len(self.corpus.validation) - 1 - self.length
        return self._cut(self.corpus.validation, [sample * room // max(1, count - 1) for sample in samples])

    def _cut(self, text: Bytes, starts: list[int]) -> tuple[Tensor, Tensor]:
        rows = np.stack([text[start : start + self.length + 1] for start in starts]).astype(np.int64)
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, length: int, windows: int) -> tuple[int, NDArray[np.int64]]:
    random = random_state("text", seed, epoch)
    return int(random.randint(length)), random.permutation(windows).astype(np.int64)
