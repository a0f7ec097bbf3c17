"""What a run tells the person who waits for it: a bar or plain lines, and files that plot themselves later.

    on a terminal     one bar that moves, with the figures of the last step
    elsewhere         one line per N steps: a log file stays a log file
    always            metrics.jsonl and metrics.csv in the folder of the run, one record per step and per validation

Only rank 0 makes a ``Progress``: nothing here communicates.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

COLUMNS = (
    "step",
    "split",
    "loss",
    "bits_per_byte",
    "accuracy",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "peak_bytes",
)
Record = Mapping[str, Any]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; none if it has not begun. A last line that was cut short is left out."""
    file = folder / "metrics.jsonl"
    records = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Progress:
    """Write the records of a run and show them as they come.

    ``first_step`` is the number of steps already done, ``batches`` that of batches, if some were left out: later records,
    left by a run that was killed after its last checkpoint, are dropped from the files, so that no step is in them twice.
    """

    def __init__(
        self, folder: Path, first_step: int, steps: int, log_every: int, tensorboard: bool, batches: int | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done = first_step if batches is None else batches
        kept = list(
            takewhile(lambda r: r["batch"] <= done if "batch" in r else r["step"] <= first_step, read_metrics(folder))
        )
        self._jsonl = _Lines(folder / "metrics.jsonl", len(kept))
        self._csv = _Lines(folder / "metrics.csv")
        self._csv.add(_csv_line(dict(zip(COLUMNS, COLUMNS, strict=True))))
        self._board = _tensorboard(folder) if tensorboard else None
        self._steps, self._log_every = steps, log_every
        self._speeds: list[float] = []
        self._bar = _bar(first_step, steps)
        for record in kept:
            self._show(record)

    def trained(self, record: Record) -> None:
        """One optimizer step is done."""
        self._store(record)
        self._speeds.append(record["tokens_per_second"])
        if self._bar is not None:
            self._bar.set_postfix_str(_figures(record, record["tokens_per_second"]), refresh=False)
            self._bar.update()
        elif record["step"] % self._log_every == 0 or record["step"] in (1, self._steps):
            speed = len(self._speeds) / sum(1 / speed for speed in self._speeds)
            self._speeds.clear()
            print(f"step {record['step']:>5}/{self._steps}  {_figures(record, speed)}", flush=True)

    def skipped(self, record: Record) -> None:
        """A batch was left out: its loss or gradient was not finite (as text in the files, for JSON has no such numbers)."""
        self._store({k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()})

    def validated(self, record: Record) -> None:
        """The model was measured on validation samples."""
        self._store(record)
        self.say(f"step {record['step']:>5}/{self._steps}  validation {describe(record)}")

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> bool:
        """Close everything; returns False if records could not be written."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        return all([self._jsonl.close(), self._csv.close()])

    def _store(self, record: Record) -> None:
        self._jsonl.add(json.dumps(record) + "\n")
        self._show(record)

    def _show(self, record: Record) -> None:
        """Add to what is made from ``metrics.jsonl``."""
        self._csv.add(_csv_line(record))
        if self._board is not None:
            for name, value in record.items():
                if name not in ("step", "split") and not isinstance(value, str):
                    self._board.add_scalar(f"{record['split']}/{name}", value, record["step"])


class _Lines:
    """A file of lines, each whole. What a full disk does not take is kept, said once, and tried again with the next line.

    The first ``kept`` lines of a file that is there stay where they are: at no moment are they only in memory.
    """

    def __init__(self, path: Path, kept: int = 0) -> None:
        before = b"".join(path.read_bytes().splitlines(keepends=True)[:kept]) if kept else b""
        self._path, self._waiting, self._length = path, "", len(before)
        self._file = path.open("r+b" if kept else "wb", buffering=0)
        self._file.truncate(self._length)
        if before and not before.endswith(b"\n"):
            self.add("\n")

    def add(self, line: str) -> None:
        """Write a line, and those that wait before it."""
        said, self._waiting = bool(self._waiting), self._waiting + line
        content = self._waiting.encode()
        try:
            self._file.seek(self._length)
            written = self._file.write(content)
            if written < len(content):
                self._file.write(content[written:])  # raises what is wrong
        except OSError as error:
            if not said:
                print(f"WARNING: {self._path} cannot be written ({error}): its lines wait", file=sys.stderr, flush=True)
            return
        self._waiting, self._length = "", self._length + len(content)

    def close(self) -> bool:
        """Try again what waits; returns False, and says so, if it is lost."""
        if self._waiting:
            self.add("")
        self._file.truncate(self._length)  # of half a line
        self._file.close()
        if self._waiting:
            lost = self._waiting.count("\n")
            print(f"WARNING: {self._path}: its last {lost} line(s) could not be written", file=sys.stderr, flush=True)
        return not self._waiting


def _csv_line(record: Record) -> str:
    line = io.StringIO(newline="")
    csv.DictWriter(line, COLUMNS).writerow({name: value for name, value in record.items() if name in COLUMNS})
    return line.getvalue()


def describe(record: Record) -> str:
    """The loss of a record in words, with what its task is judged by."""
    if "accuracy" in record:
        return f"loss {record['loss']:.4f}, accuracy {record['accuracy']:.3f}"
    if "bits_per_byte" in record:
        return f"loss {record['loss']:.4f} ({record['bits_per_byte']:.3f} bits per byte)"
    return f"loss {record['loss']:.4f}"


def _figures(record: Record, tokens_per_second: float) -> str:
    return (
        f"{describe(record)}  {tokens_per_second:,.0f} tokens/s  "
        f"gradient norm {record['gradient_norm']:.3f}  {record['peak_bytes'] / 2**30:.2f} GiB peak"
    )


def _bar(first_step: int, steps: int) -> Any:
    """A tqdm bar on a terminal, else None."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(initial=first_step, total=steps, unit="step", dynamic_ncols=True)


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
