"""Any Unicode in every template and both kinds of tokenizer: no crash, and no mask outside its segment."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jindo_core.data.examples import IGNORE, Encoder, prompt_ids
from jindo_core.data.preview import token_texts
from jindo_core.data.records import Record, Round
from jindo_core.data.templates import load_template, template_names
from jindo_core.tokenizer import load_tokenizer

QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
# What quotes a template or a special token, and what tokenizers trip over, is drawn often.
SNIPPETS = [
    "<|im_end|>", "</s>", "<s>", "<unk>", "### Response:\n", " ASSISTANT: ", "[/INST]", "{instruction}", "{eos}", "{bos}",
    "{output}", "\r\n", "\n\n", "  ", "\u200b", "\ufeff", "\u2581", "\ue000", "뷁", "ᄒ", "\u0301", "😀", "👨‍👩‍👧", "\x00",
    "\u2003", "<0x41>",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=6), max_size=5).map("".join)
ROUNDS = st.lists(st.builds(Round, TEXT, st.just("") | TEXT, TEXT), min_size=1, max_size=3).map(tuple)
RECORDS = st.builds(Record, ROUNDS, formatted=st.booleans(), row=st.just(1))


@pytest.fixture(scope="module")
def tokenizers(assets, smollm2_gguf, tmp_path_factory):
    korean = tmp_path_factory.mktemp("korean")
    shutil.copy(assets / "tokenizers/ko-jungwhank/tokenizer.model", korean / "tokenizer.model")
    return {
        "smollm2": load_tokenizer(smollm2_gguf),
        "llama": load_tokenizer(assets / "models/stories15M-hf"),
        "korean": load_tokenizer(korean),
    }


def template_of(name, tokenizer):
    """The template; None where its end is no token of this tokenizer, which the Encoder refuses."""
    template = load_template(name, tokenizer)
    end = getattr(template, "end", "{eos}")
    return template if end == "{eos}" or end in tokenizer.special_tokens else None


def answers(template, record):
    """What the template says that the model writes, "" between two answers' ends."""
    written, texts = "", []
    for segment in template.render(record):
        if segment.kind == "answer":
            written += segment.text
        elif segment.kind == "end":
            texts.append(written)
            written = ""
    return texts


def stretches(example):
    """Runs of learned tokens, each up to the end token that closes it."""
    found, run = [], []
    for label in example.labels:
        if label != IGNORE:
            run.append(label)
        elif run:
            found.append(run)
            run = []
    return found + ([run] if run else [])


NAMES = [*template_names(), "chat"]


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(record=RECORDS, cutoff=st.integers(1, 200))
@example(record=Record((Round("", "", ""),), row=1), cutoff=1)
def test_nothing_crashes_and_lengths_hold(name, record, cutoff, tokenizers):
    for kind, tokenizer in tokenizers.items():
        if name == "chat" and kind != "smollm2":
            continue
        template = template_of(name, tokenizer)
        if template is None:
            continue
        whole = Encoder(tokenizer, template, cutoff_len=100_000, train_on_inputs=False).lay_out([record])[0].example
        cut = Encoder(tokenizer, template, cutoff_len=cutoff, train_on_inputs=False).lay_out([record])[0]
        assert cut.example.input_ids == whole.input_ids[:cutoff]
        assert cut.example.labels == whole.labels[:cutoff]
        assert len(whole.labels) == len(whole.input_ids)
        ends = [label for label in whole.labels if label in (tokenizer.eos_id,)]
        assert len(ends) == len(record.rounds)  # every answer's end is learned, and no text became one
        apart = Encoder(
            tokenizer, template, cutoff_len=1, train_on_inputs=False, source_max_len=cutoff, target_max_len=cutoff
        ).lay_out([record])[0].example
        assert len(apart.input_ids) <= 2 * cutoff
        assert all(label in (IGNORE, i) for i, label in zip(apart.input_ids, apart.labels, strict=True))


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(record=RECORDS)
def test_what_is_learned_is_the_answers(name, record, tokenizers):
    """Decoded for byte-exact tokenizers. A token on the border may bring the end of the prompt along, no more."""
    for kind in ("smollm2", "llama"):
        tokenizer = tokenizers[kind]
        if name == "chat" and kind != "smollm2":
            continue
        template = template_of(name, tokenizer)
        if template is None:
            continue
        example = Encoder(tokenizer, template, cutoff_len=100_000, train_on_inputs=False).lay_out([record])[0].example
        runs = stretches(example)
        wanted = answers(template, record)
        assert len(runs) == len(wanted)
        for run, text in zip(runs, wanted, strict=True):
            assert run[-1] == tokenizer.eos_id
            shown = "".join(token_texts(tokenizer, run[:-1])) if kind == "smollm2" else bytes_of(tokenizer, run[:-1])
            if template.single_turn and len(record.rounds) == 1 or record.formatted and len(record.rounds) == 1:
                # alpaca-lora counts the prompt's tokens alone: the border may lie a few characters off.
                assert shown.strip("\ufffd") in "".join(s.text for s in template.render(record))
                continue
            assert shown.endswith(text), (shown, text)
            before = shown.removesuffix(text) if text else shown
            prompt = "".join(s.text for s in template.render(record) if s.kind in ("template", "text"))
            assert before in prompt or before == " "


def bytes_of(tokenizer, ids):
    """SentencePiece's pieces as text, the first space kept, which its decode takes off."""
    return tokenizer.decode([*tokenizer.encode("x", bos=False), *ids])[1:]


@QUICK
@given(text=TEXT)
def test_decoding_gives_the_text_back(text, tokenizers):
    """With a prefix: SentencePiece's decode takes one space off the front."""
    for kind in ("smollm2", "llama"):
        tokenizer = tokenizers[kind]
        for given_text in ("x" + text, text):
            ids = tokenizer.encode_batch([given_text])[0]
            assert tokenizer.decode(ids) == given_text
            assert "".join(token_texts(tokenizer, ids)) == given_text
            spans = tokenizer.encode_spans([given_text])[0]
            assert spans[0] == ids
            assert spans[1] == sorted(spans[1])
            assert all(0 <= place < max(len(given_text), 1) for place in spans[1])


@QUICK
@given(record=RECORDS)
def test_a_prompt_ends_where_learning_begins(record, tokenizers):
    """What `generate` asks with is what training showed before the answer, token for token, unless they melt."""
    tokenizer = tokenizers["smollm2"]
    for name in ("chatml", "chat", "vicuna_v1.1"):
        template = load_template(name, tokenizer)
        example = Encoder(tokenizer, template, cutoff_len=100_000, train_on_inputs=False).lay_out([record])[0].example
        asked = prompt_ids(tokenizer, template, record)
        last = len(example.labels) - 1
        if name == "chat" or name == "chatml" and not record.formatted:
            text = record.rounds[-1].output
            if not text[:1].isspace() and text[:1] not in ("\u200b", "\ufeff"):
                assert example.input_ids[: len(asked)] == asked or record.formatted
        assert example.labels[last] != IGNORE or example.input_ids[last] != tokenizer.eos_id
