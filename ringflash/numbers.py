"""The one door for numbers: whatever a caller passes for a number is one, or is refused by its name.

Python takes many things for numbers. ``int(1.7)`` is 1, True is 1, ``"" or 0`` is 0, an array of one element is an index,
and int64 begins anew behind its end. Taken silently, each of them is another mask, another seed, another sharding. So:

    whole(8, what)   whole(np.int64(8), what)            8        what has ``__index__``: integers of any library
    real(0.5, what)  real(np.float32(0.5), what)         0.5      what is a ``numbers.Real``, and finite
    True, "3", 1.7, [3], a tensor with a gradient        TypeError: "window: left is True of type bool; an integer is needed"

``what`` is the caller and the argument, as in ``"window: left"``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

FAR = 1 << 60
"""Further than any position. Sums of a few such numbers still fit into int64."""


def whole(value: Any, what: str, least: int | None = None, most: int = FAR, needed: str = "") -> int:
    """``value`` as an int, if it is an integer from ``least`` (None: ``-most``) to ``most``.

    ``needed`` is what a ``ValueError`` says is accepted. ``TypeError`` for whatever is no integer.

    >>> whole(8, "Sharding: length", least=0)
    8
    >>> whole(1.7, "flash_attention: seed")
    Traceback (most recent call last):
    TypeError: flash_attention: seed is 1.7 of type float; an integer is needed
    """
    number = _index(value)
    if number is None:
        raise TypeError(f"{what} is {brief(value)} of type {type(value).__name__}; an integer is needed")
    first = -most if least is None else least
    if not first <= number <= most:
        accepted = f"{needed}; {spell(most)} is the most" if needed and number > most else needed
        raise ValueError(
            f"{what} is {brief(number)}; {accepted or f'a number from {spell(first)} to {spell(most)} is needed'}"
        )
    return number


def real(value: Any, what: str, needed: str = "a finite number is needed") -> float:
    """``value`` as a float, if it is a finite real number. ``needed`` is what a ``ValueError`` says is accepted.

    >>> real(1, "flash_attention: scale")
    1.0
    """
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, Real):
            hint = "a number is needed" + (
                ": pass its .item(), which has no gradient" if hasattr(value, "item") else ""
            )
            raise TypeError(f"{what} is {brief(value)} of type {type(value).__name__}; {hint}")
        try:
            value = float(value)
        except OverflowError:  # an integer beyond all floats
            raise ValueError(f"{what} is {brief(value)}; {needed}") from None
    if not -math.inf < value < math.inf:
        raise ValueError(f"{what} is {value}; {needed}")
    number: float = value
    return number


@contextmanager
def said_by(caller: str) -> Iterator[None]:
    """What is refused inside is refused by ``caller``: the inner error says what is wrong, the outer whom it was said to."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{caller}: {error}") from None


def brief(value: Any) -> str:
    """``repr`` on one line, and not a long one."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # thousands of digits, a tensor without a shape: an error must not fail
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def spell(number: int) -> str:
    """A bound as people know it.

    >>> spell(FAR), spell(-(2**63)), spell(2**63 - 1), spell(4096)
    ('2**60', '-2**63', '2**63 - 1', '4096')
    """
    size = abs(number)
    sign = "-" if number < 0 else ""
    if size >= 1 << 20 and size & (size - 1) == 0:
        return f"{sign}2**{size.bit_length() - 1}"
    if size >= 1 << 20 and size & (size + 1) == 0 and not sign:
        return f"2**{size.bit_length()} - 1"
    return str(number)


def _index(value: Any) -> int | None:
    """The integer that ``value`` is; None for what is none."""
    if type(value) is int:
        return operator.index(value)  # in a captured graph an int may stand for any integer; this pins it to one
    kind, layout = str(getattr(value, "dtype", "")), str(getattr(value, "layout", "torch.strided"))
    if isinstance(value, bool) or "bool" in kind or layout != "torch.strided" or getattr(value, "ndim", 0) != 0:
        return None  # tensors are an index, too, if they hold one number
    try:
        return operator.index(value)
    except Exception:  # those without a number raise whatever they like
        return None
