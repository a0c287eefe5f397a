"""What an evaluation has done so far, on disk: a file that only grows, from which a stopped run goes on.

JSON lines. The first holds the settings that the results depend on; each other one a batch of a task: its number, and a
pair of numbers for each of its rows. A line is written at once and synced, so that whatever ends the program costs the
batch in work at most: a last line without its end is cut off. The numbers are read back bit for bit.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from jindo_core.errors import InputError

KIND = "jindo-core evaluation"
_VERSION = 1


class Journal:
    """The journal of one run; a context manager.

    Args:
        path: None keeps nothing. settings: all that the results depend on, as JSON has it.
        overwrite: whether a file of other settings is begun anew.
    Attributes:
        resumed: batches found there.
    Raises:
        InputError: the file can't be written, is another process's, no journal, or of other settings; it is as it was
            then.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self._path = path
        self._done: dict[tuple[str, int], list[list[Any]]] = {}
        self._file: FileIO | None = None
        if path is not None:
            self._file = _open(path)
            try:
                self._read(path, settings, overwrite)
            except BaseException:
                self._file.close()
                raise
        self.resumed = len(self._done)

    def _read(self, path: Path, settings: dict[str, Any], overwrite: bool) -> None:
        assert self._file is not None
        header = {"kind": KIND, "version": _VERSION, "settings": settings}
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines and content and not overwrite and not _line(header).startswith(content):
            raise InputError(f"{path} is no record of an evaluation: give another --output_path, or --overwrite")
        if lines and not self._take(path, lines, header, overwrite):
            lines = []
        if not lines:
            self._file.truncate(0)
            self._append(header)
            return
        self._file.truncate(len(whole))

    def _take(self, path: Path, lines: list[bytes], header: dict[str, Any], overwrite: bool) -> bool:
        """Take over the batches of an earlier run; False where it is to be begun anew."""
        try:
            found, *rows = [json.loads(line) for line in lines]
            fits = found["kind"] == KIND and found["version"] == _VERSION
            earlier = found["settings"]
            done = {(row["part"], row["batch"]): [[first, second] for first, second in row["rows"]] for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            if overwrite:
                return False
            raise InputError(
                f"{path} is no record of an evaluation, or was damaged ({type(error).__name__}): remove it, or give "
                "--overwrite"
            ) from None
        settings = json.loads(json.dumps(header["settings"]))
        if not fits or earlier != settings:
            if overwrite:
                return False
            names = [name for name in {**settings, **earlier} if settings.get(name) != earlier.get(name)]
            raise InputError(
                f"{path} is of a run with another {', '.join(names) or 'version'}: take its settings to go on with it, "
                "give another --output_path, or --overwrite to begin anew"
            )
        self._done = done
        return True

    def known(self, part: str, batch: int, count: int) -> list[list[Any]] | None:
        """The `count` rows of a batch that an earlier run had; None where it is to be done."""
        rows = self._done.get((part, batch))
        if rows is not None and len(rows) != count:
            raise InputError(f"{self._path} has {len(rows)} rows in a batch of {count}: it was damaged; remove it")
        return rows

    def add(self, part: str, batch: int, rows: Sequence[Sequence[Any]]) -> None:
        """Write a batch down; it is on the disk afterwards."""
        if self._file is not None:
            self._append({"part": part, "batch": batch, "rows": rows})

    def _append(self, row: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            rest = memoryview(_line(row))
            while rest:  # a full disk takes a part of it first
                rest = rest[os.write(self._file.fileno(), rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"{self._path} can't be written ({error.strerror}): make room; what it holds is kept, and the same "
                "command goes on from there"
            ) from error

    def finish(self) -> None:
        """Remove the file: the results are written."""
        if self._path is not None:
            self._path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()  # and so the lock


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _open(path: Path) -> FileIO:
    """The file, locked, at its beginning; writing goes to its end."""
    try:
        file = FileIO(path, "a+")
    except OSError as error:
        raise InputError(f"{path} can't be written ({error.strerror}): give another --output_path") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.fstat(file.fileno()).st_nlink > 0  # else another has just finished, and taken it away
    except BlockingIOError:
        free = False
    if not free:
        file.close()
        raise InputError(f"{path} is being written by another evaluation: wait for it, or give another name")
    file.seek(0)
    return file
