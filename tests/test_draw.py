"""Pictures of plans."""

from __future__ import annotations

from pathlib import Path

import pytest

import ringflash as rf


@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.parametrize(
    "s",
    [
        rf.Sharding(64, (0, 4), layout="zigzag"),
        rf.Sharding(9, (0, 3), rf.full, "striped", keys=4),
        rf.Sharding(2, (0, 8)),
        rf.Sharding(100000, (0, 32), rf.causal & rf.window(900, 0)),
    ],
    ids=["zigzag", "other keys", "empty ranks", "many ranks"],
)
def test_any_plan_can_be_drawn(s: rf.Sharding, suffix: str, tmp_path: Path) -> None:
    """The file is a picture of its kind, whatever the plan."""
    path = tmp_path / f"plan.{suffix}"
    rf.draw(rf.plans(s), path)
    start = path.read_bytes()[:200]
    assert (b"<svg" in path.read_bytes()[:2000]) if suffix == "svg" else start.startswith(b"\x89PNG")


def test_an_incomplete_set_of_plans_is_refused(tmp_path: Path) -> None:
    """A picture of some ranks would look like a picture of all."""
    with pytest.raises(ValueError, match=r"got plans of ranks \[1\]"):
        rf.draw([rf.plan(rf.Sharding(8, (1, 2)))], tmp_path / "plan.svg")
