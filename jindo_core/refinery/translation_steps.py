"""Steps for rows that are a text and its translation: pairing, direction, and what a translator leaves behind."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from jindo_core.data.records import Record, Round
from jindo_core.refinery.duplicate_steps import first_of_group
from jindo_core.refinery.korean import ends_in_consonant, hangul_share, letters, prose
from jindo_core.refinery.pipeline import Flagged, Item, JoinStep, Rejected, RowStep, Step, option, texts

INTO_KOREAN = "Translate the following into Korean"
INTO_ENGLISH = "Translate the following into English"
_FOREIGN = 0.3  # greatest share of Hangul in a text that is not Korean
_TRANSLATE = re.compile(r"translat|번역|옮겨|옮기", re.IGNORECASE)
_SAYS_KOREAN = re.compile(r"\b(?:in)?to\s+(?:\w+\s+)?korean\b|(?:한국어|한글|국문|우리말)(?:으로|로)", re.IGNORECASE)
_SAYS_ENGLISH = re.compile(r"\b(?:in)?to\s+(?:\w+\s+)?english\b|(?:영어|영문)(?:으로|로)", re.IGNORECASE)
_ASCII_LETTERS = re.compile(r"[A-Za-z]")


def direction(source: str, target: str, margin: float = 0.1) -> Literal["korean", "foreign"] | None:
    """What a text was translated into, by the shares of Hangul outside code; None where the two are no such pair.

    Args:
        margin: how far the shares must be apart. Code that is not fenced counts as English, so that the Korean side
            of a technical pair may hold little Hangul: it is enough that the other side is foreign and holds less.
    """
    ours, theirs = hangul_share(source), hangul_share(target)
    if ours is None or theirs is None or min(ours, theirs) > _FOREIGN or abs(theirs - ours) < margin:
        return None
    return "korean" if theirs > ours else "foreign"


def source_of(each: Round) -> str | None:
    """What a round's answer translates; None where its instruction asks for something else, whose answer (a summary, a
    corrected program) need not resemble the input."""
    return each.input if each.input and each.output and _TRANSLATE.search(each.instruction) else None


@dataclass(frozen=True)
class PairDirection(RowStep):
    """Sets a translation instruction's direction from the Hangul in input and output."""

    name: ClassVar[str] = "pair_direction"

    into_korean: str = option(INTO_KOREAN, "instruction of rows whose output is the Korean side")
    into_english: str = option(INTO_ENGLISH, "instruction of rows whose output is the English side")
    margin: float = option(0.1, "least difference between the two sides' shares of Hangul", above=0, at_most=1)

    def __call__(self, item: Item) -> Item:
        rounds = tuple(self._round(each) for each in item.record.rounds)
        return item if rounds == item.record.rounds else replace(item, record=replace(item.record, rounds=rounds))

    def _round(self, each: Round) -> Round:
        source = source_of(each)
        into = direction(source, each.output, self.margin) if source else None
        if into is None:
            return each
        says_korean, says_english = _SAYS_KOREAN.search(each.instruction), _SAYS_ENGLISH.search(each.instruction)
        if into == "korean":
            right, instruction = says_korean and not says_english, self.into_korean
        else:
            right, instruction = says_english and not says_korean, self.into_english
            hangul, other = letters(prose(each.output))
            if len(_ASCII_LETTERS.findall(prose(each.output))) < 0.9 * (hangul + other):
                return each  # Japanese, Russian, …: of which the step has no instruction
        return each if right else replace(each, instruction=instruction)


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


_BLANKS = re.compile(r"\s+(?=[가-힣])")
_BOTH_PARTICLES = re.compile(r"(?:은\(는\)|는\(은\)|이\(가\)|가\(이\)|을\(를\)|를\(을\)|와\(과\)|과\(와\))[ \t]+")
_NEVER_A_WORD = re.compile(r"[는를][ \t]+")
_MAYBE_A_WORD = re.compile(r"[은을가][ \t]+")
_GRAMMAR = re.compile(r"조사|받침|어미|문법|음절|글자|자음|모음|맞춤법")
_GO = re.compile(r"[보봤볼본봐주줘버있계야라]")  # 가 보세요, 가 있다: the verb
_SILVER = re.compile(r"silver|\beun\b", re.IGNORECASE)
_PARTY = re.compile(r"\bpart(?:y|ies)\b|\blessee\b|\bemployee\b", re.IGNORECASE)  # 갑 and 을 of a contract
_OF_COURSE = re.compile(r"물론[,，][ \t]*(?=\S)")
_AFFIRMS = re.compile(
    r"of course|sure|certain|absolute|natural|\byes\b|yeah|definite|indeed|granted|obvious|by all means|no problem"
    r"|glad|happy to|admitted|needless|clearly|while it|course",
    re.IGNORECASE,
)
_COMMA = re.compile(r"[,;、，][ \t]*(?=[가-힣])|\.[ \t]+(?=[가-힣])")
_CLOSING = re.compile(r"[:)\]}!?][ \t]+(?=[가-힣])")
_LETTER = re.compile(r"([A-Za-z])(?:[ \t]+(?=\S)|(?=[가-힣\"'“‘`]))")
_SECOND_LETTER = re.compile(r"\W*[^\W\d_]([A-Za-z])")
_PARTICLE = re.compile(r"[은는이가을를과와](?![가-힣])")
_GLUED_WORD = re.compile(r"스포츠|메일|북|커머스|러닝|티켓|팝|셔츠|턴|축|값|번째|개의|제곱|분포")


@dataclass(frozen=True)
class LeadingArtefacts(RowStep):
    """Removes what a machine translator left before an answer's first sentence, never a part of a word."""

    name: ClassVar[str] = "leading_artefacts"

    def __call__(self, item: Item) -> Item:
        rounds = tuple(self._round(each) for each in item.record.rounds)
        return item if rounds == item.record.rounds else replace(item, record=replace(item.record, rounds=rounds))

    def _round(self, each: Round) -> Round:
        source = source_of(each)
        if source and (hangul_share(source) or 0.0) > _FOREIGN:
            source = None
        output = without_artefacts(each.output, source)
        return each if output == each.output else replace(each, output=output)


def without_artefacts(text: str, source: str | None) -> str:
    """A translation without stray signs before its first sentence; applied again it changes nothing.

    Args:
        text: what was translated.
        source: what it was translated from, None where that is unknown or is Korean itself. Only with it can a lone
            letter, 은, 을, 가 or 물론 be told from a word: DeepL's stray letter is the second one of its source ("To
            add …" became "o 추가 …").
    """
    while True:
        end = _artefact(text, source)
        if end == 0 or not text[end:].strip():
            return text
        text = text[end:]


def _artefact(text: str, source: str | None) -> int:
    """How many characters at a text's beginning are an artefact."""
    for pattern in (_BLANKS, _BOTH_PARTICLES, _COMMA):
        if (found := pattern.match(text)) and not (pattern is _COMMA and _begins_with_sign(source)):
            return found.end()
    if (found := _NEVER_A_WORD.match(text)) and not _GRAMMAR.search(text[:80]):
        return found.end()
    if source is None:
        return 0
    if (found := _CLOSING.match(text)) and not _begins_with_sign(source):
        return found.end()
    if (found := _OF_COURSE.match(text)) and not _AFFIRMS.search(source[:200]):
        return found.end()
    if (found := _MAYBE_A_WORD.match(text)) and _is_particle(text[0], text[found.end() :], source):
        return found.end()
    if (found := _LETTER.match(text)) and _is_stray(found[1], text[1:], source):
        return found.end()
    return 0


def _begins_with_sign(source: str | None) -> bool:
    return source is not None and source.lstrip()[:1] in tuple(",;:.)]}!?、，")


def _is_particle(syllable: str, rest: str, source: str) -> bool:
    """Whether 은, 을 or 가, which stand alone at the beginning, are not silver, a contract's party or a verb."""
    if _GRAMMAR.search(rest[:80]):
        return False
    if syllable == "가":
        return not _GO.match(rest)
    return not (_SILVER if syllable == "은" else _PARTY).search(source)


def _is_stray(letter: str, rest: str, source: str) -> bool:
    """Whether a letter at the beginning, with `rest` after it, is the source's second one, and no word of its own."""
    second = _SECOND_LETTER.match(source)
    if second is None or second[1].lower() != letter.lower():
        return False
    particle = _PARTICLE.match(rest)
    if particle and ends_in_consonant(letter) == (particle[0] in "은이을과"):
        return False  # "x는", "n을"; but "x이 스타일" is x and 이
    if _GLUED_WORD.match(rest):
        return False
    # The article and the pronoun stand alone in any English text; only their capital is a name there (A), or not (I).
    if letter in "aiI":
        return True
    flags = re.IGNORECASE if letter.islower() else 0
    return not re.search(rf"(?<![\w'’]){letter}(?![\w'’])", source, flags)


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
