"""One device plays every rank's schedule in turn: measured visits, balance and memory, and what links would make of them.

    python benchmarks/virtual_ring.py                                           two ranks on a CPU, and a real ring beside
    python benchmarks/virtual_ring.py --ranks 8 --length 256K --hardware h200   on a GPU, with the links of that machine

Measured: the seconds of every visit, forward and backward, how evenly they are spread over ranks and steps, and on a GPU the
memory of each rank. The numbers are those of one device on the whole sequence, or the run ends. Modelled, and labelled so: what
a ring would take on links of a stated latency and bandwidth (B, and beside it B/2, 2B and ten times the latency), since no
message is sent here. On a CPU a real ring of two gloo processes runs beside it, with the same schedule and shards of the same
size, and both figures are printed. No figure here says how anything scales.

The last line is one JSON document; records go to results/virtual_ring.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beside import RANKS, judge, ring
from hops import microseconds_per_hop, microseconds_per_lookup
from links import VARIATIONS, join
from play import PASSES, Heard, Stage, draw_inputs
from record import RESULTS, Journal
from stopwatch import Budget

import ringflash as rf
from ringflash.forecast.hardware import Hardware, Link, machine_names
from ringflash.forecast.holding import peak
from ringflash.forecast.timeline import schedule
from ringflash.forecast.workload import ITEMSIZE
from ringflash.plan import Plan
from ringflash.units import read_tokens, spell_bytes, spell_count, spell_seconds, spell_tokens
from ringflash.views.planner import LAYOUT_NAMES, ROUTE_NAMES, Question
from ringflash.views.reading import read_documents, read_mask

USUAL: dict[str, dict[str, Any]] = {
    "cpu": dict(ranks=2, length=8192, heads=8, kv_heads=2, head_dim=64, dtype="float32"),
    "cuda": dict(ranks=8, length=131072, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, model, print; 2 and a sentence for arguments that do not fit together."""
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type not in USUAL:
        parser.error(f"device is {options.device!r}; accepted are {', '.join(USUAL)}")
    for name, value in USUAL[device.type].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        question = _ask(options, options.hardware or _machine_of(device))
        assert question.plans and question.model
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.member:
        ring(question, options.minutes, options.member)
        return 0
    if device.type == "cpu":
        torch.set_num_threads(1)
    elif device.index is not None:
        torch.cuda.set_device(device)
    journal = Journal(options.out)
    run(question, device, options, journal)
    print(json.dumps({"written": options.out.name, "records": len(journal.records)} | _summary(journal.records)))
    return 0


def run(question: Question, device: torch.device, options: argparse.Namespace, journal: Journal) -> None:
    """All measurements, most certain first; each is printed and on disk before the next begins."""
    print(_heading(question, device, journal))
    host = microseconds_per_hop(device)
    lookups = microseconds_per_lookup()
    journal.add({"benchmark": "virtual_ring", "kind": "host", "us_per_hop": host, "us_per_lookup": lookups})
    print("measured  host, us per hop: " + ", ".join(f"{name} {us:.0f}" for name, us in host.items()))
    print("measured  host, us per lookup: " + ", ".join(f"{name} {us:.2f}" for name, us in lookups.items()))
    beside: list[dict[str, Any]] = []
    if device.type == "cpu" and not options.alone and (os.cpu_count() or 1) >= RANKS:
        beside = _run_beside(question, options, host)
    question = replace(question, hardware=_with_links(question.machine, options, beside))
    shape = {"ranks": question.ranks, "length": question.length, "mask": _brief(question.mask), **_shape(question)}
    plans = question.model.plans_of(question.plans)
    inputs = draw_inputs(
        question.length, (question.heads, question.kv_heads), question.head_dim, getattr(torch, question.dtype), device
    )
    stage = Stage(plans, inputs, options.backend)
    heard = stage.rehearse(Budget(options.minutes))
    for name in PASSES:
        journal.add({"benchmark": "virtual_ring"} | shape | measured(question, name, plans[name], heard))
        print(_measured_line(journal.records[-1]))
    journal.add({"benchmark": "virtual_ring"} | shape | memory(question, plans, heard))
    print(_memory_lines(journal.records[-1]))
    for name in PASSES:
        journal.add({"benchmark": "virtual_ring"} | shape | modelled(question, name, plans[name], heard, host[name]))
        print(_model_lines(journal.records[-1]))
    for record in beside:
        journal.add({"benchmark": "virtual_ring"} | shape | record)
        print(_ring_line(record))


def measured(question: Question, name: str, plans: Sequence[Plan], heard: Heard) -> dict[str, Any]:
    """The visits of one pass: seconds, and how evenly they are spread.

    ``balance`` is the busiest rank over the mean; ``steps_over_mean`` the sum over steps of the longest visit over the mean
    rank: what waiting for each other would cost where nobody runs ahead. ``area`` is ``balance`` by counted cells.
    """
    seconds = heard.median(name)
    cells, work = schedule(plans).cells(), question.model.workload
    ranks = [sum(visits) for visits in seconds]
    mean = sum(ranks) / len(ranks)
    longest: dict[int, float] = {}
    for plan, visits in zip(plans, seconds, strict=True):
        for meeting, spent in zip(plan.meetings, visits, strict=True):
            longest[meeting.step] = max(longest.get(meeting.step, 0.0), spent)
    rounds = [[sum(map(sum, played))] for played in heard.visits[name]]
    return {
        "kind": "visits",
        "pass": name,
        "travels": plans[0].travels,
        "seconds": seconds,
        "steps": [[meeting.step for meeting in plan.meetings] for plan in plans],
        "rounds": len(heard.visits[name]),
        "mean_rank_seconds": mean,
        "balance": max(ranks) / mean if mean else 1.0,
        "steps_over_mean": sum(longest.values()) / mean if mean else 1.0,
        "area": max(cells) * len(cells) / max(1, sum(cells)),
        "flops_per_second": sum(cells) * work.flops[name] * work.pairs_per_cell / max(1e-12, sum(ranks)),
        "spread": float(np.ptp(rounds) / np.median(rounds)),
    }


def memory(question: Question, plans: dict[str, Sequence[Plan]], heard: Heard) -> dict[str, Any]:
    """Bytes of each rank at its peak: counted from the plan, messages in flight included; on a GPU also measured without."""
    pairs = zip(plans["forward"], plans["backward"], strict=True)
    counted = [peak([forward], [backward], question.model.workload) for forward, backward in pairs]
    totals = [sum(tensors.values()) for tensors in counted]
    fullest = max(range(len(totals)), key=totals.__getitem__)
    device = {name: peaks for name, peaks in heard.peaks.items() if peaks}
    return {"kind": "memory", "counted_bytes": totals, "fullest": counted[fullest], "device_peak_bytes": device}


def modelled(question: Question, name: str, plans: Sequence[Plan], heard: Heard, host: float) -> dict[str, Any]:
    """The same visits over links: a model, at the bandwidth and latency that are stated and at others around them."""
    model, rounds = question.model, heard.rounds(name)
    return {
        "kind": "model",
        "pass": name,
        "links": {
            kind: {"name": x.name, "bytes_per_second": x.bytes_per_second * x.attained, "latency": x.latency}
            for kind, x in zip(("within", "between"), model.links, strict=True)
        },
        "model": {variation: vars(join(model, name, plans, rounds, host / 1e6, variation)) for variation in VARIATIONS},
    }


def _run_beside(question: Question, options: argparse.Namespace, host: dict[str, float]) -> list[dict[str, Any]]:
    """A real ring of two, with shards as long as those that are played (documents stay as they are)."""
    length = question.length if question.mask.length else question.length * RANKS // question.ranks
    route = "ring" if question.route == "double_ring" else question.route
    asked = replace(question, ranks=RANKS, length=length, route=route, ranks_per_node=None)
    passed = [f"--{name.replace('_', '-')}={getattr(asked, name)}" for name in ("ranks", "length", "route", "layout")]
    passed += [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in ("heads", "kv_heads", "head_dim")]
    passed += [f"--dtype={options.dtype}", f"--mask={options.mask}", f"--minutes={options.minutes}", "--device=cpu"]
    passed += [f"--documents={options.documents}"] if options.documents else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    paths = [str(Path(rf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, str(Path(__file__).resolve()), *passed, f"--member={folder}"]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return judge(asked, Path(folder), host)


def _with_links(machine: Hardware, options: argparse.Namespace, beside: Sequence[dict[str, Any]]) -> Hardware:
    """The machine with the links that were asked for; with those of gloo, as measured, if none were."""
    known = machine.within
    bandwidth, latency, name = known.bytes_per_second * known.attained, known.latency, "given"
    if options.bandwidth is not None or options.latency is not None:
        bandwidth = bandwidth if options.bandwidth is None else options.bandwidth
        latency = latency if options.latency is None else options.latency
    elif beside and options.hardware is None:
        bandwidth, latency, name = beside[0]["link"]["bytes_per_second"], beside[0]["link"]["latency"], "gloo"
    else:
        return machine
    link = Link(name, bandwidth, 1.0, latency)
    return machine.with_(within=link, between=link)


def _ask(options: argparse.Namespace, hardware: str) -> Question:
    mask = read_mask(options.mask)
    if options.documents:
        mask &= rf.documents(read_documents(options.documents, options.length))
    return Question(
        options.length,
        options.ranks,
        mask,
        options.layout,
        options.route,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        dtype=options.dtype,
        hardware=hardware,
        ranks_per_node=options.ranks_per_node,
    )


def _machine_of(device: torch.device) -> str:
    """The machine that the device is called after; an H200 if nobody knows."""
    called = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).lower()
    return next((name for name in machine_names() if name in called), "h200")


def _shape(question: Question) -> dict[str, Any]:
    names = ("heads", "kv_heads", "head_dim", "dtype")
    settled = {"layout": question.layout_name, "route": str(question.sharding.route)}
    return settled | {name: getattr(question, name) for name in names}


def _brief(mask: rf.Mask) -> str:
    text = str(mask)
    return text if len(text) <= 80 else f"{text[:60]}... ({len((mask.documents or ((),))[0]) - 1} documents)"


def _heading(question: Question, device: torch.device, journal: Journal) -> str:
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else "one core of a CPU"
    shape = _shape(question)
    return (
        f"{question.ranks} ranks played in turn on {here}: {spell_tokens(question.length)} tokens, {_brief(question.mask)}, "
        f"layout {shape['layout']}, route {shape['route']},\n{question.heads} query and {question.kv_heads} key heads of "
        f"{question.head_dim}, {question.dtype}; load of the machine {os.getloadavg()[0]:.1f}"
    )


def _measured_line(r: dict[str, Any]) -> str:
    return (
        f"measured  {r['pass']:<9}{r['travels']} travel; mean rank {spell_seconds(r['mean_rank_seconds'])}, busiest / mean "
        f"{r['balance']:.3f} (cells {r['area']:.3f}), longest of each step / mean {r['steps_over_mean']:.3f}, "
        f"{spell_count(r['flops_per_second'])}FLOP/s, {r['rounds']} rounds, spread {r['spread']:.0%}"
    )


def _memory_lines(r: dict[str, Any]) -> str:
    most = ", ".join(f"{name} {spell_bytes(count)}" for name, count in r["fullest"].items() if count)
    counted = r["counted_bytes"]
    lines = [f"counted   memory, fullest rank {spell_bytes(max(counted))}, least {spell_bytes(min(counted))}: {most}"]
    for name, peaks in r["device_peak_bytes"].items():
        lines.append(f"measured  memory of {name}, without messages: most {spell_bytes(max(peaks))}")
    return "\n".join(lines)


def _model_lines(r: dict[str, Any]) -> str:
    link, lines = r["links"]["within"], []
    for variation, m in r["model"].items():
        seconds = f"{spell_seconds(m['seconds'])}, of it exposed {spell_seconds(m['exposed'])}"
        lines.append(f"model     {r['pass']:<9}{variation:<4}{seconds}")
        if variation == "B":
            bandwidth, latency = spell_count(link["bytes_per_second"]), spell_seconds(link["latency"])
            lines[-1] += f"   ({link['name']}: B = {bandwidth}B/s, a = {latency})"
    return "\n".join(lines)


def _ring_line(r: dict[str, Any]) -> str:
    real, tokens = spell_seconds(r["measured_ring_seconds"]), spell_tokens(r["length"])
    lines = [f"measured  {r['pass']:<9}real ring of {r['processes']} gloo processes, {tokens} tokens: {real}"]
    how = {"quiet": "played one after the other", "together": "played on both cores at once"}
    for kind, m in r["model"].items():
        seconds, ratio = spell_seconds(m["seconds"]), r["measured_over_model"][kind]
        lines.append(
            f"model     {r['pass']:<9}of that ring, visits {how[kind]}: {seconds}; measured / model {ratio:.3f}"
        )
    return "\n".join(lines)


def _summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_kind = {(r["kind"], r.get("pass")): r for r in records}
    return {
        "balance": {name: by_kind["visits", name]["balance"] for name in PASSES},
        "model_seconds": {name: by_kind["model", name]["model"]["B"]["seconds"] for name in PASSES},
        "measured_over_model": {
            name: by_kind["ring", name]["measured_over_model"] for name in PASSES if ("ring", name) in by_kind
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto", help="of ringflash")
    for name in ("ranks", "heads", "kv-heads", "head-dim", "ranks-per-node"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--length", type=read_tokens, help="tokens, as 65536, 64K or 1M")
    parser.add_argument("--mask", default="causal", help='as "causal & window(4095, 0)"')
    parser.add_argument("--documents", help="a file with the lengths of packed documents")
    parser.add_argument("--layout", choices=LAYOUT_NAMES, default="auto")
    parser.add_argument("--route", choices=ROUTE_NAMES, default="auto")
    parser.add_argument("--dtype", choices=ITEMSIZE)
    parser.add_argument("--hardware", help=f"whose links are modelled: {', '.join(machine_names())}, or a TOML file")
    parser.add_argument("--bandwidth", type=float, help="bytes per second of a link, in its place")
    parser.add_argument("--latency", type=float, help="seconds")
    parser.add_argument("--minutes", type=float, default=1.0, help="of timing; at least 3 rounds, at most 30")
    parser.add_argument("--alone", action="store_true", help="on a CPU: without the real ring")
    parser.add_argument("--out", type=Path, default=RESULTS / "virtual_ring.jsonl")
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)  # a process of the real ring
    return parser


if __name__ == "__main__":
    sys.exit(main())
