"""`python -m ringflash check`: what is on this machine, what will run, and whether it runs right."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from ringflash import machine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit code of the process."""
    parser = argparse.ArgumentParser(prog="python -m ringflash", description="Exact ring attention in PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    check_parser = commands.add_parser(
        "check", help="report what this machine can run, and prove in seconds that the ring is exact on it"
    )
    check_parser.set_defaults(run=check)
    chosen = parser.parse_args(arguments)
    exit_code: int = chosen.run()
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


if __name__ == "__main__":
    sys.exit(main())
