"""What a long run has done so far, on the disk: a file that only grows, from which a stopped run goes on.

JSON lines, each with its CRC. The first holds the settings that the results depend on, each other one the results of a
batch under its key; they are read back bit for bit. A line is on the disk when `add` returns, so that whatever ends the
program costs one batch of work: a last line without its end is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from jindo_core.errors import InputError

_VERSION = {"part_file": 1}
_CRC = b', "crc32": '


class PartFile:
    """The part file of one run; a context manager. One process at a time holds it; the lock ends with its process.

    Args:
        path: made where it is missing; None keeps nothing. settings: all that the results depend on, as JSON has it.
        restart: throw away what is there. overwrite: do so with what is no part file, damaged, or another run's.
        flag: the one of the two that the command has.
    Attributes:
        resumed: batches found there.
    Raises:
        InputError: the file can't be written, another process holds it, it is no part file, damaged, or of other
            settings; it is as it was then.
    """

    def __init__(
        self, path: Path | None, settings: dict[str, Any], *, flag: str, restart: bool = False, overwrite: bool = False
    ) -> None:
        self._path, self._flag, self._end = path, flag, 0
        self._places: dict[str, tuple[int, int]] = {}  # a batch's line: where it begins, and its bytes
        self._file = None if path is None else _open(path)
        if self._file is not None:
            try:
                self._begin(self._file, json.loads(json.dumps(_VERSION | settings)), restart, overwrite)
            except BaseException:
                self._file.close()
                raise
        self.resumed = len(self._places)

    def _begin(self, file: BinaryIO, header: dict[str, Any], restart: bool, overwrite: bool) -> None:
        try:
            if not restart:
                self._read(file, header)
        except InputError:
            if not overwrite:
                raise
            self._places, self._end = {}, 0
        file.truncate(self._end)
        if self._end == 0:
            self._append(file, header)

    def _read(self, file: BinaryIO, header: dict[str, Any]) -> None:
        """Find the batches, up to the last whole line."""
        for line in file:
            if not line.endswith(b"\n") and (self._end or _line(header).startswith(line)):
                break
            found = self._parsed(line)
            if self._end:
                self._places[found["key"]] = self._end, len(line)
            elif found != header:
                if not file.readline().endswith(b"\n"):
                    break  # no batch of it: nothing is lost
                names = [name for name in {**header, **found} if header.get(name) != found.get(name)]
                raise InputError(
                    f"{self._path} is of a run with another {', '.join(names)}: take its settings to go on with it, "
                    f"give another --output_path, or {self._flag} to throw it away"
                )
            self._end += len(line)

    def _parsed(self, line: bytes) -> dict[str, Any]:
        text, _, crc = line.rpartition(_CRC)
        if crc != b"%d}\n" % zlib.crc32(text):
            raise InputError(
                f"{self._path} is no part file, or was damaged (byte {self._end}): give another --output_path, or "
                f"{self._flag} to throw it away"
            )
        found: dict[str, Any] = json.loads(text + b"}")
        return found

    @property
    def batches(self) -> int:
        """Batches that it holds now."""
        return len(self._places)

    def get(self, key: str) -> list[Any] | None:
        """A batch's results, read from the disk; None where they are to be made."""
        if self._file is None or key not in self._places:
            return None
        start, size = self._places[key]
        rows: list[Any] = self._parsed(os.pread(self._file.fileno(), size, start))["rows"]
        return rows

    def results(self) -> Iterator[Any]:
        """All batches' results, in the order in which they were added."""
        for key in self._places:
            yield from self.get(key) or ()

    def add(self, key: str, rows: Sequence[Any]) -> None:
        """Write a batch's results down; they are on the disk afterwards."""
        if self._file is not None:
            start = self._end
            self._append(self._file, {"key": key, "rows": rows})
            self._places[key] = start, self._end - start

    def _append(self, file: BinaryIO, entry: dict[str, Any]) -> None:
        line = _line(entry)
        try:
            rest = memoryview(line)
            while rest:  # a full disk takes a part of it first
                rest = rest[os.write(file.fileno(), rest) :]
            os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"{self._path} can't be written ({error.strerror}): make room; what it holds is kept, and the same "
                "command goes on from there"
            ) from error
        self._end += len(line)

    def remove(self) -> None:
        """Take the file away, once the run's results are safe elsewhere."""
        if self._path is not None:
            self._path.unlink()

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()  # and so the lock


def _line(entry: dict[str, Any]) -> bytes:
    # Names of files may hold lone surrogates, which json reads back.
    text = json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass")[:-1]
    return b"%b%b%d}\n" % (text, _CRC, zlib.crc32(text))


def _open(path: Path) -> BinaryIO:
    """The file, locked, at its beginning; writing goes to its end."""
    try:
        file = open(path, "a+b")  # noqa: SIM115  (closed by `PartFile`)
    except OSError as error:
        raise InputError(f"{path} can't be written ({error.strerror}): give another --output_path") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        held = False  # the latter: a run that has just ended took the file away
    if not held:
        file.close()
        raise InputError(f"{path} is being written by another process: wait for it, or give another --output_path")
    file.seek(0)
    return file
