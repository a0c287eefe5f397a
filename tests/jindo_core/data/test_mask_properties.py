"""Any Unicode in every template and both kinds of tokenizer: no crash, and no mask outside its segment."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from jindo_core.data.examples import IGNORE, Encoder, prompt_ids
from jindo_core.data.preview import token_texts
from jindo_core.data.records import Record, Round
from jindo_core.data.templates import load_template, template_names
from jindo_core.tokenizer import load_tokenizer

QUICK = settings(
    max_examples=15, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
# What quotes a template or a special token, and what tokenizers trip over, is drawn often.
SNIPPETS = [
    "<|im_end|>", "</s>", "<s>", "<unk>", "### Response:\n", " ASSISTANT: ", "[/INST]", "{instruction}", "{eos}",
    "{bos}", "{output}", "\r\n", "\n\n", "  ", "\u200b", "\ufeff", "\u2581", "\ue000", "뷁", "ᄒ", "\u0301", "😀",
    "👨‍👩‍👧", "\x00", "\u2003", "<0x41>",
]  # fmt: skip
SPACE = "\u2581"  # how SentencePiece writes a space: in a text it becomes one
# Bytes that SmolLM2's vocabulary has no token for: its tokenizer drops them (test_masks.py).
MISSING = "\x04\x06\x13\x14\x16\x1d"
CHARACTERS = st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters=MISSING)
TEXT = st.lists(st.sampled_from(SNIPPETS) | st.text(CHARACTERS, max_size=6), max_size=5).map("".join)
ROUNDS = st.lists(st.builds(Round, TEXT, st.just("") | TEXT, TEXT), min_size=1, max_size=3).map(tuple)
RECORDS = st.lists(st.builds(Record, ROUNDS, formatted=st.booleans(), row=st.just(1)), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def tokenizers(assets, smollm2, llama, words, tmp_path_factory):
    korean = tmp_path_factory.mktemp("korean")
    shutil.copy(assets / "tokenizers/ko-jungwhank/tokenizer.model", korean / "tokenizer.model")
    return {
        "smollm2": smollm2,
        "llama": llama,
        "bytes": words("<|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|im_start|> </s>"),
        "korean": load_tokenizer(korean),
    }


def template_of(name, tokenizer):
    """The template; None where its end is no token of this tokenizer, which the Encoder refuses."""
    template = load_template(name, tokenizer)
    end = getattr(template, "end", "{eos}")
    return template if end == "{eos}" or end in tokenizer.special_tokens else None


def cases(name, tokenizers):
    """The tokenizers that this template can end an answer with, and the template."""
    for kind, tokenizer in tokenizers.items():
        if name == "chat" and kind != "smollm2":
            continue
        template = load_template(name, tokenizer)
        end = getattr(template, "end", "{eos}")
        if end == "{eos}" or end in tokenizer.special_tokens:
            yield kind, tokenizer, template


def layouts(tokenizer, template, records, **lengths):
    lengths = {"cutoff_len": 100_000, "train_on_inputs": False, **lengths}
    return [layout.example for layout in Encoder(tokenizer, template, **lengths).lay_out(records)]


def answers(segments):
    """What the model writes, answer by answer, and what stands before it since the last end."""
    found = [("", "")]
    for segment in segments:
        before, written = found[-1]
        if segment.kind == "answer":
            found[-1] = (before, written + segment.text)
        elif segment.kind == "end":
            found.append(("", ""))
        else:
            found[-1] = (before + segment.text, written)
    return found[:-1]


def stretches(labels, end):
    """Runs of learned tokens without the end tokens that close them."""
    found, run = [], []
    for label in labels:
        if label == end:
            found.append(run)
            run = []
        elif label != IGNORE:
            run.append(label)
    assert not run  # nothing is learned behind the last end
    return found


def written(tokenizer, ids):
    """Their text, the first space kept that SentencePiece's decode takes off."""
    before = tokenizer.encode_batch(["x"])[0]
    return tokenizer.decode([*before, *ids])[1:]


NAMES = [*template_names(), "chat"]


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(records=RECORDS, cutoff=st.integers(1, 200))
@example(records=[Record((Round("", "", ""),), row=1)], cutoff=1)
def test_nothing_crashes_and_lengths_hold(name, records, cutoff, tokenizers):
    for _, tokenizer, template in cases(name, tokenizers):
        wholes = layouts(tokenizer, template, records)
        cuts = layouts(tokenizer, template, records, cutoff_len=cutoff)
        both = layouts(tokenizer, template, records, source_max_len=cutoff, target_max_len=cutoff)
        for record, whole, cut, apart in zip(records, wholes, cuts, both, strict=True):
            assert cut.input_ids == whole.input_ids[:cutoff]
            assert cut.labels == whole.labels[:cutoff]
            assert len(whole.labels) == len(whole.input_ids)
            # Every answer's end is learned, and no text became one.
            assert whole.labels.count(tokenizer.eos_id) == len(record.rounds)
            assert len(apart.input_ids) <= 2 * cutoff
            for found in (whole, apart):
                assert all(label in (IGNORE, i) for i, label in zip(found.input_ids, found.labels, strict=True))


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(records=RECORDS)
@example(records=[Record((Round("q", "", text),), row=1) for text in ("yes", "\nx", " x", "예", "1")])
@example(records=[Record((Round(text, "", "e"),), formatted=True, row=1) for text in ("Say ", "a\n", "Respons")])
def test_what_is_learned_is_the_answers(name, records, tokenizers):
    """Decoded, for tokenizers that lose nothing. A token on the border brings the prompt's last characters along."""
    for kind, tokenizer, template in cases(name, tokenizers):
        if kind == "korean":
            continue
        for record, found in zip(records, layouts(tokenizer, template, records), strict=True):
            segments = template.render(record)
            runs = stretches(found.labels, tokenizer.eos_id)
            wanted = answers(segments)
            assert len(runs) == len(wanted)
            prompt = prompt_ids(tokenizer, template, record)
            clean = found.input_ids[: len(prompt)] == prompt
            for number, (run, (before, text)) in enumerate(zip(runs, wanted, strict=True)):
                shown = written(tokenizer, run)
                if kind == "llama":
                    # SentencePiece puts a space before a text: the answer's, where the prompt is empty, and where
                    # both are white space one token with them.
                    before, text = " " + before.replace(SPACE, " "), text.replace(SPACE, " ")
                    shown = text if shown == " " + text else shown
                if clean and number + 1 == len(runs):
                    assert shown == text
                elif len(runs) == 1 and len(shown) < len(text) and (template.single_turn or record.formatted):
                    # Its beginning melted with a word of the prompt: one token, which is masked, and no more.
                    lost = text.removesuffix(shown)
                    token = written(tokenizer, found.input_ids[-len(run) - 2 : -len(run) - 1])
                    assert text == lost + shown
                    assert token.endswith(lost)
                    assert before.endswith(token.removesuffix(lost))
                    assert token.removesuffix(lost).strip()
                else:
                    assert shown.endswith(text)
                    assert before.endswith(shown[: len(shown) - len(text)].lstrip("\ufffd"))


@QUICK
@given(text=TEXT)
def test_decoding_gives_the_text_back(text, tokenizers):
    for kind in ("smollm2", "llama", "bytes"):
        tokenizer = tokenizers[kind]
        for given_text in ("x" + text, text):
            ids = tokenizer.encode_batch([given_text])[0]
            same = given_text.replace(SPACE, " ") if kind == "llama" else given_text
            assert tokenizer.decode(ids) == same
            assert "".join(token_texts(tokenizer, ids)) == same
            spans = tokenizer.encode_spans([given_text])[0]
            assert spans[0] == ids
            assert spans[1] == sorted(spans[1])
            assert all(0 <= place < max(len(given_text), 1) for place in spans[1])
