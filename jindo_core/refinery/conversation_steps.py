"""Steps for conversations: turns that alternate, a least length, long ones split between rounds (FastChat's rules)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from jindo_core.data.formats import CONVERSATIONS, ROLES
from jindo_core.data.records import Round
from jindo_core.refinery.pipeline import Flagged, Item, RawStep, Rejected, RowStep, Step, option


@dataclass(frozen=True)
class ConversationRoles(RawStep):
    """Makes turns alternate: a leading answer and a trailing question go, others are joined or the row is rejected."""

    name: ClassVar[str] = "conversation_roles"

    broken: Literal["join", "reject"] = option("join", "two turns of one speaker in a row become one, or the row goes")
    separator: str = option("\n\n", "what stands between joined turns")
    empty: Literal["drop", "keep"] = option("drop", "turns without text")

    def __call__(self, values: dict[str, Any]) -> dict[str, Any] | Rejected:
        column = next((name for name in CONVERSATIONS if name in values), None)
        if column is None:
            return values
        turns = values[column]
        if not isinstance(turns, list):
            return Rejected(f"{column} is a {type(turns).__name__}, expected a list of turns")
        system: list[Any] = []
        kept: list[tuple[str, Any]] = []
        for number, turn in enumerate(turns, 1):
            role = _role(turn)
            if role is None:
                return Rejected(f"turn {number} has no role that is known")
            if self.empty == "drop" and _is_empty(turn):
                continue
            if role == "system" and not kept and not system:
                system.append(turn)
            elif role == "system":
                return Rejected(f"turn {number} is the system's, expected it first")
            elif kept and kept[-1][0] == role:
                joined = _joined(kept[-1][1], turn, self.separator) if self.broken == "join" else None
                if joined is None:
                    return Rejected(f"turn {number} is the {role}'s, as the one before it")
                kept[-1] = (role, joined)
            elif kept or role != "assistant":
                kept.append((role, turn))
        if kept and kept[-1][0] == "user":
            kept.pop()
        if not kept:
            return Rejected("no question with an answer is left")
        result = system + [turn for _, turn in kept]
        if len(result) == len(turns) and all(ours is theirs for ours, theirs in zip(result, turns, strict=True)):
            return values
        return {**values, column: result}


def _role(turn: Any) -> str | None:
    if not isinstance(turn, dict):
        return None
    role = next((turn[key] for key in ("from", "role") if turn.get(key) is not None), None)
    return ROLES.get(role.lower()) if isinstance(role, str) else None


def _text_key(turn: dict[str, Any]) -> str | None:
    return next((key for key in ("value", "content") if turn.get(key) is not None), None)


def _is_empty(turn: dict[str, Any]) -> bool:
    key = _text_key(turn)
    return key is None or (isinstance(turn[key], str) and not turn[key].strip())


def _joined(first: dict[str, Any], second: dict[str, Any], separator: str) -> dict[str, Any] | None:
    """Two turns as one; None where one of them holds something else than text, or none."""
    one, other = _text_key(first), _text_key(second)
    if one is None or other is None or not isinstance(first[one], str) or not isinstance(second[other], str):
        return None
    return {**first, one: first[one].rstrip() + separator + second[other].lstrip()}


@functools.cache
def _tokenizer(path: str) -> Any:
    from jindo_core.tokenizer import load_tokenizer

    return load_tokenizer(path)


def _length(each: Round, tokenizer: str | None, per_turn: int) -> int:
    """A round's tokens, or characters without a tokenizer, with `per_turn` for what a template puts round each turn."""
    texts = [text for text in (each.instruction, each.input, each.output) if text]
    if tokenizer is None:
        return sum(map(len, texts)) + 2 * per_turn
    encode = _tokenizer(tokenizer).encode
    return sum(len(encode(text, bos=False)) for text in texts) + 2 * per_turn


@dataclass(frozen=True)
class ConversationLength(RowStep):
    """Rejects rows with too few rounds or too little text."""

    name: ClassVar[str] = "conversation_length"

    min_rounds: int = option(1, "least rounds, a question and its answer each", at_least=1)
    max_rounds: int | None = option(None, "most rounds", at_least=1)
    min_chars: int = option(2, "least characters of all answers together", at_least=0)

    def __call__(self, item: Item) -> Item | Rejected:
        rounds = item.record.rounds
        if len(rounds) < self.min_rounds:
            return Rejected(f"{len(rounds)} rounds, expected at least {self.min_rounds}")
        if self.max_rounds is not None and len(rounds) > self.max_rounds:
            return Rejected(f"{len(rounds)} rounds, expected at most {self.max_rounds}")
        length = sum(len(each.output.strip()) for each in rounds)
        if length < self.min_chars:
            return Rejected(f"answers of {length} characters, expected at least {self.min_chars}")
        return item


@dataclass(frozen=True)
class SplitConversations(RowStep):
    """Splits a conversation between rounds into rows of at most a number of tokens or characters."""

    name: ClassVar[str] = "split_conversations"

    max_length: int = option(2048, "most tokens of a row, or characters where no tokenizer is given", at_least=1)
    tokenizer: str | None = option(
        None, "model folder, .gguf file or tokenizer file that tokens are counted with", path=True
    )
    per_turn: int = option(6, "tokens (or characters) that a template puts round each turn", at_least=0)
    too_long: Literal["flag", "keep", "reject"] = option("flag", "what becomes of rows with one round over the limit")

    def __call__(self, item: Item) -> Item | Rejected | Flagged | list[Item]:
        lengths = [_length(each, self.tokenizer, self.per_turn) for each in item.record.rounds]
        if sum(lengths) <= self.max_length:
            return item
        longest = max(lengths)
        if longest > self.max_length and self.too_long == "reject":
            return Rejected(f"a round of length {longest}, expected at most {self.max_length}")
        pieces = self._pieces(item.record.rounds, lengths)
        if len(pieces) > 1:
            return [replace(item, record=replace(item.record, rounds=rounds)) for rounds in pieces]
        if self.too_long == "flag":
            return Flagged(item, f"its one round has length {longest}, more than {self.max_length}")
        return item

    def _pieces(self, rounds: tuple[Round, ...], lengths: list[int]) -> list[tuple[Round, ...]]:
        """Consecutive rounds, as many together as fit; a round that is too long by itself stands alone. All rounds are
        in a piece, the last one too, which FastChat's split loses where it begins a new one."""
        pieces: list[tuple[Round, ...]] = []
        start, length = 0, 0
        for place, more in enumerate(lengths):
            if place > start and length + more > self.max_length:
                pieces.append(rounds[start:place])
                start, length = place, 0
            length += more
        return [*pieces, rounds[start:]]


@dataclass(frozen=True)
class SeparateRounds(RowStep):
    """Makes each round of a row a row of its own: for translations, whose rounds don't refer to each other."""

    name: ClassVar[str] = "separate_rounds"

    def __call__(self, item: Item) -> Item | list[Item]:
        rounds = item.record.rounds
        if len(rounds) == 1:
            return item
        return [replace(item, record=replace(item.record, rounds=(each,))) for each in rounds]


STEPS: tuple[type[Step], ...] = (ConversationRoles, ConversationLength, SplitConversations, SeparateRounds)
