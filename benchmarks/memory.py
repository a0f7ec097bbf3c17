"""What do tiles and checkpoints save? Peak memory of one training step, and hops made, each variant in a process of its own.

    python benchmarks/memory.py                       32K tokens, minutes; on a GPU if there is one
    python benchmarks/memory.py --tokens 65536 --parts loss --vocabulary 16384

    loss        cross entropy of a projection to a vocabulary       all logits at once, or a tile at a time
    mlp         a gated MLP                                         whole, or a tile at a time
    checkpoint  a model of a few layers, two ranks in one process   no checkpoints, everything recomputed, attention kept

Peak is what a step adds to what the process held before it: inputs, parameters and gradients-to-be are there already
where they can be. On a CPU it is the high-water mark of resident memory, on a GPU that of torch's allocator; for two ranks it
is their sum. Losses and gradients must agree, or nothing is written. Ends with one line of JSON; writes results/memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, Journal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

import ringflash as rf
from ringflash.checkpointing import keep_attention, keep_attention_on_cpu
from ringflash.local import LocalWire
from ringflash.tiling import Tiled, tiled_cross_entropy

VARIANTS = {
    "loss": ("whole", "tiled"),
    "mlp": ("whole", "tiled"),
    "checkpoint": ("none", "everything", "keep_attention", "keep_attention_on_cpu"),
}
ALLOWED = {"loss": 1e-4, "mlp": 1e-4, "checkpoint": 0.0}  # tiles round otherwise than the whole; checkpoints must not

CPU = dict(dim=256, wide=2048, vocabulary=8192, layers=4, heads=2, kv_heads=1, head_dim=32, dtype="float32")
GPU = dict(dim=4096, wide=14336, vocabulary=128256, layers=4, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")
TINY = dict(dim=16, wide=32, vocabulary=64, layers=2, heads=2, kv_heads=1, head_dim=8, dtype="float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--tile", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--parts", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a few tokens, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.jsonl")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the task of a child
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(measured(**json.loads(options.only))))
        return
    sizes = TINY if options.tiny else GPU if options.device == "cuda" else CPU
    sizes = sizes | ({"vocabulary": options.vocabulary} if options.vocabulary else {})
    tokens, tile = (64, 8) if options.tiny else (options.tokens, options.tile)
    journal = Journal(options.out)
    for part in options.parts:
        found = []
        for variant in VARIANTS[part]:
            task = dict(part=part, variant=variant, tokens=tokens, tile=tile, device=options.device, sizes=sizes)
            found.append(in_a_process(task))
            agree(part, found[0], found[-1])
            journal.add(task | {"benchmark": "memory"} | {k: v for k, v in found[-1].items() if k != "sums"})
            show(journal.records[-1], found[0])
    print(json.dumps({"written": options.out.name, "records": len(journal.records)}), flush=True)


def in_a_process(task: dict[str, Any]) -> dict[str, Any]:
    """What ``measured`` returns in a fresh process, whose high-water mark is nobody else's."""
    run = subprocess.run(
        [sys.executable, __file__, "--only", json.dumps(task)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def measured(part: str, variant: str, tokens: int, tile: int, device: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes and, in a ring, messages of one step; and sums that tell whether two steps were the same."""
    make = {"loss": loss_step, "mlp": mlp_step, "checkpoint": ring_step}[part]
    make(variant, 16, 8, device, TINY | {"dtype": sizes["dtype"]})()  # what is imported and set up on first use
    torch.manual_seed(0)
    step = make(variant, tokens, tile, device, sizes)
    start = marked(device)
    result = step()
    return {"peak_bytes": high_water(device) - start, **result}


Step = Callable[[], dict[str, Any]]


def loss_step(variant: str, tokens: int, tile: int, device: str, sizes: dict[str, Any]) -> Step:
    make = dict(device=device, dtype=getattr(torch, sizes["dtype"]))
    head = nn.Linear(sizes["dim"], sizes["vocabulary"], bias=False, **make)
    hidden = torch.randn(1, tokens, sizes["dim"], **make).requires_grad_()
    labels = torch.randint(0, sizes["vocabulary"], (1, tokens), device=device)

    def step() -> dict[str, Any]:
        loss = tiled_cross_entropy(head, hidden, labels, tokens if variant == "whole" else tile, "mean")
        loss.backward()
        return {"sums": sums(loss, hidden.grad, head.weight.grad)}

    return step


class MLP(nn.Module):
    def __init__(self, dim: int, wide: int, **make: Any) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(dim, wide, bias=False, **make) for _ in range(2))
        self.down = nn.Linear(wide, dim, bias=False, **make)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


def mlp_step(variant: str, tokens: int, tile: int, device: str, sizes: dict[str, Any]) -> Step:
    make = dict(device=device, dtype=getattr(torch, sizes["dtype"]))
    mlp: nn.Module = MLP(sizes["dim"], sizes["wide"], **make)
    mlp = mlp if variant == "whole" else Tiled(mlp, tile)
    x, weights = (torch.randn(1, tokens, sizes["dim"], **make) for _ in range(2))
    x.requires_grad_()

    def step() -> dict[str, Any]:
        out = mlp(x)
        out.backward(weights)
        return {"sums": sums(out, x.grad, *(p.grad for p in mlp.parameters()))}

    return step


class Block(nn.Module):
    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(sizes["dim"]) for _ in range(2))
        self.attention = rf.RingAttention(sizes["dim"], sizes["heads"], sizes["kv_heads"], sizes["head_dim"])
        self.mlp = MLP(sizes["dim"], 2 * sizes["dim"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


def ring_step(variant: str, tokens: int, tile: int, device: str, sizes: dict[str, Any]) -> Step:
    contexts = {
        "everything": noop_context_fn,
        "keep_attention": keep_attention,
        "keep_attention_on_cpu": keep_attention_on_cpu,
    }
    make = dict(device=device, dtype=getattr(torch, sizes["dtype"]))
    posted = counted()

    def one_rank(group: Any) -> list[float]:
        torch.manual_seed(0)
        model = nn.ModuleList(Block(sizes) for _ in range(sizes["layers"])).to(**make)
        s = rf.Sharding(tokens, group, layout="zigzag")
        for block in model:
            block.attention.sharding = s
        x = first = torch.randn(1, s.local_length, sizes["dim"], **make).requires_grad_()
        weights = torch.linspace(-1, 1, x.numel(), **make).view_as(x)
        for block in model:
            if variant == "none":
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts[variant])
        x.backward(weights)
        return sums(x, first.grad, *(p.grad for p in model.parameters()))

    def step() -> dict[str, Any]:
        both = rf.local_world(ranks=2).run(one_rank)
        return {"sums": [*both[0], *both[1]], "messages": len(posted)}

    return step


def counted() -> list[int]:
    """Grows by one per message that a rank of this process posts from now on."""
    posted: list[int] = []
    exchange = LocalWire.exchange

    def counting(self: LocalWire, sends: Any, receives: Any, channel: int = 0) -> Any:
        posted.extend(1 for _ in sends)
        return exchange(self, sends, receives, channel)

    LocalWire.exchange = counting  # type: ignore[method-assign]
    return posted


def sums(*tensors: Tensor | None) -> list[float]:
    """Of the size of what is there, so that relative differences mean something."""
    return [x.detach().double().square().sum().item() for x in tensors if x is not None]


def agree(part: str, first: dict[str, Any], other: dict[str, Any]) -> None:
    for a, b in zip(first["sums"], other["sums"], strict=True):
        assert abs(a - b) <= ALLOWED[part] * abs(a), f"{part}: {b} is not {a}; nothing is compared that differs"


def marked(device: str) -> int:
    """Begin a new high-water mark; the bytes that are held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    return high_water(device)


def high_water(device: str) -> int:
    """The most bytes that were held since the mark."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the process's life; in bytes on macOS


def show(record: dict[str, Any], first: dict[str, Any]) -> None:
    ratio = record["peak_bytes"] / max(1, first["peak_bytes"])
    messages = f"  {record['messages']:>4} messages" if "messages" in record else ""
    print(
        f"{record['part']:<11}{record['variant']:<24}{record['tokens']:>7} tokens {record['peak_bytes'] / 2**20:>9.0f} MiB "
        f"{ratio:>6.2f}{messages}",
        flush=True,
    )


if __name__ == "__main__":
    main()
