"""What a machine translator left before an answer's first sentence: found by rules that would rather leave it."""

from __future__ import annotations

import re

from jindo_core.refinery.korean import ends_in_consonant

_INDENT = re.compile(r"\s+(?=[가-힣])")
_BOTH_PARTICLES = re.compile(r"(?:은\(는\)|는\(은\)|이\(가\)|가\(이\)|을\(를\)|를\(을\)|와\(과\)|과\(와\))[ \t]+")
_NEVER_A_WORD = re.compile(r"[는를][ \t]+")
_MAYBE_A_WORD = re.compile(r"[은을가][ \t]+")
_GRAMMAR = re.compile(
    r"조사|받침|어미|문법|음절|글자|자음|모음|맞춤법|쉼표|마침표|부호|구두점|기호|particle"
    r"|[은는이가을를][ \t/,]+[은는이가을를][ \t/,]"
)
_GO = re.compile(r"[보봤볼본봐주줘버있계야라]")  # 가 보세요, 가 있다: the verb
# 은 나노입자 (silver), 가 등급 and 을 지원자 (A and B of a list, the parties of a contract).
_SILVER_WORD = re.compile(
    r"나노|입자|이온|도금|반지|목걸이|팔찌|귀걸이|수저|숟가락"
    r"|메달|합금|제품|광산|시세|동전|화폐|한 |두 |\d"
)
_LABELLED = re.compile(
    r"(?:등급|군|항|안|씨|반|동|형|조|호|열|행|목|단지|단계|지원자|후보|측|회사|당사자|은행|학생|선수|참가자|업체|기업|그룹|팀|집단|지역|지점|나라|국가)"
    r"(?:[은는이가을를의에도와과로,.]|[ \t]|$)"
)
_SILVER = re.compile(r"(?i:silver|\beun\b|argent|sterling)|\bAg\b")
_PARTY = re.compile(
    r"(?i:\bpart(?:y|ies)\b|\blessee\b|\bemployee\b|\bgrades?\b|\bgroups?\b|\bapplicants?\b|\bMr\b|\bMs\b|\bclass\b|\beul\b|\bga\b)"
    r"|(?<![\w'’])[AB](?![\w'’])"
)
_OF_COURSE = re.compile(r"물론[,，][ \t]*(?=\S)")
_AFFIRMS = re.compile(
    r"course|sure|certain|absolute|natural|\by(?:es|eah|ep|up)\b|definite|indeed|granted|obvious|by all means"
    r"|no problem|glad|happy|love to|pleasure|admit|needless|clearly|\bwhile\b|though|but\b|however|\bok(?:ay)?\b"
    r"|all ?right|doubt|you bet|\btrue\b|evident|undeniab|exception|even\b"
    r"|\b(?:I|we)(?:'|’)?(?: wi)?(?:ll|d)\b|\b(?:I|we|you) can\b"
    r"|\bhere(?:'|’)?s?\b|\blet(?:'|’)?s? |great|gladly|\bmay\b|\bmight\b|\bright\b",
    re.IGNORECASE,
)
_COMMA = re.compile(r"[,;、，][ \t]*(?=[가-힣])|\.[ \t]+(?=[가-힣])")
_CLOSING = re.compile(r"[:)\]}!?][ \t]+(?=[가-힣])")
_LETTER = re.compile(r"([A-Za-z])(?:[ \t]+(?=\S)|(?=[가-힣\"'“‘`]))")
_SECOND_LETTER = re.compile(r"\W*[^\W\d_]([A-Za-z])")
_PARTICLE = re.compile(r"[은는이가을를과와](?![가-힣])")
# Words that a letter begins (e스포츠, X선, L당, n차) or that stand behind one (i 번째, a 변수, p 값). Short ones only
# where a particle or a blank ends them: 형 is a part of 형식, too.
_GLUED_WORD = re.compile(
    r"스포츠|메일|북|커머스|러닝|티켓|팝|셔츠|턴|축|값|번째|개의|제곱|분포|세대|카드|쿠폰|페이|뱅킹|바이크|모빌리티|잉크|리더|변수|상수|계수|함수|좌표"
    r"|벡터|행렬|집합|노드|정점|등급|그룹|타입|클래스|코스|유형|더하기|빼기|곱하기|나누기|플러스|마이너스|퍼센트|평균|검정|통계|진법|진수|염색체|장조|단조"
    r"|마이너|메이저|플랫|학점|열차|드라이브|키를|버튼|교수|박사|언어|모양|레이|인자|단위|번호|항목|원소|문자|글자|알파벳"
    r"|(?:차|당|선|형|열|행|항|안|군|자|링|급|반|조|판|층|호|동|면|점|팀|씨|양|개|명|년|월|일|번|배|겹|회|자형|값|축|곱|밴드|라인)"
    r"(?:[은는이가을를의에도와과로만],?(?![가-힣])|으로|에서|[ \t,.]|$)"
)


def without_artefacts(text: str, source: str | None) -> str:
    """A translation without stray signs before its first sentence; applied again it changes nothing.

    Args:
        text: what was translated.
        source: what it was translated from, None where that is unknown or is Korean itself. Only with it can a lone
            letter, 은, 을, 가, 물론 or an indent be told from what is meant: DeepL's stray letter is the second one of
            its source ("To add …" became "o 추가 …").
    """
    while True:
        end = _artefact(text, source)
        if end == 0 or not text[end:].strip():
            return text
        text = text[end:]


def _artefact(text: str, source: str | None) -> int:
    """How many characters at a text's beginning are an artefact."""
    grammar = _GRAMMAR.search(text[:80]) is not None
    for pattern in (_BOTH_PARTICLES, _COMMA):
        found = pattern.match(text)
        if found and not grammar and not (pattern is _COMMA and _is_meant(text[0], source)):
            return found.end()
    if (found := _NEVER_A_WORD.match(text)) and not grammar:
        return found.end()
    if source is None:
        return 0
    if (found := _INDENT.match(text)) and not _is_indented(text, found[0], source):
        return found.end()
    if (found := _CLOSING.match(text)) and not _begins_with_sign(source):
        return found.end()
    if (found := _OF_COURSE.match(text)) and not _AFFIRMS.search(source[:200]):
        return found.end()
    if (found := _MAYBE_A_WORD.match(text)) and not grammar and _is_particle(text[0], text[found.end() :], source):
        return found.end()
    if (found := _LETTER.match(text)) and not grammar and _is_stray(found[1], text[1:], source):
        return found.end()
    return 0


def _begins_with_sign(source: str | None) -> bool:
    return source is not None and source.lstrip()[:1] in tuple(",;:.)]}!?、，")


def _is_meant(sign: str, source: str | None) -> bool:
    """Whether a sign at the beginning may be the text's own: nothing but a comma is none without a source."""
    return sign not in ",，、" if source is None else _begins_with_sign(source)


def _is_indented(text: str, indent: str, source: str) -> bool:
    """Whether blanks at the beginning are meant: the source has them, or the next line has them too (a poem)."""
    return source[:1].isspace() or text.lstrip().partition("\n")[2].startswith(indent)


def _is_particle(syllable: str, rest: str, source: str) -> bool:
    """Whether 은, 을 or 가, which stand alone at the beginning, are not silver, a label, a party or a verb."""
    if _LABELLED.match(rest):
        return False
    if syllable == "은":
        return not (_SILVER_WORD.match(rest) or _SILVER.search(source))
    return not (_PARTY.search(source) or (syllable == "가" and _GO.match(rest)))


def _is_stray(letter: str, rest: str, source: str) -> bool:
    """Whether a letter at the beginning, with `rest` after it, is the source's second one, and no word of its own."""
    second = _SECOND_LETTER.match(source)
    if second is None or second[1].lower() != letter.lower():
        return False
    particle = _PARTICLE.match(rest)
    if particle and ends_in_consonant(letter) == (particle[0] in "은이을과"):
        return False  # "x는", "n을"; but "x이 스타일" is x and 이
    if _GLUED_WORD.match(rest.lstrip()):
        return False
    # The article and the pronoun stand alone in any English text. Glued to a word it is neither ("a시를").
    if letter in "aiI" and not rest[:1].isspace():
        return not re.search(rf"[`\"'(*_-]{letter}\b|\b{letter}[`\"')*_=+-]", source)
    flags = re.IGNORECASE if letter.islower() else 0
    return not re.search(rf"(?<![\w'’]){letter}(?![\w'’])", source, flags)
