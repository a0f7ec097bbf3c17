"""What a transformer needs in memory while it trains, and the longest context that fits.

    of the model, split over ranks by ZeRO or FSDP        of every token, split over ranks by the ring
    weights    2 bytes a parameter (bf16)                  what each layer keeps for its backward
    gradients  2                                           what one layer needs while its backward runs
    optimizer  12  (AdamW: float32 weights, two moments)   what attention has in flight
                                                           logits

16 bytes a parameter: Rajbhandari et al. 2019 (ZeRO, arXiv 1910.02054), section 3. Bytes of a token are counted as in
Korthikanti et al. 2022 (arXiv 2205.05198), section 4, for a layer of the Llama family with flash attention: no scores, no
dropout. All of it is a model: allocators lose something (``reserve``), and frameworks hold more or less than they must.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from ringflash.forecast.hardware import Hardware, load_hardware
from ringflash.forecast.workload import Workload
from ringflash.numbers import real, whole
from ringflash.units import spell_bytes, spell_tokens

HALF, WIDE = 2, 4  # bytes of a bf16 and of a float32 number
OPTIMIZER = 12  # bytes a parameter: AdamW's float32 weights, first and second moment
GRAIN = 1024  # contexts are rounded down to so many tokens

PARTS_IN_FLIGHT = 2.0
"""Shards of keys that a rank of a ring holds of others: the one it computes with and the next."""
TOTALS_IN_FLIGHT = 4.0
"""Shards of gradients: this rank's share, the total that comes, and those that left in this and the last step."""

LEVELS = ("none", "selective", "attention", "full")
"""Activation checkpointing, from what keeps most to what keeps least."""


@dataclass(frozen=True)
class Transformer:
    """A decoder of the Llama family: grouped-query attention, a gated MLP, RMSNorm, no biases.

    >>> f"{MODELS['llama3-8b'].parameters:,}"
    '8,030,261,248'
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab"):
            object.__setattr__(self, name, whole(getattr(self, name), f"Transformer: {name}", least=1))
        if self.heads % self.kv_heads:
            raise ValueError(f"Transformer: heads is {self.heads}, which is no multiple of kv_heads, {self.kv_heads}")

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, or of the head."""
        return self.vocab * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Of one layer: projections of attention, three matrices of the MLP, norms."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return attention + 3 * self.hidden * self.intermediate + norms

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.layers * self.layer_parameters + self.embedding_parameters * (2 - self.tied) + self.hidden

    def layer_bytes(self, checkpointing: str) -> int:
        """Bytes a token that one layer keeps between its forward and its backward, in bf16 and with a float32 lse.

        "none", with h = hidden and i = intermediate: inputs of both halves and their norms (8h), q, k, v and out (2 bytes of
        each element), lse, and gate, up, silu(gate) and the product (8i). "selective" computes the norms and what follows
        gate and up again: 4h + attention + 4i. "attention" keeps the layer's input, out and lse, so that no ring runs twice.
        "full" keeps the input: 2h.
        """
        h, i = self.hidden, self.intermediate
        out = self.heads * (HALF * self.head_dim + WIDE)
        attention = HALF * (self.heads + 2 * self.kv_heads) * self.head_dim + out
        return {
            "none": 8 * h + attention + 8 * i,
            "selective": 4 * h + attention + 4 * i,
            "attention": 2 * h + out,
            "full": 2 * h,
        }[checkpointing]

    def working_bytes(self, parts: float = 0.0, totals: float = 0.0) -> int:
        """Bytes a token that the backward of one layer needs for a while: in its MLP, or in its attention.

        MLP: gradients of its three inner tensors, of its input and output (6i + 4h). Attention: dout, delta, dq, dk and dv in
        float32, and so many shards of keys and of gradients in flight.
        """
        work = Workload(self.heads, self.kv_heads, self.head_dim, self.head_dim)
        attention = self.heads * (HALF * self.head_dim + WIDE) + WIDE * self.heads * self.head_dim + work.keys.home
        flying = ceil(parts * work.keys.onward + totals * work.keys.home)
        return max(6 * self.intermediate + 4 * self.hidden, attention + flying)


MODELS = {
    "llama3-8b": Transformer(32, 4096, 32, 8, 128, 14336, 128256),
    "llama3-70b": Transformer(80, 8192, 64, 8, 128, 28672, 128256),
    "llama3-405b": Transformer(126, 16384, 128, 8, 128, 53248, 128256),
    "qwen3-8b": Transformer(36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True),
    "qwen3-32b": Transformer(64, 5120, 64, 8, 128, 25600, 151936, qk_norm=True),
}
"""Published configurations."""


def find_model(name: str | Transformer) -> Transformer:
    """The model of that name; raises ``ValueError`` with the names that are known."""
    if isinstance(name, Transformer):
        return name
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"model is {name!r}; known are {', '.join(MODELS)}, or a Transformer of your own")
    return MODELS[name]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by what they are for."""

    terms: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def largest(self) -> str:
        """The term that takes most."""
        return max(self.terms, key=self.terms.__getitem__)

    def __str__(self) -> str:
        return f"{spell_bytes(self.total)}: " + ", ".join(f"{k} {spell_bytes(n)}" for k, n in self.terms.items() if n)


def memory(
    transformer: Transformer | str,
    tokens: int,
    *,
    gpus: int = 1,
    stage: int = 3,
    shards: int | None = None,
    checkpointing: str = "full",
    logits_chunk: int | None = 4096,
    parts: float = PARTS_IN_FLIGHT,
    totals: float = TOTALS_IN_FLIGHT,
) -> Memory:
    """Bytes of the fullest rank in a training step on ``tokens`` tokens, whose sequence a ring of all ``gpus`` shares.

    ``stage`` 0 to 3 of ZeRO splits nothing, the optimizer, gradients too, or weights too (3 is FSDP) over ``shards`` ranks
    (default: all). ``checkpointing`` is one of ``LEVELS``. Logits cost 10 bytes each (bf16, float32, gradient), at most
    ``logits_chunk`` tokens of them at a time; None makes all at once. ``parts`` and ``totals`` are in flight where there are
    several GPUs: keys and gradients, in multiples of those of one rank's tokens. The defaults are a plain ring's;
    ``holding.in_flight`` counts those of any plan, and all of a gather's are ``gpus``.
    """
    model = find_model(transformer)
    tokens, gpus = whole(tokens, "memory: tokens", least=0), whole(gpus, "memory: gpus", least=1)
    over = gpus if shards is None else whole(shards, "memory: shards", least=1)
    for name, multiple in (("parts", parts), ("totals", totals)):
        needed = "a finite number of shards from 0 is needed"
        if real(multiple, f"memory: {name}", needed) < 0:
            raise ValueError(f"memory: {name} is {multiple}; {needed}")
    if logits_chunk is not None:
        logits_chunk = whole(logits_chunk, "memory: logits_chunk", least=1)
    if stage not in range(4):
        raise ValueError(f"memory: stage is {stage!r}; ZeRO has the stages 0, 1, 2 and 3")
    if checkpointing not in LEVELS:
        raise ValueError(f"memory: checkpointing is {checkpointing!r}; accepted are {', '.join(LEVELS)}")
    held = -(-tokens // gpus)
    chunk = held if logits_chunk is None else min(held, logits_chunk)
    kept = model.layer_bytes(checkpointing)
    return Memory(
        {
            "weights": _split(HALF * model.parameters, over if stage == 3 else 1),
            "gradients": _split(HALF * model.parameters, over if stage >= 2 else 1),
            "optimizer": _split(OPTIMIZER * model.parameters, over if stage >= 1 else 1),
            "gathered weights": _gathered(model) if stage == 3 and over > 1 else 0,
            "activations kept": held * (model.layers * kept + 4 * model.hidden),
            "activations of one layer": held * (model.layer_bytes("none") - kept),
            "buffers of one layer": held * (model.working_bytes(parts, totals) if gpus > 1 else model.working_bytes()),
            "logits": chunk * model.vocab * (HALF + 2 * WIDE),
        }
    )


def _gathered(model: Transformer) -> int:
    """What FSDP holds whole for a while: the weights of its largest unit and of the next, and gradients of one."""
    largest = max(model.layer_parameters, model.embedding_parameters)
    return HALF * (largest + model.layer_parameters) + HALF * largest


@dataclass(frozen=True)
class Context:
    """The longest context that fits: ``tokens`` in all, what they need on each rank, and the term that limits."""

    tokens: int
    memory: Memory
    usable: int
    gpus: int

    def __int__(self) -> int:
        return self.tokens

    @property
    def limit(self) -> str:
        """The largest term; without any token, the one that leaves no room."""
        return self.memory.largest

    def __str__(self) -> str:
        found = f"{spell_tokens(self.tokens)} tokens" if self.tokens else "no context"
        used = f"of {spell_bytes(self.usable)} each {self.memory}"
        return f"{found} on {self.gpus} GPUs (a model), limited by {self.limit}; {used}"


def longest_context(
    transformer: Transformer | str, hardware: Hardware | str, gpus: int, *, reserve: float = 0.1, **options: Any
) -> Context:
    """The longest sequence that a ring of ``gpus`` can train on, a multiple of 1K tokens; 0 if not even the model fits.

    ``options`` are those of :func:`memory`; ``reserve`` is the share of the memory that the allocator, CUDA and NCCL take
    (assumed).

    >>> longest_context("llama3-8b", "h100", 8).limit
    'activations kept'
    """
    machine, model = load_hardware(hardware), find_model(transformer)
    share = "a share of the memory, from 0 to below 1, is needed"
    if not 0 <= real(reserve, "longest_context: reserve", share) < 1:
        raise ValueError(f"longest_context: reserve is {reserve}; {share}")
    usable = int(machine.memory * (1 - reserve))

    def needed(grains: int) -> Memory:
        return memory(model, grains * GRAIN, gpus=gpus, **options)

    fits, too_many = 0, 1
    while needed(too_many).total <= usable:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if needed(middle).total <= usable else (fits, middle)
    return Context(fits * GRAIN, needed(fits), usable, gpus)


def _split(count: int, ways: int) -> int:
    return -(-count // ways)
