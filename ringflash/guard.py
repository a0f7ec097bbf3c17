"""What accompanies the messages of one call, and says what is wrong with them.

A message may begin with a *label*, eight int64 that say what it is. Whoever packs it writes the label; who receives it knows
from the plan what should stand there, since both ends of a message are derived from the same table:

    "ringfla"   call   digest of what was agreed   kind   source   tokens   first token   checksum

A shard that is passed on keeps its label: what one rank has packed is checked by everybody who uses it, so a fault anywhere on
the way shows. Reading a label does not wait for the device: on a GPU labels are set aside, copied when the call is over, and
read in a later call.

What a check costs and what it finds: ``docs/trust.md``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.check import MODES, Check
from ringflash.errors import IntegrityError, NonFiniteError
from ringflash.freight import LABEL, Parcel
from ringflash.needs import Part
from ringflash.partial import Partial

_MAGIC = int.from_bytes(b"ringfla", "big")
_FIELDS = ("magic", "call", "agreement", "kind", "source", "tokens", "first token", "checksum")
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, as an int64
_BLOCK = 1 << 18  # words of a checksum at a time
_STRIDE = (2 * _BLOCK * _GOLDEN + (1 << 63)) % (1 << 64) - (
    1 << 63
)  # from the weight of a word to that a block further on


class Kind(NamedTuple):
    """A sort of message: its number on labels, and the names of the tensors in it."""

    number: int
    what: str
    names: tuple[str, ...]


KEYS = Kind(1, "keys and values", ("key", "value"))
QUERIES = Kind(2, "queries", ("query", "dout", "lse", "delta"))
KEY_GRADIENTS = Kind(3, "gradients of keys and values", ("dkey", "dvalue"))
QUERY_GRADIENTS = Kind(4, "gradients of queries", ("dquery",))
HEADS = Kind(5, "heads", ())

Unread = deque[Callable[[], bool]]
"""Labels that the device has yet to hand over: each raises if it is wrong, and returns whether it could be read."""


@dataclass
class Guard:
    """Checks what comes with one call of one rank. ``Guard()`` checks nothing."""

    check: Check = MODES["off"]
    call: int = 0
    """The number of the call among those of its group."""
    name: str = "call"
    digest: int = 0
    """Of what ranks have agreed on, an int64."""
    rank: int = 0
    ranks: int = 1
    unread: Unread = field(default_factory=deque)
    report: Callable[[str], None] = lambda trouble: None
    """Tells the other ranks why this one stops."""
    _labels: list[tuple[Tensor, tuple[int, ...], str]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"call {self.call} ({self.name})" if self.call else self.name

    @property
    def label(self) -> int:
        """Bytes at the head of each message."""
        return LABEL if self.check.labels else 0

    def seal(self, parcel: Parcel, kind: Kind, source: int, part: Part | None = None) -> Parcel:
        """Write the label of a message that this rank has packed; of a part whose ``source`` is a shard or a rank."""
        if self.check.labels and parcel.payload.numel():
            says = *self._expected(kind, source, part), 0
            on_gpu = parcel.label.is_cuda  # a copy from memory that is not pinned would wait for the device
            parcel.label.copy_(torch.tensor(says, pin_memory=on_gpu), non_blocking=on_gpu)
            if self.check.numbers:
                parcel.label[-1:].copy_(checksum(parcel.payload))
        return parcel

    def admit(self, parcel: Parcel, kind: Kind, source: int, part: Part | None, way: str) -> None:
        """Check a message that has come; ``way`` is how, for people. Raises :class:`IntegrityError`."""
        if not self.check.labels or not parcel.payload.numel():
            return
        expected = self._expected(kind, source, part)
        if parcel.label.is_cuda and not self.check.numbers:
            self._labels.append((parcel.label.clone(), expected, way))
            return
        *says, stated = parcel.label.tolist()
        self._compare(tuple(says), expected, way)
        if self.check.numbers:
            found, wanted = (x & (1 << 64) - 1 for x in (int(checksum(parcel.payload)), stated))
            if found != wanted:
                shapes = ", ".join(map(_shape, parcel.tensors))
                raise self._error(
                    f"{way}: the checksum of {kind.what} ({shapes}) is {found:016x}, and its label says "
                    f"{wanted:016x}: they changed after they were packed, on a link or in a rank's memory; they are of no use"
                )
            self.scan(parcel.tensors, kind, way)

    def scan(self, tensors: Sequence[Tensor], kind: Kind, way: str) -> None:
        """Raise :class:`NonFiniteError` if one of the numbers that came is NaN or infinite."""
        fault = unfit(dict(zip(kind.names, tensors, strict=False)))
        if fault:
            raise self._error(f"{way}: {fault}", NonFiniteError)

    def repeats(self, number: int, of: int) -> bool:
        """Whether the visit of this ``number`` is the one that this call computes twice."""
        return self.check.numbers and number == self.call % of

    def same(self, what: str, first: Partial, second: Partial) -> None:
        """Raise :class:`IntegrityError` unless two results have the same bits."""
        for name in ("out", "lse"):
            a, b = getattr(first, name), getattr(second, name)
            if not _same_bits(a, b):
                raise self._error(
                    f"{what}: computed twice from the same numbers, {name} differs, first at "
                    f"{(a != b).nonzero()[:1].tolist()}: this device computes wrongly, or memory changes under it"
                )

    def close(self) -> None:
        """The call is over: have the device hand over the labels that came, without waiting for it."""
        if not self._labels:
            return
        labels = torch.stack([label for label, _, _ in self._labels])
        host = torch.empty(labels.shape, dtype=labels.dtype, pin_memory=True)
        host.copy_(labels, non_blocking=True)
        there = torch.cuda.Event()
        there.record()
        stated, self._labels = [(expected, way) for _, expected, way in self._labels], []

        def read() -> bool:
            if not there.query():
                return False
            for (*says, _), (expected, way) in zip(host.tolist(), stated, strict=True):
                self._compare(tuple(says), expected, way)
            return True

        self.unread.append(read)

    def _expected(self, kind: Kind, source: int, part: Part | None) -> tuple[int, ...]:
        tokens, first = (0, 0) if part is None else (part.tokens, part.spans[0][0])
        return _MAGIC, self.call, self.digest, kind.number, source, tokens, first

    def _compare(self, says: tuple[int, ...], expected: tuple[int, ...], way: str) -> None:
        if says == expected:
            return
        if says[0] != _MAGIC:
            what = "what came is no message of ringflash, or its memory was written over"
        else:
            wrong = (f"{n} {a}, not {b}" for n, a, b in zip(_FIELDS, says, expected, strict=False) if a != b)
            what = f"another message came than the plan says: {'; '.join(wrong)}"
        raise self._error(
            f"{way}: {what}. The ranks make different calls, or messages were lost or swapped; results of this call "
            "and of those after it are of no use"
        )

    def _error(self, trouble: str, kind: type[IntegrityError] = IntegrityError) -> IntegrityError:
        """What to raise; only this rank knows of it, and the others wait for it: so they are told."""
        self.report(f"{self}: {trouble}")
        return kind(f"{self.me}: {trouble}")

    @property
    def me(self) -> str:
        """Who speaks, and of which call."""
        return f"ringflash, rank {self.rank} of {self.ranks}: {self}"


def checksum(payload: Tensor) -> Tensor:
    """A 64-bit sum over the words of a uint8 buffer ``[n]``, ``n`` a multiple of 4; int64 ``[1]``.

    Every word of 32 bits counts with a weight of its own, an odd number of 64 bits. So modulo 2^64 the sum changes with
    whatever happens to one word, with any two bits, and with any two words that are swapped.
    """
    words = payload.view(torch.int32)
    total = torch.zeros(1, dtype=torch.int64, device=payload.device)
    weights = torch.arange(min(len(words), _BLOCK), device=payload.device).mul_(2).add_(1).mul_(_GOLDEN)
    for block in words.split(_BLOCK):
        total += (block * weights[: len(block)]).sum()
        weights += _STRIDE
    return total


def unfit(tensors: dict[str, Tensor]) -> str:
    """Where the first NaN or infinity is, in words; "" if there is none. An lse may be -inf: its row has seen no key."""
    for name, tensor in tensors.items():
        bad = ~torch.isfinite(tensor)
        if name == "lse":
            bad &= tensor != -torch.inf
        if bad.any():
            where = bad.nonzero()[0].tolist()
            return f"{name}{where} is {float(tensor[tuple(where)])}, {int(bad.sum())} of {bad.numel()} are not finite"
    return ""


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
