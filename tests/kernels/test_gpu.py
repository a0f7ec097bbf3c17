"""The kernels on a real GPU: the laws of the interpreted suite at full size, in five minutes.

    python -m pytest -m gpu tests/kernels

Compiling takes longest, so it comes first: one process for each core plays its share of the cases, and what Triton compiles
for them lies in its cache when the tests begin. On a machine that has only torch and pytest add
``--confcutdir=tests/kernels``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import laws
import pytest
import torch
from cases import DECODE, LONG, STORAGES, Case, Lengths, cases, problem
from oracle import Answer

import ringflash as rf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("compiled"),
]
GPU = "cuda"
CASES = cases(LONG)
BUSY = Case("bf16", (128, 128), (4, 2), "several", "everything", Lengths(1000, 1000, 0))
PLAIN = Case("bf16", (128, 128), (8, 2), "causal", "plain", Lengths(4096, 4096, 0))
BOTH_WAYS = pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "deterministic"])


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> None:
    """Every kernel of the chosen tests' cases, compiled by as many processes as there are cores."""
    began, here = time.monotonic(), Path(__file__).resolve().parent
    jobs = list(dict.fromkeys(job for item in request.session.items if (job := _job(item))))
    workers = min(len(jobs), os.cpu_count() or 1, 16)
    roots = [here, here.parent, here.parent.parent, here.parent.parent / "kernels"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots)), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, laws.__file__, *jobs[i::workers]], env=environment, stdin=subprocess.DEVNULL)
        for i in range(workers)
    ]
    for process in started:
        process.wait()
    print(f"compiled {len(jobs)} cases in {workers} processes, {time.monotonic() - began:.0f} s")


def _job(item: pytest.Item) -> str | None:
    """What the test plays, as laws.py takes it."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if "case" not in given:
        return None
    case = replace(given["case"], deterministic=given.get("deterministic", given["case"].deterministic))
    return f"{min(2, given.get('ranks', 1))} {case!r}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whatever_is_combined(case):
    """Any two choices together give out, lse and all gradients of the textbook, to rounding."""
    laws.check(case, GPU)


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_few_queries_and_many_keys(case):
    """Where keys are split among programs and the parts are added, the sum is still the textbook's."""
    laws.check(case, GPU)


@pytest.mark.parametrize("queries", [1, 4])
def test_decoding_from_a_long_cache(queries):
    """A hundred thousand keys are cut into as many parts as the device has room for."""
    keys = 100_001
    laws.check(Case("bf16", (128, 128), (8, 1), "causal", "plain", Lengths(queries, keys, keys - queries)), GPU)


@BOTH_WAYS
@pytest.mark.parametrize("mask", ["causal", "sliding"])
def test_a_hundred_thousand_tokens(mask, deterministic):
    """Sampled rows and keys of 128K tokens are those of the textbook: nothing wears out along the way."""
    laws.check_sampled(replace(PLAIN, heads=(2, 1), mask=mask, deterministic=deterministic), 1 << 17, GPU)


@BOTH_WAYS
@pytest.mark.parametrize("case", [PLAIN, BUSY, replace(BUSY, dims=(64, 64), dtype="fp32")], ids=str)
def test_bits_repeat(case, deterministic):
    """Two hundred runs give the same bits; only dq may be summed in any order, and is then the same to rounding."""
    p = problem(replace(case, deterministic=deterministic), GPU)
    first, _ = laws.answer(p)
    for run in range(200):
        again, _ = laws.answer(p)
        differ = laws.same(first, again, but="" if deterministic else "dq")
        assert not differ, f"run {run}: {differ} differ"
        error = (again.dq.double() - first.dq.double()).norm() / first.dq.double().norm()
        assert error < laws.UNIT[p.q.dtype], f"run {run}: dq differs by {error}"


@BOTH_WAYS
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("case", [replace(PLAIN, lengths=Lengths(2049, 2049, 0)), BUSY], ids=str)
def test_a_ring_is_one_device(case, ranks, layout, deterministic):
    """Carries and gradients travel through the kernels; the answer knows neither the number of ranks nor the layout."""
    laws.check_ring(replace(case, deterministic=deterministic), ranks, layout, GPU)


@BOTH_WAYS
@pytest.mark.parametrize("storage", STORAGES)
def test_memory_is_left_alone(storage, deterministic):
    """Inputs stand between NaN, outputs between walls of NaN: nothing outside is read or written, nothing inside forgotten."""
    laws.check_margins(replace(BUSY, storage=storage, deterministic=deterministic), GPU)


@BOTH_WAYS
@pytest.mark.parametrize("case", [PLAIN, BUSY, replace(PLAIN, lengths=Lengths(1, 4096, 3000))], ids=str)
def test_a_key_reaches_only_who_sees_it(case, deterministic):
    """A key out of sight may hold anything finite: no bit of the rows that do not see it changes."""
    keys = case.lengths.keys
    laws.check_influence(replace(case, deterministic=deterministic), [0, 63, 64, keys // 2, keys - 1], GPU)


@pytest.mark.parametrize("seed", [0, 2**32 + 7, -1, -(2**63)])
def test_dropout_drops_what_the_reference_drops(seed):
    """The same cells for every seed, so that a ring that mixes backends is still one softmax."""
    laws.check_dropout(seed, GPU)


def test_tensors_beyond_two_to_the_31():
    """Offsets that pass 2**31 reach the right elements."""
    laws.check_far_apart(GPU)


@BOTH_WAYS
def test_a_captured_graph_gives_the_same_bits(deterministic):
    """torch.compile(fullgraph=True) goes through attention, forward and backward."""
    p = problem(replace(PLAIN, lengths=Lengths(1000, 1000, 0), deterministic=True), GPU)
    arguments = {**p.arguments, "deterministic": deterministic}

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return rf.flash_attention(q * 2.0, k, v, **arguments) + 1.0

    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
        out = run(*leaves)
        results.append(Answer(out.detach(), p.dlse, *torch.autograd.grad(out, leaves, p.dout)))
    assert not laws.same(*results, but="" if deterministic else "dq")
