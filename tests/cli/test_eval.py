"""`jindo-core eval`: a run of each task, one that is stopped and goes on, and one line for what is wrong."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

from jindo_core import evaluation
from jindo_core.adapters import save_adapter
from jindo_core.cli.main import main
from jindo_core.likelihood import Score
from jindo_core.loader import load_model
from jindo_core.lora import adapted_layers, attach_lora
from jindo_core.mmlu import Mmlu, load_mmlu
from jindo_core.progress import ConversionView
from jindo_core.tokenizer import load_tokenizer

STORY = "Once upon a time there was a little dog named Max.\nHe liked to run in the park.\n" * 12
COPA = "sentence\tquestion\t1\t2\tAnswer\n" + "".join(
    f"{i}번째 날 비가 왔다.\t{'결과' if i % 2 else '원인'}\t길이 젖었다.\t해가 {'길게 ' * (i % 3)}떴다.\t{1 + i % 2}\n"
    for i in range(7)
)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    (tmp_path / "kobest").mkdir()
    (tmp_path / "kobest" / "COPA.test.tsv").write_text(COPA, encoding="utf-8")
    return tmp_path


@pytest.fixture
def command(stories260k, data):
    paths = [str(data / "story.txt"), str(data / "kobest")]
    return [
        "eval", "--base_model", str(stories260k), "--device", "cpu", "--dtype", "fp32", "--batch_size", "2",
        "--tasks", "perplexity,kobest_copa", "--data_path", *paths, "--window", "64",
    ]  # fmt: skip


def saved(data, name="results.json"):
    return ["--output_path", str(data / name), "--predictions_path", str(data / f"{name}l")]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_of_both_says_and_writes_all(command, data, capsys):
    assert main([*command, "--quantize", "both", *saved(data)]) == 0
    said = capsys.readouterr().out
    for part in ("NF4", "not quantized (float32)", "difference", "answers changed", "kobest_copa", "bits_per_byte"):
        assert part in said
    assert "\x1b" not in said  # no bar, no colours without a terminal
    report = read(data / "results.json")
    assert str(data) not in json.dumps(report)  # files by their names
    assert report["settings"]["data"]["perplexity"]["file"] == "story.txt"
    lines = [json.loads(line) for line in (data / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    for kept in ("nf4", "none"):
        figures, told = report["results"][kept], [line for line in lines if line["quantize"] == kept]
        asked = [line for line in told if line["task"] == "kobest_copa"]
        assert [line["row"] for line in asked] == list(range(1, 8))
        assert figures["kobest_copa"]["acc"] == sum(line["correct"] for line in asked) / 7
        windows = [line for line in told if line["task"] == "perplexity"]
        nats = sum(line["nats_per_token"] * line["tokens"] for line in windows)
        nats /= sum(line["tokens"] for line in windows)
        assert figures["perplexity"]["perplexity"] == pytest.approx(math.exp(nats))
        assert figures["perplexity"]["bytes"] == len(STORY.encode())
    drift = report["drift"]
    changed = [a["choice"] != b["choice"] for a, b in zip(*_both(lines), strict=True)]
    assert drift["kobest_copa"]["answers_changed"] == sum(changed)
    nf4, whole = (report["results"][kept]["perplexity"]["perplexity"] for kept in ("nf4", "none"))
    assert drift["perplexity"]["perplexity"] == nf4 - whole != 0
    assert not (data / "results.json.part").exists()


def _both(lines):
    return ([one for one in lines if "choice" in one and one["quantize"] == kept] for kept in ("nf4", "none"))


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(command, data, monkeypatch, capsys):
    real, calls = evaluation.score, []

    def stopping(*arguments, **more):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **more)

    assert main([*command, "--quantize", "both", *saved(data, "whole.json")]) == 0
    monkeypatch.setattr(evaluation, "score", stopping)
    both = [*command, "--quantize", "both", *saved(data)]
    assert main(both) == 130
    assert not (data / "results.json").exists()
    with (data / "results.json.part").open("ab") as file:
        file.write(b'{"key": "nf4/perpl')  # and torn within a line
    done = []
    monkeypatch.setattr(evaluation, "score", lambda *a, **more: done.append(1) or real(*a, **more))
    capsys.readouterr()
    assert main(both) == 0
    assert "going on: 7 batches were done before" in capsys.readouterr().out
    monkeypatch.setattr(evaluation, "score", lambda *a, **more: calls.append(1) or real(*a, **more))
    calls.clear()
    assert main([*command, "--quantize", "both"]) == 0
    assert len(done) == len(calls) - 7
    assert (data / "results.json").read_bytes() == (data / "whole.json").read_bytes()
    assert (data / "results.jsonl").read_bytes() == (data / "whole.jsonl").read_bytes()


def test_killed_without_warning_it_goes_on(command, data):
    (data / "story.txt").write_text(STORY * 3, encoding="utf-8")
    argv = [*command, "--stride", "8", *saved(data)]
    assert main([*command, "--stride", "8", *saved(data, "whole.json")]) == 0
    part = data / "results.json.part"
    with subprocess.Popen([sys.executable, "-m", "jindo_core.cli.main", *argv]) as process:
        while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 5):
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -9
    assert main(argv) == 0
    assert (data / "results.json").read_bytes() == (data / "whole.json").read_bytes()


def test_a_terminal_has_a_bar_also_where_the_end_is_unknown():
    view = ConversionView()
    view.console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with view.bar("nf4/perplexity", None, in_bytes=False) as advance:
        advance(3)
    said = view.console.file.getvalue()
    assert "nf4/perplexity" in said
    assert "3/?" in said


def test_an_adapter_brings_its_base_and_changes_the_figures(stories260k, command, data):
    model = load_model(stories260k, dtype="fp32", device="cpu")
    attach_lora(model, r=2, alpha=4)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    adapter = save_adapter(model, data / "adapter", base_model=str(stories260k))
    assert main([*command, *saved(data, "bare.json")]) == 0
    without_base = [*command[:1], *command[3:], "--lora_weights", str(adapter)]
    assert main([*without_base, *saved(data)]) == 0
    bare, adapted = (read(data / name)["results"]["nf4"]["perplexity"] for name in ("bare.json", "results.json"))
    assert bare["tokens"] == adapted["tokens"]
    assert abs(bare["perplexity"] - adapted["perplexity"]) > 0.01


@pytest.fixture
def questions(assets):
    return assets / "data/en/mmlu/zero_shot_mmlu_val.json"


@pytest.fixture
def mmlu_command(stories15m, questions):
    argv = ["eval", "--base_model", str(stories15m), "--device", "cpu", "--dtype", "fp32", "--tasks", "mmlu"]
    return [*argv, "--data_path", str(questions), "--limit", "24", "--batch_size", "5", "--mmlu_source_max_len", "48"]


def test_mmlu_is_what_train_measures(stories15m, questions, mmlu_command, data):
    assert main([*mmlu_command, *saved(data)]) == 0
    figures = read(data / "results.json")["results"]["nf4"]["mmlu"]
    model = load_model(stories15m, dtype="fp32", device="cpu")
    tokenizer = load_tokenizer(stories15m)
    asked = load_mmlu(questions, tokenizer, max_samples=24, source_max_len=48, context=model.config.context)
    scores = asked.ask(model, batch_size=24)
    assert figures["acc"] == scores.accuracy
    assert figures["loss"] == pytest.approx(scores.loss, rel=1e-5)
    assert figures["cut"] == asked.cut > 0
    for subject, (right, count) in scores.subjects.items():
        assert figures[f"acc_{subject}"] == right / count
        assert figures[f"n_acc_{subject}"] == count
    lines = (data / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert tuple(json.loads(line)["choice"] for line in lines) == scores.predictions


@pytest.mark.parametrize(
    ("words", "name"),
    [([], "five_shot_mmlu_val"), (["--mmlu_dataset", "mmlu-zs", "--mmlu_split", "test"], "zero_shot_mmlu_test")],
)
def test_mmlus_folder_and_which_of_its_files(words, name, mmlu_command, questions, data):
    for other in ("five_shot_mmlu_val", "zero_shot_mmlu_val", "five_shot_mmlu_test", "zero_shot_mmlu_test"):
        row = {"subject": other, "input": "Which one?\nAnswer:", "output": "A"}
        (data / f"{other}.json").write_text(json.dumps(row))
    argv = [str(data) if word == str(questions) else word for word in mmlu_command]
    assert main([*argv, *words, *saved(data)]) == 0
    assert f"acc_{name}" in read(data / "results.json")["results"]["nf4"]["mmlu"]


def test_what_cannot_be_shown_is_written(mmlu_command, data, monkeypatch):
    def fails(*_):
        raise RuntimeError("the display is broken")

    monkeypatch.setattr(ConversionView, "evaluation", fails)
    with pytest.raises(RuntimeError, match="the display is broken"):
        main([*mmlu_command, "--limit", "3", *saved(data)])
    assert read(data / "results.json")["results"]["nf4"]["mmlu"]["n"] == 3


def test_mmlus_batches_are_halved_where_memory_runs_out(mmlu_command, data, monkeypatch):
    assert main([*mmlu_command, *saved(data, "whole.json")]) == 0
    logits, sizes = Mmlu._logits, []

    def tight(self, model, texts):
        sizes.append(len(texts))
        if len(texts) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return logits(self, model, texts)

    monkeypatch.setattr(Mmlu, "_logits", tight)
    assert main([*mmlu_command, *saved(data)]) == 0
    assert sizes == [5, 2, 3, 1, 2] * 4 + [4, 2, 2]
    whole, halved = (read(data / name)["results"]["nf4"]["mmlu"] for name in ("whole.json", "results.json"))
    assert halved == pytest.approx(whole, rel=1e-5)
    assert (data / "results.jsonl").read_bytes() == (data / "whole.jsonl").read_bytes()


def test_a_model_that_says_nothing_finite_stops_the_run(command, data, monkeypatch, capsys):
    nan = lambda model, requests, pad_id: [Score(math.nan, False)] * len(requests)  # noqa: E731
    monkeypatch.setattr(evaluation, "score", nan)
    assert main([*command, *saved(data)]) == 1
    assert "nf4/perplexity: the model's log-probabilities are not finite" in capsys.readouterr().err


def fails(capsys, argv, message):
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--tasks: got nothing, expected some of perplexity, mmlu, generation, kobest_boolq"),
        (["--tasks", "kobest_copa"], "--data_path: got nothing, expected the file or folder that each task reads"),
        (["--tasks", "perplexty", "--data_path", "x"], "--tasks: got 'perplexty', expected some of"),
        (["--tasks", "perplexty", "--data_path", "x"], "Did you mean 'perplexity'?"),
        (["--tasks", "a/b", "--data_path", "x"], "expected a list of tasks such as perplexity,kobest"),
        (["--tasks", "perplexity,kobest", "--data_path", "x.txt"], "for kobest_boolq, expected kobest_boolq=PATH"),
        (["--tasks", "perplexity,kobest_wic", "--data_path", "a.txt", "b.txt"], "got a.txt and b.txt for perplexity"),
        (["--tasks", "perplexity", "--data_path", "mmlu=x.json"], "mmlu=x.json, which none of --tasks perplexity"),
        (["--tasks", "perplexity", "--data_path", "gone.txt"], "expected a readable text file"),
        (["--tasks", "perplexity", "--data_path", "x.txt", "--window", "300"], "at most the model's context of 256"),
        (["--tasks", "perplexity", "--data_path", "x.txt", "--lora_weights", "a"], "lora_weights a is no folder"),
        (["--tasks", "kobest_wic", "--data_path", "gone"], "gone does not exist"),
        (["--tasks", "mmlu", "--data_path", "gone.json"], "gone.json does not exist"),
        (["--tasks", "perplexity", "--data_path", "x", "--limit", "0"], "--limit: got '0', expected a whole number of"),
        (["--tasks", "perplexity", "--data_path", "x", "--quantize", "8"], "--quantize: got '8', expected one of nf4"),
        (["--tasks", "perplexity", "--data_path", "x", "--output", "y"], "Did you mean '--output_path'?"),
        (["--tasks", "perplexity", "--data_path", "x", "--output_path", "no/r.json"], "expected it in a folder that"),
        (
            ["--tasks", "perplexity", "--data_path", "x", "--output_path", "r", "--predictions_path", "r"],
            "--predictions_path: got --output_path's r, expected another file",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_loads_no_model(stories15m, capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "load_model", lambda *a, **more: pytest.fail("the model was loaded"))
    fails(capsys, ["eval", "--base_model", str(stories15m), *argv], message)


def test_results_are_not_replaced_unless_told(command, data, capsys):
    assert main([*command, *saved(data)]) == 0
    first = read(data / "results.json")
    fails(capsys, [*command, *saved(data)], "is there already, expected another name, or --overwrite")
    assert main([*command, *saved(data), "--overwrite"]) == 0
    assert read(data / "results.json") == first


def test_data_that_changed_is_not_mixed_with_what_was_done(command, data, monkeypatch, capsys):
    score, calls = evaluation.score, []

    def stopped(*given, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*given, **more)

    monkeypatch.setattr(evaluation, "score", stopped)
    assert main([*command, *saved(data)]) == 130
    monkeypatch.undo()
    capsys.readouterr()
    (data / "story.txt").write_text(STORY + "And so on.\n", encoding="utf-8")
    fails(capsys, [*command, *saved(data)], "is of a run with another data: take its settings")


def test_a_text_too_short_is_named(command, data, capsys):
    (data / "story.txt").write_text("", encoding="utf-8")
    fails(capsys, command, "holds no text: expected at least two tokens")


def test_task_and_path_can_be_named(command, data, capsys):
    shutil.copy(data / "kobest" / "COPA.test.tsv", data / "dogs.txt")
    argv = command[: command.index("--data_path")]
    paths = [f"perplexity={data / 'dogs.txt'}", f"kobest_copa={data / 'kobest' / 'COPA.test.tsv'}"]
    assert main([*argv, "--data_path", *paths, "--limit", "1", *saved(data)]) == 0
    assert "standard error" in capsys.readouterr().out
    figures = read(data / "results.json")["results"]["nf4"]
    assert figures["kobest_copa"]["n"] == figures["perplexity"]["n"] == 1
