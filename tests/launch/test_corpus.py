"""What is trained on, what is validated on, and which bytes a step reads."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from corpus import Corpus, TextTask, read_corpus, share
from options import UsageError
from passkey import FIRST_KEY, IGNORED, KEYS, QUESTION, PasskeyTask


@pytest.fixture(scope="module")
def counted() -> Corpus:
    """Training bytes 0, 1, 2, ... mod 251, so that a window's start can be read off its contents."""
    return Corpus(np.arange(5003, dtype=np.uint32).astype(np.uint8), np.zeros(400, np.uint8), "-", "-")


def test_the_default_corpus_is_megabytes_of_python_without_tests() -> None:
    """A fresh machine has enough real text, and two readings of it are the same to the byte."""
    first, second = read_corpus(), read_corpus()
    assert len(first.train) > 5_000_000
    assert len(first.validation) > 100_000
    assert first.sha256 == second.sha256
    assert np.array_equal(first.train, second.train)
    assert b"import" in first.train.tobytes()[:100_000]


def test_validation_files_are_never_trained_on(text_folder: Path) -> None:
    """A document is in one half only, whole; a copy of it under another name does not leak into the other half."""
    corpus = read_corpus(text_folder)
    train, validation = (set(half.tobytes().split(b"\0")) for half in (corpus.train, corpus.validation))
    assert not train & validation
    assert train | validation == {path.read_bytes() for path in text_folder.iterdir()}
    assert train and validation


def test_a_copy_of_a_document_does_not_leak(tmp_path: Path) -> None:
    """However a file is copied under other names, its text is in one half at most."""
    for name in range(200):
        (tmp_path / f"{name}.txt").write_bytes(b"the same text in every file" if name % 2 else b"text %d" % name)
    corpus = read_corpus(tmp_path)
    train, validation = (half.tobytes().split(b"\0") for half in (corpus.train, corpus.validation))
    assert len(train) + len(validation) == 101
    assert not set(train) & set(validation)


def test_a_new_file_moves_no_other_between_the_halves(text_folder: Path, tmp_path: Path) -> None:
    """Whether a file is held out depends on its own name, so a corpus can grow without leaking its past."""
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    before = set(read_corpus(tmp_path).validation.tobytes().split(b"\0"))
    shutil.copy(text_folder / "abc.py", tmp_path / "new.txt")
    after = set(read_corpus(tmp_path).validation.tobytes().split(b"\0"))
    assert before == {text for text in after if text.startswith(b"document")}


def test_a_single_file_is_cut_in_two(tmp_path: Path) -> None:
    """With one document the last part is held out, and nothing is lost or seen twice."""
    file = tmp_path / "book.txt"
    file.write_bytes(bytes(range(1, 201)) * 10)
    corpus = read_corpus(file)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == file.read_bytes()
    assert len(corpus.validation) == 100


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_text_that_is_not_there_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """A wrong --text is one sentence that names the path, not a traceback from inside."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"--text.*{name}"):
        read_corpus(tmp_path / name)


def test_text_too_short_for_the_sequence_is_refused(text_folder: Path) -> None:
    """A window that does not fit is refused with both numbers, not filled up in silence."""
    with pytest.raises(UsageError, match=r"--seq-length 10000000 .* training text"):
        TextTask(read_corpus(text_folder), length=10_000_000, seed=0)


@pytest.mark.parametrize("data_ranks", [1, 2, 3, 4, 6, 12])
def test_the_global_batch_does_not_depend_on_the_number_of_data_ranks(data_ranks: int) -> None:
    """The ranks' shares, put together, are the same samples in the same order: none twice, none left out."""
    together = [sample for rank in range(data_ranks) for sample in share(36, 12, rank, data_ranks)]
    assert together == list(range(36, 48))


def test_an_epoch_reads_every_window_once(counted: Corpus) -> None:
    """Sampling is without replacement: windows of an epoch do not overlap, and the next epoch cuts elsewhere."""
    task = TextTask(counted, length=50, seed=3)
    first, second = ([task.start(epoch * task.windows + i) for i in range(task.windows)] for epoch in (0, 1))
    for starts in (first, second):
        assert np.diff(sorted(starts)).tolist() == [50] * (task.windows - 1)
        assert max(starts) + 51 <= len(counted.train)
    assert first != sorted(first)
    assert first != second


def test_a_sample_is_a_pure_function_of_seed_and_number(counted: Corpus) -> None:
    """Resuming at sample n reads what an uninterrupted run would have read, whatever was drawn before."""
    task, later = TextTask(counted, length=50, seed=3), TextTask(counted, length=50, seed=3)
    inputs, _ = task.batch(range(0, 30))
    torch.rand(7), np.random.rand(7)
    assert torch.equal(later.batch(range(20, 30))[0], inputs[20:])
    assert not torch.equal(TextTask(counted, length=50, seed=4).batch(range(0, 30))[0], inputs)


def test_targets_are_the_next_bytes(counted: Corpus) -> None:
    """Targets come already shifted, the last one included: nothing is lost at the end of a window."""
    inputs, targets = TextTask(counted, length=50, seed=0).batch(range(4))
    assert torch.equal(targets, (inputs + 1) % 256)


def test_validation_samples_cover_the_validation_text(text_folder: Path) -> None:
    """The first sample begins the held-out text, the last one ends it: no part of it is silently left out."""
    corpus = read_corpus(text_folder)
    inputs, targets = TextTask(corpus, length=64, seed=0).validation(range(5), 5)
    assert inputs[0].tolist() == corpus.validation[:64].tolist()
    assert targets[-1].tolist() == corpus.validation[-64:].tolist()


@pytest.mark.parametrize("length", [4, 33, 128])
def test_a_passkey_lies_in_the_first_half_and_is_asked_for_at_the_end(length: int) -> None:
    """One key in the first half, the question last, and only its answer is a target: else the task proves nothing."""
    inputs, targets = PasskeyTask(length, seed=1).batch(range(200))
    is_key = (inputs >= FIRST_KEY) & (inputs < FIRST_KEY + KEYS)
    assert is_key.sum(1).tolist() == [1] * 200
    assert not is_key[:, length // 2 :].any()
    assert (inputs[:, -1] == QUESTION).all()
    assert (inputs[:, :-1] != QUESTION).all()
    assert torch.equal(targets[:, -1], inputs[is_key])
    assert (targets[:, :-1] == IGNORED).all()
    assert len(set(targets[:, -1].tolist())) == KEYS


def test_passkey_validation_is_another_stream() -> None:
    """Validation rows are none of the training rows, and both are pure functions of their numbers."""
    task = PasskeyTask(32, seed=1)
    train, validation = task.batch(range(50))[0], task.validation(range(50), 50)[0]
    assert not {tuple(row) for row in train.tolist()} & {tuple(row) for row in validation.tolist()}
    assert torch.equal(PasskeyTask(32, seed=1).batch(range(40, 50))[0], train[40:])
