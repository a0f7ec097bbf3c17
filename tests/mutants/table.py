"""All mutants."""

from __future__ import annotations

from .around import AROUND
from .kernels import KERNELS
from .plans import PLANS
from .ring import RING
from .runs import RUNS
from .sums import SUMS
from .trust import TRUST

MUTANTS = (*SUMS, *PLANS, *RING, *TRUST, *AROUND, *RUNS, *KERNELS)
