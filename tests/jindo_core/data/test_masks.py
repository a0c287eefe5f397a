"""Ids and labels of qlora, of FastChat and of conversations: against their algorithms, and by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
import sentencepiece

from jindo_core.data.examples import IGNORE, Encoder, end_ids, prompt_ids
from jindo_core.data.records import Record, Round, bundled_path, read_records
from jindo_core.data.templates import SingleTurnTemplate, load_template
from jindo_core.errors import InputError


@pytest.fixture(scope="module")
def processor(stories15m):
    return sentencepiece.SentencePieceProcessor(model_file=str(stories15m / "tokenizer.model"))


@pytest.fixture(scope="module")
def rows(assets):
    """Real rows: the Korean set, OASST1's prompts (formatted already) and our own."""
    korean = read_records(assets / "data/ko/ko_sharegpt_deepl_translate_cleaned_v2.json")[:40]
    lines = (assets / "data/en/qlora_oa_questions.jsonl").read_text(encoding="utf-8").splitlines()[:150]
    oasst = [
        Record((Round(row["input"], "", row["output"]),), formatted=True, row=number)
        for number, row in enumerate(map(json.loads, lines), 1)
    ]
    return korean + oasst + read_records(bundled_path())[:20]


def learned(example):
    return [label for label in example.labels if label != IGNORE]


# --- qlora ----------------------------------------------------------------------------------------------


def qlora(cut_source, cut_target, source, target, train_on_source):
    """What its collator does with a row's two texts, each with its special token and cut by its tokenizer call."""
    source, target = cut_source(source), cut_target(target)
    labels = source + target if train_on_source else [IGNORE] * len(source) + target
    return source + target, labels


def sources(template, record):
    """qlora's input column: the prompt, or the row's own where it is one already."""
    return record.instruction if record.formatted else template.prompt(record.instruction, record.input)


@pytest.mark.parametrize("train_on_inputs", [True, False])
@pytest.mark.parametrize("lengths", [(1024, 256), (64, 16), (9, 1), (1, 9)])
def test_rows_are_qloras_with_llamas_tokenizer(llama, processor, rows, lengths, train_on_inputs):
    template = load_template("qlora_alpaca")
    encoder = Encoder(
        llama, template, cutoff_len=3, train_on_inputs=train_on_inputs,
        source_max_len=lengths[0], target_max_len=lengths[1],
    )  # fmt: skip
    for record, layout in zip(rows, encoder.lay_out(rows), strict=True):
        expected = qlora(
            lambda text: [1, *processor.encode(text)][: lengths[0]],
            lambda text: [*processor.encode(text), 2][: lengths[1]],
            sources(template, record), record.output, train_on_inputs,
        )  # fmt: skip
        assert (layout.example.input_ids, layout.example.labels) == expected


@pytest.mark.parametrize("lengths", [(1024, 256), (64, 16)])
def test_rows_are_qloras_with_a_hugging_face_tokenizer(smollm2, smollm2_peer, rows, lengths):
    """Its calls word for word, but for BOS: this tokenizer adds none by itself (its BOS begins a message)."""
    template = load_template("qlora_alpaca")
    encoder = Encoder(
        smollm2, template, cutoff_len=3, train_on_inputs=False, source_max_len=lengths[0], target_max_len=lengths[1]
    )
    eos = smollm2_peer.eos_token

    def call(text, length):
        return smollm2_peer(text, max_length=length, truncation=True, add_special_tokens=False).input_ids

    for record, layout in zip(rows, encoder.lay_out(rows), strict=True):
        expected = qlora(
            lambda text: call(text, lengths[0]), lambda text: call(text + eos, lengths[1]),
            sources(template, record), record.output, False,
        )  # fmt: skip
        assert (layout.example.input_ids, layout.example.labels) == expected
        whole = len(call(record.output + eos, 100_000))
        assert layout.cut_end == max(whole - lengths[1], 0)


def test_qloras_lengths_come_together(llama):
    for lengths in ({"source_max_len": 5}, {"target_max_len": 5}):
        with pytest.raises(InputError, match="expected both or neither"):
            Encoder(llama, load_template("alpaca"), cutoff_len=8, train_on_inputs=False, **lengths)


def test_a_conversation_has_the_sum_of_qloras_lengths(llama):
    record = Record((Round("하나", "", "둘"), Round("셋", "", "넷")), row=1)
    template = load_template("vicuna_v1.1")
    apart = Encoder(llama, template, cutoff_len=8, train_on_inputs=False, source_max_len=90, target_max_len=38)
    plain = Encoder(llama, template, cutoff_len=128, train_on_inputs=False)
    assert apart.lay_out([record]) == plain.lay_out([record])
    assert apart.limit == "source_max_len 90 and target_max_len 38"


# --- FastChat ------------------------------------------------------------------------------------------


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def fastchat(tokenize, turns, max_length):
    """Its vicuna_v1.1 preprocessing of one conversation: labels by the lengths of rounds tokenized again.

    Returns:
        ids, labels, and whether it found its own arithmetic off (it then masks the whole row).
    """
    text = SYSTEM + " "
    for number, turn in enumerate(turns):
        text += f"USER: {turn} " if number % 2 == 0 else f"ASSISTANT: {turn}</s>"
    ids = tokenize(text)[:max_length]
    labels = list(ids)
    labels[:1] = [IGNORE]
    at = 1
    for part in text.split("</s>"):
        if part == "":
            break
        halves = part.split(" ASSISTANT: ")
        if len(halves) != 2:
            break
        instruction = len(tokenize(halves[0] + " ASSISTANT: ")) - 2
        labels[at : at + instruction] = [IGNORE] * len(labels[at : at + instruction])
        at += len(tokenize(part))
    labels[at:] = [IGNORE] * len(labels[at:])
    return ids, labels, at < max_length and at != len(ids)


@pytest.fixture(scope="module")
def conversations(assets):
    raw = json.loads((assets / "data/en/fastchat_dummy_conversation.json").read_text(encoding="utf-8"))
    return [[turn["value"] for turn in row["conversations"]] for row in raw]


@pytest.mark.parametrize("max_length", [2048, 120])
def test_masks_are_fastchats(llama, processor, conversations, max_length):
    def tokenize(text):
        """As LLaMA's own (slow) tokenizer does: the text between end tokens, each on its own."""
        ids = [1]
        for number, piece in enumerate(text.split("</s>")):
            ids += ([2] if number else []) + processor.encode(piece)
        return ids

    records = [
        Record(tuple(Round(turns[i], "", turns[i + 1]) for i in range(0, len(turns) - 1, 2)), row=number)
        for number, turns in enumerate(conversations, 1)
    ]
    assert len(records) == 500
    assert sum(len(record.rounds) > 1 for record in records) > 100
    encoder = Encoder(llama, load_template("vicuna_v1.1"), cutoff_len=max_length, train_on_inputs=False)
    for turns, layout in zip(conversations, encoder.lay_out(records), strict=True):
        ids, labels, mismatch = fastchat(tokenize, turns[: len(turns) // 2 * 2], max_length)
        assert not mismatch
        assert layout.example.input_ids == ids
        assert layout.example.labels == labels


def test_where_fastchats_arithmetic_fails_ours_does_not(llama, processor):
    """An answer that quotes a header, and one that begins with a space."""
    for answer in ("Write USER: hi ASSISTANT: yes", "  indented", "</s>"):
        record = Record((Round("q", "", answer), Round("r", "", "s")), row=1)
        encoder = Encoder(llama, load_template("vicuna_v1.1"), cutoff_len=256, train_on_inputs=False)
        example = encoder.lay_out([record])[0].example
        first, second = learned(example)[: learned(example).index(2)], learned(example)[-2:]
        assert llama.decode(first) == " " + answer or llama.decode(first) == answer
        assert second == [*processor.encode("s"), 2]
        assert example.input_ids.count(2) == 2


# --- by hand -------------------------------------------------------------------------------------------

# LLaMA's pieces, put together by hand. Learned ones stand behind a |, up to the next.
GOLDEN = [
    ("koalpaca_v1.1", [("x", "", "y")],
     "<s> ▁### ▁ <0xEC> <0xA7> <0x88> 문 : ▁x <0x0A> <0x0A> "
     "## # ▁ <0xEB> <0x8B> <0xB5> <0xEB> <0xB3> <0x80> : | ▁y </s>"),
    ("wizard_7b", [("x", "", "y")], "<s> ▁x <0x0A> <0x0A> ## # ▁Response : | y </s>"),
    ("wizard_7b", [("x", "z", "y")], "<s> ▁x <0x0A> z <0x0A> <0x0A> ## # ▁Response : | y </s>"),
    ("wizard_7b", [("x", "", "")], "<s> ▁x <0x0A> <0x0A> ## # ▁Response : | </s>"),
    ("wizard_7b", [("x", "", "</s>")], "<s> ▁x <0x0A> <0x0A> ## # ▁Response : | </ s > </s>"),
    ("guanaco", [("x", "", "y")], "<s> ▁### ▁Human : ▁x ## # ▁Ass istant : | ▁y </s>"),
    ("guanaco", [("x", "", "y"), ("z", "", "w")],
     "<s> ▁### ▁Human : ▁x ## # ▁Ass istant : | ▁y </s> | ▁### ▁Human : ▁z ## # ▁Ass istant : | ▁w </s>"),
    ("guanaco", [("</s>", "", "y")], "<s> ▁### ▁Human : ▁</ s > ## # ▁Ass istant : | ▁y </s>"),
    ("korean_short", [("x", "", "y"), ("z", "w", "v")], "<s> ▁x <0x0A> → | y </s> | ▁z <0x0A> w <0x0A> → | v </s>"),
    ("llama2_chat", [("x", "", "y")], "<s> ▁[ INST ] ▁x ▁[ / INST ] | ▁y ▁ </s>"),
    ("llama2_chat", [(" x ", "", "\ny"), ("z", "", "w")],
     "<s> ▁[ INST ] ▁x ▁[ / INST ] | ▁y ▁ </s> | <s> ▁[ INST ] ▁z ▁[ / INST ] | ▁w ▁ </s>"),
    ("alpaca_short", [("x", "", "y")],
     "<s> ▁### ▁Inst ruction : <0x0A> x <0x0A> <0x0A> ## # ▁Response : <0x0A> | y </s>"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rounds", "expected"), GOLDEN)
def test_by_hand(llama, processor, name, rounds, expected):
    record = Record(tuple(Round(*turn) for turn in rounds), row=1)
    example = Encoder(llama, load_template(name), cutoff_len=256, train_on_inputs=False).lay_out([record])[0].example
    pieces, flags, counts = [], [], False
    for piece in expected.split(" "):
        if piece == "|":
            counts = not counts
        else:
            pieces.append(piece)
            flags.append(counts)
    assert [processor.id_to_piece(i) for i in example.input_ids] == pieces
    assert [label != IGNORE for label in example.labels] == flags
    assert all(label in (IGNORE, i) for i, label in zip(example.input_ids, example.labels, strict=True))


def test_llama3_by_hand(words):
    tokenizer = words("<|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|>")
    record = Record((Round("u", "", "a"), Round("v", "", "b")), system="s", row=1)
    example = Encoder(tokenizer, load_template("llama3"), cutoff_len=99, train_on_inputs=False).lay_out([record])[0]
    text = "".join(map(tokenizer.piece, example.example.input_ids)).replace("Ċ", "\n")
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nu<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "a<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nv<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
    )
    assert [tokenizer.piece(i) for i in learned(example.example)] == ["a", "<|eot_id|>", "b", "<|eot_id|>"]
    assert end_ids(tokenizer, load_template("llama3")) == {1}


# --- rules ---------------------------------------------------------------------------------------------


def test_a_token_on_the_border_counts_where_its_last_character_lies(smollm2):
    """Two line breaks are one token of this tokenizer: the first is the template's, the second the answer's."""
    assert len(smollm2.encode("\n\n")) == 1
    template = load_template("chatml")
    record = Record((Round("q", "", "\n"),), row=1)
    example = Encoder(smollm2, template, cutoff_len=99, train_on_inputs=False).lay_out([record])[0].example
    assert learned(example) == [*smollm2.encode("\n\n"), smollm2.eos_id]


def test_an_answer_melts_with_the_space_that_ends_its_prompt(llama, assets):
    """qlora's prompts end in a space; in one text with the answer it is the first word's own, which is learned."""
    template = load_template("qlora_alpaca")
    lines = (assets / "data/en/self_instruct_seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    tasks = [(row["instruction"], row["instances"][0]) for row in map(json.loads, lines)]
    records = [Record.single(asked, first["input"], first["output"], 1) for asked, first in tasks]
    records += [Record.single("q", "", "yes", 1)]
    encoder = Encoder(llama, template, cutoff_len=100_000, train_on_inputs=False)
    found = [learned(layout.example) for layout in encoder.lay_out(records)]
    assert found[-1] == [*llama.encode("yes")[1:], llama.eos_id]
    for record, ids in zip(records, found, strict=True):
        shown = llama.decode([*llama.encode("x"), *ids])[1:]
        assert shown.removeprefix(" ") == record.output.removeprefix(" ")
    apart = Encoder(llama, template, cutoff_len=9, train_on_inputs=False, source_max_len=999, target_max_len=999)
    assert learned(apart.lay_out(records[-1:])[0].example) == found[-1]


def test_eos_is_learned_though_the_prompt_has_more_tokens_alone(llama):
    """Prompt and answer melt into one token, where alpaca-lora's count of the prompt alone would mask EOS too."""
    template = SingleTurnTemplate("own", "", "{instruction}{input}", "{instruction}", "?")
    record = Record.single("Respons", "", "e", 1)
    assert len(llama.encode("Respons")) > len(llama.encode("Response")) == 2
    example = Encoder(llama, template, cutoff_len=99, train_on_inputs=False).lay_out([record])[0].example
    assert example.labels == [IGNORE, IGNORE, llama.eos_id]


@pytest.mark.parametrize("name", ["alpaca_short", "vicuna_v1.1", "chatml", "llama2_chat"])
def test_a_prompt_is_the_beginning_of_its_row(smollm2, llama, name):
    template = load_template(name)
    record = Record((Round("질문 <|im_end|>", "", "답"), Round("또?", "입력", "네")), row=1)
    for tokenizer in [smollm2] if name == "chatml" else [smollm2, llama]:
        ids = prompt_ids(tokenizer, template, record)
        encoder = Encoder(tokenizer, template, cutoff_len=999, train_on_inputs=False)
        example = encoder.lay_out([record])[0].example
        assert example.input_ids[: len(ids)] == ids
        assert example.labels[len(ids)] != IGNORE
        assert example.labels[len(ids) - 1] == IGNORE
        assert end_ids(tokenizer, template) == {tokenizer.eos_id}


def test_special_tokens_in_a_row_are_text_and_the_templates_own_are_not(smollm2, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        'prompt_input: "<|im_start|>{instruction}{input}<|im_end|>"\n'
        'prompt_no_input: "<|im_start|>{instruction}<|im_end|>"\nresponse_split: "<|im_end|>"\n',
        encoding="utf-8",
    )
    record = Record.single("a<|im_start|>b", "", "c<|im_end|>d", 1)
    encoder = Encoder(smollm2, load_template(file), cutoff_len=99, train_on_inputs=False)
    example = encoder.lay_out([record])[0].example
    assert [i for i in example.input_ids if i < 17] == [1, 2, 2]
    assert example.input_ids[0] == 1
    assert smollm2.decode(learned(example)) == "c<|im_end|>d"
    # Neither do a template's words and a row's make a special token together.
    record = Record((Round("im_end|>", "", "x"),), formatted=True, row=1)
    assert encoder.lay_out([record])[0].example.input_ids.count(2) == 1


def test_white_space_beside_a_token_that_takes_it(words):
    """As transformers encodes it whole: Phi 3's special tokens take the white space behind them along."""
    template = dataclasses.replace(load_template("chatml"), user_turn="<|user|>{user}<|end|>", end="<|end|>")
    for side in ("lstrip", "rstrip"):
        tokenizer = words("<s> </s> <|user|> <|end|> <|im_start|>", **{side: True})
        record = Record.single(" \u00a0x \n", "", "\t y ", 1)
        encoder = Encoder(tokenizer, template, cutoff_len=99, train_on_inputs=False)
        example = encoder.lay_out([record])[0].example
        text = "<|user|> \u00a0x \n<|end|><|im_start|>assistant\n\t y <|end|>"
        assert example.input_ids == tokenizer.encode(text)
        assert tokenizer.decode(learned(example)) == ("\t y" if side == "lstrip" else "\t y ")


def test_train_on_inputs_learns_everything(llama):
    record = Record((Round("q", "", "a"), Round("r", "", "b")), row=1)
    example = Encoder(llama, load_template("vicuna_v1.1"), cutoff_len=99, train_on_inputs=True).lay_out([record])[0]
    assert example.example.labels == example.example.input_ids


@pytest.mark.parametrize("name", ["orca", "chatml", "chat"])
def test_a_row_ends_with_its_end_token(smollm2, name):
    """What a template puts behind an answer's end is there for the next round, and never learned after the last."""
    record = Record((Round("q", "", "a"), Round("r", "", "b")), row=1)
    encoder = Encoder(smollm2, load_template(name, smollm2), cutoff_len=99, train_on_inputs=True)
    ids = encoder.lay_out([record])[0].example.labels
    ends = [place for place, token in enumerate(ids) if token == smollm2.eos_id]
    assert ends[-1] == len(ids) - 1
    assert smollm2.decode(ids[ids.index(smollm2.eos_id) + 1 :]).startswith("\n") or name == "chat"


def test_what_is_cut_and_left_out(llama):
    template = load_template("guanaco")
    record = Record((Round("q", "", "a b c"), Round("r", "", "d")), row=7)
    whole = Encoder(llama, template, cutoff_len=99, train_on_inputs=False).encode([record])[0]
    assert not whole.cut
    length = len(whole.example.input_ids)
    one_less = Encoder(llama, template, cutoff_len=length - 1, train_on_inputs=False).lay_out([record])[0]
    assert (one_less.cut_end, one_less.cut_prompt) == (1, 0)
    nothing = Encoder(llama, template, cutoff_len=4, train_on_inputs=False).encode([record])[0]
    assert (nothing.example, nothing.cut, nothing.row) == (None, True, 7)


def test_an_end_that_is_no_token_is_refused(llama):
    for name in ("chatml", "llama3"):
        with pytest.raises(InputError, match=r"no special token of this model \(it has <s>, </s>\)"):
            Encoder(llama, load_template(name), cutoff_len=8, train_on_inputs=False)


def test_the_fingerprint_knows_all_that_matters(llama, smollm2):
    settings = {"cutoff_len": 64, "train_on_inputs": False}
    variants = [
        (llama, "alpaca", settings), (smollm2, "alpaca", settings), (llama, "alpaca_short", settings),
        (llama, "vicuna_v1.1", settings), (llama, "alpaca", settings | {"cutoff_len": 65}),
        (llama, "alpaca", settings | {"train_on_inputs": True}),
        (llama, "alpaca", settings | {"source_max_len": 32, "target_max_len": 32}),
        (llama, "alpaca", settings | {"source_max_len": 33, "target_max_len": 31}),
    ]  # fmt: skip
    prints = [Encoder(tok, load_template(name), **given).fingerprint for tok, name, given in variants]
    assert len(set(prints)) == len(variants)
    assert prints == [Encoder(tok, load_template(name), **given).fingerprint for tok, name, given in variants]


@pytest.mark.parametrize("character", [*"\x04\x06\x13\x14\x16\x1d", "\U00040000"])
def test_bytes_without_a_token_vanish_as_in_transformers(smollm2, smollm2_peer, character):
    """SmolLM2's vocabulary, as it was published, has no token for some bytes and none for "unknown"."""
    ids = smollm2.encode_batch([f"a{character}b"])[0]
    assert ids == smollm2_peer(f"a{character}b").input_ids
    assert character not in smollm2.decode(ids)
