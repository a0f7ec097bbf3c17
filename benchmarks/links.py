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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ringflash.forecast.model import Model, ideal
from ringflash.forecast.timeline import Channel, Schedule, play, schedule
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


class Played(NamedTuple):
    """One round of a pass: seconds of each rank's visits in the order of its plan, and of its work ahead of the first."""

    visits: Sequence[Sequence[float]]
    before: Sequence[float]


def charge(table: Schedule, seconds: Sequence[Sequence[float]]) -> Schedule:
    """The schedule with so many nanoseconds in each visit as it had cells. ``seconds[rank]`` in the order of its plan."""
    left = [iter(visits) for visits in seconds]
    moves = [
        move._replace(visits=tuple(v._replace(cells=round(next(left[v.rank]) / NANO)) for v in move.visits))
        for move in table.moves
    ]
    return replace(table, moves=tuple(moves))


def join(
    model: Model, name: str, plans: Sequence[Plan], rounds: Sequence[Played], host: float, variation: str = "B"
) -> Modelled:
    """Measured visits over the links of ``model``, varied. Each round is a run of the model; their medians are returned.

    ``host`` are seconds per step. Ranks begin together, after the work ahead of the mean rank.
    """
    table, pace = schedule(plans), model.pace(name, plans)
    wider, later = VARIATIONS[variation]
    links = tuple(Channel(link.latency * later, link.per_byte / wider) for link in pace.links)
    runs = []
    for visits, ahead in rounds:
        before = sum(ahead) / len(plans)
        charged = charge(table, visits)
        timed = replace(pace, per_cell=NANO, links=links, host=host, before=before)
        total, alone = play(charged, timed), play(charged, replace(ideal(timed), before=before))
        runs.append((total, sum(map(sum, visits)) / len(plans) + before, max(0.0, total - alone)))
    return Modelled(*map(statistics.median, zip(*runs, strict=True)))


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
