"""`python -m ringflash plan`: what it reads, what it prints, what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import ringflash as rf
from ringflash import __main__ as commands
from ringflash.__main__ import main
from ringflash.forecast.cost import estimate
from ringflash.forecast.memory import memory
from ringflash.layout import LAYOUTS
from ringflash.route import ROUTES
from ringflash.units import read_tokens, spell_bytes, spell_seconds, spell_tokens
from ringflash.views.planner import Answer, Question
from ringflash.views.reading import read_documents, read_mask, read_path, spell_mask
from ringflash.views.report import recommend, record, training_memory, write_report

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
    spelled = " & ".join(f"({term!r})" for term in masks)
    assert read_mask(spelled) == mask == eval(spell_mask(spelled), {"rf": rf})


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
    path.write_bytes(b"\xef\xbb\xbf100\r\n200\r\n")  # as some editors write it
    assert read_documents(path) == (0, 100, 300)
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
        ([*SMALL[1:], "--layout", "balanced"], "--layout='balanced': the mask is causal"),
        ([*SMALL[1:], "--layout", "zig"], "contiguous"),
        ([*SMALL[1:], "--route", "double_ring"], "--route is 'double_ring'"),
        ([*SMALL[1:], "--route", "double_ring"], "4 ranks, 8 to a node, are in one node"),
        (["--length", "4K", "--ranks", "12", "--route", "double_ring"], "12 ranks do not fill nodes of 8 evenly"),
        (
            ["--length", "4K", "--ranks", "48", "--heads", "24", "--ulysses", "3", "--route", "double_ring"],
            "shards of 3 ranks do not fill nodes of 8",
        ),
        ([*SMALL[1:], "--heads", "24", "--ulysses", "3"], "--ulysses is 3"),
        ([*SMALL[1:], "--heads", "30", "--kv-heads", "30", "--ulysses", "4"], "--heads is 30, which --ulysses, 4"),
        ([*SMALL[1:], "--heads", "30"], "--heads is 30, which is no multiple of --kv-heads, 8"),
        (["--length", "1G", "--ranks", "4"], "--length is 1G tokens; plans count position by position, up to 64M"),
        ([*SMALL[1:], "--gpus", "8"], "--model is not given"),
        ([*SMALL[1:], "--gpus", "6", "--model", "llama3-8b"], "--gpus is 6; a multiple of --ranks, 4, is needed"),
        ([*SMALL[1:], "--draw", ""], "a file name that ends in .svg or .png or .pdf is needed"),
        ([*SMALL[1:], "--draw", "plan"], "a file name that ends in .svg or .png or .pdf is needed"),
        ([*SMALL[1:], "--draw", "folder.svg"], "'folder.svg', a folder"),
        ([*SMALL[1:], "--trace", "timeline"], "a file name that ends in .json is needed"),
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
    Path("folder.svg").mkdir()
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
    steps = str(rf.plan(s)).splitlines()[2:]
    assert all(line[:40].rstrip() in printed for line in steps)
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
    assert all(words in printed for words in ("training llama3-8b", "traffic in 2 rings", "recommendation: "))
    assert b"<svg" in picture.read_bytes()[:2000] and json.loads(trace.read_text())["traceEvents"]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document["length"] == 4096 and document["layout"] == "balanced"
    assert len(document["training"]) == 4
    for name in ("layouts", "routes", "divisions", "sizes"):
        marked = [candidate for candidate in document["compared"][name] if candidate["chosen"]]
        assert len(marked) == 1
        assert marked[0]["forward"] == pytest.approx(document["forward"]["seconds"])
        assert marked[0]["backward"] == pytest.approx(document["backward"]["seconds"])


def test_the_document_says_what_it_is_about() -> None:
    """Whoever reads it later can ask the same question again: every number that went in is in it."""
    question = Question(4096, 4, heads=8, kv_heads=2, head_dim=64, batch=3, dtype="float16", ranks_per_node=2)
    document = json.loads(json.dumps(record(Answer(question)), allow_nan=False))
    for name in ("length", "ranks", "heads", "kv_heads", "head_dim", "batch", "dtype", "ulysses"):
        assert document[name] == getattr(question, name), name
    assert document["ranks_per_node"] == 2 and document["mask"] == "rf.causal"
    assert document["links"]["between"]["name"] == question.machine.between.name
    assert all(document[name]["rate"] for name in ("forward", "backward"))
    assert json.dumps(record(Answer(Question(0, 2))), allow_nan=False)  # nothing to do takes no time


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


def test_the_recommended_line_has_the_mask_that_was_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Chunks once went into the boundaries of documents, and were lost with them; offsets are what the file means."""
    path = tmp_path / "lengths.txt"
    path.write_text(" ".join(["37"] * 20))
    given = ["--documents", str(path), "--mask", "causal & chunks(10)", "--window", "8", "--ranks", "2"]
    assert main(["plan", *given]) == 0
    line, where = capsys.readouterr().out.rstrip().splitlines()[-2:]
    assert "mask=rf.causal & rf.chunks(10) & rf.window(7, 0) & rf.documents(offsets)" in line
    assert f"the cumulative lengths in {path}" in where
    session: dict[str, Any] = {"rf": rf, "group": (0, 2), "offsets": read_documents(path)}
    exec(line.strip(), session)
    mask = rf.causal & rf.chunks(10) & rf.window(7, 0) & rf.documents(range(0, 741, 37))
    assert session["s"].mask == mask
    unknown = recommend(Answer(Question(740, 2, mask))).splitlines()[1:]  # nobody knows how it was written
    session["offsets"] = mask.documents[0]
    exec(unknown[0].strip(), session)
    assert session["s"].mask == mask and "those of the mask's documents" in unknown[1]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as rank 0 of 12 that a launcher started on nodes of 4, none of which exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for name, value in {"WORLD_SIZE": 12, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=12)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6])
def test_auto_is_what_a_launched_job_would_take(launched: None, degree: int) -> None:
    """Also where those who share a shard do not divide a node: a plan for another route would be for another job."""
    s = rf.Sharding(1 << 14, None, heads_axis=degree)
    question = Question(1 << 14, 12, heads=24, kv_heads=12, ranks_per_node=4, ulysses=degree)
    assert question.sharding.route == s.route and question.sharding.layout == s.layout
    assert question.nodes == {1: 3, 2: 3, 3: 1, 4: 3, 6: 1}[degree]


def test_longest_contexts_are_those_of_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest that fits with the others of its batch: at its length everything fits, a step further it does not."""
    for batch, gpus in ((1, 8), (16, 8), (3, 64)):
        question = Question(1 << 16, 8, batch=batch)
        for row in training_memory(question, "llama3-8b", gpus):
            longest, level = row["longest_context"], row["checkpointing"]

            def needed(
                length: int, batch: int = batch, gpus: int = gpus, level: str = level, q: Question = question
            ) -> int:
                flight = dict(parts=q.in_flight.parts, totals=q.in_flight.totals)
                options: Any = dict(gpus=8, shards=gpus, checkpointing=level, **flight)
                return memory("llama3-8b", length * batch, **options).total

            assert longest > 0 and needed(longest) <= row["usable_bytes"] < needed(longest + 1024)
            assert row["bytes"] == needed(1 << 16)


def test_more_gpus_split_the_model_and_not_the_sequence() -> None:
    """Rings of 8 among 64: each rank has as many tokens as on 8, and an eighth of the weights."""
    question = Question(1 << 20, 8)
    few, many = (training_memory(question, "llama3-8b", gpus)[0]["bytes"] for gpus in (8, 64))
    saved = 16 * 8_030_261_248 * (1 / 8 - 1 / 64)
    assert few - many == pytest.approx(saved, rel=1e-3)


def test_training_holds_what_the_plans_have_in_flight() -> None:
    """Everything at once (gather) takes more of a rank than a ring; a rank alone has nothing in flight."""
    ring, gather, alone = (
        Question(1 << 16, 8, layout="zigzag", route=route, ulysses=ulysses)
        for route, ulysses in (("ring", 1), ("gather", 1), ("ring", 8))
    )
    assert sum(alone.in_flight) == 0 < 2 * sum(ring.in_flight) < sum(gather.in_flight)
    few, some, many = (training_memory(q, "llama3-8b", 8)[3]["bytes"] for q in (alone, ring, gather))
    assert few <= some < many


def test_schedules_are_those_of_the_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """A forward sends nothing home; where the backward moves queries, its own schedule is printed."""
    question = Question(4096, 4, layout="zigzag", route="ring", heads=4, kv_heads=4, head_dim=64)
    backward = question.model.plans_of(question.plans)["backward"]
    assert backward[1].travels == "queries"
    report = write_report(Answer(question), 1)
    forward, turned = report.split("\n\n")[1:3]
    assert "sends home" not in forward and "to rank" in forward and "backward, in which queries travel" in turned
    assert all(line.rstrip() in turned for line in str(backward[1]).splitlines())
    same = write_report(Answer(Question(4096, 4, layout="zigzag", route="ring", heads=32, kv_heads=1)), 1)
    assert "only the backward sends totals home" in same and str(question.plans[1]) in same


def test_rings_and_swaps_are_counted_apart() -> None:
    """A ring of one rank sends nothing, and its report speaks of no traffic; what it swaps is a number of its own."""
    answer = Answer(Question(4096, 4, ulysses=4))
    report = write_report(answer)
    assert "in 0 messages" not in report and "plain ring" not in report
    assert answer.asked.sent == 0 < answer.asked.swapped and "bytes swapped forward" in report
    assert Answer(Question(4096, 4)).asked.swapped == 0


def test_steps_say_how_long_ranks_in_lockstep_take() -> None:
    """Contiguous causal shards on a ring: some rank computes a whole shard in every step but the first, all of P."""
    answer = Answer(Question(4096, 4, layout="contiguous", route="ring"))
    whole, half = 1024 * 1024, 1024 * 1025 // 2
    assert answer.asked.steps == pytest.approx((half + 3 * whole) / ((4 * half + 6 * whole) / 4))
    assert Answer(Question(4096, 4, rf.full, route="ring")).asked.steps == 1
    assert "steps max/mean" in write_report(answer)


def test_who_waits_is_told_for_what(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr, when planning takes long, so that the output stays what it is."""
    made: list[float] = []

    def impatient(seconds: float, say: Any, words: Any, options: Any) -> Any:
        made.append(seconds)
        return SimpleNamespace(start=lambda: say(*words, **options), cancel=lambda: None)

    monkeypatch.setattr(commands, "Timer", impatient)
    assert main(SMALL) == 0
    captured = capsys.readouterr()
    assert captured.err == "planning 4 ranks ...\n" and "planning" not in captured.out and 1 <= made[0] <= 5


@pytest.mark.parametrize("path", [None, 7, b"plan.svg"])
def test_what_is_no_path_is_a_type_error(path: Any) -> None:
    """In one sentence, with what is accepted."""
    with pytest.raises(TypeError, match=re.escape("path is ") + ".*ends in .svg"):
        read_path(path, (".svg",))


def test_what_was_asked_for_is_kept_where_nothing_is_faster() -> None:
    """A gain within the noise of a model is no reason to change anything."""
    answer = Answer(Question(1 << 20, 8))
    assert answer.best.chosen
    assert "nothing is faster" in recommend(answer)
