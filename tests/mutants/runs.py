"""Bugs in what keeps a training run: checkpoints that cannot be trusted, and what they forget."""

from __future__ import annotations

from .mutant import Mutant

CHECKPOINT = "launch/checkpoint.py"
TESTS = "tests/launch/test_checkpoint.py::"

RUNS = (
    Mutant(
        name="checksum-not-verified",
        file=CHECKPOINT,
        old="        if found != digest:\n",
        new="        if False:\n",
        breaks="One flipped bit in a checkpoint loads.",
        caught_by=(TESTS + "test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used",),
    ),
    Mutant(
        name="checksum-list-not-complete",
        file=CHECKPOINT,
        old="if sorted(line[-1] for line in lines) != list(files) or not all(len(line) == 2 for line in lines):",
        new="if not all(len(line) == 2 for line in lines):",
        breaks="A file that no checksum is listed for is believed.",
        caught_by=(TESTS + "test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used",),
    ),
    Mutant(
        name="previous-checkpoint-removed-first",
        file=CHECKPOINT,
        old="            _write(folder, step, tensors,",
        new="            for other in steps(folder):\n                shutil.rmtree(folder / _name(other))\n"
        "            _write(folder, step, tensors,",
        breaks="A write that fails leaves no checkpoint at all.",
        caught_by=(TESTS + "test_a_full_disk_leaves_what_was_there",),
    ),
    Mutant(
        name="checkpoint-of-the-wrong-age-removed",
        file=CHECKPOINT,
        old="for other in older[keep - 1 :]:",
        new="for other in older[: len(older) - keep + 1]:",
        breaks="The newest checkpoints are removed, and the oldest are kept.",
        caught_by=(TESTS + "test_the_newest_are_kept",),
    ),
    Mutant(
        name="damage-seen-by-one-rank-alone",
        file=CHECKPOINT,
        old="        if not damages and state is not None:",
        new="        if state is not None:",
        breaks="One rank goes back to an earlier checkpoint, the others do not.",
        caught_by=(TESTS + "test_one_rank_that_reads_damage_is_enough",),
    ),
    Mutant(
        name="random-state-forgotten",
        file=CHECKPOINT,
        old='        _restore_random(state["random"])\n',
        new="        pass\n",
        breaks="After a resume dropout and data draw other numbers.",
        caught_by=(TESTS + "test_a_run_goes_on_from_a_checkpoint_as_if_it_had_never_stopped",),
    ),
    Mutant(
        name="half-a-checkpoint-under-its-name",
        file=CHECKPOINT,
        old="    aside.mkdir()\n",
        new="    final.mkdir()\n    aside.symlink_to(final)\n",
        breaks="An interrupted write leaves a folder that looks complete.",
        caught_by=(TESTS + "test_an_interrupted_write_leaves_the_previous_checkpoint",),
        raises=("OSError", "DamagedError", "UsageError"),
    ),
)
