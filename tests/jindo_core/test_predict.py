"""A run with --do_predict: its held-out rows answered by the adapter it ends with, whatever stops it on the way."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from jindo_core import predict, predictions
from jindo_core import train as training
from jindo_core.adapters import WEIGHTS, load_adapter
from jindo_core.cli.main import main
from jindo_core.config import resolve_train_config
from jindo_core.data.examples import end_ids, prompt_ids
from jindo_core.data.records import Record
from jindo_core.data.templates import load_template
from jindo_core.errors import Stopped, TrainingError
from jindo_core.generation import generate
from jindo_core.loader import load_model
from jindo_core.tokenizer import load_tokenizer

ROWS = [{"instruction": f"Name animal {i}.", "input": "", "output": f"It is a {['cat', 'dog'][i % 2]}."}
        for i in range(30)]  # fmt: skip


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(training, "draw_loss", lambda *_: None)


@pytest.fixture
def settings(stories260k, tmp_path):
    """settings("out", …) -> what `train` takes: 4 steps, ten rows held out and answered."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")

    def make(out, **changes):
        return resolve_train_config({
            "base_model": str(stories260k), "data_path": str(tmp_path / "rows.json"), "output_dir": str(tmp_path / out),
            "batch_size": 4, "micro_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "cutoff_len": 96,
            "val_set_size": 10, "prompt_template_name": "alpaca_short", "device": "cpu", "dtype": "fp32",
            "save_steps": 3, "lora_r": 2, "train_on_inputs": False, "do_predict": True, "max_new_tokens": 6,
        } | changes)  # fmt: skip

    return make


@pytest.fixture
def stop_within(monkeypatch):
    """stop_within(n): SIGTERM as the n-th batch of answers is made."""

    def arrange(batch):
        answer, calls = predictions.answer, []

        def stopping(*given):
            calls.append(1)
            if len(calls) == batch:
                signal.raise_signal(signal.SIGTERM)
            return answer(*given)

        monkeypatch.setattr(predictions, "answer", stopping)
        return calls

    return arrange


@pytest.fixture
def answers_of(stories260k):
    """answers_of(adapter, lines) -> what `generate` says to each line's row."""
    tokenizer, template = load_tokenizer(stories260k), load_template("alpaca_short")

    def answered(adapter, told):
        model = load_model(stories260k, dtype="fp32", device="cpu")
        load_adapter(model, adapter)
        prompts = [prompt_ids(tokenizer, template, Record.single(ROWS[one["row"] - 1]["instruction"])) for one in told]
        assert [one["input"] for one in told] == [tokenizer.decode(prompt) for prompt in prompts]
        ends = end_ids(tokenizer, template)
        return [generate(model, tokenizer, prompt, max_new_tokens=6, ends=ends).strip() for prompt in prompts]

    return answered


def lines(folder):
    return [json.loads(line) for line in (folder / predict.FILE).read_text(encoding="utf-8").splitlines()]


def test_the_rows_held_out_are_answered_by_the_adapter_that_was_saved(settings, answers_of, tmp_path, capsys):
    result = training.train(*settings("out"))
    told = lines(tmp_path / "out")
    assert len(told) == 10
    assert [one["row"] for one in told] == sorted(one["row"] for one in told)
    for one in told:
        row = ROWS[one["row"] - 1]
        assert one["output"] == row["output"]
        assert row["instruction"] in one["input"]
        assert one["prediction_with_input"].startswith(one["input"])
        assert one["prediction_with_input"].endswith(one["prediction"])
    assert [one["prediction"] for one in told] == answers_of(tmp_path / "out", told)
    figures = json.loads((tmp_path / "out" / predict.FIGURES).read_text())
    assert figures["predict_loss"] == result.loss_after
    assert figures["predict_samples"] == 10
    assert figures["predict_exact_match"] == sum(one["prediction"] == one["output"].strip() for one in told) / 10
    assert figures["predict_ended"] == sum(one["ended"] == "end" for one in told) / 10
    said = " ".join(capsys.readouterr().out.split())
    assert "Answering 10 held-out rows" in said
    assert f"predictions.jsonl: 10 rows, exact match {figures['predict_exact_match']:.4f}" in said
    assert not list((tmp_path / "out").glob("*.part"))


def test_the_best_adapter_answers(settings, answers_of, tmp_path, monkeypatch):
    """Measured best after step 2 of 4."""
    losses = iter([3.0, 0.5, 2.0])
    monkeypatch.setattr(training, "held_out_sums", lambda *_, **__: (next(losses), 1))
    best = {"eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.1, "warmup_steps": 0}
    training.train(*settings("out", **best))
    assert json.loads((tmp_path / "out" / predict.FIGURES).read_text())["predict_loss"] == 0.5
    told = [one["prediction"] for one in lines(tmp_path / "out")]
    kept, last = (answers_of(tmp_path / "out" / name, lines(tmp_path / "out")) for name in CHECKPOINTS)
    assert told == kept != last


CHECKPOINTS = ("checkpoint-2", "checkpoint-4")


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 0.8, "top_k": 9, "top_p": 0.9}])
def test_stopped_while_it_answers_the_adapter_is_kept_and_resume_ends_the_same(
    settings, sampled, stop_within, tmp_path, monkeypatch
):
    monkeypatch.setattr(predict, "_ROWS_AT_ONCE", 4)
    training.train(*settings("whole", **sampled))
    calls = stop_within(2)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM within the predictions: .* --resume goes on") as caught:
        training.train(*settings("out", **sampled))
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert caught.value.code == 128 + signal.SIGTERM
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (out / "jindo_run.json").exists()
    assert not (out / predict.FILE).exists()
    calls.clear()
    calls += [1] * 2  # no more signals
    training.train(*settings("out", resume=True, **sampled))
    assert len(calls) == 2 + 2, "of three batches one was done"
    for name in (WEIGHTS, predict.FILE, predict.FIGURES):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert len({one["prediction"] for one in lines(out)}) > 1 or not sampled


def test_answers_of_another_adapter_are_not_gone_on_with_or_left(settings, stop_within, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "_ROWS_AT_ONCE", 4)
    calls = stop_within(2)
    with pytest.raises(Stopped):
        training.train(*settings("out"))
    calls += [1]
    training.train(*settings("out", overwrite_output_dir=True, learning_rate=3e-2))
    assert len(calls) == 3 + 3
    assert len(lines(tmp_path / "out")) == 10
    training.train(*settings("out", overwrite_output_dir=True, do_predict=False))
    assert not (tmp_path / "out" / predict.FILE).exists()
    assert not (tmp_path / "out" / predict.FIGURES).exists()


def test_rows_of_several_files_say_whose_they_are(settings, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps(ROWS[:8]), encoding="utf-8")
    paths = [str(tmp_path / name) for name in ("rows.json", "other.json")]
    training.train(*settings("out", data_path=paths, max_eval_samples=9))
    told = lines(tmp_path / "out")
    assert len(told) == 9
    assert {one["file"] for one in told} == {"rows.json", "other.json"}
    assert all(one["output"] == ROWS[one["row"] - 1]["output"] for one in told)


def test_sampled_answers_are_those_of_eval(settings, tmp_path):
    """A row draws from its number, whichever rows are asked beside it."""
    sampled = {"do_sample": True, "temperature": 0.8, "top_k": 20}
    training.train(*settings("out", **sampled))
    out = tmp_path / "out"
    words = f"eval --lora_weights {out} --tasks generation --data_path {tmp_path}/rows.json"
    words += " --temperature 0.8 --top_k 20 --max_new_tokens 6 --device cpu --dtype fp32"
    words += f" --predictions_path {tmp_path}/eval.jsonl"
    assert main(words.split()) == 0
    asked = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    said = {one["row"]: one["prediction"].strip() for one in asked}
    assert [one["prediction"] for one in lines(out)] == [said[one["row"]] for one in lines(out)]
    assert len({one["prediction"] for one in lines(out)}) > 3


def test_a_row_of_each_file_draws_on_its_own():
    questions = [predictions.Question(row, Record.single("x"), (1,), file) for file in (0, 1) for row in (1, 2)]
    assert len({predictions._seed(42, one) for one in questions}) == 4


def test_what_a_stopped_run_answered_goes_with_its_adapter(settings, stop_within, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "_ROWS_AT_ONCE", 4)
    stop_within(2)
    with pytest.raises(Stopped):
        training.train(*settings("out"))
    assert (tmp_path / "out" / "predictions.jsonl.part").exists()
    training.train(*settings("out", overwrite_output_dir=True, do_predict=False))
    assert not (tmp_path / "out" / "predictions.jsonl.part").exists()


def test_the_results_are_told_before_the_answers(settings, tmp_path, capsys, stop_within):
    training.train(*settings("out", json=True))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    order = [one["event"] for one in found if one["event"] in ("results", "predictions")]
    assert order == ["results", "predictions"]
    figures = json.loads((tmp_path / "out" / predict.FIGURES).read_text())
    assert found[-1 - [one["event"] for one in reversed(found)].index("predictions")]["figures"] == figures
    stop_within(1)
    with pytest.raises(Stopped):
        training.train(*settings("other", json=True))
    assert [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()].count("results") == 1


def test_halves_and_an_answer_too_large(settings, tmp_path, monkeypatch):
    answer, sizes = predictions.answer, []

    def tight(most, *given):
        sizes.append(len(given[-1]))
        if len(given[-1]) > most:
            raise torch.OutOfMemoryError("out of memory")
        return answer(*given)

    monkeypatch.setattr(predictions, "answer", lambda *given: tight(4, *given))
    training.train(*settings("out"))
    assert sizes == [8, 4, 4, 2]
    monkeypatch.setattr(predictions, "answer", lambda *given: tight(0, *given))
    with pytest.raises(TrainingError, match="no memory to answer a held-out row: the adapter is saved; lower --max"):
        training.train(*settings("other"))
    assert (tmp_path / "other" / WEIGHTS).exists()


def test_a_full_disk_costs_the_answers_alone(settings, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict, "write_atomically", full)
    with pytest.raises(TrainingError, match=r"predictions\.jsonl could not be written to .*No space left on device"):
        training.train(*settings("out"))
    assert (tmp_path / "out" / WEIGHTS).exists()
    assert (tmp_path / "out" / "predictions.jsonl.part").exists()


def test_qloras_command_line_predicts(stories260k, tmp_path, capsys):
    """qlora.py's flags, and its defaults beside them."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    given = f"--model_name_or_path {stories260k} --dataset {tmp_path}/rows.json --output_dir {tmp_path}/out"
    given += " --do_predict --predict_with_generate --eval_dataset_size 5 --max_steps 1 --max_new_tokens 4 --lora_r 2"
    given += " --bits 4 --source_max_len 64 --target_max_len 16 --gradient_accumulation_steps 2 --num_beams 1"
    assert main(["train", *given.split(), "--device", "cpu"]) == 0
    assert len(lines(tmp_path / "out")) == 5
    assert all("### Response:" in one["input"] for one in lines(tmp_path / "out"))
    assert "no effect" not in capsys.readouterr().out
