"""``python -m tests.mutants [NAME ...]``: plant bugs, and print who noticed."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from .runner import ROOT, BaselineError, run
from .table import MUTANTS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description="Plant bugs, and see which tests notice."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants, or parts of their names; default: all")
    parser.add_argument("-n", dest="processes", type=int, default=1, help="so many at a time (default: 1)")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    options = parser.parse_args()
    unknown = [name for name in options.names if not any(name in mutant.name for mutant in MUTANTS)]
    if unknown:
        parser.error(f"no mutant is called {', '.join(unknown)}; --list names them all")
    chosen = [m for m in MUTANTS if not options.names or any(name in m.name for name in options.names)]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:<44} {mutant.file:<44} {mutant.breaks}")
        return 0
    print(f"{len(chosen)} mutants; first their tests without any", flush=True)
    begin, alive = time.perf_counter(), []
    try:
        for outcome in run(chosen, options.processes):
            print(outcome, flush=True)
            if not outcome.caught:
                alive.append(outcome.mutant)
    except BaselineError as error:
        print(error, file=sys.stderr)
        return 2
    for mutant in alive:
        print(f"\n{mutant.name}: {mutant.breaks}\n{mutant.diff(ROOT)}")
    files = ", ".join(f"{count} in {file}" for file, count in Counter(m.file for m in chosen).most_common())
    print(f"\n{len(chosen) - len(alive)} of {len(chosen)} caught in {time.perf_counter() - begin:.0f} s: {files}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
