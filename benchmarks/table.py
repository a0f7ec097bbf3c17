"""The README's table of attention speeds and its picture, made from the records of a run and from nothing else.

    python benchmarks/table.py                       rewrites README.md between its markers, and results/attention.png
    python benchmarks/table.py --print               only prints the table

The markers are ``<!-- attention:begin -->`` and ``<!-- attention:end -->``. Without records nothing is touched. The picture
needs matplotlib; the machine that measures does not.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, read

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- attention:begin -->", "<!-- attention:end -->"
OURS = "ringflash"
MASKS = ("causal", "full", "window", "documents")
PASSES = ("forward", "backward")

# ours in strong colours, peers in the same hue, pale; causal below full
COLOURS = {"full": ("#b23a12", "#e9b7a1"), "causal": ("#1f5a96", "#a9c4e0")}

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS / "attention.jsonl")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--picture", type=Path, help="where to draw (beside the results)")
    parser.add_argument("--print", action="store_true", help="print the table, touch nothing")
    options = parser.parse_args()
    records = [r for r in read(options.results) if r.get("benchmark") == "attention"]
    if not any(_rate(r) for r in records):
        sys.exit(
            f"no results: {options.results} holds no comparison; run python benchmarks/attention.py on a GPU first"
        )
    if options.print:
        print(table(records))
        return
    rewrite(options.readme, table(records))
    print(f"{options.readme.name}: rewritten between its markers")
    picture = options.picture or options.results.with_suffix(".png")
    print(f"picture: {draw(records, picture) or 'not drawn (matplotlib is not installed)'}")


def rewrite(readme: Path, text: str) -> None:
    """Replace what stands between the markers; refuse a file that does not have both of them once, in order."""
    before = readme.read_text()
    found = re.findall(f"{re.escape(BEGIN)}.*?{re.escape(END)}", before, flags=re.S)
    if len(found) != 1 or before.count(BEGIN) != 1 or before.count(END) != 1:
        sys.exit(f"{readme.name}: put {BEGIN} and {END}, once each and in this order, where the table shall stand")
    readme.write_text(before.replace(found[0], f"{BEGIN}\n{text}\n{END}"))


def table(records: Sequence[Record]) -> str:
    """Markdown: where it was measured, TFLOP/s by length with the ratio to the best peer, and the costs around it."""
    shown = [r for r in _comparisons(records) if r["dtype"] == "bfloat16"]
    lengths = sorted({r["length"] for r in shown})
    lines = [
        f"{surroundings(records)}. bfloat16, TFLOP/s over visible cells; in brackets the ratio to the best of "
        f"{_listed(peers(records))}.",
        "",
        f"| heads, head_dim, mask | pass | {' | '.join(map(_tokens, lengths))} |",
        f"|---|---|{'---|' * len(lengths)}",
    ]
    for kind in dict.fromkeys((r["head_dim"], r["heads"], r["kv_heads"], r["mask"]) for r in _sorted(shown)):
        for direction in PASSES:
            cells = [_cell(shown, kind, direction, length) for length in lengths]
            if any(cells):
                head_dim, heads, kv_heads, mask = kind
                lines.append(f"| {heads}/{kv_heads}, {head_dim}, {mask} | {direction} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *sentences(records)]).rstrip()


def surroundings(records: Sequence[Record]) -> str:
    """The machine, versions, commit and date of a run, on a line."""
    r = records[-1]
    driver = f", driver {r['driver']}" if r.get("driver") else ""
    versions = f"torch {r['torch']}, Triton {r['triton']}, Python {r['python']}"
    return f"{r['gpu'] or r['cpu']}{driver}, {versions}, commit {r['commit']}, {r['date']}"


def peers(records: Sequence[Record]) -> list[str]:
    """Those that could serve at least one problem of the run."""
    named = {n: None for r in _comparisons(records) for n, v in r["versions"].items() if "tflops" in v and n != OURS}
    return list(named)


def sentences(records: Sequence[Record]) -> Iterator[str]:
    """What surrounds the kernels, one line each, as far as it was measured."""
    for r in records:
        if r["kind"] == "matmul":
            size = r["size"]
            yield f"- The product of two {size} x {size} bfloat16 matrices in the same run: {r['tflops']:.0f} TFLOP/s."
        elif "overhead" in r:
            size = f"{_tokens(r['length'])} x {_tokens(r['length'])}"
            yield f"- Adding to a carry costs a hop {100 * r['overhead']:+.1f} % ({size}, head_dim {r['head_dim']})."
        elif "slowdown" in r:
            yield (
                f"- {r['ranks']} ranks of a {r['layout']} ring, one after another on this device, over "
                f"{_tokens(r['length'])} tokens, {r['pass']}: {r['slowdown']:.3f} x the time of one device (copies between "
                "ranks included; not a measurement of a network)."
            )
        elif r["kind"] == "derived" and (r["head_dim"], r["length"]) in ((128, 16384), (128, 65536)):
            what = f"{r['mask']} at {100 * r['speed_per_cell']:.0f} % of the speed per cell of {r['against']}"
            heads = f"{r['heads']}/{r['kv_heads']} heads of {r['head_dim']}"
            yield f"- {_tokens(r['length'])} tokens, {heads}, {r['pass']}: {what}."
        elif r["kind"] == "host":
            took = ", ".join(f"{n} {v['p50']:.0f} us" for n, v in r["us"].items() if "p50" in v)
            yield f"- Host time of a call, {r['pass']}: {took}."


def draw(records: Sequence[Record], path: Path) -> Path | None:
    """Lines of TFLOP/s over the length, ringflash against the best peer at each; None if matplotlib is missing.

    One panel for each head dim and pass, grouped heads, causal and full.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    shown = [r for r in _comparisons(records) if r["mask"] in COLOURS and r["dtype"] == "bfloat16"]
    shown = [r for r in shown if r["heads"] != r["kv_heads"]] or shown
    head_dims = sorted({r["head_dim"] for r in shown})
    lengths = sorted({r["length"] for r in shown})
    matmul = next((r for r in records if r["kind"] == "matmul"), None)
    figure = Figure(figsize=(max(9.5, 1.6 + 3.9 * len(head_dims)), 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(head_dims), sharex=True, sharey=True, squeeze=False)
    for row, direction in zip(panels, PASSES, strict=True):
        for panel, head_dim in zip(row, head_dims, strict=True):
            mine = [r for r in shown if r["head_dim"] == head_dim and r["pass"] == direction]
            _draw_panel(panel, mine, lengths, matmul)
        row[0].set_ylabel(f"{direction}, TFLOP/s")
    for panel, head_dim in zip(panels[0], head_dims, strict=True):
        heads = next(f"{r['heads']}/{r['kv_heads']}" for r in shown if r["head_dim"] == head_dim)
        panel.set_title(f"head_dim {head_dim}, {heads} heads", fontsize=11, fontweight="bold")
    for panel in panels[-1]:
        panel.set_xlabel("tokens")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=10)
    figure.suptitle(
        f"Attention, bfloat16: ringflash and the best of {_listed(peers(records))}\n", fontsize=13, fontweight="bold"
    )
    figure.text(0.5, 0.945, surroundings(records), ha="center", fontsize=8.5, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _draw_panel(panel: Any, records: Sequence[Record], lengths: Sequence[int], matmul: Record | None) -> None:
    at = {length: i for i, length in enumerate(lengths)}
    for mask, (strong, pale) in COLOURS.items():
        mine = sorted((r for r in records if r["mask"] == mask), key=lambda r: r["length"])
        peer = [(at[r["length"]], r["versions"][r["best_peer"]]["tflops"]) for r in mine if r["best_peer"]]
        ours = [(at[r["length"]], _rate(r)) for r in mine if _rate(r)]
        panel.plot(*_columns(peer), "s--", color=pale, markersize=5, linewidth=1.6, label=f"best peer, {mask}")
        panel.plot(*_columns(ours), "o-", color=strong, markersize=6, linewidth=2.2, label=f"{OURS}, {mask}")
    if matmul:
        label = f"{matmul['size']}³ matrix product"
        panel.axhline(matmul["tflops"], color="#777777", linewidth=1, linestyle=":", label=label)
    panel.set_xticks(range(len(lengths)), [_tokens(x) for x in lengths])
    panel.set_xlim(-0.3, len(lengths) - 0.7)
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _comparisons(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r["kind"] == "compare"]


def _sorted(records: Sequence[Record]) -> list[Record]:
    """Grouped heads before equal ones, 128 first, masks in the order of :data:`MASKS`."""

    def rank(r: Record) -> tuple[Any, ...]:
        return (r["heads"] == r["kv_heads"], r["head_dim"] != 128, r["head_dim"], MASKS.index(r["mask"]))

    return sorted(records, key=rank)


def _cell(records: Sequence[Record], kind: tuple[Any, ...], direction: str, length: int) -> str:
    for r in records:
        if (r["head_dim"], r["heads"], r["kv_heads"], r["mask"]) == kind and r["pass"] == direction:
            if r["length"] == length and _rate(r):
                return f"{_rate(r):.0f}" + (f" ({r['ratio']:.2f})" if r["ratio"] else "")
            if r["length"] == length:
                return "wrong" if "wrong" in r["versions"][OURS] else "failed"
    return ""


def _rate(r: Record) -> float | None:
    rate: float | None = r.get("versions", {}).get(OURS, {}).get("tflops") if r["kind"] == "compare" else None
    return rate


def _columns(points: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [x for x, _ in points], [y for _, y in points]


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _listed(names: Sequence[str]) -> str:
    named = {"flash": "FlashAttention 2", "cudnn": "cuDNN", "efficient": "efficient", "flex": "FlexAttention"}
    words = [named.get(name, name) for name in names]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words) or "no peer"


if __name__ == "__main__":
    main()
