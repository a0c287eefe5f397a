"""`data refine`: scores as transformers', the old text kept where the new one fails, runs that go on."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from jindo_core.adapters import save_adapter
from jindo_core.data.examples import Encoder, prompt_ids
from jindo_core.data.records import Record, Round, read_records
from jindo_core.data.templates import load_template
from jindo_core.data_config_inspect import RefineConfig
from jindo_core.errors import InputError
from jindo_core.generation import generate_ids
from jindo_core.loader import load_model
from jindo_core.lora import adapted_layers, attach_lora
from jindo_core.refine import Rewriter, run_refine
from jindo_core.tokenizer import load_tokenizer

ROWS = [
    {"instruction": "Tell a story about a dog.", "input": "", "output": "A dog ran to the park and was happy", "id": 7},
    {"instruction": "Who is it?", "input": "Lily", "output": "She is a girl who likes to play outside", "id": 8},
    {"instruction": "Say nothing.", "input": "", "output": "", "id": 9},
    {"instruction": "And a cat?", "input": "", "output": "Once upon a time there was a little cat", "id": 10},
]


@pytest.fixture(scope="session")
def ends_sentences(stories260k, tmp_path_factory):
    """stories260K, told that a full stop ends a text: a model that ends its answers by itself."""
    folder = tmp_path_factory.mktemp("model") / "stories"
    shutil.copytree(stories260k, folder)
    tokenizer = load_tokenizer(folder)
    stop = tokenizer.encode("It is.", bos=False)[-1]
    assert tokenizer.decode([stop]) == "."
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [stop]}))
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def refine(data, output, model, mode="rewrite", **more):
    given = {"instruction": "Once upon a time", "prompt_template_name": "alpaca_short"} if mode == "rewrite" else {}
    config = RefineConfig(
        data_path=str(data), output_path=str(output), base_model=str(model), mode=mode, dtype="fp32", device="cpu",
        **{**given, "quantize": "none", "max_new_tokens": 48, "max_length_ratio": 9, "min_length_ratio": 0, **more},
    )  # fmt: skip
    counts = run_refine(config)
    assert not list(output.parent.glob(".*"))  # no part file, no temporary one
    return counts, read(output)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- scoring ---------------------------------------------------------------------------------------------


def test_scores_equal_transformers_on_real_rows(assets, stories15m, tmp_path):
    data = assets / "data/ko/ChatbotData.csv"
    counts, rows = refine(data, tmp_path / "o.jsonl", stories15m, "score", max_rows=12, batch_size=5)
    assert (counts.rows, counts.texts) == (12, {"scored": 12})
    tokenizer, template = load_tokenizer(stories15m), load_template("alpaca")
    encoder = Encoder(tokenizer, template, cutoff_len=256, train_on_inputs=False)
    peer = AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)
    records = read_records(data)[:12]

    def loss(ids, labels):
        with torch.no_grad():
            return peer(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()

    for record, encoded, row in zip(records, encoder.encode(records), rows, strict=True):
        assert (row["Q"], row["A"]) == (record.instruction, record.output)
        ids, labels = encoded.example.input_ids, encoded.example.labels
        expected = loss(ids, labels)
        assert row["score_loss"] == pytest.approx(expected, rel=1e-5)
        assert row["score_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        answer = [label for label in labels if label != -100]
        assert row["score_tokens"] == len(answer)
        alone = loss([tokenizer.bos_id, *answer], [-100, *answer])
        assert row["score_ifd"] == pytest.approx(expected / alone, rel=1e-5)


def test_rows_that_have_no_score_say_so(stories15m, tmp_path):
    long = {"instruction": "Tell. " * 40, "input": "", "output": "No.", "id": 11}
    data = write(tmp_path / "a.jsonl", [*ROWS, long])
    counts, rows = refine(data, tmp_path / "o.jsonl", stories15m, "score", cutoff_len=70, prefix="s_")
    assert [row["id"] for row in rows] == [7, 8, 9, 10, 11]
    assert counts.texts["no answer within cutoff_len"] == 1
    assert counts.texts["scored"] == 4
    assert rows[4]["s_loss"] is None
    assert rows[2]["s_tokens"] == 1  # EOS is the answer
    with pytest.raises(InputError, match=r"row 1 .* has a column 's_tokens' already: give another --prefix"):
        refine(tmp_path / "o.jsonl", tmp_path / "p.jsonl", stories15m, "score", prefix="s_")


def test_an_adapter_scores_as_peft_would(stories260k, tmp_path):
    """Its own base model and template, from its folder, and weights that change the figures."""
    model = attach_lora(load_model(stories260k, quantize=None, dtype="fp32", device="cpu"), target_modules="all-linear")
    torch.manual_seed(0)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    adapter = save_adapter(model, tmp_path / "adapter", base_model=str(stories260k))
    from peft import PeftModel

    peer = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32), adapter)
    data = write(tmp_path / "a.jsonl", ROWS[:2])
    config = RefineConfig(
        data_path=str(data), output_path=str(tmp_path / "o.jsonl"), mode="score", lora_weights=str(adapter),
        dtype="fp32", device="cpu", quantize="none",
    )  # fmt: skip
    run_refine(config)
    encoder = Encoder(load_tokenizer(stories260k), load_template("alpaca"), cutoff_len=512, train_on_inputs=False)
    for encoded, row in zip(encoder.encode(read_records(data)), read(tmp_path / "o.jsonl"), strict=True):
        with torch.no_grad():
            ids, labels = torch.tensor([encoded.example.input_ids]), torch.tensor([encoded.example.labels])
            assert row["score_loss"] == pytest.approx(peer(ids, labels=labels).loss.item(), rel=1e-4)


# --- rewriting -------------------------------------------------------------------------------------------


def test_a_rewritten_text_is_the_model_s_own(ends_sentences, tmp_path):
    data = write(tmp_path / "a.jsonl", ROWS)
    counts, rows = refine(data, tmp_path / "o.jsonl", ends_sentences, batch_size=2)
    assert counts.texts["kept: no output"] == 1
    assert counts.texts["rewritten"] >= 2
    model = load_model(ends_sentences, quantize=None, dtype="fp32", device="cpu")
    tokenizer, template = load_tokenizer(ends_sentences), load_template("alpaca_short")
    stops = {tokenizer.eos_id, *model.config.eos_token_ids}
    for before, after in zip(ROWS, rows, strict=True):
        assert {name: after[name] for name in ("id", "instruction", "input")} == {
            name: before[name] for name in ("id", "instruction", "input")
        }
        if not before["output"]:
            assert after["output"] == ""
            continue
        ids = prompt_ids(tokenizer, template, Record.single("Once upon a time", before["output"]))
        tokens = list(generate_ids(model, ids, max_new_tokens=48, stop_ids=frozenset(stops)))
        text = tokenizer.decode(tokens[:-1]).strip()
        assert after["output"] == (text if tokens[-1] in stops and text else before["output"])


def test_every_round_of_a_conversation_is_rewritten_in_its_place(ends_sentences, tmp_path):
    turns = [("human", "Who?"), ("gpt", "A girl named Lily"), ("human", "Where?"), ("gpt", "She was in the park")]
    rows = [{"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}]
    data = write(tmp_path / "a.jsonl", rows)
    counts, (row,) = refine(data, tmp_path / "o.jsonl", ends_sentences)
    assert sum(counts.texts.values()) == 2
    assert [turn["from"] for turn in row["conversations"]] == [who for who, _ in turns]
    assert [row["conversations"][i]["value"] for i in (0, 2)] == ["Who?", "Where?"]
    assert counts.texts.get("rewritten") == sum(row["conversations"][i]["value"] != turns[i][1] for i in (1, 3))


def test_a_copy_of_the_row_does_not_stay_behind(ends_sentences, tmp_path):
    row = {**ROWS[0], "text": f"### Instruction:\n{ROWS[0]['instruction']}\n### Response:\n{ROWS[0]['output']}"}
    counts, (after,) = refine(write(tmp_path / "a.jsonl", [row]), tmp_path / "o.jsonl", ends_sentences)
    assert "text" not in after
    assert counts.texts["a column text that repeated the row left out"] == 1


def bare(**more):
    given = {"field": "output", "instruction": "Fix.", "input": None, "ratios": (0.5, 2.0), "batch_size": 1}
    return Rewriter(None, None, None, max_new_tokens=4, **{**given, **more})


@pytest.mark.parametrize(
    ("new", "stopped", "fault"),
    [
        ("0123456789", True, None),
        ("01234", True, None),
        ("0123", True, "too short"),
        ("0" * 20, True, None),
        ("0" * 21, True, "too long"),
        ("", True, "empty"),
        ("0123456789", False, "not ended by the model"),
    ],
)
def test_what_is_kept(new, stopped, fault):
    assert bare().fault("  0123456789\n", new, stopped) == fault


def test_what_the_model_is_asked(stories260k):
    tokenizer, template = load_tokenizer(stories260k), load_template("alpaca_short")
    turn = Round("{output} q", "in", "the {input} answer")

    def asked(**more):
        rewriter = bare(**more)
        object.__setattr__(rewriter, "tokenizer", tokenizer)
        object.__setattr__(rewriter, "template", template)
        return tokenizer.decode(rewriter.prompt(turn))

    assert "Fix." in asked()
    assert "the {input} answer" in asked()
    # The text stands where the instruction says, filled in once; nothing is asked beside it.
    assert "Fix the {input} answer in it" in asked(instruction="Fix {output} in it")
    assert "### Input" not in asked(instruction="Fix {output} in it")
    assert "of {output} q" in asked(input="of {instruction}")


def test_sampling_gives_the_same_rows_in_any_batch(ends_sentences, tmp_path):
    data = write(tmp_path / "a.jsonl", ROWS * 3)
    more = {"temperature": 1.0, "seed": 5}
    _, first = refine(data, tmp_path / "o.jsonl", ends_sentences, batch_size=1, **more)
    _, again = refine(data, tmp_path / "p.jsonl", ends_sentences, batch_size=7, **more)
    assert first == again
    _, other = refine(data, tmp_path / "q.jsonl", ends_sentences, batch_size=7, temperature=1.0, seed=6)
    assert first != other
    assert len({row["output"] for row in first}) > 4  # the same row twice is not the same text twice


# --- going on --------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_where_it_stopped(ends_sentences, tmp_path, monkeypatch):
    data = write(tmp_path / "a.jsonl", [{**ROWS[i % 2], "id": i} for i in range(96)])
    whole, output = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    output.mkdir()
    more = {"batch_size": 2, "temperature": 1.0, "max_new_tokens": 8}
    _, expected = refine(data, whole / "o.jsonl", ends_sentences, **more)
    flags = ["--mode", "rewrite", "--data_path", str(data), "--output_path", str(output / "o.jsonl")]
    flags += ["--base_model", str(ends_sentences), "--instruction", "Once upon a time", "--dtype", "fp32"]
    flags += ["--prompt_template_name", "alpaca_short", "--device", "cpu", "--quantize", "none", "--batch_size", "2"]
    flags += ["--max_new_tokens", "8", "--temperature", "1.0", "--max_length_ratio", "9", "--min_length_ratio", "0"]
    part = output / ".o.jsonl.part"
    process = subprocess.Popen(
        [sys.executable, "-m", "jindo_core.cli.main", "data", "refine", *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 2):
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    lines = part.read_bytes().splitlines(keepends=True)
    assert 2 <= len(lines) <= 4
    assert not (output / "o.jsonl").exists()
    part.write_bytes(b"".join(lines[:2]) + b'{"key": "33", "ro')  # the second chunk's line cut short
    # Another run's settings are refused, and what is there stays.
    held = part.read_bytes()
    with pytest.raises(InputError, match="of a run with another seed: take its settings"):
        refine(data, output / "o.jsonl", ends_sentences, **{**more, "seed": 1})
    assert part.read_bytes() == held
    chunks = []
    work = Rewriter.__call__
    monkeypatch.setattr(Rewriter, "__call__", lambda self, rows: chunks.append(rows[0][0]) or work(self, rows))
    counts, rows = refine(data, output / "o.jsonl", ends_sentences, **more)
    assert counts.resumed == 32
    assert rows == expected
    assert chunks == [33, 65]  # cut as the uninterrupted run's


@pytest.mark.parametrize(
    "change",
    [
        "instruction", "data_path", "prompt_template_name", "lora_weights", "base_model", "max_new_tokens",
        "max_length_ratio",
    ],
)
def test_what_a_run_depends_on_is_kept_and_named(change, ends_sentences, tmp_path, monkeypatch):
    data = write(tmp_path / "a.jsonl", ROWS)

    def stop(*_, **__):
        raise KeyboardInterrupt

    base = shutil.copytree(ends_sentences, tmp_path / "base")
    with monkeypatch.context() as patched:
        patched.setattr("jindo_core.refine._write", stop)
        with pytest.raises(KeyboardInterrupt):
            refine(data, tmp_path / "o.jsonl", base)
    more = {}
    if change == "data_path":
        write(data, ROWS[::-1])
    elif change == "prompt_template_name":
        more["prompt_template_name"] = "alpaca"
    elif change == "lora_weights":
        model = attach_lora(load_model(ends_sentences, dtype="fp32", device="cpu"), r=2)
        torch.nn.init.ones_(next(layer for _, layer in adapted_layers(model)).lora_B)
        more["lora_weights"] = str(save_adapter(model, tmp_path / "adapter", base_model=str(ends_sentences)))
    elif change == "base_model":  # another model of the same shapes: files of the same names and sizes
        weights = next(iter(base.glob("*.safetensors")), None) or next(base.glob("*.bin"))
        held = bytearray(weights.read_bytes())
        held[-4:] = bytes(byte ^ 1 for byte in held[-4:])
        weights.write_bytes(held)
    else:
        more[change] = {"instruction": "Two", "max_new_tokens": 9, "max_length_ratio": 8}[change]
    with pytest.raises(InputError, match=f"of a run with another {change}: take"):
        refine(data, tmp_path / "o.jsonl", base, **more)
    counts, _ = refine(data, tmp_path / "o.jsonl", base, **more, restart=True)
    assert counts.resumed == 0


def test_the_source_is_never_the_output(tmp_path):
    data = str(write(tmp_path / "a.jsonl", ROWS))
    with pytest.raises(InputError, match="which is --data_path too"):
        RefineConfig(data_path=data, output_path=data, overwrite=True, mode="score")


def test_all_done_but_the_writing_needs_no_model(ends_sentences, tmp_path, monkeypatch):
    data = write(tmp_path / "a.jsonl", ROWS)

    def fail(*_, **__):
        raise OSError("no more room")

    with monkeypatch.context() as patched:
        patched.setattr("jindo_core.refine._write", fail)
        with pytest.raises(OSError, match="no more room"):
            refine(data, tmp_path / "o.jsonl", ends_sentences)
    monkeypatch.setattr("jindo_core.refine.load_model", fail)
    counts, rows = refine(data, tmp_path / "o.jsonl", ends_sentences)
    assert counts.resumed == counts.rows == len(rows) == 4


def test_a_row_that_can_not_be_read_is_an_error_before_the_model_is_loaded(ends_sentences, tmp_path, monkeypatch):
    data = write(tmp_path / "a.jsonl", [*ROWS, {"instruction": "x", "output": 3}])
    monkeypatch.setattr("jindo_core.refine.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError, match=r"row 5 \(line 5\).*'output' is the number 3"):
        refine(data, tmp_path / "o.jsonl", ends_sentences)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
