"""`python -m ringflash plan`, written down: for people, and for programs.

For people: the schedule of one rank, what all ranks hold and send, the estimate, traffic beside a plain ring and an all-gather,
tables of other layouts, routes and divisions of the heads, and the line of Python to write. For programs: the same
numbers as one document, in seconds, bytes and counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from ringflash.forecast.cost import Pass
from ringflash.forecast.hardware import Link
from ringflash.forecast.memory import GRAIN, LEVELS, MODELS, longest_context, memory
from ringflash.forecast.timeline import schedule
from ringflash.forecast.traffic import traffic
from ringflash.plan import Plan
from ringflash.route import ROUTES
from ringflash.units import spell_bytes, spell_count, spell_seconds, spell_tokens
from ringflash.views.planner import Answer, Candidate, Question, count_sent
from ringflash.views.reading import spell_mask

_ABRIDGED = 14  # lines of a schedule that are shown, at most
_WIDE = 118  # columns of such a line


def write_report(answer: Answer, rank: int = 0) -> str:
    """The whole report; ``rank`` is the rank of the ring whose schedule is shown."""
    question = answer.question
    parts = [
        _heading(question),
        _schedules(question, rank),
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
    rows = f"{question.batch} x {wanted}" if question.batch > 1 else wanted
    shared = f"{question.ranks} ranks share a sequence" + (
        f", {question.batch} at a time" if question.batch > 1 else ""
    )
    rings = gpus // question.ranks
    lines = [
        f"training {model} ({spell_count(transformer.parameters)} parameters) on {gpus} x {machine.name}, a model: {shared}"
        + (f", {rings} such groups,\n" if rings > 1 else ",\n")
        + f"and all {gpus} share weights, gradients and AdamW's states (ZeRO stage 3)",
        f"  {'checkpointing':<14}{rows:>18}{'of':>10}{'longest context':>18}  limited by",
    ]
    for row in training_memory(question, model, gpus):
        longest = spell_tokens(row["longest_context"]) if row["longest_context"] else "none"
        lines.append(
            f"  {row['checkpointing']:<14}{spell_bytes(row['bytes']):>18}{spell_bytes(row['usable_bytes']):>10}{longest:>18}"
            f"  {row['limit']}"
        )
    attention = transformer.layers * question.estimate.seconds
    lines.append(
        f"  attention of its {transformer.layers} layers: {spell_seconds(attention)} of a step in which no forward runs twice"
    )
    return "\n".join(lines)


def training_memory(question: Question, model: str, gpus: int) -> list[dict[str, Any]]:
    """For each level of checkpointing: bytes of one rank at this length, and the longest context with what limits it.

    ``gpus`` is a multiple of the ranks: the sequences are split over the ranks, the model's states over all. A context is
    one sequence, of which ``batch`` are trained on at a time; what is in flight is that of the question's plans.
    """
    rows = []
    flight = question.in_flight
    options: dict[str, Any] = dict(shards=gpus, parts=flight.parts, totals=flight.totals)
    for level in LEVELS:
        tokens = question.length * question.batch
        needed = memory(model, tokens, gpus=question.ranks, checkpointing=level, **options)
        longest = longest_context(model, question.machine, question.ranks, checkpointing=level, **options)
        rows.append(
            {
                "checkpointing": level,
                "bytes": needed.total,
                "usable_bytes": longest.usable,
                "longest_context": longest.tokens // (question.batch * GRAIN) * GRAIN,
                "limit": longest.limit,
            }
        )
    return rows


def recommend(answer: Answer) -> str:
    """One sentence, and the line of Python that does it."""
    best, asked = answer.best, answer.asked
    why = "of what was tried, nothing is faster by more than 2 %"
    if not best.chosen:
        shared = f", {best.ulysses} {'rank' if best.ulysses == 1 else 'ranks'} to a shard,"
        shared = shared if best.ulysses > 1 or asked.ulysses > 1 else ""
        why = (
            f"the {best.layout} layout on route {best.route}{shared} would take {spell_seconds(best.seconds)} instead of "
            f"{spell_seconds(asked.seconds)} ({asked.seconds / best.seconds:.2f} x as fast)"
        )
    return f"{why}:\n  {_python(answer.question, best)}{_where(answer.question)}"


def record(answer: Answer) -> dict[str, Any]:
    """What the report says, as a document for programs."""
    question, model = answer.question, answer.question.estimate
    return {
        "what": "a model of ringflash's schedule, not a measurement",
        **{
            name: getattr(question, name)
            for name in ("length", "ranks", "batch", "heads", "kv_heads", "head_dim", "dtype")
        },
        "mask": _mask(question),
        "offsets": [list(row) for row in question.mask.documents],
        "layout": question.layout_name,
        "route": str(question.sharding.route),
        "ulysses": question.ulysses,
        "hardware": question.machine.name,
        "ranks_per_node": question.per_node,
        "links": {kind: _link(getattr(question.machine, kind)) for kind in ("within", "between")},
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


def _schedules(question: Question, rank: int) -> str:
    """What one rank of the ring does: in both passes, or in each, where the backward moves the queries."""
    passes = {name: of[rank] for name, of in question.model.plans_of(question.plans).items()}
    forward, backward = passes.values()
    if backward == forward:
        title = "forward and backward (only the backward sends totals home):\n"
        return f"{title if forward.ranks > 1 else ''}{_schedule(forward)}"
    return f"forward:\n{_schedule(forward, home=False)}\n\nbackward, in which queries travel:\n{_schedule(backward)}"


def _schedule(plan: Plan, home: bool = True) -> str:
    """The steps of one rank in which it does anything, those in the middle left out if there are many."""
    head, columns, *steps = str(plan).splitlines()
    if not home:
        columns, *steps = (line[: columns.index("sends home")].rstrip() for line in (columns, *steps))
    nothing = ["-"] * (3 if home else 2)
    lines = [line for line in steps if line.split()[1:] != nothing]
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
    model, ring = question.model, len(question.plans)
    held = question.plans[0].queries
    passes = model.plans_of(question.plans)
    tables = {name: schedule(of) for name, of in passes.items()}
    rows: dict[str, tuple[Sequence[int], Callable[[float], str]]] = {
        "tokens": ([held.tokens(rank) for rank in range(ring)], lambda n: f"{n:,.0f}"),
        "cells": (tables["forward"].cells(), spell_count),
    }
    for name, of in passes.items():
        sent, messages, swapped = zip(*count_sent(model, name, of, tables[name]), strict=True)
        if ring > 1:
            rows[f"bytes sent {name}"] = sent, spell_bytes
            rows[f"messages {name}"] = messages, lambda n: f"{n:,.1f}".removesuffix(".0")
        if question.ulysses > 1:
            rows[f"bytes swapped {name}"] = swapped, spell_bytes
    title = "each rank of a ring" if question.ulysses > 1 else "each rank"
    lines = [f"{title:<24}{'least':>12}{'mean':>12}{'most':>12}"]
    for name, (numbers, spell) in rows.items():
        least, mean, most = min(numbers), sum(numbers) / ring, max(numbers)
        lines.append(f"{name:<24}{spell(least):>12}{spell(mean):>12}{spell(most):>12}")
    return "\n".join(lines)


def _estimate(question: Question) -> str:
    """The estimate without its advice, since the tables say more; with a warning if the tensors do not fit."""
    text = question.estimate.summary
    needed, held = sum(question.estimate.memory.values()), question.machine.memory
    if needed > held:
        text += f"\ntoo much {spell_bytes(needed)} of tensors do not fit into the {spell_bytes(held)} of a device"
    return text


def _traffic(question: Question) -> str:
    """Both passes beside a plain ring and an all-gather; nothing where a ring is one rank."""
    model = question.model
    if len(question.plans) == 1:
        return ""
    shared = f" in {question.ulysses} rings" if question.ulysses > 1 else ""
    lines = [f"traffic{shared}, counted message by message"]
    for name, of in model.plans_of(question.plans).items():
        width = model.pace(name, of).bytes_per_token
        counted = traffic(of, width["onward"], width["home"], ranks_per_node=model.per_node, degree=question.ulysses)
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
    swaps = any(candidate.swapped for candidate in candidates)
    titles = ("area max/mean", "steps max/mean", "forward", "backward", "together", "most sent")
    lines = [f"  {title:<{wide}}{_row(titles)}" + (f"{'swapped':>11}" if swaps else "")]
    for name, of in zip(names, candidates, strict=True):
        cells = [f"{of.area:.2f}", f"{of.steps:.2f}", *map(spell_seconds, (of.forward, of.backward, of.seconds))]
        lines.append(
            f"{'*' if of.chosen else ' '} {name:<{wide}}{_row([*cells, _volume(of.sent)])}"
            + (f"{_volume(of.swapped):>11}" if swaps else "")
            + ("  fastest" if of is fastest else "")
        )
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, (15, 16, 10, 10, 10, 11), strict=True))


def _volume(count: int) -> str:
    return spell_bytes(count) if count else "-"


def _python(question: Question, candidate: Candidate) -> str:
    """The line that makes such a sharding, with the mask as it was asked for."""
    route = f'"{candidate.route}"' if candidate.route in ROUTES else f"rf.{candidate.route}"
    shared = f", heads_axis={candidate.ulysses}" if candidate.ulysses > 1 else ""
    given = f'mask={_mask(question)}, layout="{candidate.layout}", route={route}{shared}'
    return f"s = rf.Sharding({question.length}, group, {given})"


def _mask(question: Question) -> str:
    """The mask in Python; documents that are many stand for themselves as ``offsets``."""
    if question.spelling:
        return question.spelling
    return spell_mask(re.sub(r"documents\(.*\.\.\..*\)$", "documents(offsets)", repr(question.mask)))


def _where(question: Question) -> str:
    """What ``offsets`` are, if the line speaks of them."""
    if "(offsets)" not in _mask(question):
        return ""
    source = (
        f"the cumulative lengths in {question.offsets_from}"
        if question.offsets_from
        else "those of the mask's documents"
    )
    return f"\n  where offsets are {source}, from 0 to {question.length}"


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
        "swapped_bytes": phase.swapped,
        "busiest_swapped_bytes": phase.swap_busiest,
        "swap_messages": phase.swap_messages,
        "rate": phase.rate,
    }


def _link(link: Link) -> dict[str, Any]:
    return {**asdict(link), "attained_bytes_per_second": link.bytes_per_second * link.attained}
