"""Deterministic mode of the kernels: the same bits in whatever order the hardware runs the programs of a grid.

The interpreter runs them one after the other, first to last. Here also last to first: who adds to memory that another program
adds to gives other bits then. Run as test_interpreted.py says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import laws
import pytest
from cases import Case, Lengths, problem
from triton.runtime.interpreter import interpreter_builder

LONG = Case(
    "fp32", (16, 16), (1, 1), "full", "plain", Lengths(20, 200, 0)
)  # dq of a row is a sum over some blocks of keys


@contextmanager
def last_program_first() -> Iterator[None]:
    """Grids run backwards along their first axis."""
    plain = interpreter_builder.set_grid_idx

    def backwards(x: int, y: int, z: int) -> None:
        plain(interpreter_builder.grid_dim[0] - 1 - x, y, z)

    interpreter_builder.set_grid_idx = backwards
    try:
        yield
    finally:
        del interpreter_builder.set_grid_idx


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "any order"])
def test_only_deterministic_bits_do_not_depend_on_the_order_of_programs(deterministic):
    """One pass adds to dq as programs come; the mode that promises the same bits must not."""
    p = problem(replace(LONG, deterministic=deterministic))
    first = laws.answer(p)[0]
    with last_program_first():
        second = laws.answer(p)[0]
    assert laws.same(first, second) == ([] if deterministic else ["dq"])
