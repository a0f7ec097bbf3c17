"""Estimates as traces: a timeline of every rank that chrome://tracing and https://ui.perfetto.dev open.

A process is a rank, a thread is what it does at the same time (compute, onward, home). A bar is a visit or a message; an
arrow leads from a message to the visit, or to the next message, that had to wait for it:

    rank 0   compute   [ shard 0    ][ shard 3    ]
             onward    [ 0 to 1 ]----.
    rank 1   compute   [ shard 1    ][ shard 0    ]
             onward    [ 1 to 0 ]

Forward and backward follow each other. Every duration is modelled, and the file says so. Format: Chrome's Trace Event
Format (JSON object form), timestamps in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any

from ringflash.forecast.cost import Estimate, Pass, Span
from ringflash.views.reading import read_path

TIMELINES = (".json",)
"""The suffixes of a trace."""

LANES = ("compute", "exchange", "onward", "home")
"""The threads of a rank, from top to bottom."""

_TRACKS = 1000  # thread numbers of a lane: messages that travel at the same time need one each
_THREADS = 10 * _TRACKS  # of a rank. Process r + 1 is rank r: viewers take process and thread 0 for the idle machine

Event = dict[str, Any]


def trace(estimate: Estimate, path: str | PathLike[str]) -> None:
    """Write ``estimate`` as a trace into ``path`` (JSON): open it in Perfetto. It is a model, and is labelled as one.

    Raises ``TypeError`` or ``ValueError`` for another thing than an estimate, or a path that does not end in .json.
    """
    if not isinstance(estimate, Estimate):
        raise TypeError(
            f"trace: estimate is a {type(estimate).__name__}; an estimate is needed, rf.estimate(plans, ...)"
        )
    file = read_path(path, TIMELINES, "trace: path")
    events: list[Event] = []
    start = 0
    for phase in (estimate.forward, estimate.backward):
        events += _bars(phase, start)
        start += _nanoseconds(phase.seconds)
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
    document = {
        "traceEvents": [*_names(events), *events],
        "displayTimeUnit": "ms",
        "otherData": {
            "what": "a model of ringflash's schedule, not a measurement",
            "limit": estimate.limit,
            **{f"{phase.name}_seconds": phase.seconds for phase in (estimate.forward, estimate.backward)},
        },
    }
    file.write_text(json.dumps(document, separators=(",", ":"), allow_nan=False))


def _bars(phase: Pass, start: int) -> Iterator[Event]:
    """One event per span, each on a thread where nothing overlaps, and the arrows between them."""
    placed: list[tuple[Span, Event]] = []
    ends: dict[tuple[int, str], list[int]] = {}
    for span in sorted(phase.spans, key=lambda span: (span.start, span.end)):
        begin, end = (start + _nanoseconds(second) for second in (span.start, span.end))
        tracks = ends.setdefault((span.rank, span.lane), [])
        track = next((i for i, free in enumerate(tracks) if free <= begin), len(tracks))
        tracks[track : track + 1] = [end]
        details = {"step": span.step, "pass": phase.name, "modelled": True}
        if span.lane != "compute":
            details |= {"bytes": span.bytes, "peer": span.peer}
        event = dict(
            ph="X",
            name=span.label,
            cat=f"{phase.name},{span.lane}",
            pid=span.rank + 1,
            tid=(span.rank + 1) * _THREADS + LANES.index(span.lane) * _TRACKS + track,
            ts=begin / 1000,
            dur=(end - begin) / 1000,
            args=details,
        )
        placed.append((span, event))
    yield from (event for _, event in placed)
    yield from _arrows(placed, phase.name)


def _arrows(placed: Iterable[tuple[Span, Event]], name: str) -> Iterator[Event]:
    """From each message to what waits for it on its receiver: the visit, or the message that passes it on."""
    found: dict[tuple[int, str, str], list[Event]] = {}
    messages = []
    for span, event in placed:
        thing, _, passed_on = span.label.partition(" to rank ")
        found.setdefault((span.rank, span.lane, thing), []).append(event)
        if passed_on and span.peer is not None:
            messages.append((span, event, thing, span.peer))
    for number, (span, event, thing, peer) in enumerate(messages):
        arrival = event["ts"] + event["dur"] - 1e-3  # within the rounding
        waiting = ("compute", "onward") if span.lane == "onward" else ("home",)
        uses = [use for lane in waiting for use in found.get((peer, lane, thing), ()) if use["ts"] >= arrival]
        if uses and event["dur"] > 0:
            arrow = dict(name=span.lane, cat=f"{name},arrow", id=f"{name} {number}")
            yield dict(ph="s", pid=event["pid"], tid=event["tid"], ts=event["ts"], **arrow)
            yield dict(ph="f", bp="e", pid=uses[0]["pid"], tid=uses[0]["tid"], ts=uses[0]["ts"], **arrow)


def _names(events: Iterable[Event]) -> Iterator[Event]:
    """What the processes and threads are called, and in which order they stand."""
    used = sorted({(event["pid"], event["tid"]) for event in events})
    for process in sorted({process for process, _ in used}):
        names = {"process_name": {"name": f"rank {process - 1}"}, "process_sort_index": {"sort_index": process}}
        yield from (dict(ph="M", name=name, pid=process, tid=process, args=args) for name, args in names.items())
    for process, thread in used:
        lane, track = divmod(thread - process * _THREADS, _TRACKS)
        label = LANES[lane] + (f" {track + 1}" if track else "")
        names = {"thread_name": {"name": label}, "thread_sort_index": {"sort_index": thread}}
        yield from (dict(ph="M", name=name, pid=process, tid=thread, args=args) for name, args in names.items())


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
