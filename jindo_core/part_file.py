"""Results of a long run, on the disk row by row as they are made: the next run goes on where a killed one stopped."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from jindo_core.errors import InputError


class PartFile:
    """JSON lines that only grow: a header with the run's digest, then a result each for row 1, 2, 3, …

    `append` returns when its results are on the disk. A line that a kill cut short is taken off by the next run. One
    process at a time holds it; the lock ends with its process.

    Args:
        path: the file; made where it is missing. digest: of everything that the results depend on.
        restart: throw away what is there.
    Attributes:
        done: results in it.
    Raises:
        InputError: another process holds it, it can't be written to, it is another run's, or it is damaged.
    """

    def __init__(self, path: Path, digest: str, *, restart: bool = False) -> None:
        self.path, self.done = path, 0
        try:
            self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115  (closed by `close`)
        except OSError as error:
            raise InputError(f"{path} can't be written to ({error.strerror}): give another --output_path") from None
        try:
            self._lock()
            if restart:
                self._file.truncate(0)
            self._begin(digest)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except BlockingIOError:
            held = False  # else: a run that has just ended took the file away
        if not held:
            raise InputError(f"{self.path} is being written by another process: wait for it, or give another name")

    def _begin(self, digest: str) -> None:
        """Read what is there, up to the last whole line."""
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break
            found = self._parse(line)
            if number == 0 and found.get("digest") != digest:
                if not self._file.readline().endswith(b"\n"):
                    break  # no row of it: nothing is lost
                raise InputError(
                    f"{self.path} holds the rows of a run with other settings, data or weights: run that one to its "
                    "end, or --restart to throw its rows away"
                )
            if number and found.get("row") != number:
                raise self._damaged()
            whole, self.done = whole + len(line), number
        self._file.truncate(whole)
        if whole == 0:
            self._write([{"digest": digest}])

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError:
            raise self._damaged() from None
        if not isinstance(found, dict):
            raise self._damaged()
        return found

    def _damaged(self) -> InputError:
        return InputError(f"{self.path} is damaged (no result of row {self.done + 1}): --restart throws it away")

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        # One call to the system: what a kill can cut is the last line.
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def append(self, results: Sequence[dict[str, Any]]) -> None:
        """Add the results of the rows that follow, in order; their "row" is put in here."""
        self._write([{"row": self.done + i, **result} for i, result in enumerate(results, 1)])
        self.done += len(results)

    def results(self) -> Iterator[dict[str, Any]]:
        """All results, in the rows' order, read from the disk as they are asked for."""
        with open(self.path, "rb") as file:
            next(file)
            for line in file:
                yield self._parse(line)

    def remove(self) -> None:
        """Take the file away, once its results are safe elsewhere."""
        self.path.unlink()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
