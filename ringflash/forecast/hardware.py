"""What a rank computes and sends in a second: the numbers that estimates are made of.

``hardware.toml`` describes machines (memory, rates of attention kernels, links within a node and between nodes), and says of
every number whether it was published, measured or assumed. Links are values of their own, so that a question such as
"the same GPUs over TCP?" is one word:

    load_hardware("h100").with_(between="tcp")
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import pairwise
from math import isfinite
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HALVES = ("bfloat16", "float16")
"""Dtypes that kernels compute at their full rate."""

_KINDS = ("published: ", "measured: ", "assumed: ")
_Made = TypeVar("_Made")
_OURS = Path(__file__).with_name("hardware.toml")


@dataclass(frozen=True)
class Link:
    """One way out of a rank: bytes per second and direction as published, the share of it that is attained, latency."""

    name: str
    bytes_per_second: float
    attained: float = 1.0
    latency: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        _texts(self, "name", "source")
        _numbers(self, "bytes_per_second", "attained")
        _numbers(self, "latency", zero=True)
        if self.attained > 1:
            raise ValueError(f"Link: attained is {self.attained!r}; a share of bytes_per_second, up to 1, is needed")

    def seconds(self, count: int) -> float:
        """How long a message of so many bytes takes, alone on the link."""
        return self.latency + count / (self.bytes_per_second * self.attained)


@dataclass(frozen=True)
class Rate:
    """What an attention kernel attains at one head dim, in dense operations per second; head dim 1 alone stands for all."""

    head_dim: int
    flops_per_second: float
    source: str

    def __post_init__(self) -> None:
        _wholes(self, "head_dim")
        _numbers(self, "flops_per_second")
        _texts(self, "source")


@dataclass(frozen=True)
class Hardware:
    """One kind of device, and how such devices are joined. Made by :func:`load_hardware`.

    ``memory`` are the bytes that a rank can use, ``peak`` its published dense bf16 rate, ``slower`` the share of the rate
    that is left in other dtypes, ``step_overhead`` the seconds that the host needs for one step of a ring,
    which it does ahead of the device where it ``runs_ahead``. ``links`` are those that ``with_`` knows beside ringflash's own.
    Raises ``ValueError`` for values that no machine has.
    """

    name: str
    memory: int
    peak: float
    forward: tuple[Rate, ...]
    backward: tuple[Rate, ...]
    within: Link
    between: Link
    gpus_per_node: int
    step_overhead: float = 0.0
    runs_ahead: bool = True
    slower: tuple[tuple[str, float], ...] = ()
    source: str = ""
    links: tuple[Link, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        _texts(self, "name", "source")
        _wholes(self, "memory", "gpus_per_node")
        _numbers(self, "peak")
        _numbers(self, "step_overhead", zero=True)
        if type(self.runs_ahead) is not bool:
            raise ValueError(f"Hardware: runs_ahead is {self.runs_ahead!r}; True or False is needed")
        for phase in ("forward", "backward"):
            rates = getattr(self, phase)
            if not rates or not all(isinstance(rate, Rate) for rate in rates):
                raise ValueError(f"Hardware: {phase} is {rates!r}; the Rate of at least one head dim is needed")
            if any(a.head_dim >= b.head_dim for a, b in pairwise(rates)):
                raise ValueError(f"Hardware: {phase} has head dims {[x.head_dim for x in rates]}; they have to ascend")
        for name in ("within", "between"):
            if not isinstance(getattr(self, name), Link):
                raise ValueError(f"Hardware: {name} is {getattr(self, name)!r}; a Link is needed")
        for dtype, share in self.slower:
            if not isinstance(dtype, str) or not _is_number(share) or share <= 0:
                raise ValueError(f"Hardware: slower has {dtype!r} = {share!r}; a finite share above 0 is needed")

    def rate(self, phase: str, head_dim: float, dtype: str = "bfloat16") -> Rate:
        """The rate of the ``"forward"`` or ``"backward"`` at a head dim, in dense operations per second.

        Between two head dims that are known, on the line between them; below the first, in proportion to the head dim (the
        exponentials take over); above the last, the last. ``source`` says which of these it is, and what another dtype
        leaves of it.
        """
        known: tuple[Rate, ...] = getattr(self, phase)
        at = bisect_left([rate.head_dim for rate in known], head_dim)
        low, high = known[max(at - 1, 0)], known[min(at, len(known) - 1)]
        value, source = high.flops_per_second, high.source
        if 0 < at < len(known) and high.head_dim != head_dim:
            part = (head_dim - low.head_dim) / (high.head_dim - low.head_dim)
            value = low.flops_per_second + part * (high.flops_per_second - low.flops_per_second)
            source = f"interpolated between head dims {low.head_dim} and {high.head_dim} ({bare(high.source)})"
        elif head_dim < high.head_dim:
            value *= head_dim / high.head_dim
            source = f"assumed: in proportion to head dim {high.head_dim} ({bare(high.source)})"
        elif head_dim > high.head_dim > 1:
            source = f"assumed: as at head dim {high.head_dim} ({bare(high.source)})"
        share = self._share(dtype)
        if share != 1:
            source = f"assumed share {share:g} for {dtype} of another rate ({bare(source)})"
        return Rate(max(1, round(head_dim)), value * share, source)

    def _share(self, dtype: str) -> float:
        shares = dict.fromkeys(HALVES, 1.0) | dict(self.slower)
        if dtype not in shares:
            raise ValueError(f"dtype is {dtype!r}; {self.name} has rates for {', '.join(shares)}")
        return shares[dtype]

    def with_(
        self,
        *,
        within: str | Link | None = None,
        between: str | Link | None = None,
        forward: float | None = None,
        backward: float | None = None,
        step_overhead: float | None = None,
    ) -> Hardware:
        """The same machine with other links (by name, or your own), or with rates that you have measured (flops/s).

        Names are those of ``link_names()``, and of the file from which the machine was read.
        """
        own = {link.name: link for link in self.links}
        return replace(
            self,
            within=self.within if within is None else _link(within, own),
            between=self.between if between is None else _link(between, own),
            forward=self.forward if forward is None else (Rate(1, forward, "given"),),
            backward=self.backward if backward is None else (Rate(1, backward, "given"),),
            step_overhead=self.step_overhead if step_overhead is None else step_overhead,
        )


def bare(source: str) -> str:
    """What a source names, without the word for how it is known: of a number that was made from that one.

    >>> bare("published: FlashAttention-3, full, 16K tokens")
    'FlashAttention-3, full, 16K tokens'
    """
    return next((source.removeprefix(kind) for kind in _KINDS if source.startswith(kind)), source)


def load_hardware(machine: str | PathLike[str] | Hardware) -> Hardware:
    """The machine of that name (``machine_names()``), or the one that a TOML file (a path ending in .toml) describes.

    Raises ``ValueError`` for a name that nobody knows and for a file that lacks something or says what no machine has,
    ``OSError`` (mostly ``FileNotFoundError``) for a path that cannot be read.

    >>> load_hardware("h200").between.name
    'infiniband-400g'
    """
    if isinstance(machine, Hardware):
        return machine
    if not isinstance(machine, str | PathLike):
        raise ValueError(
            f"hardware is {machine!r}; the name of a machine, the path of a TOML file or a Hardware is needed"
        )
    name = fspath(machine)
    if not name.endswith(".toml"):
        machines = _ours()["machines"]
        if name.lower() not in machines:
            raise ValueError(
                f"hardware is {name!r}; known are {', '.join(machines)}, or the path of a TOML file like {_OURS}"
            )
        return _read(name.lower(), machines[name.lower()], {}, str(_OURS))
    described = _parse(Path(name))
    if unknown := set(described) - {"machines", "links"}:
        raise ValueError(f"hardware: {name} has {sorted(unknown)}; [machines.<name>] and [links.<name>] are accepted")
    machines, tables = (_table(described.get(key, {}), key, name) for key in ("machines", "links"))
    if len(machines) != 1:
        raise ValueError(f"hardware: {name} describes the machines {list(machines)}; one [machines.<name>] is needed")
    links = {key: _read_link(key, _table(table, f"links.{key}", name), name) for key, table in tables.items()}
    ((only, table),) = machines.items()
    return _read(only, _table(table, f"machines.{only}", name), links, name)


def machine_names() -> tuple[str, ...]:
    """The machines that ringflash knows."""
    return tuple(_ours()["machines"])


def link_names() -> tuple[str, ...]:
    """The links that ringflash knows."""
    return tuple(_ours()["links"])


@lru_cache(maxsize=1)
def _ours() -> dict[str, Any]:
    return _parse(_OURS)


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"hardware: {path} is no TOML: {error}") from None


def _read(name: str, table: dict[str, Any], links: dict[str, Link], file: str) -> Hardware:
    """The machine of one table; every mistake is told with its file and key."""
    where, fields = f"machines.{name}", dict(table)
    optional = {"slower": {}, "step_overhead": 0.0, "runs_ahead": True, "source": ""}
    _check_keys(
        table, {"memory", "peak", "forward", "backward", "within", "between", "gpus_per_node"}, optional, where, file
    )
    if isinstance(fields["memory"], float) and fields["memory"].is_integer():  # 80e9 is as good as 80_000_000_000
        fields["memory"] = int(fields["memory"])
    for phase in ("forward", "backward"):
        fields[phase] = _read_rates(_table(table[phase], f"{where}.{phase}", file), f"{where}.{phase}", file)
    for key in ("within", "between"):
        fields[key] = _told(f"{where}.{key}", file, partial(_link, table[key], links))
    fields["slower"] = tuple(_table(table.get("slower", {}), f"{where}.slower", file).items())
    return _told(where, file, partial(Hardware, name=name, links=tuple(links.values()), **fields))


def _read_rates(table: dict[str, Any], where: str, file: str) -> tuple[Rate, ...]:
    rates = []
    for dim, given in table.items():
        at = f"{where}.{dim}"
        if not dim.isdecimal():
            raise ValueError(f"hardware: {file}, [{at}]: {dim!r} is no head dim; a whole number from 1 is needed")
        _check_keys(_table(given, at, file), {"flops_per_second", "source"}, {}, at, file)
        rates.append(_told(at, file, partial(Rate, int(dim), **given)))
    return tuple(sorted(rates, key=lambda rate: rate.head_dim))


def _read_link(name: str, table: dict[str, Any], file: str) -> Link:
    where = f"links.{name}"
    _check_keys(table, {"bytes_per_second"}, {"attained": 1.0, "latency": 0.0, "source": ""}, where, file)
    return _told(where, file, partial(Link, name, **table))


def _link(named: str | Link, own: dict[str, Link]) -> Link:
    """The link of that name, in the file of the machine or in ours."""
    if isinstance(named, Link):
        return named
    ours = _ours()["links"]
    if not isinstance(named, str) or named not in ours | own:
        raise ValueError(f"link is {named!r}; known are {', '.join(ours | own)}")
    return own[named] if named in own else _read_link(named, ours[named], str(_OURS))


def _table(value: Any, where: str, file: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"hardware: {file}: {where} is {value!r}; a table is needed, written as [{where}]")
    return value


def _check_keys(table: dict[str, Any], needed: set[str], optional: dict[str, Any], where: str, file: str) -> None:
    missing, unknown = needed - set(table), set(table) - needed - set(optional)
    if missing or unknown:
        also = f", and {sorted(optional)} may be given" if optional else ""
        raise ValueError(
            f"hardware: {file}, [{where}] lacks {sorted(missing) or 'nothing'} and has {sorted(unknown) or 'nothing'} that "
            f"is unknown; needed are {sorted(needed)}{also}"
        )


def _told(where: str, file: str, make: Callable[[], _Made]) -> _Made:
    """What ``make`` makes; where it refuses, its sentence begins with the place in the file."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"hardware: {file}, [{where}]: {re.sub('^(Link|Rate|Hardware): ', '', str(error))}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _numbers(owner: Any, *names: str, zero: bool = False) -> None:
    for name in names:
        value = getattr(owner, name)
        if not _is_number(value) or value < 0 or (value == 0 and not zero):
            least = "of at least 0" if zero else "above 0"
            raise ValueError(f"{type(owner).__name__}: {name} is {value!r}; a finite number {least} is needed")


def _wholes(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{type(owner).__name__}: {name} is {value!r}; a whole number from 1 is needed")


def _texts(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, str):
            raise ValueError(f"{type(owner).__name__}: {name} is {value!r}; a string is needed")
