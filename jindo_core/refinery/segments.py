"""What a worker process does: a recipe's steps between two points at which all rows must be known."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from jindo_core.data.formats import Format, RowError
from jindo_core.data.readers import Row
from jindo_core.errors import InputError, TrainingError
from jindo_core.refinery.pipeline import (
    Item,
    JoinStep,
    Notice,
    Passing,
    RawStep,
    Rejected,
    RowStep,
    SetStep,
    StepCounts,
    run_row_steps,
)
from jindo_core.refinery.recipe import Recipe
from jindo_core.refinery.spill import pack, unpack
from jindo_core.refinery.writeback import written_back

READ = "read"
"""The step that every recipe has: the format reads the row."""


@dataclass(frozen=True)
class Segment:
    """Row steps, and the step after them that needs all rows; None at the recipe's end.

    first: the place among `Plan.labels` of the first row step.
    """

    steps: tuple[RowStep, ...]
    barrier: SetStep | JoinStep | None
    first: int


@dataclass(frozen=True)
class Plan:
    """What every worker knows.

    Attributes:
        labels: the raw steps', `read`, and the other steps'.
        rejected_rows, flagged_rows, output: whether a worker hands back such rows, or only counts.
    """

    format: Format
    raw: tuple[RawStep, ...]
    segments: tuple[Segment, ...]
    labels: tuple[str, ...]
    rejected_rows: bool
    flagged_rows: bool
    output: bool


def make_plan(recipe: Recipe, format: Format, *, rejected_rows: bool, flagged_rows: bool, output: bool) -> Plan:
    """Cuts a recipe at its set and join steps."""
    raw = tuple(step for step in recipe.steps if isinstance(step, RawStep))
    labels = (*recipe.labels[: len(raw)], READ, *recipe.labels[len(raw) :])
    segments: list[Segment] = []
    steps: list[RowStep] = []
    first = len(raw) + 1
    for place, step in enumerate(recipe.steps[len(raw) :], len(raw) + 1):
        if isinstance(step, RowStep):
            steps.append(step)
        elif isinstance(step, SetStep | JoinStep):
            segments.append(Segment(tuple(steps), step, first))
            steps, first = [], place + 1
    segments.append(Segment(tuple(steps), None, first))
    return Plan(format, raw, tuple(segments), labels, rejected_rows, flagged_rows, output)


@dataclass
class Result:
    """What became of a chunk.

    Attributes:
        counts: by the place of the step.
        rejected, flagged: rows for the two files.
        rows: packed, with `keys` and `numbers`, before a barrier; columns as they are written, at the end.
        out: how many rows came out, handed back or not.
    """

    counts: dict[int, StepCounts]
    rejected: list[dict[str, Any]] = field(default_factory=list)
    flagged: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    out: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """A chunk of the source: the number of its first row, and the rows."""

    first: int
    rows: list[Row]


def columns_of(plan: Plan, row: Passing) -> dict[str, Any]:
    """A row's columns as they are written."""
    if not row.rewritten:
        return row.item.values
    try:
        return written_back(row.item.record, row.item.values, plan.format)
    except InputError as error:
        raise InputError(f"row {row.item.number}: {error}") from None


def notice_row(plan: Plan, number: int, step: int, reason: str, values: dict[str, Any]) -> dict[str, Any]:
    """A line of the file of rejected or flagged rows: what no file of JSON can say stands there as escaped text."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except (UnicodeEncodeError, TypeError):  # half a surrogate pair; a date of Parquet
        values = {"json": json.dumps(values, default=str)}
    return {"row": number, "step": plan.labels[step], "reason": reason, "values": values}


def work(plan: Plan, place: int, chunk: Source | list[bytes]) -> Result:
    """Takes a chunk through segment number `place`: the source's rows through the first, packed ones through others."""
    segment = plan.segments[place]
    before = range(len(plan.raw) + 1) if isinstance(chunk, Source) else range(0)
    own = range(segment.first, segment.first + len(segment.steps))
    result = Result({step: StepCounts(plan.labels[step]) for step in (*before, *own)})
    rows = _read(plan, chunk, result) if isinstance(chunk, Source) else map(unpack, chunk)
    for row in run_row_steps(rows, segment.steps, [result.counts[step] for step in own], segment.first):
        if isinstance(row, Notice):
            wanted, kept = (
                (plan.rejected_rows, result.rejected) if row.rejected else (plan.flagged_rows, result.flagged)
            )
            if wanted:
                item = row.passing.item
                kept.append(notice_row(plan, item.number, row.step, row.reason, columns_of(plan, row.passing)))
            continue
        result.out += 1
        if segment.barrier is not None:
            result.rows.append(pack(row))
            result.keys.append(segment.barrier.key(row.item))
            result.numbers.append(row.item.number)
        elif plan.output:
            result.rows.append(columns_of(plan, row))
    return result


def _read(plan: Plan, chunk: Source, result: Result) -> Iterator[Passing]:
    """Rows of the source through the raw steps and the format."""
    count = result.counts[len(plan.raw)]
    for number, row in enumerate(chunk.rows, chunk.first):
        for values in _raw(plan, row.values, 0, number, result):
            count.rows_in += 1
            try:
                record = plan.format.record(Row(row.number, row.where, values, row.path))
            except RowError as error:
                count.rejected += 1
                count.give_reason(error.reason)
                if plan.rejected_rows:
                    result.rejected.append(notice_row(plan, number, len(plan.raw), error.reason, values))
                continue
            count.rows_out += 1
            yield Passing(Item(record, values, number))


def _raw(plan: Plan, values: dict[str, Any], start: int, number: int, result: Result) -> Iterator[dict[str, Any]]:
    """A row's columns, or those of several made of it, through the raw steps from `start`."""
    for step in range(start, len(plan.raw)):
        count = result.counts[step]
        count.rows_in += 1
        answer = plan.raw[step](values)
        if isinstance(answer, Rejected):
            count.rejected += 1
            count.give_reason(answer.reason)
            if plan.rejected_rows:
                result.rejected.append(notice_row(plan, number, step, answer.reason, values))
            return
        several = answer if isinstance(answer, list) else [answer]
        count.changed += answer is not values
        count.made += len(several) - 1
        count.rows_out += len(several)
        if isinstance(answer, list):
            if len(answer) < 2:
                raise RuntimeError(f"step {plan.raw[step].name} gave {len(answer)} rows: expected at least two")
            for each in answer:
                yield from _raw(plan, each, step + 1, number, result)
            return
        values = answer
    yield values


class Workers:
    """Takes chunks through a segment, in order, in this process or in several."""

    def __init__(self, plan: Plan, pool: ProcessPoolExecutor | None, count: int) -> None:
        self._plan, self._pool, self._ahead = plan, pool, 2 * count

    def run(self, place: int, chunks: Iterable[Source | list[bytes]]) -> Iterator[Result]:
        """The results in the chunks' order; at most twice as many chunks as processes are on their way.

        Raises:
            TrainingError: a worker process died.
        """
        if self._pool is None:
            yield from (work(self._plan, place, chunk) for chunk in chunks)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for chunk in chunks:
                waiting.append(self._pool.submit(_work, place, chunk))
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise TrainingError(
                "a worker process of the refinery died (out of memory, or killed): nothing was written; --workers 1 "
                "runs without them"
            ) from None


@contextmanager
def workers(plan: Plan, count: int) -> Iterator[Workers]:
    """`count` worker processes, or none for 1. They end with the block, and with this process."""
    if count == 1:
        yield Workers(plan, None, 1)
        return
    # Not forked: this process may have threads, and what they hold would stay held in the child.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(plan,))
    try:
        yield Workers(plan, pool, count)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_plans: list[Plan] = []  # of a worker process


def _start(plan: Plan) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent says what happens
    _plans.append(plan)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """A killed parent closes no queue: its children would wait for ever."""
    wait([sentinel])
    os._exit(1)


def _work(place: int, chunk: Source | list[bytes]) -> Result:
    return work(_plans[0], place, chunk)


def chunked(rows: Iterable[Row], count: int, size: int) -> Iterator[Source]:
    """Chunks of at most `count` rows, and about `size` characters."""
    first, chunk, weight, number = 1, [], 0, 0
    for number, row in enumerate(rows, 1):
        chunk.append(row)
        weight += _characters(row.values)
        if len(chunk) >= count or weight >= size:
            yield Source(first, chunk)
            first, chunk, weight = number + 1, [], 0
    if chunk:
        yield Source(first, chunk)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    inner: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 16 + sum(map(_characters, inner))
