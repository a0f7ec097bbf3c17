"""Where documents come from: Hugging Face datasets, streams, objects of one's own, and what is refused."""

from __future__ import annotations

import ast
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ringflash as rf
from ringflash.data import PackedLoader, PackingCollator, Tokens

LISTS = [
    list(range(first, first + n)) for first, n in ((0, 5), (10, 9), (20, 1), (30, 30), (70, 12), (90, 3), (100, 14))
]
CHOICES: dict[str, Any] = dict(layout="zigzag", pad_token=999)


def rows(documents: Any, ranks: int = 2, epochs: int = 1, **choices: Any) -> list[list[list[list[int]]]]:
    """Tokens and targets of the batches of each rank."""
    found = []
    for rank in range(ranks):
        loader = PackedLoader(documents, 16, (rank, ranks), **{**CHOICES, **choices})
        batches = [batch for _ in range(epochs) for batch in loader]
        found.append([[x["input_ids"].tolist(), x["shift_labels"].tolist()] for x in batches])
    return found


class Again:
    """Documents that can be gone through, and no more."""

    def __init__(self, documents: Any, make: Any = lambda x: x) -> None:
        self._documents, self._make = documents, make

    def __iter__(self) -> Iterator[Any]:
        return (self._make(document) for document in self._documents)


def dictionaries() -> list[dict[str, Any]]:
    """Documents with labels of their own: nothing is learned from the first three tokens of each."""
    return [{"input_ids": x, "labels": [-100] * min(3, len(x)) + x[3:]} for x in LISTS]


@pytest.mark.parametrize("fit", ["cut", "best"])
def test_a_stream_is_packed_like_a_list(fit: str) -> None:
    """Also the second time it is gone through, and from whatever kind of document."""
    expected = rows(LISTS, epochs=2, fit=fit)
    for make in (list, torch.tensor, np.array, lambda x: {"input_ids": x}):
        assert rows(Again(LISTS, make), epochs=2, fit=fit) == expected
    assert rows(Again(dictionaries()), fit=fit) == rows(dictionaries(), fit=fit)


def test_of_a_stream_only_the_rows_in_work_are_kept() -> None:
    """A rank that kept what it has read would run out of memory on a long stream, those of other data ranks included."""
    given: list[weakref.ref[np.ndarray]] = []

    def document(_: int) -> np.ndarray:
        tokens = np.ones(8, np.int64)
        given.append(weakref.ref(tokens))
        return tokens

    for fit, most in (("cut", 6), ("best", 8)):
        for rows_done in (0, 80):
            loader = PackedLoader(Again(range(200), document), 16, (0, 1), (1, 2), fit=fit, open_rows=2, pad_token=0)  # type: ignore[arg-type]
            loader.load_state_dict({**loader.state_dict(), "rows_done": rows_done})
            counts = [sum(tokens() is not None for tokens in given) for _ in loader]
            assert len(counts) == (100 - rows_done) // 2 and 0 < max(counts) <= most


def test_an_iterator_has_one_epoch() -> None:
    """A generator that is empty the second time would end training without a word."""
    loader = PackedLoader(iter(LISTS), 16, (0, 1), pad_token=0)
    assert len(list(loader)) == 5
    with pytest.raises(ValueError, match="can be gone through once"):
        list(loader)
    with pytest.raises(ValueError, match="show when they are yielded"):
        loader.batches()


def test_a_stream_is_told_its_epoch() -> None:
    """Streams shuffle themselves, by epoch, if they are told."""
    told = []

    class Stream(Again):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

    loader = PackedLoader(Stream(LISTS), 16, (0, 1), pad_token=0)
    assert [len(list(loader)) for _ in range(2)] == [5, 5] and told == [0, 1]


def test_hugging_face_datasets_are_read_in_slices(tmp_path: Path) -> None:
    """Plain, from disk, shuffled, concatenated, with lengths as a column, and streamed: the same rows as from a list."""
    datasets = pytest.importorskip("datasets")
    expected, plain = rows(dictionaries()), datasets.Dataset.from_list(dictionaries())
    plain.save_to_disk(tmp_path / "saved")
    halves = [plain.select(range(3)), plain.select(range(3, 7))]
    measured = plain.add_column("length", [len(x) for x in LISTS]).add_column("text", ["a"] * 7)
    for dataset in (
        *(plain, plain.with_format("torch"), datasets.load_from_disk(tmp_path / "saved"), measured),
        *(datasets.concatenate_datasets(halves), plain.to_iterable_dataset()),
        plain.cast_column("input_ids", datasets.LargeList(datasets.Value("uint16"))),
    ):
        assert rows(dataset) == expected
    shuffled = plain.shuffle(seed=1)
    assert rows(shuffled) == rows(shuffled.to_list()) != expected
    assert rows(plain.remove_columns("labels")) == rows(LISTS)
    equal = datasets.Features(input_ids=datasets.List(datasets.Value("int32"), length=4))
    assert rows(datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 3}, features=equal)) == rows(
        [[1, 2, 3, 4]] * 3
    )


def test_lengths_of_a_dataset_cost_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shuffled dataset of a terabyte would be read whole, on every rank, before the first step."""
    datasets = pytest.importorskip("datasets")
    shuffled = datasets.Dataset.from_list(dictionaries()).shuffle(seed=1)
    expected = [len(x) for x in shuffled["input_ids"]]
    monkeypatch.setattr(datasets.Dataset, "_getitem", None)
    loader = PackedLoader(shuffled, 100, (0, 1), **CHOICES)
    assert [piece.stop - piece.start for row in loader.plan() for piece in row] == expected


def test_a_mistaken_hugging_face_dataset_is_refused() -> None:
    """Texts that nobody tokenized, a dataset of splits, lengths that are not those of the documents."""
    datasets = pytest.importorskip("datasets")
    texts = datasets.Dataset.from_dict({"input_ids": ["a text"]})
    with pytest.raises(TypeError, match="tokenize first"):
        rows(texts)
    with pytest.raises(ValueError, match="there are none"):
        rows(texts.select([]))
    with pytest.raises(ValueError, match=r"\['text'\]; a column input_ids"):
        rows(texts.rename_column("input_ids", "text"))
    with pytest.raises(TypeError, match=r"a mapping with \['train'\]; pass many documents: a list, a split"):
        rows(datasets.DatasetDict(train=texts))
    padded = datasets.Dataset.from_dict({"input_ids": [[1, 2, 0]], "attention_mask": [[1, 1, 0]]})
    with pytest.raises(ValueError, match="tokenize without padding"):
        rows(padded)
    wrong = datasets.Dataset.from_dict({"input_ids": LISTS, "length": [5, 9, 1, 31, 12, 3, 14]})
    with pytest.raises(ValueError, match=r"documents\[3\] has 30 tokens, and 31 by its length"):
        PackedLoader(wrong, 16, (0, 1), **CHOICES)
    with pytest.raises(ValueError, match=r"documents\[1\] has 9 tokens, and 8 by its length"):
        PackedLoader(wrong.remove_columns("length"), 16, (0, 1), lengths=[5, 8, 1, 30, 12, 3, 14], **CHOICES)
    short = datasets.Dataset.from_dict({"input_ids": LISTS, "labels": [*LISTS[:6], [1] * 13]})
    with pytest.raises(ValueError, match=r"documents\[6\] has 13 labels, and 14 by its length"):
        PackedLoader(short, 16, (0, 1), **CHOICES)
    with pytest.raises(ValueError, match=r"documents\[1\] is empty"):
        PackedLoader(datasets.Dataset.from_dict({"input_ids": [[1], None]}), 16, (0, 1), **CHOICES)


def test_a_map_style_dataset_needs_lengths() -> None:
    """Finding them out would read everything, on every rank, before the first step."""

    class Dataset(torch.utils.data.Dataset[list[int]]):
        def __len__(self) -> int:
            return len(LISTS)

        def __getitem__(self, document: int) -> list[int]:
            return LISTS[document]

    assert rows(Dataset(), lengths=[len(x) for x in LISTS]) == rows(LISTS)
    with pytest.raises(TypeError, match="pass lengths=, their numbers of tokens"):
        rows(Dataset())


def test_no_package_is_imported_for_datasets() -> None:
    """The library needs torch and numpy; who has Hugging Face datasets has them imported already."""
    root = Path(rf.__file__).parent / "data"
    trees = [ast.parse(path.read_text()) for path in root.glob("*.py")]
    names = {
        name.split(".")[0]
        for tree in trees
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert len(trees) > 3 and not names & {"datasets", "pyarrow", "transformers"}


def test_a_collated_row_is_packed_documents_to_transformers() -> None:
    """Its own model on one device, told nothing but the batch (and to keep no cache), has the loss of the documents alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        packed = model(**PackingCollator(80, pad_token=0)(dictionaries()), use_cache=False).loss
        total, targets = 0.0, 0
        for example in dictionaries():
            ids, labels = (torch.tensor(example[name])[None] for name in ("input_ids", "labels"))
            counted = int((labels[:, 1:] != -100).sum())
            total += model(input_ids=ids, labels=labels).loss.item() * counted if counted else 0.0
            targets += counted
    assert packed.item() == pytest.approx(total / targets, rel=1e-6)  # it computes losses in float32


@pytest.mark.parametrize(
    ("documents", "choices", "error", "message"),
    [
        (np.arange(9), {}, TypeError, r"rf\.data\.Tokens\(tokens, offsets\)"),
        ("text", {}, TypeError, "documents is str"),
        (7, {}, TypeError, "documents is of type int"),
        ([], {}, ValueError, "there are none"),
        ([[1], []], {}, ValueError, r"documents\[1\] is empty"),
        (Again([[1], []]), {}, ValueError, "document 1 has 0 tokens"),
        ([[1], [2.5]], {}, TypeError, r"documents\[1\] is float64"),
        ([[[1]], [[2]]], {}, TypeError, "integers in one dimension"),
        ([["a"]], {}, TypeError, "integers in one dimension"),
        ([{"ids": [1]}], {}, ValueError, "input_ids, its tokens, are needed"),
        ([{"input_ids": [1, 2], "labels": [1]}], {}, ValueError, "1 labels and 2 tokens"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], {}, ValueError, r"documents\[0\] is padded"),
        (LISTS, dict(lengths=[5, 9]), ValueError, "lengths has 2 numbers, and there are 7 documents"),
        (LISTS, dict(lengths=[5, 9, 1, 30, 12, 3, 13]), ValueError, r"documents\[6\] has 14 tokens, and 13 by its"),
        (LISTS, dict(lengths=[1.0] * 7), TypeError, "lengths is float64"),
        (Again(LISTS), dict(lengths=[5] * 7), ValueError, "it tells its lengths itself"),
        (Tokens(np.arange(4), [0, 4]), dict(lengths=[4]), ValueError, "has lengths of its own"),
        (Tokens(np.arange(4), [0, 0, 4]), {}, ValueError, r"documents\[0\] is empty"),
        (LISTS, dict(overflow="error"), ValueError, "document 3 has 30 tokens and a row 16"),
        (LISTS, dict(pad_token=None), ValueError, "or drop_last=True"),
        (LISTS, dict(pad_token=None, fit="best", drop_last=True), ValueError, "the token that fills it$"),
        (LISTS, dict(pad_token="<pad>"), TypeError, "pad_token is '<pad>'; an integer is needed"),
        (LISTS, dict(data=(0, 20), drop_last=True), ValueError, "do not fill one batch, 1 x 16 tokens for each of 20"),
        (LISTS, dict(rows=0), ValueError, "rows is 0"),
        (LISTS, dict(layout="balanced", rows=2), ValueError, "documents of one row are dealt out"),
        (LISTS, dict(layout="zag"), ValueError, "layout is 'zag'"),
        (LISTS, dict(mask="causal"), TypeError, "mask is 'causal'"),
        (LISTS, dict(mask=rf.documents([0, 9])), ValueError, "lengths 9 and 16"),
        (Again(LISTS), dict(shuffle=True), ValueError, "shuffle and read ahead in the stream itself"),
        (Again(LISTS), dict(workers=2), ValueError, "shuffle and read ahead in the stream itself"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    documents: Any, choices: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The message names the argument, what came, and what is accepted."""
    with pytest.raises(error, match=message):
        rows(documents, **choices)


def test_a_source_that_gives_too_little_is_refused() -> None:
    """A wrong number of tokens would shift everything behind it."""

    class Short:
        lengths = (20, 20)

        def read(self, document: int, start: int, stop: int) -> Any:
            return np.arange(start, stop - 1), np.arange(start, stop - 1)

    with pytest.raises(
        ValueError, match=r"5 tokens of document 0 are at 0 to 5, by its length 20; 4 tokens and 4 labels"
    ):
        rows(Short())


@pytest.mark.parametrize(
    ("tokens", "offsets", "labels", "error"),
    [
        (np.arange(4), [0, 5], None, ValueError),
        (np.arange(4), [1, 4], None, ValueError),
        (np.arange(4), [0, 3, 2, 4], None, ValueError),
        (np.arange(4), np.array([0, 3, 2, 4], dtype=np.uint64), None, ValueError),
        (np.arange(4), [], None, ValueError),
        (np.arange(4), [0, 4], np.arange(3), ValueError),
        (np.arange(4.0), [0, 4], None, TypeError),
        (np.arange(4), [0, 4.5], None, TypeError),
    ],
)
def test_tokens_with_offsets_that_do_not_fit_are_refused(
    tokens: Any, offsets: Any, labels: Any, error: type[Exception]
) -> None:
    """Offsets of another file would cut documents anywhere."""
    with pytest.raises(error, match=r"^Tokens: "):
        Tokens(tokens, offsets, labels)


def test_tokens_may_be_lists_or_tensors_and_numbers_of_numpy() -> None:
    """What numpy takes without a copy needs no word of its own."""
    joined, edges = [token for tokens in LISTS for token in tokens], np.cumsum([0, *map(len, LISTS)])
    for tokens in (joined, torch.tensor(joined)):
        assert rows(Tokens(tokens, edges), rows=np.int64(1), pad_token=np.int64(999)) == rows(LISTS)


def test_a_state_of_other_rows_is_refused() -> None:
    """To go on at row 3 of other rows would repeat some documents and skip others."""
    state = PackedLoader(LISTS, 16, (0, 1), **CHOICES).state_dict()
    PackedLoader(LISTS, 16, (1, 2), (1, 3), rows=2, **{**CHOICES, "layout": "striped"}).load_state_dict(state)
    for other in (dict(seed=1), dict(shuffle=True), dict(fit="best"), dict(open_rows=3)):
        with pytest.raises(ValueError, match=f"{next(iter(other))}=.*it cannot go on in this one"):
            PackedLoader(LISTS, 16, (0, 1), **{**CHOICES, **other}).load_state_dict(state)
    with pytest.raises(ValueError, match="length=None"):
        PackedLoader(LISTS, 16, (0, 1), **CHOICES).load_state_dict({"epoch": 0, "rows_done": 0})
    with pytest.raises(ValueError, match="documents='7 documents, "):
        PackedLoader(LISTS[:-1], 16, (0, 1), **CHOICES).load_state_dict(state)
