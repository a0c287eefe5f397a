"""What inspect says, held to counts made another way: of rows written here, and of the real sets."""

from __future__ import annotations

import csv
import json
from collections import Counter

import numpy as np
import pytest

from jindo_core.data.examples import Encoder
from jindo_core.data.formats import detect_format
from jindo_core.data.readers import open_rows
from jindo_core.data.records import read_records
from jindo_core.data.templates import load_template
from jindo_core.errors import InputError
from jindo_core.refinery.inspect import LIMITS, inspect
from jindo_core.tokenizer import load_tokenizer


def look(path, **more):
    source = open_rows(path)
    return inspect(source, detect_format(source), **more)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = [
    {"instruction": "수도가 어디인가요?", "input": "대한민국", "output": "서울입니다.", "id": 1},
    {"instruction": "수도가 어디인가요?", "input": "대한민국", "output": "서울입니다.", "id": 2},
    {"instruction": "수도가 어디인가요?", "input": "대한민국", "output": "서울이에요."},
    {"instruction": "Which city is it?", "input": "", "output": "서울입니다.\r\n"},
    {"instruction": "Name the longest river of the country.", "output": "It is the river that flows to the sea."},
]


def test_counts_of_rows_written_here(tmp_path):
    found = look(write(tmp_path / "rows.jsonl", ROWS))
    assert (found.rows, found.unreadable, found.format) == (5, 0, "alpaca")
    assert found.columns == {"instruction": 5, "output": 5, "input": 4, "id": 2}
    assert found.rounds == {1: 5}
    assert {name: lengths.count for name, lengths in found.characters.items()} == {
        "system": 0, "instruction": 5, "input": 3, "output": 5
    }  # fmt: skip
    assert found.characters["output"].longest == len(ROWS[4]["output"])
    assert found.row_characters.total == sum(len(row[name]) for row in ROWS for name in row if name != "id")
    assert found.repeated == {"rows": 1, "prompts": 2, "answers": 1}
    sample = found.sample
    assert (sample.rows, sample.of) == (5, 5)
    assert sample.languages["output"] == {"ko": 4, "en": 1}
    assert sample.languages["input"] == {"ko": 3}
    dirt = {counts.name: counts for counts in sample.dirt}
    assert dirt["line_ends"].changed == 1
    assert dirt["nfc"].changed == 0
    assert sample.tokens == {}
    told = json.loads(json.dumps(found.as_json()))
    assert told["files"] == [{"name": "rows.jsonl", "bytes": (tmp_path / "rows.jsonl").stat().st_size}]
    assert told["sample"]["languages"]["output"] == {"ko": 4, "en": 1}
    assert [step["name"] for step in told["sample"]["dirt"]].count("line_ends") == 1


def test_rows_that_can_not_be_read_are_counted_and_named(tmp_path):
    rows = [ROWS[0], {"instruction": "왜?", "output": 3}, ROWS[4], {"output": "no question"}]
    found = look(write(tmp_path / "rows.jsonl", rows))
    assert (found.rows, found.unreadable, found.sample.of) == (4, 2, 2)
    assert "row 2 (line 2)" in found.reasons[0]
    assert "'output' is the number 3, expected text" in found.reasons[0]
    assert "lacks 'instruction'" in found.reasons[1]
    assert found.row_characters.count == 2


def test_a_file_that_breaks_off_is_told_of_and_the_next_is_read(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:3] * 10)  # more than a format is detected by
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"instruction": \n')
    write(tmp_path / "b.jsonl", ROWS[3:])
    found = look(tmp_path)
    assert found.rows == 32
    assert found.sample.rows == 32
    assert len(found.broken) == 1
    assert "a.jsonl, line 31" in found.broken[0]


def test_a_sample_is_seeded_and_of_its_size(stories260k, tmp_path):
    rows = [{"instruction": f"질문 {i}", "output": "답" * (i + 1)} for i in range(200)]
    path = write(tmp_path / "rows.jsonl", rows)
    more = {"tokenizer": load_tokenizer(stories260k), "template": load_template("alpaca_short")}
    samples = [look(path, sample=20, seed=seed, **more).sample for seed in (1, 1, 2)]
    assert all(sample.rows == 20 and sample.of == 200 for sample in samples)
    first, again, other = (sample.tokens["output", "ko"].tokens for sample in samples)
    assert first == again != other


def test_tokens_are_the_tokenizer_s_and_the_encoder_s(stories260k, tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    tokenizer, template = load_tokenizer(stories260k), load_template("alpaca")
    sample = look(path, tokenizer=tokenizer, template=template).sample
    texts = {"instruction": [row["instruction"] for row in ROWS], "output": [row["output"] for row in ROWS]}
    for name, expected in texts.items():
        counts = [count for (field, _), count in sample.tokens.items() if field == name]
        assert sum(count.texts for count in counts) == len(expected)
        assert sum(count.characters for count in counts) == sum(map(len, expected))
        assert sum(count.tokens for count in counts) == sum(len(tokenizer.encode(text, bos=False)) for text in expected)
    encoder = Encoder(tokenizer, template, cutoff_len=1 << 20, train_on_inputs=True)
    lengths = [len(row.example.input_ids) for row in encoder.encode(read_records(path))]
    assert sample.row_tokens.total == sum(lengths)
    assert sample.row_tokens.longest == max(lengths)
    assert {limit: sample.row_tokens.above(limit) for limit in LIMITS} == {
        limit: sum(length > limit for length in lengths) for limit in LIMITS
    }


def test_rows_without_a_place_in_the_template_are_counted(stories260k, tmp_path):
    rows = [
        {"system_prompt": "Be brief.", "question": "Why?", "response": "Because."},
        {"system_prompt": "", "question": "When?", "response": "Now."},
    ]
    more = {"tokenizer": load_tokenizer(stories260k), "template": load_template("alpaca")}
    sample = look(write(tmp_path / "rows.jsonl", rows), **more).sample
    assert (sample.misfits, sample.row_tokens.count) == (1, 1)


def test_near_duplicates_without_the_equal_ones(tmp_path):
    text = "The quick brown fox jumps over the lazy dog near the quiet river bank at dawn every single day of the week"
    rows = [{"instruction": "Tell me something.", "output": text + end} for end in ("", "", ".", "!!", " x")]
    rows += [{"instruction": "Count.", "output": " ".join(letter * n for n in range(1, 9))} for letter in "abcde"]
    found = look(write(tmp_path / "rows.jsonl", rows))
    assert found.repeated["rows"] == 1
    assert (found.sample.near_rows, found.sample.near) == (10, 3)


def test_steps_for_korean_are_silent_about_english(tmp_path):
    answer = "It is the number that follows {}, counted from the first."
    rows = [{"instruction": f"What is {i}?", "output": answer.format(i - 1)} for i in range(30)]
    assert "hangul_ratio" not in {counts.name for counts in look(write(tmp_path / "en.jsonl", rows)).sample.dirt}
    korean = [{"instruction": "무엇인가요?", "output": "그것은 숫자입니다."} for _ in range(5)]
    dirt = {counts.name: counts for counts in look(write(tmp_path / "ko.jsonl", rows + korean)).sample.dirt}
    assert dirt["hangul_ratio"].rejected == 30


def test_progress_goes_to_the_end(tmp_path):
    seen = []
    path = write(tmp_path / "rows.jsonl", ROWS * 200)
    look(path, sample=10, on_progress=lambda done, whole: seen.append((done, whole)))
    assert {whole for _, whole in seen} == {2 * path.stat().st_size}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] > 1.5 * path.stat().st_size


# --- the real sets -----------------------------------------------------------------------------------------


def test_the_real_korean_set(assets):
    path = assets / "data/ko/ko_sharegpt_deepl_translate_cleaned_v2.json"
    rows = json.loads(path.read_text())
    found = look(path)
    assert (found.rows, found.unreadable, found.format) == (len(rows), 0, "alpaca")
    assert found.columns == Counter(name for row in rows for name in row)
    for name in ("instruction", "input", "output"):
        lengths = np.array([len(row[name]) for row in rows if row[name]])
        told = found.characters[name].as_json()
        assert told["count"] == len(lengths)
        assert told["mean"] == pytest.approx(lengths.mean(), abs=0.01)
        assert told["max"] == lengths.max()
        for percent in (5, 50, 95, 99):
            assert told[f"p{percent}"] == int(np.percentile(lengths, percent, method="inverted_cdf"))
    assert found.repeated["answers"] == len(rows) - len({row["output"] for row in rows})
    dirt = {counts.name: counts for counts in found.sample.dirt}
    names = ("instruction", "input", "output")
    assert dirt["line_ends"].changed == sum(any("\r" in row[name] for name in names) for row in rows)
    assert dirt["rendered_text"].changed == 987
    languages = found.sample.languages
    assert languages["instruction"] == {"en": 987}
    assert languages["output"]["ko"] > 960
    assert languages["input"]["en"] > 900


def test_the_korean_questions_and_answers(assets):
    path = assets / "data/ko/ChatbotData.csv"
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    found = look(path, sample=2000)
    assert (found.rows, found.format) == (len(rows), "qa")
    assert found.repeated == {
        "rows": len(rows) - len({(row["Q"], row["A"]) for row in rows}),
        "prompts": len(rows) - len({row["Q"] for row in rows}),
        "answers": len(rows) - len({row["A"] for row in rows}),
    }
    assert found.characters["output"].total == sum(len(row["A"]) for row in rows)
    assert found.sample.rows == 2000
    assert found.sample.languages["output"]["ko"] > 1990


def test_the_conversations_of_fastchat(assets):
    path = assets / "data/en/fastchat_dummy_conversation.json"
    rows = json.loads(path.read_text())
    found = look(path)
    assert found.format == "sharegpt"
    assert found.rounds == Counter(len(row["conversations"]) // 2 for row in rows)
    turns = [turn for row in rows for turn in row["conversations"]]
    assert found.characters["output"].total == sum(len(turn["value"]) for turn in turns if turn["from"] == "gpt")
    assert found.characters["instruction"].count == sum(turn["from"] == "human" for turn in turns)


def test_a_format_that_is_not_known_is_an_error(tmp_path):
    with pytest.raises(InputError, match="its keys are 'a', 'b'"):
        look(write(tmp_path / "x.jsonl", [{"a": 1, "b": 2}]))
