"""Formats of instruction data: which columns each has, and what a row of it becomes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jindo_core.data.readers import Row, RowSource
from jindo_core.data.records import Record, Round
from jindo_core.errors import InputError, nearest

Turn = tuple[str, str]
"""Who speaks ("system", "user" or "assistant"), and the text."""
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""A turn's `from` or `role`, in small letters -> who speaks."""


class RowError(InputError):
    """A row that does not fit its format. reason: what is wrong, without the file and the row's number."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Format:
    """A format of instruction data.

    Attributes:
        name: as `--dataset_format` takes it.
        becomes: what a row becomes, in words.
        columns: those that a row has; "input?" may be missing or null, "Q|question" is one of two. Other columns are
            passed over.
        read: a row -> a record.
        detected: whether it is found by its columns; others are taken by name alone, beside one with the same columns.
        marks: columns that must also be there, for it to be found; without: that must not.
        holds: asked of the first rows too.
        mapped: a column of the format -> the file's own name for it.
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

    def record(self, row: Row) -> Record:
        """The record of a row.

        Raises:
            RowError: a column is missing or holds no text, or turns that make no conversation.
        """
        if self.mapped:
            for _, own in self.mapped:
                if own not in row.values:
                    raise _lacks(row, own, self)
            told = {ours: row.values[own] for ours, own in self.mapped}
            # What was told comes before another name for the same column that the file has too.
            groups = [column.rstrip("?").split("|") for column in self.columns]
            others = {name for names in groups if not told.keys().isdisjoint(names) for name in names}
            kept = {name: value for name, value in row.values.items() if name not in others}
            row = replace(row, values=kept | told)
        return self.read(row)

    def missing(self, columns: Sequence[str]) -> str | None:
        """The first column of the format that is not among these."""
        own = dict(self.mapped)
        for column in self.columns:
            names = [own.get(name, name) for name in column.rstrip("?").split("|")]
            if not column.endswith("?") and not any(name in columns for name in names):
                return names[0]
        return next((name for name in own.values() if name not in columns), None)

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether a file that begins with these rows is of this format."""
        columns = _columns(rows)
        return (
            self.detected
            and self.missing(columns) is None
            and all(name in columns for name in self.marks)
            and not any(name in columns for name in self.without)
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
        chosen = _named(name)
        for rows in heads:
            if (column := chosen.missing(_columns(rows))) is not None:
                raise _misfit(rows, column, chosen)
        return chosen
    for candidate in FORMATS.values():
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


# --- conversations ---------------------------------------------------------------------------------------


def conversation_turns(row: Row) -> list[Turn]:
    """The turns of a conversation as they stand, whether or not they alternate.

    They are under messages, conversations, conversation or items, each {"from", "value"} or {"role", "content"};
    content may be OpenAI's list of parts, if all are text. A column `system` comes first, unless a turn does.

    Raises:
        RowError: no list, a turn without one of these, an unknown role, a part that is no text.
    """
    column = next((name for name in CONVERSATIONS if name in row.values), CONVERSATIONS[0])
    turns = _turns(row, column, row.values.get(column))
    system = _text(row, "system", optional=True)
    return [("system", system), *turns] if system and (not turns or turns[0][0] != "system") else turns


def conversation(row: Row, turns: Sequence[Turn]) -> Record:
    """The record of a conversation, by FastChat's rules.

    A first turn of the system's becomes `system`; an answer to nothing at the start is dropped, so is a question at the
    end that nobody answers.

    Raises:
        RowError: turns that do not alternate, a system's turn further on, nothing left.
    """
    spoken = list(turns)
    system = spoken.pop(0)[1] if spoken and spoken[0][0] == "system" else ""
    dropped = bool(spoken) and spoken[0][0] == "assistant"
    if dropped:
        spoken.pop(0)
    first = len(turns) - len(spoken) + 1
    for index, (role, _) in enumerate(spoken):
        expected = "assistant" if index % 2 else "user"
        if role != expected:
            said = f"turn {first + index} is the {role}'s, expected the {expected}'s: turns alternate"
            raise _row_error(row, f": {said}", REPAIR)
    answered = len(spoken) // 2 * 2
    if not answered:
        raise _row_error(row, f" has {len(turns)} turns and no answer to a question, expected at least one")
    rounds = (Round(spoken[i][1], "", spoken[i + 1][1]) for i in range(0, answered, 2))
    return Record(tuple(rounds), system, row=row.number)


CONVERSATIONS = ("messages", "conversations", "conversation", "items")
"""Columns that hold turns."""


def _turns(row: Row, column: str, value: Any) -> list[Turn]:
    if not isinstance(value, list):
        raise _row_error(row, f": {column!r} is {in_words(value)}, expected a list of turns")
    turns = []
    for number, turn in enumerate(value, 1):
        said = f"turn {number} of {column!r}"
        if not isinstance(turn, dict):
            raise _row_error(row, f": {said} is {in_words(turn)}, expected an object")
        # What is null may be there for other rows' sake: Parquet gives each turn all keys.
        role = next((turn[key] for key in ("from", "role") if turn.get(key) is not None), None)
        text = next((turn[key] for key in ("value", "content") if turn.get(key) is not None), None)
        if not isinstance(role, str) or role.lower() not in ROLES:
            known = ", ".join(ROLES)
            raise _row_error(row, f": {said} is by {role!r}, expected from or role with one of {known}")
        if isinstance(text, list):
            text = _parts(row, said, text)
        if not isinstance(text, str):
            held = f"{said} holds {in_words(text)}"
            raise _row_error(row, f": {held}, expected text as value or content; its keys are {_keys(list(turn))}")
        _check_characters(row, said, text)
        turns.append((ROLES[role.lower()], text))
    return turns


def _parts(row: Row, said: str, parts: list[Any]) -> str:
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    for number, (part, text) in enumerate(zip(parts, texts, strict=True), 1):
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _row_error(row, f": part {number} of {said} is {kind!r}, expected type text (no images, no tools)")
    return "".join(text for text in texts if text)


# --- a row of each ---------------------------------------------------------------------------------------


def _alpaca(row: Row) -> Record:
    rounds = (Round(_text(row, "instruction"), _text(row, "input", optional=True), _text(row, "output")),)
    return Record(rounds, _text(row, "system", optional=True), row=row.number)


def _conversation(row: Row) -> Record:
    return conversation(row, conversation_turns(row))


def _wizard(row: Row) -> Record:
    return _conversation(row) if any(name in row.values for name in CONVERSATIONS) else _alpaca(row)


def _orca(row: Row) -> Record:
    rounds = (Round(_text(row, "question"), "", _text(row, "response", "chosen")),)
    return Record(rounds, _text(row, "system_prompt", "system", optional=True), row=row.number)


def _orca_dpo(row: Row) -> Record:
    asked = row.values.get("input")
    messages = asked.get("messages") if isinstance(asked, dict) else asked
    answer = _turns(row, "preferred_output", row.values.get("preferred_output"))
    return conversation(row, [*_turns(row, "input", messages), *answer])


def _seeds(row: Row) -> Record:
    instances = row.values.get("instances")
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
        got = f"{len(instances)} of them" if isinstance(instances, list) else in_words(instances)
        raise _row_error(row, f": 'instances' is {got}, expected a list of one object; give each a row of its own")
    inner = replace(row, values=instances[0])
    rounds = (Round(_text(row, "instruction"), _text(inner, "input", optional=True), _text(inner, "output")),)
    return Record(rounds, row=row.number)


def _qa(row: Row) -> Record:
    return Record.single(_text(row, "Q", "question"), "", _text(row, "A", "answer"), row.number)


def _raw(row: Row, prompt: str, answer: str) -> Record:
    return Record((Round(prompt, "", answer),), formatted=True, row=row.number)


def _self_instruct(row: Row) -> Record:
    return _raw(row, _text(row, "prompt"), _text(row, "completion"))


def _input_output(row: Row) -> Record:
    return _raw(row, _text(row, "input"), _text(row, "output"))


def _hh_rlhf(row: Row) -> Record:
    return _raw(row, "", _text(row, "chosen"))


def _plain(row: Row) -> Record:
    return _raw(row, "", _text(row, "text"))


def _chip2(row: Row) -> Record:
    text = _text(row, "text")
    rounds = []
    for asked in text.removeprefix("<human>: ").split("\n<human>: "):
        question, answered, answer = asked.partition("\n<bot>: ")
        if not answered:
            raise _row_error(row, ": 'text' has a question without an answer, expected '<human>: …\\n<bot>: …'")
        rounds.append(Round(question, "", answer))
    return Record(tuple(rounds), formatted=True, row=row.number)


def _is_chip2(rows: Sequence[Row]) -> bool:
    texts = [row.values.get("text") for row in rows]
    return all(isinstance(t, str) and t.startswith("<human>: ") and "\n<bot>: " in t for t in texts)


_ALPACA = ("instruction", "input?", "output", "system?")
_TURNS = ("conversations|conversation|items|messages", "system?")
_EITHER = ("instruction|conversations|conversation|items|messages", "input?", "output?", "system?")
_ORCA = ("system_prompt|system?", "question", "response|chosen")
_AS_IS = "one round, input and output as they are, no template"
_LEARNED = "all of it is learned, no template"
_LIST = [
    Format("messages", "its rounds; a system message as system", ("messages", "system?"), _conversation),
    Format("sharegpt", "its rounds; a system turn as system", _TURNS, _conversation),
    Format("vicuna", "as sharegpt", _TURNS, _conversation, detected=False),
    Format("orca-dpo", "the rounds of input.messages, the preferred answer", ("input", "preferred_output"), _orca_dpo),
    Format("self-instruct-seeds", "one round, of the one instance", ("instruction", "instances"), _seeds),
    Format("koalpaca", "one round", (*_ALPACA, "url?"), _alpaca, marks=("url",)),
    Format("alpaca", "one round", _ALPACA, _alpaca),
    Format("alpaca-clean", "as alpaca", _ALPACA, _alpaca, detected=False),
    Format("kullm", "as alpaca", _ALPACA, _alpaca, detected=False),
    Format("wizard", "as alpaca, or as sharegpt where there are turns", _EITHER, _wizard, detected=False),
    Format("orca", "one round with its system prompt", _ORCA, _orca),
    Format("self-instruct", _AS_IS, ("prompt", "completion"), _self_instruct),
    Format("input-output", _AS_IS, ("input", "output"), _input_output),
    Format("longform", "as input-output", ("input", "output"), _input_output, detected=False),
    Format("qa", "one round", ("Q|question", "A|answer"), _qa, without=("context", "passage", "choices", "options")),
    Format("hh-rlhf", _LEARNED, ("chosen",), _hh_rlhf, without=("prompt", "question", "input")),
    Format("chip2", "rounds split at <human>: and <bot>:, no template", ("text",), _chip2, holds=_is_chip2),
    Format("text", _LEARNED, ("text",), _plain),
    Format("oasst1", "as text", ("text",), _plain, detected=False),
]
FORMATS: dict[str, Format] = {entry.name: entry for entry in _LIST}
"""Name -> format, in the order in which they are tried: `text` beside instruction and output is alpaca."""


# --- what is wrong ---------------------------------------------------------------------------------------


def _text(row: Row, *names: str, optional: bool = False) -> str:
    """The text under the first of these columns that a row has."""
    column = next((name for name in names if name in row.values), None)
    if column is None:
        if optional:
            return ""
        raise _lacks(row, names[0])
    value = row.values[column]
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise _row_error(row, f": {column!r} is {in_words(value)}, expected text")
    _check_characters(row, repr(column), value)
    return value


def _check_characters(row: Row, said: str, text: str) -> None:
    """Refuse half a surrogate pair, which JSON can escape and no tokenizer can encode."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _row_error(
            row,
            f": {said} has half a surrogate pair at character {error.start}; expected whole characters; "
            "write it again as UTF-8",
        ) from error


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.values))


def _keys(columns: Sequence[str]) -> str:
    return ", ".join(map(repr, columns)) or "none"


def in_words(value: Any) -> str:
    """What a JSON value is, for a person: `null`, `the number 3`, `a list`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"the number {value}" if len(str(value)) < 20 else "a number"
    kinds: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


REJECT = "jindo-core data clean leaves such rows out"
REPAIR = "jindo-core data clean --recipe korean repairs or rejects them (its step conversation_roles)"


def _row_error(row: Row, problem: str, way_out: str = REJECT) -> RowError:
    return RowError(f"{row.place}{problem} ({way_out})", problem.lstrip(": "))


def _lacks(row: Row, column: str, chosen: Format | None = None) -> RowError:
    expected = f"; expected {', '.join(chosen.columns)}" if chosen else ""
    return _row_error(row, f" lacks {column!r}: its keys are {_keys(list(row.values))}{expected}")


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
    keys = _keys(_columns(rows))
    return InputError(f"{rows[0].place} lacks {column!r}, which format {chosen.name} needs: its keys are {keys}; {fix}")


def _unknown(rows: Sequence[Row]) -> InputError:
    columns = _columns(rows)
    prompts = next((name for name in ("turns", "prompt", "prompts") if name in columns), None)
    if prompts is not None:
        return InputError(
            f"{rows[0].place} holds prompts ({prompts!r}) and no answers that a format knows: its keys are "
            f"{_keys(columns)}; expected an answer beside each, such as completion"
        )
    candidates = [FORMATS["alpaca"], *(f for f in FORMATS.values() if f.detected)]
    required = {f.name: [c for c in f.columns if not c.endswith("?")] for f in candidates}
    near = max(candidates, key=lambda f: sum(any(n in columns for n in c.split("|")) for c in required[f.name]))
    column = near.missing(columns)
    if column is None:
        beside = next((name for name in near.without if name in columns), near.name)
        return InputError(
            f"{rows[0].place} has {beside!r} beside the columns of {near.name}, which would leave it out: its keys are "
            f"{_keys(columns)}; say --dataset_format {near.name} if it may be, or tell what is what: "
            "--dataset_format alpaca:instruction=…,input=…,output=…"
        )
    example = ",".join(f"{c.split('|')[0]}=…" for c in required[near.name])
    return InputError(
        f"{rows[0].place} lacks {column!r}: its keys are {_keys(columns)}; expected {', '.join(near.columns)}, or the "
        f"columns of another format; a file's own names are told so: --dataset_format {near.name}:{example}"
    )
