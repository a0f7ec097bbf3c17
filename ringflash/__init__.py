"""ringflash: exact attention over sequences too long for one GPU.

    import ringflash as rf

    s = rf.Sharding(length, group, mask=rf.causal)       # built by every rank alone
    out = rf.ring_attention(q, k, v, s)                  # q, k, v: this rank's shards, [batch, seq, heads, head_dim]

Masks and layouts are values, plans are derived from them, and attention is a sum of partial results that can be taken in
any order. ``docs/design.md`` tells the rest.
"""

from ringflash import data
from ringflash.attention import flash_attention, ring_attention
from ringflash.checkpointing import keep_attention, keep_attention_on_cpu
from ringflash.errors import (
    DeadlockError,
    DisagreementError,
    IntegrityError,
    NonFiniteError,
    PeerError,
    PlanError,
    RingflashError,
    WireError,
)
from ringflash.forecast.cost import estimate
from ringflash.layout import Layout
from ringflash.local import local_world
from ringflash.mask import Mask, causal, chunks, documents, full, prefix, window
from ringflash.modules import RingAttention
from ringflash.partial import Partial, merge, sink
from ringflash.plan import Plan
from ringflash.route import direct, double_ring
from ringflash.sequence_parallel import SequenceParallel
from ringflash.shard import Sharding, plan, plans
from ringflash.tiling import Tiled, tile_modules, tiled_cross_entropy
from ringflash.verify import verify
from ringflash.views.draw import draw
from ringflash.views.trace import trace

__version__ = "0.1.0"

__all__ = [
    "DeadlockError",
    "DisagreementError",
    "IntegrityError",
    "Layout",
    "Mask",
    "NonFiniteError",
    "Partial",
    "PeerError",
    "Plan",
    "PlanError",
    "RingAttention",
    "RingflashError",
    "SequenceParallel",
    "Sharding",
    "Tiled",
    "WireError",
    "causal",
    "chunks",
    "data",
    "direct",
    "documents",
    "double_ring",
    "draw",
    "estimate",
    "flash_attention",
    "full",
    "keep_attention",
    "keep_attention_on_cpu",
    "local_world",
    "merge",
    "plan",
    "plans",
    "prefix",
    "ring_attention",
    "sink",
    "tile_modules",
    "tiled_cross_entropy",
    "trace",
    "verify",
    "window",
]
