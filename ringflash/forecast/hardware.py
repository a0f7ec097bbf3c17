"""What a rank computes and sends in a second: the numbers that estimates are made of.

``hardware.toml`` describes machines (memory, rates of attention kernels, links within a node and between nodes), and says of
every number whether it was published, measured or assumed. Links are values of their own, so that a question such as
"the same GPUs over TCP?" is one word:

    load_hardware("h100").with_(between="tcp")
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HALVES = ("bfloat16", "float16")
"""Dtypes that kernels compute at their full rate."""

_OURS = Path(__file__).with_name("hardware.toml")


@dataclass(frozen=True)
class Link:
    """One way out of a rank: bytes per second and direction as published, the share of it that is attained, latency."""

    name: str
    bytes_per_second: float
    attained: float = 1.0
    latency: float = 0.0
    source: str = ""

    def seconds(self, count: int) -> float:
        """How long a message of so many bytes takes, alone on the link."""
        return self.latency + count / (self.bytes_per_second * self.attained)


class Rate(NamedTuple):
    """What an attention kernel attains at one head dim, in dense floating-point operations per second."""

    head_dim: int
    flops_per_second: float
    source: str


@dataclass(frozen=True)
class Hardware:
    """One kind of device, and how such devices are joined. Made by :func:`load_hardware`.

    ``memory`` are the bytes that a rank can use, ``peak`` its published dense bf16 rate, ``slower`` the share of the rate
    that is left in other dtypes, ``step_overhead`` the seconds that the host needs for one step of a ring,
    which it does ahead of the device where it ``runs_ahead``.
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

    def rate(self, phase: str, head_dim: float, dtype: str = "bfloat16") -> Rate:
        """The rate of the ``"forward"`` or ``"backward"`` at a head dim, in dense operations per second.

        Between two head dims that are known, on the line between them; below the first, in proportion to the head dim (the
        exponentials take over); above the last, the last.
        """
        known: tuple[Rate, ...] = getattr(self, phase)
        at = bisect_left([rate.head_dim for rate in known], head_dim)
        if at == len(known):
            value, source = known[-1].flops_per_second, known[-1].source
        elif at == 0:
            value, source = known[0].flops_per_second * head_dim / known[0].head_dim, known[0].source
        else:
            low, high = known[at - 1], known[at]
            share = (head_dim - low.head_dim) / (high.head_dim - low.head_dim)
            value = low.flops_per_second + share * (high.flops_per_second - low.flops_per_second)
            source = high.source
        exact = len(known) == 1 or any(rate.head_dim == head_dim for rate in known)
        return Rate(round(head_dim), value * self._share(dtype), source if exact else f"interpolated from {source}")

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
        """The same machine with other links (by name, or your own), or with rates that you have measured (flops/s)."""
        return replace(
            self,
            within=self.within if within is None else _link(within, {}),
            between=self.between if between is None else _link(between, {}),
            forward=self.forward if forward is None else (Rate(1, float(forward), "given"),),
            backward=self.backward if backward is None else (Rate(1, float(backward), "given"),),
            step_overhead=self.step_overhead if step_overhead is None else float(step_overhead),
        )


def load_hardware(machine: str | PathLike[str] | Hardware) -> Hardware:
    """The machine of that name (``machine_names()``), or the one that a TOML file (a path ending in .toml) describes.

    Raises ``ValueError`` for a name that nobody knows and for a file that lacks something, ``FileNotFoundError`` for a path
    where nothing is.

    >>> load_hardware("h200").between.name
    'infiniband-400g'
    """
    if isinstance(machine, Hardware):
        return machine
    name = fspath(machine)
    if not name.endswith(".toml"):
        machines = _ours()["machines"]
        if name.lower() not in machines:
            raise ValueError(
                f"hardware is {name!r}; known are {', '.join(machines)}, or the path of a TOML file like {_OURS}"
            )
        return _read(name.lower(), machines[name.lower()], {})
    with Path(name).open("rb") as file:
        described = _parse(file, name)
    machines = described.get("machines", {})
    if len(machines) != 1:
        raise ValueError(f"hardware: {name} describes the machines {list(machines)}; one [machines.<name>] is needed")
    ((only, table),) = machines.items()
    return _read(only, table, described.get("links", {}))


def machine_names() -> tuple[str, ...]:
    """The machines that ringflash knows."""
    return tuple(_ours()["machines"])


def link_names() -> tuple[str, ...]:
    """The links that ringflash knows."""
    return tuple(_ours()["links"])


@lru_cache(maxsize=1)
def _ours() -> dict[str, Any]:
    return tomllib.loads(_OURS.read_text(encoding="utf-8"))


def _parse(file: Any, name: str) -> dict[str, Any]:
    try:
        return tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"hardware: {name} is no TOML: {error}") from None


def _read(name: str, table: dict[str, Any], links: dict[str, Any]) -> Hardware:
    known = {"memory", "peak", "forward", "backward", "within", "between", "gpus_per_node"}
    optional = {"slower", "step_overhead", "runs_ahead", "source"}
    missing, unknown = known - set(table), set(table) - known - optional
    if missing or unknown:
        raise ValueError(
            f"hardware: [machines.{name}] lacks {sorted(missing) or 'nothing'} and has {sorted(unknown) or 'nothing'} that "
            f"is unknown; needed are {sorted(known)}, and {sorted(optional)} may be given"
        )
    return Hardware(
        name=name,
        memory=int(_positive(table, "memory", name)),
        peak=_positive(table, "peak", name),
        forward=_rates(table["forward"], f"{name}.forward"),
        backward=_rates(table["backward"], f"{name}.backward"),
        within=_link(table["within"], links),
        between=_link(table["between"], links),
        gpus_per_node=int(_positive(table, "gpus_per_node", name)),
        step_overhead=float(table.get("step_overhead", 0.0)),
        runs_ahead=bool(table.get("runs_ahead", True)),
        slower=tuple(table.get("slower", {}).items()),
        source=table.get("source", ""),
    )


def _rates(table: dict[str, Any], name: str) -> tuple[Rate, ...]:
    rates = [Rate(int(dim), _positive(rate, "flops_per_second", name), rate["source"]) for dim, rate in table.items()]
    if not rates:
        raise ValueError(f"hardware: [machines.{name}] is empty; at least one head dim is needed")
    return tuple(sorted(rates))


def _link(named: str | Link, links: dict[str, Any]) -> Link:
    if isinstance(named, Link):
        return named
    everything = _ours()["links"] | links
    if named not in everything:
        raise ValueError(f"link is {named!r}; known are {', '.join(everything)}")
    table = everything[named]
    if unknown := set(table) - {"bytes_per_second", "attained", "latency", "source"}:
        raise ValueError(f"hardware: [links.{named}] has {sorted(unknown)}; known are the fields of ours")
    return Link(named, **(table | {"bytes_per_second": _positive(table, "bytes_per_second", named)}))


def _positive(table: dict[str, Any], key: str, name: str) -> float:
    value = table.get(key)
    if not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"hardware: {key} of {name} is {value!r}; a number above 0 is needed")
    return float(value)
