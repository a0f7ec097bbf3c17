"""Look for calls of the public API that are wrong, unhelpful or different between ranks, for as long as one likes.

    python -m soak.fuzz --minutes 10            random programs (machine.py), seed after seed
    python -m soak.fuzz --doors                 every wild value in every argument (wild.py), once
    python -m soak.fuzz --seed 7                again what seed 7 found

Run with ``tests`` on the path. Prints a shrunk program, or a call to paste, for what fails; the last line is one JSON
document, and the status is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from soak.doors import attempt, judge
from soak.machine import Calls
from soak.wild import CALLS, namespace, snippet

PROGRAMS = 100  # of one seed
STEPS = 20  # of one program
SHRUNK = (Phase.generate, Phase.shrink)
FIRST = (Phase.generate,)


def sweep(name: str) -> list[tuple[str, str]]:
    """The call of this name with each argument wild in turn: the calls that are answered wrongly, and how."""
    call, names = CALLS[name], namespace()
    found = []
    for hole, kind in call.kinds.items():
        for wild in kind.table:
            source = call.write(**{hole: wild})
            fault = judge(call, {hole: wild}, attempt(source, names), names)
            if fault is not None:
                found.append((source, f"{hole}={wild}: {fault}"))
    return found


def run(programs: int, steps: int, number: int | None = None, phases: tuple[Phase, ...] = SHRUNK) -> None:
    """So many random programs. Raises what the shortest failing one raised, after printing it.

    Without a number they are the same in every run.
    """
    chosen = settings(
        max_examples=programs,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=number is None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )
    machine = type("Calls", (Calls,), {})
    run_state_machine_as_test(machine if number is None else seed(number)(machine), settings=chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to look (default 1)")
    parser.add_argument("--seed", type=int, help="make the programs of this seed alone")
    parser.add_argument("--doors", action="store_true", help="every wild value in every argument, and no programs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.doors:
        faults = {name: sweep(name) for name in CALLS}
        for name, found in faults.items():
            for source, fault in found:
                print(f"{name}: {fault}\n    {source}")
            if found:
                print(snippet(found[0][0]))
        print(json.dumps({"calls": len(CALLS), "faults": {name: len(found) for name, found in faults.items()}}))
        return int(any(faults.values()))
    end, number, failed = time.monotonic() + 60 * given.minutes, 0, []
    for number in [given.seed] if given.seed is not None else range(1 << 30):
        try:
            run(PROGRAMS, STEPS, number)
        except Exception:
            traceback.print_exc()
            print(f"again: python -m soak.fuzz --seed {number}", flush=True)
            failed.append(number)
        if time.monotonic() > end or len(failed) == 5:
            break
    print(json.dumps({"programs": PROGRAMS * (number + 1), "steps": STEPS, "seeds that failed": failed}))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
