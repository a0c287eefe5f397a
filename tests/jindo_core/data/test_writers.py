"""Records back into rows of each format, and rows into files: nothing lost, nothing half-written."""

from __future__ import annotations

import csv
import datetime
import errno
import gzip
import io
import itertools
import json
import os

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jindo_core.data import writers
from jindo_core.data.formats import FORMATS, detect_format
from jindo_core.data.readers import Row, open_rows
from jindo_core.data.records import Record, Round, read_records
from jindo_core.data.writers import WRITABLE, RowWriter, row_of, split_rounds
from jindo_core.errors import InputError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
FULL = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
RECORD = st.builds(
    Record,
    st.lists(st.builds(Round, TEXT, TEXT, TEXT), min_size=1, max_size=4).map(tuple),
    TEXT,
    st.just(False),
    st.just(1),
)
SINGLE = st.builds(Record, st.tuples(st.builds(Round, FULL, TEXT, TEXT)), TEXT, st.just(False), st.just(1))


def read(values, name):
    return FORMATS[name].record(Row(1, "row 1", values))


def texts(record):
    """All text of a record, with what stands between an instruction and its input taken away."""
    asked = [part for one in record.rounds for part in (f"{one.instruction}\0{one.input}", one.output)]
    return [record.system, *(text.replace("\0", "").replace("\n\n", "") for text in asked)]


# --- rows ------------------------------------------------------------------------------------------------


@given(SINGLE)
def test_around_every_format_and_back_no_text_is_lost(record):
    now = record
    for name in ("alpaca", "sharegpt", "messages", "orca", "koalpaca", "vicuna", "wizard", "alpaca"):
        values = json.loads(json.dumps(row_of(now, name)))
        now = read(values, name)
        assert texts(now) == texts(record)
    joined = "\n\n".join(filter(None, (record.instruction, record.input)))
    assert now == Record((Round(joined, "", record.output),), record.system, row=1)


@given(RECORD, st.sampled_from(["sharegpt", "messages"]))
def test_conversations_keep_their_rounds(record, name):
    back = read(row_of(record, name), name)
    asked = ["\n\n".join(filter(None, (one.instruction, one.input))) for one in record.rounds]
    assert [(one.instruction, one.input) for one in back.rounds] == [(text, "") for text in asked]
    assert [one.output for one in back.rounds] == [one.output for one in record.rounds]
    assert back.system == record.system


@given(RECORD)
def test_rounds_apart_are_all_there(record):
    assert [one.rounds for one in split_rounds(record)] == [(one,) for one in record.rounds]
    for one in split_rounds(record):
        assert read(row_of(one, "alpaca"), "alpaca") == one


@given(TEXT, TEXT)
def test_what_no_template_is_for_stays_so(prompt, answer):
    record = Record((Round(prompt, "", answer),), formatted=True, row=1)
    for name in ("self-instruct", "input-output", "longform"):
        assert read(row_of(record, name), name) == record
    if not prompt:
        assert read(row_of(record, "text"), "text") == record


def test_a_row_of_each():
    record = Record((Round("질문", "자료", "답"),), row=7)
    rows = {
        "alpaca": {"instruction": "질문", "input": "자료", "output": "답"},
        "koalpaca": {"instruction": "질문", "input": "자료", "output": "답"},
        "sharegpt": {
            "id": "7", "conversations": [{"from": "human", "value": "질문\n\n자료"}, {"from": "gpt", "value": "답"}]
        },
        "messages": {"messages": [{"role": "user", "content": "질문\n\n자료"}, {"role": "assistant", "content": "답"}]},
        "orca": {"system_prompt": "", "question": "질문\n\n자료", "response": "답"},
        "qa": {"Q": "질문\n\n자료", "A": "답"},
        "self-instruct": {"prompt": "질문\n\n자료", "completion": "답"},
        "input-output": {"input": "질문\n\n자료", "output": "답"},
    }  # fmt: skip
    assert {name: row_of(record, name) for name in rows} == rows
    assert row_of(Record.single("q", "", "a"), "koalpaca") == {"instruction": "q", "output": "a"}
    polite = Record((Round("q", "", "a"),), "s")
    assert row_of(polite, "alpaca")["system"] == row_of(polite, "orca")["system_prompt"] == "s"
    assert row_of(polite, "sharegpt")["conversations"][0] == {"from": "system", "value": "s"}
    for name, values in rows.items():
        assert detect_format_of(values).name in (name, "alpaca")


def detect_format_of(values):
    return next(one for one in FORMATS.values() if one.fits([Row(1, "row 1", values)]))


@pytest.mark.parametrize(
    ("record", "name", "message"),
    [
        (Record((Round("q"), Round("r")), row=3), "alpaca", "row 3 has 2 rounds, and alpaca has room for one: write"),
        (Record((Round("q"), Round("r")), row=3), "self-instruct", "row 3 has 2 rounds"),
        (Record((Round("q"),), "s", row=3), "qa", "row 3 has a system message, and qa has no room for it"),
        (Record((Round("q"),), "s", row=3), "text", "row 3 has a system message"),
        (Record((Round("q"),), formatted=True, row=3), "sharegpt", "row 3 is for no template"),
        (Record((Round("q"),), formatted=True, row=3), "alpaca", "row 3 is for no template"),
        (Record((Round("q"),), formatted=True, row=3), "text", "row 3 has a question"),
        (Record((Round("", "", "a"),), row=3), "text", "row 3 has a question"),
        (Record((Round("q"),)), "hh-rlhf", "format 'hh-rlhf' can't be written: expected alpaca"),
        (Record((Round("q"),)), "orka", r"Did you mean 'orca'\?"),
    ],
)
def test_what_a_format_has_no_room_for(record, name, message):
    with pytest.raises(InputError, match=message):
        row_of(record, name)


def test_what_is_written_is_also_read():
    assert set(WRITABLE) <= set(FORMATS)


# --- files -----------------------------------------------------------------------------------------------

FLAT = [
    {"instruction": "수도는?", "input": "", "output": 'a "b", c\td\r\ne\rf\n'},
    {"instruction": "\u2028\x85\ufeff 😀", "input": " ", "output": "끝\x00"},
    {"instruction": "", "input": "a\rb", "output": "c\n"},
    {"instruction": "", "input": "", "output": ""},
]
NESTED = [{"id": "1", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "답"}]}] * 3
TEXT_FORMS = ["a.json", "a.jsonl", "a.ndjson", "a.json.gz", "a.jsonl.gz"]
TABLES = ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.gz"]


def write(path, rows):
    with RowWriter(path) as writer:
        for count, row in enumerate(rows, 1):
            writer.write(row)
            assert writer.rows == count
    return path


def by_others(path):
    """What an independent reader finds."""
    name = path.name
    if name.endswith(".parquet"):
        return pq.read_table(path).to_pylist()
    data = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    if ".csv" in name or ".tsv" in name:
        return list(csv.DictReader(io.StringIO(data.decode(), newline=""), delimiter="\t" if ".tsv" in name else ","))
    return (
        json.loads(data)
        if ".json." in name + "." and ".jsonl" not in name
        else list(map(json.loads, data.split(b"\n")[:-1]))
    )


@pytest.mark.parametrize("name", [*TEXT_FORMS, *TABLES, "a.parquet"])
def test_rows_come_back_from_every_form(tmp_path, name):
    for rows in [FLAT] if name in TABLES else [FLAT, NESTED]:
        path = write(tmp_path / name, rows)
        assert by_others(path) == rows
        assert [row.values for row in open_rows(path)] == rows
        assert os.listdir(tmp_path) == [name]
        first = path.read_bytes()
        assert write(path, rows).read_bytes() == first
        assert path.stat().st_mode & 0o600 == 0o600


@settings(max_examples=30)
@given(rows=st.lists(st.fixed_dictionaries({"a": TEXT, "b": TEXT}), min_size=1, max_size=4))
def test_any_text_comes_back_from_every_form(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any")
    for name in ("a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet"):
        assert [row.values for row in open_rows(write(folder / name, rows))] == rows


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
def test_no_rows_at_all(tmp_path, name):
    path = write(tmp_path / name, [])
    with pytest.raises(InputError, match=r"is empty|has no rows"):
        list(open_rows(path))
    if name == "a.json":
        assert json.loads(path.read_bytes()) == []
    if name == "a.parquet":
        assert pq.read_table(path).num_rows == 0


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_what_fails_leaves_the_file_as_it_was(tmp_path, name):
    path = write(tmp_path / name, FLAT)
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        write(path, (FLAT[0] if number else 1 / number for number in (1, 0)))
    with pytest.raises(InputError, match="half a surrogate pair"):
        write(path, [FLAT[0], {**FLAT[0], "output": "\ud800"}])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


def test_a_file_may_replace_the_one_that_it_is_made_from(tmp_path):
    path = write(tmp_path / "a.jsonl", FLAT)
    with RowWriter(path) as writer:
        for row in open_rows(path):
            writer.write({"n": row.number})
    assert by_others(path) == [{"n": number} for number in range(1, len(FLAT) + 1)]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("a.jsonl", [{"a": 1}, {"a": float("nan")}], "row 2: no JSON can say it"),
        ("a.json", [{"a": datetime.date(2026, 1, 1)}], "row 1: no JSON can say it"),
        ("a.csv", [{"a": "x"}, {"a": "x", "b": "y"}], "row 2: the column 'b' is not in the first row"),
        ("a.csv", [{"a": ["x"]}], "row 1: 'a' is a list, expected text; write .jsonl"),
        ("a.csv", [{"a\ud800": "x"}], "row 1 has half a surrogate pair"),
        ("a.parquet", [{"a": "x"}, {"a": 1}], "rows 1 to 2: Parquet can't say them"),
        ("a.parquet", [{"a": 1 << 70}], "rows 1 to 1: Parquet can't say them"),
        ("a.parquet", [{"a": {}}], "rows 1 to 1: Parquet can't say them"),
    ],
)
def test_rows_that_a_form_can_not_say(tmp_path, name, rows, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path / name, rows)
    assert os.listdir(tmp_path) == []


def test_parquet_in_groups(tmp_path, monkeypatch):
    """What is null in the first group is text; what has no place in it is refused, not dropped."""
    monkeypatch.setattr(writers, "_GROUP_ROWS", 2)
    rows = [
        {"a": "x", "n": None, "t": [{"from": "gpt", "value": None}], "i": 1},
        {"a": "y", "n": None, "t": [], "i": None},
        {"i": 2, "a": None, "n": "text", "t": [{"from": "gpt", "value": "v"}]},
        {"a": "z", "n": None, "t": None, "i": 3},
        {"a": None, "n": None, "t": None, "i": None},
    ]
    path = write(tmp_path / "a.parquet", rows)
    assert pq.ParquetFile(path).num_row_groups == 3
    assert by_others(path) == [{key: row[key] for key in "anti"} for row in rows]
    for later in ({"b": "new"}, {"t": [{"from": "gpt", "value": "v", "weight": 0}]}, {"i": 1.5}, {"n": 3}):
        with pytest.raises(InputError, match=f"rows 3 to 4: .*{next(iter(later))}"):
            write(tmp_path / "b.parquet", [*rows[:2], {**rows[2], **later}, rows[3]])
    assert os.listdir(tmp_path) == ["a.parquet"]


def test_places_that_can_not_be_written_to(tmp_path):
    with pytest.raises(InputError, match=r"its ending is not known, expected \.json"):
        RowWriter(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"none.a\.json could not be written \(No such file or directory\)"):
        write(tmp_path / "none" / "a.json", FLAT)
    (tmp_path / "d.json").mkdir()
    with pytest.raises(InputError, match=r"d\.json could not be written"):
        write(tmp_path / "d.json", FLAT)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.parquet"])
def test_a_disk_that_is_full(tmp_path, monkeypatch, name):
    path = write(tmp_path / name, FLAT)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        InputError, match=r"could not be written \(No space left on device\): what was there is unchanged"
    ):
        write(path, FLAT[:1])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


def test_real_files_through_every_form(tmp_path, assets):
    """From the real set and the real conversations, by row_of and a file of each form, back to the same records."""
    korean = read_records(assets / "data/ko/ko_sharegpt_deepl_translate_cleaned_v2.json")
    spoken = read_records(assets / "data/en/fastchat_dummy_conversation.json")
    for records, name, ending in itertools.chain(
        itertools.product([korean], ["alpaca"], [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".jsonl.gz"]),
        itertools.product([spoken], ["sharegpt", "messages"], [".json", ".jsonl", ".parquet"]),
    ):
        path = write(tmp_path / f"a{ending}", [row_of(record, name) for record in records])
        assert detect_format(open_rows(path)).name == name
        assert read_records(path) == records
