"""The exceptions of this library that are not plain ``ValueError`` or ``TypeError``.

A wrong argument raises ``ValueError`` or ``TypeError`` before anything is sent. What goes wrong afterwards, between
ranks, has one base class, so that a training loop can tell it from a bug of its own.

    RingflashError
        PlanError            a plan breaks one of its laws
        DisagreementError    ranks were about to do different things        raised on all of them, nothing has been sent
        WireError            tensors could not be moved
            PeerError            a rank is gone, or did not come in time    the group is of no use any more: end, start anew
            DeadlockError        every rank of an in-process world waits
        IntegrityError       what came is not what was sent, or numbers break a law
            NonFiniteError       a number is NaN or infinite
"""

from __future__ import annotations


class RingflashError(RuntimeError):
    """Base of everything that this library raises about ranks, plans and wires."""


class PlanError(RingflashError):
    """A plan breaks one of its laws: a cell computed twice, a send nobody receives, a total that never comes home."""


class DisagreementError(RingflashError):
    """Ranks were about to do different things. It is raised on all of them, and nothing has been sent."""


class WireError(RingflashError):
    """Tensors could not be moved between ranks: no communication in this world, a dead peer, a dead world."""


class PeerError(WireError):
    """A rank died, or did not come in time. Its group is of no use any more: let the process end and start anew."""


class DeadlockError(WireError):
    """Every rank of an in-process world waits for another one."""


class IntegrityError(RingflashError):
    """What came is not what was sent, or numbers break a law that they obey if nothing is broken."""


class NonFiniteError(IntegrityError):
    """A number is NaN or infinite."""
