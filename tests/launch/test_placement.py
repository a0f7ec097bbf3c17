"""Layouts, routes and shared heads as options of the trainer: each is refused in a sentence, or leaves the numbers alone."""

from __future__ import annotations

import re

import pytest
from processes import ROOT, torchrun

import ranks
from options import Placement, UsageError, parse
from ringflash.route import double_ring

DOCUMENTS = "--documents 1000,400"
PLACEMENTS = [
    "--layout contiguous --route ring",
    "--layout zigzag --route ring_down --heads-degree 2",
    "--layout striped --route gather --engine fsdp",
    f"--layout balanced --route needed_only --heads-degree 2 {DOCUMENTS}",
    f"--layout balanced --route double_ring:2x2 {DOCUMENTS}",
    "--layout zigzag --route double_ring:2x1 --heads-degree 2 --engine fsdp",
    f"--layout auto --route auto --heads 4 --heads-degree 4 {DOCUMENTS}",
]


def test_every_placement_takes_the_step_of_one_process() -> None:
    """Layout, route and shared heads decide who computes what and when, and no bit more than rounding of the gradients."""
    output = torchrun(4, ROOT / "tests" / "programs" / "placements.py", *PLACEMENTS)
    verdicts = re.findall(r"^(exact|WRONG) (.*): gradients \S+, control (\S+)$", output, re.MULTILINE)
    assert [(verdict, line) for verdict, line, _ in verdicts] == [("exact", line) for line in PLACEMENTS], output
    assert all(float(control) > 0.01 for *_, control in verdicts)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "--route zigzag",
            "--route is 'zigzag'; accepted are auto, ring, ring_down, gather, needed_only, and double_ring:",
        ),
        ("--route double_ring:2", "--route is 'double_ring:2'"),
        ("--layout balanced", "--layout balanced deals out packed documents; --documents says how long they are"),
        ("--documents 5,x", "--documents is '5,x'; lengths are needed"),
        ("--documents 2000,2000", "--documents are 4000 bytes long; --seq-length is 2048"),
        ("--task passkey --documents 20", "--documents is for --task text"),
        ("--heads-degree 0", "--heads-degree is 0; it must be at least 1"),
        ("--heads-degree 4", "--heads-degree 4 ranks cannot share --heads 2 equally"),
        ("--attention local --heads-degree 2", "--heads-degree is for --attention ring"),
        ("--attention local --layout zigzag", "--attention local cuts the sequence contiguously"),
        ("--profile-steps 1-3", "--profile-steps is 1-3; FIRST-LAST is needed, from 2 on"),
        ("--profile-steps 5-3", "--profile-steps is 5-3"),
        ("--profile-steps soon", "--profile-steps is 'soon'; FIRST-LAST is needed, as 3-5"),
        ("--profile --steps 4", "--profile-steps 3-5 are counted from the start of this process, which takes 4 step"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(line: str, sentence: str) -> None:
    """What no number of processes could run is refused before any of them starts."""
    with pytest.raises(UsageError, match=re.escape(sentence)):
        parse(line.split())


@pytest.mark.parametrize(
    ("line", "processes", "sentence"),
    [
        (
            "--route double_ring:2x4",
            4,
            "--route double_ring:2x4 on a ring of 4 rank(s): Sharding: route is double_ring(2, 4)",
        ),
        ("--route double_ring:2x2 --heads-degree 2", 4, "on a ring of 2 rank(s)"),
        ("--heads-degree 2", 3, "--heads-degree 2 ranks share a shard, and 3 rank(s) a sample; 3 must be a multiple"),
        ("--seq-length 7", 4, "--seq-length 7 is too short for 4 shards"),
    ],
)
def test_what_does_not_fit_the_processes_is_refused_before_they_talk(
    monkeypatch: pytest.MonkeyPatch, line: str, processes: int, sentence: str
) -> None:
    """Ranks that had begun to wait for each other could not be told."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    options = parse(line.split())
    with pytest.raises(UsageError, match=re.escape(sentence)):
        options.check_against(ranks.fit(options.data, options.context))


def test_options_say_how_a_sample_is_spread() -> None:
    """The command line reaches the sharding unchanged, and documents keep their shares of a sample of another length."""
    options = parse(
        ["--layout", "striped", "--route", "double_ring:2x4", "--heads-degree", "2", "--documents", "512,1024"]
    )
    assert options.placement == Placement("striped", double_ring(2, 4), 2)
    assert options.mask(2048, 8).documents == ((0, 512, 1536, 2048),)
    assert options.mask(201, 8).documents == ((0, 50, 150, 201),)
    assert parse(["--attention", "local"]).placement.layout == "contiguous"


def test_steps_to_profile_are_counted_from_where_a_run_resumes() -> None:
    """A run that goes on at step 400 has a third step too, and one that ends before it says so."""
    options = parse(["--resume", "--profile", "--steps", "405"])
    options.check_profile(400)
    with pytest.raises(UsageError, match="which takes 4 step"):
        options.check_profile(401)
