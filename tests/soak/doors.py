"""Is what came out of a call right? A result that agrees with the oracle, or a refusal that helps.

A refusal is a ``ValueError``, a ``TypeError`` or a ``RingflashError`` that begins with who was called, names the argument and
says what came. Everything else (an ``IndexError``, a warning, a sentence of torch about sizes) sends people to a debugger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from soak.wild import Call
from torch import Tensor

import ringflash as rf

TOLERANCE = 2e-5  # float32, values of size 1


class Outcome(NamedTuple):
    """What a call did: it returned, or it raised."""

    value: Any = None
    error: BaseException | None = None


def attempt(source: str, names: dict[str, Any]) -> Outcome:
    """Evaluate ``source``; warnings are errors already."""
    try:
        return Outcome(eval(source, names))
    except Exception as error:
        return Outcome(error=error)


def judge(call: Call, wild: Mapping[str, str], outcome: Outcome, names: dict[str, Any]) -> str | None:
    """What is wrong with what ``call`` did when these holes were filled so; None if nothing is."""
    refusable = {hole for hole, source in wild.items() if call.kinds[hole].table[source] not in call.kinds[hole].takes}
    if outcome.error is None:
        if refusable:
            return f"takes what it cannot read as {' and '.join(sorted(refusable))}"
        return differs(call, wild, outcome.value, names)
    return fault_of(outcome.error, call, wild, names)


def fault_of(error: BaseException, call: Call, wild: Mapping[str, str], names: dict[str, Any]) -> str | None:
    """What a refusal lacks."""
    said = str(error)
    told = f"{type(error).__name__}: {said.splitlines()[0][:160] if said else ''}"
    if type(error) not in (ValueError, TypeError) and not isinstance(error, rf.RingflashError):
        return f"lets through {told}"
    if not said.startswith(tuple(f"{caller}: " for caller in call.callers)):
        return f"does not say who speaks: {told}"
    if not any(name in said for hole in wild for name in call.names(hole)):
        return f"does not name the argument: {told}"
    if not any(text in said for source in wild.values() for text in traces(source, names)):
        return f"does not say what came: {told}"
    return None


def traces(source: str, names: dict[str, Any]) -> set[str]:
    """Texts of which an error about this value has at least one."""
    value = eval(source, names)
    found = {repr(value)[:24], str(value)[:24], type(value).__name__}
    if isinstance(value, Tensor):
        found |= {"tensor", "uninitialized", "nested", str(value.dtype), value.device.type}
        if not (value.is_nested or isinstance(value, torch.nn.UninitializedParameter)):
            found |= {str(tuple(value.shape)), *map(str, value.shape)}
            plain = value.numel() < 9 and value.device.type == "cpu" and value.layout == torch.strided
            found |= elements(value.tolist()) if plain and not value.is_quantized else set()
    elif isinstance(value, rf.Sharding):
        found.add(f"rank {value.rank} of {value.ranks}")
    elif isinstance(value, np.ndarray):
        found |= elements(value.tolist()) if value.size < 9 else set()
    elif isinstance(value, list | tuple | set | dict | str | bytes):
        found |= elements(value)
    return found - {""}


def elements(value: Any) -> set[str]:
    """What stands in a container, and how many: an error may show one of them, or say that there are none."""
    if not isinstance(value, list | tuple | set | dict | str | bytes):
        return {repr(value)}
    inside = [value] if isinstance(value, str) else list(value)
    one_deeper = (elements(x) for x in inside if not isinstance(x, str))
    return {f"{len(inside)} ", "()", "[]"}.union(map(repr, inside), *one_deeper)


def differs(call: Call, wild: Mapping[str, str], value: Any, names: dict[str, Any]) -> str | None:
    """How the answer of an attention call differs from the oracle's; None for any other call."""
    if "scale" not in call.kinds or "dropout_p" in wild:
        return None
    given = {hole: eval({**call.right, **wild}[hole], names) for hole in call.kinds}
    if any(not isinstance(given[hole], Tensor) or given[hole].device.type != "cpu" for hole in "qkv"):
        return None
    out = value[0] if given["return_lse"] else value
    q, k, v = (given[hole].detach().double() for hole in "qkv")
    seen = oracle.table(oracle.causal(), q.shape[1], k.shape[1], int(given.get("q_offset") or 0))
    if wild.get("mask") == "None" and "q_offset" in call.kinds:
        return None
    slopes = given["alibi_slopes"]
    bias = None if slopes is None else _alibi(slopes.detach().double(), q.shape[1], k.shape[1])
    sinks = None if given["sinks"] is None else given["sinks"].detach().double()
    scale = None if given["scale"] is None else float(given["scale"])
    expected, _ = oracle.attention(q, k, v, seen, scale=scale, softcap=float(given["softcap"]), bias=bias, sinks=sinks)
    if not expected.isfinite().all():
        return None
    error = (out.double() - expected).abs().max().item() if out.numel() else 0.0
    return None if error <= TOLERANCE else f"is wrong by {error:.2g}"


def _alibi(slopes: Tensor, queries: int, keys: int) -> Tensor:
    """``[1, h, queries, keys]``: slope x distance, to be added to scores."""
    distance = (torch.arange(queries)[:, None] - torch.arange(keys)).abs()
    return -slopes[None, :, None, None] * distance
