"""Personal data is found, by kind, and what only looks like it stays. All numbers here are made up."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jindo_core.data.records import Record
from jindo_core.refinery.personal import MASKS, PersonalData, luhn
from jindo_core.refinery.pipeline import Flagged, Item, Rejected


def registration(front, back, wrong=0):
    """A registration number with the check digit by the rule of the Ministry: weights 2 to 9 and 2 to 5."""
    total = sum(int(digit) * (2 + place % 8) for place, digit in enumerate(front + back))
    check = (11 - total % 11) % 10
    if back[0] in "5678":
        check = (check + 2) % 10
    return f"{front}-{back}{(check + wrong) % 10}"


def card(digits):
    """Sixteen digits (or fifteen) with the last one right, by doubling every other from the right."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value // 10 + value % 10
    return digits + str(-total % 10)


def found(text, **options):
    counts = Counter()
    return PersonalData(**options).masked(text, counts), dict(counts)


RESIDENT, FOREIGNER = registration("900307", "123456"), registration("880229", "523456")


@pytest.mark.parametrize(
    ("text", "masked", "kind"),
    [
        (f"주민번호는 {RESIDENT}입니다", "주민번호는 [주민등록번호]입니다", "resident number"),
        (f"외국인({FOREIGNER})", "외국인([외국인등록번호])", "foreigner number"),
        (f"주민등록번호: {RESIDENT.replace('-', '')}.", "주민등록번호: [주민등록번호].", "resident number"),
        (registration("050101", "312345"), "[주민등록번호]", "resident number"),
        (registration("000229", "412345"), "[주민등록번호]", "resident number"),  # 2000 was a leap year
        ("010-1234-5678로 연락", "[전화번호]로 연락", "phone"),
        ("전화 01012345678", "전화 [전화번호]", "phone"),
        ("Tel.011 234 5678", "Tel.[전화번호]", "phone"),
        ("+82 10-1234-5678", "[전화번호]", "phone"),
        ("+82-2-123-4567", "[전화번호]", "phone"),
        ("+821012345678", "[전화번호]", "phone"),
        ("02-123-4567", "[전화번호]", "phone"),
        ("(02) 123-4567", "[전화번호]", "phone"),
        ("031)123-4567", "[전화번호]", "phone"),
        ("070-1234-5678, 다음", "[전화번호], 다음", "phone"),
        ("82-10-1234-5678", "[전화번호]", "phone"),
        ("0082-10-1234-5678", "[전화번호]", "phone"),
        ("010 - 1234 - 5678", "[전화번호]", "phone"),
        ("010–1234–5678 또는", "[전화번호] 또는", "phone"),
        ("번호０１０－１２３４－５６７８입니다", "번호[전화번호]입니다", "phone"),
        ("02.123.4567", "[전화번호]", "phone"),
        ("_010-1234-5678_ **굵게**", "_[전화번호]_ **굵게**", "phone"),
        (f"{RESIDENT.replace('-', ' ')} 홍길동", "[주민등록번호] 홍길동", "resident number"),
        ("201105-3123456", "[주민등록번호]", "resident number"),  # since October 2020 without a check digit
        ("홍길동@naver.com", "[이메일]", "mail"),
        ("hong＠naver.com", "[이메일]", "mail"),
        ("gildong.hong+a@mail.co.kr으로", "[이메일]으로", "mail"),
        ("<gildong@naver.com>", "<[이메일]>", "mail"),
        ("4111 1111 1111 1111", "[카드번호]", "card"),
        (f"카드: {card('941012345678901')}", "카드: [카드번호]", "card"),
        (card("41111111111111" + "2"), "[카드번호]", "card"),
        ("3782 822463 10005", "[카드번호]", "card"),
    ],
)
def test_what_is_masked(text, masked, kind):
    assert found(text) == (masked, {kind: 1})


@pytest.mark.parametrize(
    "text",
    [
        registration("900307", "123456", wrong=1).replace("-", " "),  # check digit
        registration("901332", "123456"), registration("010229", "312345"),  # no such dates
        RESIDENT.replace("-", ""),  # any id of 13 digits
        "주문번호 1612130123456", "1700000000000",  # milliseconds
        "978-89-01-23456-7", "ISBN 9788901234567", "978-0-306-40615-7",
        "2020-01-01", "2020-01-01 010:12", "20200101-1234567", "1990-03-07 12:34:56",
        "192.168.0.1", "10.0.10.123", "v0.10-1234-5678",
        "3.010-1234-5678", "0.02-123-4567", "A010-1234-5678", "010-1234-56789", "1010-1234-5678", "id_010-1234-5678",
        "010-12-5678", "15-1234-5678", "02-2020-12-31", "012-3456-7890",
        "4111 1111 1111 1112", "4111-1111 1111-1111", card("123456789012345"),  # check digit, separators, no network
        f"/item/{card('411111111111112')}", f"order_{card('411111111111112')}", card("941012345678901"), "0" * 16,
        "git@github.com:a/b.git", "user@host", "icon@2x.png", "@app.route", "pkg@1.2.3", "a @ b.com",
        "x@y.transpose(1)", "@types/node@20.1.com",
        "user@example.com", "a@mail.example.org", "ssh://git@host.test/x", "a@b.test",
    ],
)  # fmt: skip
def test_what_only_looks_like_it_stays(text):
    assert found(text) == (text, {})


def test_the_check_digit_can_be_asked_for():
    late = registration("201105", "312345", wrong=3)
    assert found(late, check_digit=True) == (late, {})
    assert found(late) == ("[주민등록번호]", {"resident number": 1})
    impossible = registration("201305", "312345", wrong=3)
    assert found(impossible) == (impossible, {})


def test_columns_that_the_format_does_not_know_are_masked_too():
    values = {"output": "010-1234-5678", "id": 7, "meta": {"by": ["홍, hong@naver.com", None]}}
    row = Item(Record.single("전화?", "", "010-1234-5678"), values, 1)
    answer = PersonalData()(row)
    assert answer.counts == {"phone": 1, "mail": 1}  # the answer's own column counts once
    assert answer.item.values == {"output": "[전화번호]", "id": 7, "meta": {"by": ["홍, [이메일]", None]}}
    assert PersonalData(columns=False)(row).item.values is values
    clean = Item(row.record.single("전화?", "", "없음"), {"name": "x", "list": [{"a": "b"}]}, 1)
    assert PersonalData()(clean) is clean


def test_all_kinds_in_one_text_and_each_can_be_left_out():
    text = f"{RESIDENT}, 010-1234-5678, a.b@c.kr, 5555 5555 5555 4444; 010-1111-2222"
    masked, counts = found(text, mask="english")
    assert masked == "[RESIDENT NUMBER], [PHONE], [EMAIL], [CARD NUMBER]; [PHONE]"
    assert counts == {"resident number": 1, "phone": 2, "mail": 1, "card": 1}
    assert found(text, resident_numbers=False, phones=False, mails=False, cards=False) == (text, {})


def test_what_is_done_with_it():
    item = Item(Record.single("010-1234-5678", "", "a.b@c.kr"), {}, 1)
    masked = PersonalData()(item)
    assert (masked.item.record.instruction, masked.item.record.output) == ("[전화번호]", "[이메일]")
    assert dict(masked.counts) == {"phone": 1, "mail": 1}
    flagged = PersonalData(action="flag")(item)
    assert isinstance(flagged, Flagged)
    assert flagged.item is item
    assert PersonalData(action="reject")(item) == Rejected("personal data: mail 1, phone 1")
    clean = Item(Record.single("안녕", "", "반가워요 2024"), {}, 1)
    assert PersonalData()(clean) is clean


@given(st.text(st.sampled_from("0123456789-. @+()/:ab가카드"), max_size=60))
def test_masking_twice_masks_no_more(text):
    masked, counts = found(text)
    assert found(masked) == (masked, {})
    assert sum(counts.values()) == sum(masked.count(mask) for mask in MASKS["korean"].values())


@given(st.text(st.sampled_from("0123456789"), min_size=14, max_size=18))
def test_luhn(digits):
    right = card(digits)
    assert luhn(right)
    assert not luhn(right[:-1] + str((int(right[-1]) + 1) % 10))
