"""Steps that clean characters and the traces of scrapers, whatever the language.

They change the record's texts (system message, instructions, inputs, answers) and nothing else, unless they say so.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from jindo_core.data.records import Record
from jindo_core.refinery.pipeline import (
    Counted,
    Flagged,
    Item,
    Rejected,
    RowStep,
    map_outputs,
    map_texts,
    option,
    texts,
)

_LINE_ENDS = re.compile("\r\n?|\u2028|\u2029")

# Joiners are letters' business in these scripts: Arabic (and Syriac, Thaana, N'Ko, Mandaic), the Indic ones and
# Sinhala, Tibetan, Myanmar, Khmer, Mongolian, and those of the extended blocks.
_JOINING = "\u0600-\u08ff\u0900-\u0dff\u0f00-\u0fff\u1000-\u109f\u1780-\u18af\ua840-\uabff\ufb50-\ufdff\ufe70-\ufefc"
_JOINING += "\U00010a00-\U00011fff"
# What an emoji of several is made of: pictographs, dingbats, arrows, skin tones, variation selector, keycap, tags.
_EMOJI = "\u00a9\u00ae\u203c-\u3299\ufe0f\u20e3\U0001f000-\U0001faff\U000e0020-\U000e007f"
_ZERO_WIDTH = re.compile(
    f"(?<![{_JOINING}])\u200c|\u200c(?![{_JOINING}])"
    f"|(?<![{_JOINING}{_EMOJI}])\u200d|(?<=[{_EMOJI}])\u200d(?![{_EMOJI}])"
)
_NEVER_SEEN = re.compile("[\u00ad\u180e\u200b\u2060-\u2064\ufeff]")
_HANGUL_FILLER = re.compile("[\u3164\uffa0]")  # blank, and taken for a letter
# Colours and the like; a title or a link (OSC) up to its end, which stands within the line.
_ANSI = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b\x9c\n]{0,2048}(?:\x07|\x1b\\\\|\x9c)")
_BREAKS = re.compile("[\x0b\x0c\x85]")  # vertical tab, form feed, NEL
_NONCHARACTERS = "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(17))
_CONTROLS = re.compile(f"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufdd0-\ufdef{_NONCHARACTERS}]")

# From a run's start, and whole: else each blank of a long run would be tried again.
_LINE_TAIL = re.compile(r"(?<![ \t\u00a0\u3000])[ \t\u00a0\u3000]++(?=\n|\Z)")
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|amp|lt|gt|quot|apos|nbsp);")
_BARE = re.compile(r"<|&(?!#?[A-Za-z0-9]{1,31};)")
_BLOCK_TAG = re.compile(r"<br\s*/?>|</?(?:p|div|li|ul|ol|tr|table|h[1-6])(?:\s[^<>]*)?>", re.IGNORECASE)
_INLINE_TAG = re.compile(
    r"</?(?:a|b|i|u|em|strong|span|font|small|sup|sub|td|th|tbody|thead|center|img)(?:\s[^<>]*)?/?>", re.IGNORECASE
)
_SPECIAL = re.compile(
    r"</?s>|<(?:unk|pad|bos|eos|mask|sep|cls)>|<\|[A-Za-z][A-Za-z0-9_▁ ]{0,40}\|>|<｜[^｜<>\n]{1,40}｜>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
)
_NO_ANSWER = frozenset({"<nooutput>", "nan", "NaN"})
_NO_INPUT = frozenset({"<noinput>", "<no input>", "nan", "NaN", "n/a", "N/A", "none", "None"})


def _with_record(item: Item, record: Record) -> Item:
    return item if record is item.record else replace(item, record=record)


def _substituted(item: Item, change: Callable[[str, Counter[str]], str]) -> Item | Counted:
    """The item with `change` applied to every text; `change` also counts what it found."""
    found: Counter[str] = Counter()
    record = map_texts(item.record, lambda text: change(text, found))
    return item if not found and record is item.record else Counted(_with_record(item, record), found)


@dataclass(frozen=True)
class RenderedText(RowStep):
    """Drops a `text` column that only repeats the row, rendered in some template.

    Steps that change the record would leave it stale. It repeats the row when it holds the row's texts in their order,
    and beside them no more than a template's length. Where no other column holds the answer, it is the row itself.
    """

    name = "rendered_text"
    column: str = option("text", "the column that may hold the rendered row")
    template_characters: int = option(400, "longest template, in characters beside the row's own", at_least=0)

    def __call__(self, item: Item) -> Item | Flagged:
        text = item.values.get(self.column)
        others = {name: value for name, value in item.values.items() if name != self.column}
        if not isinstance(text, str) or not _holds(others, item.record.rounds[-1].output):
            return item
        rendered = rest = _squeezed(text)
        own = 0
        for part in filter(None, map(_squeezed, texts(item.record))):
            _, found, rest = rest.partition(part)
            own += len(part)
            if not found:
                return Flagged(item, f"column {self.column} says something else than the row")
        if len(rendered) - own > self.template_characters:
            return Flagged(item, f"column {self.column} says more than the row")
        return replace(item, values=others)


def _squeezed(text: str) -> str:
    """Without white space, in NFC: what a template may have trimmed doesn't count."""
    return "".join(unicodedata.normalize("NFC", text).split())


def _holds(values: dict[str, Any], answer: str) -> bool:
    """Whether columns hold an answer, as text or among a conversation's turns."""
    wanted = _squeezed(answer)
    return any(
        _squeezed(value) == wanted if isinstance(value, str) else isinstance(value, list | dict) and bool(value)
        for value in values.values()
    )


@dataclass(frozen=True)
class Nfc(RowStep):
    """Composes letters (Unicode NFC): Hangul that macOS or Hangul Jamo input left in pieces becomes syllables."""

    name = "nfc"

    def __call__(self, item: Item) -> Item:
        return _with_record(item, map_texts(item.record, functools.partial(unicodedata.normalize, "NFC")))


@dataclass(frozen=True)
class LineEnds(RowStep):
    """Ends lines with a line feed: CR LF, a lone CR and Unicode's own separators become one."""

    name = "line_ends"

    def __call__(self, item: Item) -> Item:
        return _with_record(item, map_texts(item.record, lambda text: _LINE_ENDS.sub("\n", text)))


@dataclass(frozen=True)
class ZeroWidth(RowStep):
    """Removes characters without width: zero-width spaces, byte-order marks, soft hyphens, stray joiners.

    A zero-width joiner stays between emoji and in scripts that join letters, a non-joiner in those scripts; the Hangul
    fillers, which look like a space, become one.
    """

    name = "zero_width"

    def __call__(self, item: Item) -> Item | Counted:
        return _substituted(item, _without_width)


def _without_width(text: str, found: Counter[str]) -> str:
    if text.isascii():
        return text

    def removed(match: re.Match[str]) -> str:
        found[f"U+{ord(match[0]):04X}"] += 1
        return ""

    def spaced(match: re.Match[str]) -> str:
        found[f"U+{ord(match[0]):04X}"] += 1
        return " "

    # Again where a removal has brought joiners beside something else: a step that ran twice changes nothing more.
    # Joiners last: a space without width beside one is nothing that it could join.
    text = _NEVER_SEEN.sub(removed, _HANGUL_FILLER.sub(spaced, text))
    while (cleaned := _ZERO_WIDTH.sub(removed, text)) != text:
        text = cleaned
    return text


@dataclass(frozen=True)
class ControlCharacters(RowStep):
    """Removes control characters, terminal colour codes and Unicode's noncharacters; form feeds become line feeds.

    Tabs and line ends stay. Run `mojibake` before: what looks like a C1 control may be a letter of Windows-1252.
    """

    name = "control_characters"

    def __call__(self, item: Item) -> Item | Counted:
        return _substituted(item, _without_controls)


def _without_controls(text: str, found: Counter[str]) -> str:
    if text.isascii() and text.isprintable():
        return text
    text, codes = _ANSI.subn("", text)
    text, breaks = _BREAKS.subn("\n", text)
    text, controls = _CONTROLS.subn("", text)
    for name, count in (("terminal codes", codes), ("form feeds", breaks), ("control characters", controls)):
        if count:
            found[name] += count
    return text


@dataclass(frozen=True)
class ReplacementCharacter(RowStep):
    """Rejects or flags rows with U+FFFD, which some decoder put in the place of text that is lost."""

    name = "replacement_character"
    action: Literal["reject", "flag"] = option("reject", "what is done with the row")

    def __call__(self, item: Item) -> Item | Rejected | Flagged:
        lost = sum(text.count("\ufffd") for text in texts(item.record))
        if not lost:
            return item
        reason = f"{lost} replacement characters (U+FFFD): text was lost"
        return Rejected(reason) if self.action == "reject" else Flagged(item, reason)


@dataclass(frozen=True)
class Mojibake(RowStep):
    """Repairs text that was decoded in the wrong encoding: UTF-8 read as Latin-1 or the like (ftfy), EUC-KR as Latin-1.

    Of ftfy only what undoes a decoding runs: quotes, ligatures, widths and entities stay as they are, and nothing is
    guessed where bytes were lost.
    """

    name = "mojibake"
    euc_kr: bool = option(True, "also Korean in EUC-KR that was read as Latin-1")
    unrepaired: Literal["keep", "flag"] = option("flag", "a text that still looks wrongly decoded afterwards")

    def __call__(self, item: Item) -> Item | Flagged:
        if not any(map(_may_be_mojibake, texts(item.record))):
            return item
        import ftfy.badness

        item = _with_record(item, map_texts(item.record, self._repaired))
        if self.unrepaired == "flag" and any(map(ftfy.badness.is_bad, texts(item.record))):
            return Flagged(item, "text looks wrongly decoded, and can't be repaired without guessing")
        return item

    def _repaired(self, text: str) -> str:
        """Code alone is no sign: it may be about encodings. With it goes what was decoded with the prose."""
        if not _may_be_mojibake(text):
            return text
        if "`" in text:
            prose = "\n".join(_CODE.split(text)[::2])
            if not _may_be_mojibake(prose) or self._decoded(prose) == prose:
                return text
        return self._decoded(text)

    def _decoded(self, text: str) -> str:
        if self.euc_kr and (korean := _as_euc_kr(text)) is not None:
            return korean
        import ftfy
        from ftfy.badness import is_bad

        # ftfy also changes pairs of letters in what was EUC-KR: a text that stays bad is left as it was.
        fixed = ftfy.fix_encoding(text, replace_lossy_sequences=False)
        return text if is_bad(fixed) else fixed


# What every text that ftfy finds bad holds (its categories lie in these ranges; a test holds the two together):
# ftfy's own search takes nine times as long, and Hangul has none of it.
_MOJIBAKE = re.compile("[\x80-\x9f\u00c2\u00c3\u0152\u0153]|[\xa0-\u05ff\u1e00-\u2bff\uf8ff\ufb01\ufb02\ufffd]{2}")


def _may_be_mojibake(text: str) -> bool:
    return not text.isascii() and _MOJIBAKE.search(text) is not None


_EUC_KR_SYLLABLES = re.compile("(?:[\xb0-\xc8][\xa1-\xfe]){2}")
_FREQUENT = frozenset("이다는을를에의가은한고로기지하어도나자사")


def _as_euc_kr(text: str) -> str | None:
    """Korean that was read as Latin-1, read again; None where it isn't that beyond doubt.

    All of the text must be EUC-KR, at least four of its characters and four in five of those beyond ASCII be
    syllables, and one in ten of these be among the most frequent: a list of accented letters is none of it.
    """
    if _EUC_KR_SYLLABLES.search(text) is None:
        return None
    try:
        korean = text.encode("latin-1").decode("euc_kr")
    except UnicodeError:
        return None
    syllables = [letter for letter in korean if "가" <= letter <= "힣"]
    frequent = sum(letter in _FREQUENT for letter in syllables)
    if len(syllables) < max(4, 0.8 * sum(not letter.isascii() for letter in korean)) or frequent * 10 < len(syllables):
        return None
    return korean


@dataclass(frozen=True)
class TrailingWhitespace(RowStep):
    """Removes white space at the ends of lines, and line ends and blank lines round a text."""

    name = "trailing_whitespace"

    def __call__(self, item: Item) -> Item:
        return _with_record(item, map_texts(item.record, _trimmed))


def _trimmed(text: str) -> str:
    text = _LINE_TAIL.sub("", text).rstrip() if _LINE_TAIL.search(text) or text[-1:].isspace() else text
    return text.lstrip("\n") if text[:1] == "\n" else text


@dataclass(frozen=True)
class Html(RowStep):
    """Undoes what scrapers leave: entities such as &amp;amp; become their characters, once; tags are flagged.

    Code (fenced, or between backquotes) stays as it is, and so do the entities of a text in which a < or & stands by
    itself: nobody escaped that text, so they are what it is about. Stripped tags don't count.
    """

    name = "html"
    entities: Literal["unescape", "keep"] = option("unescape", "entities such as &lt; and &#39;")
    tags: Literal["keep", "flag", "strip"] = option("flag", "tags of running text such as <p>, <br> and <span>")

    def __call__(self, item: Item) -> Item | Flagged | Counted:
        answer = _substituted(item, self._cleaned)
        if self.tags != "flag" or not isinstance(answer, Counted):
            return answer
        tags = answer.counts.get("tags", 0)
        return Flagged(answer.item, f"{tags} HTML tags", answer.counts) if tags else answer

    def _cleaned(self, text: str, found: Counter[str]) -> str:
        if "&" not in text and "<" not in text:
            return text
        parts = _CODE.split(text)  # code at the odd places
        prose = [self._without_tags(part, found) for part in parts[::2]]
        if self.entities == "unescape" and not any(map(_BARE.search, prose)):
            prose = [_ENTITY.sub(functools.partial(_character, found=found), part) for part in prose]
        parts[::2] = prose
        return "".join(parts)

    def _without_tags(self, text: str, found: Counter[str]) -> str:
        if self.tags != "keep":
            without, blocks = _BLOCK_TAG.subn("\n", text)
            without, inline = _INLINE_TAG.subn("", without)
            if blocks + inline:
                found["tags"] += blocks + inline
            text = without if self.tags == "strip" else text
        return text


def _character(match: re.Match[str], found: Counter[str]) -> str:
    character = html.unescape(match[0]).replace("\u00a0", " ")
    if character == "\ufffd" or (character != "\n" and not character.isprintable()):
        return match[0]  # &#0; and the like
    found["entities"] += 1
    return character


@dataclass(frozen=True)
class EmptyAnswers(RowStep):
    """Rejects a row with an answer that is blank, too short, or a scraper's word for none."""

    name = "empty_answers"
    min_characters: int = option(1, "shortest answer, without white space at its ends", at_least=1)

    def __call__(self, item: Item) -> Item | Rejected:
        for number, each in enumerate(item.record.rounds, 1):
            answer = each.output.strip()
            where = f" in round {number}" if len(item.record.rounds) > 1 else ""
            if not answer or answer in _NO_ANSWER:
                return Rejected(f"no answer{where}")
            if len(answer) < self.min_characters:
                return Rejected(f"answer of {len(answer)} characters{where}")
        return item


@dataclass(frozen=True)
class EmptyInputs(RowStep):
    """Empties an input that is a word for none: <noinput>, N/A, None, nan."""

    name = "empty_inputs"

    def __call__(self, item: Item) -> Item:
        record = item.record
        rounds = tuple(replace(each, input="") if each.input.strip() in _NO_INPUT else each for each in record.rounds)
        return item if rounds == record.rounds else replace(item, record=replace(record, rounds=rounds))


@dataclass(frozen=True)
class SpecialTokens(RowStep):
    """Finds the text of special tokens (</s>, <|im_end|>, [INST], …), which other trainers may take for tokens.

    `escape` puts a space after the first character, so that no tokenizer takes it for one; `strip` removes those at
    the end of an answer, and flags the rest.
    """

    name = "special_tokens"
    action: Literal["flag", "escape", "strip", "reject"] = option("flag", "what is done with them")

    def __call__(self, item: Item) -> Item | Rejected | Flagged | Counted:
        found = sum(len(_SPECIAL.findall(text)) for text in texts(item.record) if "<" in text or "[" in text)
        if not found:
            return item
        counts = {"special tokens": found}
        if self.action == "reject":
            return Rejected(f"{found} special tokens in the text")
        if self.action == "escape":
            record = map_texts(item.record, lambda text: _SPECIAL.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text))
            return Counted(replace(item, record=record), counts)
        if self.action == "strip":
            item = _with_record(item, map_outputs(item.record, _without_last_tokens))
            found = sum(len(_SPECIAL.findall(text)) for text in texts(item.record))
        return Flagged(item, f"{found} special tokens in the text", counts) if found else Counted(item, counts)


def _without_last_tokens(text: str) -> str:
    kept = text
    for match in reversed(list(_SPECIAL.finditer(text))):
        if match.end() != len(kept.rstrip()):
            break
        kept = text[: match.start()]
    return kept if kept is text else kept.rstrip()


STEPS = (
    RenderedText, Mojibake, Nfc, LineEnds, ZeroWidth, ControlCharacters, ReplacementCharacter, Html, SpecialTokens,
    TrailingWhitespace, EmptyInputs, EmptyAnswers,
)  # fmt: skip
