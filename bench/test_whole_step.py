"""A whole training step and whole decoding beside transformers + peft + bitsandbytes, on the same random model.

Ours and the peer's alternate in one process, so that a noisy machine treats both alike; the ratio is of medians.
Loading time and peak memory come from a process of its own for each. `JINDO_BENCH_SHAPES=110m,1b` chooses the shapes
(110m alone by default); 1b needs 7 GB and about three minutes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from bench import models

SHAPES = os.environ.get("JINDO_BENCH_SHAPES", "110m").split(",")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request, tmp_path_factory):
    return request.param, models.write_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def paired(calls, rounds):
    """Median seconds of each call, alternating, after one unmeasured round."""
    seconds = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            taken = call()
            if turn:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def alone(what, who, folder):
    """(seconds to load, peak MiB) in a process that does nothing else."""
    command = [sys.executable, "-m", "bench.models", what, who, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    load, peak = done.stdout.split()[-2:]
    return float(load), float(peak)


def report(benchmark, shape, tokens, seconds, ours, theirs):
    """The row: rates, ratios, and what each held at its peak."""
    rates = {name: round(tokens / value, 1) for name, value in seconds.items()}
    benchmark.extra_info |= {f"{name} tokens/s": rate for name, rate in rates.items()}
    benchmark.extra_info |= {"ratio": round(seconds["peer"] / seconds["jindo"], 2)}
    benchmark.extra_info |= {"jindo load s": ours[0], "peer load s": theirs[0]}
    benchmark.extra_info |= {"jindo peak MiB": ours[1], "peer peak MiB": theirs[1]}
    print(f"\n{shape}: {benchmark.extra_info}")


def test_training_step(benchmark, checkpoint):
    shape, folder = checkpoint
    steps = {
        "jindo": models.training_step(models.ours(folder, train=True)),
        "peer": models.training_step(models.peer(folder, train=True)),
        "peer without checkpointing": models.training_step(models.peer(folder, train=True, checkpointing=False)),
    }
    seconds = paired(steps, rounds=5)
    benchmark.pedantic(steps["jindo"], rounds=1)
    report(benchmark, shape, 512, seconds, alone("train", "jindo", folder), alone("train", "peer", folder))


def test_decoding(benchmark, checkpoint):
    shape, folder = checkpoint
    runs = {
        "jindo": models.decoding(models.ours(folder, train=False), "jindo"),
        "peer": models.decoding(models.peer(folder, train=False), "peer"),
    }
    seconds = paired(runs, rounds=5)
    benchmark.pedantic(runs["jindo"], rounds=1)
    report(benchmark, shape, 32, seconds, alone("decode", "jindo", folder), alone("decode", "peer", folder))
