"""Pairs, their direction, and what a translator leaves: rules that repair, and the words that they must not cut."""

from __future__ import annotations

import json
import pickle

import pytest

from jindo_core.data.records import Record, Round
from jindo_core.refinery.pipeline import Flagged, Item, Rejected
from jindo_core.refinery.translation_steps import (
    INTO_ENGLISH,
    INTO_KOREAN,
    STEPS,
    CodeFences,
    LeadingArtefacts,
    LengthRatio,
    PairById,
    PairDirection,
    direction,
    restore_fences,
    without_artefacts,
)

SEED = "translate the following into English"


def item(instruction, input="", output="", number=1, **values):
    return Item(Record.single(instruction, input, output, number), values, number)


def output_of(answer):
    return answer.record.output


# --- direction -------------------------------------------------------------------------------------------


def test_the_direction_is_what_the_outputs_are_in():
    step = PairDirection()
    korean = step(item(SEED, "How do I boil an egg?", "달걀은 어떻게 삶나요?"))
    assert korean.record.instruction == INTO_KOREAN
    english = step(item("다음을 한국어로 번역하세요.", "달걀은 어떻게 삶나요?", "How do I boil an egg?"))
    assert english.record.instruction == INTO_ENGLISH
    worded = PairDirection(into_korean="다음 글을 한국어로 옮기세요.")
    assert worded(item(SEED, "Boil it.", "삶으세요.")).record.instruction == "다음 글을 한국어로 옮기세요."


def test_direction_is_told_with_code_in_the_korean_side():
    code = "```python\nprint('this is long enough to outweigh the sentence')\n```"
    assert direction(f"Print it:\n{code}", f"출력하세요:\n{code}") == "korean"
    assert direction("Print it with foo.bar(baz) and qux", "foo.bar(baz) 출력") == "korean"


@pytest.mark.parametrize(
    ("instruction", "input", "output"),
    [
        ("Translate the English text into Korean", "Boil it.", "삶으세요."),  # says so already
        ("다음 영어 문장을 한국어로 번역해 줘", "Boil it.", "삶으세요."),
        (SEED, "삶으세요.", "Boil it."),
        (SEED, "Boil it.", "Lessatelo per dieci minuti."),  # no Korean side
        (SEED, "삶으세요.", "십 분 동안 삶으면 됩니다."),  # two of them
        (SEED, "12 + 34", "46"),  # no letters
        ("Translate this into Japanese", "삶으세요.", "茹でてください。"),
        ("다음 글을 영어로 요약해 줘", "삶으세요.", "Boil it."),  # no translation: the instruction is left alone
        (SEED, "", "삶으세요."),
    ],
)
def test_other_instructions_stay(instruction, input, output):
    row = item(instruction, input, output)
    assert PairDirection()(row) is row


# --- leading artefacts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "output", "expected"),
    [
        ("To add a line, press enter.", "o 줄을 추가하려면 엔터를 누릅니다.", "줄을 추가하려면 엔터를 누릅니다."),
        ("Can you write a poem?", "a시를 써 주실 수 있나요?", "시를 써 주실 수 있나요?"),
        ("Explain that again", "x이 내용을 다시 설명해 주세요.", "이 내용을 다시 설명해 주세요."),
        ("So how many are there?", "O 몇 개나 있나요?", "몇 개나 있나요?"),
        ('You said "stop" twice', 'o"그만"이라고 두 번 말했습니다.', '"그만"이라고 두 번 말했습니다.'),
        ("To use `map`, import it", "o `map`을 쓰려면 가져옵니다.", "`map`을 쓰려면 가져옵니다."),
        ("The best is yet to come.", " 는 최고의 순간이 아직 오지 않았습니다.", "최고의 순간이 아직 오지 않았습니다."),
        ("The price went up.", "은 가격이 올랐습니다.", "가격이 올랐습니다."),
        ("The weather is fine.", "가 날씨가 좋습니다.", "날씨가 좋습니다."),
        ("Read it today.", "을 오늘 읽으세요.", "오늘 읽으세요."),
        ("It is long.", "은(는) 깁니다.", "깁니다."),
        ("It is long.", "물론, 깁니다.", "깁니다."),
        ("It is long.", "물론,그것은 깁니다.", "그것은 깁니다."),  # \b after a comma never matches before a blank
        ("It is long.", ", 깁니다.", "깁니다."),
        ("It is long.", ") 깁니다.", "깁니다."),
        ("It is long.", "! 깁니다.", "깁니다."),
        ("It is long.", ". 깁니다.", "깁니다."),
        ("To begin: it rains", "o 는 비가 옵니다.", "비가 옵니다."),  # one after the other
    ],
)
def test_artefacts_go(source, output, expected):
    cleaned = LeadingArtefacts()(item(SEED, source, output))
    assert output_of(cleaned) == expected
    assert LeadingArtefacts()(cleaned) is cleaned


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("The doctor is in.", "의사가 있습니다."),
        ("The decision was made.", "의사 결정이 내려졌습니다."),
        ("This code is short.", "이 코드는 짧습니다."),
        ("This sentence is short.", "이 문장은 짧습니다."),
        ("https://example.org is up", "https://example.org 사이트가 열립니다."),
        ("The bank is open.", "은행이 열었습니다."),
        ("A drizzle fell.", "는개가 내렸습니다."),
        ("The bag is heavy.", "가방이 무겁습니다."),
        ("The price of autumn", "가을의 값"),
        ("Is A larger than B?", "A는 B보다 큰가요?"),
        ("Xx is x here", "x는 여기서 x입니다."),
        ("Scrabble and C", "C 언어와 스크래블"),  # C is a word of the source
        ("McC is a name for C", "C 언어 이야기"),
        ("Is B2B a market?", "B2B는 시장인가요?"),
        ("An MVP in sports", "e스포츠의 최우수 선수"),
        ("Remember e-mail", "e메일을 기억하세요."),
        ("Ann bought silver.", "은 한 냥을 샀습니다."),
        ("Go and see.", "가 보세요."),
        ("The first party and the second party", "을 측은 갑에게 알립니다."),
        ("Of course it is.", "물론, 그렇습니다."),
        ("Sure, here you are", "물론, 여기 있습니다."),
        ("Of course!", "물론이죠!"),
        ("The particles", "는 조사이며 받침이 없는 말 뒤에 옵니다."),
        (", he said", ", 그가 말했습니다."),
        ("! means not", "! 는 아니라는 뜻입니다."),
        ("... and so on", "... 그리고 계속됩니다."),
        ("!important", "!중요"),
        (".NET is a framework", ".NET은 프레임워크입니다."),
        ("* one\n* two", "* 하나\n* 둘"),
        ("Return it", "    return x  # 값을 돌려줍니다"),
        ("To", "o"),  # nothing would be left
    ],
)
def test_words_stay(source, output):
    row = item(SEED, source, output)
    assert LeadingArtefacts()(row) is row


def test_without_a_source_only_what_is_no_word_goes():
    assert without_artefacts("은(는) 작습니다.", None) == "작습니다."
    assert without_artefacts("를 보면 압니다.", None) == "보면 압니다."
    for text in ("o 줄을 추가합니다.", "물론, 그렇습니다.", "은 한 냥", "가 봅시다.", "A 반", "이 코드"):
        assert without_artefacts(text, None) == text
    # A question and its answer are no translation, whatever the question begins with.
    row = item("To whom?", "", "o 누구에게 주나요?")
    assert LeadingArtefacts()(row) is row


# --- code fences -----------------------------------------------------------------------------------------

ONE = '```python\nname = "lamp"\nprint(name)\n```'
TWO = "```bash\npip install lamp\n```"
ONE_TRANSLATED = '```파이썬\n이름 = "전등"\n인쇄(이름)\n```'
TWO_TRANSLATED = "```배시\n핍 설치 전등\n```"


def restored(source, output, **options):
    return CodeFences(**options)(item(SEED, source, output))


def test_translated_code_becomes_the_sources():
    source = f"Print it:\n{ONE}\nInstall it:\n{TWO}\nDone."
    answer = restored(source, f"출력:\r\n{ONE_TRANSLATED}\r\n설치:\r\n{TWO_TRANSLATED}\r\n끝.")
    assert output_of(answer) == f"출력:\n{ONE}\n설치:\n{TWO}\n끝."
    assert CodeFences()(answer) is answer


def test_fences_restored_twice_by_the_seed_are_taken_back():
    """Its cleaner put the first block in the place of every fence mark: block, translated code, block."""
    source = f"Print it:\n{ONE}\nInstall it:\n{TWO}\nDone."
    seed = f"출력:\r\n {ONE}python\r\n이름\r\n {ONE}\r\n설치:\r\n {ONE}bash\r\npip install lamp\r\n {ONE}\r\n끝."
    answer = restored(source, seed)
    assert output_of(answer) == f"출력:\n{ONE}\n설치:\n{TWO}\n끝."
    assert CodeFences()(answer) is answer


def test_code_that_the_translator_left_alone_is_not_taken_back():
    """The second block's own code, between the first block's copies, reads as that block with their marks."""
    source = f"Print it:\n{ONE}\nInstall it:\n{TWO}\nDone."
    seed = f"출력:\n {ONE}\n이름\n {ONE}\n설치:\n {ONE}bash\npip install lamp\n {ONE}\n끝."
    assert output_of(restored(source, seed)) == f"출력:\n{ONE}\n설치:\n{TWO}\n끝."


@pytest.mark.parametrize("opening", ["'''python", "``python", "'``python", "‘‘‘python", "｀｀｀python", "` ` `"])
def test_broken_marks_are_read(opening):
    source = f"Print it:\n{ONE}\nDone."
    for closing in ("```", f" {ONE}"):  # the seed restored the closing one only
        output = f"출력:\n{opening}\n이름\n{closing}\n끝."
        assert output_of(restored(source, output)) == f"출력:\n{ONE}\n끝."


def test_a_quotes_line_within_code_is_no_mark():
    code = "```python\ndef f():\n    '''\n    Give one.\n    '''\n    return 1\n```"
    row = item(SEED, f"See:\n{code}", f"보세요:\n{code}")
    assert CodeFences()(row) is row


def test_a_block_that_occurs_twice_stays_twice():
    row = item(SEED, f"a\n{ONE}\nb\n{ONE}\nc", f"가\n{ONE}\n나\n{ONE}\n다")
    assert CodeFences()(row) is row


def test_counts_that_differ_leave_the_row_and_say_so():
    source, output = f"Print it:\n{ONE}\nInstall it:\n{TWO}", f"출력:\n{ONE_TRANSLATED}\n설치: 핍"
    answer = restored(source, output)
    assert isinstance(answer, Flagged)
    assert output_of(answer.item) == output
    assert answer.reason == "answer 1 has 2 code fences that don't fit its source's 4"
    assert isinstance(restored(source, output, mismatch="reject"), Rejected)
    row = item(SEED, source, output)
    assert CodeFences(mismatch="keep")(row) is row
    assert restore_fences("가 ```나", "a ```b") is None  # an open fence


def test_answers_that_are_no_translation_keep_their_code():
    row = item("Correct this program", ONE, '```python\nprint("lamp")\n```')
    assert CodeFences()(row) is row


# --- length ----------------------------------------------------------------------------------------------


def test_lengths_are_held_to_the_source():
    step = LengthRatio()
    english = "The kettle is on the stove and the water boils. " * 4
    korean = "주전자가 불 위에 있고 물이 끓고 있습니다. " * 4
    good = item(SEED, english, korean)
    assert step(good) is good
    back = item(SEED, korean, english)
    assert step(back) is back
    short = step(item(SEED, english * 3, "주전자입니다."))
    assert isinstance(short, Rejected)
    assert short.reason == "answer 1: 7 characters of Korean for 575, expected 0.2 to 1.5 times as many"
    assert isinstance(step(item(SEED, "The kettle.", korean)), Rejected)
    assert isinstance(step(item(SEED, korean, "Kettle.")), Rejected)
    small = item(SEED, "OK", "네, 알겠습니다.")  # too short to judge
    assert step(small) is small
    code = item(SEED, f"Print it.\n{ONE * 20}", "출력하세요.")
    assert step(code) is code
    summary = item("다음을 요약하세요", english * 3, "주전자.")
    assert step(summary) is summary


# --- pairs by id -----------------------------------------------------------------------------------------


def conversation(number, key, *pairs):
    return Item(Record(tuple(Round(a, "", b) for a, b in pairs), row=number), {"id": key}, number)


def test_rows_of_an_id_become_a_translation():
    step = PairById()
    english = conversation(1, "a", ("How are you?", "Fine, thanks."), ("Bye", "Bye"))
    korean = conversation(2, "a", ("어떻게 지내세요?", "잘 지내요."), ("잘 가요", "Bye"))
    for pair in ([english, korean], [korean, english]):
        joined = step.join(pair)
        assert joined.record.rounds == (
            Round(INTO_KOREAN, "How are you?", "어떻게 지내세요?"),
            Round(INTO_KOREAN, "Fine, thanks.", "잘 지내요."),
            Round(INTO_KOREAN, "Bye", "잘 가요"),  # the last texts are the same: nothing to translate
        )
        assert joined.number == pair[0].number
    back = PairById(into="foreign").join([english, korean])
    assert back.record.rounds[0] == Round(INTO_ENGLISH, "어떻게 지내세요?", "How are you?")


def test_groups_that_are_no_pair_go():
    step = PairById()
    one = conversation(1, "a", ("How are you?", "Fine."))
    assert step.join([one]) == Rejected("1 rows of its id, expected a text and its translation")
    assert PairById(unpaired="keep").join([one]) is one
    assert isinstance(step.join([one, one]), Rejected)
    assert isinstance(step.join([one, one, one]), Rejected)
    longer = conversation(2, "a", ("어떻게 지내세요?", "네."), ("가요", "네."))
    assert step.join([one, longer]) == Rejected("the two rows of its id have not the same texts")


def test_keys_group_by_id():
    import numpy as np

    step = PairById(column="name")
    rows = [Item(Record.single("x"), {"name": name}, 1) for name in ("b", "a", "b", 7, "7")]
    keys = np.frombuffer(b"".join(map(step.key, rows)), dtype=np.uint8).reshape(5, 16)
    assert step.leaders(keys).tolist() == [0, 1, 0, 3, 3]
    assert step.key(Item(Record.single("x"), {"name": None}, 1)) == b""
    assert step.key(Item(Record.single("x"), {}, 1)) == b""


# --- all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_steps_can_be_sent_to_workers(step):
    assert pickle.loads(pickle.dumps(step())) == step()


def test_the_real_set(assets):
    """What the steps do to the 987 rows, and that a second time they do nothing."""
    path = assets / "data/ko/ko_sharegpt_deepl_translate_cleaned_v2.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    items = [item(row["instruction"], row["input"], row["output"], n) for n, row in enumerate(rows, 1)]
    changed = {}
    for step in (PairDirection(), CodeFences(), LeadingArtefacts()):
        after = [step(row) for row in items]
        assert all(isinstance(row, Item) for row in after)
        changed[step.name] = sum(new is not old for new, old in zip(after, items, strict=True))
        assert all(step(row) is row for row in after)
        items = after
    assert changed == {"pair_direction": 977, "code_fences": 97, "leading_artefacts": 40}
    fenced = [row.record for row in items if "```" in row.record.input]
    assert len(fenced) == 97
    assert all(record.output.count("```") == record.input.count("```") for record in fenced)
    rejected = [row.number for row in items if isinstance(LengthRatio()(row), Rejected)]
    assert rejected == [7, 60, 829, 876, 895]
