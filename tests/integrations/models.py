"""Every causal language model of the installed Transformers that can be built tiny: right on a spread sequence, or refused.

    python tests/integrations/models.py --write docs/models.md        # all of them, some minutes
    python tests/integrations/models.py llama gpt_oss                 # these, with their figures

A tiny model with random weights in float64 runs a batch on one device with its own eager attention, and over 1 rank and 2
ranks of a local world, zigzag and contiguous: logits and raw gradients must agree to 1e-5 of the largest (norms and
routers of many models compute in float32 all the same). What is refused is refused by the library; a model that neither
agrees nor is refused fails the run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import ringflash as rf
import ringflash.integrations.transformers as integration
from ringflash.integrations.transformers.refusals import LAYERS

TOLERANCE = 1e-5

SIZES: dict[str, Any] = dict(
    vocab_size=97,
    vocab_size_per_layer_input=97,
    hidden_size=64,
    n_embd=64,
    d_model=64,
    word_embed_proj_dim=64,
    embedding_size=64,
    hidden_size_per_layer_input=8,
    intermediate_size=96,
    ffn_dim=96,
    n_inner=96,
    dff=96,
    ffn_hidden_size=96,
    intermediate_size_mlp=96,
    mlp_hidden_size=96,
    num_hidden_layers=2,
    n_layer=2,
    n_layers=2,
    num_layers=2,
    decoder_layers=2,
    encoder_layers=2,
    num_attention_heads=4,
    n_head=4,
    n_heads=4,
    decoder_attention_heads=4,
    encoder_attention_heads=4,
    num_key_value_heads=2,
    num_kv_heads=2,
    head_dim=16,
    global_head_dim=16,
    kv_channels=16,
    attention_head_dim=16,
    max_position_embeddings=512,
    n_positions=512,
    n_ctx=512,
    initializer_range=0.2,
    init_std=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    sliding_window=24,
    query_pre_attn_scalar=16,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    num_experts_per_token=2,
    moe_k=2,
    n_shared_experts=1,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    moe_ffn_hidden_size=32,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    num_dense_layers=1,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    qk_head_dim=24,
    v_head_dim=12,
    router_jitter_noise=0.0,
    num_kv_shared_layers=0,
    output_router_logits=False,
    is_decoder=True,
)
# What a config's defaults do not survive when they are shrunk.
SPECIAL: dict[str, dict[str, Any]] = {
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, attn_pdrop=0.0),
        ffn_config=dict(ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2),
        resid_pdrop=0.0,
        emb_pdrop=0.0,
    ),
    "lfm2_moe": dict(layer_types=["full_attention"] * 2),
    "zaya": dict(num_experts_per_tok=1),
}


# What the library says of tensors that it met in a forward, as a sentence about a type of models.
OWN_MASKS = {
    "lays a mask of its own": "it lays a mask of its own over the causal one (tokens of an image that see each other)",
    "an attention_mask of shape": "it makes an attention mask of its own, of which a shard sees one part alone",
}


class Verdict(NamedTuple):
    """What became of one architecture."""

    name: str
    outcome: str
    """"supported", "refused", "not built", "wrong"."""
    note: str


def names() -> list[str]:
    """The model types of all causal language models that Transformers has."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(name: str, **changes: Any) -> PretrainedConfig:
    """The config of a model type with two small layers (more where it mixes more kinds), and nothing that drops."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    wanted = {**_shrunk(default), **SPECIAL.get(name, {}), **changes}
    for part in getattr(default, "sub_configs", {}):
        inner = getattr(default, part, None)
        if isinstance(inner, PretrainedConfig) and part not in wanted:
            wanted[part] = _shrunk(inner)
    return kind(**wanted)


def build(config: PretrainedConfig, attention: str = "ring_attn") -> PreTrainedModel:
    """The model with random weights from one seed, in float64. Parts that read no text keep Transformers' own attention."""
    torch.manual_seed(0)
    parts = {part: attention if part == "text_config" else "eager" for part in config.sub_configs}
    asked = {"": attention, **parts} if "text_config" in parts else attention
    model = AutoModelForCausalLM.from_config(config, attn_implementation=asked)
    with contextlib.suppress(Exception):  # grouped products are not there in float64
        model.set_experts_implementation("eager")
    return model.double().eval()


def judge(name: str) -> Verdict:
    """Build one architecture, and compare it with one device."""
    try:
        model = build(tiny(name))
    except KeyError as error:
        if error.args == ("ring_attn",):
            return Verdict(
                name, "refused", "it chooses among attentions of its own, and Transformers cannot give it another"
            )
        return _not_built(name, error)
    except Exception as error:
        return _not_built(name, error)
    with wide_softmax():
        try:
            figures = list(_figures(model))
        except ValueError as error:
            text = str(error).splitlines()[0]
            if "differs from one device" in text:
                return Verdict(name, "wrong", text)
            reason = next((why for words, why in OWN_MASKS.items() if words in text), text.split("not supported: ")[-1])
            return Verdict(name, "refused", reason)
        except Exception as error:
            try:
                copy.deepcopy(model).set_attn_implementation("eager")
                model(**batch(), use_cache=False)
            except Exception:
                return _not_built(name, error)
            return Verdict(name, "wrong", f"{type(error).__name__}: {error}".splitlines()[0])
        with contextlib.suppress(ValueError):
            blind = integration.check(model, (0, 1), batch(), tolerance=100 * TOLERANCE, mask=rf.window(0, 0))
            return Verdict(name, "wrong", f"the comparison does not notice that tokens see themselves alone: {blind}")
    return Verdict(name, "supported", f"{max(figures):.0e}")


def _not_built(name: str, error: Exception) -> Verdict:
    """Some kinds of layers are refused whatever else is in the config."""
    with contextlib.suppress(Exception):
        layers = set(CONFIG_MAPPING[name]().get_text_config().layer_types) - {"full_attention", "sliding_attention"}
        if layers:
            return Verdict(name, "refused", LAYERS.format(", ".join(sorted(layers))))
    return Verdict(name, "not built", f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(": "))


def batch() -> dict[str, Tensor]:
    """Two rows of 96 tokens, the first without targets for its first 40."""
    ids = torch.randint(3, 97, (2, 96), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :40] = -100
    return {"input_ids": ids, "labels": labels}


@contextlib.contextmanager
def wide_softmax() -> Iterator[None]:
    """Eager attention takes its softmax in float32; here it stays in float64, so that rounding hides nothing."""
    narrow = F.softmax

    def wide(x: Tensor, dim: int | None = None, *rest: Any, dtype: torch.dtype | None = None) -> Tensor:
        return narrow(x, dim, dtype=None if x.dtype == torch.float64 else dtype)

    F.softmax = wide
    try:
        yield
    finally:
        F.softmax = narrow


def _figures(model: PreTrainedModel) -> Iterator[float]:
    yield integration.check(model, (0, 1), batch(), tolerance=TOLERANCE).worst
    for layout in ("zigzag", "contiguous"):
        yield from rf.local_world(2).run(_one_rank, model, layout)


def _one_rank(group: Any, model: PreTrainedModel, layout: str) -> float:
    return integration.check(model, group, batch(), tolerance=TOLERANCE, layout=layout).worst


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    known = config.to_dict()
    wanted = {name: value for name, value in SIZES.items() if name in known or name in config.attribute_map}
    wanted |= {name: 0.0 for name, value in known.items() if "drop" in name and isinstance(value, float)}
    if known.get("sliding_window") is None:
        wanted.pop("sliding_window", None)
    if "qk_rope_head_dim" in known:  # multi-head latent attention
        wanted |= {"num_key_value_heads": 4, **({"head_dim": 8} if "head_dim" in known else {})}
    types = known.get("layer_types")
    if types:
        kinds = list(dict.fromkeys(types))
        wanted["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        wanted["num_hidden_layers"] = len(wanted["layer_types"])
    return wanted


def page(verdicts: list[Verdict]) -> str:
    """docs/models.md."""
    of = {outcome: [v for v in verdicts if v.outcome == outcome] for outcome in ("supported", "refused", "not built")}
    reasons: dict[str, list[str]] = {}
    for verdict in of["refused"]:
        reasons.setdefault(verdict.note, []).append(verdict.name)
    refused = "\n".join(
        f"| {reason} | {', '.join(found)} |"
        for reason, found in sorted(reasons.items(), key=lambda x: (-len(x[1]), x[0]))
    )
    counts = ", ".join(f"{len(found)} {outcome}" for outcome, found in of.items())
    return PAGE.format(
        version=transformers.__version__,
        all=len(verdicts),
        counts=counts,
        supported="\n".join(textwrap.wrap(", ".join(v.name for v in of["supported"]), 120, break_on_hyphens=False)),
        refused=refused,
        unbuilt=", ".join(v.name for v in of["not built"]),
    )


PAGE = """\
# Models of Transformers

Written by `python tests/integrations/models.py --write docs/models.md` with Transformers {version}; `make test-slow`
runs it again and fails if this page no longer holds.

Of {all} model types with a causal language model: {counts}.

```python
import ringflash as rf, ringflash.integrations.transformers          # registers "ring_attn"

model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="ring_attn")
model = rf.SequenceParallel(model, group)
loss = model(input_ids=ids, labels=ids).loss
```

**Supported** means: a model of that type with two small layers (more where it mixes more kinds) and random weights, in
float64, has the logits and raw gradients of one process with Transformers' own eager attention, to 1e-5 of the largest, on
1 rank and on 2, zigzag and contiguous; and the same comparison finds the error if every token sees itself alone. Your
own weights and config can be compared in the same way: `ringflash.integrations.transformers.check(model, group)`.

{supported}

Layers are what decides, not names: `layer_types` other than `full_attention` and `sliding_attention` are refused in any
model, and so are heads that answer once for a whole sequence (`...ForSequenceClassification`). Models of images and text
take embeddings that are merged already (`inputs_embeds`, of the whole sequence), with
`attn_implementation={{"text_config": "ring_attn", "vision_config": "sdpa"}}`.

What follows from a sequence in parts: attention dropout falls on the same weights for any number of ranks, while other
dropout (of hidden states) is drawn by each rank for its own tokens. The target of a row's first real token after left
padding should be -100: it is predicted from padding, in Transformers too. With positions that restart and no `attention_mask`,
documents are packed, as Transformers has it; `cu_seq_lens_q` and `cu_seq_lens_k` say the same. Packed documents never see
each other here; in Transformers' eager attention some do (GPT-OSS), and `check` with a packed batch then reports a difference.

**Refused**, by name and with the reason, when the model is wrapped or in its first forward:

| reason | model types |
|---|---|
{refused}

**Not judged**, because no small model could be built from the config alone: {unbuilt}.
"""


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    verdicts = []
    for name in given.names or names():
        verdicts.append(judge(name))
        print(*verdicts[-1], sep="  ", flush=True)
    if given.write and not any(v.outcome == "wrong" for v in verdicts):
        given.write.write_text(page(verdicts))
    return any(verdict.outcome == "wrong" for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
