"""The call signatures that people already have in their code, as thin adapters.

    - from flash_attn import flash_attn_func                        one device
    + from ringflash.compat.flash_attn import flash_attn_func

    - from ring_flash_attn import zigzag_ring_flash_attn_func       many ranks
    + from ringflash.compat.ring_flash_attn import zigzag_ring_flash_attn_func

Names, order and defaults of the arguments are theirs; the numbers are ours. Every argument is honoured or refused by name.
They are a way in, not a second interface: what one device gives on the whole sequence can be had from ``rf.ring_attention``
with fewer arguments, for any length, mask and layout. ``docs/migration.md`` has both, side by side.
"""

from ringflash.compat import flash_attn, ring_flash_attn

__all__ = ["flash_attn", "ring_flash_attn"]
