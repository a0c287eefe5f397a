"""What a training step waits for its rows, with and without the thread that reads ahead; real rows, real runs.

    python -m bench.input_wait --base_model MODEL --data_path ROWS [--packing] [--cold] [--cutoff_len N] [--steps N]

Both kinds run in turns in one process, three times each, and the table has the medians: input_seconds of metrics.jsonl
over the step's seconds, the first step aside, for which nothing can have been read.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from jindo_core import outcome
from jindo_core import train as training
from jindo_core.config import resolve_train_config
from jindo_core.data.store import TokenizedRows
from jindo_core.feeder import Feeder


def shares(given: dict[str, Any], *, ahead: bool, cold: bool) -> list[float]:
    """Of each step but the first, the share that it waited for its rows."""
    seconds: list[float] = []
    original = training.take_step

    def timed(*args: Any) -> dict[str, float]:
        began = time.perf_counter()
        row = original(*args)
        seconds.append(time.perf_counter() - began)
        return row

    with tempfile.TemporaryDirectory() as folder, _quiet(), _cold() if cold else contextlib.nullcontext():
        with (
            mock.patch.object(training, "Feeder", functools.partial(Feeder, ahead=ahead)),
            mock.patch.object(training, "take_step", timed),
            mock.patch.object(training, "draw_loss"),
        ):
            training.train(*resolve_train_config(given | {"output_dir": f"{folder}/out"}))
        lines = (Path(folder) / "out" / "metrics.jsonl").read_text().splitlines()
    waited = [row["input_seconds"] for row in map(json.loads, lines) if "loss" in row]
    return [wait / (took + (wait if ahead else 0)) for wait, took in zip(waited[1:], seconds[1:], strict=True)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with mock.patch.object(outcome, "ANSWER_TOKENS", 1), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _cold() -> Iterator[None]:
    """The store's pages are dropped from the page cache before each row is read: a disk's own time, every time."""
    original = TokenizedRows._at

    def dropped(rows: TokenizedRows, index: int) -> Any:
        os.posix_fadvise(rows._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return original(rows, index)

    with mock.patch.object(TokenizedRows, "_at", dropped):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.input_wait", allow_abbrev=False)
    parser.add_argument("--base_model")
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--cold", action="store_true", help="no page of the tokenized rows is in the page cache")
    parser.add_argument("--cutoff_len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    given = {
        "data_path": asked.data_path, "max_steps": asked.steps, "val_set_size": 0, "save_steps": 0,
        "batch_size": 4, "micro_batch_size": 4, "packing": asked.packing, "device": "cpu", "profile": "embedded",
        "cutoff_len": asked.cutoff_len,
    }  # fmt: skip
    given |= {"base_model": asked.base_model} if asked.base_model else {}
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(asked.turns):
        for ahead in (False, True):
            found[ahead] += shares(given, ahead=ahead, cold=asked.cold)
    for ahead, name in ((False, "read by the step"), (True, "read ahead")):
        print(f"{name:18} waits {statistics.median(found[ahead]):8.3%} of a step, at most {max(found[ahead]):8.3%}")


if __name__ == "__main__":
    main()
