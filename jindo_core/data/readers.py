"""Raw rows of data files: JSON, JSON lines, CSV, TSV and Parquet, one at a time, in bounded memory.

A file is never held whole. What bounds memory is its largest row: up to `LONGEST_ROW` bytes are taken for one, so that
a quote that is never closed costs an error and not the machine's memory.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from jindo_core.data.sniffing import require_delimiter, require_kind
from jindo_core.errors import InputError
from jindo_core.hub import DATA_ENDINGS, resolve_data

LONGEST_ROW = 64 << 20
"""Bytes of a row of JSON."""
LONGEST_CELL = 16 << 20
"""Characters of a cell of CSV: Python's csv module takes four bytes for each."""
SAMPLE = 16
"""Rows at a file's start that its columns are read from."""
DATA_FORM = '{"instruction": …, "input": …, "output": …}'
_CHUNK = 256 << 10
_TAIL = 16
"""A cut within an escape, a literal or a number shows at most so many characters before the cut."""
_SPACE = re.compile(r"[ \t\n\r]*")
_METADATA = {"dataset_infos.json", "dataset_info.json", "state.json"}
"""What the `datasets` library keeps beside rows."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row as its file has it.

    Attributes:
        number: counts from 1 within its file.
        where: "row 3 (line 4)"; without the line where a file has none.
        values: column -> value. Text alone in CSV and TSV; in JSON and Parquet whatever is there. A number that is
            no number (NaN) is None, as for pandas, which writes it for a value that is missing.
        path: its file.
    """

    number: int
    where: str
    values: dict[str, Any]
    path: Path = Path()

    @property
    def place(self) -> str:
        """ "data.json, row 3 (line 4)", for messages."""
        return f"{self.path}, {self.where}"


class RowSource:
    """The rows of one file, or of several, in order; each iteration reads anew.

    Attributes:
        paths: the files, each of an ending in `DATA_ENDINGS`, with .gz after it or not (not Parquet).
        passed_over: what else lay in the folder.
    """

    def __init__(self, paths: tuple[Path, ...], passed_over: tuple[Path, ...] = ()) -> None:
        self.paths = paths
        self.passed_over = passed_over
        self._sizes = tuple(_size(path) for path in paths)
        self._before = 0  # bytes of the files that are done
        self._position: Callable[[], int] = lambda: 0

    def __iter__(self) -> Iterator[Row]:
        """Rows as they come. What is wrong with a file shows where it lies.

        Raises:
            InputError: a file without rows, one that can't be read, invalid UTF-8 (byte), broken JSON or CSV (line),
                a row that is no object, has a key twice, or is longer than LONGEST_ROW.
        """
        self._before = 0
        for path, size in zip(self.paths, self._sizes, strict=True):
            found = False
            for number, (where, values) in enumerate(self._rows(path), 1):
                found = True
                if not isinstance(values, dict):
                    raise InputError(f"{path}, {where} is a {type(values).__name__}, expected an object {DATA_FORM}")
                yield Row(number, where, values, path)
            if not found:
                raise InputError(f"{path} has no rows: expected at least one {DATA_FORM}")
            self._position = lambda: 0
            self._before += size

    def parts(self) -> Iterator[RowSource]:
        """A source for each file."""
        for path in self.paths:
            yield RowSource((path,))

    def head(self, count: int = SAMPLE) -> list[Row]:
        """The first rows."""
        with contextlib.closing(iter(self)) as rows:  # type: ignore[type-var]
            return list(itertools.islice(rows, count))

    def columns(self) -> tuple[str, ...]:
        """Columns of the first rows, in the order in which they appear."""
        return tuple(dict.fromkeys(name for row in self.head() for name in row.values))

    def digest(self) -> str:
        """SHA-256 of what the files hold, and of how they are read, in hexadecimal; names and dates don't matter."""
        whole = hashlib.sha256()
        for path in self.paths:
            try:
                with path.open("rb") as file:
                    whole.update(kind_of(path).encode() + hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise InputError(f"{path} can't be read ({error.strerror}): expected a data file") from error
        return whole.hexdigest()

    @property
    def size_bytes(self) -> int:
        """All files, as they lie on the disk."""
        return sum(self._sizes)

    @property
    def bytes_read(self) -> int:
        """How far the latest iteration has come, of `size_bytes`."""
        return self._before + self._position()

    def _rows(self, path: Path) -> Iterator[tuple[str, Any]]:
        """Where each row stands, and the row."""
        kind = kind_of(path)
        try:
            packed = path.name.lower().endswith(".gz")
            if not packed:
                require_kind(path, kind)
            if kind == "parquet":
                yield from self._parquet_rows(path)
                return
            with path.open("rb") as raw, gzip.open(raw) if packed else contextlib.nullcontext(raw) as file:
                self._position = lambda: 0 if raw.closed else raw.tell()
                if kind in ("csv", "tsv"):
                    yield from _table_rows(path, file, "\t" if kind == "tsv" else ",")
                elif _first_byte(path, file) == b"[":
                    yield from _list_rows(_Window(path, file))
                else:
                    yield from _line_rows(path, file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path} is no whole gzip file ({error}): copy it again") from error
        except OSError as error:
            raise InputError(f"{path} can't be read ({error.strerror or error}): expected a data file") from error

    def _parquet_rows(self, path: Path) -> Iterator[tuple[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # Otherwise the whole file is read ahead, and without a buffer a row group's columns are read whole.
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                names = file.schema_arrow.names
                _check_names(f"{path}", names)
                total, size, number = file.metadata.num_rows, _size(path), 0
                self._position = lambda: size * number // max(total, 1)
                # Arrow's pool, and each thread's part of it, would keep what earlier row groups took.
                for batch in file.iter_batches(batch_size=256, use_threads=False):
                    pa.default_memory_pool().release_unused()
                    for values in batch.to_pylist():
                        number += 1
                        yield f"row {number}", {name: None if v != v else v for name, v in values.items()}
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            fault = " ".join(str(error).split())
            raise InputError(f"{path} is no Parquet file that can be read ({fault}): write it again") from error


def open_rows(path: str | Path) -> RowSource:
    """Rows of a file, a folder of files, files that a pattern names, or a data set of the Hugging Face Hub.

    Args:
        path: a file whose name ends as `DATA_ENDINGS` say, in .gz after that if it likes (not Parquet). A folder: all
            such files in it, by name (not those in its folders). "data/train-*.parquet". A Hub id, `owner/name`.
    Raises:
        InputError: nothing there, an ending that is not known, a folder without such files, no network.
    """
    place = Path(path).expanduser()
    try:
        place.stat()
    except OSError as error:
        if isinstance(error, NotADirectoryError | PermissionError):
            raise InputError(f"{place} can't be read ({error.strerror}): expected a data file") from error
        place = resolve_data(str(path))
    if place.is_dir():
        entries = sorted(place.iterdir(), key=lambda entry: entry.name)
        files = tuple(e for e in entries if e.is_file() and kind_of(e) and e.name not in _METADATA and e.name[0] != ".")
        if not files:
            raise InputError(f"{place} is a folder that holds no data file: expected {', '.join(DATA_ENDINGS)} in it")
        return RowSource(files, tuple(entry for entry in entries if entry not in files))
    files = (place,) if place.exists() else tuple(Path(found) for found in sorted(glob(str(place))))
    for file in files:
        if not kind_of(file):
            raise InputError(f"{file}: its ending is not known, expected {', '.join(DATA_ENDINGS)}; rename it")
        if not file.is_file():
            raise InputError(f"{file} is no plain file: expected one that can be read more than once")
    return RowSource(files)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): expected a data file") from error


def kind_of(path: Path) -> str:
    """ "json", "csv", …; "" for what is no data file."""
    name = path.name.lower().removesuffix(".gz")
    ending = next((ending for ending in DATA_ENDINGS if name.endswith(ending)), "")
    return "" if ending == ".parquet" and path.name.lower().endswith(".gz") else ending.lstrip(".")


# --- JSON ------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")  # json would keep the last and lose the others
    return values


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _line_rows(path: Path, file: BufferedIOBase) -> Iterator[tuple[str, Any]]:
    number, lines = 0, enumerate(_lines(path, file), 1)
    for line, text in lines:
        if not text.strip():
            continue
        number += 1
        where = f"row {number} (line {line})"
        try:
            value = _DECODER.decode(text.rstrip())  # with its end a cut line's error would lie in the next one
        except json.JSONDecodeError as error:
            cut = text.lstrip().startswith("{") and error.pos >= len(text.rstrip())
            if number == 1 and cut and any(more.strip() for _, more in lines):
                raise InputError(
                    f"{path}, line {line}: one object over several lines, expected a list of objects or one whole "
                    "object on each line; of a list within it, under data: jq -c '.data[]' FILE > rows.jsonl"
                ) from error
            raise _broken(path, line + error.lineno - 1, error.colno, error.msg) from error
        except (ValueError, RecursionError) as error:
            raise _refused(path, where, error) from error
        yield where, value


def _list_rows(window: _Window) -> Iterator[tuple[str, Any]]:
    window.skip("[")
    number = 0
    more = window.next_character() != "]"
    while more:
        number += 1
        yield f"row {number}", window.value(f"row {number}")
        more = window.next_character() == ","
        if more:
            window.skip(",")
    window.skip("]")
    if window.next_character():
        raise window.broken("Extra data", window.at)


class _Window:
    """A stretch of a file's text that moves on: JSON's own parser is asked for the next value, and again with more text
    where the value goes beyond the stretch.

    ijson, whose C library is faster, says neither line nor column, and without a word keeps one of two equal keys and
    makes "?" of half a surrogate pair; json.load holds the whole file (docs/log.md).
    """

    def __init__(self, path: Path, file: BufferedIOBase) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.ended = "", 0, False
        self._line, self._column = 1, 1  # of text[0]
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._bytes, self._pending = 0, 0

    def more(self, size: int) -> None:
        """Let go of what lies behind, and read on."""
        gone = self.text[: self.at]
        self._line, self._column = self.position(self.at)
        data = self.file.read(size)
        if self._bytes == 0 and data.startswith(codecs.BOM_UTF8):
            self._bytes, data = 3, data[3:] + self.file.read(3)
        self.ended = not data
        try:
            new = self._decode(data, self.ended)
        except UnicodeDecodeError as error:
            # The decoder kept the start of a character that the last stretch cut.
            kept = len(error.object) - len(data)
            raise _no_utf8(self.path, self._bytes - kept + error.start, error.object[error.start]) from error
        self._bytes += len(data)
        self.text, self.at = self.text[len(gone) :] + new, 0

    def next_character(self) -> str:
        """The next one that is no space, or "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more(_CHUNK)

    def skip(self, character: str) -> None:
        """Go past it."""
        if self.next_character() != character:
            raise self.broken("Expecting ',' delimiter", self.at)
        self.at += 1

    def value(self, where: str) -> Any:
        """The value that begins at the next character."""
        self.next_character()
        size = _CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                inside = error.pos < len(self.text) - _TAIL and not error.msg.startswith("Unterminated string")
                if self.ended or inside:
                    raise self.broken(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise _refused(self.path, f"{where}, line {self.position(self.at)[0]}", error) from error
            else:
                self.at = end  # of a number perhaps not the end, but that is no row
                return value
            if len(self.text) - self.at > LONGEST_ROW:
                raise InputError(_too_long(self.path, self.position(self.at)[0]))
            self.more(size)
            size *= 2

    def position(self, index: int) -> tuple[int, int]:
        """Line and column of text[index], from 1."""
        lines = self.text.count("\n", 0, index)
        start = self.text.rfind("\n", 0, index) + 1
        return self._line + lines, index - start + (1 if lines else self._column)

    def broken(self, message: str, index: int) -> InputError:
        """The error for what stands at text[index]."""
        return _broken(self.path, *self.position(index), message)


def _first_byte(path: Path, file: BufferedIOBase) -> bytes:
    """The first that is no space, which tells a list from lines."""
    head = file.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    while not head:
        data = file.read(_CHUNK)
        if not data:
            raise InputError(f"{path} is empty: expected rows {DATA_FORM}")
        head = data.lstrip()
    file.seek(0)
    return head[:1]


def _broken(path: Path, line: int, column: int, message: str) -> InputError:
    return InputError(
        f"{path}, line {line}, column {column}: broken JSON ({message}); expected a list of objects, "
        "or one whole object on each line"
    )


def _refused(path: Path, where: str, error: ValueError | RecursionError) -> InputError:
    # Python's own words for thousands of digits go on with advice for programmers.
    said = "JSON nested too deep" if isinstance(error, RecursionError) else str(error).split(";")[0]
    return InputError(f"{path}, {where}: {said}, expected rows {DATA_FORM}")


# --- lines and tables ------------------------------------------------------------------------------------


def _lines(path: Path, file: BufferedIOBase) -> Iterator[str]:
    """A file's lines with their ends. Cut at newlines alone: text may hold U+2028 and U+0085 as they are."""
    offset = 0
    for line in itertools.count(1):
        data = file.readline(LONGEST_ROW)
        if not data:
            return
        if len(data) == LONGEST_ROW and data[-1:] != b"\n":
            raise InputError(_too_long(path, line))
        mark = 3 if offset == 0 and data.startswith(codecs.BOM_UTF8) else 0  # Windows editors put one first
        try:
            yield str(memoryview(data)[mark:], "utf-8")
        except UnicodeDecodeError as error:
            raise _no_utf8(path, offset + mark + error.start, data[mark + error.start]) from error
        offset += len(data)


def _table_rows(path: Path, file: BufferedIOBase, delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of RFC 4180, the first of which names the columns. Blank lines are passed over."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))  # the module's 131,072 is less than a long answer
    reader = csv.reader(_lines(path, file), delimiter=delimiter, strict=True)
    header: list[str] = []
    number, line = 0, 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                require_delimiter(path, header, delimiter)
                _check_names(f"{path}, line {start}", header)
                continue
            number += 1
            where = f"row {number} (line {start})"
            if len(cells) != len(header):
                raise InputError(
                    f"{path}, {where} has {len(cells)} cells, expected {len(header)} as in the first line; "
                    'put text that holds the delimiter or a newline in "…"'
                )
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(
            f"{path}, row that starts in line {line}: broken {'TSV' if delimiter == chr(9) else 'CSV'} ({error}); "
            'expected quotes in pairs, a quote within quotes written as ""'
        ) from error
    if not header:
        raise InputError(f"{path} is empty: expected a first line that names the columns, and rows")


def _check_names(place: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{place}: the column {name!r} is there twice, expected names that differ; rename one")


def _too_long(path: Path, line: int) -> str:
    return f"{path}, line {line}: a row of more than {LONGEST_ROW >> 20} MiB, expected less; is a quote missing?"


def _no_utf8(path: Path, offset: int, byte: int) -> InputError:
    return InputError(
        f"{path} is no UTF-8: byte {offset} is 0x{byte:02x}; save it as UTF-8 (from EUC-KR: iconv -f cp949 -t utf-8)"
    )
