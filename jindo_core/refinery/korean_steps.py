"""Steps that judge a Korean answer: its share of Hangul, English left in it, refusals, and its speech level."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from jindo_core.data.records import Round
from jindo_core.errors import InputError
from jindo_core.refinery.korean import Level, hangul_share, letters, prose, speech_levels
from jindo_core.refinery.pipeline import Counted, Flagged, Item, Rejected, RowStep, Step, option
from jindo_core.refinery.translation_steps import direction, source_of

# From a word's beginning, and without going back: a line of Base64 is one long word.
_LATIN_RUN = re.compile(r"(?<![A-Za-z'’-])[A-Za-z][A-Za-z'’-]*+(?:[,;:]?[ \t]++[A-Za-z][A-Za-z'’-]*+){3,}+")
_ASKS_FOREIGN = re.compile(
    r"영어|영문|일본어|일어|중국어|프랑스어|불어|독일어|스페인어|외국어"
    r"|\b(?:in|into|to) (?:english|japanese|chinese|french|german|spanish)\b",
    re.IGNORECASE,
)
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class HangulRatio(RowStep):
    """Rejects rows whose answers hold too little Hangul, code and addresses not counted.

    Not judged are translations from Korean, and answers to a question that names another language.
    """

    name: ClassVar[str] = "hangul_ratio"

    at_least: float = option(0.3, "least share of Hangul among an answer's letters", at_least=0, at_most=1)
    min_letters: int = option(20, "answers with fewer letters outside code are not judged", at_least=1)

    def __call__(self, item: Item) -> Item | Rejected:
        for number, each in enumerate(item.record.rounds, 1):
            hangul, other = letters(prose(each.output))
            if hangul + other < self.min_letters or hangul >= self.at_least * (hangul + other):
                continue
            if not self._may_be_foreign(each):
                share = hangul / (hangul + other)
                return Rejected(f"answer {number} is {share:.2f} Hangul, expected at least {self.at_least:g}")
        return item

    def _may_be_foreign(self, each: Round) -> bool:
        source = source_of(each)
        if source is not None:
            # Whatever the instruction says: `pair_direction` has set it, where the two are a pair.
            return direction(source, each.output) == "foreign"
        return _ASKS_FOREIGN.search(each.instruction) is not None


@dataclass(frozen=True)
class UntranslatedResidue(RowStep):
    """Rejects rows whose Korean answer keeps whole English sentences, or that only repeat their source."""

    name: ClassVar[str] = "untranslated_residue"

    min_words: int = option(
        8, "Latin words in a row, most in small letters, that make a sentence left over", at_least=4
    )
    action: Literal["reject", "flag"] = option("reject", "what becomes of such a row")

    def __call__(self, item: Item) -> Item | Rejected | Flagged:
        for number, each in enumerate(item.record.rounds, 1):
            reason = self._residue(each.input or each.instruction, each.output)
            if reason:
                reason = f"answer {number} {reason}"
                return Rejected(reason) if self.action == "reject" else Flagged(item, reason)
        return item

    def _residue(self, source: str, output: str) -> str | None:
        if not output:
            return None
        text = prose(output)
        if self._same(source, output, text):
            return "is its source, not translated"
        # Only where the answer means to be Korean: an English answer is no residue (`hangul_ratio` judges that).
        if (hangul_share(text) or 0.0) == 0.0:
            return None
        for run in _LATIN_RUN.findall(text):
            words = run.split()
            # Names of companies and of fields are in capitals.
            if len(words) >= self.min_words and 5 * sum(word[0].islower() for word in words) >= 3 * len(words):
                return f"keeps {len(words)} Latin words in a row"
        return None

    def _same(self, source: str, output: str, text: str) -> bool:
        """A repeated source, where it has words enough to be translated: names and code stay as they are."""
        if _SPACES.sub(" ", source).strip().casefold() != _SPACES.sub(" ", output).strip().casefold():
            return False
        return len(text.split()) >= 4 and sum(letters(text)) >= 12


@functools.cache
def _refusal_patterns(path: str | None) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The patterns of refusals and of error pages, each kind as one expression; None: the bundled file."""
    where = Path(path) if path else Path(str(files("jindo_core.refinery") / "refusals.yaml"))
    try:
        content: Any = yaml.safe_load(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{where} can't be read ({error.strerror}): expected a YAML file of patterns") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is no YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not content or not set(content) <= {"refusal", "page"}:
        raise InputError(f"{where}: expected the keys refusal and page, each with a list of regular expressions")
    found = {}
    for kind in ("refusal", "page"):
        patterns = content.get(kind, [])
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) and pattern for pattern in patterns):
            raise InputError(f"{where}: {kind!r} is {type(patterns).__name__}, expected a list of regular expressions")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{where}: {pattern!r} is no regular expression ({error})") from None
        # (?!) matches nothing: no patterns of that kind.
        joined = "|".join(f"(?:{pattern})" for pattern in patterns) or "(?!)"
        found[kind] = re.compile(joined, re.IGNORECASE | re.DOTALL)
    return found["refusal"], found["page"]


@dataclass(frozen=True)
class Refusals(RowStep):
    """Rejects rows whose answer is a refusal ("As an AI language model …") or an error page ("Too many requests")."""

    name: ClassVar[str] = "refusals"

    patterns: str | None = option(
        None, "YAML file with lists `refusal` and `page` instead of the bundled one", path=True
    )
    within: int = option(200, "characters of an answer's beginning in which a refusal is looked for", at_least=20)
    page_length: int = option(600, "longest answer that can be an error page", at_least=20)
    action: Literal["reject", "flag"] = option("reject", "what becomes of such a row")

    def __post_init__(self) -> None:
        _refusal_patterns(self.patterns)  # a bad file is told before the first row

    def __call__(self, item: Item) -> Item | Rejected | Flagged:
        refusal, page = _refusal_patterns(self.patterns)
        for number, each in enumerate(item.record.rounds, 1):
            if refusal.search(each.output[: self.within]):
                reason = f"answer {number} is a refusal"
            elif len(each.output) <= self.page_length and page.search(each.output):
                reason = f"answer {number} is an error page"
            else:
                continue
            return Rejected(reason) if self.action == "reject" else Flagged(item, reason)
        return item


@dataclass(frozen=True)
class Honorifics(RowStep):
    """Reports answers that mix speech levels (해요체, 합쇼체, 반말), quotes and code not counted."""

    name: ClassVar[str] = "honorifics"

    min_sentences: int = option(1, "sentences of a level that make it part of a mixture", at_least=1)
    count_requests: bool = option(False, "count …세요 as 해요체 beside 합쇼체, where it is usual in written Korean")
    action: Literal["flag", "reject"] = option("flag", "what becomes of a mixture")

    def __call__(self, item: Item) -> Item | Rejected | Flagged | Counted:
        found: dict[str, int] = {}
        mixed: list[str] = []
        for number, each in enumerate(item.record.rounds, 1):
            levels = self._levels(each.output)
            for level, count in levels.items():
                found[level] = found.get(level, 0) + count
            strong = [level for level, count in levels.items() if count >= self.min_sentences]
            if len(strong) > 1:
                shares = ", ".join(f"{level} {levels[level]}" for level in strong)
                mixed.append(f"answer {number} mixes {shares}")
        if not mixed:
            return Counted(item, found) if found else item
        if self.action == "reject":
            return Rejected("; ".join(mixed))
        return Flagged(item, "; ".join(mixed), found)

    def _levels(self, text: str) -> dict[Level, int]:
        levels = speech_levels(text)
        requests = levels.pop("-세요", 0)
        if requests and (self.count_requests or not levels["합쇼체"]):
            levels["해요체"] += requests
        return {level: levels[level] for level in ("합쇼체", "해요체", "반말") if levels[level]}


STEPS: tuple[type[Step], ...] = (HangulRatio, UntranslatedResidue, Refusals, Honorifics)
