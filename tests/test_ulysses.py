"""Heads for positions and back: nothing lost, nothing twice, nothing sent that is not needed; and shardings on two axes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import ringflash as rf
from ringflash.groups import address, nodes, resolve, resolve_axes
from ringflash.layout import LAYOUTS
from ringflash.ulysses import Swap, head_share
from ringflash.wire import Crossing, Message, Pending, Slice

CPU = torch.device("cpu")


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def shared_heads(draw: st.DrawFn, most_ranks: int = 30) -> tuple[int, int, int]:
    """Query heads, key heads, and a degree that divides the former."""
    kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 9))
    heads = kv_heads * group
    return heads, kv_heads, draw(st.sampled_from([d for d in divisors(heads) if d <= most_ranks]))


@given(shared_heads())
def test_every_query_head_is_on_one_rank_and_meets_its_own_key_head(problem: tuple[int, int, int]) -> None:
    """A query head on the wrong block, or beside another key head, would be silently wrong."""
    heads, kv_heads, degree = problem
    shares = [head_share(heads, kv_heads, degree, rank) for rank in range(degree)]
    assert [q for share in shares for q in range(heads)[share.queries]] == list(range(heads))
    for share in shares:
        mine = range(heads)[share.queries]
        served = len(mine) // len(share.keys)
        assert served * len(share.keys) == len(mine)
        assert [share.keys[i // served] for i in range(len(mine))] == [q // (heads // kv_heads) for q in mine]


@given(shared_heads())
def test_key_heads_are_copied_no_more_than_needed(problem: tuple[int, int, int]) -> None:
    """The fewest key heads for which groups of one size fit on every rank, found by trying them all."""
    heads, kv_heads, degree = problem
    block, group = heads // degree, heads // kv_heads

    def fits(served: int) -> bool:
        return all(q // group == (q + served - 1) // group for q in range(0, heads, served))

    fewest = min(block // served for served in divisors(block) if fits(served))
    assert {len(head_share(heads, kv_heads, degree, rank).keys) for rank in range(degree)} == {fewest}
    if kv_heads % degree == 0:  # nothing is cut, so nothing is copied
        assert fewest == kv_heads // degree


@pytest.mark.parametrize(
    ("heads", "degree", "ranks", "named"),
    [
        (28, 8, 8, r"1 \(in rings of 8\), 2 \(in rings of 4\), 4 \(in rings of 2\)$"),
        (28, 8, 56, r"1 \(in rings of 56\), 2 .*, 4 .*, 7 .*, 14 .*, 28 \(in rings of 2\)$"),
        (3, 2, 4, r"1 \(in rings of 4\)$"),
    ],
)
def test_heads_that_cannot_be_shared_name_the_degrees_that_can(heads: int, degree: int, ranks: int, named: str) -> None:
    """28 heads on 8 ranks are common; the message says how to mix Ulysses with a ring there."""
    with pytest.raises(ValueError, match=f"heads_axis is {degree}: .* cannot share {heads} query heads .*: {named}"):
        head_share(heads, 1, degree, 0, ranks)


class Counted:
    """A wire that counts what is sent."""

    def __init__(self, wire: Any) -> None:
        self.rank, self.ranks, self._wire = wire.rank, wire.ranks, wire
        self.sent: list[dict[int, int]] = []

    def warm_up(self, device: torch.device, channels: int = 1) -> None:
        self._wire.warm_up(device, channels)

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], channel: int = 0, about: object = ""
    ) -> Pending:
        self.sent.append({peer: buffer.nbytes for peer, buffer in sends})
        return self._wire.exchange(sends, receives, channel, about)


def owned(tensors: Sequence[Tensor]) -> bool:
    """Contiguous, and each alone in its memory."""
    alone = len({x.untyped_storage().data_ptr() for x in tensors if x.numel()}) == sum(x.numel() > 0 for x in tensors)
    return alone and all(x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes for x in tensors)


@st.composite
def swaps(draw: st.DrawFn) -> tuple[tuple[int, int, int], list[int], list[int]]:
    """Heads, key heads and degree, and how many query and key tokens each rank holds, which may be none."""
    heads, kv_heads, degree = draw(shared_heads(most_ranks=8))
    held = st.lists(st.integers(0, 4), min_size=degree, max_size=degree)
    return (heads, kv_heads, degree), draw(held), draw(held)


@settings(max_examples=40, deadline=None)
@given(swaps(), st.integers(0, 2**31))
def test_pool_gives_each_rank_its_heads_and_spread_gives_them_back(
    problem: tuple[tuple[int, int, int], list[int], list[int]], seed: int
) -> None:
    """On 1 to 8 ranks with uneven and empty parts, several tensors of several dtypes and dims, in one exchange each."""
    (heads, kv_heads, degree), query_tokens, key_tokens = problem
    make = torch.Generator().manual_seed(seed)

    def whole(tokens: int, count: int, *rest: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randint(-9, 9, (2, tokens, count, *rest), generator=make).to(dtype)

    queries = [
        whole(sum(query_tokens), heads, 5),
        whole(sum(query_tokens), heads),  # as lse and delta come
        whole(sum(query_tokens), heads, 3, dtype=torch.bfloat16),
    ]
    keys = [whole(sum(key_tokens), kv_heads, 5), whole(sum(key_tokens), kv_heads, 2, dtype=torch.float32)]

    def part(x: Tensor, tokens: list[int], rank: int) -> Tensor:
        mine = x.split(tokens, dim=1)[rank]
        return mine.transpose(0, 1).contiguous().transpose(0, 1)  # tokens before batch: any strides will do

    def one_rank(group: Any) -> None:
        wire = Counted(group.wire)
        swap = Swap(wire, tuple(query_tokens), tuple(key_tokens))
        share = swap.share(heads, kv_heads)
        mine = [part(x, query_tokens, group.rank) for x in queries], [part(x, key_tokens, group.rank) for x in keys]
        pooled = swap.pool(*mine)
        for x, got in zip(queries, pooled[0], strict=True):
            assert got.dtype == x.dtype and torch.equal(got, x[:, :, share.queries])
        for x, got in zip(keys, pooled[1], strict=True):
            assert got.dtype == x.dtype and torch.equal(got, x[:, :, list(share.keys)])
        back = swap.spread(*pooled, heads, kv_heads)
        everybody = [key for rank in range(degree) for key in head_share(heads, kv_heads, degree, rank).keys]
        times = torch.tensor([everybody.count(key) for key in range(kv_heads)])  # small integers: sums are exact
        for x, got in zip(mine[0], back[0], strict=True):
            assert got.dtype == x.dtype and torch.equal(got, x)
        for x, got in zip(mine[1], back[1], strict=True):
            assert got.dtype == x.dtype and torch.equal(got, x * times.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 3)))
        assert owned([*pooled[0], *pooled[1]]) and owned([*back[0], *back[1]])
        assert len(wire.sent) == 2 and all(group.rank not in sent for sent in wire.sent)

    rf.local_world(degree).run(one_rank)


@pytest.mark.parametrize(("heads", "kv_heads", "degree"), [(8, 8, 4), (8, 2, 4), (8, 1, 4), (12, 2, 4), (28, 4, 7)])
def test_only_the_key_heads_that_a_rank_needs_are_sent(heads: int, kv_heads: int, degree: int) -> None:
    """Never expanded on the wire: each key head goes to a rank once, however often that rank will have it."""
    tokens, head_dim = 3, 16

    def one_rank(group: Any) -> list[dict[int, int]]:
        wire = Counted(group.wire)
        swap = Swap(wire, (tokens,) * degree, (tokens,) * degree)
        q, k = (torch.zeros(1, tokens, n, head_dim) for n in (heads, kv_heads))
        swap.spread(*swap.pool([q], [k]), heads, kv_heads)
        return wire.sent

    def size(some: Any) -> int:
        return tokens * (heads // degree + len(set(some.keys))) * head_dim * 4

    shares = [head_share(heads, kv_heads, degree, rank) for rank in range(degree)]
    for rank, (pooling, spreading) in enumerate(rf.local_world(degree).run(one_rank)):
        others = [peer for peer in range(degree) if peer != rank]
        assert pooling == {peer: size(shares[peer]) for peer in others}
        assert spreading == {peer: size(shares[rank]) for peer in others}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("heads", "kv_heads", "degree"), [(8, 2, 8), (8, 1, 4), (12, 2, 4), (28, 4, 7)])
def test_gradients_of_copies_are_summed_in_the_order_of_the_ranks(
    heads: int, kv_heads: int, degree: int, dtype: torch.dtype
) -> None:
    """In the dtype they come in, bit for bit the same every time, also where float sums depend on their order."""
    tokens = tuple(range(1, degree + 1))
    make = torch.Generator().manual_seed(heads)
    shares = [head_share(heads, kv_heads, degree, rank) for rank in range(degree)]
    gradients = [torch.randn(1, sum(tokens), len(x.keys), 4, generator=make).to(dtype) for x in shares]

    def one_rank(group: Any) -> Tensor:
        swap = Swap(group.wire, tokens, tokens)
        _, (total,) = swap.spread((), [gradients[group.rank]], heads, kv_heads)
        return total

    expected = torch.zeros(1, sum(tokens), kv_heads, 4, dtype=dtype)
    for share, gradient in zip(shares, gradients, strict=True):
        for key in dict.fromkeys(share.keys):
            expected[:, :, key] += gradient[:, :, [i for i, one in enumerate(share.keys) if one == key]].sum(dim=2)
    got = rf.local_world(degree).run(one_rank)
    assert torch.equal(torch.cat(got, dim=1), expected)
    assert all(torch.equal(a, b) for a, b in zip(got, rf.local_world(degree).run(one_rank), strict=True))


def test_a_slice_numbers_its_members_anew() -> None:
    """Rows and columns of a grid of 2 x 3 ranks on one wire do not hear each other, on any channel."""

    def one_rank(group: Any) -> tuple[list[float], list[float]]:
        row, column = divmod(group.rank, 3)
        axes = Slice(group.wire, range(3 * row, 3 * row + 3)), Slice(group.wire, range(column, 6, 3))
        assert [(axis.rank, axis.ranks) for axis in axes] == [(column, 3), (row, 2)]
        heard = []
        for axis in axes:
            axis.warm_up(CPU, channels=2)
            into = [torch.zeros(1) for _ in range(2)]
            right, left = (axis.rank + 1) % axis.ranks, (axis.rank - 1) % axis.ranks
            channels = (0, 1) if axis.rank else (1, 0)  # in another order than the neighbour
            sent = {c: torch.tensor([group.rank + 0.5 * c]) for c in channels}
            pending = [axis.exchange([(right, sent[c])], [(left, into[c])], c) for c in channels]
            for batch in pending:
                batch.wait()
            heard.append([x.item() for x in into])
        return heard[0], heard[1]

    for rank, (in_row, in_column) in enumerate(rf.local_world(6).run(one_rank)):
        left, above = rank // 3 * 3 + (rank - 1) % 3, (rank + 3) % 6
        assert in_row == [left, left + 0.5] and in_column == [above, above + 0.5]


class Part:
    """Some members of a world with collectives of their own: what a group of one axis of a mesh is."""

    def __init__(self, whole: Any, members: Sequence[int]) -> None:
        self.rank, self.ranks = members.index(whole.rank), len(members)
        self._whole, self._members = whole, members

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        everyone = self._whole.all_gather(tensor)
        return [everyone[member] for member in self._members]

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.copy_(sum(self.all_gather(tensor)))


def test_a_crossing_reaches_everybody_axis_by_axis() -> None:
    """On a mesh no group holds all ranks: they gather and sum along one axis, then the other, in the order of the grid."""

    def one_rank(group: Any) -> tuple[int, int, float, list[float]]:
        row, column = divmod(group.rank, 2)
        ring, heads = Part(group.wire, range(column, 6, 2)), Part(group.wire, range(2 * row, 2 * row + 2))
        everyone = Crossing(ring, heads)  # type: ignore[arg-type]
        total = torch.tensor([2.0**group.rank])
        everyone.all_reduce(total)
        gathered = everyone.all_gather(torch.tensor([float(group.rank)]))
        return everyone.rank, everyone.ranks, total.item(), [x.item() for x in gathered]

    assert rf.local_world(6).run(one_rank) == [(rank, 6, 63.0, [0, 1, 2, 3, 4, 5]) for rank in range(6)]


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, int, str]:
    """Length, ranks of a ring, degree, and a layout."""
    length = draw(st.integers(0, 50))
    return length, draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from(sorted(LAYOUTS)))


@settings(deadline=None)
@given(grids())
def test_rows_of_the_grid_hold_neighbouring_parts_of_one_shard(problem: tuple[int, int, int, str]) -> None:
    """The layout is the ring's, each of its shards cut evenly over a row; all ranks together hold everything once."""
    length, ring_ranks, degree, layout = problem
    shards = LAYOUTS[layout](length, ring_ranks)
    held: list[list[int]] = []
    swapped: list[tuple[int, ...]] = []
    for rank in range(ring_ranks * degree):
        s = rf.Sharding(length, (rank, ring_ranks * degree), layout=layout, heads_axis=degree)
        assert (s.rank, s.ranks, s.ring_rank, s.ring_ranks) == (
            rank, ring_ranks * degree, rank // degree, ring_ranks
        )  # fmt: skip
        assert (s.plan.rank, s.plan.queries, s.plan.keys) == (rank // degree, shards, shards)
        assert len(s.positions) == s.local_length == s.local_keys
        held.append(s.positions.tolist())
        plan, ring, swap, _ = s.bind(s.local_length, s.local_keys)
        assert (plan, ring.rank, ring.ranks) == (s.plan, s.ring_rank, ring_ranks)
        assert (swap is None) == (degree == 1)
        if swap:
            assert (swap.wire.rank, swap.wire.ranks) == (rank % degree, degree)
            assert swap.query_tokens == swap.key_tokens
            swapped.append(swap.query_tokens)
    for ring_rank in range(ring_ranks):
        row = held[ring_rank * degree : (ring_rank + 1) * degree]
        assert [p for part in row for p in part] == shards.positions(ring_rank).tolist()
        assert max(map(len, row)) - min(map(len, row)) <= 1
        assert set(swapped[ring_rank * degree : (ring_rank + 1) * degree]) <= {tuple(map(len, row))}
    assert sorted(p for part in held for p in part) == list(range(length))


def test_the_plans_of_a_grid_are_those_of_one_ring() -> None:
    """One for every shard, and they keep the laws; every column of the grid goes by the same ones."""
    s = rf.Sharding(41, (5, 12), rf.causal & rf.window(9, 0), "zigzag", heads_axis=3)
    alone = rf.Sharding(41, (1, 4), rf.causal & rf.window(9, 0), "zigzag")
    assert rf.plans(s) == rf.plans(alone) and s.plan == alone.plan
    assert rf.verify(rf.plans(s)).ranks == 4


@pytest.mark.parametrize("degree", [2, 3, 6])
@pytest.mark.parametrize("dim", [0, -1])
def test_unshard_after_shard_is_the_sequence_on_a_grid_too(degree: int, dim: int) -> None:
    """And differentiates as on one axis: the gradient of a position reaches its owner, from every rank once."""
    make = torch.Generator().manual_seed(degree)
    whole = torch.randn(17, 2, 17, generator=make, dtype=torch.float64)
    weights = torch.randn(6, 17, 2, 17, generator=make, dtype=torch.float64)

    def one_rank(group: Any) -> tuple[Tensor, Tensor, Tensor]:
        s = rf.Sharding(17, group, layout="zigzag", heads_axis=degree)
        x = whole.clone().requires_grad_()
        back = s.unshard(s.shard(x, dim), dim)
        return back.detach(), torch.autograd.grad((back * weights[group.rank]).sum(), x)[0], s.positions

    for back, grad, positions in rf.local_world(6).run(one_rank):
        expected = torch.zeros_like(whole).index_copy(dim, positions, weights.sum(0).index_select(dim, positions))
        assert torch.equal(back, whole)
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-13)


def test_keys_of_another_length_are_cut_over_the_rows_like_queries() -> None:
    """What a swap knows of the others is what they hold."""
    row = [rf.Sharding(21, (rank, 6), keys=10, q_offset=-11, heads_axis=3) for rank in (3, 4, 5)]
    for s in row:
        swap = s.bind(s.local_length, s.local_keys)[2]
        assert swap.query_tokens == tuple(x.local_length for x in row)
        assert swap.key_tokens == tuple(x.local_keys for x in row) == tuple(len(x.key_sharding.positions) for x in row)


def test_a_sharding_of_a_grid_keeps_its_axis() -> None:
    """Under another mask, for the keys, copied, pickled, and made again from what it says of itself."""
    s = rf.Sharding(24, (3, 8), layout="zigzag", keys=20, q_offset=-4, heads_axis=2)
    for other in (s.with_mask(rf.window(3, 0)), s.key_sharding, copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert (other.ring_rank, other.ring_ranks, other.heads_axis) == (1, 4, 2)
    assert pickle.loads(pickle.dumps(s)) == s and len(s.key_sharding.positions) == s.local_keys
    assert s != rf.Sharding(24, (3, 8), layout="zigzag", keys=20, q_offset=-4)
    assert rf.Sharding(24, (3, 8), heads_axis=1) == rf.Sharding(24, (3, 8))


@pytest.fixture
def eight_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as rank 5 of 8 that do not exist: enough to make groups and meshes, and to plan."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    yield
    dist.destroy_process_group()


def test_the_axes_of_a_mesh_are_the_ring_and_the_row(eight_processes: None) -> None:
    """Whichever stands first in the mesh; and an axis of one rank is none."""
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("ring", "heads"))  # rank 5 stands at (2, 1)
    by_name, by_number = (rf.Sharding(33, g, heads_axis=axis) for g, axis in ((mesh, "heads"), ((5, 8), 2)))
    assert by_name.positions.tolist() == by_number.positions.tolist() and by_name.plan == by_number.plan
    turned = rf.Sharding(33, mesh, heads_axis="ring")  # rings of 2, rows of 4
    assert (turned.rank, turned.ring_rank, turned.ring_ranks, turned.heads_axis) == (1 * 4 + 2, 1, 2, 4)
    assert by_name.with_mask(rf.full).heads_axis == 2
    assert turned.plan.rank == 1 and len(rf.plans(turned)) == 2
    flat = init_device_mesh("cpu", (8, 1), mesh_dim_names=("ring", "heads"))
    assert rf.Sharding(33, flat, heads_axis="heads").plan == rf.Sharding(33, (5, 8)).plan
    alone = rf.Sharding(33, flat, heads_axis="ring")
    assert (alone.ring_ranks, alone.heads_axis, alone.rank) == (1, 8, 5)
    assert resolve_axes(mesh["heads"], "heads") == (resolve(mesh["heads"]), 2)
    assert address(resolve_axes(mesh, "heads")[0]) == (5, 8)


def test_axes_that_a_mesh_does_not_have_are_refused(eight_processes: None) -> None:
    """The message says what an axis may be called."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("data", "ring", "heads"))
    with pytest.raises(ValueError, match=r"heads_axis is 'head', and group is a mesh with axes \('ring', 'heads'\)"):
        rf.Sharding(9, mesh["ring", "heads"], heads_axis="head")
    with pytest.raises(
        ValueError, match=r"with axes \('data', 'ring', 'heads'\); it names one of the two of a mesh such as mesh\["
    ):
        rf.Sharding(9, mesh, heads_axis="heads")
    with pytest.raises(ValueError, match=r"pass one axis of it, as mesh\['context'\], or of two axes name the one"):
        rf.Sharding(9, mesh["ring", "heads"])
    with pytest.raises(ValueError, match="pass one axis of it"):
        rf.Sharding(9, mesh["ring", "heads"], heads_axis=2)


@pytest.mark.parametrize(
    ("per_node", "launched", "members", "counted"),
    [
        (4, "2", range(8), 2),
        (2, None, range(8), 4),
        (8, "1", range(8), 1),
        (4, "3", range(8), 1),  # nodes of different sizes: not every process has 4 on its own
        (4, "2", [0, 1, 4, 5], 2),
        (2, "4", [1, 3, 5, 7], 4),
        (4, "2", [0, 1, 2, 5], 1),  # not even
        (2, "4", [0, 1, 2, 4], 1),
        (4, "2", [0, 4, 1, 5], 1),  # not node by node
        (3, "2", range(8), 1),
        (None, None, range(8), 1),
    ],
)
def test_nodes_are_counted_where_the_launcher_says_how_ranks_stand(
    eight_processes: None,
    monkeypatch: pytest.MonkeyPatch,
    per_node: int | None,
    launched: str | None,
    members: Sequence[int],
    counted: int,
) -> None:
    """From what is equal on all ranks: a route that only some of them take would hang."""
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(members))
    for name, value in (("WORLD_SIZE", 8), ("LOCAL_WORLD_SIZE", per_node), ("GROUP_WORLD_SIZE", launched)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    assert nodes(dist.group.WORLD) == counted
    assert nodes((3, 8)) == 1


def test_the_route_of_a_grid_knows_the_nodes_of_its_rings(
    eight_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 ranks on 2 nodes: rings of 4 have 2 ranks in each, also where rows are an axis of their own."""
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    asked: list[int] = []

    def note(queries: Any, keys: Any, mask: Any, q_offset: int, homes: int) -> Any:
        asked.append(homes)
        return rf.plan(rf.Sharding(8, (0, 4), route="ring")).route

    monkeypatch.setattr("ringflash.settled._chosen_route", note)
    rf.Sharding(64, None, heads_axis=2)
    rf.Sharding(64, init_device_mesh("cpu", (4, 2), mesh_dim_names=("ring", "heads")), heads_axis="heads")
    rf.Sharding(64, None, heads_axis=8)
    assert asked == [2, 2, 1]
