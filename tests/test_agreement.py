"""What one rank alone has wrong is an error on all of them, before anything of it is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ringflash as rf


class Model(nn.Module):
    """Embedding, one attention, head."""

    def __init__(self, dim: int = 8, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.attention = rf.RingAttention(dim, 2)
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(self.embed(input_ids)))


def caught(fn: Callable[[Any], object], ranks: int = 3) -> list[str]:
    """What each rank raises."""

    def one_rank(group: Any) -> str:
        torch.manual_seed(0)
        try:
            fn(group)
        except (rf.RingflashError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    return rf.local_world(ranks).run(one_rank)


@pytest.mark.parametrize("loss_tile", [None, 4])
def test_a_label_outside_the_vocabulary_of_one_rank_raises_on_all(loss_tile: int | None) -> None:
    """Cross entropy would raise on that rank alone, and leave the others waiting for its part of the mean."""

    def step(group: Any) -> None:
        model = rf.SequenceParallel(Model(), group, loss_tile=loss_tile, head="head" if loss_tile else None)
        ids = torch.arange(12)[None] % 11
        labels = ids.clone()
        labels[0, 7] = 11
        model(input_ids=ids, shift_labels=labels)

    assert (
        caught(step)
        == [
            "ValueError: SequenceParallel: 1 labels of all ranks are outside the vocabulary of the logits; -100 is no target"
        ]
        * 3
    )


def test_models_that_differ_between_ranks_are_named_before_gradients_are_summed() -> None:
    """A sum of gradients of other shapes ends a process in the middle of gloo, without a word of which rank."""

    def step(group: Any) -> None:
        model = Model()
        if group.rank == 1:
            model.head.bias.requires_grad_(False)
        rf.SequenceParallel(model, group)(input_ids=torch.zeros(1, 12, dtype=torch.long))

    for said in caught(step):
        assert said.startswith("DisagreementError")
        assert "parameters that learn: 7, of 443 numbers on ranks 0, 2 and 6, of 432 numbers on rank 1" in said


def test_parts_that_do_not_fit_are_not_unsharded() -> None:
    """Gathering parts of other dtypes gives noise, or ends a process."""

    def gather(group: Any) -> None:
        s = rf.Sharding(9, group)
        s.unshard(torch.zeros(2, s.local_length, dtype=torch.float64 if group.rank == 2 else torch.float32), dim=1)

    for said in caught(gather):
        assert "unshard" in said and "dtype: torch.float32 on ranks 0, 1 and torch.float64 on rank 2" in said


def test_after_a_disagreement_the_next_call_is_right() -> None:
    """All ranks have counted the call that was not made, so a loop that catches the error can go on."""

    def twice(group: Any) -> torch.Tensor:
        s = rf.Sharding(9, group)
        x = torch.ones(1, s.local_length, 1, 8)
        with pytest.raises(rf.DisagreementError, match=r"scale: 1\.0 on ranks 0, 2 and 2\.0 on rank 1"):
            rf.ring_attention(x, x, x, s, scale=1.0 + (group.rank == 1))
        return rf.ring_attention(x, x, x, s, scale=1.0)

    for out in rf.local_world(3).run(twice):
        assert torch.equal(out, torch.ones_like(out))
