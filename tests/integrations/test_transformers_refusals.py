"""What would be silently wrong on a spread sequence is refused, by name, with the reason and what to do."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5")

import models  # noqa: E402
from spreads import BATCH, IDS, LENGTH, PACKED, PADDED, ROPE, built  # noqa: E402
from transformers import BertConfig, BertForMaskedLM  # noqa: E402

import ringflash as rf  # noqa: E402
from ringflash.integrations import require  # noqa: E402
from ringflash.integrations.transformers.attention import TOLD, Told, ring_attn  # noqa: E402
from ringflash.integrations.transformers.trainer import _Around  # noqa: E402
from ringflash.spread import Spread  # noqa: E402


def test_of_several_models_one_reads_the_sequence() -> None:
    """A tower of images beside it keeps its own attention; which of two that read text is meant, nobody can say."""

    class Both(nn.Module):
        def __init__(self, *parts: nn.Module) -> None:
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.parts[1](input_ids).logits

    sizes = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
    )
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    model = built()
    assert torch.equal(
        rf.SequenceParallel(Both(tower, model), (0, 1))(**BATCH).loss, rf.SequenceParallel(model, (0, 1))(**BATCH).loss
    )
    with pytest.raises(ValueError, match=r"2 Transformers models that read text \(llama and qwen3\)"):
        rf.SequenceParallel(Both(model, models.build(models.tiny("qwen3"), "sdpa")), (0, 1))


def test_the_bare_model_is_refused_before_and_after() -> None:
    """Without the wrapper a rank would attend to nothing that it knows of; the error says what to do."""
    model = built()
    with pytest.raises(ValueError, match="wrap the model, on one device too"):
        model(IDS)
    wrapped = rf.SequenceParallel(model, (0, 1))
    for after in (lambda loss: None, lambda loss: loss.backward()):
        after(wrapped(**BATCH).loss)
        with pytest.raises(ValueError, match="wrap the model"):
            model(IDS)


def test_the_same_weights_decode_with_another_attention() -> None:
    """generate is refused on a spread sequence and points to the bare model, whose answer wrapping does not change."""
    model = built(rope_parameters=ROPE["dynamic"], max_position_embeddings=32)
    alone = copy.deepcopy(model)
    alone.set_attn_implementation("sdpa")
    wrapped = rf.SequenceParallel(model, (0, 1))
    wrapped(input_ids=IDS)
    with pytest.raises(RuntimeError, match="sdpa"):
        wrapped.generate(IDS)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(IDS, use_cache=False).logits, alone(IDS, use_cache=False).logits)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama4_text", {}, "llama4_text .*chunked_attention"),
        ("mamba", {}, "mamba .*linear_attention"),
        ("bloom", {}, "bloom .*without asking"),
        ("roberta", {}, "roberta .*positions from input_ids"),
        ("bart", {}, "bart .*position_ids"),
        ("bert", {"add_cross_attention": True}, "bert .*cross-attention"),
    ],
)
def test_a_model_that_cannot_be_right_is_refused_by_name(name: str, changes: dict[str, Any], reason: str) -> None:
    """When it is wrapped, with the reason."""
    with pytest.raises(ValueError, match=reason):
        rf.SequenceParallel(built(name, **changes), (0, 1))


@pytest.mark.parametrize(
    ("keys", "mask", "given", "reason"),
    [
        (8, rf.causal, {"position_bias": torch.ones(1)}, "position_bias .*ignored"),
        (16, rf.causal, {}, "8 queries and 16 keys.*use_cache=False"),
        (8, rf.causal, {"attention_mask": torch.ones(1, 1, 8, 8)}, "attention_mask of shape"),
        (8, rf.full, {"is_causal": False, "sliding_window": 4}, "window in both directions"),
        (8, rf.causal, {"dropout": 0.1}, "wrap the model again"),
    ],
    ids=["bias", "cache", "mask", "window", "dropout"],
)
def test_what_a_layer_asks_of_attention_is_done_or_refused(
    keys: int, mask: rf.Mask, given: dict[str, Any], reason: str
) -> None:
    """Nothing that Transformers' interface can carry is dropped without a word."""
    layer, query, key = nn.Identity(), torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, keys, 4)
    vars(layer)[TOLD] = Told(rf.Sharding(8, (0, 1), mask))
    with pytest.raises(ValueError, match=reason):
        ring_attn(layer, query, key, key, **{"attention_mask": None} | given)


def test_a_model_that_answers_once_for_a_sequence_is_refused() -> None:
    """It would answer from the last token of each rank's shard."""
    model = transformers.LlamaForSequenceClassification._from_config(
        models.tiny("llama"), attn_implementation="ring_attn"
    )
    with pytest.raises(ValueError, match=r"llama .*once for a whole sequence"):
        rf.SequenceParallel(model, (0, 1))


def test_another_attention_is_refused_with_the_name_to_load() -> None:
    """sdpa would attend over a shard alone, from the beginning or between two forwards."""
    with pytest.raises(ValueError, match=r"'sdpa'.*set_attn_implementation\('ring_attn'\)"):
        rf.SequenceParallel(models.build(models.tiny("llama"), "sdpa"), (0, 1))
    model = built()
    wrapped = rf.SequenceParallel(model, (0, 1))
    wrapped(input_ids=IDS)
    model.set_attn_implementation("sdpa")  # to decode in between
    with pytest.raises(ValueError, match="attends with 'sdpa'"):
        wrapped(input_ids=IDS)


def test_a_bare_call_after_a_forward_that_failed_is_refused() -> None:
    """Layers that still knew the sharding would attend over a ring that nobody else is on."""
    model = built()
    with pytest.raises(IndexError):
        rf.SequenceParallel(model, (0, 1))(input_ids=IDS + 10**6)
    with pytest.raises(ValueError, match="does not know how its sequence is spread"):
        model(input_ids=IDS)


def test_layers_that_attend_by_themselves_are_noticed_in_the_first_forward() -> None:
    """A layer that never calls ring_attn, and a window that its layer does not mention, would be silently wrong."""
    model = built()
    del model.model.layers[1]
    with pytest.raises(ValueError, match="2 layers called ring_attn 1 times"):
        rf.SequenceParallel(model, (0, 1))(input_ids=IDS)
    model = built("phimoe", sliding_window=24)
    with pytest.raises(ValueError, match="phimoe models with a sliding window"):
        rf.SequenceParallel(model, (0, 1))(input_ids=IDS)


def test_a_layer_that_looks_both_ways_needs_another_mask() -> None:
    """An encoder under a causal mask would be silently causal; under rf.full it is right, with targets for each position."""
    sizes = models.tiny("bert").to_dict() | {"is_decoder": False}
    torch.manual_seed(0)
    model = BertForMaskedLM._from_config(BertConfig.from_dict(sizes), attn_implementation="ring_attn").double().eval()
    with pytest.raises(ValueError, match=r"both directions.*mask=rf\.full"):
        rf.SequenceParallel(model, (0, 1))(input_ids=IDS)
    wrapped = rf.SequenceParallel(model, (0, 1), mask=rf.full)
    with pytest.raises(ValueError, match="does not shift them; pass shift_labels"):
        wrapped(input_ids=IDS, labels=IDS)
    loss = wrapped(input_ids=IDS, shift_labels=IDS).loss
    model.set_attn_implementation("sdpa")
    assert loss.item() == pytest.approx(model(input_ids=IDS, labels=IDS).loss.item(), rel=1e-10)


OFFSETS = torch.tensor([0, 30, LENGTH])


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"use_cache": True}, "use_cache=True.*decode with an unwrapped model"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"output_attentions": True}, "output_attentions"),
        ({"logits_to_keep": 1}, "logits_to_keep.*loss_tile"),
        ({"output_router_logits": True}, "no sum over tokens"),
        ({"return_dict": False}, "return_dict"),
        ({"attention_mask": torch.ones(2, 1, LENGTH, LENGTH)}, "attention_mask is .*mask=rf.causal"),
        ({"attention_mask": PADDED, "position_ids": PACKED}, "restart between tokens.*leave"),
        ({"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS}, "one packed row"),
        ({"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS + 1}, "differ"),
        ({"input_ids": IDS[:1], "cu_seq_lens_q": OFFSETS, "attention_mask": PADDED[:1]}, "packed row has no padding"),
        ({"mm_token_type_ids": IDS}, "mm_token_type_ids"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_inputs_that_a_shard_cannot_answer_are_refused(inputs: dict[str, Any], reason: str) -> None:
    """Each names the model type or the input, and what to do."""
    with pytest.raises(ValueError, match=reason):
        rf.SequenceParallel(MIXTRAL, (0, 1))(**{"input_ids": IDS} | inputs)


MIXTRAL = built("mixtral")


def test_positions_that_a_model_counts_from_images_are_needed() -> None:
    """get_rope_index sees the whole sequence, a rank its shard alone; from a loader no less."""
    model = built()
    model.get_rope_index = lambda: None
    wrapped = rf.SequenceParallel(model, (0, 1))
    for inputs in (BATCH, {"input_ids": IDS, "sharding": rf.Sharding(LENGTH, (0, 1))}):
        with pytest.raises(ValueError, match=r"from model\.get_rope_index"):
            wrapped(**inputs)


def test_padding_from_which_a_model_counts_positions_needs_them() -> None:
    """OPT counts over attention_mask, which no rank has; with position_ids it is right."""
    with pytest.raises(ValueError, match="opt counts positions over attention_mask"):
        rf.SequenceParallel(built("opt"), (0, 1))(input_ids=IDS, attention_mask=PADDED)


def test_ranks_of_a_sequence_with_different_batches_are_noticed() -> None:
    """A Trainer whose loader deals out rows to every rank would train on a mixture of two sequences, without an error."""
    model = built()

    def one_rank(group: Any) -> None:
        mine = copy.deepcopy(model)
        around = _Around(Spread(mine, group, rf.causal, engine=True), None)
        around.enter(mine.eval(), (), {"input_ids": IDS})
        around.enter(mine.train(), (), {"input_ids": IDS + group.rank})

    with pytest.raises(ValueError, match=r"different batches.*dispatch_batches"):
        rf.local_world(2).run(one_rank)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import error that a user can act on."""
    for name in [name for name in sys.modules if name.startswith("ringflash.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs Transformers 5 or newer: pip install 'ringflash\[transformers\]'"):
        importlib.import_module("ringflash.integrations.transformers")
    with pytest.raises(ImportError, match=r"Torch 99 or newer, and finds .*ringflash\[train\]"):
        require("torch", "train", "99")
