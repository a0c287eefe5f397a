"""Steps for rows that are a text and its translation: pairing, direction, and what a translator leaves behind."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from jindo_core.data.records import Record, Round
from jindo_core.refinery.artefacts import without_artefacts
from jindo_core.refinery.duplicate_steps import first_of_group
from jindo_core.refinery.korean import hangul_share, letters, prose
from jindo_core.refinery.pipeline import Flagged, Item, JoinStep, Rejected, RowStep, Step, option, texts
from jindo_core.refinery.translations import FOREIGN, direction, mentions_translation, says, source_of

INTO_KOREAN = "Translate the following into Korean"
INTO_ENGLISH = "Translate the following into English"
_ASCII_LETTERS = re.compile(r"[A-Za-z]")


@dataclass(frozen=True)
class PairDirection(RowStep):
    """Sets a translation instruction's direction from the Hangul in input and output."""

    name: ClassVar[str] = "pair_direction"

    into_korean: str = option(INTO_KOREAN, "instruction of rows whose output is the Korean side")
    into_english: str = option(INTO_ENGLISH, "instruction of rows whose output is the English side")
    margin: float = option(0.1, "least difference between the two sides' shares of Hangul", above=0, at_most=1)

    def __call__(self, item: Item) -> Item | Flagged:
        rounds = tuple(self._round(each) for each in item.record.rounds)
        if rounds != item.record.rounds:
            item = replace(item, record=replace(item.record, rounds=rounds))
        for number, each in enumerate(rounds, 1):
            if self._contradicts(each):
                return Flagged(item, f"instruction {number} asks for more than a translation, in the wrong direction")
        return item

    def _round(self, each: Round) -> Round:
        source = source_of(each)
        into = direction(source, each.output, self.margin) if source else None
        if into is None:
            return each
        if into == "foreign":
            hangul, other = letters(prose(each.output))
            if len(_ASCII_LETTERS.findall(prose(each.output))) < 0.9 * (hangul + other):
                return each  # Japanese, Russian, …: of which the step has no instruction
        right = says(each.instruction) == {into}
        return each if right else replace(each, instruction=self.into_korean if into == "korean" else self.into_english)

    def _contradicts(self, each: Round) -> bool:
        """Whether an instruction that asks for something beside a translation names only the other language: to write
        it anew would lose what else it asks for."""
        if not each.input or source_of(each) is not None or not mentions_translation(each.instruction):
            return False
        said, into = says(each.instruction), direction(each.input, each.output, self.margin)
        return into is not None and len(said) == 1 and said != {into}


@dataclass(frozen=True)
class PairById(JoinStep):
    """Joins a row and the row of the same id in the other language into translations, a round for each text."""

    name: ClassVar[str] = "pair_by_id"

    column: str = option("id", "column that two rows of a pair have in common")
    into: Literal["korean", "foreign"] = option("korean", "the language translated into")
    into_korean: str = option(INTO_KOREAN, "instruction of translations into Korean")
    into_foreign: str = option(INTO_ENGLISH, "instruction of translations from Korean")
    unpaired: Literal["reject", "keep"] = option("reject", "what becomes of rows without a partner")

    def key(self, item: Item) -> bytes:
        value = item.values.get(self.column)
        if value is None or value == "":
            return b""
        return hashlib.blake2b(str(value).encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def leaders(self, keys: np.ndarray) -> np.ndarray:
        return first_of_group(keys)

    def join(self, items: Sequence[Item]) -> Item | Rejected:
        if len(items) == 1 and self.unpaired == "keep":
            return items[0]
        if len(items) != 2:
            return Rejected(f"{len(items)} rows of its {self.column}, expected a text and its translation")
        first = direction("\n".join(texts(items[0].record)), "\n".join(texts(items[1].record)))
        if first is None:
            return Rejected(f"the two rows of its {self.column} are not one Korean and one foreign")
        korean, foreign = (items[1], items[0]) if first == "korean" else (items[0], items[1])
        if _shape(korean.record) != _shape(foreign.record):
            return Rejected(f"the two rows of its {self.column} have not the same texts")
        source, target = (foreign, korean) if self.into == "korean" else (korean, foreign)
        instruction = self.into_korean if self.into == "korean" else self.into_foreign
        rounds = tuple(
            Round(instruction, ours, theirs)
            for ours, theirs in zip(texts(source.record), texts(target.record), strict=True)
            if ours != theirs  # code and names, the same in both, are nothing to translate
        )
        record = Record(rounds, row=items[0].record.row)
        return replace(items[0], record=record)


def _shape(record: Record) -> list[bool]:
    """Which of a record's texts are there: those of a pair must be the same."""
    pieces = [text for each in record.rounds for text in (each.instruction, each.input, each.output)]
    return [bool(text) for text in (record.system, *pieces)]


@dataclass(frozen=True)
class LeadingArtefacts(RowStep):
    """Removes what a machine translator left before an answer's first sentence, never a part of a word."""

    name: ClassVar[str] = "leading_artefacts"

    def __call__(self, item: Item) -> Item:
        rounds = tuple(self._round(each) for each in item.record.rounds)
        return item if rounds == item.record.rounds else replace(item, record=replace(item.record, rounds=rounds))

    def _round(self, each: Round) -> Round:
        source = source_of(each)
        if source and (hangul_share(source) or 0.0) > FOREIGN:
            source = None
        output = without_artefacts(each.output, source)
        return each if output == each.output else replace(each, output=output)


@dataclass(frozen=True)
class LengthRatio(RowStep):
    """Rejects translations far shorter or longer than their source, in characters outside code."""

    name: ClassVar[str] = "length_ratio"

    korean_least: float = option(0.2, "least length of the Korean side over the other's", above=0)
    korean_most: float = option(1.5, "greatest length of the Korean side over the other's", above=0)
    slack: int = option(30, "characters by which a side may be off in any case", at_least=0)

    def __call__(self, item: Item) -> Item | Rejected:
        for number, each in enumerate(item.record.rounds, 1):
            source = source_of(each)
            into = direction(source, each.output) if source else None
            if not source or into is None:
                continue
            korean, foreign = (each.output, source) if into == "korean" else (source, each.output)
            ours, theirs = len(prose(korean).strip()), len(prose(foreign).strip())
            if not self.korean_least * theirs - self.slack <= ours <= self.korean_most * theirs + self.slack:
                return Rejected(
                    f"answer {number}: {ours} characters of Korean for {theirs}, expected "
                    f"{self.korean_least:g} to {self.korean_most:g} times as many"
                )
        return item


_MARK = re.compile(r"`{3}")
# What a translator makes of ```: quotes for accents, accents apart, full-width ones, two with a language's name.
_BROKEN_MARK = re.compile(
    r"`{3}|^[ \t]*(?:'{3}|‘{3}|’{3}|´{3}|｀{3}|` ` ?`|` ?` `|['‘’´]?`{2}(?=[\w가-힣]*\s*$))", re.MULTILINE
)
_LANGUAGE_LINE = re.compile(
    _BROKEN_MARK.pattern
    + r"|^[ \t]*(?=(?:자바|자바스크립트|파이썬|타입스크립트|코틀린|스위프트|러스트|루비|배시|셸|씨샵)[ \t]*$)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class CodeFences(RowStep):
    """Puts the source's fenced code in the place of the translation's, where both have as many blocks."""

    name: ClassVar[str] = "code_fences"

    mismatch: Literal["flag", "keep", "reject"] = option("flag", "what becomes of rows whose counts differ")

    def __call__(self, item: Item) -> Item | Flagged | Rejected:
        rounds, wrong = [], []
        for number, each in enumerate(item.record.rounds, 1):
            source = source_of(each) or ""
            output = restore_fences(each.output, source) if "```" in source else each.output
            if output is None:
                marks = len(_MARK.findall(each.output)), len(_MARK.findall(source))
                wrong.append(f"answer {number} has {marks[0]} code fences that don't fit its source's {marks[1]}")
                output = each.output
            rounds.append(each if output == each.output else replace(each, output=output))
        if tuple(rounds) != item.record.rounds:
            item = replace(item, record=replace(item.record, rounds=tuple(rounds)))
        if wrong and self.mismatch == "reject":
            return Rejected("; ".join(wrong))
        return Flagged(item, "; ".join(wrong)) if wrong and self.mismatch == "flag" else item


def restore_fences(output: str, source: str) -> str | None:
    """As `_restored`; None also where the result would be changed again: marks that can be read in two ways."""
    found = _restored(output, source)
    return None if found is not None and found is not output and _restored(found, source) != found else found


def _restored(output: str, source: str) -> str | None:
    """A translation with the fenced code of its source, block by block.

    Code that a cleaner restored already, whole blocks in the place of each fence mark, is first taken back to marks.
    The same object where nothing is to be done; None where no reading of the translation has the source's count.
    """
    marks = [found.start() for found in _MARK.finditer(source)]
    if len(marks) % 2 or not marks:
        return output if not marks else None
    blocks = [source[start : end + 3].replace("\r\n", "\n") for start, end in zip(marks[::2], marks[1::2], strict=True)]
    text = output.replace("\r\n", "\n")
    plain = list(_MARK.finditer(text))
    if len(plain) == 2 * len(blocks) == len(_BROKEN_MARK.findall(text)) and _put(text, plain, blocks) == text:
        return output  # as it should be
    # A cleaner that restored fences put one block, mostly the first, in the place of all marks; code that the
    # translator left alone is the same text, and must not be taken back with it: so each block is tried by itself.
    readings = [reading for block in dict.fromkeys(blocks) if (reading := _take_back(text, block)) != text]
    for reading in (*readings, text):
        for pattern in (_MARK, _BROKEN_MARK, _LANGUAGE_LINE):
            found = list(pattern.finditer(reading))
            if len(found) == 2 * len(blocks):
                restored = _put(reading, found, blocks)
                return output if restored == text else restored
    return None


def _take_back(text: str, block: str) -> str:
    """A text with a mark in the place of each occurrence of `block`, word for word, blanks aside."""
    words = block.split()
    if len(words) < 2 or words[1] not in text:
        return text
    return re.sub(r"\s+".join(map(re.escape, words)), "```", text)


def _put(text: str, marks: Sequence[re.Match[str]], blocks: Sequence[str]) -> str:
    """A text with its k-th pair of marks, and what is between them, replaced by the k-th of `blocks`."""
    parts, end = [], 0
    for number, block in enumerate(blocks):
        opening, closing = marks[2 * number], marks[2 * number + 1]
        before = text[end : opening.start()]
        # The seed's cleaner put a blank before what it restored.
        parts += [before[:-1] if before.endswith("\n ") else before, block]
        end = closing.end()
    return "".join([*parts, text[end:]])


STEPS: tuple[type[Step], ...] = (PairById, PairDirection, CodeFences, LeadingArtefacts, LengthRatio)
