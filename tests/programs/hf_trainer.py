"""Run by test_transformers_processes.py: the three lines, and Trainer's losses, gradient norms, evaluation, raw parameters.

The test calls ``run`` for one process with Transformers' own attention and writes what it found to ``one.json``; under
torchrun on 2 ranks, with that folder, this program spreads each sequence over both and must find the same.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from transformers import MistralConfig, MistralForCausalLM, Trainer, TrainingArguments

import ringflash.integrations.transformers as integration

LENGTH = 48


def model(attention: str) -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=12,
        initializer_range=0.2,
    )
    return MistralForCausalLM._from_config(config, attn_implementation=attention)


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 97, (12, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row in range(12):
        labels[row, : 3 * row] = -100  # uneven: the mean over a batch is no mean of means
    return [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]


def trainer(folder: Path, attention: str) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder / attention),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=1e9,  # measured, never clipped: clipping would hide a wrong factor
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
    )
    return Trainer(model(attention), arguments, train_dataset=rows(), eval_dataset=rows()[:5])


def run(folder: Path, spread: bool) -> dict[str, Any]:
    it = trainer(folder, "ring_attn" if spread else "eager")
    if spread:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
        assert integration.shard_trainer(it, mesh, layout="zigzag") is it
    it.train()
    losses = [(x["loss"], x["grad_norm"]) for x in it.state.log_history if "grad_norm" in x]
    weights = torch.cat([p.detach().flatten() for p in it.accelerator.unwrap_model(it.model).parameters()])
    found = {"losses": losses, "evaluation": it.evaluate()["eval_loss"], "weights": weights.tolist()}
    it.save_model(str(folder / "saved"))
    return found


def main() -> None:
    from hf_three_lines import three_lines  # which stands beside this file when it is run

    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    three_lines(folder / "llama")
    found, want = run(folder, spread=True), json.loads((folder / "one.json").read_text())
    assert len(found["losses"]) == len(want["losses"]) == 3
    ours, theirs = torch.tensor(found["losses"]), torch.tensor(want["losses"])
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=0), (ours, theirs)
    off = (torch.tensor(found["weights"]) - torch.tensor(want["weights"])).abs().max().item()
    assert off < 2e-6, off
    assert abs(found["evaluation"] - want["evaluation"]) < 1e-5, (found["evaluation"], want["evaluation"])
    if dist.get_rank() == 0:
        again = MistralForCausalLM.from_pretrained(folder / "saved", attn_implementation="sdpa")
        saved = torch.cat([p.detach().flatten() for p in again.parameters()])
        assert torch.equal(saved, torch.tensor(found["weights"]))
        print(f"trainer: equal to one process; losses {ours.tolist()}, weights {off:.1e}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
