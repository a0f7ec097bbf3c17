"""Ranks of an in-process world that take one command after another, and keep what earlier ones left.

A command is a function of the rank's group and of a dictionary of its own. All ranks run it, and their outcomes come back
in the order of the ranks. Whatever it raised is an outcome: only a world that has died ends early.

    driver   ask(command) ----------------------> outcomes        ask(next) ---> ...
    rank 0        command(group, memory) ── meet                      command(group, memory) ── meet
    rank 1                                        command(...) ── meet
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch

import ringflash as rf

Command = Callable[[Any, dict[str, Any]], Any]
PATIENCE = 60.0
"""Seconds after which a command that has not ended hangs."""


class Outcome(NamedTuple):
    """What a command did on one rank: it returned, or it raised."""

    value: Any = None
    error: BaseException | None = None


class World:
    """``ranks`` ranks, alive until :meth:`end`."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._commands: list[SimpleQueue[Command | None]] = [SimpleQueue() for _ in range(ranks)]
        self._outcomes: list[SimpleQueue[Outcome]] = [SimpleQueue() for _ in range(ranks)]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ask(self, command: Command) -> list[Outcome]:
        """Run ``command`` on every rank. Raises ``TimeoutError`` if a rank does not come to its end."""
        for queue in self._commands:
            queue.put(command)
        outcomes = []
        for rank, queue in enumerate(self._outcomes):
            try:
                outcomes.append(queue.get(timeout=PATIENCE))
            except Empty:
                raise TimeoutError(f"rank {rank} of {self.ranks} hangs in {command}") from None
        return outcomes

    def end(self) -> None:
        """Let all ranks return."""
        for queue in self._commands:
            queue.put(None)
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        with suppress(rf.RingflashError):  # of ranks that meet no more: the outcome of a command has said why
            rf.local_world(self.ranks).run(self._live)

    def _live(self, group: Any) -> None:
        memory: dict[str, Any] = {}
        meeting = rf.Sharding(self.ranks, group, rf.full, "contiguous", "ring")
        commands, outcomes = self._commands[group.rank], self._outcomes[group.rank]
        while (command := commands.get()) is not None:
            try:
                outcome = Outcome(command(group, memory))
            except Exception as error:
                outcome = Outcome(error=error)
            outcomes.put(outcome)
            del command, outcome
            meeting.unshard(torch.zeros(1), dim=0)  # nobody waits for a command while others have not ended this one
