"""A changed record goes back into its file's own columns and turns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jindo_core.data.formats import FORMATS, detect_format
from jindo_core.data.readers import Row, open_rows
from jindo_core.errors import InputError
from jindo_core.refinery.pipeline import map_texts
from jindo_core.refinery.writeback import require_writable, written_back

ROWS = {
    "alpaca": {"id": 3, "instruction": "q", "output": "a"},
    "koalpaca": {"instruction": "q", "input": None, "output": "a", "url": "u"},
    "orca": {"id": "x", "system_prompt": "s", "question": "q", "response": "a"},
    "self-instruct": {"prompt": "q", "completion": "a", "n": 1},
    "input-output": {"input": "q", "output": "a"},
    "qa": {"Q": "q", "A": "a", "label": "0"},
    "hh-rlhf": {"chosen": "c", "rejected": "r"},
    "text": {"text": "t"},
    "chip2": {"text": "<human>: q\n<bot>: a\n<human>: r\n<bot>: b", "metadata": "m"},
    "messages": {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                              {"role": "assistant", "content": "a", "weight": 1}]},
    "sharegpt": {"id": "x", "conversations": [{"from": "user", "value": "q"}, {"from": "ChatGPT", "value": "a"}]},
    "wizard": {"items": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
}  # fmt: skip


def upper(values, name):
    """What the row should be with every text that its format reads in capitals."""
    if name == "chip2":
        return {**values, "text": "<human>: Q\n<bot>: A\n<human>: R\n<bot>: B"}
    read = set("qas") | ({"t"} if name == "text" else {"c"} if name == "hh-rlhf" else set())

    def change(value):
        if isinstance(value, list):
            return [{k: (v.upper() if k in ("value", "content") else v) for k, v in turn.items()} for turn in value]
        return value.upper() if isinstance(value, str) and value in read else value

    return {key: change(value) for key, value in values.items()}


@pytest.mark.parametrize("name", ROWS)
def test_a_changed_record_goes_back_where_it_came_from(name):
    values, format = ROWS[name], FORMATS[name]
    require_writable(format)
    record = format.record(Row(1, "row 1", values))
    assert written_back(record, values, format) == values
    after = written_back(map_texts(record, str.upper), values, format)
    assert after == upper(values, name)
    assert list(after) == list(values)
    assert format.record(Row(1, "row 1", after)) == map_texts(record, str.upper)


def test_rounds_that_went_or_came_keep_the_files_words():
    system, last = {"from": "system", "value": "s"}, [{"from": "user", "value": "r"}, {"from": "bing", "value": "b"}]
    values = {"items": [system, {"from": "user", "value": "q", "id": 1}, {"from": "bing", "value": "a"}, *last]}
    format = FORMATS["sharegpt"]
    record = format.record(Row(1, "row 1", values))
    after = written_back(replace(record, rounds=record.rounds[1:]), values, format)
    assert after == {"items": [system, *last]}
    without = written_back(replace(record, system=""), values, format)
    assert [turn["value"] for turn in without["items"]] == ["q", "a", "r", "b"]


def test_a_system_column_beside_the_turns_stays_one():
    values = {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    format = FORMATS["sharegpt"]
    record = format.record(Row(1, "row 1", values))
    after = written_back(map_texts(record, str.upper), values, format)
    assert after["system"] == "S"
    assert [turn["value"] for turn in after["conversations"]] == ["Q", "A"]


def test_a_files_own_names_stay(tmp_path):
    (tmp_path / "a.csv").write_text("물음,답변\nq,a\n", encoding="utf-8")
    source = open_rows(tmp_path / "a.csv")
    format = detect_format(source, "alpaca:instruction=물음,output=답변")
    (row,) = source
    assert written_back(map_texts(format.record(row), str.upper), row.values, format) == {"물음": "Q", "답변": "A"}


def test_an_input_that_was_missing_comes_where_there_is_one_now():
    format, values = FORMATS["alpaca"], ROWS["alpaca"]
    record = format.record(Row(1, "row 1", values))
    assert written_back(replace(record, rounds=(replace(record.rounds[0], input="i"),)), values, format)["input"] == "i"


def test_what_a_format_cannot_say():
    for name in ("orca-dpo", "self-instruct-seeds"):
        with pytest.raises(InputError, match="can't be written back"):
            require_writable(FORMATS[name])
    record = FORMATS["chip2"].record(Row(1, "row 1", ROWS["chip2"]))
    with pytest.raises(InputError, match="a row of 2 rounds can't be written as alpaca"):
        written_back(record, {}, FORMATS["alpaca"])
    asked = FORMATS["alpaca"].record(Row(1, "row 1", ROWS["alpaca"]))
    with pytest.raises(InputError, match="a row with instruction can't be written as text"):
        written_back(asked, {"text": "t"}, FORMATS["text"])


def test_every_format_that_is_read_is_written_back_or_refused():
    refused = {"orca-dpo", "self-instruct-seeds"}
    for name, format in FORMATS.items():
        if name not in refused:
            require_writable(format)
