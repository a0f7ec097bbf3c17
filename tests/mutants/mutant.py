"""A planted bug, as data."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

REPORT = "RINGFLASH_MUTANT_REPORT"
"""The environment variable that names the file in which ``judge`` writes how tests failed."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """The library with one bug in it: in ``file``, which holds ``old`` exactly once, stands ``new``.

    ``breaks`` says in a sentence what goes wrong. ``caught_by`` are the tests that must notice, as few as possible: a failed
    assertion counts, and an error of a kind in ``raises``, and nothing else. A run of more than ``seconds`` counts as caught
    only where the bug is that something ``hangs``.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    caught_by: tuple[str, ...]
    raises: tuple[str, ...] = ()
    seconds: int = 180
    hangs: bool = False

    def apply(self, source: str) -> str:
        """``source`` with the bug in it; ``ValueError`` unless the text is there exactly once, and the result another one."""
        found = source.count(self.old)
        if found != 1:
            raise ValueError(
                f"mutant {self.name}: {self.file} holds its text {found} times, and once is needed. The code has moved on: "
                f"plant the same bug where it would be now\n{self.old}"
            )
        if self.old == self.new:
            raise ValueError(f"mutant {self.name}: old and new are the same text, so nothing is planted")
        return source.replace(self.old, self.new)

    def diff(self, root: Path) -> str:
        """What was planted, as a patch."""
        source = (root / self.file).read_text()
        before, after = (text.splitlines(keepends=True) for text in (source, self.apply(source)))
        return "".join(difflib.unified_diff(before, after, f"a/{self.file}", f"b/{self.file}", n=1))

    @property
    def interpreted(self) -> bool:
        """Do its tests run the kernels in Triton's interpreter, and so in a process of that kind?"""
        return all(Path(test.partition("::")[0]).name.startswith("test_interpreted") for test in self.caught_by)
