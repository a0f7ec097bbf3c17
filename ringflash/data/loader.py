"""A loader of packed documents, of which each rank reads its own part.

Two axes of a mesh divide the work. Ranks of ``data`` get different rows; ranks of ``group`` share a row, and each reads the
tokens that its sharding gives it, and one more where the target of its last token is another rank's. With 2 x 2 ranks:

    rows      0        1        2        3        4        5       ...      one order, on any number of ranks
    batch     |------- 0 -------|------- 1 -------|------- 2 ---
    data      rank 0   rank 1   rank 0   rank 1
    group     0110     0110     0110     0110                               zigzag: who reads which quarter of a row

What a rank reads is decided by planning alone, from lengths (``packing.py``). So the place in the data is two numbers, the
epoch and how many rows of it are done, and means the same on any grid.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ringflash.accord import tell
from ringflash.data.documents import Stream, find
from ringflash.data.packing import Fit, Overflow, Row, number, pack, used
from ringflash.data.reader import Parts, Reader, narrowed
from ringflash.groups import Group, address, processes, resolve, resolve_axes
from ringflash.layout import Layout
from ringflash.mask import Mask, causal
from ringflash.route import Route
from ringflash.shard import Sharding


class _Step(NamedTuple):
    """One batch of all data ranks."""

    mine: tuple[Row, ...]  # the rows of this data rank
    done: int  # rows of the epoch that are done after it
    tokens: int  # in the rows of all of them


class PackedLoader(IterableDataset[dict[str, Any]]):
    """Batches of packed documents, ready for ``model(**batch)`` of ``rf.SequenceParallel``: this rank's part of them.

    A batch is ``dict(input_ids, position_ids, shift_labels, sharding)``: int64 ``[rows, sharding.local_length]`` and a
    ``Sharding`` of ``length`` positions over ``group``, under ``mask & documents(...)``. Positions begin anew with each piece
    of a document. The label of a position is the next token of its document, even if that is in another row; -100 after the
    last one, and in padding.

    ``documents``: a Hugging Face dataset with a column ``input_ids`` (and ``labels``), a list of token arrays, ``Tokens``,
    your own ``Documents``, or anything that can be iterated, which every rank then goes through whole, in the same order.
    ``lengths``: numbers of tokens, where only reading would tell. ``data``: an axis of a mesh, or (rank, ranks), whose ranks
    get different rows. ``rows``: so many to a batch, for each of them. ``fit``, ``overflow``, ``open_rows``: see :func:`pack`.

    ``pad_token`` fills rows that documents leave unfilled, and rows that the last batch of an epoch lacks. ``drop_last``
    leaves out what would be in that batch, and without ``pad_token`` an epoch's last row, if it is not full.
    ``shuffle``: each epoch in another order, by ``seed``. ``workers``: processes that read ahead. ``device``: of the tensors.

    One iteration is one epoch, or what is left of it behind the last batch that was yielded; the next one is the next epoch.
    Every rank is given the same documents, and does the same with its loader.
    """

    dropped_tokens: int
    """Tokens that were left out so far, of all ranks: those that ``drop_last`` allows."""

    def __init__(
        self,
        documents: Any,
        length: int,
        group: Group = None,
        data: Group = None,
        *,
        rows: int = 1,
        mask: Mask = causal,
        layout: str | Layout = "auto",
        route: str | Route = "auto",
        heads_axis: str | int | None = None,
        lengths: Any = None,
        fit: Fit = "cut",
        overflow: Overflow = "split",
        open_rows: int = 16,
        pad_token: int | None = None,
        drop_last: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        length, rows = number(length, "PackedLoader: length", 1), number(rows, "PackedLoader: rows", 1)
        workers, seed = number(workers, "PackedLoader: workers", 0), number(seed, "PackedLoader: seed", 0)
        open_rows = number(open_rows, "PackedLoader: open_rows", 1)
        pad_token = None if pad_token is None else number(pad_token, "PackedLoader: pad_token", least=0)
        pack((), length, fit, overflow, open_rows)  # refuses what it cannot do
        self._group, self._data, degree = _grid(group, data, heads_axis)
        self._length, self._rows, self._mask, self._layout, self._route = length, rows, mask, layout, route
        self._packing: dict[str, Any] = dict(length=length, fit=fit, overflow=overflow, open_rows=open_rows)
        self._shuffle, self._seed, self._pad_token, self._drop_last = shuffle, seed, pad_token, drop_last
        self._workers, self._device = workers, device
        self._source = find(documents, lengths)
        self._refuse()
        where = address(self._group)
        self._reader = Reader(self._source, length, pad_token or 0, where, mask, layout, degree)
        self._sharding(((),) * rows)  # refuses what does not fit together
        self._epoch = self._done = self._tokens = self._positions = self.dropped_tokens = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if get_worker_info() is not None:
            raise ValueError(
                "PackedLoader: it runs in a worker of a DataLoader, which has no process group; iterate over it directly, and "
                "say PackedLoader(..., workers=2) for processes that read ahead"
            )
        began, planned = self._done, deque[_Step]()

        def wanted() -> Iterator[tuple[Row, ...]]:
            for step in self._steps():
                planned.append(step)
                yield step.mine

        for parts in self._told(self._read(wanted())):
            step = planned.popleft()
            self._done = step.done
            self._tokens += step.tokens
            self._positions += self._length * self._rows * self._data[1]
            yield self._batch(step.mine, parts)
        if self._done == began == 0:
            raise ValueError(
                f"PackedLoader: the documents do not fill one batch, {self._rows} x {self._length} tokens for each of "
                f"{self._data[1]} data ranks; pass pad_token without drop_last, more documents, or a smaller length"
            )
        self._epoch, self._done = self._epoch + 1, 0

    def _told(self, read: Iterator[Any]) -> Iterator[Any]:
        """What is read; where this rank cannot read on, the others learn why it does not come to their next call."""
        try:
            yield from read
        except Exception as error:
            tell(self._group, error)
            raise

    @property
    def epoch(self) -> int:
        """The epoch that the next batch is of, from 0; while the last batch of one is in use, still that one."""
        return self._epoch

    @property
    def fill(self) -> float:
        """Share of the positions of all ranks' batches so far that hold a token, not padding; 1.0 before the first."""
        return self._tokens / self._positions if self._positions else 1.0

    def plan(self, epoch: int = 0) -> Iterator[Row]:
        """The rows of an epoch in order, as pieces of documents. Reads no tokens; a stream has no plan before it is read."""
        if isinstance(self._source, Stream):
            raise ValueError(
                "PackedLoader: documents can only be iterated; their rows, and how many there are, show when they are yielded"
            )
        return pack(self._order(epoch), **self._packing)

    def batches(self, epoch: int = 0) -> int:
        """Number of batches of a whole epoch, equal on all ranks. Plans the epoch for it; a stream cannot tell."""
        rows = sum(used(row) == self._length or self._pad_token is not None for row in self.plan(epoch))
        share = self._rows * self._data[1]
        return rows // share if self._drop_last else -(-rows // share)

    def state_dict(self) -> dict[str, Any]:
        """Where to go on: behind the last batch that was yielded. Plain values, the same on all ranks."""
        return {"epoch": self._epoch, "rows_done": self._done, "order": self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there, on any number of ranks. Raises ``ValueError`` if that was another order of rows, or no place in it.

        That an epoch has so many rows shows when they are planned: when the loader is iterated.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("order", {}), Mapping):
            raise TypeError(f"PackedLoader: the state is {state!r:.80}; what state_dict() returned is needed")
        mine, order = self._identity, state.get("order", {})
        other = [name for name in mine if order.get(name) != mine[name]]
        if other:
            was = ", ".join(f"{name}={order.get(name)!r} (now {mine[name]!r})" for name in other)
            raise ValueError(
                f"PackedLoader: the state is of rows in another order, with {was}; it cannot go on in this one"
            )
        epoch, done = (
            number(state.get(name), f"PackedLoader: {name} of the state", 0) for name in ("epoch", "rows_done")
        )
        self._epoch, self._done = epoch, done

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What the order of rows depends on."""
        lengths = np.array([] if isinstance(self._source, Stream) else self._source.lengths, dtype=np.int64)
        digest = hashlib.sha256(lengths.tobytes()).hexdigest()[:16]
        documents = "stream" if isinstance(self._source, Stream) else f"{len(lengths)} documents, {digest}"
        return {**self._packing, "shuffle": self._shuffle, "seed": self._seed, "documents": documents}

    def _order(self, epoch: int) -> Iterator[tuple[int, int]]:
        """Documents in the order of an epoch, and their lengths."""
        if isinstance(self._source, Stream):
            yield from self._source.go_through(epoch)
            return
        lengths = np.asarray(self._source.lengths)
        order = _random_state(self._seed, epoch).permutation(len(lengths)) if self._shuffle else np.arange(len(lengths))
        for some in np.array_split(order, len(order) // 65536 + 1):  # numbers of Python, not all of them at once
            yield from zip(some.tolist(), lengths[some].tolist(), strict=True)

    def _kept(self) -> Iterator[Row]:
        """The rows of this epoch that become part of a batch."""
        for row in pack(self._order(self._epoch), **self._packing):
            if used(row) == self._length or self._pad_token is not None:
                yield row
            else:
                self.dropped_tokens += used(row)

    def _steps(self) -> Iterator[_Step]:
        """The batches of this epoch, from the first row on that is not done."""
        first, ranks = self._data[0] * self._rows, self._data[1]
        rows, done, passed = self._kept(), self._done, 0
        for row in islice(rows, done):
            self._release(row)
            passed += 1
        if passed < done:
            raise ValueError(
                f"PackedLoader: the state says that {done} rows of epoch {self._epoch} are done, and it has {passed}; it is "
                "damaged, or of other documents"
            )
        while True:
            mine, count, tokens = [], 0, 0
            for place, row in enumerate(islice(rows, self._rows * ranks)):
                if first <= place < first + self._rows:
                    mine.append(row)
                else:
                    self._release(row)
                count, tokens = count + 1, tokens + used(row)
            if count < self._rows * ranks and (count == 0 or self._drop_last):
                self.dropped_tokens += tokens
                return
            done += count
            yield _Step((*mine, *((),) * (self._rows - len(mine))), done, tokens)
            for row in mine:
                self._release(row)

    def _release(self, row: Row) -> None:
        if isinstance(self._source, Stream):
            self._source.release(row)

    def _read(self, wanted: Iterable[tuple[Row, ...]]) -> Iterator[Parts]:
        if self._workers == 0:
            return map(self._reader.__getitem__, wanted)
        ahead = dict(num_workers=self._workers, generator=torch.Generator())  # nothing is drawn from the common one
        return iter(DataLoader(self._reader, batch_size=None, sampler=wanted, collate_fn=_as_it_is, **ahead))  # type: ignore[arg-type]

    def _batch(self, rows: tuple[Row, ...], parts: Parts) -> dict[str, Any]:
        names = ("input_ids", "position_ids", "shift_labels")
        batch: dict[str, Any] = {name: part.to(self._device) for name, part in zip(names, parts, strict=True)}
        return batch | {"sharding": self._sharding(rows)}

    def _sharding(self, rows: tuple[Row, ...]) -> Sharding:
        mask = narrowed(self._mask, rows, self._length)
        degree = self._reader.heads_degree
        return Sharding(self._length, self._group, mask, self._layout, self._route, heads_axis=degree)

    def _refuse(self) -> None:
        """Refuse what no loader can be asked for."""
        if not isinstance(self._mask, Mask):
            raise TypeError(f"PackedLoader: mask is {self._mask!r}; a mask is a value such as rf.causal")
        if self._pad_token is None and (self._packing["fit"] != "cut" or not self._drop_last):
            raise ValueError(
                "PackedLoader: rows may have room left; pass pad_token=, the token that fills it"
                + (", or drop_last=True to leave out an epoch's last tokens" if self._packing["fit"] == "cut" else "")
            )
        if self._layout == "balanced" and self._rows > 1:
            raise ValueError(
                f"PackedLoader: layout is 'balanced' and rows is {self._rows}; documents of one row are dealt out: make rows "
                "longer, or choose another layout"
            )
        if isinstance(self._source, Stream) and (self._shuffle or self._workers):
            raise ValueError(
                "PackedLoader: documents can only be iterated; shuffle and read ahead in the stream itself, and leave out "
                "shuffle= and workers="
            )


def _grid(group: Group, data: Group, heads_axis: str | int | None) -> tuple[Group, tuple[int, int], int]:
    """The resolved group, the rank and ranks of ``data``, and the heads degree."""
    group, degree = resolve_axes(group, heads_axis)
    ranks = address(group)[1]
    others = (0, 1) if data is None else resolve(data)
    among = address(others)
    if not isinstance(group, tuple) and not hasattr(group, "wire"):
        everyone = address(resolve(None))[1]
        if data is None and ranks < everyone:
            raise ValueError(
                f"PackedLoader: group has {ranks} of {everyone} ranks, and data is not given; say which ranks get other rows: "
                "data=mesh['data'], or data=(0, 1) if all others compute on the same"
            )
        both = {*processes(group)} & {*processes(others)}
        if len(both) > 1:
            raise ValueError(
                f"PackedLoader: group and data share ranks {sorted(both)}; ranks of group share a row, and those of data get "
                "different ones: pass two axes of a mesh, group=mesh['context'], data=mesh['data']"
            )
        if ranks * among[1] > everyone:
            raise ValueError(
                f"PackedLoader: {among[1]} data ranks times {ranks} ranks of group are more than the {everyone} that there are"
            )
    return group, among, degree


def _random_state(*key: int) -> np.random.RandomState:
    """A generator that is a pure function of the key, everywhere (numpy froze the streams of this class)."""
    digest = hashlib.sha256(repr(("packed documents", *key)).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4").astype(np.uint32))


def _as_it_is(parts: Parts) -> Parts:
    return parts
