"""Tiles: losses and gradients are those of the whole, names stay, and what is wrong is named."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import ringflash as rf
from ringflash.tiling import Tiled, tile_modules, tiled_cross_entropy

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, DIM = 23, 8


class Head(nn.Module):
    """A head with a bias and an adapter; remembers how many tokens it was given in each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(DIM, VOCABULARY).double()
        self.adapter = nn.Linear(DIM, VOCABULARY, bias=False).double()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[1])
        return self.linear(x) + self.adapter(x)


@pytest.fixture
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(batch: int = 2, length: int = 11) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch, length, DIM, dtype=torch.float64, generator=make)
    labels = torch.randint(0, VOCABULARY, (batch, length), generator=make)
    labels[0, : length // 2] = -100
    return hidden, labels


def dense(head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction=reduction)


def results(loss: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """The loss, and its gradients of ``x`` and of all parameters."""
    x = x.detach().requires_grad_()
    out = loss(x)
    return [out.detach(), *torch.autograd.grad(out * 1.7, [x, *module.parameters()])]


def close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-12 * (1 + b.abs().max().item()))
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("tile", "calls"), [(1, None), (3, None), (7, None), (22, None), (1000, None), (7, 5), (22, 40)]
)
def test_tiles_of_a_loss_add_up(reduction: Any, tile: int, calls: int | None) -> None:
    """Value, hidden's gradient and the head's are those of all logits at once, and no call sees more than a tile."""
    head = Head()
    hidden, labels = inputs()
    wanted = results(lambda x: dense(head, x, labels, reduction), head, hidden)
    head.seen.clear()
    found = results(lambda x: tiled_cross_entropy(head, x, labels, tile, reduction, calls=calls), head, hidden)
    assert close(found, wanted)
    assert max(head.seen) <= tile
    assert len(head.seen) == 2 * (calls or -(-22 // tile))  # forward, and again in backward
    assert sum(head.seen) == 2 * 22


def test_a_rank_without_tokens_takes_part() -> None:
    """It calls the head as often as others do, and its zero depends on everything, or engines would wait for gradients."""
    head = Head()
    hidden, labels = inputs(length=0)
    for calls in (None, 3):
        head.seen.clear()
        loss, *gradients = results(lambda x: tiled_cross_entropy(head, x, labels, 4, "mean", calls=calls), head, hidden)  # noqa: B023
        assert loss == 0 and head.seen == [0] * 2 * (calls or 1)
        assert all(g is not None and not g.any() for g in gradients)


def test_a_loss_without_targets_is_zero() -> None:
    """A shard of padding must not make the mean of all NaN."""
    head, (hidden, labels) = Head(), inputs()
    loss, *gradients = results(
        lambda x: tiled_cross_entropy(head, x, torch.full_like(labels, -100), 4, "mean"), head, hidden
    )
    assert loss == 0 and not any(g.any() for g in gradients)


def test_another_label_can_be_ignored() -> None:
    """Not everybody marks padding with -100."""
    head, (hidden, labels) = Head(), inputs()
    zero = labels.clamp_min(0)
    found = tiled_cross_entropy(head, hidden, zero, 4, ignore_index=0)
    assert torch.allclose(
        found, F.cross_entropy(head(hidden).flatten(0, 1), zero.flatten(), reduction="sum", ignore_index=0)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_widened_before_the_loss(dtype: torch.dtype) -> None:
    """The sum over thousands of tokens is in float32 whatever the model is in, also under autocast."""
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(DIM, VOCABULARY), torch.randn(1, 512, DIM), torch.randint(0, VOCABULARY, (1, 512))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        wanted = dense(lambda x: head(x).float(), hidden, labels)
        found = tiled_cross_entropy(head, hidden, labels, tile=100)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
    head, hidden = head.to(dtype), hidden.to(dtype)
    torch.testing.assert_close(
        tiled_cross_entropy(head, hidden, labels, tile=100), dense(lambda x: head(x).float(), hidden, labels)
    )


@pytest.mark.usefixtures("_forget")
def test_tiles_are_captured_and_checkpointed() -> None:
    """Under torch.compile they are one graph; inside another checkpoint, and without gradients, the numbers are the same."""
    head, (hidden, labels) = nn.Linear(DIM, VOCABULARY).double(), inputs()
    tiled = Tiled(nn.Sequential(nn.Linear(DIM, 32), nn.GELU(), nn.Linear(32, DIM)).double(), tile=4)
    both = nn.ModuleList([tiled, head])

    def loss(x: Tensor) -> Tensor:
        return tiled_cross_entropy(head, tiled(x), labels, 5)

    wanted = results(lambda x: dense(head, tiled.inner(x), labels), both, hidden)
    assert close(results(loss, both, hidden), wanted)
    graphs = CompileCounterWithBackend("aot_eager")
    assert close(results(torch.compile(loss, fullgraph=True, backend=graphs), both, hidden), wanted)
    assert graphs.frame_count == 1
    assert close(results(lambda x: checkpoint(loss, x, use_reentrant=False), both, hidden), wanted)
    with torch.no_grad():
        assert close([loss(hidden)], wanted[:1])


class MLP(nn.Module):
    """With a parameter, a buffer and dropout of its own, none of which belongs to a child."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 32).double(), nn.Linear(32, DIM).double()
        self.gain = nn.Parameter(torch.full((32,), 1.5, dtype=torch.float64))
        self.register_buffer("shift", torch.full((32,), 0.25, dtype=torch.float64))
        self.rate = 0.0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[1])
        wide = self.up(x).sin() * self.gain + self.shift
        return self.down(F.dropout(wide, self.rate, self.training))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": MLP()}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["mlp"](x)
        return x


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    return results(lambda x: (model(x) * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum(), model, x)


@pytest.mark.parametrize("tile", [1, 4, 22, 1000])
def test_a_tiled_module_is_the_module(tile: int) -> None:
    """The same numbers, the same names in the same order, in memory and on disk."""
    plain, tiled = Layers(), Layers()
    assert tile_modules(tiled, "mlp", tile) == 2
    x, _ = inputs()
    assert close(trained(tiled, x), trained(plain, x))
    assert max(tiled.layers[0]["mlp"].inner.seen) <= tile
    for names in (lambda m: m.named_parameters(), lambda m: m.named_buffers(), lambda m: m.state_dict().items()):
        assert [name for name, _ in names(tiled)] == [name for name, _ in names(plain)]
    assert [name for name, _ in tiled.named_modules()] == [name for name, _ in plain.named_modules()]
    changed = {name: value * 2 for name, value in plain.state_dict().items()}
    plain.load_state_dict(changed)
    tiled.load_state_dict(changed)
    assert close(trained(tiled, x), trained(plain, x))


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, _pickled])
def test_a_copy_is_tiled_and_whole(how: Callable[[nn.Module], nn.Module]) -> None:
    """A copy that shared half of its parameters with the original would train both."""
    model = Layers()
    tile_modules(model, "mlp", 4)
    x, _ = inputs()
    wanted = trained(model, x)
    other = how(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert close(trained(other, x), wanted)


def test_what_is_done_to_a_tiled_module_reaches_the_module() -> None:
    """Casts, modes, and adapters that replace a child: engines and PEFT do it to whatever stands in the tree."""
    model = Layers()
    tile_modules(model, "mlp", 4)
    tiled = model.layers[0]["mlp"]
    assert isinstance(tiled, Tiled)
    model.float().eval()
    assert tiled.inner.gain.dtype == torch.float32 and not tiled.inner.training and not tiled.inner.up.training
    model.train()
    assert tiled.inner.training
    tiled.up = nn.Linear(DIM, 32, bias=False)
    assert tiled.inner.up is tiled.up and tiled.gain is tiled.inner.gain and tiled.rate == 0.0
    model(inputs()[0].float()).sum().backward()
    assert tiled.up.weight.grad is not None


def test_dropout_falls_on_the_same_cells_in_backward() -> None:
    """A tile that is recomputed with another dropout would give the gradient of another function."""
    mlp, (x, _) = MLP(), inputs()
    mlp.rate = 0.5
    tiled = Tiled(mlp, 4)

    def tile_by_tile(x: Tensor) -> Tensor:
        parts = x.flatten(0, 1)[None].split((3, 4, 4, 3, 4, 4), dim=1)
        return torch.cat([mlp(part) for part in parts], dim=1).view_as(x)

    def loss(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return run(x).sin().sum()

    found, wanted = (results(functools.partial(loss, run), mlp, x) for run in (tiled, tile_by_tile))
    assert close(found, wanted)


def test_every_rank_calls_a_tiled_module_equally_often() -> None:
    """Shards differ by some tokens and may be empty; a call that gathers parameters must not be one rank's alone."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, DIM).double()
            self.attention = rf.RingAttention(DIM, heads=2).double()
            self.mlp = Tiled(MLP(), tile=5)
            self.head = nn.Linear(DIM, VOCABULARY).double()

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            return self.head(x + self.mlp(x + self.attention(x, position_ids)))

    def one_rank(group: Any, length: int) -> tuple[list[int], list[Tensor]]:
        model = Model()
        ids = torch.arange(2 * length).view(2, length) % VOCABULARY
        rf.SequenceParallel(model, group, layout="contiguous")(input_ids=ids, labels=ids).loss.backward()
        return model.mlp.inner.seen, [p.grad for p in model.parameters()]

    for length, calls in ((11, 2 * 2), (2, 1 * 2)):  # 3 ranks: 8, 8 and 6 tokens in tiles of 5; 2, 2 and none
        ranks = rf.local_world(3).run(one_rank, length)
        assert [len(seen) for seen, _ in ranks] == [calls] * 3
        _, wanted = rf.local_world(1).run(one_rank, length)[0]
        assert all(close(found, wanted) for _, found in ranks)


HEAD, (HIDDEN, LABELS) = nn.Linear(DIM, VOCABULARY).double(), inputs()
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "tile": (lambda: tiled_cross_entropy(HEAD, HIDDEN, LABELS, 0), ValueError, "tile is 0; a number of tokens"),
    "tile of a module": (lambda: Tiled(HEAD, 2.5), ValueError, "Tiled: tile is 2.5"),  # type: ignore[arg-type]
    "hidden": (
        lambda: tiled_cross_entropy(HEAD, HIDDEN[0], LABELS, 4),
        ValueError,
        r"hidden is (11, 8) of torch.float64",
    ),
    "labels": (
        lambda: tiled_cross_entropy(HEAD, HIDDEN, LABELS[:, 1:], 4),
        ValueError,
        "labels is (2, 10) of torch.int64; hidden has shape (2, 11, 8), so int64 of shape (2, 11)",
    ),
    "reduction": (
        lambda: tiled_cross_entropy(HEAD, HIDDEN, LABELS, 4, "none"),  # type: ignore[arg-type]
        ValueError,
        "reduction is 'none'; accepted are 'sum' and 'mean'",
    ),
    "calls": (
        lambda: tiled_cross_entropy(HEAD, HIDDEN, LABELS, 4, calls=5),
        ValueError,
        "calls is 5; 22 tokens in tiles of 4 need 6 calls",
    ),
    "a head that returns an object": (
        lambda: tiled_cross_entropy(lambda x: (x,), HIDDEN, LABELS, 4),  # type: ignore[arg-type, return-value]
        TypeError,
        "head returned a tuple; a tensor is needed",
    ),
    "a head that drops tokens": (
        lambda: tiled_cross_entropy(lambda x: x[:, 1:], HIDDEN, LABELS, 4),
        ValueError,
        "one row per token is needed",
    ),
    "a module that returns a tuple": (
        lambda: Tiled(nn.LSTM(DIM, DIM).double(), 4)(HIDDEN),
        TypeError,
        "Tiled: LSTM returned a tuple",
    ),
    "input": (lambda: Tiled(HEAD, 4)(HIDDEN[0]), ValueError, "input has shape (11, 8); [batch, seq, dim] is needed"),
    "twice": (lambda: Tiled(Tiled(HEAD, 4), 4), ValueError, "tiled already"),
    "no such name": (
        lambda: tile_modules(Layers(), "ffn", 4),
        ValueError,
        "no submodule of Layers is called 'ffn'; there are down, layers, mlp, up",
    ),
}


@pytest.mark.parametrize(("call", "kind", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_is_named(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    """Which argument, what came, what is accepted."""
    with pytest.raises(kind) as error:
        call()
    assert words in str(error.value)


@pytest.mark.slow
def test_the_memory_benchmark_runs(tmp_path: Path) -> None:
    """The script that measures for minutes is run here for seconds, every part of it; what it compares agrees."""
    out = tmp_path / "memory.jsonl"
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", "--tiny", "--device", "cpu", "--out", out]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {"written": "memory.jsonl", "records": 8}
    records = [json.loads(line) for line in out.read_text().splitlines()]
    messages = {r["variant"]: r["messages"] for r in records if r["part"] == "checkpoint"}
    assert messages["everything"] > messages["none"] == messages["keep_attention"] == messages["keep_attention_on_cpu"]
