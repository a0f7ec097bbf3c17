"""`python -m ringflash plan`, written down: for people, and for programs.

For people: the schedule of one rank, what all ranks hold and send, the estimate, traffic beside a plain ring and an all-gather,
tables of other layouts, routes and divisions of the heads, and the line of Python to write. For programs: the same
numbers as one document, in seconds, bytes and counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from ringflash.forecast.cost import Pass
from ringflash.forecast.memory import LEVELS, MODELS, longest_context, memory
from ringflash.forecast.timeline import schedule
from ringflash.forecast.traffic import traffic
from ringflash.plan import Plan
from ringflash.route import ROUTES
from ringflash.units import spell_bytes, spell_count, spell_seconds, spell_tokens
from ringflash.views.planner import Answer, Candidate, Question

_ABRIDGED = 14  # lines of a schedule that are shown, at most
_WIDE = 118  # columns of such a line


def write_report(answer: Answer, rank: int = 0) -> str:
    """The whole report; ``rank`` is the rank of the ring whose schedule is shown."""
    question = answer.question
    parts = [
        _heading(question),
        _schedule(question.plans[rank]),
        _ranks(question),
        _estimate(question),
        _traffic(question),
        _table(f"layout, on route {question.route}", "layout", answer.layouts),
        _table(f"route, {question.layout_name} layout", "route", answer.routes),
        _table("ranks to a shard (Ulysses)", "ulysses", answer.divisions),
        _table("ranks", "ranks", answer.sizes),
        f"recommendation: {recommend(answer)}",
    ]
    return "\n\n".join(part for part in parts if part)


def write_memory(question: Question, model: str, gpus: int) -> str:
    """What training ``model`` at this length takes on each of ``gpus``, and the longest context, by checkpointing."""
    transformer, machine, wanted = MODELS[model], question.machine, f"{spell_tokens(question.length)} needs"
    lines = [
        f"training {model} ({spell_count(transformer.parameters)} parameters) on {gpus} x {machine.name}, a model: all ranks "
        "share the sequence,\nand weights, gradients and AdamW's states (ZeRO stage 3)",
        f"  {'checkpointing':<14}{wanted:>14}{'of':>10}{'longest context':>18}  limited by",
    ]
    for row in training_memory(question, model, gpus):
        longest = spell_tokens(row["longest_context"]) if row["longest_context"] else "none"
        lines.append(
            f"  {row['checkpointing']:<14}{spell_bytes(row['bytes']):>14}{spell_bytes(row['usable_bytes']):>10}{longest:>18}"
            f"  {row['limit']}"
        )
    attention = transformer.layers * question.estimate.seconds
    lines.append(
        f"  attention of its {transformer.layers} layers: {spell_seconds(attention)} of a step in which no forward runs twice"
    )
    return "\n".join(lines)


def training_memory(question: Question, model: str, gpus: int) -> list[dict[str, Any]]:
    """For each level of checkpointing: bytes of one rank at this length, and the longest context with what limits it."""
    rows = []
    for level in LEVELS:
        needed = memory(model, question.length * question.batch, gpus=gpus, checkpointing=level)
        longest = longest_context(model, question.machine, gpus, checkpointing=level)
        rows.append(
            {
                "checkpointing": level,
                "bytes": needed.total,
                "usable_bytes": longest.usable,
                "longest_context": longest.tokens,
                "limit": longest.limit,
            }
        )
    return rows


def recommend(answer: Answer) -> str:
    """One sentence, and the line of Python that does it."""
    best, asked = answer.best, answer.asked
    why = "of what was tried, nothing is faster by more than 2 %"
    if not best.chosen:
        shared = f", {best.ulysses} ranks to a shard," if best.ulysses > 1 else ""
        why = (
            f"the {best.layout} layout on route {best.route}{shared} would take {spell_seconds(best.seconds)} instead of "
            f"{spell_seconds(asked.seconds)} ({asked.seconds / best.seconds:.2f} x as fast)"
        )
    return f"{why}:\n  {_python(answer.question, best)}"


def record(answer: Answer) -> dict[str, Any]:
    """What the report says, as a document for programs."""
    question, model = answer.question, answer.question.estimate
    return {
        "what": "a model of ringflash's schedule, not a measurement",
        "length": question.length,
        "ranks": question.ranks,
        "mask": str(question.mask),
        "layout": question.layout_name,
        "route": str(question.sharding.route),
        "ulysses": question.ulysses,
        "hardware": question.machine.name,
        "forward": _record_of(model.forward),
        "backward": _record_of(model.backward),
        "tokens_per_second": model.tokens_per_second,
        "memory": model.memory,
        "limit": model.limit,
        "compared": {
            name: [asdict(candidate) for candidate in getattr(answer, name)]
            for name in ("layouts", "routes", "divisions", "sizes")
        },
        "best": asdict(answer.best),
        "python": _python(question, answer.best),
    }


def _heading(question: Question) -> str:
    s = question.sharding
    shared = f", {question.ulysses} ranks to a shard, rings of {s.ring_ranks}" if question.ulysses > 1 else ""
    return (
        f"{spell_tokens(question.length)} tokens ({question.length:,}) on {question.ranks} ranks, "
        f"{question.per_node} to a node: {question.mask}\nlayout {question.layout_name}, route {s.route}{shared}"
    )


def _schedule(plan: Plan) -> str:
    """The steps of one rank in which it does anything, those in the middle left out if there are many."""
    head, columns, *steps = str(plan).splitlines()
    lines = [line for line in steps if line.split()[1:] != ["-"] * 3]
    idle = len(steps) - len(lines)
    if len(lines) > _ABRIDGED:
        lines = [
            *lines[: _ABRIDGED - 4],
            f" ...  {len(lines) - _ABRIDGED + 1} more steps",
            *lines[-3:],
        ]
    lines = [head, columns, *lines, *([f"      and {idle} steps in which it has nothing to do"] if idle else [])]
    return "\n".join(line if len(line) <= _WIDE else line[: _WIDE - 4] + " ..." for line in lines)


def _ranks(question: Question) -> str:
    """What ranks hold, compute and send: the least, the mean, the most."""
    model, ring = question.estimate, len(question.plans)
    cells = schedule(question.plans).cells()
    held = question.plans[0].queries
    rows: dict[str, tuple[list[int], Callable[[float], str]]] = {
        "tokens": ([held.tokens(rank) for rank in range(ring)], lambda n: f"{n:,.0f}"),
        "cells": (cells, spell_count),
    }
    for phase in (model.forward, model.backward):
        sent, messages = [0] * ring, [0] * ring
        for span in phase.spans:
            if span.lane != "compute":
                sent[span.rank] += span.bytes
                messages[span.rank] += 1
        rows[f"bytes sent {phase.name}"] = sent, spell_bytes
        rows[f"messages {phase.name}"] = messages, lambda n: f"{n:,.1f}".removesuffix(".0")
    title = "each rank of a ring" if question.ulysses > 1 else "each rank"
    lines = [f"{title:<24}{'least':>12}{'mean':>12}{'most':>12}"]
    for name, (numbers, spell) in rows.items():
        least, mean, most = min(numbers), sum(numbers) / ring, max(numbers)
        lines.append(f"{name:<24}{spell(least):>12}{spell(mean):>12}{spell(most):>12}")
    return "\n".join(lines)


def _estimate(question: Question) -> str:
    """The estimate without its advice, since the tables say more; with a warning if the tensors do not fit."""
    text = str(replace(question.estimate, advise=tuple))
    needed, held = sum(question.estimate.memory.values()), question.machine.memory
    if needed > held:
        text += f"\ntoo much {spell_bytes(needed)} of tensors do not fit into the {spell_bytes(held)} of a device"
    return text


def _traffic(question: Question) -> str:
    """Both passes beside a plain ring and an all-gather."""
    model = question.model
    shared = f" in one of {question.ulysses} rings" if question.ulysses > 1 else ""
    lines = [f"traffic{shared}, counted message by message"]
    for name, of in model.plans_of(question.plans).items():
        width = model.pace(name, of).bytes_per_token
        counted = traffic(of, width["onward"], width["home"], ranks_per_node=model.ring_per_node)
        lines.append(f"{name:<9}" + str(counted).replace("; ", f"\n{'':<9}"))
    return "\n".join(lines)


def _table(title: str, key: str, candidates: Sequence[Candidate]) -> str:
    """What was compared, the fastest named; nothing if there is only one way."""
    if len(candidates) < 2:
        return ""
    names = [str(getattr(candidate, key)) for candidate in candidates]
    if key != "route":
        names = [f"{name}, {candidate.route}" for name, candidate in zip(names, candidates, strict=True)]
    wide = max(map(len, [title, *names]))
    fastest = min(candidates, key=lambda candidate: candidate.seconds)
    lines = [f"  {title:<{wide}}{'area max/mean':>15}{'forward':>10}{'backward':>10}{'together':>10}{'most sent':>11}"]
    for name, candidate in zip(names, candidates, strict=True):
        lines.append(
            f"{'*' if candidate.chosen else ' '} {name:<{wide}}{candidate.area:>15.2f}{spell_seconds(candidate.forward):>10}"
            f"{spell_seconds(candidate.backward):>10}{spell_seconds(candidate.seconds):>10}{spell_bytes(candidate.sent):>11}"
            + ("  fastest" if candidate is fastest else "")
        )
    return "\n".join(lines)


def _python(question: Question, candidate: Candidate) -> str:
    """The line that makes such a sharding."""
    terms = str(question.mask).partition("documents(")
    mask = re.sub(r"\b(full|causal|window|prefix|chunks)\b", r"rf.\1", terms[0])
    mask += "rf.documents(offsets)" if terms[1] else ""
    route = f'"{candidate.route}"' if candidate.route in ROUTES else f"rf.{candidate.route}"
    shared = f", heads_axis={candidate.ulysses}" if candidate.ulysses > 1 else ""
    return f's = rf.Sharding({question.length}, group, mask={mask}, layout="{candidate.layout}", route={route}{shared})'


def _record_of(phase: Pass) -> dict[str, Any]:
    return {
        "seconds": phase.seconds,
        "travels": phase.travels,
        "flops": phase.flops,
        "exposed_seconds": phase.exposed,
        "imbalance_seconds": phase.imbalance,
        "bytes": phase.bytes,
        "busiest_bytes": phase.busiest,
        "messages": phase.messages,
    }
