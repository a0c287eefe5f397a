"""A changed record, written back into the columns that it was read from, in the file's own style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jindo_core.data.formats import CONVERSATIONS, ROLES, Format
from jindo_core.data.records import Record, Round
from jindo_core.errors import InputError

_ALPACA = {"instruction": "instruction", "input": "input", "output": "output", "system": "system"}
_PLAIN = {"output": "text"}
_AS_IS = {"instruction": "input", "output": "output"}
_TABLES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("alpaca", "alpaca-clean", "koalpaca", "kullm"), _ALPACA),
    "orca": {"instruction": "question", "output": "response|chosen", "system": "system_prompt|system"},
    "self-instruct": {"instruction": "prompt", "output": "completion"},
    "input-output": _AS_IS,
    "longform": _AS_IS,
    "qa": {"instruction": "Q|question", "output": "A|answer"},
    "hh-rlhf": {"output": "chosen"},
    "text": _PLAIN,
    "oasst1": _PLAIN,
}
"""Formats of one round: a text of the record -> its column, the first of these that the row has."""
_TURNS = ("messages", "sharegpt", "vicuna")
_WORDS = {"from": {"user": "human", "assistant": "gpt"}, "role": {"user": "user", "assistant": "assistant"}}
"""A turn's key for who speaks -> what it says where the row gives no example."""


def require_writable(format: Format) -> None:
    """Raises InputError for a format whose rows can be read, but not written back."""
    if format.name not in (*_TABLES, *_TURNS, "wizard", "chip2"):
        raise InputError(
            f"format {format.name} can't be written back: bring the file to another one first "
            "(jindo-core data convert --to alpaca), or --dry_run"
        )


def written_back(record: Record, values: dict[str, Any], format: Format) -> dict[str, Any]:
    """The row's columns with the record's texts in them; other columns, their order and a conversation's keys stay.

    Raises:
        InputError: a record that the format can't say: of several rounds where it has one.
    """
    own = dict(format.mapped)
    if format.name in _TURNS or (format.name == "wizard" and any(own.get(c, c) in values for c in CONVERSATIONS)):
        return _with_turns(record, values, own)
    if format.name == "chip2":
        text = "\n".join(f"<human>: {each.instruction}\n<bot>: {each.output}" for each in record.rounds)
        return {**values, own.get("text", "text"): text}
    if len(record.rounds) != 1:
        raise InputError(f"a row of {len(record.rounds)} rounds can't be written as {format.name}, which has one")
    table = _ALPACA if format.name == "wizard" else _TABLES[format.name]
    (one,) = record.rounds
    texts = {"system": record.system, "instruction": one.instruction, "input": one.input, "output": one.output}
    written = dict(values)
    for key, columns in table.items():
        column = _column(columns, values, own)
        if texts[key] or values.get(column):  # an input that is missing or null stays so
            written[column] = texts[key]
    unsaid = [key for key in texts if texts[key] and key not in table]
    if unsaid:
        raise InputError(f"a row with {' and '.join(unsaid)} can't be written as {format.name}")
    return written


def _column(columns: str, values: dict[str, Any], own: dict[str, str]) -> str:
    names = [own.get(name, name) for name in columns.split("|")]
    return next((name for name in names if name in values), names[0])


def _with_turns(record: Record, values: dict[str, Any], own: dict[str, str]) -> dict[str, Any]:
    column = next(own.get(name, name) for name in CONVERSATIONS if own.get(name, name) in values)
    old: list[dict[str, Any]] = values[column]
    who = "role" if old[0].get("from") is None else "from"
    what = "content" if old[0].get("value") is None else "value"
    words = {**_WORDS[who], "system": "system", **{ROLES[t[who].lower()]: t[who] for t in reversed(old) if t.get(who)}}
    turns = [("system", record.system)] if record.system and ROLES[old[0][who].lower()] == "system" else []
    turns += _spoken(record.rounds)
    if [ROLES[turn[who].lower()] for turn in old] == [role for role, _ in turns]:
        new = [{**turn, what: text} for turn, (_, text) in zip(old, turns, strict=True)]  # with what else a turn has
    else:
        new = [{who: words[role], what: text} for role, text in turns]
    written = {**values, column: new}
    system = own.get("system", "system")
    if turns[0][0] != "system" and (record.system or values.get(system)):
        written[system] = record.system
    return written


def _spoken(rounds: Sequence[Round]) -> list[tuple[str, str]]:
    turns = []
    for each in rounds:
        turns.append(("user", f"{each.instruction}\n\n{each.input}" if each.input else each.instruction))
        if each.output:
            turns.append(("assistant", each.output))
    return turns
