"""Reading rows, refusing bad files, splitting, and the bundled Korean set."""

from __future__ import annotations

import json
import re
import unicodedata

import pytest

from jindo_core.data.records import Record, bundled_path, read_records, split_indices, split_records, stream_records
from jindo_core.errors import InputError

ROWS = [
    {"instruction": "수도는?", "input": "", "output": "서울"},
    {"instruction": "요약", "input": "글\u2028둘째\u0085줄", "output": "짧게\r\n둘"},
    {"instruction": "no input", "output": "fine", "text": "passed over"},
    {"instruction": "null input", "input": None, "output": ""},
]
RECORDS = [
    Record.single("수도는?", "", "서울", 1),
    Record.single("요약", "글\u2028둘째\u0085줄", "짧게\r\n둘", 2),
    Record.single("no input", "", "fine", 3),
    Record.single("null input", "", "", 4),
]


@pytest.fixture
def write(tmp_path):
    def make(content, name="data.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return make


def lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, ensure_ascii=False, indent=2),
        "\n " + json.dumps(ROWS),
        lines(ROWS),
        lines(ROWS) + "\n",
        "\n\n" + lines(ROWS).replace("\n", "\r\n\r\n"),
        "\ufeff" + lines(ROWS),
        "\ufeff" + json.dumps(ROWS),
    ],
    ids=["list", "indented", "space", "lines", "newline", "crlf+blank", "bom-lines", "bom-list"],
)
def test_both_forms_under_both_names(write, name, content):
    assert read_records(write(content, name)) == RECORDS
    assert read_records(str(write(content, name))) == RECORDS


@pytest.mark.parametrize("name", ["ko_sharegpt_deepl_translate_cleaned_v2.json"])
def test_real_rows(assets, name):
    path = assets / "data/ko" / name
    records = read_records(path)
    rows = json.loads(path.read_text("utf-8"))
    assert [(r.instruction, r.input, r.output) for r in records] == [
        (row["instruction"], row["input"], row["output"]) for row in rows
    ]
    assert [r.row for r in records] == list(range(1, len(rows) + 1))


GOOD = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("[]", "has no rows"),
        (GOOD + "\n" + '{"instruction": "a", "outp', "line 2, column .*broken JSON"),
        ("\n" + GOOD + "\n\n{]", "line 4, column"),
        ('[\n{"instruction": "a",\n "output": }]', "line 3, column .*broken JSON"),
        ("[" + GOOD + ", 3]", "row 2 is a int, expected an object"),
        (GOOD + '\n\n"text"', r"row 2 \(line 3\) is a str, expected an object"),
        (GOOD + '\n{"instruction": "a", "x": 1}', r"row 2 \(line 2\) lacks 'output': its keys are 'instruction', "),
        ('[{"output": "b"}]', "row 1 lacks 'instruction': its keys are 'output'"),
        ("[{}]", "row 1 lacks 'instruction': its keys are none"),
        ('{"data": [1]}', "row 1 .*lacks 'instruction': its keys are 'data'"),
        ('[{"instruction": "a", "output": null}]', "row 1: 'output' is null, expected text"),
        ('[{"instruction": "a", "output": 3}]', "row 1: 'output' is the number 3"),
        ('[{"instruction": "a", "input": ["x"], "output": "b"}]', "row 1: 'input' is a list"),
        ('[{"instruction": "a", "output": "\\ud83d"}]', "row 1: 'output' has half a surrogate pair at character 0"),
        ("[" * 100_000, "nested too deep"),
        ("id,instruction,output\n1,a,b\n", "is a table and no JSON, .*rename it to .csv"),
    ],
)  # fmt: skip
def test_bad_content(write, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_records(write(content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_invalid_utf8_is_found_to_the_byte(write, mark):
    data = mark + b'{"instruction": "' + "한글".encode("cp949") + b'", "output": "b"}'
    with pytest.raises(InputError, match=rf"byte {len(mark) + 17} is 0xc7"):
        read_records(write(data))


def test_a_stream_gives_rows_before_it_meets_what_is_broken(write):
    rows = stream_records(write("\n".join([GOOD] * 20 + ["{]"])))
    assert [next(rows).row for _ in range(20)] == list(range(1, 21))
    with pytest.raises(InputError, match="line 21, column 2: broken JSON"):
        next(rows)


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_records(tmp_path / "none.json")
    with pytest.raises(InputError, match="is a folder"):
        read_records(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't be read"):
        read_records(tmp_path / "file" / "data.json")


# --- splitting ------------------------------------------------------------------------------------------


def many(count):
    return [Record.single(f"i{n}", "", f"o{n}", n) for n in range(1, count + 1)]


@pytest.mark.parametrize(("count", "size"), [(10, 0), (10, 1), (10, 5), (1, 0), (100, 32)])
def test_a_split_holds_every_row_once(count, size):
    training, held_out, warning = split_records(many(count), size, 42)
    assert len(held_out) == size
    assert warning is None
    assert sorted(r.row for r in training + held_out) == list(range(1, count + 1))


def test_a_split_depends_on_the_seed_alone():
    assert split_records(many(50), 10, 42) == split_records(many(50), 10, 42)
    assert split_records(many(50), 10, 42) != split_records(many(50), 10, 43)
    # Pinned: a later version must not move held-out rows into training.
    assert [r.row for r in split_records(many(12), 4, 42)[1]] == [8, 6, 3, 9]


def test_indices_are_split_as_rows_are():
    rows = many(50)
    training, held_out, warning = split_indices(50, 10, 42)
    assert ([rows[i] for i in training], [rows[i] for i in held_out], warning) == split_records(rows, 10, 42)
    assert list(split_indices(12, 4, 42)[1]) == [7, 5, 2, 8]


@pytest.mark.parametrize(("count", "size", "became"), [(987, 2000, 98), (10, 6, 1), (3, 2, 1), (2, 5, 1), (1, 1, 0)])
def test_a_size_that_leaves_too_few_becomes_a_tenth(count, size, became):
    training, held_out, warning = split_records(many(count), size, 42)
    assert (len(training), len(held_out)) == (count - became, became)
    assert warning is not None
    assert str(size) in warning
    assert f"{became} are held out" in warning


def test_a_negative_size():
    with pytest.raises(InputError, match="val_set_size is -1"):
        split_records(many(3), -1, 42)


# --- the bundled rows -----------------------------------------------------------------------------------


def test_the_bundled_rows():
    data = bundled_path().read_bytes()
    assert b"\r" not in data
    text = data.decode("utf-8")
    assert unicodedata.normalize("NFC", text) == text
    assert text.endswith("\n")
    records = read_records(bundled_path())
    assert len(records) >= 300
    assert len({(r.instruction, r.input) for r in records}) == len(records)
    assert len({r.output for r in records}) >= 0.9 * len(records)
    assert any(r.input for r in records)
    # Short rows, many of them: about 40k tokens in all at two a character.
    mean = sum(len(r.instruction) + len(r.input) + len(r.output) for r in records) / len(records)
    assert 20 <= mean <= 80
    for record in records:
        for part in (record.instruction, record.output):
            assert part
            assert part == part.strip()
        assert record.input == record.input.strip()
        whole = record.instruction + record.input + record.output
        assert not [c for c in whole if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn") and c != "\n"]
        assert re.search("[가-힣]", record.instruction)
