"""The loss curve of a run as a picture, drawn from its metrics alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from progress import read_metrics

TRAIN, SMOOTH, VALIDATION = "#b8c4d6", "#2f5d9b", "#c8501e"


def draw_curve(folder: Path, title: str, step_tokens: int, chance: float | None) -> Path | None:
    """Write ``folder/loss.png`` and return its path; None if matplotlib is not installed.

    Training loss is drawn twice: every step, pale, and its running mean. A task judged by accuracy (``chance`` is not
    None) gets a second panel with the accuracy and the level of guessing. ``step_tokens`` labels the axis.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(folder)
    panels = 1 if chance is None else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(7.5 * panels, 4.5), squeeze=False, layout="constrained")
    figure.suptitle(title)
    _draw_loss(axes[0, 0], records, bits=chance is None)
    if chance is not None:
        _draw_accuracy(axes[0, 1], records, chance)
    for panel in axes.flat:
        panel.set_xlabel(f"step ({step_tokens:,} tokens each)")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    path = folder / "loss.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _draw_loss(panel: Any, records: list[dict[str, Any]], bits: bool) -> None:
    bits = bits and all("bits_per_byte" in record for record in records)
    key, unit = ("bits_per_byte", "bits per byte") if bits else ("loss", "nats per target")
    steps, losses = _series(records, "train", key)
    window = max(2, len(losses) // 30)
    panel.plot(steps, losses, color=TRAIN, linewidth=0.8, label="training, each step")
    panel.plot(steps, _running_mean(losses, window), color=SMOOTH, label=f"training, mean of {window} steps")
    panel.plot(*_series(records, "validation", key), "o-", color=VALIDATION, markersize=4, label="validation")
    panel.set_ylabel(f"loss ({unit})")
    panel.set_ylim(bottom=0)


def _draw_accuracy(panel: Any, records: list[dict[str, Any]], chance: float) -> None:
    steps, accuracies = _series(records, "validation", "accuracy")
    panel.plot(steps, accuracies, "o-", color=VALIDATION, markersize=4, label="validation")
    panel.axhline(chance, color="gray", linestyle="--", linewidth=1, label=f"chance, {chance:.3f}")
    panel.set_ylabel("accuracy (share of right answers)")
    panel.set_ylim(0, 1.03)


def _series(records: list[dict[str, Any]], split: str, key: str) -> tuple[list[int], list[float]]:
    chosen = [record for record in records if record["split"] == split]
    return [record["step"] for record in chosen], [record[key] for record in chosen]


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean of about ``window`` values around each point, of fewer at the ends: a trailing mean would lag behind."""
    half = window // 2
    around = [values[max(0, centre - half) : centre + half + 1] for centre in range(len(values))]
    return [sum(part) / len(part) for part in around]
