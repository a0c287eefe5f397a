"""What a run ends with: the adapter first, whatever cannot be shown or written after; and the figures of that one."""

from __future__ import annotations

import json
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from short_runs import logged, rows_file, settings_of, signal_at

from jindo_core import evaluate, mmlu, outcome, run_card
from jindo_core import train as training
from jindo_core.adapters import WEIGHTS
from jindo_core.errors import InputError, Stopped, TrainingError
from jindo_core.mmlu import Mmlu, Scores
from jindo_core.run_record import read_run
from jindo_core.training_view import TrainingView


@pytest.fixture
def run(stories260k, tmp_path, monkeypatch):
    """run("out", …) trains; its folder."""
    monkeypatch.setattr(outcome, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(training, "draw_loss", lambda *_: None)

    def start(out, **changes):
        training.train(*settings_of(stories260k, rows_file(tmp_path), tmp_path / out, **changes))
        return tmp_path / out

    return start


@pytest.fixture
def questions(tmp_path, monkeypatch):
    """Settings of a run that asks two; of other letters: this small tokenizer has none of its own for A, C and D."""
    monkeypatch.setattr(mmlu, "LETTERS", ("T", "B", "S", "O"))
    path = tmp_path / "questions.json"
    rows = [{"subject": f"[b]{name}[/law]", "input": f"Which {name}?\nAnswer:", "output": "B"} for name in ("a", "b")]
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"do_mmlu_eval": True, "mmlu_path": str(path)}


# --- the adapter first ------------------------------------------------------------------------------------


def test_text_that_looks_like_markup_is_shown_as_it_is(run, questions, monkeypatch, capsys):
    """A LLaMA-2 dialogue is what rich calls a closing tag without an opening one."""
    monkeypatch.setattr(training, "answer", lambda *_: r"\[a^2\] [/INST] [red]b")
    monkeypatch.setattr(training, "one_line", lambda _: "[INST] tell [/INST] me")
    out = run("out", max_steps=1, save_steps=0, **questions)
    said = capsys.readouterr().out
    assert "Instruction: [INST] tell [/INST] me" in " ".join(said.split())
    assert said.count(r"\[a^2\] [/INST] [red]b") == 2
    assert "[b]a[/law]" in said
    assert (out / WEIGHTS).exists()


@pytest.mark.parametrize("where", ["results", "mmlu", "finished"])
def test_what_cannot_be_shown_costs_no_adapter(where, run, questions, monkeypatch, tmp_path):
    def fails(*_, **__):
        raise RuntimeError("the display is broken")

    monkeypatch.setattr(TrainingView, where, fails)
    with pytest.raises(RuntimeError, match="the display is broken"):
        run("out", max_steps=1, save_steps=0, **questions)
    out = tmp_path / "out"
    assert load_file(out / WEIGHTS)
    assert read_run(out).results["steps"] == 1
    assert (out / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("function", "name"),
    [("jindo_core.train.os.replace", "metrics.jsonl"), ("jindo_core.outcome.write_run", "jindo_run.json")],
)
def test_a_disk_that_takes_no_more_after_the_adapter(function, name, run, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save", lambda job, out: saves(job, out, monkeypatch, function, full))
    with pytest.raises(TrainingError) as caught:
        run("out", max_steps=1, save_steps=0)
    out = tmp_path / "out"
    assert f"the adapter is saved in {out}, but {name} could not be written (No space left on device)" in str(
        caught.value
    )
    assert load_file(out / WEIGHTS)


def saves(job, out, monkeypatch, function, full):
    outcome.save(job, out)
    monkeypatch.setattr(function, full)  # from here on


def test_a_picture_that_cannot_be_written_is_a_notice(run, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "draw_loss", full)
    out = run("out", max_steps=1, save_steps=0)
    said = " ".join(capsys.readouterr().out.split())
    assert "note: loss.png could not be written (No space left on device): the adapter is saved, and metrics" in said
    assert (out / "README.md").exists()


def test_a_run_that_is_refused_takes_no_checkpoint_away(run, tmp_path):
    """What another run has in the folder is there until nothing can refuse the one that replaces it."""
    out = run("out", max_steps=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give another --logging_dir"):
        run("out", overwrite_output_dir=True, report_to="tensorboard", logging_dir=str(tmp_path / "file"))
    assert (out / "checkpoint-3" / "state.json").exists()
    assert len(logged(out)) == 6
    run("out", overwrite_output_dir=True, max_steps=1, save_steps=0)
    assert not (out / "checkpoint-3").exists()


# --- whose figures ----------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """scripted(losses, rights): what is measured, one after the other; rights: MMLU's right answers of ten."""

    def arrange(losses, rights):
        losses, rights = iter(losses), iter(rights)
        monkeypatch.setattr(training, "held_out_sums", lambda *_, **__: (next(losses), 1))
        monkeypatch.setattr(Mmlu, "ask_share", lambda *_, **__: [])
        monkeypatch.setattr(Mmlu, "scores", lambda *_: Scores("eval", (0,), {"law": (next(rights), 10)}, 1.0))

    return arrange


BEST = {"eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}


@pytest.mark.parametrize("stops", [False, True])
def test_mmlu_after_is_that_of_the_adapter_which_is_kept(stops, run, questions, scripted, monkeypatch, capsys):
    """Measured best after step 2 of 6; also where that was before a stop."""
    scripted([3.0, 0.5, 2.0, 2.5], [1, 7, 4, 2])
    if stops:
        original = training.take_step
        monkeypatch.setattr(training, "take_step", signal_at(3, original))
        with pytest.raises(Stopped):
            run("out", **BEST, **questions)
        monkeypatch.setattr(training, "take_step", original)
        capsys.readouterr()
    out = run("out", **BEST, **questions, resume=stops)
    results = read_run(out).results
    assert (results["adapter_of_step"], results["held_out_loss_after"]) == (2, 0.5)
    assert (results["mmlu_accuracy_before"], results["mmlu_accuracy_after"]) == (0.1, 0.7)
    assert "| MMLU accuracy, mean of its subjects | 0.1000 | 0.7000 |" in (out / "README.md").read_text()
    assert re.search(r"mean of the subjects │ +10 │ 0\.1000 │ 0\.7000 ", capsys.readouterr().out)
    rows = [(row["step"], row["mmlu_eval_accuracy"]) for row in logged(out) if "mmlu_loss" in row]
    assert rows == [(0, 0.1), (2, 0.7), (4, 0.4), (6, 0.2)]


@pytest.mark.parametrize("at", [4, 6])
def test_a_signal_between_mmlu_and_the_loss_leaves_no_half_of_a_measurement(at, run, questions, monkeypatch, tmp_path):
    original, log = evaluate._summed, tmp_path / "out" / "metrics.jsonl.part"

    def interrupted(*given):
        if log.read_text().count('"loss"') == at:
            signal.raise_signal(signal.SIGTERM)
        return original(*given)

    monkeypatch.setattr(evaluate, "_summed", interrupted)
    with pytest.raises(Stopped, match=f"after step {at}: "):
        run("out", **questions)
    monkeypatch.setattr(evaluate, "_summed", original)
    out = run("out", **questions, resume=True)
    for name in ("mmlu_loss", "eval_loss"):
        assert [row["step"] for row in logged(out) if name in row] == [0, 2, 4, 6]


def test_the_card_has_what_became_of_the_predictions(run):
    out = run("out", max_steps=1, save_steps=0, predict_with_generate=True, max_new_tokens=4)
    results, figures = read_run(out).results, json.loads((out / "metrics.json").read_text())
    assert figures["predict_samples"] == 4
    assert figures.items() <= results.items()
    assert f"4 held-out rows were answered: exact match {figures['predict_exact_match']:.4f}, chrF " in (
        out / "README.md"
    ).read_text()


def test_a_card_is_there_whatever_ends_the_predictions(run, monkeypatch, tmp_path):
    def fails(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("jindo_core.predictions.answer", fails)
    with pytest.raises(TrainingError, match="no memory to answer a held-out row: the adapter is saved"):
        run("out", max_steps=1, save_steps=0, predict_with_generate=True, max_new_tokens=4)
    assert run_card.MARK in (tmp_path / "out" / "README.md").read_text()
