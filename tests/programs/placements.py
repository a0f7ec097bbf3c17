"""Under torchrun: one step of one process against the same step over all ranks, for each placement on the command line.

Every argument is a command line of launch/train.py; prints one line for each, and whether it is exact.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

from exactness import compare
from options import parse
from ranks import finish, fit, start

lines = sys.argv[1:]
ranks = start(1, None, "cpu")
for line in lines:
    options = parse(line.split())
    options.check_against(fit(options.data, options.context))
    found = compare(ranks, options, torch.float64)
    control = found.control or 0.0
    ranks.say(f"{'exact' if found.exact else 'WRONG'} {line}: gradients {found.gradients:.1e}, control {control:.1e}")
finish()
