"""Real text for a fine-tune: files as documents, tokens on disk once, and each rank reads its part of them.

    files -> tokens.npy, offsets.npy -> packed rows of documents -> this rank's part of its rows
             tokens/<digest>            rf.data.PackedLoader, beside the folder of the run

Tokens are written by the first rank, which compares those of an earlier run with their checksums, and memory-mapped by all:
what a rank does not read is not in its memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import ringflash as rf
from checkpoint import damaged, seal
from corpus import Texts
from finetune_options import FinetuneOptions
from ranks import Ranks
from ringflash.data import PackedLoader, Tokens
from run_options import UsageError

BYTES = 256  # a vocabulary
FILES = ("offsets.npy", "tokens.npy")
SECONDS = 10.0  # between two lines about tokens that are being made
TOKENIZERS = ("*token*", "vocab*", "*.model", "tekken.json")  # names of files, of which a tokenizer has one at least


@dataclass(frozen=True)
class Reader:
    """How text becomes tokens: the tokenizer of a model, or None for bytes, of which zero ends a document."""

    tokenizer: Any
    digest: str

    @property
    def pad_token(self) -> int:
        """What fills a row; no position sees it, and it is no target."""
        for name in ("pad_token_id", "eos_token_id"):
            if getattr(self.tokenizer, name, None) is not None:
                return int(getattr(self.tokenizer, name))
        return 0

    def tokens(self, text: bytes) -> np.ndarray:
        """A document's tokens and the one that ends it, if there is such a one."""
        if self.tokenizer is None:
            return np.frombuffer(text + b"\0", dtype=np.uint8)
        tokens = self.tokenizer(text.decode(errors="replace"), verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return np.array(tokens if end is None or tokens[-1:] == [end] else [*tokens, end], dtype=np.int32)


def read_as(model: Path | None, vocabulary: int) -> Reader:
    """The tokenizer beside a saved model; bytes without a model, and for one with a vocabulary of bytes and no tokenizer."""
    # without files Transformers makes an empty tokenizer for some models: every text would be no tokens
    saved = model is not None and any(file for pattern in TOKENIZERS for file in model.glob(pattern))
    if not saved and (model is None or vocabulary == BYTES):
        return Reader(None, "bytes")
    if not saved:
        raise UsageError(f"--model: {str(model)!r} has no tokenizer; save_pretrained it there")
    from transformers import AutoTokenizer  # an extra

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model: its tokenizer cannot be read: {str(error).splitlines()[0]}") from None
    if len(tokenizer) > vocabulary:
        raise UsageError(f"--model: its tokenizer has {len(tokenizer)} tokens, and the model {vocabulary}")
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id])
    return Reader(tokenizer, hashlib.sha256(content.encode()).hexdigest())


class Stored(NamedTuple):
    """Tokens of documents, memory-mapped; ``digest`` identifies them."""

    tokens: np.ndarray
    offsets: np.ndarray
    digest: str

    @property
    def documents(self) -> Tokens:
        """For a loader."""
        return Tokens(self.tokens, self.offsets)


class PackedText:
    """Packed rows of documents in a random order, as a ``Lesson``; an epoch after the other."""

    name = "packed text"
    chance: float | None = None

    def __init__(self, texts: Texts, reader: Reader, options: FinetuneOptions, ranks: Ranks) -> None:
        self._options, self._ranks, self._reader = options, ranks, reader
        folder = options.out.parent / "tokens"
        train = _store(texts.train, reader, folder, ranks)
        self._held_out = _store(texts.validation, reader, folder, ranks)
        self._loader = self._load(train.documents, shuffle=True)
        self._batches = self._forever()
        self.identity: Mapping[str, Any] = {
            "seq_length": options.seq_length,
            "seed": options.seed,
            "tokens": [train.digest, self._held_out.digest],
        }

    def batch(self) -> dict[str, Any]:
        """The next rows of this rank, and of them its own tokens."""
        return next(self._batches)

    def validation(self) -> Iterator[dict[str, Any]]:
        """The first rows of the text that was held out."""
        batches = -(-self._options.validation_samples // self._options.batch)
        for _, batch in zip(range(batches), self._load(self._held_out.documents, shuffle=False), strict=False):
            yield batch

    def scores(self, loss: float, accuracy: float | None = None) -> dict[str, float]:
        """What to record of a loss in nats per token."""
        return {"loss": loss, "bits_per_byte": loss / math.log(2)} if self._reader.tokenizer is None else {"loss": loss}

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands."""
        return {"loader": self._loader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, on any number of ranks."""
        self._loader.load_state_dict(state["loader"])

    def samples(self, length: int, whole: bool) -> dict[str, Any]:
        """Rows of short documents, one for each data rank: this rank's part of its row, or all of all rows."""
        needed = length * self._ranks.data
        lengths = np.resize([length // 3 + 1, length // 7 + 1, length // 2 + 1], 3 * self._ranks.data)
        documents = Tokens(np.resize(self._held_out.tokens[:needed], lengths.sum()), np.cumsum([0, *lengths]))
        other: dict[str, Any] = dict(group=(0, 1), data=(0, 1), rows=self._ranks.data) if whole else dict(rows=1)
        return next(iter(self._load(documents, shuffle=False, length=length, **other)))

    def _forever(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self._loader

    def _load(self, documents: Tokens, shuffle: bool, **other: Any) -> PackedLoader:
        options, ranks, placement = self._options, self._ranks, self._options.placement
        settings: dict[str, Any] = dict(
            length=options.seq_length,
            group=ranks.grid["context"],
            data=ranks.grid["data"],
            rows=options.batch // ranks.data,
            layout=placement.layout,
            route=placement.route,
            heads_axis=placement.heads_degree,
            pad_token=self._reader.pad_token,
            shuffle=shuffle,
            seed=options.seed,
            device=ranks.device,
        )
        if "group" in other:  # one process alone
            settings |= dict(layout="contiguous", route="ring", heads_axis=1)
        return PackedLoader(documents, mask=rf.causal, **settings | other)


def _store(texts: Sequence[bytes], reader: Reader, root: Path, ranks: Ranks) -> Stored:
    """Write the tokens of these documents under ``root``, unless they are there (every rank must call it).

    Rank 0 writes, however long that takes, and says how far it is; the others wait outside of any collective.
    """
    key = hashlib.sha256(reader.digest.encode())
    for text in texts:
        key.update(hashlib.sha256(text).digest())
    folder = root / key.hexdigest()[:16]
    ranks.once("tokens", lambda: _tokenize(texts, reader, folder, ranks))
    try:
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(
            f"--out: rank 0 has written {str(folder)!r}, and rank {ranks.rank} cannot see it; a file system that all nodes see "
            "is needed"
        ) from None
    if np.diff(offsets).max() < 2:
        raise UsageError("--text: no document has two tokens, one to read and one to predict")
    return Stored(tokens, offsets, key.hexdigest())


def _tokenize(texts: Sequence[bytes], reader: Reader, folder: Path, ranks: Ranks) -> None:
    if folder.exists():
        damage = damaged(folder, FILES)
        if damage is None:
            return
        ranks.say(f"tokens: {folder} is made again: {damage}")
        shutil.rmtree(folder)
    documents, said = [], time.monotonic()
    for text in texts:
        documents.append(reader.tokens(text))
        if time.monotonic() - said > SECONDS:
            ranks.say(f"tokens: {len(documents):,} of {len(texts):,} documents")
            said = time.monotonic()
    aside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    np.save(aside / "tokens.npy", np.concatenate(documents))
    np.save(aside / "offsets.npy", np.cumsum([0, *map(len, documents)]))
    seal(aside, FILES)
    aside.rename(folder)
