"""Rows between two passes: in temporary files without a name, which end with the process, however it ends."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from jindo_core.data.records import Record, Round
from jindo_core.refinery.pipeline import Item, Passing


def pack(row: Passing) -> bytes:
    """A row as bytes, smaller and faster than a pickle of its classes."""
    record = row.item.record
    rounds = tuple((each.instruction, each.input, each.output) for each in record.rounds)
    fields = (rounds, record.system, record.formatted, record.row, row.item.values, row.item.number, row.rewritten)
    return pickle.dumps(fields, protocol=5)


def unpack(packed: bytes) -> Passing:
    """The row that `pack` was given."""
    rounds, system, formatted, row, values, number, rewritten = pickle.loads(packed)
    record = Record(tuple(Round(*each) for each in rounds), system, formatted, row)
    return Passing(Item(record, values, number), rewritten)


class _Table:
    """Rows of bytes, all as wide, appended and then mapped."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._size = 0

    def append(self, data: bytes) -> None:
        self._file.write(data)
        self._size += len(data)

    def array(self, dtype: type, width: int) -> np.ndarray:
        """[rows, width], read only."""
        self._file.flush()
        shape = (self._size // (np.dtype(dtype).itemsize * width), width)
        if self._size == 0:
            return np.empty(shape, dtype)
        return np.memmap(self._file, dtype, mode="r", shape=shape)

    def close(self) -> None:
        self._file.close()


class Spill:
    """Packed rows in order, each to be read by its place, and the keys of those that a step is concerned with.

    In the system's temporary folder (TMPDIR). Memory: nothing a row but pages of mapped files, which the system takes
    back.
    """

    def __init__(self) -> None:
        self._rows: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._ends, self._keys, self._places, self._numbers = _Table(), _Table(), _Table(), _Table()
        self._end = 0
        self._count = 0
        self._width: int | None = None

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Sequence[bytes], keys: Sequence[bytes], numbers: Sequence[int]) -> None:
        """Rows as packed, each with its key (b"": none) and its number in the source.

        Raises:
            RuntimeError: keys of two widths: a defect of the step.
        """
        self._rows.write(b"".join(rows))
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64) + self._end
        self._ends.append(ends.tobytes())
        self._end = int(ends[-1]) if len(rows) else self._end
        with_key = [index for index, key in enumerate(keys) if key]
        widths = {len(keys[index]) for index in with_key} | ({self._width} if self._width else set())
        if len(widths) > 1:
            raise RuntimeError(f"keys of {sorted(widths)} bytes in one step: expected one width")
        self._width = widths.pop() if widths else None
        self._keys.append(b"".join(keys))
        self._places.append((np.array(with_key, np.int64) + self._count).tobytes())
        self._numbers.append(np.array([numbers[index] for index in with_key], np.int64).tobytes())
        self._count += len(rows)

    def finish(self) -> None:
        """Map what was appended; nothing may be appended afterwards."""
        self._rows.flush()
        self.ends = self._ends.array(np.int64, 1)[:, 0]
        self.keys = self._keys.array(np.uint8, self._width or 1)
        self.places = self._places.array(np.int64, 1)[:, 0]
        self.numbers = self._numbers.array(np.int64, 1)[:, 0]

    def read(self, start: int, stop: int) -> list[bytes]:
        """The packed rows at the places from `start` up to `stop`."""
        first = int(self.ends[start - 1]) if start else 0
        ends = self.ends[start:stop].tolist()
        self._rows.seek(first)
        block = self._rows.read(ends[-1] - first)
        return [block[a - first : b - first] for a, b in zip([first, *ends[:-1]], ends, strict=True)]

    def chunks(self, rows: int, size: int) -> Iterator[tuple[int, list[bytes]]]:
        """The place of a chunk's first row, and its rows: at most `rows`, and about `size` bytes."""
        start = 0
        while start < self._count:
            first = int(self.ends[start - 1]) if start else 0
            stop = int(np.searchsorted(self.ends[start : start + rows], first + size)) + start
            stop = min(max(stop, start + 1), self._count)
            yield start, self.read(start, stop)
            start = stop

    def close(self) -> None:
        self._rows.close()
        for table in (self._ends, self._keys, self._places, self._numbers):
            table.close()
