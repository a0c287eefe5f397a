"""A recipe over files: chunks through workers, passes through spill files, the rows written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jindo_core.data.formats import detect_format
from jindo_core.data.readers import RowSource, kind_of, open_rows
from jindo_core.data.writers import RowWriter
from jindo_core.data_config import CleanConfig
from jindo_core.errors import InputError
from jindo_core.files import replacing
from jindo_core.refinery.pipeline import Item, JoinStep, Passing, Rejected, SetStep, StepCounts
from jindo_core.refinery.recipe import load_recipe
from jindo_core.refinery.segments import (
    Plan,
    Result,
    Source,
    chunked,
    columns_of,
    make_plan,
    notice_row,
    workers,
)
from jindo_core.refinery.spill import Spill, pack, unpack
from jindo_core.refinery.writeback import require_writable

Progress = Callable[[str, int, int], None]
"""What is done, how far it has come, and the whole."""

CHUNK_ROWS, CHUNK_SIZE = 500, 1 << 20
"""Rows, and characters or bytes, of a chunk: what goes to a worker at once."""
SMALL_FILE = 8 << 20
"""Bytes: below, starting processes takes longer than the work."""
MOST_WORKERS = 8
"""Reading and writing are this process's own: more can't be kept busy."""


@dataclass
class Report:
    """What a run did.

    Attributes:
        recipe, format: their names.
        rows_in: rows of the source; rows_out: of the output (of a dry run: that it would have).
        made, rejected: over all steps. rows_in + made = rows_out + rejected.
        steps: in order, the format's reading of the rows among them.
        notes: what a person should know.
    """

    recipe: str
    format: str
    dry_run: bool
    steps: list[StepCounts]
    rows_in: int = 0
    rows_out: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def made(self) -> int:
        return sum(step.made for step in self.steps)

    @property
    def rejected(self) -> int:
        return sum(step.rejected for step in self.steps)

    def check(self) -> None:
        """Raises RuntimeError where a row got lost or came from nowhere, within a step or between two."""
        flow = self.rows_in
        for step in self.steps:
            step.check()
            if step.rows_in != flow:
                raise RuntimeError(f"step {step.name} got {step.rows_in} rows, {flow} came out before it")
            flow = step.rows_out
        if flow != self.rows_out or self.rows_in + self.made != self.rows_out + self.rejected:
            raise RuntimeError(f"{self.rows_out} rows written, {flow} came out of the last step")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        steps = [
            {
                "step": step.name, "in": step.rows_in, "changed": step.changed, "rejected": step.rejected,
                "flagged": step.flagged, "made": step.made, "out": step.rows_out,
                "reasons": dict(step.reasons.most_common()), "found": dict(step.found.most_common()),
            }
            for step in self.steps
        ]  # fmt: skip
        return {
            "recipe": self.recipe, "format": self.format, "dry_run": self.dry_run, "in": self.rows_in,
            "made": self.made, "rejected": self.rejected, "out": self.rows_out, "steps": steps, "notes": self.notes,
        }  # fmt: skip


def clean(config: CleanConfig, on_progress: Progress | None = None) -> Report:
    """Cleans a file by a recipe.

    Memory is bounded: a few chunks, and what a step that needs all rows says it takes. The output comes to be when all
    is well; whatever ends the run earlier leaves what was there. Worker processes import the calling script: there call
    it under `if __name__ == "__main__":`, or with workers=1.

    Args:
        on_progress: told of each chunk.
    Raises:
        InputError: a file, format, recipe or place that doesn't serve, or no row left.
        TrainingError: a worker process died.
        RuntimeError: rows that were lost or came from nowhere: a defect.
    """
    recipe = load_recipe(config.recipe, config.seed)
    _check_places(config)
    source = open_rows(str(config.data_path))
    format = detect_format(source, config.dataset_format)
    if not config.dry_run:
        require_writable(format)
    plan = make_plan(
        recipe,
        format,
        rejected_rows=config.rejected_path is not None and not config.dry_run,
        flagged_rows=config.flagged_path is not None and not config.dry_run,
        output=not config.dry_run,
    )
    try:
        with ExitStack() as stack:
            run = _Run(plan, config, stack, on_progress or (lambda said, done, whole: None))
            write = stack.enter_context(_report_file(config.report_path))
            report = run.run(source, recipe.name)
            write(json.dumps(report.as_dict(), indent=2, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise InputError(
            f"the refinery can't go on ({error.strerror or error}): nothing was written; is there room in "
            f"{tempfile.gettempdir()} (TMPDIR) for a copy of the rows?"
        ) from error
    return report


@contextmanager
def _report_file(path: str | None) -> Iterator[Callable[[bytes], object]]:
    """Yields what takes the report. Its file is opened before the work, and in place before the output is."""
    if path is None:
        yield lambda content: None
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(replacing(Path(path)))
        except OSError as error:
            raise InputError(f"--report_path: {path} can't be written ({error.strerror}): nothing was") from error
        yield file.write


def _check_places(config: CleanConfig) -> None:
    notices = {"rejected": config.rejected_path, "flagged": config.flagged_path}
    rows = {} if config.dry_run else {"output": config.output_path, **notices}
    for name, path in {**rows, "report": config.report_path}.items():
        if path is not None and Path(path).is_dir():
            raise InputError(f"--{name}_path: {path} is a folder, expected a file")
        if path is not None and Path(path).exists() and not config.overwrite:
            raise InputError(f"--{name}_path: {path} is there already: give another name, or --overwrite to replace it")
    for name, path in notices.items():
        if path is not None and not kind_of(Path(path)).startswith("json"):
            raise InputError(f"--{name}_path: got {path}, expected a name that ends in .jsonl or .json")
    if config.report_path is not None and not Path(config.report_path).parent.is_dir():
        raise InputError(f"--report_path: the folder of {config.report_path} is missing: make it first")


class _Run:
    """One pass after the other: from the source to the first barrier, from there to the next, and out."""

    def __init__(self, plan: Plan, config: CleanConfig, stack: ExitStack, on_progress: Progress) -> None:
        self.plan, self.config, self.stack, self.on_progress = plan, config, stack, on_progress
        self.counts = [StepCounts(label) for label in plan.labels]
        self.rows_in = self.rows_out = 0
        self.rejected = self.flagged = self.output = None
        # What a barrier rejected before a chunk waits for that chunk's result: the file's order is no worker's.
        self.pending: list[dict[str, Any]] = []
        self.held: deque[list[dict[str, Any]]] = deque()
        if not config.dry_run:
            # The last to be entered is the first to be renamed: with the output in place, all are.
            self.output = stack.enter_context(RowWriter(str(config.output_path)))
            self.rejected = self._writer(config.rejected_path)
            self.flagged = self._writer(config.flagged_path)

    def _writer(self, path: str | None) -> RowWriter | None:
        return None if path is None else self.stack.enter_context(RowWriter(path))

    def run(self, source: RowSource, recipe: str) -> Report:
        with workers(self.plan, _worker_count(self.config, source)) as pool:
            chunks: Iterator[Any] = self._from(source)
            for place, segment in enumerate(self.plan.segments):
                results = pool.run(place, chunks)
                if segment.barrier is None:
                    self._write(results)
                    break
                spill = Spill()
                self.stack.callback(spill.close)
                for result in self._taken(results):
                    spill.append(result.rows, result.keys, result.numbers)
                spill.finish()
                label = segment.first + len(segment.steps)
                if isinstance(segment.barrier, SetStep):
                    chunks = self._judged(spill, segment.barrier, label)
                else:
                    chunks = self._joined(spill, segment.barrier, label)
        report = Report(recipe, self.plan.format.name, self.config.dry_run, self.counts, self.rows_in, self.rows_out)
        report.check()
        if not self.rows_out and not self.config.dry_run:
            raise InputError(f"no row of {self.rows_in} is left, so nothing was written: {_most(self.counts)}")
        report.notes = self._notes(source)
        return report

    def _from(self, source: RowSource) -> Iterator[Source]:
        for chunk in chunked(source, CHUNK_ROWS, CHUNK_SIZE):
            self.rows_in += len(chunk.rows)
            yield chunk
            self.on_progress("reading", source.bytes_read, source.size_bytes)

    def _taken(self, results: Iterator[Result]) -> Iterator[Result]:
        """The results of a pass, with their counts added and their notices written."""
        for result in results:
            for place, counts in result.counts.items():
                self.counts[place].add(counts)
            before = self.held.popleft() if self.held else []
            for rows, writer in ((before + result.rejected, self.rejected), (result.flagged, self.flagged)):
                if writer is not None:
                    for row in rows:
                        writer.write(row)
            yield result
        if self.rejected is not None:
            for row in self.pending:
                self.rejected.write(row)
        self.pending = []

    def _sent(self, rows: list[bytes]) -> Iterator[list[bytes]]:
        """A chunk that a barrier leaves; an empty one only where notices would gather."""
        if rows or len(self.pending) >= CHUNK_ROWS:
            self.held.append(self.pending)
            self.pending = []
            yield rows

    def _write(self, results: Iterator[Result]) -> None:
        for result in self._taken(results):
            self.rows_out += result.out
            if self.output is not None:
                for row in result.rows:
                    self.output.write(row)
        if self.output is not None and self.output.rows != self.rows_out:
            raise RuntimeError(f"{self.output.rows} rows written, {self.rows_out} came out of the last step")

    def _reject(self, row: Passing, label: int, reason: str) -> None:
        self.counts[label].rejected += 1
        self.counts[label].give_reason(reason)
        if self.rejected is not None:
            self.pending.append(notice_row(self.plan, row.item.number, label, reason, columns_of(self.plan, row)))

    def _judged(self, spill: Spill, step: SetStep, label: int) -> Iterator[list[bytes]]:
        """What a set step leaves."""
        counts, name = self.counts[label], self.plan.labels[label]
        decisions = _in_order(step, spill)
        place, reason = next(decisions, (len(spill), ""))
        for start, chunk in spill.chunks(CHUNK_ROWS, CHUNK_SIZE):
            stop, kept = start + len(chunk), start
            rows: list[bytes] = []
            while place < stop:
                rows += chunk[kept - start : place - start]
                self._reject(unpack(chunk[place - start]), label, reason)
                kept = place + 1
                place, reason = next(decisions, (len(spill), ""))
            rows += chunk[kept - start :]
            counts.rows_in += len(chunk)
            counts.rows_out += len(rows)
            yield from self._sent(rows)
            self.on_progress(name, stop, len(spill))

    def _joined(self, spill: Spill, step: JoinStep, label: int) -> Iterator[list[bytes]]:
        """What a join step makes of its groups, and the rows that it isn't concerned with."""
        counts, name = self.counts[label], self.plan.labels[label]
        groups = _Groups(step, spill)
        refused: dict[int, str] = {}  # a group's first row -> why
        for start, chunk in spill.chunks(CHUNK_ROWS, CHUNK_SIZE):
            rows: list[bytes] = []
            for place, packed in enumerate(chunk, start):
                leader, members = groups.of(place)
                if leader is None:
                    rows.append(packed)
                elif leader != place:
                    number = unpack(spill.read(leader, leader + 1)[0]).item.number
                    self._reject(unpack(packed), label, refused.get(leader) or f"joined with row {number}")
                else:
                    before = [unpack(packed), *(unpack(spill.read(each, each + 1)[0]) for each in members[1:])]
                    joined = step.join([row.item for row in before])
                    if isinstance(joined, Rejected):
                        refused[place] = joined.reason
                        self._reject(before[0], label, joined.reason)
                        continue
                    rows.append(packed if joined is before[0].item else _packed(joined, before[0]))
                    counts.changed += joined is not before[0].item
            counts.rows_in += len(chunk)
            counts.rows_out += len(rows)
            yield from self._sent(rows)
            self.on_progress(name, start + len(chunk), len(spill))

    def _notes(self, source: RowSource) -> list[str]:
        notes = [f"passed over, no data file: {path.name}" for path in source.passed_over]
        columns = source.columns()
        rewrites = any(step.changed for step in self.counts if step.name not in ("read", "rendered_text"))
        stale = "text" in columns and self.plan.format.missing([name for name in columns if name != "text"]) is None
        if stale and rewrites and "rendered_text" not in self.plan.labels:
            notes.append("the column text is as it was; where it repeats the row it is stale: put rendered_text first")
        return notes


def _packed(item: Item, before: Passing) -> bytes:
    return pack(Passing(item, before.rewritten or item.record is not before.item.record))


def _in_order(step: SetStep, spill: Spill) -> Iterator[tuple[int, str]]:
    """A set step's decisions, by the rows' places in the spill."""
    last = -1
    for index, reason in step.decide(spill.keys, spill.numbers) if len(spill.places) else ():
        if not last < index < len(spill.places):
            raise RuntimeError(f"step {step.name} rejected row {index} after {last}: expected indices in order")
        last = index
        yield int(spill.places[index]), reason


class _Groups:
    """The groups of a join step, by the rows' places in the spill. Memory: 24 bytes a row that has a key."""

    def __init__(self, step: JoinStep, spill: Spill) -> None:
        self._places = np.asarray(spill.places)
        count = len(self._places)
        self._leaders = np.asarray(step.leaders(spill.keys), np.int64) if count else np.empty(0, np.int64)
        own = np.arange(count)
        fits = self._leaders.shape == (count,) and bool((self._leaders >= 0).all() and (self._leaders <= own).all())
        if not fits or not (self._leaders[self._leaders] == self._leaders).all():
            raise RuntimeError(f"step {step.name} named leaders that don't begin a group")
        self._order = np.argsort(self._leaders, kind="stable")
        self._sorted = self._leaders[self._order]

    def of(self, place: int) -> tuple[int | None, list[int]]:
        """The place of the first row of a row's group, and for that row all of them; None: it is in no group."""
        index = int(np.searchsorted(self._places, place))
        if index == len(self._places) or self._places[index] != place:
            return None, []
        leader = int(self._leaders[index])
        if leader != index:
            return int(self._places[leader]), []
        first, last = np.searchsorted(self._sorted, [index, index + 1])
        return place, self._places[self._order[first:last]].tolist()


def _worker_count(config: CleanConfig, source: RowSource) -> int:
    if config.workers:
        return config.workers
    return 1 if source.size_bytes < SMALL_FILE else min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def _most(counts: list[StepCounts]) -> str:
    step = max(counts, key=lambda each: each.rejected)
    return f"step {step.name} rejected {step.rejected} ({step.reasons.most_common(1)[0][0]})"


