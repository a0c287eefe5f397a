"""Text steps: what each changes, what it leaves, and that a second run changes nothing."""

from __future__ import annotations

import time
import unicodedata

import ftfy.badness
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jindo_core.data.records import Record, Round
from jindo_core.refinery.pipeline import Counted, Flagged, Item, Rejected, texts
from jindo_core.refinery.text_steps import (
    STEPS,
    ControlCharacters,
    EmptyAnswers,
    EmptyInputs,
    Html,
    LineEnds,
    Mojibake,
    Nfc,
    RenderedText,
    ReplacementCharacter,
    SpecialTokens,
    TrailingWhitespace,
    ZeroWidth,
    _may_be_mojibake,
)


def item(output="답", instruction="질문", input="", **values):
    return Item(Record.single(instruction, input, output), values, 1)


def output_of(step, text):
    """The answer after the step, which must be the same object in an unchanged item."""
    given_item = item(text)
    answer = step(given_item)
    after = answer if isinstance(answer, Item) else answer.item
    if after.record.output == text:
        assert after is given_item
    return after.record.output


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [
        (Nfc(), "한글", "한글"),
        (Nfc(), "café ﬁ ①", "café ﬁ ①"),  # composed, and no compatibility folding
        (LineEnds(), "a\r\nb\rc\u2028d\u2029e\n", "a\nb\nc\nd\ne\n"),
        (ZeroWidth(), "\ufeff한\u200b국\u00ad어\u2060", "한국어"),
        (ZeroWidth(), "가족 👨‍👩‍👧 ❤️‍🔥 👩🏽‍💻", "가족 👨‍👩‍👧 ❤️‍🔥 👩🏽‍💻"),
        (ZeroWidth(), "می‌خواهم क्‍ष", "می‌خواهم क्‍ष"),
        (ZeroWidth(), "한\u200d국\u200c어 a\u200db 👨\u200d", "한국어 ab 👨"),
        (ZeroWidth(), "가\u3164나", "가 나"),
        (ControlCharacters(), "a\x00b\x07\tc\nd\x7f\x9c\ufdd0", "ab\tc\nd"),
        (ControlCharacters(), "\x1b[1;31m빨강\x1b[0m", "빨강"),
        (ControlCharacters(), "쪽\x0c다음", "쪽\n다음"),
        (Mojibake(), "날씨가 좋다".encode().decode("sloppy-windows-1252"), "날씨가 좋다"),
        (Mojibake(), "It’s a “test” – ﬁne &amp; Ａ…", "It’s a “test” – ﬁne &amp; Ａ…"),
        (Mojibake(), "donâ€™t", "don’t"),
        (Mojibake(), "오늘은 날씨가 좋습니다".encode("euc_kr").decode("latin-1"), "오늘은 날씨가 좋습니다"),
        (Mojibake(euc_kr=False), "ÇÑ±¹¾î´Â", "ÇÑ±¹¾î´Â"),
        (Mojibake(), "ÀÁÂÃÄÅ ÇÈÉÊËÌÍÎÏ ÑÒÓÔÕÖ", "ÀÁÂÃÄÅ ÇÈÉÊËÌÍÎÏ ÑÒÓÔÕÖ"),
        (TrailingWhitespace(), "\n\n  a  \nb\t\u3000\n\n c \n", "  a\nb\n\n c"),
        (Html(), "1 &lt; 2 &amp;amp; &#39;q&#39;&nbsp;&copy; &#0;", "1 < 2 &amp; 'q' &copy; &#0;"),
        (Html(), "`&lt;b&gt;` 과 ```\n&amp;\n``` &amp;", "`&lt;b&gt;` 과 ```\n&amp;\n``` &"),
        (Html(tags="strip"), "<p>안녕</p><br/>a < b <span class='x'>c</span> x<y>", "\n안녕\n\na < b c x<y>"),
        (Html(entities="keep", tags="keep"), "<p>&amp;", "<p>&amp;"),
        (Html(), "HTML에서 < 문자는 &lt; 로 씁니다", "HTML에서 < 문자는 &lt; 로 씁니다"),  # about entities
        (Html(), "R&D 는 R&amp;D", "R&D 는 R&amp;D"),
        (Html(), "`a & b` &amp; c", "`a & b` & c"),  # in code a bare one says nothing
        (Mojibake(), "UTF-8을 잘못 읽으면 `Ã©`가 됩니다: ```\ndonâ€™t\n```",
         "UTF-8을 잘못 읽으면 `Ã©`가 됩니다: ```\ndonâ€™t\n```"),
        (Mojibake(), "donâ€™t `itâ€™s`", "don’t `it’s`"),  # all of it was decoded wrongly
        (ZeroWidth(), "🧑\u200d\u200b🚀", "🧑\u200d🚀"),
        (ControlCharacters(), "\x1b]0;title\x07x \x1b]8;;http://a\x1b\\링크\x1b]8;;\x1b\\", "x 링크"),
        (SpecialTokens("strip"), "a </s> b</s>\n<|im_end|> \n", "a </s> b"),
        (SpecialTokens("strip"), "답입니다.</s> <|im_end|>\n", "답입니다."),
        (SpecialTokens("escape"), "a </s> [INST] <|eot_id|>", "a < /s> [ INST] < |eot_id|>"),
        (SpecialTokens(), "답입니다.</s>", "답입니다.</s>"),
    ],
)  # fmt: skip
def test_what_a_step_changes(step, before, after):
    assert output_of(step, before) == after


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("run", [" ", "\t ", " \n", "</s> ", "&", "<a "], ids=repr)
def test_a_long_run_takes_no_longer_than_its_length(step, run):
    options = [{"action": "strip"}] if step is SpecialTokens else [{}]
    for more in options:
        started = time.process_time()
        step(**more)(item(f"<|x|>a{run * (400_000 // len(run))}b"))
        assert time.process_time() - started < 2  # 400,000 squared takes minutes


def test_every_text_of_a_record_is_cleaned():
    record = Record((Round("a\r\n", "b\r\n", "c\r\n"), Round("d\r", "", "e\r")), system="s\r\n")
    after = LineEnds()(Item(record, {}, 1)).record
    assert list(texts(after)) == ["s\n", "a\n", "b\n", "c\n", "d\n", "e\n"]


def test_what_is_found_is_counted():
    assert dict(ZeroWidth()(item("a\u200b\u200b\ufeff", "\u200b")).counts) == {"U+200B": 3, "U+FEFF": 1}
    assert dict(ControlCharacters()(item("\x00\x1b[0m\x0c\x01")).counts) == {
        "control characters": 2, "terminal codes": 1, "form feeds": 1,
    }  # fmt: skip
    flagged = Html()(item("<p>a</p> &amp; <b>"))
    assert (flagged.reason, dict(flagged.counts)) == ("3 HTML tags", {"tags": 3})
    assert dict(Html(tags="strip")(item("<p>a</p> &amp; <b>")).counts) == {"tags": 3, "entities": 1}
    assert flagged.item.record.output == "<p>a</p> &amp; <b>"


def test_lost_text_rejects_or_flags():
    lost = Rejected("2 replacement characters (U+FFFD): text was lost")
    assert ReplacementCharacter()(item("a\ufffdb\ufffd")) == lost
    assert isinstance(ReplacementCharacter("flag")(item("\ufffd")), Flagged)


def test_mojibake_that_lost_bytes_is_flagged_not_guessed():
    lost = "ë‚�”¨ê° ì¢‹"
    answer = Mojibake()(item(lost))
    assert isinstance(answer, Flagged)
    assert not isinstance(Mojibake(unrepaired="keep")(item(lost)), Flagged)


def test_special_tokens_flag_reject_or_go():
    assert SpecialTokens()(item("a </s> b")).reason == "1 special tokens in the text"
    assert SpecialTokens("reject")(item("a </s> b <unk>")) == Rejected("2 special tokens in the text")
    assert isinstance(SpecialTokens("strip")(item("a</s>")), Counted)
    assert SpecialTokens("strip")(item("a</s>b</s>")).item.record.output == "a</s>b"
    for innocent in ("a <b> c", "x[0] [INS] <- |a|", "if a<s>b", "<|>", "List<String>"):
        if innocent != "if a<s>b":  # HTML's <s> is a sentence's begin
            plain = item(innocent)
            assert SpecialTokens()(plain) is plain


def test_empty_answers_go():
    for blank in ("", "  \n", "<nooutput>", "nan"):
        assert EmptyAnswers()(item(blank)) == Rejected("no answer")
    assert EmptyAnswers(min_characters=3)(item(" 네 ")) == Rejected("answer of 1 characters")
    two = Item(Record((Round("q", "", "a"), Round("q", "", " "))), {}, 1)
    assert EmptyAnswers()(two) == Rejected("no answer in round 2")
    kept = item("None")  # may be one
    assert EmptyAnswers()(kept) is kept


def test_a_word_for_no_input_is_none():
    assert EmptyInputs()(item(input="<noinput>")).record.input == ""
    kept = item(input="None of them")
    assert EmptyInputs()(kept) is kept


def test_a_text_column_that_repeats_the_row_goes():
    columns = {"id": 7, "instruction": "질문\r\n하나", "input": "", "output": " 답 "}
    text = "설명.\n### 질문:\n질문\n하나\n\n### 답:\n답</s>"
    row = Item(Record.single("질문\r\n하나", "", " 답 "), {**columns, "text": text}, 1)
    after = RenderedText()(row)
    assert after.values == columns
    assert after.record is row.record
    other = Item(row.record, {**columns, "text": "전혀 다른 글"}, 1)
    assert RenderedText()(other).reason == "column text says something else than the row"
    longer = Item(row.record, {**columns, "text": row.values["text"] + "덧붙인 말" * 200}, 1)
    assert RenderedText()(longer).reason == "column text says more than the row"


def test_a_text_column_that_is_the_row_stays():
    """In a format that reads the column itself there is no other that holds the answer."""
    for record in (Record.single("", "", "글"), Record.single("질문", "", "답")):
        row = Item(record, {"text": "<human>: 질문\n<bot>: 답" if record.instruction else "글", "id": "a"}, 1)
        assert RenderedText()(row) is row


TEXT = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from(
            "\r\n\t \u200b\u200c\u200d\ufeff\u00ad👨👩🏽❤\ufe0fم‌خक्षक"
            "\x1b[0m<p>&amp;#39;`</s>|한\u1112\u1161ÃÂ©\x85\u3164"
        ),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_a_second_run_changes_nothing(text):
    """Of all steps on any Unicode; but `html` and `mojibake` undo one wrapping at a time."""
    for kind in STEPS:
        answer = kind()(item(text))
        if isinstance(answer, Rejected) or kind in (Html, Mojibake):
            continue
        once = answer if isinstance(answer, Item) else answer.item
        twice = kind()(once)
        assert (twice if isinstance(twice, Item) else twice.item).record == once.record


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_what_is_left_out_is_only_what_a_step_is_for(text):
    kept = output_of(ControlCharacters(), text)
    assert not any(unicodedata.category(letter) == "Cc" and letter not in "\t\n\r" for letter in kept)
    without = output_of(ZeroWidth(), text)
    removed = set(text) - set(without)
    assert removed <= set("\u00ad\u180e\u200b\u200c\u200d\u2060\u2061\u2062\u2063\u2064\ufeff\u3164\uffa0")
    assert "".join(output_of(LineEnds(), text).split()) == "".join(text.split())


@settings(max_examples=500, deadline=None)
@given(text=st.text(st.one_of(st.characters(max_codepoint=0x5FF), st.sampled_from("…€™“”ﬁ─▓√‚Ä한 ")), max_size=12))
def test_the_quick_look_misses_no_text_that_ftfy_finds_bad(text):
    if ftfy.badness.is_bad(text):
        assert _may_be_mojibake(text)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(TEXT, min_size=3, max_size=3), before=TEXT, after=TEXT)
def test_a_rendered_row_is_known_whatever_it_says(parts, before, after):
    instruction, input, output = parts
    columns = {"instruction": instruction, "input": input, "output": output}
    text = before + instruction + "\n" + input + " " + output + after
    answer = RenderedText()(Item(Record.single(instruction, input, output), {**columns, "text": text}, 1))
    assert answer.values == columns
