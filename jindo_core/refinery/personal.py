"""Personal data: what looks like it and passes the checks that its kind has, and how it is masked."""

from __future__ import annotations

import datetime
import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from jindo_core.refinery.pipeline import Counted, Flagged, Item, Rejected, RowStep, map_texts, option, texts

# Nothing that would make it part of a longer number or name. Hangul may follow: a particle.
# Nor _ beside a word; round a number it is emphasis.
_BEFORE = r"(?<![A-Za-z0-9+%-])(?<![0-9]\.)(?<![A-Za-z0-9]_)(?<![A-Za-z0-9]__)"
_AFTER = r"(?![A-Za-z0-9@]|__?[A-Za-z0-9]|[-.][A-Za-z0-9])"
_BETWEEN = "(?: ?[-–] ?|[. ])"  # what stands between a phone number's parts
# Full-width forms, and dashes, one character for one: a match's place is its place in the text.
_FOLDED = {0xFF10 + digit: str(digit) for digit in range(10)}
_FOLDED |= dict(zip(map(ord, "＠．－＋（）‐‑‒—―−"), "@.-+()------", strict=True))

_RESIDENT = re.compile(rf"{_BEFORE}([0-9]{{2}})([0-9]{{2}})([0-9]{{2}})( ?[-–] ?| ?)([0-9])([0-9]{{6}}){_AFTER}")
_PHONE = re.compile(
    rf"{_BEFORE}(?:"
    rf"(?:\+|00)82{_BETWEEN}?(?:\(0\){_BETWEEN}?)?(?:1[016789]|2|[3-6][1-5]|70){_BETWEEN}?[0-9]{{3,4}}{_BETWEEN}?[0-9]{{4}}"
    rf"|82{_BETWEEN}10{_BETWEEN}[0-9]{{4}}{_BETWEEN}[0-9]{{4}}"
    rf"|01[016789](?P<m>{_BETWEEN}?)[0-9]{{3,4}}(?P=m)[0-9]{{4}}"
    r"|(?:02|0(?:3[1-3]|4[1-4]|5[1-5]|6[1-4])|070|080|050[2-8])"
    rf"(?P<l>{_BETWEEN})[0-9]{{3,4}}(?P=l)[0-9]{{4}}){_AFTER}"
    # (02) 123-4567 and 02)123-4567
    rf"|{_BEFORE}\(?0(?:2|1[016789]|3[1-3]|4[1-4]|5[1-5]|6[1-4]|70)\) ?[0-9]{{3,4}}[- ][0-9]{{4}}{_AFTER}"
)
_MAIL = re.compile(
    r"(?<![A-Za-z0-9_.+%@-])(?<!//)"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,63})|(?<![가-힣])[가-힣]{2,16})@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,6}"
    r"([A-Za-z]{2,24})(?![A-Za-z0-9_@(\[]|[.-][A-Za-z0-9]|:[A-Za-z0-9_/~])"
)
_CARD = re.compile(
    rf"{_BEFORE}(?<![/=#&])(?:[0-9]{{4}}(?P<c>[- ])[0-9]{{4}}(?P=c)[0-9]{{4}}(?P=c)[0-9]{{4}}"
    r"|3[0-9]{3}(?P<a>[- ])[0-9]{6}(?P=a)[0-9]{4,5}"
    rf"|[0-9]{{14,16}}|[0-9]{{19}}){_AFTER}(?!/)"
)
# First digits of the networks, with the numbers' lengths; BC's Korean cards begin with 9.
_NETWORKS = re.compile(
    r"4[0-9]{15}(?:[0-9]{3})?|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}"
    r"|3[47][0-9]{13}|3(?:0[0-5]|[689][0-9])[0-9]{11}|35[0-9]{14}|6(?:011|5[0-9]{2}|4[4-9][0-9]|2[0-9]{2})[0-9]{12}"
    r"|62[0-9]{17}|9[0-9]{15}"
)
_DIGIT = re.compile("[0-9０-９]")
_VERSION = re.compile(r"@[0-9]+\.[0-9]+\.")  # package@20.1.com…
_ABOUT_RESIDENT = re.compile(r"주민|등록 ?번호|외국인|resident|RRN", re.IGNORECASE)
_ABOUT_CARD = re.compile(r"카드|card|결제|visa|master", re.IGNORECASE)
# What ends like a name of the internet and is none: a file's ending, an attribute in code.
_NO_DOMAIN = frozenset(
    ("png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "ts", "py", "json", "html", "xml", "txt", "md", "pdf",
     "zip", "csv", "log", "transpose", "test", "invalid")
)  # fmt: skip
_EXAMPLES = re.compile(r"@(?:[\w-]+\.)*example(?:\.(?:com|org|net))?\Z", re.IGNORECASE)  # RFC 2606

MASKS = {
    "korean": {
        "resident number": "[주민등록번호]", "foreigner number": "[외국인등록번호]", "phone": "[전화번호]",
        "mail": "[이메일]", "card": "[카드번호]",
    },
    "english": {
        "resident number": "[RESIDENT NUMBER]", "foreigner number": "[FOREIGNER NUMBER]", "phone": "[PHONE]",
        "mail": "[EMAIL]", "card": "[CARD NUMBER]",
    },
}  # fmt: skip


@dataclass(frozen=True)
class PersonalData(RowStep):
    """Masks personal data: resident and foreigner registration numbers, phone and card numbers, mail addresses.

    A number counts only if it passes its own checks (date and check digit; Luhn and network) and stands by itself; one
    without separators that could be any other number counts only beside a word that names it.
    """

    name = "personal_data"
    action: Literal["mask", "flag", "reject"] = option("mask", "what is done with it")
    mask: Literal["korean", "english"] = option("korean", "language of the words put in its place")
    resident_numbers: bool = option(True, "Korean resident and foreigner registration numbers")
    check_digit: bool = option(
        False, "resident numbers with a hyphen need their check digit too, which those since October 2020 have not"
    )
    phones: bool = option(True, "Korean phone numbers, +82 too")
    mails: bool = option(True, "mail addresses, those of RFC 2606 (example.com) left")
    cards: bool = option(True, "card numbers")
    columns: bool = option(True, "also in columns that the rows' format does not know (name, url, …)")

    def __call__(self, item: Item) -> Item | Rejected | Flagged | Counted:
        found: Counter[str] = Counter()
        record = map_texts(item.record, lambda text: self.masked(text, found))
        values = item.values
        if self.columns:
            said = "\0".join(texts(item.record))  # the format's own columns hold it again
            values = _mapped(item.values, lambda text: self.masked(text, found, said))
        if not found and values is item.values:
            return item
        said = ", ".join(f"{kind} {count}" for kind, count in sorted(found.items()))
        if self.action == "reject":
            return Rejected(f"personal data: {said}")
        if self.action == "flag":
            return Flagged(item, f"personal data: {said}", found)
        return Counted(replace(item, record=record, values=values), found)

    def masked(self, text: str, found: Counter[str], counted: str = "") -> str:
        """The text with a mask for each finding; `found` counts them by kind, but not those in the text `counted`."""
        mail, digits = "@" in text or "＠" in text, _DIGIT.search(text) is not None
        for wanted, pattern, kind in (
            (self.mails and mail, _MAIL, _mail),
            (self.resident_numbers and digits, _RESIDENT, functools.partial(_resident, check=self.check_digit)),
            (self.cards and digits, _CARD, _card),
            (self.phones and digits, _PHONE, _phone),
        ):
            if wanted:
                text = self._masked(text, pattern, kind, found, counted)
        return text

    def _masked(
        self, text: str, pattern: re.Pattern[str], kind: Callable[[re.Match[str]], str | None], found: Counter[str],
        counted: str,
    ) -> str:  # fmt: skip
        parts, end = [], 0
        for match in pattern.finditer(text if text.isascii() else text.translate(_FOLDED)):
            if (name := kind(match)) is not None:
                if not counted or text[match.start() : match.end()] not in counted:
                    found[name] += 1
                parts += [text[end : match.start()], MASKS[self.mask][name]]
                end = match.end()
        return "".join(parts) + text[end:] if parts else text


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A column's value with `change` applied to every text in it; the same object if none changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        mapped = {name: _mapped(each, change) for name, each in value.items()}
        return mapped if any(mapped[name] is not value[name] for name in value) else value
    if isinstance(value, list):
        listed = [_mapped(each, change) for each in value]
        return listed if any(new is not old for new, old in zip(listed, value, strict=True)) else value
    return value


def _near(match: re.Match[str], words: re.Pattern[str], reach: int = 24) -> bool:
    """Whether one of `words` stands before the match, within `reach` characters."""
    return words.search(match.string, max(0, match.start() - reach), match.start()) is not None


def _resident(match: re.Match[str], check: bool) -> str | None:
    year, month, day, separator, kind, rest = match.groups()
    century = {"9": 1800, "0": 1800, "1": 1900, "2": 1900, "5": 1900, "6": 1900}.get(kind, 2000)
    try:
        datetime.date(century + int(year), int(month), int(day))
    except ValueError:
        return None
    foreign = kind in "5678"
    digits = [int(digit) for digit in year + month + day + kind + rest]
    total = sum(digit * weight for digit, weight in zip(digits, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5), strict=False))
    right = digits[-1] == ((13 if foreign else 11) - total % 11) % 10
    # Without its hyphen it may be any id of 13 digits, milliseconds since 1970 among them.
    if not separator and not (right and _near(match, _ABOUT_RESIDENT)):
        return None
    if separator == " " and not right:
        return None
    if check and not right:
        return None
    return "foreigner number" if foreign else "resident number"


def luhn(digits: str) -> bool:
    """Whether a number's last digit is the check digit of ISO/IEC 7812's annex B (Luhn)."""
    doubled = (int(digit) * 2 for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(value - 9 * (value > 9) for value in doubled)) % 10 == 0


def _card(match: re.Match[str]) -> str | None:
    digits = re.sub("[- ]", "", match[0])
    if _NETWORKS.fullmatch(digits) is None or not luhn(digits) or len(set(digits)) < 2:
        return None
    bare = match[0] == digits
    return "card" if not bare or digits[0] in "45" or _near(match, _ABOUT_CARD) else None


def _phone(match: re.Match[str]) -> str:
    return "phone"


def _mail(match: re.Match[str]) -> str | None:
    return None if match[1].lower() in _NO_DOMAIN or _VERSION.search(match[0]) or _EXAMPLES.search(match[0]) else "mail"


STEPS = (PersonalData,)
