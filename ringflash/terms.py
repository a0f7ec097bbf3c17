"""What all ranks must have in common for a ring to be right, as short texts that people can compare.

    Terms({"length": "4096", "mask": "causal & documents((0, 900, 4096))", ...}, digest)

The texts are for people. The digest is of everything that a plan is derived from: two masks of 4,000 documents that differ
in one of them have the same text and different digests.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import numpy as np

from ringflash.layout import Layout
from ringflash.mask import Mask
from ringflash.route import Route, tour_of

HIDDEN = "#"
"""At the end of a name: the digest of what the text of that name stands for, of interest only if the texts are equal."""
_SHORT = 200  # characters of a text
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in what Python calls an object that says nothing of itself


@dataclass(frozen=True)
class Terms:
    """Texts by name, and a digest (64 bits, as hexadecimals) of what they stand for."""

    texts: Mapping[str, str]
    digest: str

    @cached_property
    def number(self) -> int:
        """The digest as an int64."""
        return int.from_bytes(bytes.fromhex(self.digest), "big", signed=True)


def terms_of(
    layouts: tuple[Layout, Layout],
    layout: str | Layout,
    mask: Mask,
    route: Route,
    q_offset: int,
    heads: int,
    check: str,
) -> Terms:
    """The terms of a sharding. Equal on two ranks if, and only if, their plans fit."""
    queries, keys = layouts
    deep = {
        "layout": _digest(repr([each.runs for each in layouts]).encode()),  # its own text shows a few ranks
        "mask": _digest(mask.table.tobytes()),
        "route": _digest_of_route(route, queries.ranks),
    }
    plain = {
        "ranks": queries.ranks * heads,
        "length": queries.length,
        "keys": keys.length,
        "q_offset": q_offset,
        "layout": layout,
        "mask": mask,
        "route": _ADDRESS.sub("", str(route)),
        "heads_axis": heads,
        "check": check,
    }
    texts = {name: short(str(value)) for name, value in plain.items()}
    texts |= {name + HIDDEN: digest for name, digest in deep.items()}
    return Terms(texts, digest_of(texts))


def digest_of(texts: Mapping[str, str]) -> str:
    """The digest of texts by name, 64 bits as hexadecimals."""
    return _digest("\n".join(f"{name}={text}" for name, text in texts.items()).encode())


def _digest(*data: bytes) -> str:
    state = hashlib.blake2b(digest_size=8)
    for some in data:
        state.update(some)
    return state.hexdigest()


@lru_cache(maxsize=64)  # of 1,000 ranks a table of a million numbers
def _digest_of_route(route: Route, ranks: int) -> str:
    """Of the tour, whatever the route calls itself."""
    tour = tour_of(route, ranks)
    return _digest(*(np.ascontiguousarray(getattr(tour, field.name)).tobytes() for field in fields(tour)))


def short(text: str) -> str:
    """A text that fits into a sentence."""
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 10]} ... #{_digest(text.encode())[:8]}"
