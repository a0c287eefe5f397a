"""A whole training step beside transformers + peft + bitsandbytes, on the same NF4 codes; 512 tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import steps
from bench.timing import OURS

ROOT = Path(__file__).resolve().parent.parent


def peaks(what, who, shape, setup, tokens):
    """Peak memory of each side in a process of its own."""
    found = {}
    for side in who:
        command = [sys.executable, "-m", "bench.steps", what, side, shape.name, "--tokens", str(tokens)]
        command += ["--device", str(setup.device), "--dtype", str(setup.dtype).removeprefix("torch.")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])["peak_mib"]
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_step(measure, setup, model, checkpointing):
    make = lambda: steps.training_case(model, setup.dtype, setup.device, 512, checkpointing=checkpointing)  # noqa: E731
    row = measure(make, "step")
    ours = steps.OURS_CHECKPOINTED if checkpointing else OURS
    row["peak_mib"] = peaks("train", [ours, *list(row["ratios"])[:1]], model, setup, 512)
