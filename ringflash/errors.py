"""The exceptions of this library that are not plain ``ValueError`` or ``TypeError``.

A wrong argument raises ``ValueError`` or ``TypeError`` before anything is sent. What goes wrong afterwards, between
ranks, has one base class, so that a training loop can tell it from a bug of its own.
"""

from __future__ import annotations


class RingflashError(RuntimeError):
    """Base of everything that this library raises about ranks, plans and wires."""


class PlanError(RingflashError):
    """A plan breaks one of its laws: a cell computed twice, a send nobody receives, a total that never comes home."""


class WireError(RingflashError):
    """Tensors could not be moved between ranks: no communication in this world, a dead peer, a dead world."""


class DeadlockError(WireError):
    """Every rank of an in-process world waits for another one."""
