"""Captured graphs: torch.compile goes through attention in one piece, and what changes from step to step is an input."""

from __future__ import annotations

import copy
import gc
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import ringflash as rf
from ringflash.attention import _find_one_device
from ringflash.mask import Mask
from ringflash.shard import _find_under

LENGTH = 24
MASK = rf.causal & rf.window(7, 0)
MASKS = (
    rf.full,
    rf.causal,
    MASK,
    rf.prefix(5),
    rf.chunks(7) & rf.window(3, 3),
    rf.chunks(6) & rf.chunks(4),
    rf.documents([0, 0]),
    rf.documents([0, 9, 9, LENGTH]) & rf.window(2, 9),
    rf.documents([[0, 3, LENGTH], [0, LENGTH], [0, 1, 2, LENGTH]]) & rf.prefix(9),
)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def leaves(length: int = LENGTH, keys: int | None = None, batch: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(length)
    shapes = [(batch, length, 4, 8), *[(batch, length if keys is None else keys, 2, 8)] * 2]
    return [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]


def results(run: Callable[..., Any], tensors: list[Tensor], *args: Any) -> list[Tensor]:
    """What ``run(*tensors, *args)`` returns, and the gradients of its tensors that ask for them."""
    out = run(*tensors, *args)
    outs = out if isinstance(out, tuple) else (out,)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for x in outs]
    loss = torch.stack([(x * w).sum() for x, w in zip(outs, weights, strict=True)]).sum()
    return [*(x.detach() for x in outs), *torch.autograd.grad(loss, [x for x in tensors if x.requires_grad])]


def captured(run: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    graphs = CompileCounterWithBackend("aot_eager")
    return torch.compile(run, fullgraph=True, backend=graphs, **options), graphs


def same(run: Callable[..., Any], captured_run: Callable[..., Any], tensors: list[Tensor], *args: Any) -> bool:
    pairs = zip(results(run, tensors, *args), results(captured_run, tensors, *args), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class Layer(nn.Module):
    """Attention with a mask of its own."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rf.flash_attention(q * 2, k, v, mask=self.mask) + 1


def _default(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return rf.flash_attention(q, k, v)


def _of_the_module(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return rf.flash_attention(q, k, v, mask=MASK)


def _closure(mask: Mask) -> Callable[..., Tensor]:
    return lambda q, k, v: rf.flash_attention(q, k, v, mask=mask)


def _inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    local = rf.flash_attention(q, k, v, mask=rf.causal & rf.window(7, 0))
    return local + rf.flash_attention(q, k, v, mask=rf.documents([0, 5, q.shape[1]]) & rf.prefix(2) & rf.chunks(8))


def _from_the_caller(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    return rf.flash_attention(q, k, v, mask=mask)


@pytest.mark.parametrize(
    ("run", "args"),
    [
        pytest.param(_default, (), id="default"),
        pytest.param(_of_the_module, (), id="global"),
        pytest.param(_closure(MASK), (), id="closure"),
        pytest.param(Layer(MASK), (), id="attribute"),
        pytest.param(_inside, (), id="built inside"),
        pytest.param(_from_the_caller, (rf.documents([[0, 3, LENGTH], [0, LENGTH]]),), id="argument"),
    ],
)
def test_a_mask_reaches_the_graph_from_wherever_it_is(run: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """A graph break at every attention layer would take away what compilation is for."""
    compiled, graphs = captured(run)
    assert same(run, compiled, leaves(), *args)
    assert graphs.frame_count == 1


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


@pytest.mark.parametrize(
    "options",
    [
        dict(softcap=5.0),
        dict(alibi_slopes=SLOPES),
        dict(alibi_slopes=torch.stack([SLOPES, SLOPES * 2])),
        dict(dropout_p=0.3, seed=11),
        dict(dropout_p=0.3, seed=torch.tensor(11)),
        dict(scale=0.3, q_offset=3),
        dict(return_lse=True),
        dict(deterministic=True),
        dict(backend="reference"),
        dict(
            softcap=5.0, alibi_slopes=SLOPES, dropout_p=0.3, seed=1, return_lse=True, mask=rf.documents([0, 9, LENGTH])
        ),
    ],
    ids=lambda options: " ".join(options),
)
def test_every_option_is_captured(options: dict[str, Any]) -> None:
    """An option that breaks the graph would only be found by the model that needs it."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return rf.flash_attention(q, k, v, **options)

    compiled, graphs = captured(run)
    assert same(run, compiled, leaves())
    assert graphs.frame_count == 1


def test_the_kernels_are_looked_for_when_a_graph_runs() -> None:
    """Whether Triton runs here is found out by an import, which no graph can hold; the answer is the same in both modes."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rf.flash_attention(q, k, v, backend="triton")

    compiled, _ = captured(run)
    try:
        run(*leaves())
    except ValueError as eager:
        with pytest.raises(Exception, match=re.escape(str(eager).removeprefix("flash_attention: "))):
            compiled(*leaves())
    else:
        assert same(run, compiled, leaves())


def test_sinks_are_learned_through_a_captured_graph() -> None:
    """Sinks are parameters: their gradient comes out of the same operator."""

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return rf.flash_attention(q, k, v, sinks=sinks, return_lse=True)

    compiled, graphs = captured(run)
    assert same(run, compiled, [*leaves(), torch.randn(4, requires_grad=True)])
    assert graphs.frame_count == 1


def test_twenty_packings_are_two_graphs() -> None:
    """Packed documents differ at every step: a graph each, and the compiler gives up at the eighth."""
    compiled, graphs = captured(_from_the_caller)
    for cut in range(1, 21):
        mask = rf.causal & rf.documents([*range(0, cut, 3), cut, LENGTH])
        assert same(_from_the_caller, compiled, leaves(), mask)
    assert graphs.frame_count <= 2  # the second knows that the number of documents varies

    layer = Layer(rf.causal)
    compiled, graphs = captured(layer)
    for cut in range(1, 21):
        layer.mask = rf.documents([[0, cut, LENGTH], [0, *range(1, cut, 2), LENGTH]])
        assert same(layer, compiled, leaves())
    assert graphs.frame_count <= 3


def test_twenty_packings_of_one_sharding_are_two_graphs() -> None:
    """``ring_attention(mask=)`` derives a plan for each packing, outside the graph."""
    s = rf.Sharding(LENGTH, (0, 1))

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return rf.ring_attention(q, k, v, s, mask=mask)

    compiled, graphs = captured(run)
    for cut in range(1, 21):
        assert same(run, compiled, leaves(), rf.causal & rf.documents([*range(0, cut, 3), cut, LENGTH]))
    assert graphs.frame_count <= 2


def test_a_graph_serves_every_sharding() -> None:
    """What a wrapper changes between batches is the sharding of each layer: twenty of them compile once."""

    class Sharded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sharding: rf.Sharding | None = None

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return rf.ring_attention(q * 2.0, k, v, self.sharding) + 1.0

    layer = Sharded()
    compiled, graphs = captured(layer)
    for cut in range(1, 21):
        layer.sharding = rf.Sharding(LENGTH, (0, 1), rf.causal & rf.documents([0, cut, LENGTH]))
        assert same(layer, compiled, leaves())
    assert graphs.frame_count == 1


def test_a_captured_ring_takes_a_mask_in_the_call() -> None:
    """Every rank captures for itself, and a mask that comes with the batch still gives the answer of one device."""
    q, k, v = (x.detach() for x in leaves())
    masks = [rf.causal & rf.documents([0, cut, LENGTH]) for cut in (3, 11, 20)]

    def rank(group: Any) -> list[Tensor]:
        s = rf.Sharding(LENGTH, group)
        compiled, _ = captured(lambda q, k, v, mask: rf.ring_attention(q, k, v, s, mask=mask))
        local = [s.shard(x, dim=1) for x in (q, k, v)]
        return [s.unshard(compiled(*local, mask), dim=1) for mask in masks]

    for found in rf.local_world(ranks=2).run(rank):
        for out, mask in zip(found, masks, strict=True):
            torch.testing.assert_close(out, rf.flash_attention(q, k, v, mask=mask))


def test_a_length_marked_dynamic_is_one_graph() -> None:
    """Sequences of every length run through the first graph."""
    compiled, graphs = captured(_of_the_module)
    for length in (24, 7, 63, 100):
        tensors = leaves(length)
        for x in tensors:
            torch._dynamo.mark_dynamic(x, 1)
        assert same(_of_the_module, compiled, tensors)
    assert graphs.frame_count == 1


def test_lengths_that_change_are_two_graphs() -> None:
    """The compiler learns from the second length, and must not be told to unlearn it by a check of ours."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return rf.flash_attention(q, k, v, mask=mask, q_offset=k.shape[1] - q.shape[1])

    for make in (lambda length: rf.causal, lambda length: rf.causal & rf.documents([0, length // 2, length])):
        compiled, graphs = captured(run)
        for length in range(10, 50, 8):
            assert same(run, compiled, leaves(length), make(length))
        assert graphs.frame_count <= 2
        torch._dynamo.reset()

    compiled, graphs = captured(run)
    for queries, keys in ((10, 20), (11, 24), (17, 30), (5, 80)):
        assert same(run, compiled, leaves(queries, keys), rf.causal)
    assert graphs.frame_count <= 2


def _seeded(q: Tensor, k: Tensor, v: Tensor, value: Any) -> Tensor:
    return rf.flash_attention(q, k, v, dropout_p=0.2, seed=value)


def _behind(q: Tensor, k: Tensor, v: Tensor, value: int) -> Tensor:
    return rf.flash_attention(q, k, v, q_offset=value)


@pytest.mark.parametrize(("run", "make"), [(_seeded, int), (_seeded, torch.tensor), (_behind, int)])
def test_whole_numbers_that_change_every_step_do_not_compile_every_step(run: Any, make: Any) -> None:
    """A seed per step, or a cache that grows under a query, must not reach the compiler's limit of eight."""
    compiled, graphs = captured(run)
    for value in range(2, 14):
        assert same(run, compiled, leaves(), make(value))
    assert graphs.frame_count <= 3


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p"])
def test_another_scale_is_another_graph(name: str) -> None:
    """Real numbers are constants of a graph; a second one compiles again, and is not refused by a check of ours."""

    def run(q: Tensor, k: Tensor, v: Tensor, value: float) -> Tensor:
        return rf.flash_attention(q, k, v, **{"seed": 1, name: value})  # type: ignore[arg-type]

    compiled, _ = captured(run)
    for value in (0.25, 0.5, 0.75, 0.25):
        assert same(run, compiled, leaves(), value)


def test_backward_finds_its_mask_after_other_masks_and_after_its_end() -> None:
    """A pipeline runs several forwards before the first backward, and nobody holds the masks of packed batches."""
    compiled, _ = captured(_from_the_caller)
    pending = []
    for cut in range(1, 13):
        tensors = leaves()
        pending.append((cut, tensors, compiled(*tensors, rf.documents([0, cut, LENGTH]))))
    gc.collect()
    for cut, tensors, out in pending:
        want = rf.flash_attention(*tensors, mask=rf.documents([0, cut, LENGTH]))
        found = torch.autograd.grad(out.sum(), tensors)
        assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(want.sum(), tensors), strict=True))


def test_a_captured_layer_can_be_checkpointed() -> None:
    """Recomputation in backward is part of the graph, and finds the same mask there."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        layer = lambda q, k, v: rf.flash_attention(q.sin(), k, v, mask=mask)  # noqa: E731
        out: Tensor = torch.utils.checkpoint.checkpoint(layer, q, k, v, use_reentrant=False)
        return out

    compiled, graphs = captured(run)
    assert all(same(run, compiled, leaves(), mask) for mask in (MASK, rf.documents([0, 5, LENGTH])))
    assert graphs.frame_count <= 2


def test_the_module_is_captured() -> None:
    """``rf.RingAttention`` alone on a device keeps its mask as an attribute, and rotates by positions made in the graph."""
    layer = rf.RingAttention(32, heads=4, kv_heads=2, mask=rf.window(7, 0), rope_theta=10000.0)
    compiled, graphs = captured(layer)
    assert same(layer, compiled, [torch.randn(2, LENGTH, 32, requires_grad=True), *layer.parameters()][:1])
    assert graphs.frame_count == 1


X = torch.zeros(2, 8, 4, 8)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (lambda: rf.flash_attention(X[0], X, X), r"query has shape (8, 4, 8); [batch, seq, heads, head_dim]"),
    "dtype": (lambda: rf.flash_attention(X, X.double(), X), "query, key, value are torch.float32, torch.float64"),
    "heads": (lambda: rf.flash_attention(X[:, :, :3], X[:, :, :2], X[:, :, :2]), "query heads must be a multiple"),
    "mask": (lambda: rf.flash_attention(X, X, X, mask="causal"), "mask is 'causal'; a mask is a value"),
    "mask of a ring": (
        lambda: rf.ring_attention(X, X, X, SHARDING, mask="causal"),  # type: ignore[arg-type]
        "mask is 'causal'; a mask is a value",
    ),
    "documents": (
        lambda: rf.flash_attention(X, X, X, mask=rf.documents([0, 9])),
        "the documents of mask cover 9 positions, key has 8",
    ),
    "documents of a ring": (
        lambda: rf.ring_attention(X, X, X, SHARDING, mask=NINE),
        "the documents of the mask cover 9 positions, the keys 8",
    ),
    "rows": (
        lambda: rf.flash_attention(X, X, X, mask=rf.documents([[0, 8], [0, 3, 8], [0, 4, 8]])),
        "mask has documents for 3 batch rows, query has 2",
    ),
    "offset": (lambda: rf.flash_attention(X[:, :5], X, X), "q_offset=3 aligns the ends"),
    "softcap": (lambda: rf.flash_attention(X, X, X, softcap=-1.0), "softcap is -1.0; a finite number is needed"),
    "seed": (lambda: rf.flash_attention(X, X, X, dropout_p=0.5), "dropout_p is 0.5 without seed"),
    "sinks": (lambda: rf.flash_attention(X, X, X, sinks=torch.zeros(3)), "sinks has shape (3,); one value per query"),
    "backend": (lambda: rf.flash_attention(X, X, X, backend="fast"), "backend is 'fast'; accepted are"),
}
SHARDING, SHARDING_24 = rf.Sharding(8, (0, 1)), rf.Sharding(LENGTH, (0, 1))
NINE = rf.documents([0, 9])


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_named_in_a_captured_graph_too(call: Callable[[], Any], words: str) -> None:
    """Whoever compiles first must not be left with the compiler's words alone."""
    with pytest.raises((ValueError, TypeError)) as eager:
        call()
    assert words in str(eager.value)
    with pytest.raises(Exception) as compiled:
        torch.compile(call, fullgraph=True, backend="eager")()
    assert words in str(compiled.value)


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_a_mask_is_read_back_from_its_table(mask: Mask) -> None:
    """The table is all that a captured graph has of a mask."""
    assert Mask.read(mask.table) == mask


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_a_mask_survives_pickle_and_copy(mask: Mask) -> None:
    """A loader's workers make masks in other processes, where strings and None hash to other numbers."""
    for other in (pickle.loads(pickle.dumps(mask)), copy.copy(mask), copy.deepcopy(mask)):
        assert other == mask and hash(other) == hash(mask) and other.table.tolist() == mask.table.tolist()


def test_the_operators_that_find_a_mask_pass_the_checks_of_torch_library() -> None:
    """Schema, fake kernel and ahead-of-time dispatch agree with what they do."""
    table = torch.from_numpy(MASK.table)
    torch.library.opcheck(_find_one_device, (table, 3))
    torch.library.opcheck(_find_under, (SHARDING.handle, table))


def test_handles_stay_on_the_host_whatever_the_default_device() -> None:
    """A handle on a GPU would be waited for at every layer; on "meta" it would have no value."""
    q, k, v = leaves()
    want = rf.flash_attention(q, k, v, mask=rf.window(5, 2), dropout_p=0.1, seed=1)
    with torch.device("meta"):
        s = rf.Sharding(LENGTH, (0, 1), rf.window(5, 2))
        assert torch.equal(rf.ring_attention(q, k, v, s, dropout_p=0.1, seed=1), want)


def test_a_dry_run_leaves_nothing_fake_behind() -> None:
    """Memory estimators and exporters run the model on tensors without values; the process goes on to train it."""
    mask = rf.causal & rf.window(6, 0)  # seen for the first time in the dry run
    q, k, v = leaves()
    with FakeTensorMode() as mode:
        for run in (rf.flash_attention, lambda q, k, v, mask: rf.ring_attention(q, k, v, SHARDING_24, mask=mask)):
            found = results(run, [mode.from_tensor(x).requires_grad_() for x in (q, k, v)], mask)
            assert [x.shape for x in found] == [q.shape, q.shape, k.shape, v.shape]
    assert torch.equal(rf.flash_attention(q, k, v, mask=mask), rf.ring_attention(q, k, v, SHARDING_24, mask=mask))


def test_an_exported_program_holds_its_mask() -> None:
    """A program is loaded by another process, where no handle of this one means anything: its constant is the table."""
    layer, tensors = Layer(rf.window(8, 1)), [x.detach() for x in leaves()]
    program = torch.export.export(layer, tuple(tensors), strict=False)
    assert any(torch.equal(x.long(), torch.from_numpy(layer.mask.table)) for x in program.constants.values())
    assert torch.equal(program.module()(*tensors), layer(*tensors))


@pytest.mark.slow
def test_inductor_agrees() -> None:
    """The compiler that people use checks strides and schedules the host tensors of handles; "aot_eager" does neither."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return rf.flash_attention(q.sin(), k, v, mask=mask).cos()

    compiled = torch.compile(run, fullgraph=True)
    for cut in (5, 9, 16, 20):
        mask = rf.causal & rf.documents([*range(0, cut, 4), cut, LENGTH])
        for found, want in zip(results(compiled, leaves(), mask), results(run, leaves(), mask), strict=True):
            torch.testing.assert_close(found, want)
