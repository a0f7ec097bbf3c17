"""Rings over real gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import torchrun

PROGRAMS = Path(__file__).parent / "programs"


@pytest.mark.parametrize("ranks", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3)), 4])
def test_real_processes_give_the_bits_of_the_in_process_world(ranks: int) -> None:
    """Communication gets no tolerance: out, lse and gradients are bitwise equal, on whole worlds and on mesh axes."""
    output = torchrun(ranks, PROGRAMS / "ring_bits.py")
    assert output.count("same bits") == ranks


def test_a_model_trained_on_real_processes_equals_one_process() -> None:
    """SequenceParallel alone, under DDP and under FSDP2 gives one process's loss and raw gradients on 2 x 2 ranks."""
    output = torchrun(4, PROGRAMS / "model_gradients.py")
    for engine in ("reduce", "ddp", "fsdp"):
        assert output.count(f"{engine}: equal to one process") == 4
