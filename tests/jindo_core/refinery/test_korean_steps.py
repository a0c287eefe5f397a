"""What is told of a Korean answer: its Hangul, English left over, refusals, speech levels."""

from __future__ import annotations

import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jindo_core.data.records import Record, Round
from jindo_core.errors import InputError
from jindo_core.refinery import translation_steps
from jindo_core.refinery.korean import ends_in_consonant, hangul_share, letters, speech_levels
from jindo_core.refinery.korean_steps import STEPS, HangulRatio, Honorifics, Refusals, UntranslatedResidue
from jindo_core.refinery.pipeline import Counted, Flagged, Item, Rejected


def answer(output, input="", instruction="질문입니다"):
    return Item(Record.single(instruction, input, output, 1), {}, 1)


def test_letters_by_script():
    assert letters("한글 and ㅋㅋ, 123!") == (4, 3)
    assert letters("中文 カナ кир é") == (0, 8)
    assert letters("\u1112\u1161\u11ab") == (3, 0)  # a syllable taken apart is Hangul too
    assert letters("😀 12 ½ \ud800") == (0, 0)


def test_the_share_leaves_code_and_addresses_out():
    assert hangul_share("주소는 https://example.org/a/long/path?with=words 입니다") == 1
    assert hangul_share("함수 `compute_everything` 호출") == 1
    assert hangul_share("보세요:\n```\nint main() { return 0; }\n```\n끝") == 1
    assert hangul_share("끝이 없는 코드 ```int main() {") == 1
    assert hangul_share("반반 half") == 2 / 6
    assert hangul_share("```x```, 12") is None


def test_particles_that_fit():
    assert [ends_in_consonant(c) for c in "각가힣Ll"] == [True, False, True, True, True]
    assert not any(ends_in_consonant(c) for c in "AaCxy나")


def test_hangul_ratio():
    step = HangulRatio()
    for text in (
        "이 답은 한국어입니다. 문장이 길지는 않습니다. It has some English in it too.",
        "OK",
        "",
        "결과:\n```\n" + "print(1)\n" * 40 + "```",
    ):
        row = answer(text)
        assert step(row) is row
    english = answer("This is an answer in English, all of it, and nothing else.")
    assert step(english) == Rejected("answer 1 is 0.00 Hangul, expected at least 0.3")
    assert HangulRatio(at_least=0)(english) is english
    for row in (  # the first is a translation into English, whatever it says
        answer("The kettle is on the stove.", "주전자가 불 위에 있습니다.", "Translate into Korean"),
        answer("The kettle is on the stove.", "", "주전자를 영어로 묘사하세요."),
        answer("The kettle is on the stove.", "", "Describe a kettle in English"),
    ):
        assert step(row) is row
    turkish = answer("Su isitici ocagin uzerinde duruyor.", "The kettle is on the stove.", "Translate into English")
    assert isinstance(step(turkish), Rejected)
    rounds = Round("가", "", "네, 알겠습니다."), Round("나", "", "No, this will never be translated")
    assert step(Item(Record(rounds), {}, 1)).reason.startswith("answer 2 ")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("먼저 봅니다. To use this code in your page you simply paste it.", "answer 1 keeps 11 Latin words in a row"),
        ("Boil the eggs for ten minutes", "answer 1 is its source, not translated"),
        ("boil the  EGGS for\nten minutes", "answer 1 is its source, not translated"),
    ],
)
def test_residue_goes(output, reason):
    row = answer(output, "Boil the eggs for ten minutes")
    assert UntranslatedResidue()(row) == Rejected(reason)
    assert UntranslatedResidue(action="flag")(row) == Flagged(row, reason)


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("회사: Blue Lamp Holdings LLC, Red Lamp Holdings LLC, Green Lamp Capital Management", "x"),
        ("설치하려면 `pip install this and that and more and even more of it`를 칩니다.", "x"),
        ("A whole answer in English is not a residue of anything at all", "x"),  # hangul_ratio's
        ("Visual Studio Code에서 여세요", "x"),
        ("print(x)", "print(x)"),
        ("Blue Lamp", "Blue Lamp"),
        ("", ""),
    ],
)
def test_names_and_code_are_no_residue(output, source):
    row = answer(output, source)
    assert UntranslatedResidue()(row) is row


@pytest.mark.parametrize(
    "output",
    [
        "As an AI language model, I cannot do that for you.",
        "I'm sorry, but I can't help with that.",
        "I am just an AI model and don't have feelings.",
        "AI 언어 모델로서 저는 그 일을 할 수 없습니다.",
        "저는 인공지능이기 때문에 감정이 없습니다.",
        "죄송하지만 해당 요청은 도와드릴 수 없습니다.",
        "죄송합니다. 저는 인터넷에 접속할 수 없어요.",
    ],
)
def test_refusals_go(output):
    assert Refusals()(answer(output)) == Rejected("answer 1 is a refusal")
    assert isinstance(Refusals(action="flag")(answer(output)), Flagged)


@pytest.mark.parametrize(
    "output",
    [
        "Too many requests in 1 hour. Try again later.",
        "요청이 너무 많습니다. 잠시 후 다시 시도하세요.",
        "502 Bad Gateway",
        "Something went wrong. If this issue persists please contact us through help.openai.com.",
        "일시적인 오류가 발생했습니다. 잠시 후 다시 시도해 주세요.",
        "<!DOCTYPE html><html><head></head></html>",
    ],
)
def test_error_pages_go(output):
    assert Refusals()(answer(output)) == Rejected("answer 1 is an error page")


@pytest.mark.parametrize(
    "output",
    [
        "저와 같은 언어 모델을 쓰면 문장을 나눌 수 있습니다.",
        "죄송하지만 조금 더 자세히 말씀해 주시겠어요?",
        "죄송합니다. 제 설명이 부족했네요. 다시 설명하겠습니다.",
        "As an engineer, I can tell you that a language model is a program.",
        "오류 429는 클라이언트가 보낸 것이 많다는 뜻입니다. " * 24 + "Too many requests",  # explains it at length
        "할 수 없습니다.",
        "",
    ],
)
def test_answers_about_such_things_stay(output):
    row = answer(output)
    assert Refusals()(row) is row


def test_patterns_of_ones_own(tmp_path):
    path = tmp_path / "patterns.yaml"
    path.write_text("refusal:\n  - ^모르겠\n", encoding="utf-8")
    step = Refusals(patterns=str(path))
    assert isinstance(step(answer("모르겠습니다.")), Rejected)
    row = answer("As an AI language model, I cannot do that.")
    assert step(row) is row
    for content, message in (
        ("refusal:\n  - '('\n", "no regular expression"),
        ("refusal: text\n", "'refusal' is str, expected a list"),
        ("other: []\n", "expected the keys refusal and page"),
        ("a: [\n", "is no YAML"),
    ):
        bad = tmp_path / f"bad{abs(hash(content))}.yaml"
        bad.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            Refusals(patterns=str(bad))
    with pytest.raises(InputError, match="can't be read"):
        Refusals(patterns=str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("비가 와요. 우산을 챙겼나요? 그렇죠!", {"해요체": 3}),
        ("비가 옵니다. 우산이 있습니까? 갑시다. 고르십시오.", {"합쇼체": 4}),
        ("비가 왔어. 우산 있지? 내일 하자! 뭐야. 가지 마. 잘했네.", {"반말": 6}),
        ("비가 온다. 우산을 챙겼다. 하늘은 회색이다.", {"반말": 3}),
        ("우산을 챙기세요. 문을 닫아 주세요!", {"-세요": 2}),
        ("우산이 필요. 제품 개요\n가격과 수요\n첫째 단어\n사용자\n큰 이미지\n새로운 분야\n깊은 이해", {}),  # nouns
        ("바다에 대해\n이를 위해\n엄마\n바다", {}),
        ('그는 "비가 와"라고 했습니다. “우산 있어?”라고도 했습니다.', {"합쇼체": 2}),
        ("`print('비가 왔어')`를 실행합니다.\n```\n# 비가 왔어.\n```", {"합쇼체": 1}),
        ("좋아요 ㅎㅎ\n알겠어요^^\n고마워요~", {"해요체": 3}),
        ("(비가 옵니다.) **우산을 챙겼어요.**", {"합쇼체": 1, "해요체": 1}),
        ("It rains. 3.5", {}),
        ("", {}),
    ],
)
def test_speech_levels(text, expected):
    assert dict(speech_levels(text)) == expected


def test_mixtures_are_reported_with_counts():
    mixed = answer("비가 옵니다. 우산을 챙겼어요. 바람도 붑니다. 춥다.")
    assert Honorifics()(mixed) == Flagged(
        mixed, "answer 1 mixes 합쇼체 2, 해요체 1, 반말 1", {"합쇼체": 2, "해요체": 1, "반말": 1}
    )
    assert Honorifics(action="reject")(mixed) == Rejected("answer 1 mixes 합쇼체 2, 해요체 1, 반말 1")
    assert Honorifics(min_sentences=2)(mixed) == Counted(mixed, {"합쇼체": 2, "해요체": 1, "반말": 1})
    plain = answer("비가 옵니다.")
    assert Honorifics()(plain) == Counted(plain, {"합쇼체": 1})
    none = answer("비")
    assert Honorifics()(none) is none


def test_requests_beside_formal_sentences_are_usual():
    usual = answer("문을 엽니다. 우산을 챙기세요.")
    assert Honorifics()(usual) == Counted(usual, {"합쇼체": 1})
    assert isinstance(Honorifics(count_requests=True)(usual), Flagged)
    rude = answer("우산을 챙기세요. 알았어.있어.")
    assert isinstance(Honorifics()(rude), Flagged)  # beside 반말 they are not


def test_levels_are_judged_an_answer_at_a_time():
    record = Record((Round("가", "", "비가 옵니다."), Round("나", "", "비가 와요.")))
    row = Item(record, {}, 1)
    assert Honorifics()(row) == Counted(row, {"합쇼체": 1, "해요체": 1})


@pytest.mark.parametrize("step", STEPS)
def test_steps_can_be_sent_to_workers(step):
    assert pickle.loads(pickle.dumps(step())) == step()


LONG = ["a", "a ", "가", "가 ", "ㅋ", "“", "'", "「", "```", "`", "www.", ". ", "가.", "\n가 ", "o "]


@pytest.mark.parametrize("piece", LONG)
def test_long_texts_take_time_by_their_length(piece):
    """No expression that goes over 400 KB again from each of its places: that would take minutes."""
    row = answer(piece * (400_000 // len(piece)), piece * 1000, "Translate into English")
    start = time.perf_counter()
    for step in (*STEPS, *translation_steps.STEPS[1:]):
        step()(row)
    assert time.perf_counter() - start < 10


PIECES = st.sampled_from(
    ["은 ", "는", "물론, ", "o ", "이 코드", "```", "```python\n", "'''", "\r\n", " ", "니다.", "요?", "\u200b"]
)
TEXT = st.lists(PIECES | st.text(max_size=8), max_size=12).map("".join)


@settings(deadline=None, max_examples=150)
@given(source=TEXT, output=TEXT)
def test_any_text_goes_through_and_a_second_time_stays(source, output):
    row = answer(output, source, "Translate into English")
    for step in (*STEPS, *translation_steps.STEPS[1:]):
        first = step()(row)
        if isinstance(first, Rejected):
            continue
        kept = first if isinstance(first, Item) else first.item
        again = step()(kept)
        assert (again if isinstance(again, Item) else again.item) is kept, step.name
