"""A disk that is full, or fails: the checkpoints that are there stay, and the run goes on or says where it stands."""

from __future__ import annotations

import errno
import os
import resource
import shutil

import pytest

from jindo_core import checkpoint
from jindo_core.adapters import WEIGHTS
from jindo_core.errors import TrainingError
from jindo_core.resume import OPTIMIZER, Saver
from jindo_core.train import train


@pytest.fixture
def whole(settings, tmp_path):
    """The adapter of the run that nothing befell."""
    train(*settings("whole"))
    return (tmp_path / "whole" / WEIGHTS).read_bytes()


def at_step(step, monkeypatch, around):
    """`around` is entered about the save of that step."""
    original = Saver.save

    def saving(saver, state):
        if state.step != step:
            return original(saver, state)
        with around():
            return original(saver, state)

    monkeypatch.setattr(Saver, "save", saving)


class Limited:
    """No file may grow beyond 3,000 bytes: the kernel refuses the write, as it does on a full disk."""

    def __enter__(self):
        self.former = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, self.former[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.former)


class Patched:
    """A name of a module is another thing meanwhile."""

    def __init__(self, module, name, value):
        self.what = module, name, value

    def __enter__(self):
        module, name, value = self.what
        self.former = getattr(module, name)
        setattr(module, name, value)

    def __exit__(self, *_):
        setattr(self.what[0], self.what[1], self.former)


def fails(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def full(_):
    return shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)


def spoils(folder):
    """The disk keeps something else than was written."""
    data = bytearray((folder / OPTIMIZER).read_bytes())
    data[-1] ^= 1
    (folder / OPTIMIZER).write_bytes(data)


FAULTS = {
    "no room, seen ahead": (lambda: Patched(shutil, "disk_usage", full), "MB are free there"),
    "a write fails": (Limited, "File too large"),
    "a sync fails": (lambda: Patched(os, "fsync", fails), "Input/output error"),
    "what was written reads otherwise": (lambda: Patched(checkpoint, "sync_folder", spoils), "is damaged (checksum"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_can_t_be_written_costs_no_step_and_no_older_one(
    fault, whole, settings, tmp_path, monkeypatch, capsys
):
    around, said = FAULTS[fault]
    at_step(6, monkeypatch, around)
    train(*settings("out"))
    text = " ".join(capsys.readouterr().out.split())
    assert "note: the checkpoint of step 6 could not be written" in text
    assert said in text
    assert "the ones before it are as they were, and the run goes on" in text
    out = tmp_path / "out"
    assert (out / WEIGHTS).read_bytes() == whole
    assert [path.name for path in checkpoint.folders(out)] == ["checkpoint-3"]
    assert list(out.glob(".*")) == []
    assert checkpoint.newest(out)[0].step == 3
    train(*settings("out", resume=True))
    assert (out / WEIGHTS).read_bytes() == whole


def test_a_signal_on_a_full_disk_says_what_stands(settings, stop_after, tmp_path, monkeypatch):
    stop_after(5)
    at_step(5, monkeypatch, Limited)
    with pytest.raises(TrainingError, match="stopped by SIGTERM, and the checkpoint of step 5 could not be written"):
        train(*settings("out"))
    assert checkpoint.newest(tmp_path / "out")[0].step == 3


def test_what_a_killed_run_left_half_written_is_removed(settings, tmp_path):
    left = tmp_path / "out" / ".checkpoint-3.abc"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_bytes(b"half")
    train(*settings("out", max_steps=1))
    assert not left.exists()


def test_files_and_folders_are_synced_before_the_name_is_given(settings, tmp_path, monkeypatch):
    """In the order in which a power cut finds either nothing or all: files, folder, manifest, folder, name, folder."""
    seen, real = [], (os.fsync, os.rename, os.replace)

    def noted(place):
        path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else str(place)
        return path.removeprefix(str(tmp_path / "out")).split("/")

    def sync(descriptor):
        seen.append(("sync", noted(descriptor)))
        real[0](descriptor)

    def renaming(operation):
        def rename(source, target, **more):
            operation(source, target, **more)
            seen.append(("rename", noted(target)))

        return rename

    at_step(3, monkeypatch, lambda: Patched(os, "fsync", sync))
    monkeypatch.setattr(os, "rename", renaming(real[1]))
    monkeypatch.setattr(os, "replace", renaming(real[2]))
    train(*settings("out", max_steps=3))
    steps = [(what, where[2] if len(where) > 2 else where[-1]) for what, where in seen]
    order = [name for name in steps if not name[1].startswith(".manifest")]
    named = order.index(("rename", "checkpoint-3"))
    manifest = order.index(("rename", checkpoint.MANIFEST))
    before = {name for what, name in order[:manifest] if what == "sync"}
    assert {WEIGHTS, OPTIMIZER, checkpoint.STATE} <= before
    assert any(what == "sync" and name.startswith(".checkpoint-3") for what, name in order[manifest:named])
    assert order[named + 1] == ("sync", "")
