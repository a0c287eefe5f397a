"""What a data set holds: rows, lengths, languages, tokens, duplicates and dirt, in bounded memory.

Twice over the files: once for all rows, for what is cheap; then for a seeded sample of them, for what is not.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jindo_core.data.examples import Encoder
from jindo_core.data.formats import Format, RowError
from jindo_core.data.readers import Row, RowSource
from jindo_core.data.records import Record
from jindo_core.data.templates import Template
from jindo_core.errors import InputError
from jindo_core.refinery import korean_steps, translation_steps
from jindo_core.refinery.duplicate_steps import NearDuplicates
from jindo_core.refinery.languages import language, scripts
from jindo_core.refinery.lengths import Lengths
from jindo_core.refinery.pipeline import Item, Passing, RowStep, StepCounts, run_row_steps
from jindo_core.refinery.recipe import STEPS
from jindo_core.tokenizer import Tokenizer

FIELDS = ("system", "instruction", "input", "output")
LIMITS = (256, 512, 1024, 2048, 4096, 8192)
"""Values of cutoff_len that rows are held against."""
_NEAR_ROWS = 50_000  # rows compared with each other, at most: 256 bytes each, and the pairs
_KOREAN = {step.name for module in (korean_steps, translation_steps) for step in module.STEPS}
_KOREAN_SHARE = 10  # one row in so many has to hold Korean, for these steps to be told of
_BATCH = 256  # rows tokenized together
_TOLD = 5  # unreadable rows that are named
_MOST_COLUMNS = 200
_NO_LIMIT = 1 << 40

Progress = Callable[[int, int], None] | None


@dataclass
class TokenCount:
    """Texts of one field in one language, their characters and tokens."""

    texts: int = 0
    characters: int = 0
    tokens: int = 0


@dataclass
class Sampled:
    """What was found in the sampled rows.

    Attributes:
        rows, of: sampled, of so many readable ones.
        languages: field -> language -> texts. scripts: letters by script, of all fields.
        tokens: (field, language) -> count; row_tokens: of whole rows in the template, as trained on; misfits: rows
            that the template has no place for, which are in none of it. Empty without a tokenizer.
        near_rows, near: rows compared with each other; those that step near_duplicates of `data clean` would reject,
            without those that equal an earlier one.
        dirt: what each step of the refinery would do by itself; those for Korean only where there is Korean.
    """

    rows: int = 0
    of: int = 0
    languages: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in FIELDS})
    scripts: Counter[str] = field(default_factory=Counter)
    tokens: dict[tuple[str, str], TokenCount] = field(default_factory=dict)
    row_tokens: Lengths = field(default_factory=Lengths)
    misfits: int = 0
    near_rows: int = 0
    near: int = 0
    dirt: list[StepCounts] = field(default_factory=list)


@dataclass
class Inspection:
    """What a data set holds.

    Attributes:
        rows: that a file has; unreadable of them do not fit the format, `reasons` says why of the first ones.
        broken: why a file could not be read on; what lies behind that place is in no count.
        columns: name -> rows that have it, null or not.
        rounds: questions with answers in a row -> rows.
        characters: field -> lengths of its texts that are not empty. row_characters: of whole rows.
        repeated: rows that equal an earlier one in all texts; in prompts (system, instruction, input); in answers.
    """

    files: list[tuple[str, int]]
    format: str
    becomes: str
    rows: int = 0
    unreadable: int = 0
    reasons: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    columns: Counter[str] = field(default_factory=Counter)
    rounds: Counter[int] = field(default_factory=Counter)
    characters: dict[str, Lengths] = field(default_factory=lambda: {name: Lengths() for name in FIELDS})
    row_characters: Lengths = field(default_factory=Lengths)
    repeated: dict[str, int] = field(default_factory=dict)
    sample: Sampled = field(default_factory=Sampled)

    def as_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        sample = self.sample
        return {
            "files": [{"name": name, "bytes": size} for name, size in self.files],
            "format": self.format,
            "rows": self.rows,
            "unreadable": self.unreadable,
            "unreadable_reasons": self.reasons,
            "broken_files": self.broken,
            "columns": dict(self.columns),
            "rounds": {str(count): rows for count, rows in sorted(self.rounds.items())},
            "characters": {name: lengths.as_json() for name, lengths in self.characters.items() if lengths.count}
            | {"row": self.row_characters.as_json()},
            "repeated": self.repeated,
            "sample": {
                "rows": sample.rows,
                "of": sample.of,
                "languages": {name: dict(found.most_common()) for name, found in sample.languages.items() if found},
                "letters": dict(sample.scripts.most_common()),
                "tokens": [
                    {"field": name, "language": code, **vars(count)} for (name, code), count in sample.tokens.items()
                ],
                "row_tokens": sample.row_tokens.as_json(),
                "rows_above": {str(limit): sample.row_tokens.above(limit) for limit in LIMITS},
                "rows_without_place_in_template": sample.misfits,
                "near_duplicates": {"rows": sample.near_rows, "found": sample.near},
                "dirt": [_dirt_as_json(counts) for counts in sample.dirt if _finds(counts)],
            },
        }


def _finds(counts: StepCounts) -> bool:
    return bool(counts.changed or counts.rejected or counts.flagged or counts.found)


def _dirt_as_json(counts: StepCounts) -> dict[str, Any]:
    told = {name: getattr(counts, name) for name in ("name", "changed", "rejected", "flagged", "made")}
    return {**told, "reasons": dict(counts.reasons), "found": dict(counts.found)}


def inspect(
    source: RowSource,
    form: Format,
    *,
    tokenizer: Tokenizer | None = None,
    template: Template | None = None,
    sample: int = 20_000,
    seed: int = 42,
    on_progress: Progress = None,
) -> Inspection:
    """Look through a data set.

    Args:
        tokenizer, template: both or neither; without them no tokens are counted.
        sample: rows for languages, tokens, dirt and near duplicates (of those at most 50,000); 0: all.
        on_progress: called with (bytes read, bytes to read), both passes together.
    """
    found = Inspection([(path.name, path.stat().st_size) for path in source.paths], form.name, form.becomes)
    readable = _count(source, form, found, on_progress)
    chosen = _chosen(readable, sample, seed)
    found.sample.of = readable
    _look_closer(source, form, found.sample, chosen, tokenizer, template, on_progress)
    return found


def _records(
    source: RowSource, form: Format, found: Inspection | None, on_progress: Progress, base: int
) -> Iterator[tuple[Row, Record]]:
    """The rows that can be read; the others are counted in `found`."""
    whole, before = 2 * source.size_bytes, base
    for part in source.parts():
        try:
            for row in part:
                if on_progress is not None and row.number % 64 == 0:
                    on_progress(before + part.bytes_read, whole)
                if found is not None:
                    found.rows += 1
                    _count_columns(found.columns, row)
                try:
                    record = form.record(row)
                except RowError as error:
                    if found is not None:
                        found.unreadable += 1
                        found.reasons += [str(error)] if len(found.reasons) < _TOLD else []
                    continue
                yield row, record
        except InputError as error:  # raised by the file's own reader: it can't go on behind what is broken
            if found is not None:
                found.broken.append(str(error))
        before += part.size_bytes


def _count_columns(columns: Counter[str], row: Row) -> None:
    if len(columns) < _MOST_COLUMNS:
        columns.update(row.values.keys())
    else:
        columns.update(name if name in columns else "(others)" for name in row.values)


def _count(source: RowSource, form: Format, found: Inspection, on_progress: Progress) -> int:
    """The first pass; returns how many rows can be read."""
    # 64 bits of a digest: with ten million rows the chance of one false repetition is 3 in a million.
    seen = {"rows": array("Q"), "prompts": array("Q"), "answers": array("Q")}
    for _, record in _records(source, form, found, on_progress, 0):
        found.rounds[len(record.rounds)] += 1
        texts = _texts(record)
        for name, text in texts:
            if text:
                found.characters[name].add(len(text))
        found.row_characters.add(sum(len(text) for _, text in texts))
        for what, kept in seen.items():
            wanted = [text for name, text in texts if what == "rows" or (name == "output") == (what == "answers")]
            kept.append(_digest(wanted))
    for what, kept in seen.items():
        found.repeated[what] = len(kept) - len(np.unique(np.frombuffer(kept, dtype=np.uint64))) if kept else 0
    return len(seen["rows"])


def _texts(record: Record) -> list[tuple[str, str]]:
    """(field, text) of all fields, empty ones too."""
    rounds = [(name, getattr(each, name)) for each in record.rounds for name in FIELDS[1:]]
    return [("system", record.system), *rounds]


def _digest(texts: Sequence[str]) -> int:
    whole = hashlib.blake2b(digest_size=8)
    for text in texts:
        data = text.encode()
        whole.update(len(data).to_bytes(8) + data)
    return int.from_bytes(whole.digest())


def _chosen(count: int, sample: int, seed: int) -> np.ndarray:
    """int64: the numbers of the sampled rows, from 0, ascending."""
    if sample == 0 or sample >= count:
        return np.arange(count)
    return np.array(sorted(random.Random(seed).sample(range(count), sample)))


def _look_closer(
    source: RowSource, form: Format, sampled: Sampled, chosen: np.ndarray, tokenizer: Tokenizer | None,
    template: Template | None, on_progress: Progress,
) -> None:  # fmt: skip
    """The second pass, over the chosen rows."""
    steps = list(_row_steps())
    sampled.dirt = [StepCounts(step.name) for step in steps]
    near = _NearDuplicates()
    every = -(-len(chosen) // _NEAR_ROWS) or 1
    tokens = None if tokenizer is None or template is None else _Tokens(tokenizer, template, sampled)
    korean, numbers = 0, iter(chosen.tolist())
    wanted = next(numbers, None)
    for index, (row, record) in enumerate(_records(source, form, None, on_progress, source.size_bytes)):
        if index != wanted:
            continue
        wanted = next(numbers, None)
        named = [(name, text, language(text)) for name, text in _texts(record) if text]
        for name, text, code in named:
            sampled.languages[name][code] += 1
            sampled.scripts += scripts(text)
        korean += any(code == "ko" for *_, code in named)
        item = Item(record, row.values, index + 1)
        for step, counts in zip(steps, sampled.dirt, strict=True):
            for _ in run_row_steps([Passing(item)], [step], [counts]):
                pass  # only the counts are wanted
        if sampled.rows % every == 0:
            near.add(item)
        if tokens is not None:
            tokens.add(record, named)
        sampled.rows += 1
    if tokens is not None:
        tokens.finish()
    if korean * _KOREAN_SHARE < sampled.rows:
        sampled.dirt = [counts for counts in sampled.dirt if counts.name not in _KOREAN]
    sampled.near_rows, sampled.near = near.rows, near.count()


def _row_steps() -> Iterator[RowStep]:
    """The refinery's steps on a row at a time, with their defaults; without those that ask for a file of the user's."""
    for kind in STEPS.values():
        if issubclass(kind, RowStep):
            try:
                yield kind()
            except InputError:  # contamination: against nothing
                continue


class _Tokens:
    """Counts tokens of fields and rows, a batch at a time."""

    def __init__(self, tokenizer: Tokenizer, template: Template, sampled: Sampled) -> None:
        self._tokenizer, self._template, self._sampled = tokenizer, template, sampled
        self._encoder = Encoder(tokenizer, template, cutoff_len=_NO_LIMIT, train_on_inputs=True)
        self._waiting: list[Record] = []

    def add(self, record: Record, named: Sequence[tuple[str, str, str]]) -> None:
        """named: (field, text, language)."""
        for name, text, code in named:
            count = self._sampled.tokens.setdefault((name, code), TokenCount())
            count.texts += 1
            count.characters += len(text)
            count.tokens += len(self._tokenizer.encode(text, bos=False))
        self._waiting.append(record)
        if len(self._waiting) == _BATCH:
            self.finish()

    def finish(self) -> None:
        """What is waiting."""
        fitting = []
        for record in self._waiting:
            try:
                self._template.render(record)
                fitting.append(record)
            except InputError:  # a system message, where the template has none
                self._sampled.misfits += 1
        for layout in self._encoder.lay_out(fitting):
            self._sampled.row_tokens.add(len(layout.example.input_ids))
        self._waiting.clear()


class _NearDuplicates:
    """What the refinery's step finds among some of the rows."""

    def __init__(self) -> None:
        self.rows, self._step = 0, NearDuplicates()
        self._keys: list[bytes] = []
        self._equal: set[int] = set()

    def add(self, item: Item) -> None:
        self.rows += 1
        equal = _digest([text for _, text in _texts(item.record)])
        if equal not in self._equal and (key := self._step.key(item)):
            self._equal.add(equal)
            self._keys.append(key)

    def count(self) -> int:
        """Rows like an earlier one."""
        if not self._keys:
            return 0
        keys = np.frombuffer(b"".join(self._keys), dtype=np.uint8).reshape(len(self._keys), -1)
        return sum(1 for _ in self._step.decide(keys, np.arange(len(keys))))
