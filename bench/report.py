"""Rows as a table and as a file: `bench/results/<machine>-<date>.json`."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench import peers
from jindo_core.tune import machine_name

RESULTS = Path(__file__).resolve().parent / "results"


def facts(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    name = machine_name(device)
    found: dict[str, Any] = {
        "machine": name, "device": device.type, "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "measured": True, "python": platform.python_version(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "peers": peers.versions(),
    }  # fmt: skip
    if device.type == "cuda":
        found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return found


def write(folder: Path, content: Mapping[str, Any]) -> Path:
    """`facts` and what was found, as JSON named by machine and time; a run of the same second is replaced."""
    machine = re.sub(r"[^A-Za-z0-9]+", "-", content["machine"]).strip("-").lower()
    path = folder / f"{machine}-{datetime.now():%Y-%m-%d-%H%M%S}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def newest(folder: Path = RESULTS) -> Path | None:
    """The run written last, by the time in its name; other files of the folder (gates.json) are none."""
    files = sorted(folder.glob("*-????-??-??-??????.json"), key=lambda path: (path.stem[-17:], path.name))
    return files[-1] if files else None


def settle(rows: Sequence[dict[str, Any]], ceilings: Mapping[str, Mapping[str, float]]) -> None:
    """Hold the rows against the higher of each ceiling's two measurements: a busy moment must not raise a share."""
    for row in rows:
        if row["ceiling"] in ceilings:
            row["share"] = row["rate"] / max(ceilings[row["ceiling"]].values())


HEAD = ("row", "shape", "ours", "median", "rate", "of ceiling", "ratio to peers (above 1: ours is faster)")


def lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table."""
    return [
        (
            row["name"], row["shape"], row["implementation"], _seconds(row["median_s"]),
            f"{row['rate']:.3g} {row['unit']}" + _tokens(row), f"{row['share']:.0%} ({row['limit']})", _ratios(row),
        )
        for row in rows
    ]  # fmt: skip


def show(rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any], title: str) -> str:
    """The table as text; plain columns where rich is not installed."""
    table = lines(rows)
    drift = "; ".join(f"{key} {value['first']:.3g} → {value['again']:.3g}" for key, value in ceilings.items())
    note = f"ceilings, first and again (GB/s; gemm TFLOP/s): {drift or 'none used'}"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return "\n".join([title, *("  ".join(cells) for cells in [HEAD, *table]), note])
    made = Table(title=title)
    for name in HEAD:
        made.add_column(name, justify="right" if name in ("median", "rate", "of ceiling") else "left", overflow="fold")
    for cells in table:
        made.add_row(*cells)
    console = Console(width=150, record=True, file=None, force_terminal=False)
    with console.capture() as text:
        console.print(made)
        console.print(note)
    return text.get()


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} µs"


def _tokens(row: Mapping[str, Any]) -> str:
    said = row.get("tokens_per_s", {}).get("jindo")
    return f", {said:.0f} tok/s" if said else ""


def _ratios(row: Mapping[str, Any]) -> str:
    parts = [f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items()]
    parts += [f"{name}: failed" for name in row.get("failed_peers", {})]
    if "stalled" in row:
        parts.append(f"stalled {row['stalled']:.0%}")
    for side, memory in row.get("peak_mib", {}).items():
        parts.append(f"{side} {memory:,} MiB")
    return "; ".join(parts) or "no peer here"
