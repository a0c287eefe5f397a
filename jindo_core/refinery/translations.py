"""Which rounds are a text and its translation, and into which language they go."""

from __future__ import annotations

import re
from typing import Literal

from jindo_core.data.records import Round
from jindo_core.refinery.korean import hangul_share

FOREIGN = 0.3
"""Greatest share of Hangul in a text that is not Korean."""
_TRANSLATE = re.compile(r"translat|번역|옮겨|옮기|옮긴", re.IGNORECASE)
_SAYS_KOREAN = re.compile(
    r"\b(?:in)?to\s+(?:\w+\s+)?korean\b|(?:한국어|한국말|한글|국문|우리말)(?:으로|로)", re.IGNORECASE
)
_SAYS_ENGLISH = re.compile(r"\b(?:in)?to\s+(?:\w+\s+)?english\b|(?:영어|영문)(?:으로|로)", re.IGNORECASE)

# The words of an instruction that is nothing but a request to translate; any other word asks for something else, too.
_REQUEST_WORD = re.compile(
    r"translate|translation|translating|please|kindly|can|could|would|will|you|your|task|is|me|for|help|provide|give|need"
    r"|want|i|the|this|that|these|those|following|given|below|above|provided|next|it|a|an|of|in|into|to|from|as"
    r"|sentences?|texts?|paragraphs?|passages?|inputs?|words?|phrases?|documents?|articles?|messages?|contents?|lines?"
    r"|conversations?|dialogues?|questions?|answers?|instructions?|prompts?|source|original|language|user|s"
    r"|korean|hangul|english|japanese|chinese|french|german|spanish|italian|russian|vietnamese|thai|arabic|hindi"
    r"|(?:다음|아래|위|이|그|저|이것|그것|전체|각)(?:을|를|의|에|은|는)?|주어진|제시된|입력된|원래|모든|해당|한|것을?|의"
    r"|(?:문장|글|문서|텍스트|내용|본문|말|원문|입력|입력문|단락|문단|구절|질문|답변|대답|대화|기사|단어|구문|메시지|지시문|번역문|번역"
    r"|영어|영문|한국어|한국말|한글|국문|우리말|일본어|중국어|프랑스어|불어|독일어|스페인어|러시아어|베트남어)(?:들)?"
    r"(?:을|를|은|는|이|가|으로|로|에서|의|인|된|에|만|로의)?"
    r"|(?:번역|변환)?(?:해|하여|한|할|하|된)?(?:주|달라|줘|줘요|주세요|주십시오|주시겠어요|주실래요|주시기|주기|보세요|봐|보시오|봐요)"
    r"|(?:번역|변환)(?:해|해요|해라|하라|하시오|하세요|하십시오|하기|합니다|한다|하다|할|해줄래|해줘|해주세요|해주십시오|부탁해|부탁드립니다)"
    r"|옮겨|옮겨라|옮기세요|옮기시오|옮기십시오|옮기기|옮긴|바랍니다|부탁합니다|부탁드립니다|부탁해요?|있나요|있어요?|수|줄래요?|요|시오",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+")
_LONGEST_REQUEST = 200  # characters


def direction(source: str, target: str, margin: float = 0.1) -> Literal["korean", "foreign"] | None:
    """What a text was translated into, by the shares of Hangul outside code; None where the two are no such pair.

    Args:
        margin: how far the shares must be apart. Code that is not fenced counts as English, so that the Korean side
            of a technical pair may hold little Hangul: it is enough that the other side is foreign and holds less.
    """
    ours, theirs = hangul_share(source), hangul_share(target)
    if ours is None or theirs is None or min(ours, theirs) > FOREIGN or abs(theirs - ours) < margin:
        return None
    return "korean" if theirs > ours else "foreign"


def mentions_translation(instruction: str) -> bool:
    """Whether an instruction speaks of a translation, whatever it asks for."""
    return _TRANSLATE.search(instruction) is not None


def is_request(instruction: str) -> bool:
    """Whether an instruction asks for a translation and for nothing else: "explain why this translation is bad" and
    "translate and summarise" are no such requests."""
    if len(instruction) > _LONGEST_REQUEST or not mentions_translation(instruction):
        return False
    return all(_REQUEST_WORD.fullmatch(word) for word in _WORD.findall(instruction))


def source_of(each: Round) -> str | None:
    """What a round's answer translates; None where its instruction asks for something else, whose answer (a summary, a
    corrected program) need not resemble the input."""
    return each.input if each.input and each.output and is_request(each.instruction) else None


def says(instruction: str) -> set[str]:
    """The directions, as `direction` calls them, that an instruction names."""
    korean, english = _SAYS_KOREAN.search(instruction), _SAYS_ENGLISH.search(instruction)
    return {name for name, found in (("korean", korean), ("foreign", english)) if found}
