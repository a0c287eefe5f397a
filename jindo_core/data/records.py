"""Rows of instruction data, whatever format they came in, and their split into training and held-out rows."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jindo_core.errors import InputError


@dataclass(frozen=True, slots=True)
class Round:
    """A question and its answer.

    input: what the instruction is about, "" where there is none; output "": not answered.
    """

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


def stream_records(path: str | Path, dataset_format: str | None = None) -> Iterator[Record]:
    """Rows of a file or a folder, one at a time, as they are.

    Args:
        path: what `readers.open_rows` takes.
        dataset_format: a name in `formats.FORMATS`, or None: the columns say which.
    Raises:
        InputError: a file that can't be read or that no format fits, or a row that doesn't fit its format (row number,
            its keys).
    """
    # Not above: what they make is the Record that is defined here.
    from jindo_core.data.formats import detect_format
    from jindo_core.data.readers import open_rows

    source = open_rows(path)
    chosen = detect_format(source, dataset_format)
    for row in source:
        yield chosen.record(row)


def read_records(path: str | Path, dataset_format: str | None = None) -> list[Record]:
    """All rows of a file or a folder: `stream_records`, as a list."""
    return list(stream_records(path, dataset_format))


def split_indices(count: int, val_set_size: int, seed: int) -> tuple[Sequence[int], Sequence[int], str | None]:
    """Shuffle `count` rows and hold out `val_set_size` of them.

    A size that would leave fewer training than held-out rows (alpaca-lora's 2000 on a small file) becomes a
    tenth of the rows.

    Returns:
        Numbers of training rows, of held-out rows, both from 0, and a warning where the size was changed.
    Raises:
        InputError: a negative size.
    """
    if val_set_size < 0:
        raise InputError(f"val_set_size is {val_set_size}, expected 0 or more")
    shuffled = array("q", range(count))  # a list's numbers take forty bytes each
    random.Random(seed).shuffle(shuffled)
    warning = None
    if count - val_set_size < val_set_size:
        size = max(count // 10, 1) if count > 1 else 0
        warning = f"--val_set_size {val_set_size} would take more than half of the {count} rows: {size} are held out"
        val_set_size = size
    return shuffled[val_set_size:], shuffled[:val_set_size], warning


def split_records(
    records: Sequence[Record], val_set_size: int, seed: int
) -> tuple[list[Record], list[Record], str | None]:
    """The same for rows at hand: training rows, held-out rows, and a warning."""
    training, held_out, warning = split_indices(len(records), val_set_size, seed)
    return [records[i] for i in training], [records[i] for i in held_out], warning
