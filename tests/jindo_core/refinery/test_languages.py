"""Languages and scripts of texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jindo_core.refinery.languages import NO_LETTERS, TOO_SHORT, language, scripts


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("내일 아침에는 비가 온다고 합니다.", "ko"),
        ("네", "ko"),
        ("Python의 list와 tuple은 무엇이 다른가요?", "ko"),
        ("The committee will meet again next Tuesday in the main hall.", "en"),
        ("Der Ausschuss trifft sich am nächsten Dienstag wieder im großen Saal.", "de"),
        ("来週の火曜日にまた会いましょう。", "ja"),
        ("委员会将于下周二再次开会，地点在大厅。", "zh"),
        ("Комитет снова соберётся в следующий вторник в большом зале.", "ru"),
        ("Yes.", TOO_SHORT),
        ("1 + 1 = 2", NO_LETTERS),
        ("", NO_LETTERS),
    ],
)
def test_languages(text, code):
    assert language(text) == code


def test_scripts_are_counted_by_letter():
    assert scripts("가나 ab漢カひЖ123_・αβ") == {
        "Hangul": 2, "Latin": 2, "Han": 1, "Kana": 2, "Cyrillic": 1, "other": 2
    }  # fmt: skip


@given(st.text(max_size=200))
def test_any_text_has_a_language_and_no_more_letters_than_characters(text):
    assert scripts(text).total() <= len(text)
    assert language(text)
