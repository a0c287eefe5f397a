"""JSON that must hold an object, and files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jindo_core.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: copy it there from where the folder came from") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): expected a JSON file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary file beside it, synced, then renamed over it."""
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)  # mkstemp's 0600 would hide the adapter from its user's group
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring every file of a folder, and the folder, to the disk; what is read afterwards comes from there, where
    the system lets go of its copies in memory."""
    for path in (*sorted(p for p in folder.iterdir() if p.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            if path is not folder:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def staged(target: Path, *, overwrite: bool, needs: int, marks: Sequence[str] = ()) -> Iterator[Path]:
    """A folder beside `target` to write into; when the block ends well it, or the one file in it, becomes `target`.

    Until then `target` stays as it was, whatever ends the program. What a killed run left is cleared by the next.

    Args:
        target: a folder, or with a suffix in `marks` (".gguf") a file: then the block writes `staged / target.name`.
        overwrite: whether something may be there already. A folder is replaced only where it holds one of `marks`
            and no folders, so that no other folder named by mistake is lost.
        needs: bytes that will be written; refused before anything is where the disk lacks them.
        marks: names of files that show what kind of folder `target` is, or the file's suffix.
    Raises:
        InputError: `target` may not be replaced, another process writes it, or the disk is full or fails.
    """
    target = target.expanduser().resolve()
    is_file = target.suffix != "" and target.suffix in marks
    _check_replaceable(target, overwrite, marks, is_file)
    stage = target.with_name(f".{target.name}.partial")
    with _locked(stage, target):
        try:
            _empty(stage)
            free = shutil.disk_usage(stage).free
            if free < needs:
                raise InputError(
                    f"{target} needs {needs / 1e9:,.3f} GB, and {free / 1e9:,.3f} GB are free there: make room, "
                    "or write elsewhere"
                )
            yield stage
            sync_folder(stage)
            if is_file:
                os.replace(stage / target.name, target)
            else:
                _exchange(stage, target)
            _sync(target.parent)
        except OSError as error:
            fault = error.strerror or str(error)
            raise InputError(f"{target} could not be written ({fault}): what was there is unchanged") from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)  # half-written, or what the target held before


@contextlib.contextmanager
def _locked(stage: Path, target: Path) -> Iterator[None]:
    """The folder `stage`, made if missing, with no other process in it. A lock ends with its process."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir(exist_ok=True)
        descriptor = os.open(stage, os.O_RDONLY)
    except OSError as error:
        raise InputError(
            f"{target} can't be made ({error.strerror}): expected a place that can be written to"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.path.samestat(os.fstat(descriptor), os.stat(stage))
    except (BlockingIOError, FileNotFoundError):
        free = False  # held by another, or taken away by one that has just ended
    try:
        if not free:
            raise InputError(f"{target} is being written by another process: wait for it, or give another name")
        yield
    finally:
        os.close(descriptor)


def _check_replaceable(target: Path, overwrite: bool, marks: Sequence[str], is_file: bool) -> None:
    if not target.exists() or (target.is_dir() and not is_file and not any(target.iterdir())):
        return
    if target.is_dir() == is_file:
        kind, other = ("a folder", "a file") if is_file else ("a file", "a folder")
        raise InputError(f"{target} is {kind}, expected {other}: give another name")
    if not overwrite:
        raise InputError(f"{target} is there already: give another name, or --overwrite to replace it")
    if not is_file and (
        any(path.is_dir() for path in target.iterdir()) or not any((target / mark).exists() for mark in marks)
    ):
        raise InputError(
            f"{target} does not look like a model (expected {' or '.join(marks)} in it, and no folders): "
            "it is not replaced, remove it yourself"
        )


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _exchange(stage: Path, target: Path) -> None:
    """Rename `stage` to `target`; a target that exists takes the name of `stage`, both in one step."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(stage, target)  # an empty folder gives way
        return
    at_cwd, exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and renameat2(at_cwd, os.fsencode(stage), at_cwd, os.fsencode(target), exchange) == 0:
        return
    # File systems without an exchange (NFS, some overlays): for a moment the old one bears another name.
    old = target.with_name(f".{target.name}.old")
    os.rename(target, old)
    try:
        os.rename(stage, target)
    except OSError:
        os.rename(old, target)
        raise
    os.rename(old, stage)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
