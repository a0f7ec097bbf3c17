"""The arguments of ringflash.compat: signatures that are theirs to the letter; what cannot be honoured is refused by name."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from ringflash.compat import arguments, flash_attn, ring_flash_attn

TAIL = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
FLASH = TAIL + "softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False"
RING = TAIL + "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None, *, seed=None"
PAIRS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
TENSORS = {"": "q, k, v, ", "_kvpacked": "q, kv, ", "_qkvpacked": "qkv, "}

SIGNATURES = {f"flash_attn{packing}_func": x + FLASH for packing, x in TENSORS.items()}
SIGNATURES |= {
    "flash_attn_varlen_func": f"q, k, v, {PAIRS}{FLASH}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {PAIRS}{FLASH}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {FLASH}",
    "llama3_flash_attn_prepare_cu_seqlens": "cu_seqlens, causal, rank, world_size",
}
for packing, x in TENSORS.items():
    SIGNATURES[f"llama3_flash_attn_varlen{packing}_func"] = f"{x}{PAIRS}heads_k_stride, local_k_slice, {RING}"
    for cut in ("ring", "zigzag_ring", "stripe"):
        SIGNATURES[f"{cut}_flash_attn{packing}_func"] = x + RING
        SIGNATURES[f"{cut}_flash_attn_varlen{packing}_func"] = f"{x}cu_seqlens, max_seqlen, {RING}"


def functions() -> dict[str, Callable[..., Any]]:
    return {name: getattr(module, name) for module in (flash_attn, ring_flash_attn) for name in module.__all__}


def signature(function: Callable[..., Any]) -> str:
    """Names, order and defaults, without annotations."""
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare))[1:-1]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_theirs(name: str) -> None:
    """A positional argument that lands under another name would be silently wrong; ``seed`` is ours, and keyword-only."""
    assert signature(functions()[name]) == SIGNATURES[name]
    assert functions()[name].__name__ == name
    assert functions()[name].__doc__


def test_every_function_is_in_the_table_and_can_be_pickled() -> None:
    """Functions that are made, not written, still stand in their module under their own name."""
    assert set(functions()) == set(SIGNATURES)
    assert all(pickle.loads(pickle.dumps(function)) is function for function in functions().values())


PREPARED = [
    # cu_seqlens, causal, rank, world_size -> cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, slice
    (([0, 7, 14, 16], True, 3, 8), [0, 1, 2], [0, 7, 8], 1, 7, (0, 8)),
    (([0, 7, 14, 16], False, 3, 8), [0, 1, 2], [0, 7, 14], 1, 7, (0, 14)),
    (([0, 7, 14, 16], True, 7, 8), [0, 2], [0, 2], 2, 2, (14, 16)),
    (([0, 4, 4, 8], True, 1, 2), [0, 0, 4], [0, 0, 4], 4, 4, (4, 8)),
    (([0, 4, 4, 8], False, 0, 2), [0, 4], [0, 4], 4, 4, (0, 4)),
]


@pytest.mark.parametrize(("given", "q", "k", "max_q", "max_k", "ends"), PREPARED)
def test_prepared_offsets_are_theirs(
    given: tuple[Any, ...], q: list[int], k: list[int], max_q: int, max_k: int, ends: tuple[int, int]
) -> None:
    """Code that reads what is prepared, or indexes with the slice, finds what ring-flash-attn puts there."""
    cu_seqlens, *others = given
    got = ring_flash_attn.llama3_flash_attn_prepare_cu_seqlens(torch.tensor(cu_seqlens, dtype=torch.int32), *others)
    assert (got[0].tolist(), got[1].tolist(), *got[2:4]) == (q, k, max_q, max_k)
    assert {x.dtype for x in got[:2]} == {torch.int32}
    assert torch.arange(cu_seqlens[-1])[got[4]].tolist() == list(range(*ends))
    assert pickle.loads(pickle.dumps(got[4])).step.cu_seqlens == tuple(cu_seqlens)


def test_shardings_are_made_once() -> None:
    """A call per layer must not plan the ring again; another batch of documents is another sharding."""
    q = torch.ones(8, 1, 4)
    ring_flash_attn._sharding.cache_clear()
    for cu_seqlens in ([0, 2, 8], torch.tensor([0, 2, 8]), [0, 4, 8]):
        ring_flash_attn.zigzag_ring_flash_attn_varlen_func(q, q, q, cu_seqlens, 6, causal=True)
    assert ring_flash_attn._sharding.cache_info()[:2] == (1, 2)


def test_offsets_on_a_device_are_copied_once() -> None:
    """A copy per layer would stop the device in every layer; a stale copy would be silently wrong."""
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    first = arguments.copied_once(offsets)
    assert first == [0, 3, 8] and arguments.copied_once(offsets) is first
    offsets[1] = 5
    assert arguments.copied_once(offsets) == [0, 5, 8]
    offsets.data[1] = 6  # as torch.distributed writes: uncounted
    assert arguments.copied_once(offsets[:]) == [0, 6, 8]


def test_the_longest_may_be_any_integer() -> None:
    """Collators compute it with numpy or torch."""
    for most in (4, torch.tensor(4), numpy.int64(4)):
        flash_attn.flash_attn_varlen_func(ROW, ROW, ROW, [0, 2, 6], [0, 2, 6], most, most)
        with pytest.raises(ValueError, match="max_seqlen_q is 3"):
            flash_attn.flash_attn_varlen_func(ROW, ROW, ROW, [0, 2, 6], [0, 2, 6], most - 1, most)
    with pytest.raises(TypeError, match=r"max_seqlen_q is 4\.0; an integer is needed"):
        flash_attn.flash_attn_varlen_func(ROW, ROW, ROW, [0, 2, 6], [0, 2, 6], 4.0, 4)


Q = torch.ones(1, 6, 2, 4)
ROW = Q[0]
REFUSED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "window_size is .3, -2.; a pair": ("flash_attn_func", (Q, Q, Q), dict(window_size=(3, -2))),
    "window_size is 5; a pair": ("ring_flash_attn_func", (Q, Q, Q), dict(window_size=5)),
    "return_attn_probs with dropout_p 0.1": ("flash_attn_func", (Q, Q, Q, 0.1), dict(return_attn_probs=True)),
    "k has shape .6, 2, 4.": ("flash_attn_func", (Q, ROW, Q), {}),
    "q is a list": ("ring_flash_attn_func", ([1], Q, Q), {}),
    "kv has shape .1, 6, 2, 4.; .*, 2, heads, head_dim. is needed": ("flash_attn_kvpacked_func", (Q, ROW[None]), {}),
    "block_table is given": (
        "flash_attn_varlen_func",
        (ROW, ROW, ROW, [0, 6], [0, 6], 6, 6),
        dict(block_table=torch.zeros(1)),
    ),
    "cu_seqlens_q is .0, 4.; offsets rise from 0 .*, here 6": (
        "flash_attn_varlen_func",
        (ROW, ROW, ROW, [0, 4], [0, 6], 6, 6),
        {},
    ),
    "cu_seqlens_k is torch.float32": (
        "flash_attn_varlen_func",
        (ROW, ROW, ROW, [0, 6], torch.tensor([0.0, 6]), 6, 6),
        {},
    ),
    "max_seqlen_k is 3, and the longest document has 4": (
        "flash_attn_varlen_func",
        (ROW, ROW, ROW, [0, 6], [0, 2, 6], 6, 3),
        {},
    ),
    "cu_seqlens_q has 1 documents, cu_seqlens_k 2": (
        "flash_attn_varlen_func",
        (ROW, ROW, ROW, [0, 6], [0, 2, 6], 6, 6),
        {},
    ),
    r"alibi_slopes has shape \(3, 2\), and there are 2 documents": (
        "flash_attn_varlen_func",
        (ROW, ROW, ROW, [0, 2, 6], [0, 2, 6], 6, 6),
        dict(alibi_slopes=torch.ones(3, 2)),
    ),
    "dropout_p is 0.1 without seed": ("ring_flash_attn_func", (Q, Q, Q, 0.1), {}),
    "q has 5 tokens on each rank; a zigzag": ("zigzag_ring_flash_attn_func", (Q[:, :5], Q[:, :5], Q[:, :5]), {}),
    "cu_seqlens is .0, 3, 6.; a zigzag": ("zigzag_ring_flash_attn_varlen_func", (ROW, ROW, ROW, [0, 3, 6], 3), {}),
    "q has 6 tokens on each rank and k 4": ("ring_flash_attn_func", (Q, Q[:, :4], Q[:, :4]), dict(causal=True)),
    "where causal, window_size or alibi_slopes compares": (
        "ring_flash_attn_func",
        (Q, Q[:, :4], Q[:, :4]),
        dict(alibi_slopes=torch.ones(2)),
    ),
    "alibi_slopes is .1, 2.; a tensor": ("flash_attn_func", (Q, Q, Q), dict(alibi_slopes=[1, 2])),
    "0 tokens for rank 0 of 1": ("llama3_flash_attn_prepare_cu_seqlens", (torch.tensor([0, 0]), True, 0, 1), {}),
    "heads_k_stride is 3; a divisor of the 2": (
        "llama3_flash_attn_varlen_func",
        (ROW, ROW, ROW, None, None, 6, 6, 3, slice(0, 6)),
        {},
    ),
    "local_k_slice is slice.0, 6, None.; the slice that llama3": (
        "llama3_flash_attn_varlen_func",
        (ROW, ROW, ROW, None, None, 6, 6, 1, slice(0, 6)),
        {},
    ),
    "12 tokens for rank 5 of 5": ("llama3_flash_attn_prepare_cu_seqlens", (torch.tensor([0, 12]), True, 5, 5), {}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(sentence: str) -> None:
    """The message names the argument, what came, and what is accepted."""
    name, given, options = REFUSED[sentence]
    with pytest.raises(ValueError, match=sentence):
        functions()[name](*given, **options)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(rank=1, world_size=2), "prepared for rank 1 of 2; this is rank 0 of 1"),
        (dict(causal=False), "causal is True, and local_k_slice was prepared for causal=False"),
        (dict(cu_seqlens=[0, 8]), "q has 6 tokens; the row that was prepared has 8"),
        (dict(others=[0, 6]), "cu_seqlens_q has 1 documents; local_k_slice was prepared for 2"),
        (dict(most=1), "max_seqlen_q is 1, and the longest document has 4"),
    ],
)
def test_what_was_prepared_for_another_call_is_refused(change: dict[str, Any], sentence: str) -> None:
    """Offsets of another rank, batch or mask would be silently wrong in the original."""
    made = dict(cu_seqlens=[0, 2, 6], causal=True, rank=0, world_size=1) | {
        name: x for name, x in change.items() if name not in ("others", "most")
    }
    cu_seqlens = torch.tensor(made.pop("cu_seqlens"))
    q, k, max_q, max_k, mine = ring_flash_attn.llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, **made)
    q, max_q = torch.tensor(change.get("others", q.tolist())), change.get("most", max_q)
    with pytest.raises(ValueError, match=sentence):
        ring_flash_attn.llama3_flash_attn_varlen_func(ROW, ROW, ROW, q, k, max_q, max_k, 1, mine, causal=True)
