"""Descriptions of machines: every number says where it comes from, and anybody can write another one."""

from __future__ import annotations

import pytest

from ringflash.forecast.hardware import link_names, load_hardware, machine_names


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
    path.write_text(
        """
        [links.cable]
        bytes_per_second = 1e9
        [machines.mine]
        memory = 1e9
        peak = 1e12
        within = "cable"
        between = "tcp"
        gpus_per_node = 4
        forward = { 64 = { flops_per_second = 5e11, source = "measured: today" } }
        backward = { 64 = { flops_per_second = 4e11, source = "measured: today" } }
        """
    )
    mine = load_hardware(path)
    assert (mine.name, mine.within.bytes_per_second, mine.between.name) == ("mine", 1e9, "tcp")
    assert mine.within.seconds(10**9) == 1.0
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
    ],
)
def test_a_file_that_describes_no_machine_is_refused(tmp_path, text, words):
    """The message says what is missing."""
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_hardware(path)
    with pytest.raises(ValueError, match="link is 'string'; known are nvlink3"):
        load_hardware("h100").with_(within="string")
    with pytest.raises(ValueError, match="dtype is 'fp4'; h100 has rates for"):
        load_hardware("h100").rate("forward", 64, "fp4")
