"""Step time against the memory that it may take, with the share of time stalled; and the peak of loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import budgets
from bench.timing import OURS

ROOT = Path(__file__).resolve().parent.parent


def place(setup, tmp_path):
    """On a CPU the host's memory is the device's: there the rest goes through a file."""
    return "host" if setup.device.type == "cuda" else str(tmp_path)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("share", budgets.SHARES)
def test_optimizer(measure, setup, model, share, bits, tmp_path):
    case, optimizer = budgets.optimizer_case(setup, model, share, place(setup, tmp_path), bits=bits)
    row = measure(lambda: case, "paged_adamw")
    row["stalled"] = budgets.stalled(case.calls[OURS], optimizer)


@pytest.mark.parametrize("share", budgets.SHARES)
def test_streamed_layers(measure, setup, model, share, tmp_path):
    case, stream = budgets.streaming_case(setup, model, share, place(setup, tmp_path))
    row = measure(lambda: case, "streaming")
    row["stalled"] = budgets.stalled(case.calls[OURS], stream)


@pytest.mark.parametrize("nf4", [False, True], ids=["bf16", "nf4"])
def test_loading(model, tmp_path, capsys, nf4):
    """The most that loading takes, beside what is loaded and one tensor (target: 1.1 times the model, and a tensor);
    and its speed beside a plain read of the same file."""
    budgets.write_checkpoint(model, tmp_path, nf4=nf4)
    command = [sys.executable, "-m", "bench.budgets", "load", str(tmp_path)]
    # As in bench/simulation.py: freed blocks go back at once, so that the figure tells what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        size, peak, tensor = (found[name] / 1e6 for name in ("model", "peak", "largest_tensor"))
        speed, plain = (found["bytes"] / 1e9 / found[name] for name in ("seconds", "plain_read_seconds"))
        print(f"\nloading {model.name} from {'NF4' if nf4 else 'bf16'}: {size:,.0f} MB held, at most {peak:,.0f} MB, "
              f"largest tensor {tensor:,.0f} MB, {(peak - tensor) / size:.2f} times the model and a tensor; "
              f"{found['seconds']:.1f} s, {speed:.2f} GB/s of the file, a plain read {plain:.2f} GB/s")  # fmt: skip
    assert found["peak"] <= 1.1 * found["model"] + found["largest_tensor"]
