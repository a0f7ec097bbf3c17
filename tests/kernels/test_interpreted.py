"""The kernels without a GPU: Triton's interpreter runs them in numpy, in tiles of 32, against the oracle in float64.

It has a process of its own, because Triton decides at its import::

    TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python -m pytest tests/kernels
"""

from __future__ import annotations

import laws
import pytest
from cases import DECODE, SHORT, Case, Lengths, cases

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # of a masked score


@pytest.mark.parametrize("case", cases(SHORT), ids=str)
def test_whatever_is_combined(case):
    """Any two choices together give out, lse and all gradients of the textbook, to rounding."""
    with laws.tiles(*case.tile):
        laws.check(case)


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_few_queries_and_many_keys(case):
    """Where keys are split among programs and the parts are added, the sum is still the textbook's."""
    laws.check(case)


RINGS = [
    Case("bf16", (40, 40), (4, 2), "causal", "everything", Lengths(45, 45, 0)),
    Case("fp32", (16, 16), (2, 2), "sliding", "plain", Lengths(100, 100, 0)),
    Case("fp32", (16, 32), (3, 1), "several", "sinks", Lengths(30, 50, 20), deterministic=True),
]


@pytest.mark.parametrize(
    ("case", "ranks", "layout"),
    [
        (case, ranks, ("contiguous", "zigzag", "striped")[(i + ranks) % 3])
        for i, case in enumerate(RINGS)
        for ranks in (2, 3, 4)
    ],
    ids=str,
)
def test_a_ring_is_one_device(case, ranks, layout):
    """Carries and gradients travel through the kernels; the answer knows neither the number of ranks nor the layout."""
    laws.check_ring(case, ranks, layout)
