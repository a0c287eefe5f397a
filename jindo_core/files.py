"""JSON that must hold an object, and files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from jindo_core.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: copy it there from where the folder came from") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): expected a JSON file") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, thousands of digits, or nested too deep
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_bytes(path: Path) -> bytes:
    """A small file's contents. Raises InputError where it can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): expected a readable file") from None


_BLOCKS, _BLOCK = 256, 1 << 14


def content_digest(path: Path) -> str:
    """SHA-256 of what a file, or the files of a folder, hold: sizes, the first MiB (in it the header), and 256 blocks
    of 16 KiB from first to last; files below 4 MiB whole. Times and the file's or folder's own name don't matter.

    Another model of the same shapes differs nearly everywhere: reading gigabytes would tell no more.

    Raises:
        InputError: a file that can't be read.
    """
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    whole = hashlib.sha256()
    for each in files:
        try:
            with open(each, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                whole.update(json.dumps([each.name if each is not path else "", size]).encode())
                if size <= _BLOCKS * _BLOCK:
                    whole.update(file.read())
                    continue
                whole.update(file.read(1 << 20))
                for number in range(_BLOCKS):
                    file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                    whole.update(file.read(_BLOCK))
        except OSError as error:
            raise InputError(f"{each} can't be read ({error.strerror}): expected a readable file") from None
    return whole.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` to write into; when the block ends well it is synced and renamed over `path`.

    Otherwise it is gone, and what was at `path` unchanged. It has no name until then, so that a killed process leaves
    nothing; where the file system knows no such files (NFS) it is called `.NAME.` and some letters, and stays behind.
    """
    descriptor, scratch = _scratch(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)  # mkstemp's 0600 would hide the adapter from its user's group
            if scratch is None:
                scratch = f"{path.parent}/.{path.name[:200]}.{secrets.token_hex(4)}"
                # With a folder's descriptor Python calls linkat, which follows the link that /proc has for the file.
                os.link(f"/proc/self/fd/{file.fileno()}", scratch, src_dir_fd=file.fileno())
        os.replace(scratch, path)
    except BaseException:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
        raise
    sync_names(path.parent)


def _scratch(path: Path) -> tuple[int, str | None]:
    """A file beside `path`, open: without a name where that can be, else with one."""
    if os.path.isdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            return os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o600), None
    return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")


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

    Until then `target` stays as it was, whatever ends the program. What a killed run left is cleared by the next. On
    file systems that can't exchange two names (NFS, some overlays) a kill between two renames leaves a folder's old
    contents under another name beside it, from where the next run takes them back.

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
    stage, made = target.with_name(f".{target.name}.partial"), None
    with _locked(stage, target):
        try:
            if not is_file and _recover(target, marks):
                _check_replaceable(target, overwrite, marks, is_file)
            _empty(stage)
            free = shutil.disk_usage(stage).free
            if free < needs:
                raise InputError(
                    f"{target} needs {needs / 1e9:,.3f} GB, and {free / 1e9:,.3f} GB are free there: make room, "
                    "or write elsewhere"
                )
            yield stage
            sync_folder(stage)
            made = os.stat(stage / target.name if is_file else stage)
            if is_file:
                os.replace(stage / target.name, target)
            else:
                exchange(stage, target)
            sync_names(target.parent)
        except OSError as error:
            raise InputError(_failure(error, stage, target, made)) from error
        finally:
            _remove(stage)  # half-written, or what the target held before


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A folder that no other process holds meanwhile; nothing is written, and a lock ends with its process.

    Raises:
        InputError: another process holds it, or its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is being written by another run: wait for it, or give another folder") from None
        except OSError as error:
            raise InputError(f"{folder} can't be locked ({error.strerror}): give a folder on another disk") from None
        yield
    finally:
        os.close(descriptor)


def _failure(error: OSError, stage: Path, target: Path, made: os.stat_result | None) -> str:
    """What to say of a failed write; `made` is what should have become the target, None until it was complete."""
    fault, path = error.strerror or str(error), error.filename
    standing = "what was there is unchanged"
    if made is not None and target.exists() and os.path.samestat(os.stat(target), made):
        return f"{target} is written and in its place, but was not brought safely to the disk ({fault}): write it again"
    if not target.exists() and (old := _aside(target)).exists():
        standing = f"what was there is at {old}, from where the next run takes it back"
    elsewhere = isinstance(path, str) and error.filename2 is None and not Path(path).is_relative_to(stage)
    if made is None and elsewhere:
        return f"{path} can't be read ({fault}), which {target} is made from: {standing}"
    return f"{target} could not be written ({fault}): {standing}"


def _aside(target: Path) -> Path:
    """Where `exchange` puts the old target for a moment, on file systems that can't exchange two names."""
    return target.with_name(f".{target.name}.old")


def _recover(target: Path, marks: Sequence[str]) -> bool:
    """Undo what a kill within `exchange` left: a target that is missing comes back, an old one that was replaced goes.

    Returns:
        Whether the target came back.
    """
    old = _aside(target)
    if not _is_model(old, marks):
        return False
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        shutil.rmtree(old)
        return False
    os.rename(old, target)  # an empty folder gives way
    return True


def _remove(stage: Path) -> None:
    """Remove a folder; where that fails, say so, for the target itself is well or was told of."""
    try:
        if stage.exists():
            shutil.rmtree(stage)
    except OSError as error:
        warnings.warn(f"{stage} could not be removed ({error.strerror}): remove it yourself", stacklevel=4)


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
    if not is_file and not _is_model(target, marks):
        raise InputError(
            f"{target} does not look like a model (expected {' or '.join(marks)} in it, and no folders): "
            "it is not replaced, remove it yourself"
        )


def _is_model(folder: Path, marks: Sequence[str]) -> bool:
    """Whether a folder holds one of `marks`, and no folders."""
    if not folder.is_dir() or any(path.is_dir() for path in folder.iterdir()):
        return False
    return any((folder / mark).exists() for mark in marks)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def exchange(stage: Path, target: Path) -> None:
    """Rename `stage` to `target`; a target that exists takes the name of `stage`, both in one step."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(stage, target)  # an empty folder gives way
        return
    at_cwd, exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and renameat2(at_cwd, os.fsencode(stage), at_cwd, os.fsencode(target), exchange) == 0:
        return
    # File systems without an exchange (NFS, some overlays): for a moment the old one bears another name.
    old = _aside(target)
    os.rename(target, old)
    try:
        os.rename(stage, target)
    except OSError:
        os.rename(old, target)
        raise
    os.rename(old, stage)


def sync_names(folder: Path) -> None:
    """Bring what was renamed, made or removed in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
