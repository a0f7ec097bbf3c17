"""The function that Transformers calls for ``attn_implementation="ring_attn"``, and what it is told about the forward.

    model.forward ... LlamaAttention.forward(x)
                          q, k, v [b, heads, s, d]   ->   ring_attn(self, q, k, v, ...)   ->   out [b, s, heads, d]
                                                              |
                          self.ringflash_told  ---------------+   one Told for all layers of a model

What changes from batch to batch is an attribute of a module, and never built while a graph is captured: so twenty batches
of other documents are other inputs of one graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ringflash.attention import ring_attention
from ringflash.mask import window
from ringflash.shard import Sharding

NAME = "ring_attn"  # Transformers takes any name that contains "flash" for one of its own

TOLD = "ringflash_told"

# What Transformers hands on to every layer, and attention has no use for: the mask of the sharding says it all.
IDLE = frozenset(
    (
        *("position_ids", "use_cache", "num_items_in_batch", "labels", "shift_labels", "output_router_logits"),
        *("output_attentions", "output_hidden_states", "return_dict", "logits_to_keep", "layer_idx", "cache_position"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "past_key_values", "token_type_ids"),
    )
)


MASKS: set[tuple[int, bool]] = set()
"""Which configs, by id, have asked for a mask since somebody last looked, and whether it was one of a sliding window."""


@dataclass
class Told:
    """What all attention layers of one model know of the forward that is under way."""

    sharding: Sharding | None = None
    narrowed: dict[int, Sharding] = field(default_factory=dict)
    """The sharding under each sliding window, by its number of tokens."""
    last: Tensor | None = None
    """The greatest position of the whole sequence, 0-dim; None where no layer asks."""
    seed: Tensor | None = None
    """For attention dropout, int64 0-dim on the CPU, equal on all ranks; None where nothing is dropped."""
    windows: set[int] = field(default_factory=set)
    """The sliding windows of the model's layers."""
    calls: int = 0
    windowed_calls: int = 0

    def of(self, sliding_window: int | None) -> Sharding:
        """The sharding for a layer, narrowed to its window: a query sees itself and ``sliding_window - 1`` keys before."""
        s = self.sharding
        assert s is not None
        if sliding_window is None:
            return s
        narrowed = self.narrowed.get(sliding_window)
        if narrowed is None:  # a window that stands neither in the config nor in a module
            self.windows.add(sliding_window)
            narrowed = self.narrowed[sliding_window] = narrow(s, sliding_window)
        return narrowed

    def clear(self) -> None:
        """The forward is over; what was counted stays."""
        self.sharding, self.narrowed, self.last, self.seed = None, {}, None, None

    def __reduce__(self) -> tuple[Any, ...]:
        return Told, ()  # a copy of a model is told anew


def narrow(s: Sharding, sliding_window: int) -> Sharding:
    return s.with_mask(s.mask & window(sliding_window - 1, 0))


def ring_attn(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over the ring: ``query [b, h, s, d]``, ``key [b, h_kv, s, d]``, ``value [b, h_kv, s, d_v]``.

    Returns ``[b, s, h, d_v]`` and no weights. Raises ``ValueError``, on all ranks, for what a ring cannot give.
    """
    told = vars(module).get(TOLD)
    if told is None or told.sharding is None:
        raise ValueError(
            f"{NAME}: {type(module).__name__} does not know how its sequence is spread; wrap the model, on one device too: "
            "model = rf.SequenceParallel(model, group), or shard_trainer(trainer, mesh) for a Trainer"
        )
    _check(module, query, key, attention_mask, rest)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    s: Sharding = told.of(sliding_window)
    if not causal and s.mask.right == 0:
        raise ValueError(
            f"{NAME}: {type(module).__name__} attends in both directions, and the mask is {told.sharding.mask}; pass "
            "rf.SequenceParallel(model, group, mask=rf.full). A sliding window in both directions is not supported"
        )
    if not torch.compiler.is_compiling():
        told.calls += 1
        told.windowed_calls += sliding_window is not None
    if not dropout:
        seed = None
    elif told.seed is not None:
        seed = told.seed + vars(module)["ringflash_layer"]
    else:
        raise ValueError(
            f"{NAME}: {type(module).__name__} drops attention weights, which its config did not say when the model was "
            "wrapped, or does not train; set attention_dropout in the config, and wrap the model again"
        )
    out = ring_attention(
        _autocast(query).transpose(1, 2),
        _autocast(key).transpose(1, 2),
        _autocast(value).transpose(1, 2),
        s,
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
        seed=seed,
    )
    return out, None


def _autocast(x: Tensor) -> Tensor:
    """As torch.autocast has it for PyTorch's own attention: rotation leaves queries and keys wider than values."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _check(module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, rest: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise ValueError(
            f"{NAME}: {type(module).__name__} was given an attention_mask of shape {tuple(attention_mask.shape)}, which the "
            "model made itself; a mask over a spread sequence is said to rf.SequenceParallel: mask=rf.causal & ..."
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{NAME}: {type(module).__name__} has {query.shape[2]} queries and {key.shape[2]} keys; caches and cross-attention "
            "are not spread over ranks: pass use_cache=False"
        )
    unknown = sorted(name for name, given in rest.items() if given is not None and name not in IDLE)
    if unknown:
        raise ValueError(
            f"{NAME}: {type(module).__name__} passes {', '.join(unknown)} to its attention, which would be ignored here"
        )


def no_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: Any = None,
    config: Any = None,
    local_size: int | None = None,
    **rest: Any,
) -> None:
    """Build no mask: that of the sharding holds. What a model lays over it would be lost, and is refused."""
    kind = getattr(config, "model_type", "the model")
    if not torch.compiler.is_compiling():
        MASKS.add((id(config), local_size is not None))
    if rest.get("use_vmap") or getattr(mask_function, "__qualname__", "").startswith("or_masks"):
        raise ValueError(
            f"{NAME}: {kind} lays a mask of its own over the causal one (tokens of an image that see each other, a prefix), "
            "which would be lost; if all tokens are text, leave token types out"
        )
    if attention_mask is not None:
        raise ValueError(
            f"{NAME}: {kind} has an attention_mask of shape {tuple(attention_mask.shape)} inside, which would be lost; wrap "
            "the model, and rf.SequenceParallel takes padding from the whole batch. If it is wrapped, it made this mask itself"
        )
