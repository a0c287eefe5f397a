"""kill -9 at every write boundary: a checkpoint's save in full, and whole runs that are taken up again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("boundaries.py")


@pytest.fixture
def drive(stories260k, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("JINDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a forked child has one thread

    def run(shares=None, *more):
        out = tmp_path / "out"
        argv = [
            "train", "--base_model", str(stories260k), "--data_path", str(rows), "--output_dir", str(out),
            "--batch_size", "4", "--micro_batch_size", "4", "--max_steps", "4", "--learning_rate", "1e-2",
            "--cutoff_len", "96", "--val_set_size", "4", "--lora_dropout", "0.2", "--lora_r", "2", "--device", "cpu",
            "--prompt_template_name", "alpaca_short", "--save_steps", "1", "--save_total_limit", "1", *more,
        ]  # fmt: skip
        job = {"output_dir": str(out), "argv": argv} | ({} if shares is None else {"shares": shares})
        done = subprocess.run(
            [sys.executable, str(DRIVER), json.dumps(job)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_a_save_that_is_killed_anywhere_leaves_a_whole_checkpoint(drive):
    """The newest that is valid is the one before or the new one, none is damaged, and nothing is left over."""
    answer = drive()
    assert answer["code"] == 0
    *killed, last = answer["seen"]
    assert len(killed) > 25, "a write, a sync and a rename of each of five files and two folders"
    assert {one["ended"] for one in killed} == {-signal.SIGKILL}
    assert [one["faults"] for one in answer["seen"]] == [[]] * len(answer["seen"])
    steps = [one["step"] for one in killed]
    assert steps == sorted(steps), "once it has its name, it is there for good"
    assert set(steps) == {2, 3}
    assert all("checkpoint-2" in one["names"] for one in killed if one["step"] == 2), "the old one goes last"
    assert (last["ended"], last["step"]) == (0, 3)
    assert last["names"] == ["checkpoint-3", "metrics.jsonl.part"]
    for one in killed:
        assert set(one["names"]) <= {"checkpoint-2", "checkpoint-3", "metrics.jsonl.part"}


def check_whole(answer):
    for one in answer["runs"]:
        assert (one["killed"], one["resumed"]) == (-signal.SIGKILL, 0), one
        assert one["same"], f"killed at {one['boundary']} of {answer['total']}, it ended with another adapter"
        assert one["steps"] == [0, 1, 2, 3, 4, 4], one


def test_runs_that_are_killed_end_as_the_one_that_was_not(drive):
    """In the first checkpoint, in the third, and while the adapter is written."""
    answer = drive([0.12, 0.6, 0.93])
    assert len(answer["runs"]) == 3
    check_whole(answer)


@pytest.mark.slow
def test_runs_that_are_killed_at_any_write_end_as_the_one_that_was_not(drive):
    answer = drive([i / 500 for i in range(500)])
    assert len(answer["runs"]) == answer["total"] > 100
    check_whole(answer)
