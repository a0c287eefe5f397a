"""Formats of instruction data: which columns each has, and what a row of it becomes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jindo_core.data.readers import Row, RowSource
from jindo_core.data.records import Record, Round
from jindo_core.data.turns import (
    CONVERSATIONS,
    conversation,
    conversation_turns,
    in_words,
    keys_text,
    lacks,
    row_error,
    text_of,
    turns_of,
)
from jindo_core.errors import InputError, nearest


@dataclass(frozen=True)
class Format:
    """A format of instruction data.

    Attributes:
        name: as `--dataset_format` takes it.
        becomes: what a row becomes, in words.
        columns: those that a row has; "input?" may be missing or null, "Q|question" is one of two. Other columns are
            passed over, but a format is not found beside one of `CONTEXTS` that holds something.
        read: a row -> a record.
        detected: whether it is found by its columns; others are taken by name alone, beside one with the same columns.
        marks: columns that must also be there, for it to be found; without: that must not.
        holds: asked of the first rows too.
        mapped: a column of the format -> the file's own name for it; folded: these are its names in other letters, and
            rows may lack them.
    """

    name: str
    becomes: str
    columns: tuple[str, ...]
    read: Callable[[Row], Record]
    detected: bool = True
    marks: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    holds: Callable[[Sequence[Row]], bool] | None = None
    mapped: tuple[tuple[str, str], ...] = ()
    folded: bool = False

    def record(self, row: Row) -> Record:
        """The record of a row.

        Raises:
            RowError: a column is missing or holds no text, or turns that make no conversation.
        """
        if self.mapped:
            for _, own in self.mapped:
                if own not in row.values and not self.folded:
                    raise lacks(row, own, f"; expected {', '.join(self.columns)}")
            told = {ours: row.values[own] for ours, own in self.mapped if own in row.values}
            # What was told comes before another name for the same column that the file has too.
            groups = [column.rstrip("?").split("|") for column in self.columns]
            others = {name for names in groups if not told.keys().isdisjoint(names) for name in names}
            kept = {name: value for name, value in row.values.items() if name not in others}
            row = replace(row, values=kept | told)
        return self.read(row)

    def missing(self, columns: Sequence[str]) -> str | None:
        """The first column of the format that is not among these."""
        for column, names in zip(self.columns, self.groups(), strict=True):
            if not column.endswith("?") and not any(name in columns for name in names):
                return names[0]
        return None if self.folded else next((own for _, own in self.mapped if own not in columns), None)

    def groups(self) -> list[list[str]]:
        """Each column's names in the file, of which the first that is there is read."""
        own = dict(self.mapped)
        return [[own.get(name, name) for name in column.rstrip("?").split("|")] for column in self.columns]

    def passed_over(self, columns: Sequence[str]) -> list[str]:
        """Those of a file's columns that nothing is made of."""
        taken = {next((name for name in names if name in columns), None) for names in self.groups()}
        return [name for name in columns if name not in taken]

    def left_out(self, rows: Sequence[Row]) -> str | None:
        """A column of these rows that the question can't do without, and that would be passed over."""
        for name in self.passed_over(_columns(rows)):
            filled = any(row.values.get(name) not in (None, "", [], {}) for row in rows)
            if _fold(name) in self.without or (filled and _fold(name) in CONTEXTS):
                return name
        return None

    def named_as_in(self, columns: Sequence[str]) -> Format:
        """The same format for a file that writes its names in other letters: `Instruction`, " input"."""
        if self.mapped or "text" in self.columns:  # a `Text` by itself may be anything
            return self
        pairs = []
        for names in self.groups():
            alike = [(name, [own for own in columns if _fold(own) == _fold(name)]) for name in names]
            found = [(name, own[0]) for name, own in alike if len(own) == 1]
            pairs += [] if any(name in columns for name in names) else found[:1]
        return replace(self, mapped=tuple(pairs), folded=True) if pairs else self

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether a file that begins with these rows is of this format."""
        columns = _columns(rows)
        return (
            self.detected
            and self.missing(columns) is None
            and all(name in columns for name in self.marks)
            and self.left_out(rows) is None
            and (self.holds is None or self.holds(rows))
        )


def detect_format(source: RowSource, name: str | None = None) -> Format:
    """The format of a file, or the one that fits all files of a folder.

    Args:
        name: a format's name, whose columns are then looked for; with a file's own names for them after it,
            `alpaca:instruction=Question,output=Answer`. None: the first format in FORMATS that fits.
    Raises:
        InputError: an unknown name; a file that lacks its columns (those that it has, and the format that fits); files
            of different formats.
    """
    heads = [part.head() for part in source.parts()]
    if name is not None:
        chosen = _named(name).named_as_in(_columns([row for rows in heads for row in rows]))
        for rows in heads:
            if (column := chosen.missing(_columns(rows))) is not None:
                raise _misfit(rows, column, chosen)
        return chosen
    columns = _columns([row for rows in heads for row in rows])
    for candidate in (one.named_as_in(columns) for one in FORMATS.values()):
        if all(candidate.fits(rows) for rows in heads):
            return candidate
    found = [next((f.name for f in FORMATS.values() if f.fits(rows)), None) for rows in heads]
    if None in found:
        raise _unknown(heads[found.index(None)])
    apart = (i for i, rows in enumerate(heads) if not any(f.fits(heads[0]) and f.fits(rows) for f in FORMATS.values()))
    other = next(apart, next(i for i, format_name in enumerate(found) if format_name != found[0]))
    raise InputError(
        f"{source.paths[0]} is {found[0]} and {source.paths[other]} is {found[other]}: expected files of one format; "
        "give them one by one, or --dataset_format"
    )


def named_dataset(name: str) -> tuple[str, str] | None:
    """What qlora's `--dataset NAME` means: a data set of the Hub, and its format. None: no such name.

    Raises:
        InputError: vicuna, which qlora names and nobody ever released.
    """
    if name == "vicuna":
        raise InputError("data set vicuna was never released: give a file of ShareGPT conversations, --dataset FILE")
    repo = {
        "alpaca": "tatsu-lab/alpaca",
        "alpaca-clean": "yahma/alpaca-cleaned",
        "chip2": "laion/OIG",
        "self-instruct": "yizhongw/self_instruct",
        "hh-rlhf": "Anthropic/hh-rlhf",
        "longform": "akoksal/LongForm",
        "oasst1": "timdettmers/openassistant-guanaco",
    }.get(name)
    return None if repo is None else (repo, name)


# --- a row of each ---------------------------------------------------------------------------------------


def _alpaca(row: Row) -> Record:
    asked = Round(
        text_of(row, "instruction"),
        text_of(row, "input", "context", optional=True),
        text_of(row, "output", "response"),
    )
    return Record((*_history(row), asked), text_of(row, "system", optional=True), row=row.number)


def _history(row: Row) -> Iterator[Round]:
    """Earlier rounds of an alpaca row, as LLaMA-Factory has them: a list of questions with their answers."""
    history = row.values.get("history") or []
    if not isinstance(history, list):
        raise row_error(row, f": 'history' is {in_words(history)}, expected a list of [question, answer]")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row_error(row, f": part {number} of 'history' is no pair, expected [question, answer]")
        inner = replace(row, values={"its question": pair[0], "its answer": pair[1]})
        yield Round(text_of(inner, "its question"), "", text_of(inner, "its answer"))


def _conversation(row: Row) -> Record:
    return conversation(row, conversation_turns(row))


def _wizard(row: Row) -> Record:
    return _conversation(row) if any(name in row.values for name in CONVERSATIONS) else _alpaca(row)


def _orca(row: Row) -> Record:
    rounds = (Round(text_of(row, "question"), "", text_of(row, "response", "chosen")),)
    return Record(rounds, text_of(row, "system_prompt", "system", optional=True), row=row.number)


def _orca_dpo(row: Row) -> Record:
    asked = row.values.get("input")
    messages = asked.get("messages") if isinstance(asked, dict) else asked
    answer = turns_of(row, "preferred_output", row.values.get("preferred_output"))
    return conversation(row, [*turns_of(row, "input", messages), *answer])


def _seeds(row: Row) -> Record:
    instances = row.values.get("instances")
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
        got = f"{len(instances)} of them" if isinstance(instances, list) else in_words(instances)
        raise row_error(row, f": 'instances' is {got}, expected a list of one object; give each a row of its own")
    inner = replace(row, values=instances[0])
    rounds = (Round(text_of(row, "instruction"), text_of(inner, "input", optional=True), text_of(inner, "output")),)
    return Record(rounds, row=row.number)


def _qa(row: Row) -> Record:
    return Record.single(text_of(row, "Q", "question"), "", text_of(row, "A", "answer"), row.number)


def _raw(row: Row, prompt: str, answer: str) -> Record:
    return Record((Round(prompt, "", answer),), formatted=True, row=row.number)


def _self_instruct(row: Row) -> Record:
    return _raw(row, text_of(row, "prompt"), text_of(row, "completion"))


def _input_output(row: Row) -> Record:
    return _raw(row, text_of(row, "input"), text_of(row, "output"))


def _hh_rlhf(row: Row) -> Record:
    return _raw(row, "", text_of(row, "chosen"))


def _plain(row: Row) -> Record:
    return _raw(row, "", text_of(row, "text"))


def _chip2(row: Row) -> Record:
    text = text_of(row, "text")
    rounds = []
    for asked in text.removeprefix("<human>: ").split("\n<human>: "):
        question, answered, answer = asked.partition("\n<bot>: ")
        if not answered:
            raise row_error(row, ": 'text' has a question without an answer, expected '<human>: …\\n<bot>: …'")
        rounds.append(Round(question, "", answer))
    return Record(tuple(rounds), formatted=True, row=row.number)


def _is_chip2(rows: Sequence[Row]) -> bool:
    texts = [row.values.get("text") for row in rows]
    return all(isinstance(t, str) and t.startswith("<human>: ") and "\n<bot>: " in t for t in texts)


CONTEXTS = frozenset(
    [
        "context", "contexts", "passage", "passages", "paragraph", "document", "documents", "article",
        "background", "evidence", "knowledge", "choices", "options", "history", "instruction", "input",
        "inputs", "system", "system_prompt", "tools", "tool_calls", "functions",
    ]
)  # fmt: skip
"""Columns without which a question is not whole, in small letters."""
_BESIDE_QA = ("text", "sentence", "b", "1")  # what is asked about, or what is to be chosen from
_ALPACA = ("instruction", "input|context?", "output|response", "system?", "history?")
_TURNS = ("conversations|conversation|items|messages", "system?")
_EITHER = ("instruction|conversations|conversation|items|messages", *_ALPACA[1:2], "output|response?", *_ALPACA[3:])
_ORCA = ("system_prompt|system?", "question", "response|chosen")
_AS_IS = "one round, input and output as they are, no template"
_LEARNED = "all of it is learned, no template"
_LIST = [
    Format("messages", "its rounds; a system message as system", ("messages", "system?"), _conversation),
    Format("sharegpt", "its rounds; a system turn as system", _TURNS, _conversation),
    Format("vicuna", "as sharegpt", _TURNS, _conversation, detected=False),
    Format("orca-dpo", "the rounds of input.messages, the preferred answer", ("input", "preferred_output"), _orca_dpo),
    Format("self-instruct-seeds", "one round, of the one instance", ("instruction", "instances"), _seeds),
    Format("koalpaca", "one round behind those of history", (*_ALPACA, "url?"), _alpaca, marks=("url",)),
    Format("alpaca", "one round behind those of history", _ALPACA, _alpaca),
    Format("alpaca-clean", "as alpaca", _ALPACA, _alpaca, detected=False),
    Format("kullm", "as alpaca", _ALPACA, _alpaca, detected=False),
    Format("wizard", "as alpaca, or as sharegpt where there are turns", _EITHER, _wizard, detected=False),
    Format("orca", "one round with its system prompt", _ORCA, _orca),
    Format("self-instruct", _AS_IS, ("prompt", "completion"), _self_instruct),
    Format("input-output", _AS_IS, ("input", "output"), _input_output),
    Format("longform", "as input-output", ("input", "output"), _input_output, detected=False),
    Format("qa", "one round", ("Q|question", "A|answer"), _qa, without=_BESIDE_QA),
    Format("hh-rlhf", _LEARNED, ("chosen",), _hh_rlhf, without=("prompt", "question", "input")),
    Format("chip2", "rounds split at <human>: and <bot>:, no template", ("text",), _chip2, holds=_is_chip2),
    Format("text", _LEARNED, ("text",), _plain),
    Format("oasst1", "as text", ("text",), _plain, detected=False),
]
FORMATS: dict[str, Format] = {entry.name: entry for entry in _LIST}
"""Name -> format, in the order in which they are tried: `text` beside instruction and output is alpaca."""


# --- what is wrong ---------------------------------------------------------------------------------------


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.values))


def _named(name: str) -> Format:
    base, _, mapping = name.partition(":")
    if base not in FORMATS:
        raise InputError(f"dataset_format {name!r} is unknown: expected {', '.join(FORMATS)}.{nearest(base, FORMATS)}")
    chosen = FORMATS[base]
    if not mapping:
        return chosen
    known = [part for column in chosen.columns for part in column.rstrip("?").split("|")]
    pairs = [tuple(re.split(r"\s*=\s*", pair.strip(), maxsplit=1)) for pair in mapping.split(",")]
    for pair in pairs:
        if len(pair) != 2 or pair[0] not in known or not pair[1]:
            raise InputError(
                f"dataset_format {name!r}: expected COLUMN=NAME with a column among {', '.join(known) or 'none'}, "
                f"got {'='.join(pair)!r}"
            )
    return replace(chosen, mapped=tuple((pair[0], pair[1]) for pair in pairs))


def _misfit(rows: Sequence[Row], column: str, chosen: Format) -> InputError:
    """A file that lacks a column of the format that it was said to have."""
    fitting = next((f.name for f in FORMATS.values() if f.fits(rows)), None)
    fix = f"the format that fits is {fitting} (--dataset_format {fitting})" if fitting else "no known format fits"
    keys = keys_text(_columns(rows))
    return InputError(f"{rows[0].place} lacks {column!r}, which format {chosen.name} needs: its keys are {keys}; {fix}")


def _unknown(rows: Sequence[Row]) -> InputError:
    columns = _columns(rows)
    within = next((name for name, value in rows[0].values.items() if _is_rows(value)), None)
    if len(rows) == 1 and within is not None and not set(columns) & set(CONVERSATIONS):
        return InputError(
            f"{rows[0].place} is one object with a list of rows under {within!r}: expected the rows themselves; "
            f"jq -c '.{within}[]' {rows[0].path.name} > rows.jsonl"
        )
    named = {_fold(name): name for name in reversed(columns)}
    prompts = next((named[name] for name in ("turns", "prompt", "prompts") if name in named), None)
    candidates = [one.named_as_in(columns) for one in (FORMATS["alpaca"], *FORMATS.values()) if one.detected]
    near = max(candidates, key=lambda one: (one.missing(columns) is None, len(columns) - len(one.passed_over(columns))))
    column, keys = near.missing(columns), keys_text(columns)
    beside = near.left_out(rows)
    if column is None and beside is not None and beside != prompts:
        return InputError(
            f"{rows[0].place} has {beside!r} beside the columns of {near.name}, which would leave it out: its keys are "
            f"{keys}; say --dataset_format {near.name} if it may be, or tell what is what: "
            + _telling(near, beside, columns)
        )
    if prompts is not None:
        answer = next((named[name] for name in ("chosen", "response", "output", "answer") if name in named), None)
        told = f"--dataset_format self-instruct:prompt={prompts},completion={answer}, if {answer!r} is it"
        return InputError(
            f"{rows[0].place} holds prompts ({prompts!r}) and no answers that a format knows: its keys are "
            f"{keys}; expected an answer beside each, {f'told so: {told}' if answer else 'such as completion'}"
        )
    required = [c.split("|")[0] for c in near.columns if not c.endswith("?")]
    example = ",".join(f"{name}=…" for name in required)
    return InputError(
        f"{rows[0].place} lacks {column!r}: its keys are {keys}; expected {', '.join(near.columns)}, or the "
        f"columns of another format; a file's own names are told so: --dataset_format {near.name}:{example}"
    )


def _telling(near: Format, beside: str, columns: Sequence[str]) -> str:
    """The flag that has alpaca read all of a question, its context and its answer."""
    groups = [g for g, c in zip(near.groups(), near.columns, strict=True) if not c.endswith("?")]
    texts = [name for names in groups for name in names if name in columns]
    place = "system" if _fold(beside).startswith("system") else "input"
    lost = place in columns and place not in (beside, *texts)
    if len(texts) != 2 or lost or _fold(beside) == "history" or "tool" in _fold(beside):
        return "--dataset_format alpaca:instruction=…,input=…,output=…"
    return f"--dataset_format alpaca:instruction={texts[0]},{place}={beside},output={texts[1]}"


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _fold(name: str) -> str:
    return name.strip().casefold()
