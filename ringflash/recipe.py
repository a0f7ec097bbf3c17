"""What an operator has to do, found through a number.

An operator of ``torch.library`` takes tensors and plain numbers, not shardings. So a sharding carries a *handle*, a 0-dim
int64 tensor on the CPU, and the operator looks it up here when it runs. A tensor and not a number: captured graphs
recompile when a number changes, and packed documents change with every batch.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ringflash.accord import Accord
from ringflash.check import Check
from ringflash.errors import RingflashError
from ringflash.plan import Plan
from ringflash.terms import Terms
from ringflash.ulysses import Swap
from ringflash.wire import Wire


class Watched(NamedTuple):
    """Ranks that check each other: their accord, what they check, and the terms that they must have in common."""

    accord: Accord
    check: Check
    terms: Terms


class Bound(NamedTuple):
    """What an operator needs to run: the plan of the ring, its wire, and what is around it, if anything is."""

    plan: Plan
    wire: Wire
    swap: Swap | None = None
    watched: Watched | None = None


class Recipe(Protocol):
    """Anything that knows its plan and wires: a sharding, or a mask on one device."""

    @property
    def over(self) -> bool:
        """Nobody can use it any more: its group was destroyed."""

    def bind(self, queries: int, keys: int) -> Bound:
        """For so many local queries and keys."""


class Recipes:
    """Handle to recipe. A recipe is found as long as anybody holds it, and longer while it is among the last used.

    By the time of backward the loop may have let go of the sharding that its forward used. Eager autograd holds it
    with the rest of what it saves; captured graphs can save tensors only, and rely on the second part.
    """

    def __init__(self, most: int) -> None:
        self._most, self._lock, self._numbers = most, threading.Lock(), itertools.count()
        self._alive: weakref.WeakValueDictionary[int, Recipe] = weakref.WeakValueDictionary()
        self._used: OrderedDict[int, Recipe] = OrderedDict()

    def add(self, recipe: Recipe) -> Tensor:
        """A new handle for ``recipe``."""
        number = next(self._numbers)
        self._alive[number] = recipe
        with self._lock:
            for old in [old for old, used in self._used.items() if used.over]:  # or its group would keep its sockets
                del self._used[old]
        return torch.from_dlpack(np.array(number))  # real and on the CPU, even if torch is told to make fake ones

    def __getitem__(self, handle: Tensor) -> Recipe:
        number = int(handle)
        recipe = self._alive.get(number)
        if recipe is None:
            raise RingflashError(
                f"handle {number} belongs to no sharding that is alive in this process, or among the last {self._most} "
                "used: run the backward of a captured graph sooner, and build shardings where they are used"
            )
        with self._lock:
            self._used[number] = recipe
            self._used.move_to_end(number)
            if len(self._used) > self._most:
                self._used.popitem(last=False)
        return recipe


recipes = Recipes(most=64)
