"""What every rank did in a few steps: traces that https://ui.perfetto.dev and chrome://tracing open, one file per rank.

The library names what it does, so a step of a ring can be read from left to right:

    main thread   [ringflash onward, for step 1][ringflash visit, step 0, shard 0      ][ringflash visit, step 1, ...
    transfers                                  [gloo:recv                              ]

PyTorch draws a transfer of gloo on the thread that posted it, across what that thread does meanwhile, which viewers cannot
show: here transfers have rows of their own. A bar of gloo ends where somebody has awaited the transfer, which may be later
than its end; on a GPU the kernels of NCCL are in the rows of their stream.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ranks import Ranks

Event = dict[str, Any]
_ROWS = 1 << 30  # the first thread number of a row of transfers: no thread has so high a number


class Profiler:
    """Records steps ``first`` to ``last`` (counted from 1) into ``folder``; without a folder, nothing."""

    def __init__(self, folder: Path | None, steps: tuple[int, int], ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks
        self._first, self._last = steps
        self._profile: profile | None = None

    @contextlib.contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Around step number ``step``; after the last one that is wanted the trace is written."""
        if self._folder is None or not self._first <= step <= self._last:
            yield
            return
        if self._profile is None:
            gpu = [ProfilerActivity.CUDA] if self._ranks.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()
        with record_function(f"step {step}"):
            yield
        if step == self._last:
            self._write(self._folder, self._profile)

    def _write(self, folder: Path, recorded: profile) -> None:
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        recorded.stop()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"trace-rank{self._ranks.rank}.json"
        recorded.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
        trace["traceEvents"] = set_apart(trace["traceEvents"], f"rank {self._ranks.rank} of {self._ranks.size}")
        path.write_text(json.dumps(trace))
        self._ranks.say(
            f"profile: steps {self._first} to {self._last} of every rank are in {folder / 'trace-rank0.json'} and so on; "
            "open them in https://ui.perfetto.dev"
        )


def set_apart(events: list[Event], title: str) -> list[Event]:
    """The events of one process, which is called ``title``, with transfers in rows where nothing overlaps."""
    sorted_out: dict[bool, list[Event]] = {False: [], True: []}
    for event in events:
        sorted_out[event.get("ph") == "X" and event["name"].startswith("gloo:")].append(event)
    others, transfers = sorted_out[False], sorted(sorted_out[True], key=lambda event: event["ts"])
    process = next((event["pid"] for event in events if event.get("cat") in ("cpu_op", "user_annotation")), 0)
    free: list[float] = []  # by row: when it becomes free
    for event in transfers:
        row = next((row for row, end in enumerate(free) if end <= event["ts"]), len(free))
        free[row : row + 1] = [event["ts"] + event["dur"]]
        event["tid"] = _ROWS + row
    for event in others:
        if event["name"] == "process_name" and event["pid"] == process:
            event["args"] = {"name": title}
    names = []
    for row in range(len(free)):
        names.append(dict(name="thread_name", tid=_ROWS + row, args={"name": f"transfers {row + 1}"}))
        names.append(dict(name="thread_sort_index", tid=_ROWS + row, args={"sort_index": _ROWS + row}))
    return [*others, *transfers, *(dict(ph="M", ts=0, pid=process, **name) for name in names)]
