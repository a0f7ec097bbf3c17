"""What a Transformers model needs around its forward, so that nothing in it looks at one shard as if it were everything.

    prepare   whole inputs: refuse, find packed documents and padding, number positions     (then they are sharded)
    begin     tell all layers: the sharding, also under each window, the last position, the seed of dropout
    finish    after the first forward: did every layer attend over the ring?
    forget    in any case: layers know nothing any more

Layers are told through one object that all of them have, so that nothing is built while a graph is captured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ringflash.groups import address, connect_all
from ringflash.integrations.transformers.attention import MASKS, NAME, TOLD, Told, narrow
from ringflash.integrations.transformers.packing import documents_of, takes_positions_from_padding
from ringflash.integrations.transformers.refusals import (
    refusal,
    refuse_inputs,
    refuse_towers,
    sources,
    text_config,
)
from ringflash.integrations.transformers.rotary import asks_for_the_last_position, show_the_last_position
from ringflash.mask import Mask
from ringflash.shard import Sharding
from ringflash.spread import with_padding

WINDOWS = ("sliding_window", "sliding_window_size", "window_size", "attention_window")


def find(model: nn.Module, mask: Mask) -> TransformersModel | None:
    """The adapter of the outermost Transformers model in ``model`` (inside PEFT, DDP or torch.compile too), if there is one.

    Beside it there may be models that read no text (a tower of images).
    """
    found = _outermost(model)
    texts = [x for x in found if x.main_input_name == "input_ids"] or found
    if len(texts) > 1:
        kinds = " and ".join(x.config.model_type for x in texts)
        raise ValueError(
            f"SequenceParallel: {type(model).__name__} holds {len(texts)} Transformers models that read text ({kinds}); wrap "
            "each of them alone"
        )
    return TransformersModel(texts[0], model) if texts else None


class TransformersModel:
    """An ``Adapter`` (``ringflash.spread``) for ``model``. Raises ``ValueError``, naming model and reason, if it is refused."""

    head: nn.Module | None

    def __init__(self, model: PreTrainedModel, outer: nn.Module) -> None:
        kind, self.config = model.config.model_type, text_config(model)
        why = refusal(model)
        if why is not None:
            raise ValueError(f"SequenceParallel: {kind} models are not supported: {why}")
        self.model, self.head = model, model.get_output_embeddings()
        self._refuse_other_attention()
        refuse_towers(model, NAME)
        self._told = _tell_layers(model)
        self._told.windows |= _windows(model, self.config)
        self._rotary = [module for module in model.modules() if asks_for_the_last_position(module)]
        for module in self._rotary:
            show_the_last_position(module)
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.config in (model.config, self.config):
                _complete_inputs(module)
        self._counts_padding = takes_positions_from_padding(sources(model))
        self._last: Tensor | None = None
        self._drops = any("drop" in name and _positive(value) for name, value in self.config.to_dict().items())
        self._outer, self._checked = outer, False

    def tail(self, logits: Tensor) -> Tensor:
        """As Gemma, Cohere and Granite treat their logits."""
        cap, scale, divisor = (
            getattr(self.config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
        )
        if scale is not None:
            logits = logits * scale
        if divisor is not None:
            logits = logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def prepare(self, inputs: dict[str, Any], mask: Mask, length: int) -> Mask:
        """Packed documents and padding become part of the mask; positions are global.

        Documents cost one copy to the host, padding what ``with_padding`` does.
        """
        self._refuse(inputs)
        padding = inputs.pop("attention_mask", None)
        if padding is not None and not (isinstance(padding, Tensor) and padding.ndim == 2):
            came = tuple(padding.shape) if isinstance(padding, Tensor) else type(padding).__name__
            raise ValueError(
                f"SequenceParallel: attention_mask is {came}; [batch, length] with 0 for padding is needed. Other masks are "
                "given as mask=rf.causal & ..."
            )
        positions = inputs.get("position_ids")
        mask = documents_of(inputs, padding, mask, length)
        if padding is not None:
            whole, mask = mask, with_padding(mask, padding, length)
            if mask != whole and positions is None and self._counts_padding:
                raise ValueError(
                    f"SequenceParallel: {self.model.config.model_type} counts positions over attention_mask; with padding, "
                    "pass position_ids of the whole batch as well"
                )
        if self._rotary:
            self._last = torch.tensor(length - 1, device=self._device) if positions is None else positions.max()
        return mask

    def prepare_local(self, inputs: dict[str, Any], s: Sharding) -> None:
        """For inputs that are this rank's part already; the mask of ``s`` has documents and padding."""
        self._refuse(inputs)
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            if inputs.get(name) is not None:
                raise ValueError(
                    f"SequenceParallel: {name} was given with sharding; documents are in the mask of the sharding"
                )
            inputs.pop(name, None)
        positions: Tensor | None = inputs.get("position_ids")
        if self._rotary and positions is None:
            self._last = torch.tensor(s.length - 1, device=self._device)
        elif self._rotary and positions is not None:
            here = positions.max() if positions.numel() else positions.new_zeros(())
            self._last = torch.stack(connect_all(s.group).all_gather(here)).max()

    def begin(self, s: Sharding) -> Callable[[], None]:
        """Tell all layers. What is returned tells them the same again, until the backward that calls it is over."""
        told = self._told
        narrowed, last, seed = {tokens: narrow(s, tokens) for tokens in told.windows}, self._last, self._seed(s)

        def tell() -> None:
            told.sharding, told.narrowed, told.last, told.seed = s, narrowed, last, seed

        told.calls = told.windowed_calls = 0
        MASKS.difference_update([(id(self.config), True), (id(self.config), False)])
        tell()

        def again() -> None:
            tell()
            if torch._C._current_graph_task_id() >= 0:
                torch.autograd.Variable._execution_engine.queue_callback(told.clear)

        return again

    def finish(self, output: Any) -> None:
        """After the first forward: raise if a layer attended by itself, over this rank's shard alone."""
        captured = torch.compiler.is_compiling() or (not self._checked and _is_compiled(self._outer))
        if self._checked or captured:  # a captured graph counts nothing
            return
        types = getattr(self.config, "layer_types", None) or ["full_attention"] * self.config.num_hidden_layers
        layers = len(types)
        alone = (id(self.config), True) in MASKS and (id(self.config), False) not in MASKS
        windowed = layers if alone else types.count("sliding_attention")
        calls, kind = self._told.calls, self.model.config.model_type
        if calls < layers:
            raise ValueError(
                f"SequenceParallel: {kind} models are not supported: {layers} layers called {NAME} {calls} times, so some "
                "attend over this rank's shard alone"
            )
        if self._told.windowed_calls < windowed:
            raise ValueError(
                f"SequenceParallel: {kind} models with a sliding window are not supported: {windowed} layers have one, and "
                f"{self._told.windowed_calls} said so to {NAME}"
            )
        self._checked = True

    def forget(self) -> None:
        """Layers no longer know a sharding, so that a call of the bare model is refused."""
        self._told.clear()

    def _refuse(self, inputs: Mapping[str, Any]) -> None:
        self._refuse_other_attention()
        refuse_inputs(self.model, inputs)
        counts = hasattr(self.model, "get_rope_index") or hasattr(self.model.base_model, "get_rope_index")
        if counts and inputs.get("position_ids") is None:
            raise ValueError(
                f"SequenceParallel: {self.model.config.model_type} makes position_ids from images; pass those of the whole "
                "sequence, from model.get_rope_index"
            )

    def _refuse_other_attention(self) -> None:
        """In every forward: a user may call ``set_attn_implementation`` between two of them, to decode."""
        asked = self.config._attn_implementation
        if asked != NAME:
            raise ValueError(
                f"SequenceParallel: the {self.model.config.model_type} model attends with {asked!r}, over this rank's shard "
                f"alone; load it with attn_implementation={NAME!r}, or call model.set_attn_implementation({NAME!r})"
            )

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _seed(self, s: Sharding) -> Tensor | None:
        """The first rank's draw, for attention dropout: each weight is dropped or kept alike wherever it is computed."""
        if not (self._drops and self.model.training):
            return None
        drawn = torch.randint(1 << 40, (1,))  # on every rank, so that generators stay in step
        shared = (drawn if address(s.group)[0] == 0 else torch.zeros_like(drawn)).to(self._device)
        connect_all(s.group).all_reduce(shared)
        return shared.cpu()[0]


def _outermost(model: nn.Module) -> list[PreTrainedModel]:
    """The Transformers models in ``model`` that no other Transformers model holds."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in _outermost(child)]


def _complete_inputs(model: PreTrainedModel) -> None:
    """Hook a model, once: a module around it (a head of the user's own) may not say its positions, nor ``use_cache=False``."""
    if "ringflash_inputs" not in vars(model):
        vars(model)["ringflash_inputs"] = tuple(inspect.signature(type(model).forward).parameters)[1:]
        model.register_forward_pre_hook(_complete, with_kwargs=True)


def _complete(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    s, names = vars(model)[TOLD].sharding, vars(model)["ringflash_inputs"]
    if s is None:
        return None
    given = dict(zip(names, args, strict=False)) | kwargs
    if "use_cache" in names and given.get("use_cache") is None:
        given["use_cache"] = False
    if "position_ids" in names and given.get("position_ids") is None:
        device = next(x.device for x in given.values() if isinstance(x, Tensor))
        given["position_ids"] = s.positions.to(device)[None]
    return (), given


def _tell_layers(model: PreTrainedModel) -> Told:
    """One ``Told`` in every module that may attend. A model that is wrapped again keeps the one it has."""
    told: Told = vars(model).get(TOLD) or Told()
    for number, module in enumerate(model.modules()):
        if any(True for _ in module.children()) or asks_for_the_last_position(module):
            vars(module)[TOLD], vars(module)["ringflash_layer"] = told, number
    vars(model)["sharding"] = None
    return told


def _windows(model: PreTrainedModel, config: Any) -> set[int]:
    """The sliding windows that layers may ask for, so that a captured graph finds them made."""
    said = [getattr(config, name, None) for name in WINDOWS]
    said += [getattr(module, "sliding_window", None) for module in model.modules()]
    return {tokens for tokens in said if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens > 0}


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _is_compiled(model: nn.Module) -> bool:
    """Is all or some of the model captured, in one of the ways that people do it?"""
    return any(
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )
