"""How closely ranks watch each other, as a value: four modes, each the one before and more.

    off       nothing is compared
    first     every new call signature and every new sharding, once, before anything of it is sent      (the default)
    always    every call; and every message carries 64 bytes that say what it is
    verify    every message carries a checksum; numbers are finite; gradients obey their laws; a hop is computed twice

A sharding has one (``check="always"``), and without it the environment decides (``RINGFLASH_CHECK``). All ranks must have
the same: the mode is itself among what they compare.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

Mode = Literal["off", "first", "always", "verify"]
VARIABLE = "RINGFLASH_CHECK"


@dataclass(frozen=True)
class Check:
    """What is checked, apart from arguments, which always are."""

    name: str
    compares: bool
    """Ranks compare what they are about to do, if it is new."""
    every_call: bool = False
    """They compare it if it is not new, too."""
    labels: bool = False
    """Messages say what they are."""
    numbers: bool = False
    """Numbers are looked at: this costs about as much as the attention of a short shard, and waits for the device."""

    def __str__(self) -> str:
        return self.name


MODES = {
    check.name: check
    for check in (
        Check("off", compares=False),
        Check("first", compares=True),
        Check("always", compares=True, every_call=True, labels=True),
        Check("verify", compares=True, every_call=True, labels=True, numbers=True),
    )
}


def settle(check: str | None) -> Check:
    """The check of this name; of None, the one that ``RINGFLASH_CHECK`` names, and "first" without it.

    >>> str(settle("always"))
    'always'
    """
    name = os.environ.get(VARIABLE, "first") if check is None else check
    if not isinstance(name, str) or name not in MODES:
        given = f"check is {check!r}" if check is not None else f"the environment variable {VARIABLE} is {name!r}"
        raise ValueError(f"Sharding: {given}; accepted are {', '.join(map(repr, MODES))}")
    return MODES[name]
