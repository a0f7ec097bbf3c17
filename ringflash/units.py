"""Numbers as people write them: 1M tokens, 3.2 GiB, 14 ms; and read again.

Tokens and bytes are counted in powers of 1024 (``1M`` tokens are 1,048,576), seconds in powers of 1000.
"""

from __future__ import annotations

import re

_BINARY = ("", "K", "M", "G", "T", "P")


def read_tokens(text: str) -> int:
    """The number that ``text`` means: digits, and K, M or G for 1024, 1024^2 or 1024^3. Raises ``ValueError``.

    >>> [read_tokens(text) for text in ("4096", "64K", "1M", "1.5M")]
    [4096, 65536, 1048576, 1572864]
    """
    match = re.fullmatch(r"(\d[\d_,]*)(\.\d+)?\s*([kKmMgG]?)", text.strip())
    value = 0.5
    if match is not None:
        whole, fraction, suffix = match.groups()
        scale = 1024 ** _BINARY.index(suffix.upper())
        value = int(re.sub("[_,]", "", whole)) * scale + float(fraction or 0) * scale
    if value != int(value):
        raise ValueError(f"{text!r} is no number of tokens; write 65536, 64K or 1M (K = 1024, M = 1024 K)")
    return int(value)


def spell_tokens(count: int) -> str:
    """Exact, and short where it is a round number.

    >>> [spell_tokens(n) for n in (1 << 20, 65536, 1536, 1000, 1_000_000, 0)]
    ['1M', '64K', '1536', '1000', '1,000,000', '0']
    """
    power = 0
    while count and count % 1024 == 0 and power < 3:
        count, power = count // 1024, power + 1
    return (f"{count:,}" if count >= 10_000 else str(count)) + _BINARY[power]


def spell_bytes(count: float) -> str:
    """Three digits, in powers of 1024.

    >>> [spell_bytes(n) for n in (0, 512, 1536, 5 << 30)]
    ['0 B', '512 B', '1.50 KiB', '5.00 GiB']
    """
    power = 0
    while abs(count) >= 1000 and power < len(_BINARY) - 1:
        count, power = count / 1024, power + 1
    return f"{_three(count) if power else round(count)} {_BINARY[power] + 'i' if power else ''}B"


def spell_seconds(seconds: float) -> str:
    """Three digits.

    >>> [spell_seconds(x) for x in (0, 2.5e-6, 0.0142, 3.0, 7200.0)]
    ['0 s', '2.50 us', '14.2 ms', '3.00 s', '2.00 h']
    """
    if seconds >= 3600:
        return f"{_three(seconds / 3600)} h"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)):
        if seconds >= 0.9995 * scale:
            return f"{_three(seconds / scale)} {unit}"
    return "0 s"


def spell_count(count: float) -> str:
    """Three digits, in powers of 1000.

    >>> [spell_count(n) for n in (0, 999, 8.03e9, 1.2e15, 123456)]
    ['0', '999', '8.03 G', '1.20 P', '123 K']
    """
    power = 0
    while abs(count) >= 999.5 and power < len(_BINARY) - 1:
        count, power = count / 1000, power + 1
    return f"{_three(count)} {_BINARY[power]}" if power else f"{count:.0f}"


def _three(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"
