"""MMLU as qlora.py measures it: held to transformers' model on real questions, and inside a training run."""

from __future__ import annotations

import json
import math

import pytest
import torch

from jindo_core import train as training
from jindo_core.cli.main import main
from jindo_core.config import resolve_train_config
from jindo_core.errors import InputError
from jindo_core.loader import load_model
from jindo_core.mmlu import LETTERS, Mmlu, Scores, load_mmlu
from jindo_core.parallel import Ranks
from jindo_core.tokenizer import load_tokenizer

QUESTIONS = "data/en/mmlu/zero_shot_mmlu_val.json"


def row(subject="stones", text="Which one is heavy?\nA. a\nB. b\nC. c\nD. d\nAnswer:", answer="A", **more):
    return {"subject": subject, "input": text, "output": answer, **more}


@pytest.fixture
def file(tmp_path):
    """Writes rows as JSON lines; returns the path."""

    def write(*rows, name="questions.json", text=None):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)) if text is None else text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def real(assets):
    """Every fortieth of the real questions: 39 of them, of some 30 subjects."""
    lines = (assets / QUESTIONS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[::40]]


# The oracle -----------------------------------------------------------------------------------------------


def qloras_predictions(model, encode, bos, eos, rows, longest):
    """qlora.py's computation with transformers' model, a row at a time: (the answers, the mean loss of the letter)."""
    letters = [encode(letter)[0] for letter in LETTERS]
    predictions, losses = [], []
    for one in rows:
        source = [*bos, *encode(one["input"])]
        if len(source) > longest:
            source = [*bos, *source[len(source) - longest + len(bos) :]]
        ids = torch.tensor([[*source, *encode(one["output"]), eos]])
        labels = ids.clone()
        labels[:, : len(source)] = -100
        with torch.no_grad():
            logits = model(ids).logits[0]
        before_first = int((labels[0] != -100).nonzero()[0]) - 1
        predictions.append(int(logits[before_first][letters].argmax()))
        losses.append(float(-logits[before_first].log_softmax(-1)[ids[0, before_first + 1]]))
    return predictions, sum(losses) / len(losses)


def compare(folder, theirs, encode, bos, eos, rows, path, longest):
    """Ours beside theirs; returns our scores. path: a file, or a folder with qlora's names."""
    mmlu = load_mmlu(path, load_tokenizer(folder), source_max_len=longest)
    assert 0 < mmlu.cut < len(rows)
    got = mmlu.ask(load_model(folder, quantize="none", dtype="fp32", device="cpu"), batch_size=4)
    predictions, loss = qloras_predictions(theirs.eval(), encode, bos, eos, rows, longest)
    assert list(got.predictions) == predictions
    assert got.loss == pytest.approx(loss, rel=1e-4)
    right = {}
    for one, answer in zip(rows, predictions, strict=True):
        right.setdefault(one["subject"], []).append(LETTERS[answer] == one["output"])
    means = {subject: sum(marks) / len(marks) for subject, marks in right.items()}
    assert got.accuracy == pytest.approx(sum(means.values()) / len(means))
    metrics = got.metrics()
    assert {name: metrics[f"mmlu_eval_accuracy_{name}"] for name in means} == means
    assert metrics["mmlu_eval_accuracy"] == got.accuracy
    return got


def drawn(stories15m, folder, context):
    """A model whose weights are drawn at random, saved; LLaMA's tokenizer beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=context, initializer_range=0.3,
    ))  # fmt: skip
    theirs.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((stories15m / "tokenizer.model").read_bytes())
    return folder, theirs


@pytest.mark.parametrize("weights", ["trained", "drawn"])
def test_as_transformers_answers(stories15m, real, file, tmp_path, weights):
    """A story teller answers A to everything; one whose weights are drawn at random answers this and that."""
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoModelForCausalLM

    pieces = SentencePieceProcessor(model_file=str(stories15m / "tokenizer.model"))
    if weights == "trained":
        folder, theirs = stories15m, AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)
    else:
        folder, theirs = drawn(stories15m, tmp_path / "drawn", 256)
    got = compare(folder, theirs, pieces.encode, [pieces.bos_id()], pieces.eos_id(), real, file(*real), 200)
    assert (len(set(got.predictions)) == 4) is (weights == "drawn")


@pytest.fixture(scope="module")
def five_shot(assets):
    """Questions as qlora's five-shot files have them, one of each subject: five others with their answers go before it.
    (Made here: only its zero-shot file is among the assets.)"""
    of_subject = {}
    for line in (assets / QUESTIONS).read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        of_subject.setdefault(one["subject"], []).append(one)
    rows = []
    for subject, (*shots, asked) in ((name, found[:6]) for name, found in of_subject.items()):
        header = asked["input"].split("\n\n", 1)[0]
        told = [f"{shot['input'].removeprefix(header).strip()} {shot['output']}" for shot in shots]
        text = "\n\n".join([header, *told, asked["input"].removeprefix(header).strip()])
        rows.append({"subject": subject, "input": text, "output": asked["output"]})
    return rows


def test_five_shot_questions_as_transformers_answers(stories15m, five_shot, file, tmp_path):
    """From a folder, of which the five-shot file is the default. Those too long keep the question, and the shots next
    to it."""
    from sentencepiece import SentencePieceProcessor

    asked = five_shot[::2]
    pieces = SentencePieceProcessor(model_file=str(stories15m / "tokenizer.model"))
    folder, theirs = drawn(stories15m, tmp_path / "drawn", 1024)
    path = file(*asked, name="five_shot_mmlu_val.json")
    file(row(), name="zero_shot_mmlu_val.json")
    got = compare(folder, theirs, pieces.encode, [pieces.bos_id()], pieces.eos_id(), asked, path.parent, 640)
    assert len(set(got.predictions)) == 4
    tokenizer = load_tokenizer(folder)
    for kept, one in zip(load_mmlu(path, tokenizer, source_max_len=640).questions, asked, strict=True):
        ending = one["input"].rsplit("\n\n", 1)[1]
        assert tokenizer.decode(kept.ids).endswith(ending[-200:])
        assert len(kept.ids) <= 640


@pytest.mark.slow
def test_as_smollm2_answers_in_transformers(smollm2_gguf, real, file):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(smollm2_gguf.parent), smollm2_gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    got = compare(smollm2_gguf, theirs, encode, [], tokenizer.eos_token_id, real, file(*real), 200)
    assert len(set(got.predictions)) > 1


def test_batches_change_nothing_and_the_mode_stays(stories15m, real, file):
    model = load_model(stories15m, quantize="nf4", dtype="fp32", device="cpu")
    mmlu = load_mmlu(file(*real[:12]), load_tokenizer(stories15m), source_max_len=128, context=100)
    assert max(len(question.ids) for question in mmlu.questions) == 100
    model.train()
    one, five = mmlu.ask(model, batch_size=1), mmlu.ask(model, batch_size=5)
    assert model.training
    assert one.predictions == five.predictions
    assert one.loss == pytest.approx(five.loss, rel=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_parts_are_one_process_s_answers(stories15m, real, file, sharded, monkeypatch):
    """To the last bit, for they ask the same batches; with shards all run as many passes."""
    model = load_model(stories15m, quantize="nf4", dtype="fp32", device="cpu")
    mmlu = load_mmlu(file(*real[:11]), load_tokenizer(stories15m), source_max_len=64)
    logits, passes = Mmlu._logits, []
    monkeypatch.setattr(Mmlu, "_logits", lambda *given: passes.append(1) or logits(*given))
    whole = mmlu.ask(model, batch_size=2)
    assert len(passes) == 6
    shares, counts = [], []
    for rank in range(4):
        passes.clear()
        shares.append(mmlu.ask_share(model, batch_size=2, ranks=Ranks(rank, 4, sharded=sharded)))
        counts.append(len(passes))
    assert counts == ([2] * 4 if sharded else [2, 2, 1, 1])
    assert sorted(i for share in shares for asked, _, _ in share for i in asked) == list(range(11))
    assert mmlu.scores(shares) == whole == mmlu.scores(shares[::-1])


# Scores and rows ------------------------------------------------------------------------------------------


def test_a_subject_counts_once_however_many_questions_it_has():
    scores = Scores("test", (), {"a": (3, 3), "b": (0, 1)}, 1.5)
    assert scores.accuracy == 0.5
    assert scores.metrics() == {
        "mmlu_loss": 1.5, "mmlu_test_accuracy": 0.5, "mmlu_test_accuracy_a": 1.0, "mmlu_test_accuracy_b": 0.0,
    }  # fmt: skip


def test_rows_as_a_list_or_as_lines_and_the_first_of_them(stories15m, file):
    rows = [row(answer=letter) for letter in "ABCD"]
    tokenizer = load_tokenizer(stories15m)
    lines = load_mmlu(file(*rows, text="\n\n".join(map(json.dumps, rows))), tokenizer)
    assert [question.answer for question in lines.questions] == [0, 1, 2, 3]
    assert load_mmlu(file(text="\ufeff" + json.dumps(rows, indent=1)), tokenizer).questions == lines.questions
    assert len(load_mmlu(file(*rows), tokenizer, max_samples=3).questions) == 3


def test_a_long_question_loses_its_beginning_and_keeps_bos(stories15m, file):
    tokenizer = load_tokenizer(stories15m)
    whole = load_mmlu(file(row()), tokenizer).questions[0].ids
    cut = load_mmlu(file(row()), tokenizer, source_max_len=9)
    assert cut.questions[0].ids == (tokenizer.bos_id, *whole[-8:])
    assert cut.cut == 1
    assert load_mmlu(file(row()), tokenizer, source_max_len=len(whole)).cut == 0


@pytest.mark.parametrize(
    ("dataset", "split", "name"),
    [
        ("mmlu-fs", "eval", "five_shot_mmlu_val.json"),
        ("mmlu", "test", "five_shot_mmlu_test.json"),
        ("mmlu-zs", "eval", "zero_shot_mmlu_val.json"),
        ("mmlu-zs", "test", "zero_shot_mmlu_test.json"),
    ],
)
def test_qloras_files_are_found_in_a_folder(stories15m, file, tmp_path, dataset, split, name, monkeypatch):
    tokenizer = load_tokenizer(stories15m)
    path = file(row(name), name=name)
    found = load_mmlu(path.parent, tokenizer, dataset=dataset, split=split)
    assert (found.questions[0].subject, found.split) == (name, split)
    other = "mmlu-zs" if dataset != "mmlu-zs" else "mmlu-fs"
    with pytest.raises(InputError, match=f"does not exist: .* holds {name}: choose with --mmlu_dataset"):
        load_mmlu(path.parent, tokenizer, dataset=other, split=split)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mmlu").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_mmlu(None, tokenizer, dataset=dataset, split=split).questions == found.questions


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "has no rows"),
        ("[]", "has no rows"),
        ("{\n", "line 1: broken JSON"),
        ('{"a": 1}\n{', "line 1 has a and no 'subject'"),
        ("[1]", "row 1: got a int, expected an object with subject, input, output"),
        (json.dumps(row(answer="E")), "line 1: the output is 'E', expected one of A, B, C, D"),
        (json.dumps(row(answer=0)), "line 1 has no text in 'output'"),
        (json.dumps(row()) + "\n" + json.dumps({"subjekt": "x", "input": "y"}), "line 2 has subjekt, input and no"),
        (json.dumps(row()) + "\n" + json.dumps({"subjekt": "x", "input": "y"}), "Did you mean 'subjekt'?"),
        ("[\n1,\n}", "line 3: broken JSON"),
    ],
)
def test_what_is_no_question_is_named(stories15m, file, text, part):
    with pytest.raises(InputError) as caught:
        load_mmlu(file(text=text), load_tokenizer(stories15m))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_and_no_file(stories15m, tmp_path):
    tokenizer = load_tokenizer(stories15m)
    (tmp_path / "x.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"is no UTF-8 \(byte 0\)"):
        load_mmlu(tmp_path / "x.json", tokenizer)
    with pytest.raises(InputError, match=r"none\.json does not exist: give --mmlu_path their file or folder"):
        load_mmlu(tmp_path / "none.json", tokenizer)


def test_letters_that_are_one_token_are_refused(stories15m, file, monkeypatch):
    tokenizer = load_tokenizer(stories15m)
    monkeypatch.setattr(tokenizer, "_encode", lambda text: [7])
    with pytest.raises(InputError, match="no tokens of their own for A, B, C, D"):
        load_mmlu(file(row()), tokenizer)


# In a run -------------------------------------------------------------------------------------------------


def test_a_run_asks_before_at_every_measuring_and_at_the_end(stories15m, tmp_path, file, capsys):
    """Rows that answer B to one question and C to another: both are learnt, and the model says so."""
    questions = [row("first", answer="B"), row("second", "Which one is light?\nAnswer:", "C")]
    rows = [{"instruction": one["input"], "output": " " + one["output"]} for one in questions] * 8
    data, out = tmp_path / "rows.json", tmp_path / "out"
    data.write_text(json.dumps(rows))
    template = tmp_path / "plain.yaml"
    lines = ["prompt_input: '{instruction} {input}'", "prompt_no_input: '{instruction}'", "response_split: 'Answer:'"]
    template.write_text("\n".join(lines))
    config, explicit, notices = resolve_train_config({
        "model_name_or_path": str(stories15m), "dataset": str(data), "output_dir": str(out), "max_steps": 30,
        "prompt_template_name": str(template), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "lora_r": 8, "learning_rate": 3e-3, "cutoff_len": 64, "eval_steps": 15, "device": "cpu", "bits": 4,
        "do_mmlu_eval": True, "mmlu_path": str(file(*questions)), "mmlu_split": "test", "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
    })  # fmt: skip
    training.train(config, explicit, notices)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    asked = [line for line in lines if "mmlu_test_accuracy" in line]
    assert [line["step"] for line in asked] == [0, 15, 30]
    assert asked[-1]["mmlu_test_accuracy"] == 1.0
    assert asked[-1]["mmlu_loss"] < 0.5 < asked[0]["mmlu_loss"]
    assert all(math.isfinite(line["mmlu_loss"]) for line in asked)
    said = capsys.readouterr().out
    assert "MMLU: 2 questions, asked before training, every 15 steps and at the end" in said
    assert "step 15  MMLU accuracy" in said
    assert "mean of the subjects" in said
    assert "nan" not in said


def test_missing_questions_are_an_error_before_the_model_is_loaded(stories15m, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([{"instruction": "a", "output": "b"}] * 3))
    monkeypatch.setattr("jindo_core.prepare.load_model", lambda *args, **more: pytest.fail("the model was loaded"))
    argv = ["train", "--base_model", str(stories15m), "--data_path", str(data), "--val_set_size", "0"]
    assert main([*argv, "--do_mmlu_eval"]) == 2
    assert "data/mmlu/five_shot_mmlu_val.json does not exist" in capsys.readouterr().err
