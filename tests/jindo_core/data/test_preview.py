"""The preview: every token is there, marks stand where the mask is, nothing reaches the terminal that it would obey."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jindo_core.data.examples import Encoder
from jindo_core.data.preview import preview, token_texts
from jindo_core.data.records import Record, Round
from jindo_core.data.templates import load_template

ROW = Record((Round("수도는?", "", "서울 뷁"), Round("또", "", "[bold]네[/bold]")), row=4)


def shown(tokenizer, records, n=9, *, template="vicuna_v1.1", terminal=False, **lengths):
    lengths = {"cutoff_len": 999, "train_on_inputs": False, **lengths}
    encoder = Encoder(tokenizer, load_template(template, tokenizer), **lengths)
    out = io.StringIO()
    console = Console(
        file=out, width=120, force_terminal=terminal, color_system="truecolor" if terminal else None, no_color=False
    )
    preview(records, encoder, tokenizer, n, console)
    return out.getvalue()


@pytest.mark.parametrize(("kind", "begin", "end"), [("llama", "<s>", "</s>"), ("smollm2", "", "<|im_end|>")])
def test_rows_stand_between_marks(kind, begin, end, request):
    text = shown(request.getfixturevalue(kind), [ROW])
    # Narrow and wide consoles alike: the row is never wrapped.
    assert (
        f"{begin}A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
        f"USER: 수도는? ASSISTANT:⟦ 서울 뷁{end}⟧USER: 또 ASSISTANT:⟦ [bold]네[/bold]{end}⟧\n"
    ) in text
    assert "row 4: " in text
    assert "⟦learned⟧ is what the loss counts" in text


def test_colours_in_a_terminal(llama):
    text = shown(llama, [ROW], terminal=True)
    assert "⟦" not in text
    assert "\x1b[30;42m" in text  # black on green
    assert "\x1b[1;35;42m</s>" in text  # a special token that is learned
    assert "\x1b[1;35;4" in text.partition("<s>")[0]


def test_lengths_and_what_is_cut(llama):
    long = Record.single("가", "", "나 " * 30, 5)
    text = shown(llama, [long], template="alpaca_short", cutoff_len=40)
    assert "row 5: 40 tokens, " in text
    assert "cut at the end, EOS with them; cutoff_len 40" in text
    text = shown(llama, [long], template="alpaca_short", source_max_len=10, target_max_len=7)
    assert "row 5: 17 tokens, 7 learned; " in text
    assert "of the prompt cut; " in text
    assert "source_max_len 10 and target_max_len 7" in text
    text = shown(llama, [long], template="alpaca_short", cutoff_len=5)
    assert "left out: nothing to learn" in text


def test_as_many_rows_as_asked_for(llama):
    records = [Record.single("가", "", "나", row) for row in range(1, 5)]
    assert [f"row {row}:" in shown(llama, records, 2) for row in range(1, 5)] == [True, True, False, False]
    assert shown(llama, records, 0) == shown(llama, [], 3) == ""


def test_what_a_terminal_would_obey_or_hide(llama):
    text = shown(llama, [Record.single("a\x1b[31mb\u200b\u202e\tc", "", "d\ne", 1)], template="wizard_7b")
    assert "a<U+001B>[31mb<U+200B><U+202E>⇥" in text
    assert "\x1b" not in text
    assert "⟦d⏎\ne</s>⟧" in text


@pytest.mark.parametrize("kind", ["llama", "smollm2"])
def test_each_token_has_its_own_text(kind, request):
    tokenizer = request.getfixturevalue(kind)
    text = "하나 뷁 뷁뷁  두 칸 😀 and English 뷁"
    ids = tokenizer.encode_batch([text])[0]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "" in texts  # a byte that is no character yet
    assert sum(map(bool, texts)) > len(text.split())
    eos = tokenizer.eos_id
    assert token_texts(tokenizer, [eos, *ids[:1], eos])[::2] == [tokenizer.piece(eos)] * 2
    cut = tokenizer.encode_batch(["뷁"])[0][:-1]
    assert token_texts(tokenizer, cut)[-1].strip(" ").strip("\ufffd") == ""
    assert "\ufffd" in token_texts(tokenizer, cut)[-1]
