"""What plans send, how evenly they share the work, and how long they take to make. No device, no network: counted.

    python benchmarks/planning.py

Prints three tables as markdown and writes results/planning.jsonl. Traffic is counted message by message, in shares of a
plain ring (P - 1 whole shards for every rank; an all-gather sends as much) for the same problem; every set of plans it
counts is verified first. Documents have log-normal lengths (mean 2K, tail to 128K), packed into 1M tokens. Times are the
least of several, each from empty caches, in this process on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from record import write

import ringflash as rf
from ringflash import auto, balance, layout, needs, plan, recipe, route, shard
from ringflash.balance import balance_of
from ringflash.forecast.traffic import traffic

LENGTH = 1 << 20
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens (default 1M)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64], help="of the table of documents")
    options = parser.parse_args()
    tables: dict[str, Iterator[Record]] = {
        "traffic": sent(options.length),
        "documents": shared(options.length, options.ranks),
        "planning": planned(options.length),
    }
    records: list[Record] = []
    for name, rows in tables.items():
        table = list(rows)
        print(f"\n{name}\n\n{markdown(table)}", flush=True)
        records += [{"benchmark": name, "length": options.length} | row for row in table]
    path = write("planning", records)
    worst = max(
        row["area max/mean"] for row in records if row["benchmark"] == "documents" and row["layout"] == "balanced"
    )
    print(json.dumps({"zigzag_8": records[1]["forward"], "balanced_worst_area": worst, "written": path.name}))


def packed(length: int, seed: int = 0) -> list[int]:
    """Offsets of documents of log-normal lengths: mean 2K, none above 128K, as many as fit."""
    draw, total, lengths = np.random.default_rng(seed), 0, []
    while total < length:
        some = int(np.clip(draw.lognormal(np.log(2048) - 0.98, 1.4), 16, 1 << 17))
        lengths.append(min(some, length - total))
        total += lengths[-1]
    return [0, *np.cumsum(lengths).tolist()]


def sent(length: int) -> Iterator[Record]:
    """Bytes beside those of a plain ring."""
    window, documents = rf.causal & rf.window(4095, 0), rf.causal & rf.documents(packed(length))
    cases: list[tuple[str, rf.Mask, str, list[str]]] = [
        ("causal", rf.causal, "zigzag", ["ring", "ring_down", "needed_only"]),
        ("window 4K", window, "contiguous", ["ring", "needed_only"]),
        ("documents", documents, "balanced", ["ring", "gather"]),
        ("documents", documents, "contiguous", ["ring", "gather"]),
    ]
    for ranks in (8, 64):
        for name, mask, layout_name, routes in cases:
            for route_name in routes:
                plans = rf.plans(rf.Sharding(length, (0, ranks), mask, layout_name, route_name))
                rf.verify(plans)
                forward, backward = traffic(plans, 1), traffic(plans, 1, 2)  # gradients are twice as wide as bfloat16
                hops = max(sum(bool(step.onward) for step in p.steps) for p in plans)
                yield {
                    "ranks": ranks,
                    "mask": name,
                    "layout": layout_name,
                    "route": route_name,
                    "forward": share(forward.ours.total, forward.ring.total),
                    "forward + backward": share(
                        forward.ours.total + backward.ours.total, forward.ring.total + backward.ring.total
                    ),
                    "busiest rank, forward": share(forward.ours.sent, forward.ring.sent),
                    "messages": forward.messages,
                    "most hops of a rank": hops,
                }


def shared(length: int, worlds: Sequence[int]) -> Iterator[Record]:
    """Balance, bytes and waiting for packed documents, beside other layouts, on nodes of 8 and the routes chosen for them."""
    mask = rf.causal & rf.documents(packed(length))
    for ranks in worlds:
        for name in ("contiguous", "zigzag", "balanced"):
            held = rf.Sharding(length, (0, ranks), mask, name, "ring").plan.queries
            s = rf.Sharding(length, (0, ranks), mask, held, auto.choose_route(held, held, mask, 0, nodes=ranks // 8))
            plans = rf.plans(s)
            rf.verify(plans)
            even = balance_of(held, mask)
            cells = np.zeros((ranks, ranks))  # by step and rank
            for p in plans:
                for visit in p.meetings:
                    cells[visit.step, p.rank] = p.cells(visit.shard)
            yield {
                "ranks": ranks,
                "layout": name,
                "tokens max/mean": round(even.token_ratio, 3),
                "area max/mean": round(even.area_ratio, 3),
                "steps' maxima / mean": round(float(cells.max(axis=1).sum() / cells.sum(axis=0).mean()), 2),
                "foreign keys": even.foreign_keys,
                "route": str(s.route),
                "forward bytes of a plain ring": share(*_totals(plans)),
                "estimated ms, forward + backward": round(_milliseconds(plans), 1),
            }


def _totals(plans: Sequence[rf.Plan]) -> tuple[int, int]:
    counted = traffic(plans, 1)
    return counted.ours.total, counted.ring.total


def _milliseconds(plans: Sequence[rf.Plan]) -> float:
    """On modelled H100s, 8 to a node, 32 heads, 8 key heads of 128."""
    model = rf.estimate(plans, "h100", heads=32, kv_heads=8)
    return 1e3 * (model.forward.seconds + model.backward.seconds)


def planned(length: int) -> Iterator[Record]:
    """Milliseconds until one rank knows its steps, and until it has its tables; microseconds for what it knows already."""
    documents = rf.causal & rf.documents(packed(length))
    cases: list[tuple[str, rf.Mask, str, str]] = [
        ("causal", rf.causal, "zigzag", "ring_down"),
        ("causal", rf.causal, "auto", "auto"),
        ("causal", rf.causal, "striped", "ring"),
        ("window 4K", rf.causal & rf.window(4095, 0), "contiguous", "ring"),
        (f"{len(documents.documents[0]) - 1} documents", documents, "balanced", "gather"),
        (f"{len(documents.documents[0]) - 1} documents", documents, "auto", "auto"),
    ]
    for name, mask, layout_name, route_name in cases:
        yield {"ranks": 64, "mask": name, "layout": layout_name, "route": route_name} | timed(
            partial(rf.Sharding, length, (3, 64), mask, layout_name, route_name)
        )


def timed(build: Callable[[], rf.Sharding]) -> Record:
    """What it takes until this rank knows its steps; until it has their tables; and to look at a sharding it has."""
    seconds, s = fresh(build)
    other = s.mask & rf.window(99, 0)
    s.with_mask(other)
    shards = [visit.shard for visit in s.plan.meetings]
    return {
        "plan, ms": round(1e3 * seconds, 2),
        "tables, ms": round(1e3 * least(lambda: list(s.plan.tables(shards))), 2),
        "s.plan, us": round(1e6 * least(lambda: repeat(lambda: s.plan)) / 1000, 2),
        "s.with_mask(held), us": round(1e6 * least(lambda: repeat(lambda: s.with_mask(other))) / 1000, 2),
    }


def fresh(build: Callable[[], rf.Sharding], rounds: int = 9) -> tuple[float, rf.Sharding]:
    """The least seconds of a sharding and its steps from empty caches, and the sharding."""
    best, made = float("inf"), build()
    for _ in range(rounds):
        for module in (auto, balance, layout, needs, plan, route, shard, recipe):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
        start = time.perf_counter()
        made = build()
        assert made.plan.steps
        best = min(best, time.perf_counter() - start)
    return best, made


def least(call: Callable[[], object], rounds: int = 5) -> float:
    """The least seconds of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def repeat(call: Callable[[], object], times: int = 1000) -> None:
    for _ in range(times):
        call()


def share(ours: float, theirs: float) -> float:
    return float(f"{ours / theirs:.3g}")


def markdown(rows: Sequence[Record]) -> str:
    """A table with the keys of the first row as its head."""
    head = list(rows[0])
    lines = [
        head,
        ["---"] * len(head),
        *([f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
