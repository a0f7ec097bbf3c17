"""Wires that do wrong: what ``DistributedWire.exchange`` sends is lost, late, changed or swapped on its way.

A fault is put around the exchange of this process; the library itself is not touched. Messages are counted where they leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ringflash.distributed import DistributedWire
from ringflash.wire import Message, Pending

Fault = Callable[[int, list[Message]], list[Message]]
"""What leaves instead of these messages; the number says in which hop of this process since the fault was put in."""


def put_in(fault: Fault) -> None:
    """From now on this process sends what ``fault`` makes of its messages."""
    proper, hops = DistributedWire.exchange, iter(range(1 << 30))

    def exchange(
        wire: DistributedWire, sends: Sequence[Message], receives: Sequence[Message], channel: int = 0, about: Any = ""
    ) -> Pending:
        if sends and "hop" in str(about):
            sends = fault(next(hops), list(sends))
        return proper(wire, sends, receives, channel, about)

    DistributedWire.exchange = exchange  # type: ignore[method-assign]


def flipped(hop: int, byte: int) -> Fault:
    """One bit of one byte of the first message of a hop is another one; a negative ``byte`` counts from the end."""

    def fault(number: int, sends: list[Message]) -> list[Message]:
        if number == hop:
            peer, buffer = sends[0]
            changed: Tensor = buffer.clone()
            changed[byte] ^= 4
            sends[0] = (peer, changed)
        return sends

    return fault


def dropped(hop: int) -> Fault:
    """The messages of a hop never leave."""
    return lambda number, sends: [] if number == hop else sends


def swapped(hop: int) -> Fault:
    """The messages of a hop leave after those of the next one."""
    held: list[Message] = []

    def fault(number: int, sends: list[Message]) -> list[Message]:
        if number == hop:
            held.extend(sends)
            return []
        sends, held[:] = sends + held, []
        return sends

    return fault
