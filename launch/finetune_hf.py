"""Fine-tune a Transformers model on packed text with ring attention, on one process or many.

    torchrun --nproc-per-node 2 launch/finetune_hf.py --check                        a small Qwen3 with random weights
    torchrun --nproc-per-node 8 launch/finetune_hf.py --model DIR --seq-length 131072 --engine fsdp
                                --checkpointing keep --loss-tile 4096                one that you have, and long samples
    torchrun --nproc-per-node 4 launch/finetune_hf.py --data 2 --engine deepspeed    2 x 2 ranks, ZeRO stage 2
    accelerate launch --multi_gpu --num_processes 2 launch/finetune_hf.py            another launcher

Three lines of it are ringflash: the import that registers ``ring_attn``, the model that is loaded with it, and the wrapper
around it. The rest is the loop of ``train.py``. At the end the model is in the folder of the run, as ``from_pretrained``
reads it, beside the checkpoints from which ``--resume`` goes on.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import ringflash as rf
from corpus import read_texts
from engines import Engine, blocks
from exactness_hf import prove
from finetune_options import FinetuneOptions, UsageError, parse
from loop import Run, attempt
from packed_text import BYTES, PackedText, Reader, read_as
from ranks import Ranks, finish, fit, start
from ringflash.checkpointing import keep_attention, keep_attention_on_cpu
from ringflash.tiling import tile_modules
from weights import spread

SMALL = dict(
    vocab_size=BYTES,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)
UNLIKE = ("transformers_version", "dtype", "architectures")  # in two configs of one model
CONTEXTS = {"full": None, "keep": keep_attention, "keep-cpu": keep_attention_on_cpu}


def main(options: FinetuneOptions) -> int:
    """One run from start to end; its last lines are the validation loss, the curve's file and the exactness.

    Returns the exit status: 0; 1 if the run was to be checked and is not exact, or its last checkpoint could not be written;
    75 if it was told to stop, and can go on.
    """
    config = _config(options)
    texts, reader = read_texts(options.text), read_as(options.model, config.get_text_config().vocab_size)
    options.check_against(fit(options.data, options.context))
    ranks = start(options.data, options.context, options.device, options.timeout)
    lesson = PackedText(texts, reader, options, ranks)
    verdict = "exactness: not checked (--check does)"
    if options.check:
        still = _without_dropout(config)
        exact, verdict = prove(ranks, options, lesson, lambda **how: _build(options, still, ranks, **how))
        ranks.say(verdict)
        if not exact:
            return 1
    torch.manual_seed(options.seed)
    wrapped = _build(options, config, ranks)
    ranks.say(
        f"text: {texts.source}, {len(texts.train):,} documents and {len(texts.validation):,} to validate on, "
        f"as {'bytes' if reader.tokenizer is None else 'tokens'}"
    )
    ranks.say(_describe(wrapped.module, options, ranks))
    run = Run(options, lesson, wrapped, ranks, _identity(config), {})
    status = run.train()
    if status:
        return status
    _save(options, config, run.engine, reader, ranks)
    return run.close(f"{config.model_type}: {options.seq_length} tokens over {ranks.context} ranks", verdict)


def _config(options: FinetuneOptions) -> Any:
    """The config of the saved model, or of a small one of the type that was asked for."""
    from transformers import AutoConfig

    import ringflash.integrations.transformers  # noqa: F401 - registers "ring_attn"

    try:
        if options.model is not None:
            config = AutoConfig.from_pretrained(options.model, local_files_only=True, trust_remote_code=False)
        else:
            config = AutoConfig.for_model(options.model_type, max_position_embeddings=options.seq_length, **SMALL)
    except (OSError, ValueError) as error:
        name = "--model-type" if options.model is None else "--model"
        raise UsageError(f"{name}: {str(error).splitlines()[0]}") from None
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    if heads is not None and heads % options.heads_degree:
        raise UsageError(f"--heads-degree {options.heads_degree} ranks cannot share the model's {heads} heads equally")
    return config


def _without_dropout(config: Any) -> Any:
    """The same model, of which nothing is left to chance: what is dropped on one grid is not on another."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(text, name, 0.0)
    return config


def _model(options: FinetuneOptions, config: Any, attention: str) -> Any:
    """The model with float32 weights: the saved ones, or random ones."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = copy.deepcopy(config)  # a model writes its attention there
    how = dict(attn_implementation=attention, dtype=torch.float32)
    try:
        if options.model is not None:
            return AutoModelForCausalLM.from_pretrained(
                options.model,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                **how,
            )  # neither code nor a pickle of whoever made the folder
        return AutoModelForCausalLM.from_config(config, **how)
    except (OSError, ValueError) as error:
        raise UsageError(f"{config.model_type}: {str(error).splitlines()[0]}") from None


def _build(
    options: FinetuneOptions, config: Any, ranks: Ranks, spread_over_ranks: bool = True, attention: str = "ring_attn"
) -> Any:
    """The model as the options want it, wrapped; without ``spread_over_ranks`` bare, as one process has it."""
    model = _model(options, config, attention).to(ranks.device)
    if not spread_over_ranks:
        return model
    if options.checkpointing != "none":
        context = CONTEXTS[options.checkpointing]
        more = {} if context is None else {"context_fn": context}
        old = model.gradient_checkpointing_enable  # its name in the first versions 5
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False, **more})
    if options.compile:
        for block in blocks(model):
            block.compile(dynamic=False)  # shards of all samples are of one size
    try:
        if options.mlp_tile is not None:
            tile_modules(model, "mlp", options.mlp_tile)
        return spread(model, ranks, rf.causal, options.placement, loss_tile=options.loss_tile)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _identity(config: Any) -> Mapping[str, Any]:
    """What tells one model from another: the fields of its config that differ from the defaults of its type."""
    fields = {name: value for name, value in config.to_diff_dict().items() if name not in UNLIKE}
    return {"model_type": config.model_type, **json.loads(json.dumps(fields, default=str))}


def _save(options: FinetuneOptions, config: Any, engine: Engine, reader: Reader, ranks: Ranks) -> None:
    """Write the model to ``model`` in the folder of the run, as ``from_pretrained`` reads it (every rank must call it)."""
    state = {name: value.to("cpu", copy=True) for name, value in engine.parameters() if ranks.first}
    ranks.once("the model", lambda: _write(options, config, engine, state, reader, ranks))


def _write(
    options: FinetuneOptions, config: Any, engine: Engine, state: dict[str, Any], reader: Reader, ranks: Ranks
) -> None:
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)  # Transformers may import DeepSpeed, which looks for one
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # the engine may have changed the class of the model; this one is as it was
        bare = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = {name for name, _ in engine.model.named_parameters(remove_duplicate=False)}  # tied ones are there once
    kept = {name: value for name, value in engine.model.state_dict().items() if name not in names}
    folder = options.out / "model"
    bare.save_pretrained(folder, state_dict={**kept, **state})
    if options.model is not None and not folder.samefile(options.model):
        for file in options.model.glob("generation_config.json"):
            shutil.copy(file, folder)
    if reader.tokenizer is not None:
        reader.tokenizer.save_pretrained(folder)
    ranks.say(f"model: {folder} (AutoModelForCausalLM.from_pretrained)")


def _describe(model: nn.Module, options: FinetuneOptions, ranks: Ranks) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"model: {type(model).__name__}, {parameters:,} parameters; step: {options.batch} x {options.seq_length} tokens; "
        f"{ranks.size} process(es) on {ranks.device.type}: data {ranks.data} x context {ranks.context}, "
        f"{options.engine_name}, checkpointing {options.checkpointing}; folder: {options.out}"
    )


if __name__ == "__main__":
    finish(attempt("finetune_hf.py", lambda: main(parse())))
