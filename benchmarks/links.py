"""Links: measured where there are some, modelled where there are none, and joined with visits that were measured.

``timeline.py`` plays a schedule with what every visit and message costs. Here a visit costs what it took on a real device,
and a message the latency of a link and its bytes over a bandwidth:

    T  =  sum over steps of max(C_i, a + n_i / B)  +  C_last        where all ranks do the same; in general, who waits waits

So ``C`` is measured, ``a`` and ``B`` are inputs, and ``T`` is a model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ringflash.forecast.model import Model, ideal
from ringflash.forecast.timeline import Channel, Pace, Schedule, play, schedule
from ringflash.plan import Plan
from ringflash.wire import Wire

NANO = 1e-9
VARIATIONS = {"B/2": (0.5, 1), "B": (1, 1), "2B": (2, 1), "10a": (1, 10)}
"""How the bandwidth and the latency of every link are varied, by name: nobody has measured them."""


@dataclass(frozen=True)
class Modelled:
    """Seconds of one pass in the model: until the last rank is done, of the mean rank's visits, and what transfers add."""

    seconds: float
    compute: float
    exposed: float


def measured_schedule(plans: Sequence[Plan], seconds: Sequence[Sequence[float]]) -> Schedule:
    """The schedule whose visits have so many nanoseconds where plans have cells. ``seconds[rank]`` in the order of its plan."""
    table, left = schedule(plans), [iter(visits) for visits in seconds]
    moves = [
        move._replace(visits=tuple(v._replace(cells=round(next(left[v.rank]) / NANO)) for v in move.visits))
        for move in table.moves
    ]
    return replace(table, moves=tuple(moves))


def join(
    model: Model,
    name: str,
    plans: Sequence[Plan],
    seconds: Sequence[Sequence[float]],
    before: float,
    host: float,
    variation: str = "B",
) -> Modelled:
    """A pass of measured visits over the links of ``model``, varied; ``before`` are seconds of each rank's work ahead of it."""
    table, pace = measured_schedule(plans, seconds), model.pace(name, plans)
    wider, later = VARIATIONS[variation]
    links = tuple(Channel(link.latency * later, link.per_byte / wider) for link in pace.links)
    pace = replace(pace, per_cell=NANO, links=links, host=host, before=before)
    total = play(table, pace)
    compute = sum(map(sum, seconds)) / len(plans) + before
    return Modelled(total, compute, max(0.0, total - play(table, _free(pace))))


def _free(pace: Pace) -> Pace:
    """Links that cost nothing; the work ahead stays."""
    return replace(ideal(pace), before=pace.before)


def measure_link(wire: Wire, count: int, repeats: int = 30) -> dict[str, Any]:
    """Latency and bandwidth between two ranks that send ``count`` bytes to each other at the same time. Collective.

    The bandwidth is of one direction, at that size, with nothing computed meanwhile; medians of ``repeats``.
    """
    wire.warm_up(torch.device("cpu"))
    peer = 1 - wire.rank

    def seconds(size: int) -> float:
        out, back = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
        times = []
        for _ in range(repeats + 2):
            dist.barrier()
            began = time.perf_counter()
            wire.exchange([(peer, out)], [(peer, back)]).wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[2:])

    latency = seconds(64)
    return {"bytes": count, "latency": latency, "bytes_per_second": count / max(1e-9, seconds(count) - latency)}
