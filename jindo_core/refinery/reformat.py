"""`jindo-core data convert`: rows of one format as rows of another."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jindo_core.data.formats import Format, detect_format
from jindo_core.data.readers import Row, open_rows
from jindo_core.data.records import Record
from jindo_core.data.turns import CONVERSATIONS, RowError, conversation_turns
from jindo_core.data.writers import WRITABLE, RowWriter, row_of, split_rounds
from jindo_core.data_config_inspect import DataConvertConfig, check_output
from jindo_core.errors import InputError, nearest
from jindo_core.progress import ConversionView

_OF_TURNS = ("sharegpt", "vicuna", "messages")  # formats with room for any number of rounds


@dataclass
class _Made:
    """The rows that one row became, and what they lack of it; counted only once all of them could be said."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rounds_dropped: int = 0
    turns_dropped: int = 0
    left_behind: list[str] = field(default_factory=list)


@dataclass
class Converted:
    """Counts of a conversion. rows_in + made = rows_out + rejected.

    Attributes:
        made: rows more, from conversations that were split. rounds_dropped: those behind the first. turns_dropped: an
            answer to nothing at a conversation's start, a question at its end that nobody answers.
        left_behind: column that the target has no place for -> rows.
    """

    rows_in: int = 0
    made: int = 0
    rows_out: int = 0
    rejected: int = 0
    rounds_dropped: int = 0
    turns_dropped: int = 0
    left_behind: Counter[str] = field(default_factory=Counter)

    def add(self, made: _Made) -> None:
        """Add what came of a row."""
        self.made += len(made.rows) - 1
        self.rows_out += len(made.rows)
        self.rounds_dropped += made.rounds_dropped
        self.turns_dropped += made.turns_dropped
        self.left_behind.update(made.left_behind)

    def check(self) -> None:
        """Raises RuntimeError where a row got lost or came from nowhere: a defect."""
        if self.rows_in + self.made != self.rows_out + self.rejected:
            raise RuntimeError(
                f"{self.rows_in} rows in + {self.made} made is not {self.rows_out} out + {self.rejected} rejected"
            )


def run_convert(config: DataConvertConfig) -> Converted:
    """The `data convert` command. The output comes to be when all rows are in it.

    Raises:
        InputError: rows that can't be read; without `rejected_path` also a row that the target can't hold.
    """
    view = ConversionView()
    output = check_output(config.output_path, config.overwrite)
    target = str(config.to)
    if target not in WRITABLE:
        raise InputError(f"--to: got {target!r}, expected one of {', '.join(WRITABLE)}.{nearest(target, WRITABLE)}")
    source = open_rows(config.data_path or "")
    form = detect_format(source, config.dataset_format)
    counts = Converted()
    with ExitStack() as stack:
        # The last to be entered is the first to be renamed: with the output in place, both are.
        writer = stack.enter_context(RowWriter(output))
        rejected = None if config.rejected_path is None else stack.enter_context(_rejected(config))
        bar = stack.enter_context(view.bar("converting", source.size_bytes))
        read = 0
        for number, row in enumerate(source, 1):
            counts.rows_in += 1
            try:
                made = _made(row, number, form, config)
            except InputError as error:
                if rejected is None:
                    raise InputError(f"{error} (--rejected_path FILE puts such rows aside)") from None
                counts.rejected += 1
                reason = error.reason if isinstance(error, RowError) else str(error)
                rejected.write({"row": number, "reason": reason, "values": row.values})
                continue
            for values in made.rows:
                writer.write(values)
            counts.add(made)
            if number % 256 == 0:
                bar(source.bytes_read - read)
                read = source.bytes_read
        counts.check()
        if not counts.rows_out:
            raise InputError(f"none of {counts.rows_in:,} rows can be written as {target}, so nothing was written")
    _tell(view, counts, form, target, output)
    return counts


def _rejected(config: DataConvertConfig) -> RowWriter:
    path = Path(str(config.rejected_path)).expanduser()
    if path.exists() and not config.overwrite:
        raise InputError(f"--rejected_path: {path} is there already: give another name, or --overwrite to replace it")
    return RowWriter(path)


def _made(row: Row, number: int, form: Format, config: DataConvertConfig) -> _Made:
    record = replace(form.record(row), row=number)
    own = dict(form.mapped)
    read = {name for column in form.columns for name in column.rstrip("?").split("|")} - set(form.marks)
    others = {name: value for name, value in row.values.items() if name not in {own.get(ours, ours) for ours in read}}
    made = _Made(turns_dropped=_unread_turns(row, record, form))
    fitting = _fitting(record, config)
    if len(record.rounds) > 1 and config.rounds == "first":
        made.rounds_dropped = len(record.rounds) - len(fitting[0].rounds)
    for each in fitting:
        values = row_of(each, str(config.to))
        taken = {name for name in others if name == "id" and name in values}  # no number in place of its own id
        if config.keep_columns:
            taken |= {name for name in others if name not in values or name == "id"}
        values |= {name: value for name, value in others.items() if name in taken}
        made.left_behind += [name for name in others if name not in taken]
        made.rows.append(values)
    return made


def _unread_turns(row: Row, record: Record, form: Format) -> int:
    """Turns of a conversation that are no part of a question with its answer."""
    if form.name not in (*_OF_TURNS, "wizard") or not any(name in row.values for name in CONVERSATIONS):
        return 0
    return sum(role != "system" for role, _ in conversation_turns(row)) - 2 * len(record.rounds)


def _fitting(record: Record, config: DataConvertConfig) -> list[Record]:
    """The record, or what `rounds` says is made of it where the target has room for one round only."""
    if len(record.rounds) == 1 or config.to in _OF_TURNS or config.rounds == "refuse":
        return [record]
    if config.rounds == "split":
        return split_rounds(record)
    return [replace(record, rounds=record.rounds[:1])]


def _tell(view: ConversionView, counts: Converted, form: Format, target: str, output: Path) -> None:
    said = [f"{counts.rows_in:,} rows of {form.name} in", f"{counts.rows_out:,} of {target} out"]
    said += [f"{counts.made:,} made by splitting conversations"] if counts.made else []
    said += [f"{counts.rejected:,} rejected"] if counts.rejected else []
    said += [f"{counts.rounds_dropped:,} rounds behind the first dropped"] if counts.rounds_dropped else []
    said += [f"{counts.turns_dropped:,} turns without answer or question dropped"] if counts.turns_dropped else []
    view.say(", ".join(said))
    if counts.left_behind:
        named = ", ".join(f"{name} ({count:,})" for name, count in counts.left_behind.most_common(10))
        view.say(f"columns left behind: {named}; --keep_columns takes along what does not clash")
    view.say(f"written: {output}")
