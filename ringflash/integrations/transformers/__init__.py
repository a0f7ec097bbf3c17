"""Models of Hugging Face Transformers, on a sequence that is spread over ranks.

    import ringflash as rf, ringflash.integrations.transformers           # registers "ring_attn"

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="ring_attn")
    model = rf.SequenceParallel(model, group)
    loss = model(input_ids=ids, labels=ids).loss

No model is changed. Transformers asks a table for the attention function of a name, and this import writes one there
(``attention``). What else a model computes from the whole sequence (packed documents, positions, frequencies that
depend on the longest position) is told to it around its forward (``adapter``), and a model that cannot be right is refused
by name (``refusals``). ``shard_trainer`` does the same inside a ``Trainer``, and ``check`` compares with one process.
"""

from ringflash.integrations import require

require("transformers", "transformers", "5")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

from ringflash.integrations.transformers.adapter import find  # noqa: E402
from ringflash.integrations.transformers.attention import NAME, no_mask, ring_attn  # noqa: E402
from ringflash.integrations.transformers.check import Agreement, check  # noqa: E402
from ringflash.integrations.transformers.refusals import refusal  # noqa: E402
from ringflash.integrations.transformers.trainer import shard_trainer  # noqa: E402
from ringflash.spread import ADAPTERS  # noqa: E402

AttentionInterface.register(NAME, ring_attn)
AttentionMaskInterface.register(NAME, no_mask)
if find not in ADAPTERS:
    ADAPTERS.append(find)

__all__ = ["Agreement", "check", "refusal", "shard_trainer"]
