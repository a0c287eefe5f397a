"""The way back: records as rows of a format, and rows as files, streamed, whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BufferedIOBase
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

from jindo_core.data.readers import kind_of
from jindo_core.data.records import Record, Round
from jindo_core.errors import InputError, nearest
from jindo_core.files import replacing
from jindo_core.hub import DATA_ENDINGS

_GROUP_ROWS, _GROUP_CHARACTERS = 10_000, 16 << 20
"""Rows of a row group of Parquet, and their text: what is held until it is written."""


def row_of(record: Record, format_name: str) -> dict[str, Any]:
    """A record as a row of a format; every text of it is in there.

    Where a format has one text for a question (sharegpt, messages, orca, qa, self-instruct, input-output), a round's
    input follows its instruction after an empty line.

    Args:
        format_name: a name in WRITABLE.
    Raises:
        InputError: a format that is not written, or a record that it can't say (the record's row): several rounds or a
            system message where there is no room, a text that no template may be put round.
    """
    if format_name not in _ROWS:
        raise InputError(
            f"format {format_name!r} can't be written: expected {', '.join(WRITABLE)}.{nearest(format_name, WRITABLE)}"
        )
    return _ROWS[format_name](record, format_name)


def split_rounds(record: Record) -> list[Record]:
    """A record for each round, with the system message: for formats of one round. What came before is lost to each."""
    return [replace(record, rounds=(one,)) for one in record.rounds]


# --- a row of each format --------------------------------------------------------------------------------


def _alpaca(record: Record, name: str) -> dict[str, Any]:
    one = _single(_open(record, name), name)
    row = {"instruction": one.instruction, "input": one.input, "output": one.output}
    return {**row, "system": record.system} if record.system else row


def _koalpaca(record: Record, name: str) -> dict[str, Any]:
    row = _alpaca(record, name)
    return row if row["input"] else {key: text for key, text in row.items() if key != "input"}  # v1.1 has none


def _sharegpt(record: Record, name: str) -> dict[str, Any]:
    turns = _turns(_open(record, name), "system", "human", "gpt")
    return {"id": str(record.row), "conversations": [{"from": who, "value": text} for who, text in turns]}


def _messages(record: Record, name: str) -> dict[str, Any]:
    turns = _turns(_open(record, name), "system", "user", "assistant")
    return {"messages": [{"role": who, "content": text} for who, text in turns]}


def _orca(record: Record, name: str) -> dict[str, Any]:
    one = _single(_open(record, name), name)
    return {"system_prompt": record.system, "question": _asked(one), "response": one.output}


def _qa(record: Record, name: str) -> dict[str, Any]:
    one = _single(_open(_without_system(record, name), name), name)
    return {"Q": _asked(one), "A": one.output}


def _self_instruct(record: Record, name: str) -> dict[str, Any]:
    one = _single(_without_system(record, name), name)
    return {"prompt": _asked(one), "completion": one.output}


def _input_output(record: Record, name: str) -> dict[str, Any]:
    one = _single(_without_system(record, name), name)
    return {"input": _asked(one), "output": one.output}


def _text(record: Record, name: str) -> dict[str, Any]:
    one = _single(_without_system(record, name), name)
    if not record.formatted or _asked(one):
        raise InputError(f"row {record.row} has a question, and {name} has text alone: write another format")
    return {"text": one.output}


_ROWS: dict[str, Callable[[Record, str], dict[str, Any]]] = {
    **dict.fromkeys(("alpaca", "alpaca-clean", "kullm", "wizard"), _alpaca),
    "koalpaca": _koalpaca,
    **dict.fromkeys(("sharegpt", "vicuna"), _sharegpt),
    "messages": _messages,
    "orca": _orca,
    "qa": _qa,
    "self-instruct": _self_instruct,
    **dict.fromkeys(("input-output", "longform"), _input_output),
    **dict.fromkeys(("text", "oasst1"), _text),
}
WRITABLE = tuple(_ROWS)
"""Names of formats that `row_of` takes."""


def _asked(one: Round) -> str:
    return "\n\n".join(text for text in (one.instruction, one.input) if text)


def _turns(record: Record, system: str, user: str, assistant: str) -> Iterator[tuple[str, str]]:
    if record.system:
        yield system, record.system
    for one in record.rounds:
        yield user, _asked(one)
        yield assistant, one.output


def _single(record: Record, name: str) -> Round:
    if len(record.rounds) != 1:
        raise InputError(
            f"row {record.row} has {len(record.rounds)} rounds, and {name} has room for one: write sharegpt or "
            "messages, or each round as a row"
        )
    return record.rounds[0]


def _open(record: Record, name: str) -> Record:
    """The record, if a template may be put round it, as is done with this format's rows."""
    if record.formatted:
        raise InputError(
            f"row {record.row} is for no template (it came as a prompt that is whole), and {name} rows get one: write "
            "input-output, or read its columns as another format, --dataset_format alpaca:instruction=…,output=…"
        )
    return record


def _without_system(record: Record, name: str) -> Record:
    if record.system:
        raise InputError(
            f"row {record.row} has a system message, and {name} has no room for it: write orca or messages"
        )
    return record


# --- files -----------------------------------------------------------------------------------------------


class RowWriter:
    """Writes rows to a file, in the form that its name's ending says: .json, .jsonl, .csv, …, .gz after that.

    A context manager. The file comes to be when the block ends well; until then, and where it fails, what was at `path`
    is unchanged. Memory is bounded.

        with RowWriter("clean.jsonl") as writer:
            writer.write({"instruction": "…", "output": "…"})

    Attributes:
        rows: how many were written.
    Raises:
        InputError: an ending that is not known, a place that can't be written to, a row that the form can't say (its
            number): nested values in CSV, a column that the first row lacks, half a surrogate pair, NaN in JSON, types
            that differ in Parquet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.rows = 0
        if not kind_of(self.path):
            raise InputError(f"{self.path}: its ending is not known, expected {', '.join(DATA_ENDINGS)}; rename it")
        self._opened = _opened(self.path)
        self._sink: _Sink | None = None

    def __enter__(self) -> RowWriter:
        with self._failures():
            self._sink = self._opened.__enter__()
        return self

    def write(self, row: dict[str, Any]) -> None:
        """Add a row.

        Raises:
            InputError: the form can't say it, or the disk is full or fails.
        """
        if self._sink is None:
            raise RuntimeError("rows are written within the writer's block")
        with self._failures():
            self._sink.write(row, self.rows + 1)
        self.rows += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._failures():
            self._opened.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path} could not be written ({error.strerror or error}): what was there is unchanged"
            ) from error


class _Sink(Protocol):
    def write(self, row: dict[str, Any], number: int) -> None: ...

    def close(self, whole: bool) -> None:
        """whole: all rows came; else the file is thrown away."""


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Sink]:
    kind = kind_of(path)
    packed = path.name.lower().endswith(".gz")
    with replacing(path) as raw:
        # No date in the header: the same rows make the same file.
        file = cast(BufferedIOBase, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if packed else raw)
        sink: _Sink
        if kind == "parquet":
            sink = _ParquetRows(path, file)
        elif kind in ("csv", "tsv"):
            sink = _TableRows(path, file, "\t" if kind == "tsv" else ",")
        else:
            sink = _JsonRows(path, file, as_list=kind == "json")
        whole = False
        try:
            yield sink
            whole = True
        finally:
            sink.close(whole)
            if packed:
                file.close()


class _JsonRows:
    """A list of objects, one a line; or the lines alone."""

    def __init__(self, path: Path, file: BufferedIOBase, as_list: bool) -> None:
        self._path, self._file, self._as_list = path, file, as_list
        self._empty = True

    def write(self, row: dict[str, Any], number: int) -> None:
        try:
            data = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(_half(self._path, number)) from error
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{self._path}, row {number}: no JSON can say it ({error}), expected text") from error
        before = (b"[\n" if self._empty else b",\n") if self._as_list else b""
        self._file.write(before + data + (b"" if self._as_list else b"\n"))
        self._empty = False

    def close(self, whole: bool) -> None:
        if whole and self._as_list:
            self._file.write(b"[]\n" if self._empty else b"\n]\n")


class _TableRows:
    """RFC 4180, columns as the first row has them. None is an empty cell."""

    def __init__(self, path: Path, file: BufferedIOBase, delimiter: str) -> None:
        self._path, self._file = path, file
        self._line = io.StringIO(newline="")
        # The RFC's line end, and so that the module quotes text with either half of it.
        self._writer = csv.writer(self._line, delimiter=delimiter, lineterminator="\r\n")
        self._header: list[str] = []

    def write(self, row: dict[str, Any], number: int) -> None:
        place = f"{self._path}, row {number}"
        if not self._header:
            self._header = list(row)
            self._add(self._header, number)
        for name, value in row.items():
            if name not in self._header:
                raise InputError(f"{place}: the column {name!r} is not in the first row, expected the same columns")
            if not isinstance(value, str | int | float | None):
                raise InputError(f"{place}: {name!r} is a {type(value).__name__}, expected text; write .jsonl")
        self._add([row.get(name) for name in self._header], number)

    def _add(self, cells: list[Any], number: int) -> None:
        self._line.seek(0)
        self._line.truncate()
        self._writer.writerow(cells)
        try:
            data = self._line.getvalue().encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(_half(self._path, number)) from error
        self._file.write(data)

    def close(self, whole: bool) -> None:
        pass


class _ParquetRows:
    """Parquet, with the columns and types of the first row group; what is null in all of it is taken for text."""

    def __init__(self, path: Path, file: BufferedIOBase) -> None:
        self._path, self._file = path, file
        self._held: list[dict[str, Any]] = []
        self._characters = 0
        self._last = 0
        self._writer: Any = None
        self._schema: Any = None

    def write(self, row: dict[str, Any], number: int) -> None:
        self._held.append(row)
        self._characters += _characters(row)
        self._last = number
        if len(self._held) >= _GROUP_ROWS or self._characters >= _GROUP_CHARACTERS:
            self._flush()

    def close(self, whole: bool) -> None:
        try:
            if whole and (self._held or self._writer is None):
                self._flush()
        finally:
            if self._writer is not None:
                self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, self._held, self._characters = self._held, [], 0
        names = list(dict.fromkeys(name for row in rows for name in row))
        place = f"{self._path}, rows {self._last - len(rows) + 1} to {self._last}"
        try:
            table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
            if self._schema is None:
                self._schema = pa.schema([(field.name, _filled(field.type)) for field in table.schema])
            # What the first group has no place for would be dropped without a word.
            elif (both := pa.unify_schemas([self._schema, table.schema], promote_options="permissive")) != self._schema:
                odd = next(field.name for field in both if field not in self._schema)
                raise InputError(f"{place}: {odd!r} holds other keys or types than in the first rows, write .jsonl")
            columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in self._schema]
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._file, self._schema)
            self._writer.write_table(pa.table(columns, schema=self._schema))
        except UnicodeEncodeError as error:
            raise InputError(f"{place}: half a surrogate pair, expected whole characters") from error
        except (pa.ArrowException, OverflowError) as error:
            fault = " ".join(str(error).split())
            raise InputError(f"{place}: Parquet can't say them ({fault}), write .jsonl") from error


def _filled(kind: Any) -> Any:
    """An Arrow type with text where it knows of nothing but null."""
    import pyarrow as pa

    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_filled(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _filled(field.type)) for field in kind])
    return kind


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 8


def _half(path: Path, number: int) -> str:
    return f"{path}, row {number} has half a surrogate pair, expected whole characters; write it again as UTF-8"
