"""Estimates: the schedule as it is played, what it sends and holds, against formulas that can be written down."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask import masks

import ringflash as rf
from ringflash.forecast.cost import Estimate, estimate
from ringflash.forecast.hardware import Hardware, Link, Rate, load_hardware
from ringflash.forecast.model import Model
from ringflash.forecast.timeline import Channel, Pace, Span, cells_between, play, schedule
from ringflash.forecast.traffic import crossing, traffic
from ringflash.forecast.workload import Workload
from ringflash.layout import LAYOUTS
from ringflash.plan import Plan, cheaper_backward
from ringflash.route import ROUTES, direct, double_ring

NAMES = sorted(LAYOUTS)
FREE = 1e300  # bytes per second
SHAPE = dict(heads=8, kv_heads=2, head_dim=64)


def machine(bandwidth: float = 1e9, latency: float = 0.0, rate: float = 1e9, host: float = 0.0) -> Hardware:
    """A machine whose numbers are all given here, with two ranks in a node."""
    link = Link("test", bandwidth, 1.0, latency)
    rates = (Rate(1, rate, "given"),)
    return Hardware("test", 10**9, rate, rates, rates, link, link, gpus_per_node=2, step_overhead=host)


def plans_of(length: int, ranks: int, mask: rf.Mask, layout: str = "contiguous", route: object = "ring") -> list[Plan]:
    return rf.plans(rf.Sharding(length, (0, ranks), mask, layout, route=route))


@st.composite
def problems(draw: st.DrawFn) -> list[Plan]:
    """The plans of a problem on up to 6 ranks, any mask, layout and route."""
    length, ranks, rows = draw(st.integers(1, 40)), draw(st.integers(1, 6)), draw(st.integers(1, 2))
    mask = draw(masks(length, rows)).mask
    routes = [*ROUTES.values(), direct(2), *([double_ring(2, ranks // 2)] if ranks % 2 == 0 else [])]
    return plans_of(length, ranks, mask, draw(st.sampled_from(NAMES)), draw(st.sampled_from(routes)))


@st.composite
def machines(draw: st.DrawFn) -> Hardware:
    return machine(
        bandwidth=draw(st.sampled_from([1e3, 1e6, 1e9])),
        latency=draw(st.sampled_from([0.0, 1e-4])),
        rate=draw(st.sampled_from([1e6, 1e9])),
        host=draw(st.sampled_from([0.0, 1e-4])),
    )


def estimated(plans: list[Plan], on: Hardware, **options: object) -> Estimate:
    return estimate(plans, on, batch=plans[0].mask.rows, **SHAPE | options)


@given(problems(), machines())
@settings(max_examples=40)
def test_seconds_are_computing_and_imbalance_and_what_is_exposed(plans, on):
    """Three terms explain a pass: none is negative, nobody computes longer than it takes, and all work is in it."""
    result = estimated(plans, on)
    work = Workload(8, 2, 64, 64, batch=plans[0].mask.rows, rows=plans[0].mask.rows)
    cells = rf.verify(plans).cells
    for phase in (result.forward, result.backward):
        assert phase.seconds >= max(phase.busy) * (1 - 1e-9)
        assert min(phase.compute, phase.imbalance, phase.exposed) >= 0
        assert math.isclose(phase.compute + phase.imbalance + phase.exposed, phase.seconds, rel_tol=1e-6, abs_tol=1e-12)
        assert phase.flops == cells * work.flops[phase.name]
        assert math.isclose(sum(phase.busy) * on.peak, phase.flops, rel_tol=1e-9, abs_tol=1e-9)


@given(problems(), machines())
@settings(max_examples=40)
def test_every_message_and_every_visit_is_in_the_spans_once(plans, on):
    """Bytes of the spans are those of the plans' messages; visits of a rank, and messages of a link, do not overlap."""
    result = estimated(plans, on)
    work = result.workload
    for phase in (result.forward, result.backward):
        of = plans if phase.travels == "keys" else [plan.turned for plan in plans]
        cost = work.keys if phase.travels == "keys" else work.queries
        moved = dict(onward=0, home=0)
        for plan in of:
            for step in plan.steps:
                for lane in moved:
                    moved[lane] += sum(m.part.tokens for batch in getattr(step, lane) for m in batch.out)
        home = cost.home if phase.name == "backward" else 0
        sent = (moved["onward"] * cost.onward + moved["home"] * home) * work.batch
        assert sum(phase.bytes.values()) == sum(span.bytes for span in phase.spans) == sent
        for rank in range(len(plans)):
            visits = sorted((s.start, s.end) for s in phase.spans if s.rank == rank and s.lane == "compute")
            assert len(visits) == len(of[rank].meetings)
            assert all(a[1] <= b[0] for a, b in pairwise(visits))
        assert all(0 <= span.start <= span.end <= phase.seconds * (1 + 1e-9) for span in phase.spans)
        assert max((span.end for span in phase.spans), default=0.0) == phase.seconds


@given(problems(), machines())
@settings(max_examples=40)
def test_slower_links_never_help(plans, on):
    """Half the bandwidth, more latency or a busier host: nothing is done earlier."""
    before = estimated(plans, on)
    for slower in (
        on.with_(within=replace(on.within, bytes_per_second=on.within.bytes_per_second / 2)),
        on.with_(between=replace(on.between, bytes_per_second=on.between.bytes_per_second / 2)),
        on.with_(within=replace(on.within, latency=on.within.latency + 1e-4)),
        on.with_(step_overhead=on.step_overhead + 1e-4),
    ):
        after = estimated(plans, slower)
        assert after.forward.seconds >= before.forward.seconds
        assert after.backward.seconds >= before.backward.seconds


@given(problems(), st.sampled_from([1e6, 1e9]))
@settings(max_examples=40)
def test_nothing_is_exposed_where_sending_costs_nothing(plans, rate):
    """What remains beyond the mean rank's work is imbalance; a balanced problem has none of it."""
    free = Link("free", FREE)
    result = estimated(plans, replace(machine(rate=rate), within=free, between=free))
    assert result.forward.exposed == result.backward.exposed == 0
    even = estimated(plans_of(24, 4, rf.full, route=plans[0].route if plans[0].ranks == 4 else "ring"), result.hardware)
    assert math.isclose(even.forward.seconds, even.forward.compute)
    assert math.isclose(even.backward.seconds, even.backward.compute)


@pytest.mark.parametrize("bandwidth", [1e5, 1e6, 1e7, 1e9])
@pytest.mark.parametrize("latency", [0.0, 1e-3])
def test_a_uniform_ring_takes_what_the_formula_says(bandwidth, latency):
    """T = sum of max(C, a + n / B) over all steps but the last, and C: equal shards, everybody sees everybody."""
    ranks, tokens, rate = 5, 16, 1e8
    result = estimated(plans_of(ranks * tokens, ranks, rf.full), machine(bandwidth, latency, rate))
    compute = tokens * tokens * 4 * 8 * 64 / rate
    transfer = latency + tokens * 2 * 2 * 64 * 2 / bandwidth
    assert math.isclose(result.forward.seconds, (ranks - 1) * max(compute, transfer) + compute)
    steps = result.forward.steps
    assert math.isclose(sum(step.seconds for step in steps), result.forward.seconds)
    assert [step.bytes for step in steps] == [ranks * tokens * 512] * (ranks - 1) + [0]


def test_a_host_that_runs_ahead_costs_what_it_cannot_hide():
    """One step of it on a GPU, where visits are longer; all of it where the host computes."""
    plans, compute, host = plans_of(80, 5, rf.full), 16 * 16 * 4 * 8 * 64 / 1e8, 1e-3
    ahead = replace(machine(bandwidth=FREE, rate=1e8), step_overhead=host)
    assert math.isclose(estimated(plans, ahead).forward.seconds, host + 5 * compute)
    assert math.isclose(estimated(plans, replace(ahead, runs_ahead=False)).forward.seconds, 5 * (host + compute))
    assert math.isclose(estimated(plans, ahead.with_(step_overhead=1.0)).forward.seconds, 5 * 1.0 + compute)


def test_totals_follow_their_visitors_and_the_last_goes_home():
    """Backward on three ranks with slow messages, by hand: shard, total, total, total, one after the other on each link."""
    plans = plans_of(12, 3, rf.full)
    pace = Pace(1 / 16, {"onward": 1, "home": 1}, (Channel(0.0, 1.0),), lambda a, b: 0)  # a visit 1 s, a message 4 s
    spans: list[Span] = []
    # 0-1 own, 0-4 onward, 4-5 visit, 4-8 onward, 8-12 home; 8-9 visit, waits until 12, 12-16 home
    assert play(schedule(plans), pace, spans) == 16
    starts = sorted((s.lane, s.start, s.end) for s in spans if s.rank == 0)
    assert starts == [
        *(("compute", float(a), float(a + 1)) for a in (0, 4, 8)),
        *(("home", float(a), float(a + 4)) for a in (8, 12)),
        *(("onward", float(a), float(a + 4)) for a in (0, 4)),
    ]


def test_a_crossing_hides_behind_a_whole_inner_ring():
    """A slow link that takes up to a lap of computing costs a ring every step, and a double ring nothing."""
    work = 16 * 16 * 4 * 8 * 64 / 1e8  # seconds of a visit
    slow = Link("slow", 16 * 512 / (1.9 * work))
    on = replace(machine(bandwidth=FREE, rate=1e8), between=slow)
    ring, double = (
        estimated(plans_of(64, 4, rf.full, route=route), on).forward for route in ("ring", double_ring(2, 2))
    )
    assert double.exposed < 1e-9 < ring.exposed
    assert math.isclose(ring.seconds, (3 * 1.9 + 1) * work)
    assert double.bytes["between"] < ring.bytes["between"]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(-6, 6), st.integers(1, 5), st.sampled_from(NAMES), st.data())
@settings(max_examples=40)
def test_cells_between_ranks_are_counted_exactly(queries, keys, offset, ranks, name, data):
    """The sum over sorted ends is the number of pairs that the mask lets through, for every pair of ranks."""
    mask = data.draw(masks(keys, 2)).mask
    of_queries, of_keys = LAYOUTS[name](queries, ranks), LAYOUTS[name](keys, ranks)
    found = cells_between(of_queries, of_keys, mask, offset)
    for r in range(ranks):
        bounds = [mask.bounds(of_queries.positions(r) + offset, row) for row in range(mask.rows)]
        for s in range(ranks):
            at = of_keys.positions(s)
            assert found[r, s] == sum(((at >= lo[:, None]) & (at < hi[:, None])).sum() for lo, hi in bounds)


@pytest.mark.parametrize("shape", [(64, 1), (1, 64)], ids=["few key heads", "few query heads"])
def test_the_backward_moves_what_the_library_moves(shape):
    """Keys where heads are grouped, queries where there are fewer of them: by counted bytes, as circulate is told."""
    heads, tokens = shape
    s = rf.Sharding(tokens, (0, 4), rf.full, "contiguous", keys=256)
    plans = rf.plans(s)
    result = estimate(plans, machine(), heads=heads, kv_heads=1, head_dim=64)
    chosen = cheaper_backward(plans[0], result.workload.keys, result.workload.queries)
    assert result.backward.travels == chosen.travels
    assert result.forward.travels == "keys"


def test_heads_over_ranks_change_neither_work_nor_answers():
    """Ulysses: the same operations on as many ranks, fewer tokens a hop, and swaps that are counted."""
    flat = estimated(plans_of(256, 4, rf.full), machine(rate=1e8))
    swapped = estimated(plans_of(256, 2, rf.full), machine(rate=1e8), heads_degree=2)
    assert flat.ranks == swapped.ranks == 4
    assert flat.forward.flops == swapped.forward.flops
    swaps = [span for span in swapped.forward.spans if span.lane == "exchange"]
    tokens, heads, kv_heads = 64, 4, 1
    sent = tokens * (heads + 2 * kv_heads) * 64 * 2, tokens * heads * (64 * 2 + 4)
    assert sorted({span.bytes for span in swaps}) == sorted(sent)
    assert len(swaps) == 4  # before and after, on both ranks of the ring
    assert swapped.forward.swapped == {"within": 4 * sum(sent), "between": 0}
    assert (swapped.forward.swap_busiest, swapped.forward.swap_messages) == (sum(sent), 2 * 4)
    assert (flat.forward.swapped, flat.forward.swap_messages) == ({}, 0)
    hop = (
        128 * 2 * kv_heads * 64 * 2
    )  # each rank of the ring sends its shard to the other one: 2 ranks, 1 key head each
    assert swapped.forward.bytes == {"within": 0, "between": 4 * hop}
    assert (swapped.forward.busiest, swapped.forward.messages) == (hop, 4)
    assert "heads are swapped in 8 messages" in str(swapped)


def test_key_heads_are_copied_only_as_far_as_needed():
    """28 heads of 4 groups on 8 ranks cannot be shared; on 4, each rank has the key head of its queries."""
    assert Workload(28, 4, 128, 128, degree=4).local_kv_heads == 1
    assert Workload(28, 4, 128, 128, degree=2).local_kv_heads == 2
    assert Workload(32, 8, 128, 128, degree=16).local_kv_heads == 1
    assert Workload(24, 4, 128, 128, degree=3).local_kv_heads == 4  # 8 queries: 6 of one key head, 2 of the next
    with pytest.raises(ValueError, match="heads_degree"):
        Workload(28, 4, 128, 128, degree=8)


def test_the_limit_is_named_and_the_change_that_helps_is_found():
    """Long shards are limited by computing, slow links by links, a causal contiguous layout by its last rank."""
    h200 = load_hardware("h200")
    long = estimate(plans_of(1 << 20, 8, rf.causal, "zigzag"), h200, heads=32, kv_heads=8)
    assert long.limit == "compute"
    assert long.forward.busy_share > 0.9 and 2 > float(long.advice[-1].split()[-4]) > 1.9
    slow = estimate(plans_of(1 << 17, 16, rf.causal, "zigzag"), h200.with_(between="tcp"), heads=32, kv_heads=8)
    assert slow.limit == "links between nodes"
    assert any(line.startswith("route double_ring(2, 8") for line in slow.advice)
    assert any("heads_axis" in line for line in slow.advice)
    skewed = estimate(plans_of(1 << 17, 8, rf.causal), h200, heads=32, kv_heads=8)
    assert skewed.limit.startswith("imbalance: rank 7 has 1.8")  # 15 / 8
    assert skewed.advice[0].startswith('layout "zigzag"')
    short = estimate(plans_of(1 << 10, 8, rf.causal, "zigzag"), h200, heads=32, kv_heads=8)
    assert short.limit == "latency"


def test_a_report_says_that_it_is_a_model_and_where_its_rates_come_from():
    """Nobody should take it for a measurement."""
    text = str(estimate(plans_of(1 << 16, 4, rf.causal, "zigzag"), "a100", heads=8, head_dim=128))
    assert text.startswith("model, not a measurement: 64K tokens on 4 x a100")
    for word in (
        "forward",
        "backward",
        "memory",
        "of 312 TFLOP/s in bfloat16",
        "limit",
        "published: FlashAttention-2",
        "advice",
    ):
        assert word in text


def test_documents_of_every_batch_row_are_counted():
    """A mask that tells rows apart counts all of them; one that does not counts a row that stands for the batch."""
    rows = rf.documents([[0, 16, 32], [0, 8, 32]])
    two = estimate(plans_of(32, 2, rows), machine(), batch=2, **SHAPE)
    same = estimate(plans_of(32, 2, rf.documents([0, 16, 32])), machine(), batch=2, **SHAPE)
    per_cell = 2 * 8 * 128
    assert two.forward.flops == per_cell * (16**2 * 2 + 8**2 + 24**2)
    assert same.forward.flops == per_cell * 2 * (16**2 * 2)
    with pytest.raises(ValueError, match="batch is 3, and the mask has 2 rows"):
        estimate(plans_of(32, 2, rows), machine(), batch=3, **SHAPE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(heads=0), "heads is 0"),
        (dict(heads=6, kv_heads=4), "no multiple of kv_heads"),
        (dict(heads=8, dtype="fp8"), "accepted are bfloat16, float16, float32, float64"),
        (dict(heads=8, ranks_per_node=0), "ranks_per_node is 0"),
        (dict(heads=8, hardware="h300"), "known are h200, h100, a100, b200, cpu"),
    ],
)
def test_wrong_shapes_are_refused_in_a_sentence(options, words):
    """Before anything is computed."""
    with pytest.raises(ValueError, match=words):
        estimate(plans_of(16, 2, rf.full), **dict(hardware="h100") | options)


def test_an_incomplete_set_of_plans_is_refused():
    """One rank's plan says nothing about what the others do."""
    plans = plans_of(16, 3, rf.full)
    for call in (lambda some: estimate(some, "h100", heads=8), traffic):
        with pytest.raises(ValueError, match="one plan for every rank"):
            call(plans[1:])
    mixed = [*plans[:2], plans_of(32, 3, rf.full)[2]]
    with pytest.raises(ValueError, match="several problems"):
        estimate(mixed, "h100", heads=8)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 8]))
def test_a_hop_crosses_nodes_for_as_many_ranks_as_are_on_others(source, target, per_node, degree):
    """Rank l of those that share the shard of ring rank r is rank r * degree + l: nodes need not hold whole groups."""
    nodes = [[(at * degree + lane) // per_node for lane in range(degree)] for at in (source, target)]
    assert crossing(source, target, per_node, degree) == sum(a != b for a, b in zip(*nodes, strict=True))


def test_rings_across_uneven_nodes_go_over_the_slow_link():
    """Nodes of 6 and groups of 4: half of the first hop's ranks leave their node, so it takes as long as if all did."""
    plans, on = plans_of(64, 3, rf.full), machine(bandwidth=1e6, rate=1e12)
    work = Workload(8, 4, 64, 64, degree=4)
    model = Model(on, work, per_node=6)
    pace = model.pace("forward", plans)
    assert [pace.link_of(0, 1), pace.link_of(1, 2), pace.link_of(2, 0)] == [1, 1, 1]
    assert [model.swap_kind(1), model.swap_kind(2)] == [0, 1]  # ranks 4 to 7 are on two nodes
    found = estimate(plans, on, heads=8, kv_heads=4, head_dim=64, heads_degree=4, ranks_per_node=6).forward
    lane = {hop.source: 0 for hop in schedule(plans).hops("onward")}
    between = {0: 2, 1: 2, 2: 4}  # 4, 5 | 6, 7 of ranks 0-3 to 4-7; the last ring rank is alone on the second node
    for hop in schedule(plans).hops("onward"):
        lane[hop.source] += hop.tokens * work.keys.onward
    assert found.bytes["between"] == sum(count * between[source] for source, count in lane.items())
    assert sum(found.bytes.values()) == 4 * sum(lane.values())
    counted = traffic(plans, work.keys.onward, ranks_per_node=6, degree=4)
    assert (counted.ours.total, counted.ours.between) == (sum(found.bytes.values()), found.bytes["between"])
    assert (counted.messages, counted.nodes, counted.ours.sent) == (found.messages, 2, found.busiest)


def test_an_estimate_is_data():
    """It can be sent to another process, knows what it is of, prints in a line, and advises there as here."""
    plans = plans_of(64, 4, rf.causal)
    result = estimate(plans, "h100", heads=8)
    again = pickle.loads(pickle.dumps(result))
    assert again == result and again.problem == plans[0].problem
    assert again.advice == result.advice != ()
    assert len(repr(result)) < 5000 and "Span(" not in repr(result)
    assert str(result) == "\n".join([result.summary, *(f"advice   {line}" for line in result.advice)])


def test_a_problem_without_tokens_takes_no_time():
    """Nothing is computed and nothing sent, and no rate is infinite."""
    plans = plans_of(0, 2, rf.full)
    result = estimate(plans, "h100", heads=8)
    assert (result.seconds, result.tokens_per_second) == (0.0, 0.0)
    assert ": nothing sent" in str(result.forward)
    assert str(traffic(plans)) == "nothing is sent"
