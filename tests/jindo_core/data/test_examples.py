"""Ids and labels against alpaca-lora's own steps on transformers; batches by their properties."""

from __future__ import annotations

import pytest
import torch

from jindo_core.data.examples import Encoder, Example, Losses, collate, encode_all, report
from jindo_core.data.records import Record, Round, bundled_path, read_records
from jindo_core.data.templates import load_template

CUTOFFS = [1, 2, 7, 16, 40, 256]


def alpaca_lora(tokenize, eos, template, record, cutoff_len, train_on_inputs):
    """What its training script does with a row; `tokenize` gives ids as its tokenizer call does."""
    full = template.prompt(record.instruction, record.input) + record.output
    ids = tokenize(full, cutoff_len)
    if ids[-1] != eos and len(ids) < cutoff_len:
        ids = [*ids, eos]
    labels = list(ids)
    if not train_on_inputs:
        prompt = len(tokenize(template.prompt(record.instruction, record.input), cutoff_len))
        labels = [-100] * prompt + labels[prompt:]
    return ids, labels


def encode_example(tokenizer, template, record, **settings):
    return Encoder(tokenizer, template, **settings).lay_out([record])[0].example


@pytest.fixture(scope="module")
def smollm2_calls(smollm2_peer):
    def tokenize(text, cutoff_len):
        return smollm2_peer(text, truncation=True, max_length=cutoff_len, padding=False).input_ids

    return tokenize


@pytest.fixture(scope="module")
def llama_calls(stories15m):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(stories15m / "tokenizer.model"))
    return lambda text, cutoff_len: [1, *processor.encode(text)][:cutoff_len]


@pytest.fixture(scope="module")
def rows(assets):
    real = read_records(assets / "data/ko/ko_sharegpt_deepl_translate_cleaned_v2.json")
    odd = [Record.single("질문"), Record.single(""), Record.single("{input}", "{instruction}", "x")]
    odd.append(Record.single("인용", "", "'말'"))
    return odd + read_records(bundled_path())[:25] + real[:10]


@pytest.mark.parametrize("train_on_inputs", [True, False])
@pytest.mark.parametrize("name", ["alpaca", "alpaca_legacy", "korean_short"])
@pytest.mark.parametrize("kind", ["smollm2", "llama"])
def test_rows_are_alpaca_loras(kind, name, train_on_inputs, rows, request):
    tokenizer = request.getfixturevalue(kind)
    calls = request.getfixturevalue(kind + "_calls")
    template = load_template(name)
    for record in rows:
        for cutoff in CUTOFFS:
            expected = alpaca_lora(calls, tokenizer.eos_id, template, record, cutoff, train_on_inputs)
            example = encode_example(tokenizer, template, record, cutoff_len=cutoff, train_on_inputs=train_on_inputs)
            assert (example.input_ids, example.labels) == expected
            assert len(example.labels) == len(example.input_ids) <= cutoff


def test_eos_is_supervised_where_it_fits_and_never_twice(smollm2):
    template = load_template("korean_short")
    record = Record.single("수도는?", "", "서울", 1)
    whole = encode_example(smollm2, template, record, cutoff_len=256, train_on_inputs=False)
    length = len(whole.input_ids)
    assert whole.input_ids[-1] == whole.labels[-1] == smollm2.eos_id
    assert smollm2.decode([i for i in whole.labels if i != -100]) == "서울"
    cut = encode_example(smollm2, template, record, cutoff_len=length - 1, train_on_inputs=False)
    assert cut.input_ids == whole.input_ids[:-1]
    told = Record.single("수도는?", "", "서울<|im_end|>", 1)  # text, not the token: EOS still comes behind it
    ids = encode_example(smollm2, template, told, cutoff_len=256, train_on_inputs=False).input_ids
    assert ids.count(smollm2.eos_id) == 1
    assert smollm2.decode(ids) == "수도는?\n→서울<|im_end|>"


def test_a_tokenizer_without_eos(smollm2, monkeypatch):
    monkeypatch.setattr(smollm2, "eos_id", None)
    record = Record.single("a", "", "b", 1)
    example = encode_example(smollm2, load_template("korean_short"), record, cutoff_len=9, train_on_inputs=True)
    assert example.input_ids == smollm2.encode("a\n→b")


def test_korean_short_is_two_tokens_a_prompt(smollm2):
    """And its end never melts into the answer, so that the model is asked as it was taught."""
    template = load_template("korean_short")
    for record in read_records(bundled_path()):
        prompt = smollm2.encode(template.prompt(record.instruction, record.input))
        whole = smollm2.encode(template.prompt(record.instruction, record.input) + record.output)
        assert whole[: len(prompt)] == prompt
        if not record.input:
            assert len(prompt) == len(smollm2.encode(record.instruction)) + 2


def test_rows_with_nothing_to_learn_are_left_out(smollm2):
    template = load_template("korean_short")
    records = [
        Record.single("짧다", "", "네", 4),
        Record.single("아주 긴 질문입니다 " * 9, "", "네", 5),
        Record.single("a", "", "긴 답 " * 20, 6),
    ]
    examples, warnings = encode_all(records, smollm2, template, cutoff_len=24, train_on_inputs=False)
    assert len(examples) == 2
    assert all(any(label != -100 for label in example.labels[1:]) for example in examples)
    assert len(warnings) == 2
    assert warnings[0].startswith("1 row (5) of 3 left out: the prompt alone fills cutoff_len 24")
    assert warnings[1].startswith("1 row (6) of 3 cut at cutoff_len 24")
    examples, warnings = encode_all(records, smollm2, template, cutoff_len=1, train_on_inputs=True)
    assert examples == []  # one token predicts nothing
    assert warnings[0].startswith("3 rows (4, 5, 6) of 3 left out")
    # A row of one token: no length would help.
    empty = [Record.single("", "", "", 7), *records[:1]]
    _, warnings = encode_all(empty, smollm2, template, cutoff_len=256, train_on_inputs=True)
    assert warnings == []
    formatted = [Record((Round("", "", ""),), formatted=True, row=7)]
    _, warnings = encode_all(formatted, smollm2, template, cutoff_len=256, train_on_inputs=True)
    assert warnings == ["1 row (7) of 1 left out: nothing to learn, whatever their length"]


def test_a_prompt_cut_apart_is_no_answer_cut(llama):
    """qlora's two lengths: each side has its own report, and a shortened prompt leaves answer and EOS whole."""
    encoder = Encoder(
        llama, load_template("alpaca_short"), cutoff_len=9, train_on_inputs=False, source_max_len=20, target_max_len=6
    )
    records = [
        Record.single("가 " * 30, "", "나", 1), Record.single("q", "", "나 " * 30, 2),
        Record.single("가 " * 30, "", "나 " * 30, 3), Record.single("q", "", "나", 4),
    ]  # fmt: skip
    found = encoder.encode(records)
    assert [(row.shortened, row.cut) for row in found] == [(True, False), (False, True), (True, True), (False, False)]
    assert [row.example.labels[-1] == llama.eos_id for row in found] == [True, False, False, True]
    assert report(4, Losses([], [], [2, 3], [1, 3]), encoder.limit) == [
        "2 rows (2, 3) of 4 cut at source_max_len 20 and target_max_len 6: their end and EOS are not learned",
        "2 rows (1, 3) of 4 have a shortened prompt (source_max_len 20 and target_max_len 6): its end is cut off, the "
        "answer follows",
    ]


def test_warnings_stay_short(smollm2):
    records = [Record.single("질문", "", "답", row) for row in range(1, 10)]
    _, warnings = encode_all(records, smollm2, load_template("alpaca"), cutoff_len=8, train_on_inputs=False)
    assert warnings[0].startswith("9 rows (1, 2, 3, 4, 5, …) of 9 left out")
    assert encode_all([], smollm2, load_template("alpaca"), cutoff_len=8, train_on_inputs=False) == ([], [])


# --- collate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("multiple", "width"), [(8, 16), (1, 9), (3, 9)])
def test_collate_pads_on_the_right_by_length(multiple, width):
    # The first holds the pad id itself: padding is known by length, never by value.
    examples = [Example([2, 5, 2], [-100, 5, 2]), Example(list(range(10, 19)), list(range(10, 19)))]
    batch = collate(examples, 2, multiple_of=multiple)
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}
    for tensor in batch.values():
        assert tensor.dtype == torch.int64
        assert tensor.shape == (2, width)
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        assert batch["input_ids"][row].tolist() == example.input_ids + [2] * (width - n)
        assert batch["labels"][row].tolist() == example.labels + [-100] * (width - n)
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (width - n)
