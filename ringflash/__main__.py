"""Two commands: what is here and whether it runs right; what a run will take, before it runs.

    python -m ringflash check
    python -m ringflash plan --length 1M --ranks 64 --draw plan.svg

The work is done in ``machine.py``, and in ``planner.py`` and ``report.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Timer
from typing import TypeVar

from ringflash import machine
from ringflash.forecast.hardware import link_names, load_hardware, machine_names
from ringflash.forecast.memory import MODELS
from ringflash.forecast.workload import ITEMSIZE
from ringflash.mask import documents, window
from ringflash.units import read_tokens
from ringflash.views.draw import PICTURES, draw
from ringflash.views.planner import LAYOUT_NAMES, ROUTE_NAMES, Answer, Question
from ringflash.views.reading import read_documents, read_mask, read_path, spell_mask
from ringflash.views.report import record, training_memory, write_memory, write_report
from ringflash.views.trace import TIMELINES, trace

_Read = TypeVar("_Read")
_SHAPES = dict(heads=32, kv_heads=8, head_dim=128)
_OPTIONS = {"heads_axis": "--ulysses", "heads_degree": "--ulysses"} | {
    name: f"--{name.replace('_', '-')}"
    for name in (*_SHAPES, "batch", "dtype", "ranks_per_node", "layout", "route", "length", "hardware", "rank", "mask")
}
"""What the library calls arguments that are options here."""
_PATIENCE = 3.0
"""Seconds after which somebody who waits is told for what."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit code of the process. 2 and a sentence for arguments that do not fit together."""
    parser = argparse.ArgumentParser(prog="python -m ringflash", description="Exact ring attention in PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    check_parser = commands.add_parser(
        "check", help="report what this machine can run, and prove in seconds that the ring is exact on it"
    )
    check_parser.set_defaults(run=lambda _: check())
    plan_parser = commands.add_parser(
        "plan",
        help="plan a run: its schedule, what it will take on a described machine, and which layout and route are best",
        usage="%(prog)s --length 1M --ranks 64 [options]; --help lists them",
        description="Plan one attention call on many devices. Nothing is sent and no device is needed: times are modelled.",
    )
    _add_options(plan_parser)
    plan_parser.set_defaults(run=plan)
    chosen = parser.parse_args(arguments)
    try:
        exit_code: int = chosen.run(chosen)
    except _Refused as refused:
        parser.exit(2, f"{parser.prog} {chosen.command}: {refused}\n")
    return exit_code


def check() -> int:
    """Print the inventory and the proofs. 0 if the ring is exact with all that runs here, else 1 and a sentence."""
    print(machine.report())
    print(
        "\nself-test: a causal ring of 3 ranks in this process against one device in float64; largest error allowed "
        "1e-10, or 1e-5 where a backend computes in float32"
    )
    for device, backend in ((kind, name) for kind in machine.device_kinds() for name in machine.serving(kind)):
        try:
            proof = machine.prove(device, backend)
        except Exception as error:
            traceback.print_exc()
            print(f"\nNot all is right: {backend} on {device} raised {type(error).__name__}: {error}")
            return 1
        print(f"  {proof}")
        if not proof.exact:
            wrong = ", ".join(name for name, error in proof.errors.items() if not error <= proof.allowed)
            print(
                f"\nNot all is right: {backend} on {device} gives a ring whose {wrong} differ from one device by up to "
                f"{proof.worst:.1e}. Do not train with this installation; please report the lines above."
            )
            return 1
    print("\nAll is right: the ring gives what one device gives.")
    return 0


def plan(chosen: argparse.Namespace) -> int:
    """Print the plan of a run, or its JSON; draw and trace it where that is asked for."""
    with _announced(f"planning {chosen.ranks} ranks ..."):
        question = _ask(chosen)
        try:
            if chosen.draw:
                draw(question.plans, chosen.draw, question.estimate)
            if chosen.trace:
                trace(question.estimate, chosen.trace)
        except (ValueError, OSError, ImportError) as error:  # no such folder, no matplotlib
            raise _Refused(_sentence(error)) from None
        text = _written(question, chosen)
    print(text)
    return 0


def _written(question: Question, chosen: argparse.Namespace) -> str:
    answer, model, gpus = Answer(question), chosen.model, chosen.gpus or chosen.ranks
    if chosen.json:
        training = {"model": model, "gpus": gpus, "training": training_memory(question, model, gpus)} if model else {}
        return json.dumps(record(answer) | training, indent=2, allow_nan=False)
    return write_report(answer, chosen.rank) + (f"\n\n{write_memory(question, model, gpus)}" if model else "")


@contextmanager
def _announced(words: str) -> Iterator[None]:
    """Say ``words`` on stderr if this takes long."""
    timer = Timer(_PATIENCE, print, (words,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Refused(Exception):
    """Arguments that cannot be served, in one sentence."""


def _ask(chosen: argparse.Namespace) -> Question:
    """The question that the arguments spell, if all of it fits together."""
    model = MODELS.get(chosen.model)
    shapes: dict[str, int] = {
        name: getattr(chosen, name) or (usual if model is None else getattr(model, name))
        for name, usual in _SHAPES.items()
    }
    try:
        mask, length, spelling = read_mask(chosen.mask), chosen.length, [spell_mask(chosen.mask)]
        if chosen.window is not None:
            mask &= window(chosen.window - 1, 0)
            spelling.append(f"rf.window({chosen.window - 1}, 0)")
        if chosen.documents is not None:
            mask &= documents(read_documents(chosen.documents, length))
            spelling.append("rf.documents(offsets)")
        length = mask.length if length is None else length
        if length is None:
            raise ValueError("length is not given; without --documents, --length is needed")
        if chosen.gpus is not None and chosen.model is None:
            raise ValueError(f"--gpus is {chosen.gpus}, the devices that train a model; --model is not given")
        if chosen.gpus is not None and chosen.gpus % chosen.ranks:
            raise ValueError(f"--gpus is {chosen.gpus}; a multiple of --ranks, {chosen.ranks}, is needed")
        machine_used = load_hardware(chosen.hardware).with_(within=chosen.within, between=chosen.between)
        question = Question(
            length,
            chosen.ranks,
            mask,
            chosen.layout,
            chosen.route,
            batch=chosen.batch,
            dtype=chosen.dtype,
            hardware=machine_used,
            ranks_per_node=chosen.ranks_per_node,
            ulysses=chosen.ulysses,
            spelling=" & ".join(spelling),
            offsets_from=chosen.documents or "",
            **shapes,
        )
        if not 0 <= chosen.rank < len(question.plans):
            raise ValueError(f"rank is {chosen.rank}; rings have {len(question.plans)} ranks, counted from 0")
    except (ValueError, OSError) as error:
        raise _Refused(_sentence(error)) from None
    return question


def _sentence(error: Exception) -> str:
    """What an error says, in the words of the command line."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    words = re.sub(r"^(Sharding|estimate): ", "", str(error))
    words = re.sub(r"^(\w+)(?= is |=)", lambda name: _OPTIONS.get(name[0], name[0]), words)
    return re.sub(r"(?<!-)\b\w+_\w+\b(?!')", lambda name: _OPTIONS.get(name[0], name[0]), words)


def _add_options(parser: argparse.ArgumentParser) -> None:
    tokens, count = _checked(read_tokens), _checked(_read_count)
    known = ", ".join
    add = parser.add_argument_group("the sequence").add_argument
    add(
        "--length",
        type=tokens,
        metavar="N",
        help="tokens, as 65536, 64K or 1M (K = 1024, M = 1024 K); the documents' if left away",
    )
    add(
        "--mask",
        default="causal",
        help='"causal", "full", "window(4095, 0)", "prefix(n)", "chunks(n)", joined by & (default: causal)',
    )
    add(
        "--window",
        type=_checked(_read_window),
        metavar="N",
        help="and: every token sees N tokens, itself included and the last",
    )
    add("--documents", metavar="FILE", help="and: packed documents, whose lengths stand in a text file")
    add("--batch", type=count, default=1, metavar="N", help="rows of the batch (default: 1)")
    add = parser.add_argument_group("the ranks").add_argument
    add("--ranks", type=count, required=True, metavar="N", help="devices that share the sequence")
    for name, names in (("layout", LAYOUT_NAMES), ("route", ROUTE_NAMES)):
        add(f"--{name}", choices=names, default="auto", metavar="NAME", help=f"{known(names)} (default: auto)")
    add("--ulysses", type=count, default=1, metavar="N", help="ranks that share a shard and its heads (default: 1)")
    add = parser.add_argument_group("the heads").add_argument
    for name, usual in _SHAPES.items():
        option = f"--{name.replace('_', '-')}"
        add(option, type=count, metavar="N", help=f"default: {usual}, or the model's")
    add("--dtype", choices=ITEMSIZE, default="bfloat16", metavar="NAME", help=f"{known(ITEMSIZE)} (default: bfloat16)")
    add = parser.add_argument_group("the machine").add_argument
    add("--hardware", default="h100", metavar="NAME", help=f"{known(machine_names())}, or a TOML file (default: h100)")
    add("--ranks-per-node", type=count, metavar="N", help="default: the machine's")
    for name in ("within", "between"):
        add(f"--{name}", metavar="LINK", help=f"another link {name} nodes: {known(link_names())}")
    add = parser.add_argument_group("the model").add_argument
    add(
        "--model",
        choices=MODELS,
        metavar="NAME",
        help=f"what training it needs in memory, and its longest context; sets the heads, too: {known(MODELS)}",
    )
    add("--gpus", type=count, metavar="N", help="devices that train it, a multiple of the ranks (default: the ranks)")
    add = parser.add_argument_group("output").add_argument
    add("--rank", type=int, default=0, metavar="R", help="the rank whose schedule is printed (default: 0)")
    for name, suffixes, what in (
        ("draw", PICTURES, "draw who computes what and when (svg, png, pdf)"),
        ("trace", TIMELINES, "write a timeline that ui.perfetto.dev opens (json)"),
    ):
        add(f"--{name}", type=_checked(partial(read_path, suffixes=suffixes)), metavar="FILE", help=what)
    add("--json", action="store_true", help="print one JSON document instead of the report")


def _read_count(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if count < 1:
        raise ValueError(f"{text!r} is given; a whole number from 1 is needed")
    return count


def _read_window(text: str) -> int:
    if read_tokens(text) < 1:
        raise ValueError(f"{text!r} is given; a token sees 1 token, itself, or more")
    return read_tokens(text)


def _checked(read: Callable[[str], _Read]) -> Callable[[str], _Read]:
    """``read``, whose sentences argparse shows as they are."""

    def checked(text: str) -> _Read:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
