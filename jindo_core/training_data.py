"""The rows of a run: files -> records -> tokens in the cache -> what is trained on, in packs perhaps, and what is held
out. No row stays in memory: examples are read as they are asked for.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from jindo_core import embedded
from jindo_core.config import TrainConfig
from jindo_core.data.batches import Portion
from jindo_core.data.examples import Encoder, report
from jindo_core.data.formats import Format, detect_format, named_dataset
from jindo_core.data.packing import PackedRows, pack_apart
from jindo_core.data.preview import preview
from jindo_core.data.readers import RowSource, open_rows
from jindo_core.data.records import Record, bundled_path, split_indices
from jindo_core.data.store import Selection, TokenizedRows, tokenize
from jindo_core.errors import InputError
from jindo_core.progress import tokenizing_bar
from jindo_core.tokenizer import Tokenizer
from jindo_core.training_view import TrainingView

_PROBE_WITHIN = 10_000
"""Records at a source's start that the row to be answered is chosen from: a file is not read a second time for it."""


_MOST_SAID = 12
"""Rows of a batch that a message names."""


@dataclass(frozen=True)
class DataFile:
    """A file, or a folder of files, of one format."""

    source: RowSource
    format: Format

    @property
    def formatted(self) -> bool:
        """Whether its rows bring their own prompt, so that no template is put round them."""
        return self.format.record(self.source.head(1)[0]).formatted

    def records(self) -> Iterator[Record]:
        """In order; each call reads anew."""
        return (self.format.record(row) for row in self.source)


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is measured on.

    Attributes:
        examples: rows, or packs of them. portions: those of each file, and how often an epoch sees them.
        chosen: the rows of those. names: of the files, for messages.
        rows: that are trained on; as many as there are examples, but for packs.
        asked: rows that were held out, with those that had nothing to learn.
        answered: (number of its file, its row's number from 1, the row) of those that are answered at the end.
    """

    examples: Selection | PackedRows
    portions: tuple[Portion, ...]
    rows: int
    held_out: Selection
    asked: int
    probes: list[Record]
    chosen: Selection
    names: tuple[str, ...]
    answered: tuple[tuple[int, int, Record], ...] = ()

    def said(self, batches: Sequence[Sequence[int]]) -> str:
        """The rows of a step, in words: `row 3, 17, 4 of rows.json`."""
        numbers = [i for batch in batches for i in batch]
        if isinstance(self.examples, PackedRows):
            numbers = [row for number in numbers for row in self.examples.members(number)]
        found: dict[int, list[int]] = {}
        for number, row in map(self.chosen.origin, numbers[:_MOST_SAID]):
            found.setdefault(number, []).append(row)
        parts = [f"{', '.join(map(str, rows))} of {self.names[number]}" for number, rows in sorted(found.items())]
        more = len(numbers) - _MOST_SAID
        return f"row {' and '.join(parts)}" + (f", and {more} more" if more > 0 else "")

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(int(part.lengths.max()) for part in (self.examples, self.held_out) if len(part))


def open_files(config: TrainConfig) -> list[DataFile]:
    """The files that the settings name, or the bundled one; their first rows are read.

    Raises:
        InputError: a path that is not there, or rows that no format fits.
    """
    if config.data_path is None:
        return [open_file(str(bundled_path()), config.dataset_format)]
    return [open_file(path, config.dataset_format) for path in config.data_path]


def open_file(path: str, dataset_format: str | None) -> DataFile:
    """A path, or one of qlora's names for a data set where there is no such path; its first rows are read.

    Raises:
        InputError: a path that is not there, or rows that no format fits.
    """
    named = None if Path(path).expanduser().exists() else named_dataset(path)
    if named is not None:
        path, dataset_format = named[0], dataset_format or named[1]
    source = open_rows(path)
    return DataFile(source, detect_format(source, dataset_format))


def show_rows(
    files: Sequence[DataFile], config: TrainConfig, encoder: Encoder, tokenizer: Tokenizer, console: Console
) -> None:
    """The first `config.preview` rows, as they would be learnt."""
    for passed_over in filter(None, map(_passed_over, files)):
        console.print(passed_over, markup=False, highlight=False, soft_wrap=True)
    rows = ((record, file.source.paths[0].name) for file in files for record in file.records())
    shown = list(itertools.islice(rows, config.preview))
    names = [name for _, name in shown] if len(files) > 1 else []
    preview([record for record, _ in shown], encoder, tokenizer, config.preview, console, names)


def read_data(
    files: Sequence[DataFile], config: TrainConfig, encoder: Encoder, capacity: int, view: TrainingView
) -> TrainingData:
    """Tokenize all files, or find them tokenized, and split them.

    Args:
        capacity: tokens of a packed sequence.
    Raises:
        InputError: a row that can't be read, or no row with anything to learn.
    """
    for passed_over in filter(None, map(_passed_over, files)):
        view.notice(passed_over)
    sources = [_tokenized(file, config, encoder, view) for file in files]
    count = sum(len(source) for source in sources)
    training, held, warning = split_indices(count, config.val_set_size, config.seed)
    if warning:
        view.notice(warning)
    chosen = np.asarray(training[: config.max_train_samples], np.int64)
    measured = np.asarray(held[: config.max_eval_samples], np.int64)
    rows, held_out = Selection(sources, chosen), Selection(sources, measured)
    for part in (rows, held_out):
        _warn(part, files, encoder, view)
    if not len(rows):
        raise InputError(f"no training row has a supervised token within {encoder.limit}: raise it or check the data")
    examples, portions = _units(rows, config, capacity)
    if isinstance(examples, PackedRows):
        filled = len(rows) / len(examples)
        view.say(f"{len(rows):,} rows packed into {len(examples):,} sequences, {filled:.1f} to one")
    probes = _first_records(files, sources, measured if len(measured) else chosen)
    names = tuple(file.source.paths[0].name for file in files)
    answered = _records(files, sources, measured) if config.predict_with_generate else ()
    return TrainingData(examples, portions, len(rows), held_out, len(measured), probes, rows, names, tuple(answered))


def _records(
    files: Sequence[DataFile], sources: Sequence[TokenizedRows], chosen: NDArray[np.int64]
) -> Iterator[tuple[int, int, Record]]:
    """Of the chosen records those that something is learnt from, file by file: read now, for files may change."""
    first = 0
    for number, (file, source) in enumerate(zip(files, sources, strict=True)):
        here = chosen[(chosen >= first) & (chosen < first + len(source))] - first
        wanted = set(here[source.lengths[here] > 0].tolist())
        for place, record in enumerate(itertools.islice(file.records(), max(wanted, default=-1) + 1)):
            if place in wanted:
                yield number, place + 1, record
        first += len(source)


def _passed_over(file: DataFile) -> str:
    """What to say of columns that nothing is made of; "" where there are none."""
    names = file.format.passed_over(file.source.columns())
    return f"{file.source.paths[0].name}: columns passed over: {', '.join(names)}" if names else ""


def _cache() -> Path:
    """Where tokenized rows are kept: $JINDO_TOKENIZED, else in the cache."""
    own = os.environ.get("JINDO_TOKENIZED")
    return Path(own) if own else embedded.cache_dir() / "tokenized"


def _tokenized(file: DataFile, config: TrainConfig, encoder: Encoder, view: TrainingView) -> TokenizedRows:
    name = file.source.paths[0].name
    began = time.perf_counter()
    with tokenizing_bar(view.console, name, shown=view.draws) as on_progress:
        rows = tokenize(
            file.source, file.format, encoder, on_progress=on_progress, say=view.notice,
            cache=_cache() if config.tokenized_cache else None,
        )  # fmt: skip
    took = max(time.perf_counter() - began, 1e-9)
    how = "tokenized by an earlier run" if rows.from_cache else f"tokenized, {len(rows) / took:,.0f} rows/s"
    view.say(f"{name}: {len(rows):,} rows ({file.format.name}), {how}")
    return rows


def _warn(part: Selection, files: Sequence[DataFile], encoder: Encoder, view: TrainingView) -> None:
    for file, asked, losses in zip(files, part.asked, part.losses, strict=True):
        for problem in report(asked, losses, encoder.limit):
            view.notice(problem if len(files) == 1 else f"{file.source.paths[0].name}: {problem}")


def _units(rows: Selection, config: TrainConfig, capacity: int) -> tuple[Selection | PackedRows, tuple[Portion, ...]]:
    """What is shuffled and batched, and which of it is each file's. With weights no pack holds rows of two files."""
    examples: Selection | PackedRows = rows
    bounds = rows.bounds if config.data_weights else [(0, len(rows))]
    if config.packing:
        packs, bounds = pack_apart(rows.lengths, bounds, capacity, config.seed)
        examples = PackedRows(rows, packs, rows.lengths)
    weights = config.data_weights or (1.0,)
    return examples, tuple(
        Portion(start, end, weight) for (start, end), weight in zip(bounds, weights, strict=True) if end > start
    )


def _first_records(
    files: Sequence[DataFile], sources: Sequence[TokenizedRows], chosen: NDArray[np.int64]
) -> list[Record]:
    """The records of the first hundred chosen ones of each source that lie near its start, in the order of `chosen`."""
    found: list[tuple[int, Record]] = []
    first = 0
    for file, source in zip(files, sources, strict=True):
        near = np.flatnonzero((chosen >= first) & (chosen < first + min(len(source), _PROBE_WITHIN)))[:100]
        rank_of = {int(chosen[rank]) - first: int(rank) for rank in near}
        for place, record in enumerate(itertools.islice(file.records(), max(rank_of, default=-1) + 1)):
            if place in rank_of:
                found.append((rank_of[place], record))
        first += len(source)
    return [record for _, record in sorted(found, key=lambda pair: pair[0])][:100]
