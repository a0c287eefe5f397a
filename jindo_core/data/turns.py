"""Rows' texts and turns, checked: what every format's reader asks of a row, and the errors where it does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jindo_core.data.readers import Row
from jindo_core.data.records import Record, Round
from jindo_core.errors import InputError

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


# --- conversations ---------------------------------------------------------------------------------------


def conversation_turns(row: Row) -> list[Turn]:
    """The turns of a conversation as they stand, whether or not they alternate.

    They are under messages, conversations, conversation or items, each {"from", "value"} or {"role", "content"};
    content may be OpenAI's list of parts, if all are text. A column `system` comes first, unless a turn does.

    Raises:
        RowError: no list, a turn without one of these, an unknown role, a part that is no text.
    """
    column = next((name for name in CONVERSATIONS if name in row.values), CONVERSATIONS[0])
    turns = turns_of(row, column, row.values.get(column))
    system = text_of(row, "system", optional=True)
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
            raise row_error(row, f": {said}", REPAIR)
    answered = len(spoken) // 2 * 2
    if not answered:
        raise row_error(row, f" has {len(turns)} turns and no answer to a question, expected at least one")
    rounds = (Round(spoken[i][1], "", spoken[i + 1][1]) for i in range(0, answered, 2))
    return Record(tuple(rounds), system, row=row.number)


CONVERSATIONS = ("messages", "conversations", "conversation", "items")
"""Columns that hold turns."""


def turns_of(row: Row, column: str, value: Any) -> list[Turn]:
    if not isinstance(value, list):
        raise row_error(row, f": {column!r} is {in_words(value)}, expected a list of turns")
    turns = []
    for number, turn in enumerate(value, 1):
        said = f"turn {number} of {column!r}"
        if not isinstance(turn, dict):
            raise row_error(row, f": {said} is {in_words(turn)}, expected an object")
        # What is null may be there for other rows' sake: Parquet gives each turn all keys.
        role = next((turn[key] for key in ("from", "role") if turn.get(key) is not None), None)
        text = next((turn[key] for key in ("value", "content") if turn.get(key) is not None), None)
        if not isinstance(role, str) or role.lower() not in ROLES:
            known = ", ".join(ROLES)
            raise row_error(row, f": {said} is by {role!r}, expected from or role with one of {known}")
        called = next((key for key in ("tool_calls", "function_call") if turn.get(key)), None)
        if called is not None:
            raise row_error(row, f": {said} has {called!r}, expected text alone (no tools)")
        if isinstance(text, list):
            text = _parts(row, said, text)
        if not isinstance(text, str):
            held = f"{said} holds {in_words(text)}"
            raise row_error(row, f": {held}, expected text as value or content; its keys are {keys_text(list(turn))}")
        _check_characters(row, said, text)
        turns.append((ROLES[role.lower()], text))
    return turns


def _parts(row: Row, said: str, parts: list[Any]) -> str:
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    for number, (part, text) in enumerate(zip(parts, texts, strict=True), 1):
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise row_error(row, f": part {number} of {said} is {kind!r}, expected type text (no images, no tools)")
    return "".join(text for text in texts if text)


# --- texts, and what is wrong ----------------------------------------------------------------------------


def text_of(row: Row, *names: str, optional: bool = False) -> str:
    """The text under the first of these columns that a row has."""
    column = next((name for name in names if name in row.values), None)
    if column is None:
        if optional:
            return ""
        raise lacks(row, names[0])
    value = row.values[column]
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise row_error(row, f": {column!r} is {in_words(value)}, expected text")
    _check_characters(row, repr(column), value)
    return value


def _check_characters(row: Row, said: str, text: str) -> None:
    """Refuse half a surrogate pair, which JSON can escape and no tokenizer can encode."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise row_error(
            row,
            f": {said} has half a surrogate pair at character {error.start}; expected whole characters; "
            "write it again as UTF-8",
        ) from error


def keys_text(columns: Sequence[str]) -> str:
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


def row_error(row: Row, problem: str, way_out: str = REJECT) -> RowError:
    return RowError(f"{row.place}{problem} ({way_out})", problem.lstrip(": "))


def lacks(row: Row, column: str, expected: str = "") -> RowError:
    """The error for a row without this column."""
    return row_error(row, f" lacks {column!r}: its keys are {keys_text(list(row.values))}{expected}")
