"""The loader of packed documents: its ranks' parts together are the whole, wherever a run stopped and on any grid."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import ringflash as rf
from ringflash.data import PackedLoader, Tokens

LAYOUTS = ("auto", "contiguous", "zigzag", "striped", "balanced")
PAD = 10**6
Batch = dict[str, Any]


def numbered(lengths: list[int]) -> list[np.ndarray]:
    """Documents in which no two tokens are alike, so that a token tells where it stood; between documents one is left out."""
    first = np.cumsum([0, *(n + 1 for n in lengths)])
    return [np.arange(a, a + n, dtype=np.int32) for a, n in zip(first.tolist(), lengths, strict=False)]


def parts(documents: list[np.ndarray], length: int, ranks: int, **choices: Any) -> list[list[Batch]]:
    """The batches of each rank of one data rank."""
    return [list(PackedLoader(documents, length, (rank, ranks), **choices)) for rank in range(ranks)]


def whole(batches: list[Batch]) -> dict[str, Tensor]:
    """The whole rows, put together from one batch of every rank."""
    order = torch.cat([batch["sharding"].positions for batch in batches])
    return {
        name: torch.cat([batch[name] for batch in batches], dim=1)[:, order.argsort()]
        for name in ("input_ids", "position_ids", "shift_labels")
    }


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=15),
    length=st.integers(1, 25),
    ranks=st.integers(1, 5),
    layout=st.sampled_from(LAYOUTS),
    fit=st.sampled_from(["cut", "best"]),
    shuffle=st.booleans(),
)
def test_the_ranks_together_have_every_token_and_every_target_once(
    lengths: list[int], length: int, ranks: int, layout: str, fit: Any, shuffle: bool
) -> None:
    """Every token but the first of each document is a target, even where a row ends in it; never another document's."""
    documents = numbered(lengths)
    last = {int(document[-1]) for document in documents}
    seen: Counter[int] = Counter()
    for batches in zip(
        *parts(documents, length, ranks, layout=layout, fit=fit, shuffle=shuffle, pad_token=PAD), strict=True
    ):
        batch = whole(list(batches))
        (ids,), (positions,), (targets,) = (x.tolist() for x in batch.values())
        assert len(ids) == length
        for at, (token, position, target) in enumerate(zip(ids, positions, targets, strict=True)):
            follows = at > 0 and token == ids[at - 1] + (token != PAD)
            assert position == (positions[at - 1] + 1 if follows else 0)
            assert target == (-100 if token == PAD or token in last else token + 1)
        seen.update(token for token in ids if token != PAD)
    assert seen == Counter(int(token) for document in documents for token in document)


@settings(max_examples=30)
@given(
    before=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    after=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    batches=st.integers(0, 6),
    fit=st.sampled_from(["cut", "best"]),
    stream=st.booleans(),
)
def test_a_run_goes_on_exactly_on_another_grid(
    before: tuple[int, int], after: tuple[int, int], batches: int, fit: Any, stream: bool
) -> None:
    """The rows that are still to come are the same in the same order, whatever the number of ranks and rows of a batch."""
    documents = numbered([5, 9, 1, 30, 12, 3, 3, 40, 2, 8, 8, 21, 6])
    choices: dict[str, Any] = dict(fit=fit, pad_token=PAD, shuffle=not stream, seed=3)

    def loaders(ranks: int, rows: int) -> list[PackedLoader]:
        given: Any = Again(documents) if stream else documents
        return [PackedLoader(given, 16, (0, 1), (rank, ranks), rows=rows, **choices) for rank in range(ranks)]

    def rows_of(each: list[Iterator[Batch]], count: int | None = None) -> list[list[int]]:
        found: list[list[int]] = []
        while count is None or count > 0:
            batch = [next(loader, None) for loader in each]
            if batch[0] is None:
                assert batch == [None] * len(each)
                break
            found += [row for part in batch if part is not None for row in part["input_ids"].tolist()]
            count = None if count is None else count - 1
        return [row for row in found if row != [PAD] * 16]

    everything = rows_of([iter(loader) for loader in loaders(1, 1)])
    first = loaders(*before)
    done = rows_of([iter(loader) for loader in first], batches)
    states = [json.loads(json.dumps(loader.state_dict())) for loader in first]
    assert states == states[:1] * len(states)
    second = loaders(*after)
    for loader in second:
        loader.load_state_dict(states[0])
    rest = [] if states[0]["epoch"] else rows_of([iter(loader) for loader in second])
    assert done + rest == everything


class Again:
    """Documents that can be gone through, and no more."""

    def __init__(self, documents: list[Any]) -> None:
        self._documents = documents

    def __iter__(self) -> Iterator[Any]:
        return iter(self._documents)


def test_epochs_follow_one_another_in_orders_of_their_own() -> None:
    """One iteration is one epoch; every epoch has all documents, in an order that the seed decides."""
    documents = numbered([4] * 20)
    loader, same = (PackedLoader(documents, 8, (0, 1), shuffle=True, drop_last=True) for _ in range(2))
    epochs = [[batch["input_ids"].tolist() for batch in loader] for _ in range(3)]
    assert all(sorted(np.ravel(epoch)) == sorted(np.concatenate(documents)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and loader.state_dict()["epoch"] == loader.epoch == 3
    assert [[batch["input_ids"].tolist() for batch in same] for _ in range(3)] == epochs
    for epoch, batches in enumerate(epochs):
        planned = [[int(token) for piece in row for token in documents[piece.document]] for row in same.plan(epoch)]
        assert planned == [row for (row,) in batches]
    same.load_state_dict({**same.state_dict(), "epoch": 2, "rows_done": 1})
    assert [batch["input_ids"].tolist() for batch in same] == epochs[2][1:] and same.epoch == 3
    other = PackedLoader(documents, 8, (0, 1), shuffle=True, seed=1, drop_last=True)
    assert [batch["input_ids"].tolist() for batch in other] != epochs[0]


def test_the_end_of_an_epoch_is_padded_or_left_out_and_reported() -> None:
    """Every data rank gets equally many batches: what is lacking is padding without a target, or nothing at all."""
    documents = numbered([10, 10, 10, 10, 7])  # five rows of 10, the last of them with room for 3
    for ranks in (1, 2, 4):
        padded = [PackedLoader(documents, 10, (0, 1), (rank, ranks), pad_token=PAD) for rank in range(ranks)]
        batches = [list(loader) for loader in padded]
        assert {len(each) for each in batches} == {loader.batches() for loader in padded} == {-(-5 // ranks)}
        assert {round(loader.fill * 10 * ranks * len(batches[0])) for loader in padded} == {47}
        assert {loader.dropped_tokens for loader in padded} == {0}
    for ranks, dropped in ((1, 7), (2, 7), (3, 17), (4, 7)):
        short = [PackedLoader(documents, 10, (0, 1), (rank, ranks), drop_last=True) for rank in range(ranks)]
        assert {len(list(loader)) for loader in short} == {loader.batches() for loader in short} == {4 // ranks}
        assert {loader.dropped_tokens for loader in short} == {dropped} and {loader.fill for loader in short} == {1.0}


class Counted:
    """Documents that remember what was read of them."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.reads = lengths, list[tuple[int, int, int]]()
        self._documents = numbered(lengths)

    def read(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        self.reads.append((document, start, stop))
        tokens = self._documents[document][start:stop]
        return tokens, tokens


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
def test_a_rank_reads_its_own_tokens_and_one_more_at_each_edge(layout: str) -> None:
    """Sharing a row over twice the ranks halves what each of them reads; other rows are not touched at all."""
    lengths = [300, 50, 700, 20, 30, 900, 100, 400, 60, 40]
    for ranks in (1, 4):
        for rank in range(ranks):
            source = Counted(lengths)
            for batch in PackedLoader(source, 600, (rank, ranks), (1, 2), layout=layout, drop_last=True):
                read = sum(stop - start for _, start, stop in source.reads)
                held = batch["sharding"].local_length
                assert held <= read <= held + len(source.reads) and held == 600 // ranks
                kept = set(batch["input_ids"].flatten().tolist())
                here = numbered(lengths)
                assert all(kept & set(here[document][start:stop].tolist()) for document, start, stop in source.reads)
                source.reads.clear()


def test_stripes_are_read_over() -> None:
    """Every fourth token of a file is not four thousand reads; other rows are still left alone."""
    source = Counted([4000, 4000, 200])
    loader = PackedLoader(source, 4000, (1, 4), (0, 2), layout="striped", drop_last=True)
    next(iter(loader))
    assert source.reads == [(0, 1, 3999)]


def test_workers_read_ahead_in_the_same_order() -> None:
    """The state counts what was yielded, not what workers have read by then."""
    documents = [token.astype(np.uint16) for token in numbered([5, 9, 30, 12, 40, 8])]
    choices: dict[str, Any] = dict(layout="zigzag", shuffle=True, pad_token=0)
    plain = list(PackedLoader(documents, 16, (1, 2), **choices))
    ahead = PackedLoader(documents, 16, (1, 2), workers=2, **choices)
    before = torch.get_rng_state()
    for count, (batch, expected) in enumerate(zip(ahead, plain, strict=True)):
        assert all(torch.equal(batch[name], expected[name]) for name in ("input_ids", "position_ids", "shift_labels"))
        assert batch["sharding"] == expected["sharding"] and ahead.state_dict()["rows_done"] == count + 1
    assert torch.equal(torch.get_rng_state(), before)  # ranks draw the same numbers, with workers and without


def test_a_dataloader_around_it_works_without_workers_and_refuses_them() -> None:
    """A worker process has no process group to make a sharding of."""
    loader = PackedLoader(numbered([8, 8]), 8, (0, 1), drop_last=True)
    assert len(list(torch.utils.data.DataLoader(loader, batch_size=None))) == 2
    with pytest.raises(ValueError, match=r"say PackedLoader\(\.\.\., workers=2\)"):
        list(torch.utils.data.DataLoader(loader, batch_size=None, num_workers=1))


def test_a_batch_has_the_mask_the_route_and_the_device_that_were_asked_for() -> None:
    """A window that got lost on the way would be trained without a word."""
    choices: dict[str, Any] = dict(mask=rf.causal & rf.window(2, 0), layout="striped", route="gather")
    (batch,) = PackedLoader(numbered([5, 3]), 8, (1, 2), drop_last=True, device="meta", **choices)
    assert batch["sharding"] == rf.Sharding(8, (1, 2), choices.pop("mask") & rf.documents([0, 5, 8]), **choices)
    assert {x.device.type for x in batch.values() if isinstance(x, Tensor)} == {"meta"}


@pytest.fixture
def eight_processes() -> Iterator[None]:
    """This process as rank 5 of 8 that do not exist: enough to make meshes, and to read."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield
    dist.destroy_process_group()


def test_the_axes_of_a_mesh_say_who_reads_what(eight_processes: None) -> None:
    """Rank 5 of 2 x 4 is data rank 1 and context rank 1; an axis for heads stands inside the others."""
    documents, choices = numbered([40, 30, 50, 20]), dict[str, Any](layout="zigzag", pad_token=PAD)
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "context"))
    cube = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("data", "ring", "heads"))
    for loader, plain in (
        (
            PackedLoader(documents, 32, mesh["context"], mesh["data"], **choices),
            PackedLoader(documents, 32, (1, 4), (1, 2), **choices),
        ),
        (
            PackedLoader(documents, 32, cube["ring", "heads"], cube["data"], heads_axis="heads", **choices),
            PackedLoader(documents, 32, (1, 4), (1, 2), heads_axis=2, **choices),
        ),
        (PackedLoader(documents, 32, rows=2, **choices), PackedLoader(documents, 32, (5, 8), rows=2, **choices)),
    ):
        for batch, expected in zip(loader, plain, strict=True):
            assert torch.equal(batch["input_ids"], expected["input_ids"])
            assert batch["sharding"].rank == expected["sharding"].rank
            assert torch.equal(batch["sharding"].positions, expected["sharding"].positions)
    with pytest.raises(ValueError, match="group has 4 of 8 ranks, and data is not given"):
        PackedLoader(documents, 32, mesh["context"], **choices)
    with pytest.raises(ValueError, match=r"group and data share ranks \[1, 5\]"):
        PackedLoader(documents, 32, mesh["data"], mesh["data"], **choices)
    with pytest.raises(ValueError, match=r"group and data share ranks \[5, 7\]"):
        PackedLoader(documents, 32, cube["ring", "heads"], cube["ring"], heads_axis="heads", **choices)
    with pytest.raises(ValueError, match="group has 2 of 8"):
        PackedLoader(documents, 32, mesh["data"], **choices)
    with pytest.raises(ValueError, match="4 data ranks times 4 ranks of group are more than the 8 that there are"):
        PackedLoader(documents, 32, mesh["context"], (1, 4), **choices)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(17, 16)
        self.attention = rf.RingAttention(16, heads=4, kv_heads=2)
        self.head = nn.Linear(16, 17)
        self.double()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.attention(x, position_ids))


DOCUMENTS = [np.random.RandomState(n).randint(0, 17, n) for n in (5, 9, 1, 30, 12, 3, 14, 22)]


def gradients(group: Any, batches: Any, **placed: Any) -> tuple[Tensor, list[Tensor]]:
    """Losses and raw summed gradients of a model in that group."""
    model = rf.SequenceParallel(Model(), group, **placed)
    losses = [model(**batch).loss for batch in batches]
    sum(losses).backward()  # type: ignore[union-attr]
    return torch.stack(losses).detach(), [
        parameter.grad for parameter in model.parameters() if parameter.grad is not None
    ]


@pytest.mark.parametrize(("layout", "rows"), [*((layout, 1) for layout in LAYOUTS), ("auto", 2), ("zigzag", 2)])
def test_a_model_trains_on_any_number_of_ranks_as_on_one(layout: str, rows: int) -> None:
    """Loss and raw gradients, through batches that hold this rank's part already; no rank saw a whole row."""

    def one_rank(group: Any) -> tuple[Tensor, list[Tensor]]:
        return gradients(group, PackedLoader(DOCUMENTS, 24, group, layout=layout, rows=rows, pad_token=0, fit="best"))

    (loss, grads), *_ = rf.local_world(1).run(one_rank)
    for other, other_grads in rf.local_world(3).run(one_rank):
        assert torch.allclose(other, loss, rtol=1e-12, atol=0)
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(other_grads, grads, strict=True))


def test_ranks_that_share_heads_read_neighbouring_tokens() -> None:
    """Two ranks to a shard (Ulysses), and rings of two: the loss of one rank."""

    def one_rank(group: Any, degree: int) -> Tensor:
        loader = PackedLoader(DOCUMENTS, 24, group, layout="zigzag", heads_axis=degree, pad_token=0)
        return gradients(group, loader, heads_axis=degree)[0]

    expected = rf.local_world(1).run(one_rank, 1)[0]
    assert all(torch.allclose(loss, expected, rtol=1e-12) for loss in rf.local_world(4).run(one_rank, 2))


def test_a_packed_batch_trains_as_its_documents_alone() -> None:
    """The loss of a row is that of plain causal attention in each document: packing changes nothing."""
    batches = list(PackedLoader(DOCUMENTS, 96, (0, 1), pad_token=0))
    assert len(batches) == 1
    loss, grads = gradients((0, 1), batches)
    model = Model()
    targets = sum(len(document) - 1 for document in DOCUMENTS)
    total = sum(
        nn.functional.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="sum")
        for ids in map(torch.from_numpy, DOCUMENTS)
        if len(ids) > 1
    )
    (total / targets).backward()  # type: ignore[union-attr]
    assert torch.allclose(loss[0], total.detach() / targets)  # type: ignore[union-attr]
    assert all(torch.allclose(a, p.grad, atol=1e-12) for a, p in zip(grads, model.parameters(), strict=True))  # type: ignore[arg-type]


def test_the_collator_and_the_loader_agree() -> None:
    """Whole rows with a mask, sharded by the wrapper, train as parts of rows that were read apart."""
    whole_row = rf.data.PackingCollator(96, 0, mask=rf.causal)(DOCUMENTS)

    def one_rank(group: Any) -> tuple[Tensor, Tensor]:
        loaded = gradients(group, PackedLoader(DOCUMENTS, 96, group, pad_token=0))[0]
        return loaded, gradients(group, [whole_row])[0]

    for loaded, collated in rf.local_world(2).run(one_rank):
        assert torch.allclose(loaded, collated, rtol=1e-12, atol=0)


def test_tokens_of_a_file_are_those_of_a_list(tmp_path: Any) -> None:
    """A memory-mapped file with labels of its own, documents by offsets."""
    documents = numbered([5, 9, 30, 12])
    joined = np.concatenate(documents).astype(np.uint16)
    labels = np.where(joined % 3 == 0, -100, joined.astype(np.int32))
    joined.tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", np.uint16, "r")
    source = Tokens(mapped, np.cumsum([0, 5, 9, 30, 12]), labels)
    pairs = zip(parts(source, 8, 2, pad_token=0), parts(documents, 8, 2, pad_token=0), strict=True)  # type: ignore[arg-type]
    for from_file, from_list in pairs:
        for a, b in zip(from_file, from_list, strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"])
            assert torch.equal(a["shift_labels"], torch.where(b["shift_labels"] % 3 == 0, -100, b["shift_labels"]))
