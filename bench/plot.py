"""`python -m bench.plot [FILE]`: the newest results as docs/roofline-DEVICE.png and docs/ratios-DEVICE.png, DEVICE
cpu or cuda."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import RESULTS, newest

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main(argv: Sequence[str], docs: Path = DOCS) -> int:
    path = Path(argv[0]) if argv else newest()
    if path is None or not path.is_file():
        print(f"error: got no results ({path or RESULTS}), expected a .json of `make bench`: run it", file=sys.stderr)
        return 2
    import matplotlib

    matplotlib.use("Agg")
    results = json.loads(path.read_text(encoding="utf-8"))
    for name, draw in {"roofline": roofline, "ratios": ratios}.items():
        figure = draw(results)
        file = docs / f"{name}-{results['device']}.png"
        figure.savefig(file, dpi=120, bbox_inches="tight")
        print(file)
    return 0


def _bars(rows: Sequence[str], title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.24 * max(len(rows), 1)))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    return figure, axes


def _caption(results: Mapping[str, Any]) -> str:
    return f"{results['machine']}, torch {results['torch']}, {results['date'][:10]}"


def roofline(results: Mapping[str, Any]) -> Any:
    """How near each row comes to what bounds it on that machine: copying, reading, or a plain matrix product."""
    rows = results["rows"]
    names = [f"{row['name']}, {row['shape']}" for row in rows]
    figure, axes = _bars(names, f"Share of the ceiling: {_caption(results)}")
    colours = {"copy": "tab:blue", "read": "tab:green", "gemm": "tab:orange"}
    for limit, colour in colours.items():
        own = [(i, row["share"]) for i, row in enumerate(rows) if row["limit"] == limit]
        if own:
            axes.barh([i for i, _ in own], [share for _, share in own], color=colour, label=limit)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("rate / the machine's own rate of copying, reading or multiplying, same run")
    axes.legend(fontsize=7)
    return figure


def ratios(results: Mapping[str, Any]) -> Any:
    """A peer's time over ours, on a logarithmic axis."""
    pairs = [(row, peer, ratio) for row in results["rows"] for peer, ratio in row["ratios"].items()]
    names = [f"{row['name']}, {row['shape']} | {peer}" for row, peer, _ in pairs]
    figure, axes = _bars(names, f"Peer's time / ours: {_caption(results)}")
    values = [ratio for _, _, ratio in pairs]
    colours = ["tab:blue" if ratio >= 1 else "tab:red" for ratio in values]
    axes.barh(range(len(pairs)), [ratio - 1 for ratio in values], left=1, color=colours)
    for i, ratio in enumerate(values):
        axes.annotate(f" {ratio:.2f}", (ratio, i), fontsize=6, va="center")
    axes.axvline(1.0, color="black", linewidth=0.8)
    if values:
        axes.set_xscale("log")
        marks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
        ticks = [mark for mark in marks if min(values) / 2 < mark < max(values) * 2]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    axes.set_xlabel("above 1: ours is faster")
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
