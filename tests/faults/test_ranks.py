"""A rank that is killed, or hangs: the others stop, say so, and the run goes on from its checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import given, launch, write_rows

from jindo_core import checkpoint
from jindo_core.adapters import WEIGHTS


def started(settings, size):
    """The real command under torchrun, in a process group of its own."""
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "-m", "jindo_core", "train", *flags]
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def process_of(rank, parent):
    """The process id of a rank."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            if f"PPid:\t{parent}\n" not in (folder / "status").read_text():
                continue
            if f"RANK={rank}" in (folder / "environ").read_bytes().decode().split("\0"):
                return int(folder.name)
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    raise AssertionError(f"rank {rank} is not there")


def wait_for(path, words, count, process):
    until = time.monotonic() + 120
    while not (path.exists() and path.read_text().count(words) >= count):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def make(stories260k, tmp_path, monkeypatch):
    monkeypatch.setenv("JINDO_CACHE", str(tmp_path / "cache"))
    rows = write_rows(tmp_path / "rows.json")
    more = {"lora_dropout": 0.2, "save_steps": 3}
    return lambda out, **changes: given(stories260k, rows, tmp_path / out, **more | changes)


def test_when_a_rank_is_killed_the_others_stop_and_the_run_goes_on(make, tmp_path):
    """kill -9 from outside: rank 0 ends by itself, says why, and leaves its checkpoints whole."""
    out = tmp_path / "out"
    endless = make("out", max_steps=5000, lr_scheduler_type="constant", warmup_steps=0, eval_steps=5000, save_steps=5)
    with started(endless, 2) as process:
        wait_for(out / "metrics.jsonl.part", '"loss"', 7, process)
        os.kill(process_of(1, process.pid), signal.SIGKILL)
        began = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - began < 30
    assert process.returncode != 0
    assert "error: another process of this run is gone or does not answer: all stop; --resume goes on" in said
    found, faults = checkpoint.newest(out)
    assert faults == []
    assert not (out / WEIGHTS).exists()
    end = {"max_steps": found.step + 3, "lr_scheduler_type": "constant", "warmup_steps": 0, "eval_steps": 5000}
    jobs = {
        "resumed": {"settings": make("out", **end, resume=True)},
        "whole": {"settings": make("whole", **end)},
    }  # fmt: skip
    done, _ = launch(tmp_path / "after", 2, jobs)
    assert [said["ended"] for own in done.values() for said in own] == ["well"] * 4
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_a_checkpoint(make, tmp_path):
    """As a scheduler sends it: torchrun passes it on, and all ranks stop behind the same step."""
    out = tmp_path / "out"
    with started(make("out", max_steps=5000, save_steps=0), 2) as process:
        wait_for(out / "metrics.jsonl.part", '"loss"', 3, process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    found, faults = checkpoint.newest(out)
    assert faults == []
    assert said.count(f"stopped by SIGTERM after step {found.step}: ") == 1


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_in_time(make, tmp_path):
    """It does not die, so that only the meeting's time limit tells. Here that is 5 seconds."""
    jobs = {"hangs": {"settings": make("out"), "hang": [1, 4], "timeout": 5}}
    began = time.monotonic()
    done, _ = launch(tmp_path / "ranks", 2, jobs, check=False)
    assert time.monotonic() - began < 60
    assert done["hangs"][0]["ended"] == "TrainingError"
    assert "is gone or does not answer" in done["hangs"][0]["text"]
    assert done["hangs"][1] is None
    assert checkpoint.newest(tmp_path / "out")[0].step == 3
