"""Transformers models on a spread sequence: right in every respect that is accepted, refused by name in all others."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers", minversion="5")

import models  # noqa: E402
from spreads import BATCH, IDS, LENGTH, PACKED, PADDED, ROPE, agrees, built, spread  # noqa: E402

import ringflash as rf  # noqa: E402
import ringflash.integrations.transformers as integration  # noqa: E402
from ringflash.integrations.transformers import attention  # noqa: E402
from ringflash.integrations.transformers.packing import documents_of  # noqa: E402


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt_oss", "gemma2", "gemma3_text", "deepseek_v3"])
def test_logits_and_raw_gradients_are_those_of_one_process(name: str) -> None:
    """Grouped heads, windows, sinks, caps, scales, and values of another head dim than keys; and the comparison can tell."""
    verdict = models.judge(name)
    assert verdict.outcome == "supported", verdict


@pytest.mark.slow
def test_docs_models_md_holds_for_this_version() -> None:
    """Every architecture that can be built agrees or is refused, and the page says which."""
    page = Path(__file__).parents[2] / "docs" / "models.md"
    version = f"with Transformers {transformers.__version__};"
    if version not in page.read_text():
        pytest.skip(f"docs/models.md was not written {version}")
    verdicts = [models.judge(name) for name in models.names()]
    assert not [v for v in verdicts if v.outcome == "wrong"]
    assert models.page(verdicts) == page.read_text(), "run python tests/integrations/models.py --write docs/models.md"


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_positions_that_restart_pack_documents(name: str) -> None:
    """As Transformers' own attentions read them, with a window inside the documents too."""
    assert agrees(built(name), BATCH | {"position_ids": PACKED}) <= models.TOLERANCE


@pytest.mark.parametrize("name", ["gpt_oss", "gemma3_text"])
def test_packed_documents_are_those_that_run_alone(name: str) -> None:
    """Rows with other cuts, windows, and sinks, for which Transformers' own eager attention lets documents see each other."""
    model, cuts = built(name), ((30, 41, 25), (10, 86))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in cuts])
    (_, logits, _), *_ = spread(model, input_ids=IDS, position_ids=positions)
    model.set_attn_implementation("eager")
    with models.wide_softmax(), torch.no_grad():
        rows = [
            torch.cat([model(x, use_cache=False).logits for x in row.split(n, 1)], 1)
            for row, n in zip(IDS.split(1), cuts, strict=True)
        ]
    assert torch.allclose(logits, torch.cat(rows), rtol=0, atol=1e-6)


def test_cu_seq_lens_pack_documents_as_positions_do() -> None:
    """A collator may say it either way; offsets and lengths are taken out before the model sees them."""
    model, row = built(), {"input_ids": IDS[:1], "labels": BATCH["labels"][:1]}
    offsets = torch.tensor([0, 30, 71, LENGTH], dtype=torch.int32)
    told = dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=41, max_length_k=41)
    (loss, logits, _), *_ = spread(model, **row, position_ids=PACKED[:1])
    for got_loss, got_logits, _ in spread(model, **row, **told, position_ids=PACKED[:1]):
        assert got_loss == loss and torch.equal(got_logits, logits)


def test_positions_with_an_axis_more_pack_by_their_row_of_text() -> None:
    """Models of images turn by three axes; a fourth row, the first, says where documents begin, and three say nothing."""
    axes = torch.arange(LENGTH).expand(3, 2, LENGTH)
    packed = documents_of({"position_ids": torch.cat([PACKED[None], axes])}, None, rf.causal, LENGTH)
    assert packed == rf.causal & rf.documents([[0, 30, 71, LENGTH]] * 2)
    assert documents_of({"position_ids": axes // 2}, None, rf.causal, LENGTH) == rf.causal


def test_zigzag_positions_are_not_taken_for_packed_documents() -> None:
    """A shard's positions jump in the middle; only whole rows say where documents begin."""
    model = built()
    loss, logits, _ = spread(model, 1, input_ids=IDS)[0]
    for got_loss, got_logits, _ in spread(model, 4, input_ids=IDS):
        assert got_loss == pytest.approx(loss, rel=1e-12) and torch.allclose(got_logits, logits, rtol=0, atol=1e-10)


def test_padding_at_either_end_is_seen_by_nobody() -> None:
    """The target after left padding is undefined in Transformers too, so it is none here."""
    labels = BATCH["labels"].where(PADDED.bool(), -100)
    labels[1, 9] = -100
    assert agrees(built(), {"input_ids": IDS, "labels": labels, "attention_mask": PADDED}) <= models.TOLERANCE


@pytest.mark.parametrize("kind", list(ROPE))
def test_frequencies_follow_the_longest_position_of_all_ranks(kind: str) -> None:
    """Each rank alone would see a shorter sequence and turn by other angles."""
    changes = {"max_position_embeddings": 32} if kind == "dynamic" else {}
    assert agrees(built(rope_parameters=ROPE[kind], **changes), layout="contiguous") <= models.TOLERANCE


def test_parts_from_a_loader_are_the_whole_batch() -> None:
    """With sharding= the inputs are local, and so are positions that restart; the longest one is asked of all ranks."""
    model = built(rope_parameters=ROPE["dynamic"], max_position_embeddings=32)
    loss, logits, _ = spread(model, 1, input_ids=IDS, position_ids=PACKED)[0]
    labels = torch.nn.functional.pad(BATCH["labels"], (0, 1), value=-100)[:, 1:]

    def one_rank(group: Any) -> tuple[float, Tensor]:
        wrapped = rf.SequenceParallel(copy.deepcopy(model), group)
        s = rf.Sharding(LENGTH, group, rf.causal & rf.documents([0, 30, 71, LENGTH]), layout="zigzag")
        parts = {"input_ids": IDS, "shift_labels": labels, "position_ids": PACKED}
        out = wrapped(**{name: s.shard(part, dim=1) for name, part in parts.items()}, sharding=s)
        return out.loss.item(), s.unshard(out.logits.detach(), dim=1)

    for got_loss, got_logits in rf.local_world(2).run(one_rank):
        assert got_loss == pytest.approx(loss, rel=1e-12) and torch.allclose(got_logits, logits, rtol=0, atol=1e-10)


def test_a_tiled_loss_knows_what_follows_the_head() -> None:
    """Gemma caps its logits and Granite divides them; the loss from hidden states does too."""
    for name, changes in (("gemma2", {"final_logit_softcapping": 3.0}), ("granite", {"logits_scaling": 2.0})):
        assert agrees(built(name, **changes), loss_tile=16) <= models.TOLERANCE


def test_attention_dropout_does_not_depend_on_the_number_of_ranks() -> None:
    """Each weight is dropped or kept alike wherever it is computed, in every layer, and again when it is recomputed."""
    model = built("mistral", attention_dropout=0.3).train()
    results = []
    for ranks, again in ((1, False), (2, False), (2, True)):
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        results.append(spread(model, ranks, input_ids=IDS)[0])
    undropped = spread(copy.deepcopy(model).eval(), 1, input_ids=IDS)[0]
    assert abs(results[0][0] - undropped[0]) > 1e-6
    for loss, _, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(gradients, results[0][2], strict=True))


def test_every_layer_and_step_drops_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed for all layers would drop the same weights in each."""
    seeds, real = [], attention.ring_attention

    def noted(*args: Any, seed: Tensor, **rest: Any) -> Tensor:
        seeds.append(seed.item())
        return real(*args, seed=seed, **rest)

    monkeypatch.setattr(attention, "ring_attention", noted)
    wrapped = rf.SequenceParallel(built(attention_dropout=0.3).train(), (0, 1))
    for _ in range(2):
        wrapped(input_ids=IDS)
    assert len(set(seeds)) == len(seeds) == 4


def test_embeddings_of_images_and_text_go_in_merged() -> None:
    """A model of images runs on inputs_embeds with its text part on the ring; its tower must not be."""
    model = built("gemma3")
    embeds = model.get_input_embeddings()(IDS).detach()
    assert agrees(model, {"inputs_embeds": embeds, "labels": BATCH["labels"]}) <= models.TOLERANCE
    with pytest.raises(ValueError, match=r"merge its embeddings.*inputs_embeds"):
        rf.SequenceParallel(model, (0, 1))(input_ids=IDS, pixel_values=torch.zeros(1, 3, 8, 8))
    model.set_attn_implementation({"text_config": "ring_attn", "vision_config": "ring_attn"})
    with pytest.raises(ValueError, match=r"vision_tower .*'vision_config': 'sdpa'"):
        rf.SequenceParallel(model, (0, 1))


class Outer(nn.Module):
    """A user's own module around a model, which names some inputs, or hands on what it is given."""

    def __init__(self, inner: nn.Module, way: str) -> None:
        super().__init__()
        self.base_model, self.way = inner, way
        self.forward = getattr(self, way)

    def hands_on(self, input_ids: Tensor | None = None, **rest: Any) -> Any:
        return self.base_model(input_ids=input_ids, **rest)

    def names_one(self, input_ids: Tensor) -> Any:
        return self.base_model(input_ids).logits

    def drops(self, input_ids: Tensor, **rest: Any) -> Any:
        return self.base_model(input_ids, None, None).logits

    def reaches_inside(self, input_ids: Tensor) -> Any:
        return self.base_model.lm_head(self.base_model.model(input_ids=input_ids)[0])


@pytest.mark.parametrize("way", ["hands_on", "names_one", "drops", "reaches_inside"])
def test_a_model_inside_another_module_has_the_same_numbers(way: str) -> None:
    """As PEFT wraps it, or a user who knows nothing of positions: each rank's are global all the same, from a loader too."""
    model = built("mistral")
    (loss, _, _), *_ = spread(model, 1, input_ids=IDS)
    labels = torch.nn.functional.pad(BATCH["labels"], (0, 1), value=-100)[:, 1:]

    def one_rank(group: Any) -> list[float]:
        wrapped = rf.SequenceParallel(Outer(copy.deepcopy(model), way), group, layout="zigzag")
        s = rf.Sharding(LENGTH, group, layout="zigzag")
        parts = {"input_ids": s.shard(IDS, dim=1), "shift_labels": s.shard(labels, dim=1)}
        return [wrapped(**BATCH).loss.item(), wrapped(**parts, sharding=s).loss.item()]

    for got in rf.local_world(2).run(one_rank):
        assert got == pytest.approx([loss, loss], rel=1e-12)


def test_a_head_of_the_users_own_takes_labels() -> None:
    """A base model has no loss, so labels are shifted as everywhere."""

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.head = built().model, nn.Linear(64, 97).double()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.base(input_ids).last_hidden_state)

    model = Headed()
    want = rf.SequenceParallel(copy.deepcopy(model), (0, 1))(**BATCH).loss.item()
    for got, _, _ in spread(model, input_ids=IDS):
        assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_under_autocast_attention_runs_in_its_dtype(kind: str) -> None:
    """Trainer's bf16=True: rotation leaves queries and keys in float32 beside values in bfloat16. No worse than one device."""
    model, losses = built(kind).float(), {}
    for name in ("eager", "ring_attn"):
        model.set_attn_implementation(name)
        wrapped = model if name == "eager" else rf.SequenceParallel(model, (0, 1))
        for low in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                losses[name, low] = wrapped(**BATCH, use_cache=False).loss
    losses["ring_attn", True].backward()
    assert losses["ring_attn", False].item() == pytest.approx(losses["eager", False].item(), rel=1e-5)
    assert losses["ring_attn", True].item() == pytest.approx(losses["eager", False].item(), rel=5e-3)
    assert losses["ring_attn", True] != losses["ring_attn", False]


def test_wrapping_twice_and_copying_leave_one_model() -> None:
    """A model that is wrapped again, or a copy, is told by whoever wraps it; nothing is hooked twice."""
    model = built(rope_parameters=ROPE["dynamic"], max_position_embeddings=32)
    first = rf.SequenceParallel(model, (0, 1))
    want = first(input_ids=IDS).logits
    second, third = rf.SequenceParallel(model, (0, 1)), copy.deepcopy(first)
    for wrapped in (second, third, first):
        assert torch.equal(wrapped(input_ids=IDS).logits, want)


def test_check_notices_what_is_wrong() -> None:
    """Its figures are large for another mask and small for the right one; it leaves the model as it was."""
    model = built("qwen3").train()
    with pytest.raises(ValueError, match="qwen3 differs from one device"):
        integration.check(model, (0, 1), mask=rf.causal & rf.window(40, 0), tolerance=1e-3)
    assert integration.check(model, (0, 1), tolerance=1e-4).worst > 0
    with pytest.raises(ValueError, match=r"inputs are \['input_ids'\]; labels are needed"):
        integration.check(model, (0, 1), {"input_ids": IDS})
    assert model.training and all(p.grad is None for p in model.parameters())
    with pytest.raises(TypeError, match="pass the model that it wraps"):
        integration.check(rf.SequenceParallel(model, (0, 1)))


def test_a_captured_model_is_one_graph_for_all_documents() -> None:
    """fullgraph=True over 2 ranks, with a sliding window too: other documents are other inputs, gradients those of eager."""
    torch._dynamo.reset()
    model, counter = built("mistral"), CompileCounterWithBackend("aot_eager")

    def one_rank(group: Any) -> list[Tensor]:
        eager, captured = (rf.SequenceParallel(copy.deepcopy(model), group, layout="zigzag") for _ in range(2))
        captured.module.forward = torch.compile(captured.module.forward, backend=counter, fullgraph=True)
        errors = []
        for lengths in ((LENGTH,), (20, 76), (7, 8, 81)):
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            for wrapped in (eager, captured):
                wrapped.zero_grad()
                wrapped(**BATCH, position_ids=positions).loss.backward()
            pairs = zip(eager.parameters(), captured.parameters(), strict=True)
            errors += [(a.grad - b.grad).abs().max() for a, b in pairs]
        return errors

    for errors in rf.local_world(2).run(one_rank):
        assert max(errors) < 1e-10
    assert counter.frame_count == 1
    torch._dynamo.reset()
