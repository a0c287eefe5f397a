"""Outputs that are whole or not there, whatever ends the program (`jindo_core.files.staged`)."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest

from jindo_core import files
from jindo_core.errors import InputError
from jindo_core.files import staged

MARKS = ("config.json",)


@pytest.fixture
def old(tmp_path):
    """A folder that holds a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    return folder


def held(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def write(target, text="new", **options):
    with staged(target, **{"overwrite": False, "needs": 0, "marks": MARKS} | options) as folder:
        (folder / "config.json").write_text(text)


def only(folder, *names):
    """Nothing half-written lies beside the targets."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


class Nothing:
    """A C library as on a file system that can't exchange two names."""

    renameat2 = None


def without_exchange(monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: Nothing())


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_target_is_replaced_whole(old, tmp_path, monkeypatch, exchanges):
    if not exchanges:
        without_exchange(monkeypatch)
    (old / "weights").write_text("old")
    write(old, overwrite=True)
    assert held(old) == {"config.json": "new"}
    write(tmp_path / "deep" / "er" / "fresh")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert held(tmp_path / "empty") == {"config.json": "new"}
    only(tmp_path, "model", "deep", "empty")


def test_a_single_file(tmp_path):
    target = tmp_path / "model.gguf"
    for text in ("one", "two"):
        with staged(target, overwrite=text == "two", needs=0, marks=(".gguf",)) as folder:
            (folder / "model.gguf").write_text(text)
        assert target.read_text() == text
    only(tmp_path, "model.gguf")
    with pytest.raises(InputError, match="is there already"):
        write(target, marks=(".gguf",))
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(InputError, match="is a folder, expected a file"):
        write(tmp_path / "folder.gguf", marks=(".gguf",), overwrite=True)


def test_what_may_not_be_replaced(old, tmp_path):
    with pytest.raises(InputError, match="is there already: give another name, or --overwrite"):
        write(old)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match=r"does not look like a model \(expected config.json in it, and no folders\)"):
        write(tmp_path / "home", overwrite=True)
    (old / "more").mkdir()
    with pytest.raises(InputError, match="does not look like a model"):
        write(old, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file, expected a folder"):
        write(tmp_path / "file", overwrite=True)
    with pytest.raises(InputError, match="can't be made"):
        write(tmp_path / "file" / "below")
    with pytest.raises(InputError, match=r"needs 1,000,000.* GB, and .* GB are free there"):
        write(tmp_path / "large", needs=10**15)
    only(tmp_path, "model", "home", "file")
    assert (old / "config.json").read_text() == "old"


@pytest.mark.parametrize(
    ("fault", "expected", "message"),
    [
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (InputError("wrong"), InputError, "wrong"),
        (OSError(28, "No space left on device"), InputError, "No space left on device.: what was there is unchanged"),
    ],
)
def test_an_end_on_the_way_changes_nothing(old, tmp_path, fault, expected, message):
    def half():
        with staged(old, overwrite=True, needs=0, marks=MARKS) as folder:
            (folder / "config.json").write_text("half")
            raise fault

    with pytest.raises(expected, match=message):
        half()
    assert held(old) == {"config.json": "old"}
    only(tmp_path, "model")


def test_a_disk_that_takes_no_more(old, tmp_path):
    """The kernel itself refuses to let a file grow past a limit, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match=r"could not be written .File too large.: what was there is unchanged"):
            write(old, "x" * 200_000, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert held(old) == {"config.json": "old"}
    only(tmp_path, "model")


def child(target, *, then):
    """A process that is writing `target`; started, and inside."""
    code = (
        "import sys, pathlib; from jindo_core.files import staged\n"
        "with staged(pathlib.Path(sys.argv[1]), overwrite=True, needs=0, marks=('config.json',)) as folder:\n"
        "    (folder / 'config.json').write_text('half'); print('inside', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "inside\n"
    try:
        then(process)
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(20)


def test_kill_9_leaves_the_old_target_and_the_next_run_clears_up(old, tmp_path):
    def kill(process):
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
        assert process.returncode == -signal.SIGKILL

    child(old, then=kill)
    assert held(old) == {"config.json": "old"}
    only(tmp_path, "model", ".model.partial")
    (tmp_path / ".model.partial" / "leftover").write_text("half")
    write(old, overwrite=True)
    assert held(old) == {"config.json": "new"}
    only(tmp_path, "model")


def kill_at_rename(target, number):
    """A run that replaces `target` and is killed just before its rename of that number, of two names that can't be
    exchanged: the old one aside, the new one in, the old one to the stage."""
    code = (
        "import os, pathlib, signal, sys; from jindo_core import files\n"
        "files.ctypes.CDLL = lambda *_, **__: type('Nothing', (), {'renameat2': None})\n"
        "real, done = os.rename, []\n"
        "def rename(a, b):\n"
        "    done.append(a)\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if len(done) == int(sys.argv[2]) else real(a, b)\n"
        "os.rename = rename\n"
        "with files.staged(pathlib.Path(sys.argv[1]), overwrite=True, needs=0, marks=('config.json',)) as folder:\n"
        "    (folder / 'config.json').write_text('new')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(target), str(number)], check=False)
    assert ended.returncode == -signal.SIGKILL


def test_kill_9_between_the_renames_where_names_can_not_be_exchanged(old, tmp_path, monkeypatch):
    without_exchange(monkeypatch)
    kill_at_rename(old, 2)
    only(tmp_path, ".model.old", ".model.partial")
    assert held(tmp_path / ".model.old") == {"config.json": "old"}
    with pytest.raises(InputError, match="is there already"):  # the next run has it back
        write(old)
    assert held(old) == {"config.json": "old"}
    only(tmp_path, "model")
    kill_at_rename(old, 2)
    write(old, "next", overwrite=True)
    assert held(old) == {"config.json": "next"}
    only(tmp_path, "model")
    kill_at_rename(old, 3)
    assert held(old) == {"config.json": "new"}
    only(tmp_path, "model", ".model.old")
    write(old, "next", overwrite=True)
    assert held(old) == {"config.json": "next"}
    only(tmp_path, "model")


def test_a_folder_that_only_bears_such_a_name_stays(old, tmp_path):
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "thesis.txt").write_text("dear")
    write(old, overwrite=True)
    assert held(tmp_path / ".model.old") == {"thesis.txt": "dear"}


def test_a_failed_rename_says_where_the_old_one_is(old, tmp_path, monkeypatch):
    without_exchange(monkeypatch)
    real, failing = os.rename, [False, True, True]

    def rename(source, target):
        if failing.pop(0):
            raise OSError(5, "Input/output error", str(source), None, str(target))
        real(source, target)

    monkeypatch.setattr(files.os, "rename", rename)
    with pytest.raises(InputError, match=r"written .Input/output error.: what was there is at .*\.model\.old"):
        write(old, overwrite=True)
    monkeypatch.setattr(files.os, "rename", real)
    only(tmp_path, ".model.old")
    with pytest.raises(InputError, match="is there already"):
        write(old)
    assert held(old) == {"config.json": "old"}


@pytest.mark.parametrize("single", [True, False])
def test_a_failure_after_the_exchange_does_not_say_unchanged(old, tmp_path, monkeypatch, single):
    target = tmp_path / "model.gguf" if single else old

    def fails(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "sync_names", fails)
    message = r"is written and in its place, but was not brought safely to the disk .Input/output error."
    with (
        pytest.raises(InputError, match=message) as caught,
        staged(target, overwrite=True, needs=0, marks=(".gguf",) if single else MARKS) as folder,
    ):
        (folder / (target.name if single else "config.json")).write_text("new")
    assert "unchanged" not in str(caught.value)
    assert (target if single else target / "config.json").read_text() == "new"


def test_a_source_that_can_not_be_read_is_named(old, tmp_path):
    with (
        pytest.raises(InputError, match=r"source\.txt can't be read .No such file.*unchanged"),
        staged(old, overwrite=True, needs=0, marks=MARKS),
    ):
        (tmp_path / "source.txt").read_text()
    with (
        pytest.raises(InputError, match=r"model could not be written .No such file.*unchanged"),
        staged(old, overwrite=True, needs=0, marks=MARKS) as folder,
    ):
        (folder / "sub" / "x").write_text("x")


def test_what_can_not_be_removed_is_said(old, tmp_path, monkeypatch):
    real = files.shutil.rmtree

    def fails(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files.shutil, "rmtree", fails)
    with pytest.warns(UserWarning, match=r"\.model\.partial could not be removed .Permission denied."):
        write(old, overwrite=True)
    assert held(old) == {"config.json": "new"}
    monkeypatch.setattr(files.shutil, "rmtree", real)
    write(old, "next", overwrite=True)
    only(tmp_path, "model")


def test_two_writers_of_one_target(old, tmp_path):
    def write_too(process):
        with pytest.raises(InputError, match="is being written by another process"):
            write(old, overwrite=True)
        assert (tmp_path / ".model.partial" / "config.json").read_text() == "half"  # the other's, untouched

    child(old, then=write_too)
    assert held(old) == {"config.json": "half"}  # the first came to its end
    only(tmp_path, "model")


def test_everything_is_on_the_disk_before_it_is_renamed(old, monkeypatch):
    """fsync of the file and its folder, then the exchange, then fsync of the folder above."""
    seen = []
    names = {}
    real_open, real_sync, real_exchange = os.open, os.fsync, files.exchange

    def opened(path, *arguments, **options):
        descriptor = real_open(path, *arguments, **options)
        names[descriptor] = os.path.basename(path)
        return descriptor

    monkeypatch.setattr(files.os, "open", opened)
    monkeypatch.setattr(files.os, "fsync", lambda d: (seen.append(names[d]), real_sync(d)))
    monkeypatch.setattr(files, "exchange", lambda *pair: (seen.append("exchange"), real_exchange(*pair)))
    write(old, overwrite=True)
    assert seen == ["config.json", ".model.partial", "exchange", old.parent.name]
