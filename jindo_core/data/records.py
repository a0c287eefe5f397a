"""Rows of instruction data in Stanford Alpaca's form, and their split into training and held-out rows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jindo_core.errors import InputError

_FORM = '{"instruction": …, "input": …, "output": …}'


@dataclass(frozen=True, slots=True)
class Round:
    """A question and its answer. input: what the instruction is about, "" where there is none; output "": not answered."""

    instruction: str
    input: str = ""
    output: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """A row of training data, whatever format it came in.

    Attributes:
        rounds: at least one, in order; several in a conversation.
        system: the system message, "" where the row brings none (a template may have its own).
        formatted: each round's instruction is the prompt as the model shall see it: no template is put round it.
        row: counts from 1 within its file.
    """

    rounds: tuple[Round, ...]
    system: str = ""
    formatted: bool = False
    row: int = 0

    @classmethod
    def single(cls, instruction: str, input: str = "", output: str = "", row: int = 0) -> Record:
        """A row of one round."""
        return cls((Round(instruction, input, output),), row=row)

    @property
    def instruction(self) -> str:
        """The first round's."""
        return self.rounds[0].instruction

    @property
    def input(self) -> str:
        """The first round's."""
        return self.rounds[0].input

    @property
    def output(self) -> str:
        """The first round's."""
        return self.rounds[0].output


def bundled_path() -> Path:
    """The Korean instructions that come with the package."""
    return Path(str(files("jindo_core.data") / "bundled" / "korean_instructions.jsonl"))


def read_records(path: str | Path) -> list[Record]:
    """All rows of a file, as they are.

    Args:
        path: a .json or .jsonl file (UTF-8): a list of objects, or an object on each line (blank lines are
            passed over). Its content says which of the two. Each has instruction and output; input may be
            missing or null; other keys are passed over.
    Raises:
        InputError: a missing or empty file, invalid UTF-8 (byte offset), broken JSON (line), or a row that is
            no object, lacks a key or holds something other than text there (row number, its keys).
    """
    path = Path(path).expanduser()
    text = _read_text(path)
    rows = (_list_rows if text.lstrip().startswith("[") else _line_rows)(path, text)
    records = [_record(path, where, number, row) for number, (where, row) in enumerate(rows, 1)]
    if not records:
        raise InputError(f"{path} has no rows: expected at least one {_FORM}")
    return records


def split_records(
    records: Sequence[Record], val_set_size: int, seed: int
) -> tuple[list[Record], list[Record], str | None]:
    """Shuffle and hold out `val_set_size` rows.

    A size that would leave fewer training than held-out rows (alpaca-lora's 2000 on a small file) becomes a
    tenth of the rows.

    Returns:
        Training rows, held-out rows, and a warning where the size was changed.
    Raises:
        InputError: a negative size.
    """
    if val_set_size < 0:
        raise InputError(f"val_set_size is {val_set_size}, expected 0 or more")
    shuffled = list(records)
    random.Random(seed).shuffle(shuffled)
    warning = None
    if len(shuffled) - val_set_size < val_set_size:
        size = max(len(shuffled) // 10, 1) if len(shuffled) > 1 else 0
        warning = (
            f"val_set_size {val_set_size} leaves fewer training than held-out rows of {len(shuffled)}: {size} held out"
        )
        val_set_size = size
    return shuffled[val_set_size:], shuffled[:val_set_size], warning


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected a .json or .jsonl file")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: expected a .json or .jsonl file; check the path") from error
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): expected a .json or .jsonl file") from error
    try:
        text = data.decode("utf-8-sig")  # Windows editors put a byte-order mark first
    except UnicodeDecodeError as error:
        # Counted in the file: the decoder does not count the mark it took off.
        start = error.start + len(data) - len(error.object)
        raise InputError(
            f"{path} is no UTF-8: byte {start} is 0x{data[start]:02x}; save it as UTF-8 "
            "(from EUC-KR: iconv -f cp949 -t utf-8)"
        ) from error
    if not text.strip():
        raise InputError(f"{path} is empty: expected rows {_FORM}")
    return text


def _list_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_loads(path, text, 1), 1):
        yield f"row {number}", row


def _line_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    number = 0
    # Not splitlines(): JSON text may hold U+2028 and U+0085 as they are, at which it would cut too.
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            number += 1
            yield f"row {number} (line {line})", _loads(path, content, line)


def _loads(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(
            f"{path}, line {line}, column {error.colno}: broken JSON ({error.msg}); expected a list of objects, "
            "or one whole object on each line"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}, line {first_line}: {str(error).split(';')[0]}, expected rows {_FORM}") from error
    except RecursionError as error:
        raise InputError(f"{path}, line {first_line}: JSON nested too deep, expected rows {_FORM}") from error


def _record(path: Path, where: str, number: int, row: Any) -> Record:
    if not isinstance(row, dict):
        raise InputError(f"{path}, {where} is a {type(row).__name__}, expected an object {_FORM}")
    values = []
    for key in ("instruction", "input", "output"):
        value = row.get(key)
        if key == "input" and value is None:
            value = ""
        if key not in row and key != "input":
            keys = ", ".join(repr(name) for name in row) or "none"
            raise InputError(f"{path}, {where} lacks {key!r}: its keys are {keys}; expected {_FORM}")
        if not isinstance(value, str):
            raise InputError(f"{path}, {where}: {key!r} is a {type(value).__name__}, expected text")
        if not value.isascii():
            _check_characters(path, where, key, value)
        values.append(value)
    return Record.single(values[0], values[1], values[2], number)


def _check_characters(path: Path, where: str, key: str, value: str) -> None:
    """Refuse half a surrogate pair, which JSON can escape and no tokenizer can encode."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path}, {where}: {key!r} has half a surrogate pair at character {error.start}; "
            "expected whole characters; write it again as UTF-8"
        ) from error
