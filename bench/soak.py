"""A long run, stopped and taken up on the way: does its memory stay flat?

python -m bench.soak --base_model FOLDER [--steps 2000] [--save_steps 20] [--dtype fp32]

Trains on rows made up here, stops after half of the steps by SIGTERM and goes on with --resume, each in a process of
its own; checkpoints and measurements come on the way. Prints the slope of the memory over the steps of each process,
without the first fifth, in bytes a step; exit code 1 where it is above
LIMIT.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LIMIT = 3000.0
"""Bytes a step. A row of metrics.jsonl, which stays in memory until the end, takes 0.3 kB of it."""

_WORDS = (
    "the", "cat", "and", "a", "dog", "went", "to", "town", "where", "they", "saw", "little", "birds", "in", "red",
)  # fmt: skip


def write_rows(path: Path) -> None:
    chance = np.random.RandomState(0)
    rows = [
        {"instruction": f"Tell story {i}.", "output": " ".join(chance.choice(_WORDS, 5 + i % 40))} for i in range(400)
    ]
    path.write_text(json.dumps(rows))


def train(folder: Path, arguments: argparse.Namespace, stop_at: int) -> int:
    """One process; SIGTERM once its log has `stop_at` steps (0: never). Its exit code."""
    command = [
        sys.executable, "-m", "jindo_core.cli.main", "train", "--base_model", arguments.base_model,
        "--data_path", str(folder / "rows.json"), "--output_dir", str(folder / "out"), "--batch_size", "8",
        "--micro_batch_size", "4", "--max_steps", str(arguments.steps), "--val_set_size", "40", "--eval_steps", "100",
        "--cutoff_len", "128", "--save_steps", str(arguments.save_steps), "--device", "cpu", "--resume",
        "--prompt_template_name", "alpaca_short", "--dtype", arguments.dtype,
    ]  # fmt: skip
    log = folder / "out" / "metrics.jsonl.part"
    environment = os.environ | {"JINDO_CACHE": str(folder / "cache")}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        while stop_at and process.poll() is None:
            if log.exists() and log.read_text().count('"loss"') >= stop_at:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(1)
    return process.returncode


def slope(rows: list[tuple[int, int]]) -> float:
    """Bytes a step, least squares, without the first fifth."""
    kept = np.asarray(rows[len(rows) // 5 :], dtype=np.float64)
    return float(np.polyfit(kept[:, 0], kept[:, 1], 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save_steps", type=int, default=20)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jindo-soak-") as name:
        folder = Path(name)
        write_rows(folder / "rows.json")
        codes = [train(folder, arguments, arguments.steps // 2), train(folder, arguments, 0)]
        lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["memory_bytes"]) for line in lines if "loss" in line]
    if codes != [143, 0] or [step for step, _ in steps] != list(range(1, arguments.steps + 1)):
        print(f"exit codes {codes}, expected [143, 0], and {len(steps)} of {arguments.steps} steps once each")
        return 1
    # The second process began where the memory of a step fell back, or near the middle.
    middle = arguments.steps // 2 + 50
    halves = {"before the stop": steps[: middle - 60], "after it": steps[middle + 60 :]}
    worst = 0.0
    for said, rows in halves.items():
        found = slope(rows)
        worst = max(worst, found)
        print(f"{said}: {found:,.0f} bytes a step over {len(rows)} steps, at the end {rows[-1][1] / 1e6:,.0f} MB")
        print("  MB by step:", ", ".join(f"{step} {size / 1e6:,.1f}" for step, size in rows[:: len(rows) // 8]))
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
