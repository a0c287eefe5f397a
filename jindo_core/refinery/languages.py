"""Which language a text is in, and which scripts its letters are of."""

from __future__ import annotations

import re
from collections import Counter

NO_LETTERS, TOO_SHORT = "no letters", "too short"
_SHORTEST = 20  # letters of a text that a guess can be made about
_SCRIPTS = {
    "Hangul": re.compile("[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff]+"),
    "Latin": re.compile("[A-Za-zªº\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]+"),
    "Han": re.compile("[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"),
    "Kana": re.compile("[\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d]+"),
    "Cyrillic": re.compile("[\u0400-\u052f]+"),
}
_LETTERS = re.compile(r"[^\W\d_]+")
_SAMPLE = 2000  # characters of a text that are looked at for a guess


def scripts(text: str) -> Counter[str]:
    """Letters by script; "other" where it is none of those known here."""
    counts: Counter[str] = Counter()
    for name, pattern in _SCRIPTS.items():
        if found := sum(map(len, pattern.findall(text))):
            counts[name] = found
    other = sum(map(len, _LETTERS.findall(text))) - counts.total()
    if other > 0:
        counts["other"] = other
    return counts


def language(text: str) -> str:
    """ISO 639-1 code of a text's language, NO_LETTERS or TOO_SHORT.

    Only Korean is written in Hangul, only Japanese in kana: a third of the letters decides (Korean text about programs
    is full of Latin). Anything else is py3langid's guess, from 20 letters on.
    """
    counts = scripts(text[:_SAMPLE])
    letters = counts.total()
    if not letters:
        return NO_LETTERS
    for name, code in (("Hangul", "ko"), ("Kana", "ja")):
        if 3 * counts[name] >= letters:
            return code
    if letters < _SHORTEST and 2 * counts["Han"] < letters:  # a few letters tell nothing, a few characters much
        return TOO_SHORT
    import py3langid

    return str(py3langid.classify(text[:_SAMPLE])[0])
