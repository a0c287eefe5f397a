"""What the steps need to know of Korean: shares of Hangul, particles that fit a word, and a sentence's speech level."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from typing import Literal

import numpy as np

Level = Literal["해요체", "합쇼체", "반말", "-세요"]

_OTHER, _LETTER, _HANGUL = 0, 1, 2

# Fenced code (an open fence lasts to the end), code within a line, addresses. A fence comes first: it holds backticks.
_CODE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]+`|\b(?:https?|ftp)://[^\s)\]>\"'가-힣]+|\bwww\.[^\s)\]>\"'가-힣]+", re.DOTALL
)
# Up to the next quote of either side: quotes that are never closed must not cost a search to the end each.
_QUOTED = re.compile(
    r'"[^"\n]*"|“[^“”\n]*”|‘[^‘’\n]*’|(?<!\w)\'[^\'\n]*\'|「[^「」\n]*」|『[^『』\n]*』|«[^«»\n]*»'
)

# A sentence's last Hangul: before its punctuation, or at a line's end, where chat puts ㅎㅎ, ^^ and emoji instead.
_SENTENCE_END = re.compile(r"([가-힣]{1,6})(?:[.!?…~。]+(?=[\s)\]*_]|$)|[ \tㅋㅎㅠㅜ^;*_)\]]*$)", re.MULTILINE)

# Nouns in 요: a heading or a telegraphic line ends in them, not a 해요체 sentence.
_NOUN_IN_YO = re.compile(r"(?:필|중|주|개|수|소|강|긴|민|동|청|당|빈|고)요$")
_REQUEST = re.compile(r"(?:세|셔)요$")
# 해체 by endings that nouns don't have. A lone 어, 지 or 야 would take 단어, 이미지 and 분야 for verbs: those count
# behind a syllable in ㅆ, ㅄ or ㄶ (했어, 없지, 많네) and a few others.
_BEHIND_TENSE = re.compile(r"[가-힣](?:어|아|지|네|냐|니|구나|거든|는데|더라|잖아)$")
_INTIMATE = re.compile(
    r"(?:싶|같|맞|좋)(?:어|아|지|네|냐|니|구나|거든|은데|더라)$|(?:거|아니|이|뭐|게)야$|잖아$|거든$"
    r"|(?:해|돼|줘|봐|몰라|그래|마)$|(?:할|갈|줄|볼|올|될)(?:게|래|까|걸)$"
    r"|(?:하|가|보|먹)자$|(?:해|가|와|봐|어|아)라$|(?:하|되)(?:냐|니)$"
)
# 이해, 올해; …에 대해, …을 통해; 엄마.
_NOUN_IN_HAE = re.compile(r"[이오피방재침분견상손유저올새동서남북양곤화음공잔무]해$|[대위의인관향통]해$|[^지]마$")
_NIEUN_HIEUT, _BIEUP, _BIEUP_SIOT, _SSANG_SIOT = 6, 17, 18, 20


@functools.cache
def _classes() -> np.ndarray:
    """uint8 [65536]: what each character of the basic plane is; all beyond count as no letter (emoji, for the most)."""
    table = np.array([unicodedata.category(chr(code))[0] == "L" for code in range(0x10000)], dtype=np.uint8)
    table[0xD800:0xE000] = _OTHER
    for first, last in ((0xAC00, 0xD7A3), (0x3131, 0x318E), (0x1100, 0x11FF), (0xA960, 0xA97C), (0xD7B0, 0xD7FB)):
        table[first : last + 1] = _HANGUL
    return table


def letters(text: str) -> tuple[int, int]:
    """How many letters of Hangul, and of all other scripts, a text holds."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    found = np.bincount(_classes()[codes[codes < 0x10000]], minlength=3)
    return int(found[_HANGUL]), int(found[_LETTER])


def prose(text: str) -> str:
    """A text without code (fenced, or within a line) and without addresses."""
    return _CODE.sub(" ", text) if "`" in text or "://" in text or "www." in text else text


def hangul_share(text: str) -> float | None:
    """Hangul's share of the letters of a text's prose, from 0 to 1; None where that has no letters."""
    hangul, other = letters(prose(text))
    return hangul / (hangul + other) if hangul + other else None


def ends_in_consonant(syllable: str) -> bool:
    """Whether a syllable (각) or the Korean name of a Latin letter (L: 엘) ends in a consonant, which decides between
    은 and 는, 이 and 가, 을 and 를, 과 and 와."""
    if "가" <= syllable <= "힣":
        return _final(syllable) != 0
    return syllable.lower() in "lmnr"


def speech_levels(text: str) -> Counter[Level]:
    """How many sentences of a text's prose end in each speech level; quoted speech is not the writer's and is left out.

    해요체 (…요, …죠), 합쇼체 (…ㅂ니다, …십시오), 반말 (해체 and 해라체: …했어, …한다). "-세요" are polite requests,
    which stand beside 합쇼체 in most written Korean; `Honorifics` says what they count as. Sentences that end in a
    noun, or in none of these, are not counted: endings are told by their form alone, doubtful ones are left out.
    """
    counts: Counter[Level] = Counter()
    for ending in _SENTENCE_END.findall(_QUOTED.sub(" ", prose(text))):
        level = _level(ending)
        if level is not None:
            counts[level] += 1
    return counts


def _level(ending: str) -> Level | None:
    """The speech level of a sentence by its last word's end, up to six syllables of it."""
    if ending.endswith("요"):
        if _NOUN_IN_YO.search(ending):
            return None
        return "-세요" if _REQUEST.search(ending) else "해요체"
    if ending.endswith("죠"):
        return "해요체"
    if ending.endswith(("니다", "니까", "시다")) and len(ending) > 2 and _final(ending[-3]) == _BIEUP:
        return "합쇼체"
    if ending.endswith("시오"):
        return "합쇼체"
    if ending.endswith("다") and len(ending) > 1:
        # 한다, 했다, 높다; of the words without a consonant there only the copula: the rest may be 바다 and 소다.
        return "반말" if _final(ending[-2]) or ending.endswith("이다") else None
    behind = _BEHIND_TENSE.search(ending)
    if behind and _final(behind[0][0]) in (_NIEUN_HIEUT, _BIEUP_SIOT, _SSANG_SIOT):
        return "반말"
    if _INTIMATE.search(ending) and not _NOUN_IN_HAE.search(ending):
        return "반말"
    return None


def _final(syllable: str) -> int:
    """Unicode's number of the consonants that a syllable ends in, 0 for none."""
    return (ord(syllable) - 0xAC00) % 28
