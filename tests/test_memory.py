"""The memory model: against published sizes of models, hand-counted bytes, and what its own terms say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash.forecast.hardware import load_hardware, machine_names
from ringflash.forecast.memory import LEVELS, MODELS, Transformer, find_model, longest_context, memory

SMALL = Transformer(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=1000)


@st.composite
def settings_of(draw: st.DrawFn) -> dict[str, object]:
    """What ``memory`` may be told beside the model and the length."""
    return dict(
        gpus=draw(st.sampled_from([1, 2, 8, 64])),
        stage=draw(st.integers(0, 3)),
        checkpointing=draw(st.sampled_from(LEVELS)),
        logits_chunk=draw(st.sampled_from([None, 1, 4096])),
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama3-8b", 8_030_261_248),  # as their model cards and checkpoints count them
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
    ],
)
def test_parameters_are_those_that_were_published(name, published):
    """To the last one: projections, norms, embeddings and all."""
    assert MODELS[name].parameters == published


def test_a_tied_embedding_is_counted_once():
    """Small models share it with the head."""
    tied = Transformer(2, 64, 4, 2, 16, 128, 1000, tied=True)
    assert SMALL.parameters - tied.parameters == 64 * 1000


def test_states_of_the_model_take_sixteen_bytes_a_parameter():
    """ZeRO's count: 2 weights, 2 gradients, 12 optimizer; its stages split them from the back (arXiv 1910.02054, figure 1)."""
    model = Transformer(1, 1000, 1, 1, 1, 1, 1)
    ways = 64
    psi = model.parameters
    for stage, bytes_a_parameter in ((0, 16), (1, 4 + 12 / ways), (2, 2 + 14 / ways), (3, 16 / ways)):
        terms = memory(model, 0, gpus=ways, stage=stage).terms
        states = sum(terms[name] for name in ("weights", "gradients", "optimizer"))
        assert states == pytest.approx(bytes_a_parameter * psi, abs=3)
    figure = memory(
        Transformer(1, 10**6, 1, 1, 1, 2500, 1), 0, gpus=64, stage=1
    ).terms  # 7.5 G parameters: 31.4 GB there
    assert sum(figure[name] for name in ("weights", "gradients", "optimizer")) == pytest.approx(31.4e9, rel=0.01)


def test_bytes_of_a_token_are_those_counted_by_hand():
    """Llama-3-8B, one layer: every tensor that its backward reads, written down one by one."""
    model = MODELS["llama3-8b"]
    residual = norm = 2 * 4096
    q, k, v, out, lse = 2 * 32 * 128, 2 * 8 * 128, 2 * 8 * 128, 2 * 32 * 128, 4 * 32
    gate = up = silu = product = 2 * 14336
    everything = 2 * (residual + norm) + q + k + v + out + lse + gate + up + silu + product
    assert model.layer_bytes("none") == everything
    assert model.layer_bytes("selective") == everything - 2 * norm - silu - product
    assert model.layer_bytes("attention") == residual + out + lse
    assert model.layer_bytes("full") == residual  # Korthikanti's 2sbh


def test_terms_of_a_small_model_add_up():
    """One line for each term, at a length where all of them are there."""
    terms = memory(SMALL, 1000, gpus=2, logits_chunk=100).terms
    parameters = SMALL.parameters
    assert terms["weights"] == terms["gradients"] == parameters
    assert terms["optimizer"] == 6 * parameters
    largest = max(SMALL.layer_parameters, 64 * 1000)
    assert terms["gathered weights"] == 2 * (largest + SMALL.layer_parameters) + 2 * largest
    assert terms["activations kept"] == 500 * (2 * 2 * 64 + 4 * 64)
    assert terms["activations of one layer"] == 500 * (SMALL.layer_bytes("none") - 2 * 64)
    dout_delta_dq, dk_dv = 4 * (2 * 16 + 4) + 4 * 4 * 16, 2 * 2 * 16 * 4
    assert terms["buffers of one layer"] == 500 * max(
        6 * 128 + 4 * 64, dout_delta_dq + dk_dv + 2 * (2 * 2 * 16 * 2) + 4 * dk_dv
    )
    less = memory(SMALL, 1000, gpus=2, logits_chunk=100, parts=0.5, totals=3.5).terms
    flying = 1.5 * (2 * 2 * 16 * 2) + 0.5 * dk_dv
    assert less == terms | {"buffers of one layer": terms["buffers of one layer"] - 500 * flying}
    assert memory(SMALL, 1000, parts=9, totals=9).terms == memory(SMALL, 1000).terms  # nobody to exchange with
    assert terms["logits"] == 100 * 1000 * 10


@given(settings_of(), st.integers(0, 1 << 20), st.integers(1, 1 << 20))
@settings(max_examples=60)
def test_longer_contexts_need_more_and_splitting_needs_less(options, tokens, more):
    """Every term grows with the length; later stages, stronger checkpointing and chunks take nothing more."""
    before = memory("qwen3-8b", tokens, **options)
    after = memory("qwen3-8b", tokens + more, **options)
    assert all(after.terms[name] >= before.terms[name] for name in before.terms)
    if options["stage"] > 0:
        earlier = memory("qwen3-8b", tokens, **options | dict(stage=options["stage"] - 1))
        for name in ("weights", "gradients", "optimizer"):
            assert before.terms[name] <= earlier.terms[name]
    kept = [memory("qwen3-8b", tokens, **options | dict(checkpointing=level)).total for level in LEVELS]
    assert kept == sorted(kept, reverse=True)
    assert before.terms["logits"] <= memory("qwen3-8b", tokens, **options | dict(logits_chunk=None)).terms["logits"]


@given(settings_of(), st.sampled_from(sorted(MODELS)), st.sampled_from(machine_names()))
@settings(max_examples=60)
def test_the_longest_context_fits_and_the_next_one_does_not(options, name, machine):
    """The answer is a multiple of 1K tokens, and exactly the largest."""
    found = longest_context(name, machine, **options)
    gpus = options["gpus"]
    assert int(found) == found.tokens and found.tokens % 1024 == 0
    assert found.usable == int(load_hardware(machine).memory * 0.9)
    assert memory(name, found.tokens + 1024, **options).total > found.usable
    assert found.memory.total <= found.usable or found.tokens == 0
    assert found.limit in found.memory.terms and found.limit in str(found) and f"{gpus} GPUs" in str(found)


def test_what_is_in_flight_shortens_the_context():
    """A gather of 64 shards holds every key at once: no shorter steps, but fewer tokens than a ring's two shards."""
    ring, gather = (
        longest_context("llama3-8b", "h100", 64, parts=parts, totals=totals) for parts, totals in ((2, 4), (64, 9))
    )
    assert gather.tokens < 0.8 * ring.tokens
    assert ring == longest_context("llama3-8b", "h100", 64)


def test_what_others_have_run_fits():
    """Llama-3.1-8B with 256K tokens on 8 H100, full checkpointing: published by torchtitan. One of them does not hold it."""
    assert longest_context("llama3-8b", "h100", 8).tokens >= 256 * 1024
    alone = longest_context("llama3-8b", "h100", 1)
    assert (alone.tokens, alone.limit) == (0, "optimizer")
    assert str(alone).startswith("no context")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: memory(SMALL, 1, stage=4), "stage is 4"),
        (lambda: memory(SMALL, 1, checkpointing="some"), "accepted are none, selective, attention, full"),
        (lambda: memory(SMALL, 1, gpus=0), "gpus is 0"),
        (lambda: memory(SMALL, 1, logits_chunk=0), "logits_chunk is 0"),
        (lambda: memory(SMALL, 1, parts=-1), "parts is -1; a finite number of shards"),
        (lambda: longest_context(SMALL, "h100", 2, totals=float("nan")), "totals is nan"),
        (lambda: find_model("llama9"), "known are llama3-8b, llama3-70b"),
        (lambda: longest_context(SMALL, "h100", 1, reserve=1.5), "reserve is 1.5"),
        (lambda: Transformer(1, 64, 3, 2, 16, 128, 10), "no multiple of kv_heads, 2"),
        (lambda: Transformer(0, 64, 4, 2, 16, 128, 10), "layers is 0"),
    ],
)
def test_wrong_values_are_refused_in_a_sentence(call, words):
    """The message names what came and what is accepted."""
    with pytest.raises(ValueError, match=words):
        call()
    with pytest.raises(TypeError, match="memory: gpus is True of type bool"):
        memory(SMALL, 1, gpus=True)
