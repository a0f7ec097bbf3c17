"""Run by test_security.py under torchrun: what a step does that an intruder could use, as Python's audit events tell it.

From the moment the process group is there: handshake, hops, a model's loss and gradients, DDP, and a loader.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from model_gradients import Model, batch
from torch.nn.parallel import DistributedDataParallel

import ringflash as rf

WATCHED = (
    "pickle.find_class",
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.spawn",
    "os.posix_spawn",
    "urllib.",
    "http.",
)


@contextmanager
def watching() -> Iterator[list[str]]:
    """Names of the watched events of this process while it lasts."""
    seen: list[str] = []
    on = [True]

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if on and event.startswith(WATCHED) and event != "socket.gethostname":
            seen.append(f"{event} {arguments}")

    def pickled(*_: object) -> None:
        seen.append("an object became a tensor, or the other way round")

    sys.addaudithook(note)
    c10d = dist.distributed_c10d
    c10d._object_to_tensor = c10d._tensor_to_object = pickled
    yield seen
    on.clear()


def step() -> None:
    ids, labels = batch()
    for check in ("first", "verify"):
        s = rf.Sharding(37, None, rf.causal, check=check)
        q = torch.randn(1, s.local_length, 2, 8, requires_grad=True)
        rf.ring_attention(q, q, q, s).sum().backward()
    rf.SequenceParallel(Model(), None)(input_ids=ids, labels=labels).loss.backward()
    wrapped = rf.SequenceParallel(Model(), None, gradients="engine")
    DistributedDataParallel(wrapped)(input_ids=ids, labels=labels).loss.backward()
    list(rf.data.PackedLoader([[1, 2, 3, 4]] * 8, 8, pad_token=0))


def main() -> None:
    dist.init_process_group("gloo")
    with watching() as seen:
        step()
    print(f"rank {dist.get_rank()} saw {seen}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
