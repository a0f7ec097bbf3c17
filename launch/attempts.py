"""How a run begins: anew, or where it was. Rank 0 decides, by the folder of the run, and tells the others.

                                        a checkpoint is there     none is there
    first start                         anew                      anew
                --resume                goes on                   error
                --resume auto           goes on                   anew
    restarted by the launcher           goes on                   anew
    restarted after an interruption     ends again: it was told to stop

``run.json`` in the folder says which launch began the run and how it ended ("running", "interrupted", "ended"; "failed" if the
last checkpoint is missing). It keeps a restarted process from going on with some earlier run that the first start was about
to put aside, and tells a queue whether to start the job again.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint
from progress import read_metrics
from ranks import Ranks
from run_options import RunOptions, UsageError

INTERRUPTED = os.EX_TEMPFAIL  # 75, "try again later": the exit status of a run that was told to stop


class ToldToStop(Exception):
    """This launch has been told to stop; its launcher has restarted it all the same."""


@dataclass(frozen=True)
class Beginning:
    """``steps``: checkpoints to go on from, the newest first, none for a run that begins anew; ``restarted``: by a launcher."""

    steps: list[int]
    restarted: bool


def decide(options: RunOptions, ranks: Ranks) -> Beginning:
    """The same on every rank. An earlier run is put aside if this one begins anew (a collective: every rank must call it)."""
    (restarts,) = ranks.agree(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))  # each node counts its own
    decided = ranks.once("how the run begins", lambda: _decide(options, restarts, ranks))
    if decided["stop"]:
        raise ToldToStop
    return Beginning(decided["steps"], decided["restarted"])


def _decide(options: RunOptions, restarts: int, ranks: Ranks) -> dict[str, Any]:
    last = read(options.out)
    restarted = restarts > 0 and last.get("launch") == _launch()
    if restarted and last.get("state") == "interrupted":
        return {"stop": True}
    checkpoint.recover(options.out / "checkpoints")
    steps = checkpoint.steps(options.out / "checkpoints")
    if options.resume == "required" and not steps and not restarted:
        folder = str(options.out / "checkpoints")
        raise UsageError(
            f"--resume: there is no checkpoint in {folder!r}; start without it, or with --resume auto, which then begins anew"
        )
    if options.resume == "never" and not restarted:
        steps = []
    if restarted:
        ranks.say(f"restart {restarts} of this launch: {'goes on' if steps else 'no checkpoint yet, begins anew'}")
    elif options.resume == "auto" and not steps:
        ranks.say(f"--resume auto: no checkpoint in {options.out / 'checkpoints'}: begins anew")
    if not steps:
        _set_aside(options.out, ranks)
    write(options.out, "running")  # at once: a queue must not take how the last one ended for the end of this one
    return {"stop": False, "steps": steps, "restarted": restarted}


def validated(folder: Path, step: int) -> bool:
    """True if the records of a run have a validation after this step."""
    return any(record["split"] == "validation" and record["step"] == step for record in read_metrics(folder))


def read(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says; nothing if it is not there, or was cut short."""
    try:
        last = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return last if isinstance(last, dict) else {}


def write(folder: Path, state: str, **more: Any) -> None:
    """Say in ``run.json`` how the run stands: "running", "interrupted", "ended" or "failed"."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / ".run.json"
    aside.write_text(json.dumps({"state": state, "launch": _launch(), **more}) + "\n")
    aside.replace(folder / "run.json")


def _launch() -> str:
    """The same in all restarts of one launch; "none" if the launcher has no name for it."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "none")


def _set_aside(out: Path, ranks: Ranks) -> None:
    """Keep an earlier run of the same folder under a numbered name: starting anew must not destroy anything."""
    if (out / "metrics.jsonl").exists() or checkpoint.steps(out / "checkpoints"):
        number = next(n for n in range(1, sys.maxsize) if not out.with_name(f"{out.name}.{n}").exists())
        out.rename(out.with_name(f"{out.name}.{number}"))
        ranks.say(f"the run that was in {out} is now in {out}.{number} (--resume would have continued it)")
