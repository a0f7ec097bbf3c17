"""`python -m ringflash plan`: what it reads, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ringflash as rf
from ringflash.__main__ import main
from ringflash.forecast.cost import estimate
from ringflash.layout import LAYOUTS
from ringflash.route import ROUTES
from ringflash.units import read_tokens, spell_bytes, spell_seconds, spell_tokens
from ringflash.views.planner import Answer, Question
from ringflash.views.reading import read_documents, read_mask
from ringflash.views.report import recommend, record

SMALL = ["plan", "--length", "4K", "--ranks", "4"]

terms = st.one_of(
    st.just(rf.full),
    st.just(rf.causal),
    st.builds(rf.window, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9)),
    st.builds(rf.prefix, st.integers(0, 9)),
    st.builds(rf.chunks, st.integers(1, 9)),
    st.builds(lambda cut: rf.documents([0, cut, 9]), st.integers(0, 9)),
)


@given(st.lists(terms, min_size=1, max_size=5))
def test_a_mask_is_read_as_it_is_printed(masks: list[rf.Mask]) -> None:
    """Whatever the algebra can print, the command line can read."""
    mask = rf.full
    for term in masks:
        mask &= term
    assert read_mask(repr(mask)) == mask
    assert read_mask(" & ".join(f"({term!r})" for term in masks)) == mask


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').getcwd()",
        "causal | full",
        "window(2 ** 3, 0)",
        "window(x, 0)",
        "window(1)",
        "window(1, 2, 3)",
        "window(*[1, 2])",
        "window(-1, 0)",
        "causal()",
        "causal &",
        "",
        "\0",
        "(" * 300,
        "causal &" * 2000,
        "lambda: causal",
        "[causal][0]",
        "documents(5)",
        "chunks(0)",
        "chunks(1.5)",
        "7",
    ],
)
def test_what_is_no_mask_is_refused_in_a_sentence(text: str) -> None:
    """Nothing is executed, and no traceback reaches the user."""
    with pytest.raises(ValueError, match=r"mask is|window: |chunks: |documents: "):
        read_mask(text)


@given(st.integers(0, 1 << 50))
def test_numbers_of_tokens_are_read_as_they_are_written(count: int) -> None:
    """1M is 1,048,576, never a million, in both directions."""
    assert read_tokens(spell_tokens(count)) == count
    assert read_tokens(f"{count}K") == 1024 * count


@given(st.floats(1e-9, 1e5), st.integers(0, 1 << 60))
def test_times_and_bytes_are_written_with_three_digits(seconds: float, count: int) -> None:
    """A reader finds the number that was meant, to half a percent."""
    number, unit = spell_seconds(seconds).split()
    assert float(number) * {"h": 3600, "s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}[unit] == pytest.approx(
        seconds, rel=6e-3
    )
    number, unit = spell_bytes(count).split()
    assert float(number) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit) == pytest.approx(
        count, rel=6e-3
    )


def test_documents_are_lengths_in_a_file(tmp_path: Path) -> None:
    """Offsets come out, from 0 to the length; separators and comments are as people write them."""
    path = tmp_path / "lengths.txt"
    path.write_text("# packed by the loader\n100, 200\n1K 0\t4  # the last\n\n")
    assert read_documents(path) == (0, 100, 300, 1324, 1324, 1328)
    assert read_documents(path, 1328) == read_documents(path)
    with pytest.raises(
        ValueError, match=r"the 5 documents of .* hold 1,328 tokens .* length is 2K .*leave --length away"
    ):
        read_documents(path, 2048)
    for text, sentence in (
        ("12 -5", "line 1 of .*'-5' is no number"),
        ("# none", "holds no lengths"),
        ("1.7", "no number"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            read_documents(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no text"):
        read_documents(path)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--ranks", "4"], "--length is needed"),
        (["--ranks", "4", "--length", "5x"], "'5x' is no number of tokens"),
        (["--ranks", "0", "--length", "1K"], "a whole number from 1"),
        ([*SMALL[1:], "--mask", "causal | full"], "a mask is full, causal"),
        ([*SMALL[1:], "--window", "0"], "a token sees 1 token"),
        ([*SMALL[1:], "--documents", "nowhere.txt"], "nowhere.txt: No such file"),
        ([*SMALL[1:], "--layout", "balanced"], "documents"),
        ([*SMALL[1:], "--layout", "zig"], "contiguous"),
        ([*SMALL[1:], "--route", "double_ring"], "a ring in one node"),
        ([*SMALL[1:], "--heads", "24", "--ulysses", "3"], "heads_axis is 3"),
        ([*SMALL[1:], "--heads", "30", "--ulysses", "4"], "heads is 30"),
        ([*SMALL[1:], "--hardware", "abacus"], "hardware is 'abacus'; known are"),
        ([*SMALL[1:], "--between", "pigeons"], "link is 'pigeons'; known are"),
        ([*SMALL[1:], "--rank", "4"], "rings have 4 ranks"),
        ([*SMALL[1:], "--ranks-per-node", "0"], "a whole number from 1"),
        ([*SMALL[1:], "--model", "gpt"], "llama3-8b"),
        ([*SMALL[1:], "--trace", "nowhere/trace.json"], "nowhere/trace.json: No such file"),
        ([*SMALL[1:], "--draw", "plan.xyz"], "xyz"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_what_does_not_fit_together_ends_with_code_2_and_a_sentence(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As every command does; a traceback would say that the program is wrong, not the question."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["plan", *arguments])
    assert left.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_the_report_says_what_the_library_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The schedule is the plan's, the times are the estimate's, and the layout is the one that "auto" stands for."""
    assert main([*SMALL, "--rank", "2", "--heads", "8", "--kv-heads", "2", "--head-dim", "64"]) == 0
    printed = capsys.readouterr().out
    s = rf.Sharding(4096, (2, 4))
    model = estimate(rf.plans(s), "h100", heads=8, kv_heads=2, head_dim=64)
    assert all(line.rstrip() in printed for line in str(rf.plan(s)).splitlines())
    assert str(model.forward) in printed and str(model.backward) in printed
    assert f"layout {s.layout}, route {s.route}" in printed


def test_all_outputs_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Documents, nodes, a model, a picture, a trace and JSON; what was asked for is marked once in every comparison."""
    lengths, picture, trace = (tmp_path / name for name in ("lengths.txt", "plan.svg", "trace.json"))
    lengths.write_text(" ".join(["1500 300 200 48"] * 2))
    options = ["--documents", lengths, "--ranks", 4, "--ranks-per-node", 2, "--ulysses", 2, "--model", "llama3-8b"]
    options += ["--layout", "balanced", "--draw", picture, "--trace", trace, "--between", "tcp"]
    arguments = ["plan", *map(str, options)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("training llama3-8b", "in one of 2 rings", "recommendation: "))
    assert b"<svg" in picture.read_bytes()[:2000] and json.loads(trace.read_text())["traceEvents"]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["length"] == 4096 and document["layout"] == "balanced"
    assert len(document["training"]) == 4
    for name in ("layouts", "routes", "divisions", "sizes"):
        marked = [candidate for candidate in document["compared"][name] if candidate["chosen"]]
        assert len(marked) == 1
        assert marked[0]["forward"] == pytest.approx(document["forward"]["seconds"])
        assert marked[0]["backward"] == pytest.approx(document["backward"]["seconds"])


def test_every_way_that_fits_is_compared_once() -> None:
    """All layouts but stripes, all routes, and all degrees that divide ranks and heads."""
    answer = Answer(Question(4096, 8, ranks_per_node=4, heads=12, kv_heads=4))
    assert {candidate.layout for candidate in answer.layouts} >= set(LAYOUTS) - {"striped"}
    routes = [candidate.route for candidate in answer.routes]
    assert len(set(routes)) == len(routes) and {*map(str, ROUTES.values()), "double_ring(2, 4)"} <= set(routes)
    assert sorted(candidate.ulysses for candidate in answer.divisions) == [1, 2, 4]
    assert [candidate.ranks for candidate in answer.sizes] == [8, 16]
    assert json.dumps(record(answer))


def test_a_better_way_is_recommended_as_a_line_that_runs() -> None:
    """Contiguous causal shards leave half of the machine idle; the line says what to write instead."""
    answer = Answer(Question(1 << 20, 8, layout="contiguous"))
    sentence, line = recommend(answer).splitlines()
    assert not answer.best.chosen and answer.best.seconds < 0.6 * answer.asked.seconds
    assert f"{answer.asked.seconds / answer.best.seconds:.2f} x as fast" in sentence
    session: dict[str, object] = {"rf": rf, "group": (0, 8)}
    exec(line.strip(), session)
    s = session["s"]
    assert isinstance(s, rf.Sharding)
    best = Question(1 << 20, 8, layout=answer.best.layout, ulysses=answer.best.ulysses)
    assert s.layout == best.sharding.layout and s.ranks == 8


def test_what_was_asked_for_is_kept_where_nothing_is_faster() -> None:
    """A gain within the noise of a model is no reason to change anything."""
    answer = Answer(Question(1 << 20, 8))
    assert answer.best.chosen
    assert "nothing is faster" in recommend(answer)
