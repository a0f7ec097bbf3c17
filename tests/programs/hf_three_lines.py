"""The README's three lines, under torchrun, with the folder of a model: ``hf_three_lines.py <folder>``.

Loss and raw gradients must be those of one process with Transformers' own attention. hf_trainer.py runs it too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ringflash as rf
import ringflash.integrations.transformers  # registers "ring_attn"

IDS = torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(1))
LABELS = IDS.clone()
LABELS[0, :31] = -100


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def agree(some: list[Tensor], others: list[Tensor]) -> None:
    assert len(some) == len(others) > 10
    for a, b in zip(some, others, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), (a - b).abs().max()


def three_lines(path: Path) -> None:
    alone = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa")
    want = alone(input_ids=IDS, labels=LABELS, use_cache=False).loss
    want.backward()

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="ring_attn")
    model = rf.SequenceParallel(model, dist.group.WORLD)
    loss = model(input_ids=IDS, labels=LABELS).loss
    loss.backward()

    assert abs(loss.item() - want.item()) < 1e-5, (loss, want)
    agree(gradients(model), gradients(alone))
    print("three lines: equal to one process\n", end="", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    three_lines(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
