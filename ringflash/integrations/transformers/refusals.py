"""Models and inputs that would be silently wrong on a spread sequence, each with its reason.

Attention is the only layer that a ring makes whole again. So a model is refused if any other layer mixes tokens (linear
attention, convolutions), if its attention is not the one that Transformers' interface describes (chunks, indices of chosen
keys), if it never asks the interface, or if it takes positions from somewhere else than ``position_ids``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SUPPORTED_LAYERS = ("full_attention", "sliding_attention")

LAYERS = "its layers include {}, which mix tokens in a way that a ring does not know"

LATER = "decode with an unwrapped model and attn_implementation='sdpa'; a cache over shards does not exist yet"

INPUTS = {
    "past_key_values": f"a cache is not spread over ranks: {LATER}",
    "encoder_hidden_states": "cross-attention to an encoder is not supported",
    "encoder_attention_mask": "cross-attention to an encoder is not supported",
    "head_mask": "the ring knows no mask of heads",
    "block_sequence_ids": "the ring knows no blocks that see themselves; pass mask=",
    "mm_token_type_ids": "tokens of an image may see each other, which the ring does not know; leave it out, or pass mask=",
}
POOLED = ("ForSequenceClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")
MEDIA = ("pixel_values", "input_features", "input_values", "image", "video", "audio")


def refusal(model: PreTrainedModel) -> str | None:
    """Why this model cannot run on a spread sequence; None if nothing is known against it. The reason starts its sentence."""
    config = text_config(model)
    layers = sorted(set(getattr(config, "layer_types", None) or ()) - set(SUPPORTED_LAYERS))
    if layers:
        return LAYERS.format(", ".join(layers))
    if type(model).__name__.endswith(POOLED):
        return "it answers once for a whole sequence, from a token that one rank alone holds"
    if model.config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        return "it is an encoder-decoder, whose cross-attention has keys of another sequence"
    code = sources(model)
    if code and not any("ALL_ATTENTION_FUNCTIONS" in text for text in code):
        return "it computes attention without asking Transformers' attention interface"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return "its forward takes no position_ids, so each rank would count positions from 0"
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()):
        return "it makes positions from input_ids by a rule of its own, counting each rank's shard from its beginning"
    return None


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the part that reads text; the model's own where it reads nothing else."""
    config = model.config
    found: PreTrainedConfig = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    return found


def sources(model: PreTrainedModel) -> list[str]:
    """The source of every Python module that defines one of the model's own layers, as far as it can be read."""
    names = {type(module).__module__ for module in model.modules()}
    names = {name for name in names if not name.startswith("torch.")}
    return [text for name in sorted(names) if (text := _source(name))]


def _source(name: str) -> str:
    try:
        return inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):
        return ""


def refuse_towers(model: PreTrainedModel, implementation: str) -> None:
    """An encoder of images beside the text model must not attend over the ring: its tokens are not the sequence."""
    config = text_config(model)
    if config is model.config:
        return
    for name, module in model.named_modules():
        other = isinstance(module, PreTrainedModel) and all(module.config is not c for c in (config, model.config))
        if other and module.config._attn_implementation == implementation:
            raise ValueError(
                f"SequenceParallel: {name} of {type(model).__name__} ({module.config.model_type}) got {implementation} too, "
                f"and its tokens are not those of the sequence; pass attn_implementation={{'text_config': {implementation!r}, "
                "'vision_config': 'sdpa'}, with one entry for every other part"
            )


def refuse_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for an input that asks for what a spread sequence cannot give; all ranks pass the same."""
    kind = model.config.model_type

    def refuse(name: str, why: str) -> None:
        raise ValueError(f"SequenceParallel: {kind} was given {name}; {why}")

    for name, value in inputs.items():
        if value is None:
            continue
        if name in INPUTS:
            refuse(name, INPUTS[name])
        if name.startswith(MEDIA):
            refuse(
                name,
                "which token it belongs to is not known to a shard; merge its embeddings with those of the text first, and "
                "pass inputs_embeds of the whole sequence",
            )
    if inputs.get("use_cache"):
        refuse("use_cache=True", INPUTS["past_key_values"])
    if inputs.get("output_attentions") or getattr(text_config(model), "output_attentions", False):
        refuse("output_attentions=True", "no rank ever holds the weights")
    if not (model.config.return_dict if inputs.get("return_dict") is None else inputs["return_dict"]):
        refuse("return_dict=False", "logits are found by their name")
    kept = inputs.get("logits_to_keep")
    if kept is not None and (not isinstance(kept, int) or kept):
        refuse("logits_to_keep", "it would be counted from the end of each rank's shard; use loss_tile= to save memory")
    routed = inputs.get("output_router_logits")
    if getattr(text_config(model), "output_router_logits", False) if routed is None else routed:
        refuse(
            "output_router_logits=True",
            "the balancing loss of experts is no sum over tokens, so shards give another one; switch it off in the call, or "
            "in the config",
        )
    takes_labels = (
        "labels" in inspect.signature(type(model).forward).parameters
    )  # else they are those of a module around it
    if inputs.get("labels") is not None and takes_labels and not shifts_labels(model):
        refuse(
            "labels",
            f"the loss of {type(model).__name__} does not shift them; pass shift_labels, one target for each position",
        )


def shifts_labels(model: PreTrainedModel) -> bool:
    """Does the model's own loss compare position i with label i + 1?"""
    loss = vars(model).get("_loss_function", LOSS_MAPPING.get(getattr(model, "loss_type", None)))
    return loss is ForCausalLMLoss or type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
