"""A disk that has no room for the log: no step is lost by it, nor a row; and where that lasts, what stands is said."""

from __future__ import annotations

import errno
import json
import os
import resource

import pytest

from jindo_core import checkpoint
from jindo_core import train as training
from jindo_core.adapters import WEIGHTS
from jindo_core.errors import Stopped, TrainingError
from jindo_core.run_state import MetricsLog
from jindo_core.train import train

PART = "metrics.jsonl.part"


def without_times(rows):
    timed = {"seconds", "tokens_per_second", "input_seconds", "share_of_ceiling", "memory_bytes"}
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


@pytest.fixture
def during(monkeypatch):
    """during(3, 6, begin, end): begin() before step 3, end() before step 6."""

    def arrange(first, last, begin, end):
        original = training.take_step

        def step(job, batches, number, *rest):
            if number in (first, last):
                (begin if number == first else end)()
            return original(job, batches, number, *rest)

        monkeypatch.setattr(training, "take_step", step)

    return arrange


def test_a_log_without_room_is_made_good_later(settings, metrics, tmp_path, during, capsys):
    """The kernel refuses what goes beyond a size, in the middle of a row."""
    train(*settings("whole", save_steps=0))
    log, former, seen = tmp_path / "out" / PART, resource.getrlimit(resource.RLIMIT_FSIZE), []

    def begin():
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 50, former[1]))

    def end():
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        seen.extend(map(json.loads, log.read_text().splitlines()))  # whole rows, though half of one was written

    during(3, 6, begin, end)
    try:
        train(*settings("out", save_steps=0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert [row["step"] for row in seen if "loss" in row] == [1, 2]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"note: {PART} could not be written (File too large), and the run goes on") == 1
    assert said.count(f"note: {PART} has all rows again") == 1
    assert without_times(metrics(tmp_path / "out")) == without_times(metrics(tmp_path / "whole"))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.fixture
def full(tmp_path):
    """An output folder whose log is on a device that is always full: every write comes to ENOSPC."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PART).symlink_to("/dev/full")
    return tmp_path / "out"


def test_a_log_that_never_finds_room_ends_in_words_and_the_run_can_be_ended(full, settings, metrics, tmp_path, capsys):
    train(*settings("whole"))
    with pytest.raises(TrainingError) as raised:
        train(*settings("out"))
    assert str(raised.value) == (
        f"{PART} could not be written whole (No space left on device): the adapter is saved, and no metrics.jsonl or "
        "record of the run beside it: make room, and --resume ends the run"
    )
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"note: {PART} could not be written (No space left on device), and the run goes on") == 1
    whole = (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert (full / WEIGHTS).read_bytes() == whole
    assert [path.name for path in checkpoint.folders(full)] == ["checkpoint-3", "checkpoint-6"]
    assert not (full / "metrics.jsonl").exists()
    (full / PART).unlink()
    train(*settings("out", resume=True))
    assert (full / WEIGHTS).read_bytes() == whole
    assert without_times(metrics(full)) == without_times(metrics(tmp_path / "whole"))


def test_a_signal_is_obeyed_though_the_log_finds_no_room(full, settings, stop_after):
    stop_after(4)
    with pytest.raises(Stopped) as stopped:
        train(*settings("out"))
    assert stopped.value.code == 143
    history = checkpoint.newest(full)[0].state["run"]["history"]
    assert [row["step"] for row in map(json.loads, history) if "loss" in row] == [1, 2, 3, 4]


def test_a_disk_that_fails_at_the_end_is_no_log_that_is_whole(tmp_path, monkeypatch):
    """What the kernel took and the disk did not keep comes to light in the sync."""
    said = []
    with MetricsLog(tmp_path / PART, said.append) as log:
        log.write(["{}"])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
            with pytest.raises(OSError, match="Input/output error"):
                log.complete(["{}"])
        log.complete(["{}", "[]"])
    assert (tmp_path / PART).read_text() == "{}\n[]\n"
    assert said == []
