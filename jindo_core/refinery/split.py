"""Rows held out: an exact number, chosen by a seed, in two passes over the source."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jindo_core.data.readers import RowSource, kind_of, open_rows
from jindo_core.data.writers import RowWriter
from jindo_core.data_config import SplitConfig
from jindo_core.errors import InputError

_EVERY = 1000  # rows between two reports of progress


@dataclass(frozen=True)
class Split:
    """What a split wrote: the files' names and their rows. rows_in = train_rows + test_rows."""

    train: str
    test: str
    rows_in: int
    train_rows: int
    test_rows: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def split(config: SplitConfig, on_progress: Callable[[str, int, int], None] | None = None) -> Split:
    """Writes `train` and `test` files with the source's ending; each row goes to one of them, in the source's order.

    Which rows are held out is decided as they pass (selection sampling; Knuth, The Art of Computer Programming, 3.4.2,
    algorithm S): every set of that size is as likely, and no list of rows is kept. Each file comes to be whole or not
    at all, one after the other.

    Raises:
        InputError: a source or folder that doesn't serve, files of several kinds, or a size that leaves a file empty.
        RuntimeError: rows that were lost or came twice: the source changed meanwhile.
    """
    source = open_rows(str(config.data_path))
    endings = {_ending(path) for path in source.paths}
    if len(endings) > 1:
        raise InputError(f"{config.data_path} holds {' and '.join(sorted(endings))} files: expected one kind to split")
    folder = Path(str(config.output_dir))
    train, test = (folder / f"{name}{endings.copy().pop()}" for name in ("train", "test"))
    _check_folder(folder, (train, test), source, config.overwrite)
    tell = on_progress or (lambda said, done, whole: None)

    rows_in = 0
    for rows_in, _ in enumerate(source, 1):
        if rows_in % _EVERY == 0:
            tell("counting", source.bytes_read, source.size_bytes)
    wanted = left = _test_rows(config.test_size, rows_in)
    draw = random.Random(config.seed).random
    with RowWriter(test) as test_writer, RowWriter(train) as train_writer:
        for before, row in enumerate(source):
            held_out = draw() * (rows_in - before) < left
            left -= held_out
            (test_writer if held_out else train_writer).write(row.values)
            if before % _EVERY == 0:
                tell("writing", source.bytes_read, source.size_bytes)
        written = test_writer.rows + train_writer.rows
        if written != rows_in or test_writer.rows != wanted:
            raise RuntimeError(f"{rows_in} rows counted, {written} written: did {config.data_path} change meanwhile?")
    return Split(train.name, test.name, rows_in, train_writer.rows, test_writer.rows, config.seed)


def _ending(path: Path) -> str:
    return f".{kind_of(path)}" + (".gz" if path.name.lower().endswith(".gz") else "")


def _test_rows(size: float, rows: int) -> int:
    wanted = int(size) if size >= 1 else max(round(size * rows), 1)
    if wanted >= rows:
        raise InputError(f"--test_size: got {size:g}, which leaves none of {rows} rows to train on: expected fewer")
    return wanted


def _check_folder(folder: Path, files: tuple[Path, ...], source: RowSource, overwrite: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir: {folder} can't be made ({error.strerror}): expected a folder") from None
    for path in files:
        if path.resolve() in {each.resolve() for each in source.paths}:
            raise InputError(f"--output_dir: {path} is what is split: expected another folder")
        if path.exists() and not overwrite:
            raise InputError(f"--output_dir: {path} is there already: give another folder, or --overwrite")
