"""Does the error grow with the number of ranks? bfloat16 rings of 1 to 64 ranks against float64 on the same inputs.

    python benchmarks/numerics.py

Prints the relative RMS error of out, dq, dk and dv for each world size and its ratio to one rank, asserts that no ratio
exceeds 1.02, and writes results/numerics.jsonl. Libraries that round partials, or travelling gradients, to bfloat16 grow
like the square root of the number of ranks.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from record import write
from torch import Tensor

import ringflash as rf

NAMES = ("out", "dq", "dk", "dv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--layout", default="zigzag")
    options = parser.parse_args()
    make = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, options.length, 2, 64, generator=make).bfloat16() for _ in range(4))
    exact = ring(1, options.layout, *(x.double() for x in (q, k, v, dout)))
    records: list[dict[str, Any]] = []
    print(f"relative RMS error x 1e-3 against float64: {options.length} tokens, causal, bfloat16, {options.layout}")
    print(f"{'ranks':>6}  " + "".join(f"{name:>8}{'ratio':>9}" for name in NAMES))
    for ranks in options.worlds:
        got = ring(ranks, options.layout, q, k, v, dout)
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
        first = records[0]["error"].values() if records else errors
        ratios = [error / one for error, one in zip(errors, first, strict=True)]
        records.append(
            {
                "benchmark": "numerics",
                "ranks": ranks,
                "length": options.length,
                "layout": options.layout,
                "error": dict(zip(NAMES, errors, strict=True)),
                "ratio": dict(zip(NAMES, ratios, strict=True)),
            }
        )
        print(f"{ranks:>6}  " + "".join(f"{1e3 * e:>8.4f}{r:>9.4f}" for e, r in zip(errors, ratios, strict=True)))
        assert all(math.isfinite(r) and r <= 1.02 for r in ratios), "the error grows with the number of ranks"
    path = write("numerics", records)
    print(json.dumps({"worst_ratio": max(max(r["ratio"].values()) for r in records), "written": path.name}))


def ring(ranks: int, layout: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """Out, dq, dk, dv of the whole sequence, from so many ranks in this process."""

    def one_rank(group: object) -> list[Tensor]:
        s = rf.Sharding(q.shape[1], group, layout=layout)
        shards = [s.shard(x, dim=1).requires_grad_() for x in (q, k, v)]
        out = rf.ring_attention(*shards, s)
        grads = torch.autograd.grad(out, shards, s.shard(dout, dim=1))
        return [s.unshard(x.detach(), dim=1) for x in (out, *grads)]

    result: list[Tensor] = rf.local_world(ranks).run(one_rank)[0]
    return result


if __name__ == "__main__":
    main()
