"""Raw rows: every form read as an independent reader reads it, bad files refused to the line, memory bounded."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jindo_core.data import readers
from jindo_core.data.readers import open_rows
from jindo_core.errors import InputError

ROWS = [
    {"instruction": "수도는?", "input": "", "output": "서울"},
    {"instruction": "줄\n둘", "input": 'quote "한 번", comma', "output": "tab\tU+2028 \u2028 끝\r\n둘"},
    {"instruction": "😀", "input": "a", "output": "b"},
]


def write_rows(path, rows=ROWS):
    """Each form by another writer than ours."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return path
    if name.endswith((".csv", ".tsv")):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if name.endswith("tsv") else ",")
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
    elif name.endswith(".json"):
        data = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    else:
        data = "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


FORMS = ["a.json", "a.jsonl", "a.ndjson", "a.csv", "a.tsv", "a.parquet", "A.CSV"]
PACKED = ["a.json.gz", "a.jsonl.gz", "a.csv.gz", "a.tsv.gz"]


@pytest.mark.parametrize("name", FORMS + PACKED)
def test_every_form(tmp_path, name):
    source = open_rows(write_rows(tmp_path / name))
    rows = list(source)
    assert [row.values for row in rows] == ROWS
    assert [row.number for row in rows] == [1, 2, 3]
    assert list(source) == rows, "a second reading begins anew"
    assert source.columns() == ("instruction", "input", "output")
    assert source.bytes_read <= source.size_bytes == (tmp_path / name).stat().st_size
    list(source)
    assert source.bytes_read == source.size_bytes


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_tables_say_the_line_that_a_row_starts_in(tmp_path, name):
    # The first line names the columns; the second row holds two newlines within quotes.
    assert [row.where for row in open_rows(write_rows(tmp_path / name))] == [
        "row 1 (line 2)", "row 2 (line 3)", "row 3 (line 6)",
    ]  # fmt: skip


@pytest.mark.parametrize("chunk", [3, 4, 5, 7, 17, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_the_same_however_it_is_cut(tmp_path, monkeypatch, chunk, indent):
    """Stretches cut in strings, escapes, numbers, literals and between the bytes of a character."""
    rows = [
        {"text": '따옴표 " 역슬래시 \\ 😀 \n', "n": -12.5e-3, "t": True, "f": False, "z": None},
        {"text": "\ud83d\ude00 \x00", "deep": [[{"a": {}}], []], "": 123456789012345678901234567890},
        {},
    ]
    for ascii_only in (True, False):
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
        if not ascii_only:
            text = json.dumps([rows[0], rows[2]], ensure_ascii=False, indent=indent).encode()
        path = tmp_path / "a.json"
        path.write_bytes(b"\xef\xbb\xbf \r\n" + text + b"\n ")
        monkeypatch.setattr(readers, "_CHUNK", chunk)
        assert [row.values for row in open_rows(path)] == json.loads(text)


BAD_LISTS = [
    ('[{"a": 1}', "column 10"), ('[{"a": 1} {"a": 2}]', "column 11"), ('[{"a": 1}]x', "column 11"),
    ('[{"a": 1},]', "column 11"),
    ('[{"a": tru}]', "column 8"), ('[{"a": "x\n"}]', "line 1, column 10"), ('[{"a": "\\x"}]', "column 9"),
    ('[\n\n  {"가": 1},\n {"a" 2}]', "line 4, column 7"), ('[{"a": 1}, {"a": "no end', "column 18"), ("[", "column 2"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "where"), BAD_LISTS)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_a_broken_list_says_what_and_where_json_does(tmp_path, monkeypatch, text, where, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(text, newline="")
    with pytest.raises(InputError, match=where) as caught:
        list(open_rows(path))
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    if text not in ('[{"a": 1}', "["):  # at the very end json names another token than we do, in the same place
        assert f"({expected.value.msg})" in str(caught.value)
    assert f"line {expected.value.lineno}, column {expected.value.colno}" in str(caught.value)


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(), max_size=3), min_size=1, max_size=5), st.integers(1, 50)
)
def test_any_rows_come_back_from_a_list(tmp_path_factory, rows, chunk):
    path = tmp_path_factory.mktemp("any") / "a.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK", chunk)
        assert [row.values for row in open_rows(path)] == rows


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv"])
@pytest.mark.parametrize("chunk", [3, 1 << 18])
def test_another_encoding_is_named_to_the_byte(tmp_path, monkeypatch, mark, name, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    before = {"a.json": '[{"가": "나"}, {"가": "', "a.jsonl": '{"가": "나"}\n{"가": "'}.get(
        name, "가,나\n다,라\n".replace(",", "\t" if name == "a.tsv" else ",")
    ).encode()
    data = mark + before + "한글".encode("cp949")
    (tmp_path / name).write_bytes(data)
    offset = len(mark + before)
    with pytest.raises(InputError, match=rf"byte {offset} is 0x{data[offset]:02x}; save it as UTF-8 .*iconv -f cp949"):
        list(open_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}', r"row 2 \(line 2\): the key 'a' is there twice"),
        ("a.json", '[{"a": 1}, {"b": [{"a": 1, "a": 2}]}]', "row 2, line 1: the key 'a' is there twice"),
        ("a.jsonl", '{"a": Infinity}', r"row 1 \(line 1\): Infinity is no number of JSON"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"row 1 \(line 1\): Exceeds the limit"),
        ("a.csv", "", "is empty"),
        ("a.csv", "\n\n", "is empty"),
        ("a.csv", "Q,A\n", "has no rows"),
        ("a.csv", "Q,A,Q\n1,2,3\n", "line 1: the column 'Q' is there twice"),
        ("a.csv", "Q,A\n1,2\n\n3\n", r"row 2 \(line 4\) has 1 cells, expected 2"),
        ("a.csv", "Q,A\n1,2,3\n", r"row 1 \(line 2\) has 3 cells, expected 2"),
        ("a.csv", 'Q,A\n1,2\n3,"4\n5,6\n', "row that starts in line 3: broken CSV .unexpected end of data"),
        ("a.tsv", 'Q\tA\n1\t"2" x\n', "row that starts in line 2: broken TSV"),
        ("a.csv", "Q,A\r1,2\r", "broken CSV .new-line character"),
        ("a.json.gz", b"no gzip", "is no whole gzip file"),
        ("a.json.gz", gzip.compress(json.dumps(ROWS * 50).encode())[:-20], "is no whole gzip file"),
        ("a.parquet", b"PAR1 and no more", "is no Parquet file that can be read"),
        ("a.parquet", b"", "is no Parquet file that can be read"),
        ("a.json", b"PAR1....", "is a Parquet file, which its name does not say: rename it to .parquet"),
        ("a.csv", b"PAR1....", "is a Parquet file"),
        ("a.jsonl", gzip.compress(b'{"a": 1}'), "is a file that gzip compressed, .* add .gz to its name"),
        ("a.parquet", gzip.compress(b"PAR1"), "is a file that gzip compressed, .* gunzip it"),
        ("a.csv", b"PK\x03\x04...", "is a zip archive, as .xlsx is one"),
        ("a.json", '[{"a": 1}]'.encode("utf-16"), r"is UTF-16, .*iconv -f utf-16 -t utf-8"),
        ("a.csv", "Q,A\n1,2\n".encode("utf-16-le"), "is UTF-16"),
        ("a.parquet", '{"a": 1}\n', "is JSON, which its name does not say: rename it to .json or .jsonl"),
        ("a.csv", '[{"a": 1}]', "is JSON"),
        ("a.json", "instruction,output\n1,2\n", "is a table and no JSON"),
        ("a.json", '{\n  "data": [{"a": 1}]\n}', r"line 1: one object over several lines, .*jq -c '\.data\[\]'"),
        ("a.jsonl", '{"a": 1}\n{"a": 1\n{"a": 1}\n', "line 2, column 8: broken JSON"),
        ("a.jsonl", '{"a": 1\n', "line 1, column 8: broken JSON"),
        ("a.jsonl", b"\x01\xff,\x93\n", "is no UTF-8: byte 1 is 0xff"),
        ("a.csv", "Q;A\n1;2\n", "its first line has ';' between the names, expected commas in .csv"),
        ("a.csv", "Q\tA\n1\t2\n", "its first line has tabs .* or rename it to .tsv"),
        ("a.tsv", "Q,A\n1,2\n", "its first line has commas .*expected tabs in .tsv, or rename it to .csv"),
        ("a.txt", "text", "its ending is not known, expected .json, .jsonl"),
        ("a.parquet.gz", b"", "its ending is not known"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        list(open_rows(path))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_broken_within_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.parquet", [{"text": f"{number} " * 50} for number in range(2000)])
    data = bytearray(path.read_bytes())
    data[2000:4000] = os.urandom(1) * 2000
    path.write_bytes(data)
    with pytest.raises(InputError, match="is no Parquet file that can be read"):
        list(open_rows(path))


def test_what_is_null_or_no_number(tmp_path):
    """pandas writes NaN where a value is missing: None. Text in CSV stays text."""
    (tmp_path / "a.jsonl").write_text('{"a": NaN, "b": null, "c": 1.5}')
    pq.write_table(
        pa.table({"a": [float("nan")], "b": pa.array([None], pa.string()), "c": [1.5]}), tmp_path / "a.parquet"
    )
    for name in ("a.jsonl", "a.parquet"):
        assert next(iter(open_rows(tmp_path / name))).values == {"a": None, "b": None, "c": 1.5}
    (tmp_path / "a.csv").write_text("a,b,c\nNaN,,1.50\n")
    assert next(iter(open_rows(tmp_path / "a.csv"))).values == {"a": "NaN", "b": "", "c": "1.50"}


def test_a_cell_and_a_row_beyond_the_limit(tmp_path, monkeypatch):
    long = "가" * 200_000  # more than the csv module takes by itself
    (tmp_path / "a.csv").write_text(f"Q,A\n{long},b\n", encoding="utf-8")
    assert next(iter(open_rows(tmp_path / "a.csv"))).values["Q"] == long
    monkeypatch.setattr(readers, "LONGEST_ROW", 1 << 20)
    for name, text in {
        "a.jsonl": '{"a": 1}\n{"a": "' + "x" * (1 << 20) + '"}',
        "a.json": '[{"a": 1},\n{"a": "' + "x" * (2 << 20) + '"}]',
        "b.csv": 'Q\n"' + "x" * (1 << 20),
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="line 2: a row of more than 1 MiB"):
            list(open_rows(tmp_path / name))


# --- several files ---------------------------------------------------------------------------------------


def test_a_folder_is_its_data_files_by_name(tmp_path):
    for name in ("b.jsonl", "a.csv", "c.parquet", "d.json.gz"):
        write_rows(tmp_path / name)
    for name in ("README.md", "dataset_infos.json", ".hidden.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "z.json").mkdir()
    source = open_rows(tmp_path)
    assert [path.name for path in source.paths] == ["a.csv", "b.jsonl", "c.parquet", "d.json.gz"]
    assert [path.name for path in source.passed_over] == [".hidden.json", "README.md", "dataset_infos.json", "z.json"]
    rows = list(source)
    assert [row.values for row in rows] == ROWS * 4
    assert [row.number for row in rows] == [1, 2, 3] * 4
    assert rows[5].place == f"{tmp_path / 'b.jsonl'}, row 3 (line 3)"
    assert source.bytes_read == source.size_bytes == sum(path.stat().st_size for path in source.paths)


def test_a_folder_without_data_and_a_pattern(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"is a folder that holds no data file: expected \.json"):
        open_rows(tmp_path)
    for name in ("train-1.jsonl", "train-0.jsonl", "test-0.jsonl"):
        write_rows(tmp_path / name)
    found = open_rows(tmp_path / "train-*.jsonl")
    assert [path.name for path in found.paths] == ["train-0.jsonl", "train-1.jsonl"]
    with pytest.raises(InputError, match="no file matches this pattern"):
        open_rows(tmp_path / "valid-*.jsonl")


def test_paths_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="is no plain file"):
        open_rows(tmp_path / "pipe.jsonl")
    for name in ("none.json", "data/none.jsonl", "owner/name.csv", "a" * 300):
        with pytest.raises(InputError, match="does not exist: expected a file"):
            open_rows(name)


def test_a_digest_is_of_what_is_read(tmp_path):
    first, same = write_rows(tmp_path / "a.jsonl"), write_rows(tmp_path / "b.jsonl")
    digest = open_rows(first).digest()
    assert digest == open_rows(same).digest() == open_rows(str(first)).digest()
    assert len(digest) == 64
    same.write_bytes(same.read_bytes() + b"\n")
    assert digest != open_rows(same).digest()
    (tmp_path / "a.json").write_bytes(first.read_bytes())
    assert digest != open_rows(tmp_path / "a.json").digest(), "read another way, other rows"
    assert len({open_rows(tmp_path).digest(), digest}) == 2


# --- memory ----------------------------------------------------------------------------------------------

_GROWTH = """
import resource, sys
from jindo_core.data.readers import open_rows
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))) / 1024
for _ in open_rows(sys.argv[1]): pass
before, count = peak(), 0
source = open_rows(sys.argv[2])
for row in source: count += 1
source.digest()
print(peak() - before, count)
"""


def grown(folder, ending, megabytes):
    """MiB by which a process grows that reads a file of so many; the rows that it read, and those that are there."""
    row = {"instruction": "질문 " * 100, "input": "", "output": "긴 대답\n" * 150}
    small = write_rows(folder / f"small{ending}", [row])
    path = folder / f"big{ending}"
    count = megabytes * (1 << 20) // len(json.dumps(row, ensure_ascii=False).encode())
    if ending == ".parquet":
        texts = pa.table({name: [text] * 10_000 for name, text in row.items()})
        with pq.ParquetWriter(path, texts.schema, use_dictionary=False, compression="none") as writer:
            for _ in range(-(-count // 10_000)):
                writer.write_table(texts)
        count = -(-count // 10_000) * 10_000
    else:
        data = small.read_bytes()
        head, body = (data.split(b"\n", 1)) if ending == ".csv" else (b"", data.strip(b"[]"))
        with path.open("wb") as file:
            if ending == ".csv":
                file.write(head + b"\n" + body * count)
            else:
                file.write(b"[" * (ending == ".json") + (body + (b",\n" if ending == ".json" else b"\n")) * (count - 1))
                file.write(body + b"]" * (ending == ".json"))
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH, str(small), str(path)], capture_output=True, text=True, check=True
    )
    path.unlink()
    growth, read = done.stdout.split()
    return float(growth), int(read), count


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    growth, read, count = grown(tmp_path, ending, 100)
    assert read == count
    assert growth < 50


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
def test_memory_does_not_grow_with_a_larger_file(tmp_path, ending):
    growth, read, count = grown(tmp_path, ending, 1000)
    assert read == count
    assert growth < 50


# --- real files ------------------------------------------------------------------------------------------


def test_real_files_as_other_readers_read_them(assets):
    counts = {}
    for path in sorted((assets / "data").rglob("*.*")):
        if path.suffix == ".json" and not path.name.startswith("zero_shot"):
            expected = json.loads(path.read_text("utf-8"))
        elif path.suffix in (".json", ".jsonl"):
            expected = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
        elif path.suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8", newline="") as file:
                expected = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        else:
            continue
        assert [row.values for row in open_rows(path)] == expected, path.name
        counts[path.name] = len(expected)
    assert len(counts) == 18
    assert counts["ChatbotData.csv"] == 11_823
    assert counts["fastchat_dummy_conversation.json"] == 500
