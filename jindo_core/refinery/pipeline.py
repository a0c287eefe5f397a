"""What a refinery's step is, what it may answer, and how a chunk of rows goes through several of them.

A step is a frozen dataclass whose fields are its options, made with `option`; the first line of its docstring is its
help. There are four kinds:

- `RawStep` sees a row as the file has it, before a format reads it: for what no format would read.
- `RowStep` sees one row. Both run in worker processes, so a step must be picklable, and what it needs beside its
  options (a compiled table, a library) is found inside its module, once a process.
- `SetStep` judges a row by all others (duplicates): a key for each row, then one look at all keys.
- `JoinStep` makes one row of several (a sentence and its translation).

`STEPS` of `recipe.py` lists the classes by name; `cleaning.py` runs them over files.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from jindo_core.data.records import Record, Round
from jindo_core.settings import setting

_DIGITS = re.compile(r"\d+(?:[.,]\d+)*")
_MAX_REASONS = 20  # kinds of reasons that a report tells apart


@dataclass(frozen=True, slots=True)
class Item:
    """A row on its way through the steps.

    Attributes:
        record: the row as its format reads it. What a step changes in it is written back to the format's columns.
        values: the row's columns as the file has them; those that the format doesn't know survive (`id`, …).
        number: the row's place in its source, from 1, through all files of a folder.
    """

    record: Record
    values: dict[str, Any]
    number: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """The row goes, to the file of rejected rows. reason: one line, for a person; no text of the row in it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Flagged:
    """The row stays (`item`, changed or not), and `reason` is reported with its number."""

    item: Item
    reason: str
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Counted:
    """The row stays (`item`), and `counts` of what was found in it are added up in the report: {"mail": 2}."""

    item: Item
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Step(ABC):
    """What all steps have; see the kinds below."""

    name: ClassVar[str]


class RawStep(Step):
    """A step on the columns of a row as the file has them; stands before all other steps of a recipe."""

    @abstractmethod
    def __call__(self, values: dict[str, Any]) -> dict[str, Any] | Rejected | list[dict[str, Any]]:
        """The same dict: unchanged; another: changed; a list of at least two: made into several rows."""


class RowStep(Step):
    """A step on a row at a time."""

    @abstractmethod
    def __call__(self, item: Item) -> Item | Rejected | Flagged | Counted | list[Item]:
        """The same object: unchanged; another: changed; a list of at least two: made into several rows."""


class SetStep(Step):
    """A step that judges rows by their keys, all of which it sees."""

    @abstractmethod
    def key(self, item: Item) -> bytes:
        """What `decide` needs of a row, as wide for every row, or b"" where the row doesn't concern it."""

    @abstractmethod
    def decide(self, keys: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[int, str]]:
        """Which rows go.

        Args:
            keys: uint8 [rows, width], in the rows' order, memory-mapped; rows whose key was b"" are left out.
            numbers: int64 [rows], each row's number in the source, for the reasons.
        Yields:
            An index into `keys` and the reason, indices ascending.
        """


class JoinStep(Step):
    """A step that makes one row of several that belong together."""

    @abstractmethod
    def key(self, item: Item) -> bytes:
        """What `leaders` needs of a row, as wide for every row, or b"" where the row doesn't concern it."""

    @abstractmethod
    def leaders(self, keys: np.ndarray) -> np.ndarray:
        """int64 [rows]: for each row of `keys` (as in `SetStep.decide`) the index of the first row of its group, which
        is its own where it begins one."""

    @abstractmethod
    def join(self, items: Sequence[Item]) -> Item | Rejected:
        """The row that a group (in the rows' order, perhaps of one) becomes, in its first row's place; the others
        count as rejected. Rejected: all of them go."""


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of a step: one of its options; `more` as for `settings.setting` (at_least, at_most, …)."""
    return setting(default, "options", help, **more)


def map_texts(record: Record, change: Callable[[str], str]) -> Record:
    """The record with `change` applied to every text in it, the system message too; the same object if none changed."""
    system = change(record.system) if record.system else record.system
    rounds = tuple(
        Round(*(change(text) if text else text for text in (each.instruction, each.input, each.output)))
        for each in record.rounds
    )
    if system == record.system and rounds == record.rounds:
        return record
    return replace(record, system=system, rounds=rounds)


def map_outputs(record: Record, change: Callable[[str], str]) -> Record:
    """The record with `change` applied to every answer; the same object if none changed."""
    rounds = tuple(replace(each, output=change(each.output)) if each.output else each for each in record.rounds)
    return record if rounds == record.rounds else replace(record, rounds=rounds)


def texts(record: Record) -> Iterator[str]:
    """Every text of a record that is not empty."""
    if record.system:
        yield record.system
    for each in record.rounds:
        yield from (text for text in (each.instruction, each.input, each.output) if text)


@dataclass
class StepCounts:
    """What one step did. rows_in + made = rows_out + rejected, always (`check`).

    Attributes:
        made: rows more than there were, where a step makes several of one.
        reasons: of rejections and flags, numbers in them as N; beyond 20 kinds "other reasons".
        found: what steps count beside rows: {"mail": 12}.
    """

    name: str
    rows_in: int = 0
    changed: int = 0
    rejected: int = 0
    flagged: int = 0
    made: int = 0
    rows_out: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)

    def add(self, other: StepCounts) -> None:
        """Add what the same step did to other rows."""
        for name in ("rows_in", "changed", "rejected", "flagged", "made", "rows_out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.reasons.items():
            self.give_reason(reason, count)
        self.found.update(other.found)

    def give_reason(self, reason: str, count: int = 1) -> None:
        kind = _DIGITS.sub("N", reason)
        if kind not in self.reasons and len(self.reasons) >= _MAX_REASONS:
            kind = "other reasons"
        self.reasons[kind] += count

    def check(self) -> None:
        """Raises RuntimeError where a row got lost or came from nowhere: a defect of the engine or a step."""
        if self.rows_in + self.made != self.rows_out + self.rejected:
            raise RuntimeError(
                f"step {self.name}: {self.rows_in} rows in + {self.made} made is not "
                f"{self.rows_out} out + {self.rejected} rejected"
            )


@dataclass(frozen=True, slots=True)
class Passing:
    """An item between steps, and whether its record still is what its columns say."""

    item: Item
    rewritten: bool = False


@dataclass(frozen=True, slots=True)
class Notice:
    """A row that a step rejected or flagged, as it was when it came to the step."""

    step: int
    reason: str
    passing: Passing
    rejected: bool


def run_row_steps(
    rows: Iterable[Passing], steps: Sequence[RowStep], counts: Sequence[StepCounts], first: int = 0
) -> Iterator[Passing | Notice]:
    """Takes rows through `steps`, in order.

    Args:
        rows: in the source's order.
        steps, counts: a `StepCounts` for each step, which is added to.
        first: the place in the recipe of the first step, for the notices.
    Yields:
        What comes out, and a Notice for each rejection (in the row's place) and flag (before the row).
    """
    for row in rows:
        yield from _through(row, steps, counts, 0, first)


def _through(
    row: Passing, steps: Sequence[RowStep], counts: Sequence[StepCounts], start: int, first: int
) -> Iterator[Passing | Notice]:
    for place in range(start, len(steps)):
        count = counts[place]
        count.rows_in += 1
        answer = steps[place](row.item)
        if isinstance(answer, list):
            yield from _made(row, answer, steps, counts, place, first)
            return
        if isinstance(answer, Rejected):
            count.rejected += 1
            count.give_reason(answer.reason)
            yield Notice(first + place, answer.reason, row, rejected=True)
            return
        item = answer if isinstance(answer, Item) else answer.item
        if not isinstance(answer, Item):
            count.found.update(answer.counts)
        if isinstance(answer, Flagged):
            count.flagged += 1
            count.give_reason(answer.reason)
            yield Notice(first + place, answer.reason, row, rejected=False)
        if item is not row.item:
            count.changed += 1
            row = Passing(item, row.rewritten or item.record is not row.item.record)
        count.rows_out += 1
    yield row


def _made(
    row: Passing, items: list[Item], steps: Sequence[RowStep], counts: Sequence[StepCounts], place: int, first: int
) -> Iterator[Passing | Notice]:
    """Several rows of one: each goes on by itself."""
    if len(items) < 2:
        raise RuntimeError(f"step {steps[place].name} gave a list of {len(items)}: expected at least two items")
    counts[place].changed += 1
    counts[place].made += len(items) - 1
    counts[place].rows_out += len(items)
    for item in items:
        yield from _through(Passing(item, rewritten=True), steps, counts, place + 1, first)
