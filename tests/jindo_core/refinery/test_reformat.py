"""`data convert`: every row comes out, or is put aside with the reason; the file is whole or not there."""

from __future__ import annotations

import csv
import json

import pyarrow.parquet as pq
import pytest

from jindo_core.data.records import Record, Round, read_records
from jindo_core.data_config_inspect import DataConvertConfig
from jindo_core.errors import InputError
from jindo_core.refinery.reformat import run_convert

ALPACA = [
    {"instruction": "대답하세요.", "input": "1 + 1", "output": "2", "id": "a"},
    {"instruction": "쓰세요.", "input": "", "output": "네,\n\"그래요\".", "id": "b"},
]
CHATS = [
    {"id": "x", "conversations": [
        {"from": "system", "value": "짧게."}, {"from": "human", "value": "안녕?"}, {"from": "gpt", "value": "네."},
        {"from": "human", "value": "잘 지내?"}, {"from": "gpt", "value": "그럼요."}, {"from": "human", "value": "또?"},
    ]},
    {"id": "y", "conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]},
    {"id": "z", "conversations": [{"from": "human", "value": "A"}, {"from": "human", "value": "B"}]},
]  # fmt: skip


def write(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def convert(source, output, to, **more):
    return run_convert(DataConvertConfig(data_path=str(source), output_path=str(output), to=to, **more))


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("to", ["alpaca", "koalpaca"])
def test_alpaca_to_its_like_in_every_kind_of_file(tmp_path, capsys, to, ending):
    source, output = write(tmp_path / "a.json", ALPACA), tmp_path / f"o.{ending}"
    counts = convert(source, output, to)
    assert (counts.rows_in, counts.rows_out, counts.rejected, counts.made) == (2, 2, 0, 0)
    assert [record.rounds for record in read_records(output)] == [record.rounds for record in read_records(source)]
    assert counts.left_behind == {"id": 2}
    assert "columns left behind: id (2)" in capsys.readouterr().out


def test_columns_can_come_along(tmp_path):
    counts = convert(write(tmp_path / "a.json", ALPACA), tmp_path / "o.jsonl", "sharegpt", keep_columns=True)
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b"]
    assert rows[0]["conversations"][0] == {"from": "human", "value": "대답하세요.\n\n1 + 1"}
    assert not counts.left_behind
    # What bears a name of the target's own is left behind, and said to be.
    odd = [{"question": "왜?", "response": "글쎄요.", "output": "다른 것"}]
    counts = convert(write(tmp_path / "b.json", odd), tmp_path / "p.jsonl", "alpaca", keep_columns=True)
    assert json.loads((tmp_path / "p.jsonl").read_text()) == {"instruction": "왜?", "input": "", "output": "글쎄요."}
    assert counts.left_behind == {"output": 1}


def test_conversations_split_cut_or_refused(tmp_path, capsys):
    source, aside = write(tmp_path / "c.json", CHATS), tmp_path / "rejected.jsonl"
    more = {"rejected_path": str(aside), "overwrite": True}
    counts = convert(source, tmp_path / "o.jsonl", "orca", rounds="split", **more)
    assert (counts.rows_in, counts.made, counts.rows_out, counts.rejected) == (3, 1, 3, 1)
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [(row["system_prompt"], row["question"], row["response"]) for row in rows] == [
        ("짧게.", "안녕?", "네."), ("짧게.", "잘 지내?", "그럼요."), ("", "A", "B")
    ]  # fmt: skip
    assert counts.turns_dropped == 1
    said = capsys.readouterr().out
    assert "1 made by splitting conversations, 1 rejected, 1 turns without answer or question dropped" in said
    told = json.loads(aside.read_text())
    assert (told["row"], told["values"]) == (3, CHATS[2])
    assert "turn 2 is the user's, expected the assistant's" in told["reason"]
    counts = convert(source, tmp_path / "o.jsonl", "orca", rounds="first", **more)
    assert (counts.rows_out, counts.rejected, counts.rounds_dropped) == (2, 1, 1)
    counts = convert(source, tmp_path / "o.jsonl", "orca", **more)
    assert (counts.rows_out, counts.rejected) == (1, 2)
    assert "row 1 has 2 rounds, and orca has room for one" in json.loads(aside.read_text().splitlines()[0])["reason"]


def test_there_and_back_again(assets, tmp_path):
    """FastChat's conversations as messages in Parquet and back: the same turns, the same ids."""
    source = assets / "data/en/fastchat_dummy_conversation.json"
    convert(source, tmp_path / "m.parquet", "messages", keep_columns=True)
    assert pq.read_table(tmp_path / "m.parquet").num_rows == 500
    convert(tmp_path / "m.parquet", tmp_path / "back.json", "sharegpt", keep_columns=True)
    assert json.loads((tmp_path / "back.json").read_text()) == json.loads(source.read_text())


def test_the_korean_questions_as_alpaca(assets, tmp_path):
    source = assets / "data/ko/ChatbotData.csv"
    convert(source, tmp_path / "o.jsonl", "alpaca")
    with open(source, encoding="utf-8-sig", newline="") as file:
        expected = [(row["Q"], row["A"]) for row in csv.DictReader(file)]
    assert [(r.instruction, r.output) for r in read_records(tmp_path / "o.jsonl")] == expected


def test_a_row_that_does_not_fit_ends_it_and_nothing_is_written(tmp_path):
    source, output = write(tmp_path / "c.json", CHATS), tmp_path / "o.jsonl"
    output.write_text("old")
    with pytest.raises(InputError, match=r"row 1 has 2 rounds.*\(--rejected_path FILE puts such rows aside\)"):
        convert(source, output, "alpaca", overwrite=True)
    assert output.read_text() == "old"
    bad = write(tmp_path / "d.json", CHATS[:1])
    with pytest.raises(InputError, match="none of 1 rows can be written as qa"):
        convert(bad, output, "qa", overwrite=True, rejected_path=str(tmp_path / "r.jsonl"))
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "d.json", "o.jsonl"]


def test_an_id_stays_and_a_rejected_row_drops_nothing(tmp_path):
    source = write(tmp_path / "a.json", ALPACA)
    convert(source, tmp_path / "o.jsonl", "sharegpt")
    assert [json.loads(line)["id"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == ["a", "b"]
    # The first has a system message, a second round and an open question; qa has room for none of them.
    counts = convert(
        write(tmp_path / "c.json", CHATS), tmp_path / "q.jsonl", "qa", rounds="first",
        rejected_path=str(tmp_path / "r.jsonl"),
    )  # fmt: skip
    assert (counts.rows_out, counts.rejected, counts.rounds_dropped, counts.turns_dropped) == (1, 2, 0, 0)


def test_a_system_message_survives_in_messages(tmp_path):
    convert(write(tmp_path / "c.json", CHATS[:2]), tmp_path / "o.jsonl", "messages")
    first = read_records(tmp_path / "o.jsonl")[0]
    assert first == Record((Round("안녕?", "", "네."), Round("잘 지내?", "", "그럼요.")), "짧게.", row=1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"to": "sharegtp"}, r"--to: got 'sharegtp', expected one of alpaca, .* Did you mean 'sharegpt'\?"),
        ({"to": "alpaca", "output_path": "{}/o.xlsx"}, "expected a name that ends in .json or"),
        ({"to": "alpaca", "output_path": "{}/no/o.csv"}, "no is no folder: make it"),
        ({"to": "alpaca", "output_path": "{}/a.json"}, "is there already: give another name, or --overwrite"),
        ({"to": "alpaca", "rejected_path": "{}/o.jsonl"}, "which is --output_path too"),
        ({"to": "alpaca", "rejected_path": "{}/b.json"}, "--rejected_path: .* is there already"),
        ({"to": "alpaca", "rejected_path": "{}/r.csv"}, "--rejected_path: .*ends in .jsonl or .json"),
        ({"to": "alpaca", "output_path": "{}/a.json", "overwrite": True}, "which is --data_path too"),
        ({"to": "alpaca", "rejected_path": "{}/./a.json", "overwrite": True}, "which is --data_path too"),
        ({"to": "alpaca", "data_path": "{}/*.json", "output_path": "{}/b.json", "overwrite": True}, "lies in --data"),
        ({"to": "alpaca", "data_path": "{}", "overwrite": True}, "lies in --data_path"),
    ],
)
def test_what_can_not_be(tmp_path, more, message):
    write(tmp_path / "a.json", ALPACA)
    write(tmp_path / "b.json", ALPACA)
    given = {"data_path": "{}/a.json", "output_path": "{}/o.jsonl", **more}
    with pytest.raises(InputError, match=message):
        run_convert(DataConvertConfig(**{k: v if v is True else v.format(tmp_path) for k, v in given.items()}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
