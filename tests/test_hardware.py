"""Descriptions of machines: every number says where it comes from, and anybody can write another one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ringflash.forecast.hardware import Hardware, Link, Rate, link_names, load_hardware, machine_names
from ringflash.forecast.model import Model
from ringflash.forecast.workload import Workload

MINE = """
[links.cable]
bytes_per_second = 1e9
[links.spare]
bytes_per_second = 2e9
[machines.mine]
memory = 1e9
peak = 1e12
within = "cable"
between = "tcp"
gpus_per_node = 4
runs_ahead = true
slower = { float32 = 0.5 }
forward = { 64 = { flops_per_second = 5e11, source = "measured: today" } }
backward = { 64 = { flops_per_second = 4e11, source = "measured: today" } }
"""


@pytest.mark.parametrize("name", machine_names())
def test_every_number_of_a_machine_says_where_it_comes_from(name):
    """Published, measured or assumed, for every rate and link; rates below peak, and slower where dtypes are wider."""
    found = load_hardware(name)
    sources = [found.source, found.within.source, found.between.source]
    sources += [rate.source for rate in (*found.forward, *found.backward)]
    assert all(source.startswith(("published: ", "measured: ", "assumed: ")) for source in sources)
    for phase in ("forward", "backward"):
        for head_dim in (64, 128, 256):
            assert 0 < found.rate(phase, head_dim).flops_per_second < found.peak
            assert not found.rate(phase, head_dim).source.startswith("interpolated")
        assert found.rate(phase, 128, "float64").flops_per_second < found.rate(phase, 128, "float16").flops_per_second
        between = found.rate(phase, 96).flops_per_second
        around = [found.rate(phase, dim).flops_per_second for dim in (64, 128)]
        assert min(around) <= between <= max(around)


def test_a_machine_can_be_described_in_a_file_or_changed(tmp_path):
    """A file of one machine, with links of its own or ours; links and measured rates can be replaced."""
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    mine = load_hardware(path)
    assert (mine.name, mine.within.bytes_per_second, mine.between.name) == ("mine", 1e9, "tcp")
    assert mine.within.seconds(10**9) == 1.0
    assert mine.with_(between="spare").between == Link("spare", 2e9)
    assert replace(mine, links=()) == mine
    with pytest.raises(ValueError, match=r"link is 'cord'; known are nvlink3, .*loopback, cable, spare$"):
        mine.with_(between="cord")
    changed = mine.with_(within="nvlink4", forward=6e11)
    assert (changed.within.name, changed.rate("forward", 96).flops_per_second) == ("nvlink4", 6e11)
    assert changed.rate("backward", 64) == mine.rate("backward", 64)
    assert set(link_names()) >= {"nvlink4", "infiniband-400g", "tcp"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[machines.x]\npeak = 1", "lacks .*'memory'"),
        ("[links.x]\nbytes_per_second = 1", "one .machines.<name>. is needed"),
        ("[machines.x", "is no TOML"),
        ("\xff", "is no TOML"),
        ("machines = 3", "machines is 3; a table is needed"),
        ("machines = { x = 3 }", r"machines.x is 3; a table is needed"),
    ],
)
def test_a_file_that_describes_no_machine_is_refused(tmp_path, text, words):
    """The message says what is missing."""
    path = tmp_path / "wrong.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        load_hardware(path)
    with pytest.raises(ValueError, match="link is 'string'; known are nvlink3"):
        load_hardware("h100").with_(within="string")
    with pytest.raises(ValueError, match="dtype is 'fp4'; h100 has rates for"):
        load_hardware("h100").rate("forward", 64, "fp4")
    with pytest.raises(ValueError, match="hardware is None; the name of a machine"):
        load_hardware(None)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ("memory = 1e9", "memory = 1.5", r"\[machines.mine\]: memory is 1.5; a whole number from 1"),
        ("memory = 1e9", "memory = true", "memory is True"),
        ("peak = 1e12", "peak = inf", "peak is inf; a finite number above 0"),
        ("peak = 1e12", 'peak = "fast"', "peak is 'fast'"),
        ("gpus_per_node = 4", "gpus_per_node = 0", "gpus_per_node is 0; a whole number from 1"),
        ("gpus_per_node = 4", "gpus_per_node = 4.5", "gpus_per_node is 4.5"),
        ("runs_ahead = true", 'runs_ahead = "no"', "runs_ahead is 'no'; True or False"),
        ("runs_ahead = true", "step_overhead = -1", "step_overhead is -1; a finite number of at least 0"),
        ("slower = { float32 = 0.5 }", "slower = 3", r"machines.mine.slower is 3; a table is needed"),
        ("slower = { float32 = 0.5 }", "slower = { float32 = 0 }", "slower has 'float32' = 0"),
        ('within = "cable"', "within = 3", r"\[machines.mine.within\]: link is 3; known are"),
        ('within = "cable"', 'within = "cord"', "link is 'cord'; known are .*cable"),
        (
            "64 = { flops_per_second = 5e11, source = ",
            "64 = { source = ",
            r"\[machines.mine.forward.64\] lacks .*flops",
        ),
        (', source = "measured: today" } }\nback', " } }\nback", r"\[machines.mine.forward.64\] lacks .*source"),
        (
            "{ 64 = { flops_per_second = 5e11",
            "{ 64 = { flops_per_second = -5e11",
            r"forward.64\]: flops_per_second is -5",
        ),
        ("{ 64 = { flops_per_second = 5e11", "{ wide = { flops_per_second = 5e11", "'wide' is no head dim"),
        ("{ 64 = { flops_per_second = 5e11", "{ 0 = { flops_per_second = 5e11", "head_dim is 0"),
        ("bytes_per_second = 2e9", "bytes_per_second = 0", r"\[links.spare\]: bytes_per_second is 0"),
        ("bytes_per_second = 2e9", "bytes_per_second = 2e9\nattained = 80", "attained is 80; a share"),
        ("bytes_per_second = 2e9", "bytes_per_second = 2e9\nlatency = nan", "latency is nan"),
        ("bytes_per_second = 2e9", "bytes = 2e9", r"\[links.spare\] lacks .*bytes_per_second.* has .*'bytes'"),
        ("[links.cable]", "[links]\ncable = 3\n[links.rope]", "links.cable is 3; a table"),
        ("[links.cable]", "[link.cable]", r"has \['link'\]; "),
        ("[links.cable]", "\N{REPLACEMENT CHARACTER}", "is no TOML"),
    ],
)
def test_every_mistake_in_a_file_is_told_with_its_place(tmp_path, ours, theirs, words):
    """One sentence, with the file, the table and the key; nothing is taken for something else."""
    path = tmp_path / "mine.toml"
    assert MINE.count(ours) == 1
    path.write_text(MINE.replace(ours, theirs))
    with pytest.raises(ValueError, match=words) as told:
        load_hardware(path)
    assert str(path) in str(told.value)


def test_machines_that_cannot_be_are_refused_wherever_they_are_made():
    """By the classes, by replace and by ``with_``, as in a file."""
    h100 = load_hardware("h100")
    rate = Rate(64, 1e12, "measured")
    for make, words in (
        (lambda: Link("x", math.inf), "Link: bytes_per_second is inf"),
        (lambda: Link("x", 1e9, latency=True), "Link: latency is True"),
        (lambda: Link(3, 1e9), "Link: name is 3; a string"),
        (lambda: Rate(64.0, 1e12, ""), "Rate: head_dim is 64.0"),
        (lambda: Rate(64, 1e12, None), "Rate: source is None"),
        (lambda: Hardware("x", 1, 1.0, (), (rate,), h100.within, h100.within, 1), "Hardware: forward is ()"),
        (lambda: replace(h100, forward=(rate, rate)), r"head dims \[64, 64\]; they have to ascend"),
        (lambda: replace(h100, within="tcp"), "within is 'tcp'; a Link"),
        (lambda: replace(h100, gpus_per_node=True), "gpus_per_node is True"),
        (lambda: h100.with_(forward=0), "flops_per_second is 0"),
        (lambda: h100.with_(step_overhead="much"), "step_overhead is 'much'"),
        (lambda: h100.with_(between=5), "link is 5"),
    ):
        with pytest.raises(ValueError, match=words.replace("()", r"\(\)")):
            make()


def test_a_rate_that_nobody_published_does_not_say_so():
    """What is interpolated, scaled or assumed is told as that; the number it was made from is named."""
    h100 = load_hardware("h100")
    assert h100.rate("forward", 128).source == "published: FlashAttention-3, full, 16K tokens"
    name = r"FlashAttention-3, full, 16K tokens"
    made = {
        (96, "bfloat16"): f"interpolated between head dims 64 and 128 ({name})",
        (32, "bfloat16"): f"assumed: in proportion to head dim 64 ({name})",
        (512, "float16"): f"assumed: as at head dim 256 ({name})",
        (128, "float32"): f"assumed share 0.068 for float32 of another rate ({name})",
    }
    for (dim, dtype), source in made.items():
        assert h100.rate("forward", dim, dtype).source == source
    both = h100.rate("forward", 96, "float64").source
    assert both.startswith("assumed share 0.034 for float64") and "interpolated" in both
    uneven = Model(h100, Workload(8, 8, 192, 64), 8).rate("forward").source
    assert uneven == f"assumed: as at head dim 128 ({name})"
    assert h100.with_(forward=1e12).rate("forward", 80).source == "given"


def test_a_generation_of_machines_has_its_own_links():
    """A100 came with HDR InfiniBand and NVLink 3; nobody gets the next one's bandwidth."""
    a100 = load_hardware("a100")
    assert (a100.within.name, a100.between.name) == ("nvlink3", "infiniband-200g")
    assert a100.between.bytes_per_second == 25e9
