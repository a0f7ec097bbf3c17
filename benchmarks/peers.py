"""Who is measured: ringflash, and everything in PyTorch that computes the same attention.

A version is a function of q ``[b, s, h, d]``, k and v ``[b, s, h_kv, d]`` (views of other layouts are free) that
autograd can differentiate. A peer that cannot serve a problem says so: that is recorded beside the figures of the others.

    flash        FlashAttention 2 inside PyTorch: plain masks by SDPA, windows and documents by its operator
    cudnn        SDPA's cuDNN backend: full and causal
    efficient    SDPA's memory-efficient backend: full and causal, one key head per query head
    flex         FlexAttention, compiled for each shape: any mask, as blocks of 128
    math         SDPA's plain formulas, with the mask as a matrix: on a CPU only
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ringflash as rf

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unfit(Exception):
    """A peer has nothing for this problem; the message says what it lacks."""


@dataclass(frozen=True)
class Problem:
    """One attention: shapes, dtype, and who sees whom. ``mask`` is the name of ``value``.

    ``queries``, if they are not ``length`` like the keys, are the last positions: decoding.
    """

    head_dim: int
    mask: str
    value: rf.Mask
    length: int
    batch: int
    heads: int
    kv_heads: int
    dtype: torch.dtype = torch.bfloat16
    queries: int | None = None

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def q_offset(self) -> int:
        """The position of the first query."""
        return 0 if self.queries is None else self.length - self.queries

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The keys ``[lo, hi)`` that each query sees; batch rows share them."""
        lo, hi = self.value.bounds(np.arange(self.q_offset, self.length))
        return lo, np.minimum(hi, self.length)

    @cached_property
    def cells(self) -> int:
        """Pairs of a query and a key that it sees, over all batch rows and query heads."""
        lo, hi = self.bounds
        return int((hi - lo).sum()) * self.batch * self.heads

    def flops(self, direction: str) -> float:
        """What has to be computed: two products forward, five backward, visible cells only."""
        return 4.0 * self.cells * self.head_dim * {"forward": 1.0, "backward": 2.5}[direction]

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random q, k, v, dout. Zeros, or small numbers, would run cooler and faster than any model."""
        make = torch.Generator(device).manual_seed(seed)

        def normal(tokens: int, heads: int) -> Tensor:
            shape = (self.batch, tokens, heads, self.head_dim)
            return torch.randn(shape, generator=make, device=device, dtype=self.dtype)

        keys, queries = (self.length, self.kv_heads), (self.length - self.q_offset, self.heads)
        return normal(*queries), normal(*keys), normal(*keys), normal(*queries)

    def describe(self) -> dict[str, object]:
        """What a record says of it."""
        named = ("head_dim", "mask", "length", "batch", "heads", "kv_heads")
        return {name: getattr(self, name) for name in named} | {"dtype": str(self.dtype).removeprefix("torch.")}


def ringflash(problem: Problem, backend: str, deterministic: bool = False) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rf.flash_attention(
            q,
            k,
            v,
            problem.value,
            problem.scale,
            q_offset=problem.q_offset,
            backend=backend,
            deterministic=deterministic,
        )

    return attend


def flash(problem: Problem, device: torch.device) -> Attention:
    if problem.mask in ("full", "causal"):
        return partial(_sdpa, problem, SDPBackend.FLASH_ATTENTION)
    if device.type != "cuda":
        raise Unfit("windows and documents are of the CUDA operator only")
    operator = torch.ops.aten._flash_attention_forward
    if problem.mask == "documents":
        if problem.batch != 1:
            raise Unfit("documents in one packed row only")
        offsets = torch.tensor(problem.value.documents[0], dtype=torch.int32, device=device)
        longest = int(offsets.diff().max())

        def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x[0] for x in (q, k, v))
            sizes = (offsets, offsets, longest, longest)
            return operator(q, k, v, *sizes, 0.0, True, False, scale=problem.scale)[0][None]

        return packed

    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = (None, None, problem.length, problem.length)
        window = dict(window_size_left=problem.value.left, window_size_right=problem.value.right)
        return operator(q, k, v, *sizes, 0.0, False, False, scale=problem.scale, **window)[0]

    return windowed


def cudnn(problem: Problem, device: torch.device) -> Attention:
    return _plain(problem, device, SDPBackend.CUDNN_ATTENTION)


def efficient(problem: Problem, device: torch.device) -> Attention:
    return _plain(problem, device, SDPBackend.EFFICIENT_ATTENTION)


def math(problem: Problem, device: torch.device) -> Attention:
    if device.type != "cpu":
        raise Unfit("holds the whole matrix of scores; compared on a CPU only")
    return partial(_sdpa, problem, SDPBackend.MATH)


def flex(problem: Problem, device: torch.device) -> Attention:
    import torch._dynamo
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device.type != "cuda":
        raise Unfit("takes minutes to compile on a CPU")
    if problem.mask == "full" or (problem.mask == "causal" and problem.length != 16384):
        raise Unfit("compiles for every shape: of the masks that all peers have, only causal at 16K is asked of it")
    torch._dynamo.reset()  # every shape is compiled for itself, and only so many are kept
    torch._functorch.config.donated_buffer = False  # the graph is walked backward more than once
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    mod = _flex_mask(problem, device)
    length, grouped = problem.length, problem.heads != problem.kv_heads
    blocks = None if mod is None else create_block_mask(mod, None, None, length, length, device=str(device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = compiled(q, k, v, block_mask=blocks, scale=problem.scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    return attend


PEERS: dict[str, Callable[[Problem, torch.device], Attention]] = {
    "flash": flash,
    "cudnn": cudnn,
    "efficient": efficient,
    "flex": flex,
    "math": math,
}


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """SDPA says why a backend will not run in warnings, and raises a sentence without reasons: put them together."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            reasons = (str(w.message).partition(" (Triggered")[0] for w in caught)
            telling = [r for r in reasons if "not used because" not in r and "runtime disabled" not in r]
            raise Unfit("; ".join(telling) or "no kernel, no reason given") from None


def _flex_mask(problem: Problem, device: torch.device) -> Callable[..., Tensor] | None:
    left = problem.value.left
    if problem.mask == "causal":
        return lambda b, h, q, k: q >= k
    if problem.mask == "window":
        return lambda b, h, q, k: (q >= k) & (q - k <= left)
    if problem.mask == "documents":
        starts = torch.tensor(problem.value.documents[0][1:-1], device=device)
        document = torch.searchsorted(starts, torch.arange(problem.length, device=device), right=True)
        return lambda b, h, q, k: (q >= k) & (document[q] == document[k])
    return None


def _plain(problem: Problem, device: torch.device, backend: SDPBackend) -> Attention:
    if problem.mask not in ("full", "causal"):
        raise Unfit(f"has no {problem.mask} but as a matrix of the whole sequence")
    if device.type != "cuda":
        raise Unfit("runs on CUDA only")
    return partial(_sdpa, problem, backend)


def _sdpa(problem: Problem, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    matrix = None
    if problem.mask not in ("full", "causal"):
        lo, hi = (torch.from_numpy(bound).to(q.device)[:, None] for bound in problem.bounds)
        key = torch.arange(problem.length, device=q.device)
        matrix = (key >= lo) & (key < hi)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal, grouped = problem.mask == "causal", problem.heads != problem.kv_heads
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, matrix, is_causal=causal, scale=problem.scale, enable_gqa=grouped)
    return out.transpose(1, 2)
