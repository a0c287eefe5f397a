"""What a person sees of a training run: a bar that fits its terminal, and lines without one."""

from __future__ import annotations

import io
import json
import math
import re
import sys

import pytest
from rich.console import Console

from jindo_core.errors import InputError, Stopped, TrainingError
from jindo_core.progress import loading_bar, tokenizing_bar
from jindo_core.training_view import InputWait, JsonView, TrainingView, fitting

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def row(step=12, **more):
    return {
        "step": step, "loss": 2.3456, "learning_rate": 2e-4, "tokens_per_second": 819.4, "memory_bytes": 412_000_000,
        "seconds": 2.0 * step, **more,
    }  # fmt: skip


LARGE = row(12345, tokens_per_second=12_345.6, memory_bytes=38_400_000_000, share_of_ceiling=0.63)


def on_a_terminal(width, **more):
    """A view, and the screen that it draws on."""
    view, screen = TrainingView(**more), io.StringIO()
    view.console = Console(file=screen, force_terminal=True, width=width, highlight=False)
    return view, screen


def drawn(width, at, total=240, left=185.0, planned=506_000_000):
    """The bar's last line, and all that was sent."""
    view, screen = on_a_terminal(width)
    view.start(total, planned_bytes=planned)
    view.step(at, total, left, log=True)
    view._bar.refresh()
    view.stop()
    sent = screen.getvalue()
    return re.split(r"[\r\n]+", CONTROL.sub("", sent).rstrip())[-1], sent


# --- the bar --------------------------------------------------------------------------------------------


def test_eighty_columns_hold_everything():
    line, _ = drawn(80, row(share_of_ceiling=0.63))
    parts = ("12/240", "━━━", "loss 2.346", "lr 2.0e-04", "819 tok/s", "63%", "412/506 MB", "3:05 left")
    places = [line.index(part) for part in parts]
    assert places == sorted(places)
    assert len(line) <= 80


def test_eighty_columns_hold_large_figures_too():
    line, _ = drawn(80, LARGE, total=25_000, left=7_380.0, planned=40_500_000_000)
    assert line == "12345/25000  loss 2.346  lr 2.0e-04  12.3k tok/s  63%  38.4/40.5 GB  2h03 left"


@pytest.mark.parametrize("at", [row(share_of_ceiling=0.63), LARGE], ids=["small", "large"])
def test_no_width_wraps_or_is_left(at):
    """A frame of two lines would be cleared by moving up; one that is too wide would leave its rest behind."""
    for width in range(12, 140, 3):
        line, sent = drawn(width, at, total=25_000)
        assert len(line) <= width
        assert "\x1b[1A" not in sent
        assert f"{at['step']}/25000"[:width] in line


def test_the_least_important_gives_way_first():
    shown = [name for width in (80, 66, 56, 50, 44, 36, 26, 20) for name in [drawn(width, LARGE, 25_000)[0]]]
    parts = ["lr ", "63%", "38400", "tok/s", "left", "loss"]
    counts = [sum(part in line or part.replace("38400", " GB") in line for part in parts) for line in shown]
    assert counts == sorted(counts, reverse=True)
    assert fitting({"step": "1/2", "loss": "loss 1.0", "lr": "lr 1", "left": "1:00 left"}, 24) == [
        "1/2", "loss 1.0", "1:00 left",
    ]  # fmt: skip
    assert fitting({"step": "1/2", "loss": "loss 1.0", "left": "1:00 left"}, 3) == ["1/2"]


def test_a_wide_terminal_says_what_the_share_is_of():
    assert "63% of ceiling" in drawn(120, row(share_of_ceiling=0.63))[0]
    assert "%" not in drawn(120, row())[0]


def test_without_a_plan_memory_stands_alone():
    assert "  412 MB  " in drawn(120, row(), planned=None)[0]


@pytest.mark.parametrize(("left", "said"), [(59, "0:59"), (3599, "59:59"), (3600, "1h00"), (360_000, "4d")])
def test_the_time_that_is_left(left, said):
    assert f"{said} left" in drawn(120, row(), left=left)[0]


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {}])
def test_no_color_is_honoured(environment, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    colours = re.findall(r"\x1b\[(?:[0-9;]*;)?[39]\d[0-9;]*m", drawn(100, row())[1])
    assert bool(colours) is not bool(environment)


def test_forced_colours_are_no_terminal(monkeypatch, capsys):
    """Continuous integration sets FORCE_COLOR: rich takes it for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    view = TrainingView()
    view.start(240)
    view.notice("mind")
    view.step(row(), 240, 10.0, log=False)
    view.stop()
    assert capsys.readouterr().out == "note: mind\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", Terminal())
    view = TrainingView()
    view.start(240)
    view.step(row(), 240, 10.0, log=True)
    view.stop()
    assert sys.stdout.getvalue().startswith("step 12/240  loss 2.346")
    assert "\x1b" not in sys.stdout.getvalue()


def test_no_bar_where_none_is_wanted():
    view, screen = on_a_terminal(120, bar=False)
    view.start(240)
    view.step(row(), 240, 10.0, log=True)
    with view.asking(40) as on_progress:
        assert on_progress is None
    view.stop()
    assert screen.getvalue() == "step 12/240  loss 2.346  lr 2.00e-04  819 tokens/s  412 MB  0:10 left\n"


@pytest.mark.parametrize("training", [False, True])
def test_mmlus_bar_stands_alone_or_within_trainings(training):
    view, screen = on_a_terminal(120)
    if training:
        view.start(5)

    def fail():
        with view.asking(40) as on_progress:
            on_progress(10)
            raise TrainingError("out of memory, say")

    with pytest.raises(TrainingError, match="out of memory"):
        fail()
    screen.truncate(0)
    with view.asking(30) as on_progress:
        on_progress(30)
    view.stop()
    shown = screen.getvalue()
    assert "MMLU" in shown
    assert "30/30" in shown
    assert "10/40" not in shown  # what was tried before has gone
    assert ("0/5" in shown) is training


def test_without_a_bar_nothing_is_drawn_on_a_terminal():
    view, screen = on_a_terminal(80, bar=False)
    assert not view.draws
    with loading_bar(view.console, shown=view.draws) as on_progress:
        assert on_progress is None
    with tokenizing_bar(view.console, "rows.json", shown=view.draws) as on_progress:
        assert on_progress is None
    assert screen.getvalue() == ""
    assert on_a_terminal(80)[0].draws


def test_mmlu_draws_nothing_in_a_log(capsys):
    with TrainingView().asking(40) as on_progress:
        assert on_progress is None
    assert capsys.readouterr().out == ""


# --- lines ----------------------------------------------------------------------------------------------


def test_a_line_says_all_that_is_known(capsys):
    view = TrainingView()
    view.evaluated({"step": 0, "eval_loss": 7.25})
    view.start(240, planned_bytes=506_000_000)
    view.step(row(1, input_seconds=0.5), 240, 478.0, log=False)
    view.step(row(2, input_seconds=0.0, share_of_ceiling=0.634), 240, 7384.0, log=True)
    view.evaluated({"step": 2, "eval_loss": 6.5, "eval_perplexity": 665.1416})
    view.step(row(3, input_seconds=0.02), 240, 474.0, log=True)
    assert capsys.readouterr().out.splitlines() == [
        "step 2/240  loss 2.346  lr 2.00e-04  819 tokens/s  63% of ceiling  412/506 MB  held out 7.250  "
        "input wait 12.5%  2:03:04 left",
        "step 2/240  held-out loss 6.5000  perplexity 665.14",
        "step 3/240  loss 2.346  lr 2.00e-04  819 tokens/s  412/506 MB  held out 6.500  input wait 1.0%  7:54 left",
    ]


def test_text_of_rows_and_models_is_no_markup(capsys):
    answers = [("[INST] tell [/INST] me", r"\[a^2\] [/]", "[bold]b[/bold] [/INST]")]
    TrainingView().results(math.nan, math.nan, 0, answers)
    TrainingView().mmlu({"[/b]": (1, 4)}, {"[/b]": (2, 4)}, 0.25, 0.5)
    said = capsys.readouterr().out
    for text in ("tell [/INST] me", r"\[a^2\] [/]", "[bold]b[/bold] [/INST]", "│ [/b] "):
        assert text in said


def test_a_long_notice_is_one_line(capsys):
    TrainingView().notice("word " * 60)
    assert capsys.readouterr().out.count("\n") == 1


def test_losses_and_perplexities_before_and_after(capsys):
    TrainingView().results(7.25, 6.5, 8, [], perplexities=(1408.1, 665.14))
    cells = [re.split(r"\s*│\s*", line)[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert cells == [["loss", "7.2500", "6.5000", "-0.7500"], ["perplexity", "1,408.10", "665.14", "-742.96"]]


def test_the_first_and_the_last_measurement_are_left_to_the_results(capsys):
    view = TrainingView()
    view.evaluated({"step": 0, "eval_loss": 7.25})
    view.start(3)
    view.evaluated({"step": 3, "eval_loss": 6.5})
    assert capsys.readouterr().out == ""


def test_mmlus_accuracy_is_said(capsys):
    scores = {"mmlu_loss": 1.0, "mmlu_eval_accuracy": 0.25, "mmlu_eval_accuracy_law": 0.5, "mmlu_eval_accuracy_art": 0}
    TrainingView().evaluated({"step": 4, **scores})
    assert capsys.readouterr().out == "step 4  MMLU accuracy 0.2500, mean of 2 subjects\n"


RESULT = {"steps": 8, "tokens_per_second": 819.4, "peak_bytes": 412_000_000}


def test_the_last_line(capsys):
    view = TrainingView()
    view.start(8)
    view.step(row(1, input_seconds=0.01, share_of_ceiling=0.5), 8, 0, log=False)
    view.step(row(2, input_seconds=0.01, share_of_ceiling=0.63), 8, 0, log=False)
    view.finished(RESULT)
    assert capsys.readouterr().out == (
        "8 steps at 819 tokens/s, 63% of this device's matrix products; 0.5% of the steps' time spent waiting for "
        "rows; peak memory 412 MB\n"
    )


def test_a_share_that_is_none_any_more_is_not_told_at_the_end(capsys):
    view = TrainingView()
    view.step(row(1, share_of_ceiling=0.9), 8, 0, log=False)
    view.step(row(2), 8, 0, log=False)  # above its ceiling, and left out
    view.finished(RESULT)
    assert capsys.readouterr().out == "8 steps at 819 tokens/s; peak memory 412 MB\n"


def test_the_last_line_without_figures_that_are_not_known(capsys):
    TrainingView().finished(RESULT)
    assert capsys.readouterr().out == "8 steps at 819 tokens/s; peak memory 412 MB\n"


def test_a_run_that_goes_on_does_not_know_its_first_steps_time():
    waited = InputWait()
    waited.add(row(101, input_seconds=50.0))
    assert waited.whole is None
    assert waited.lately() is None
    waited.add(row(102, input_seconds=1.0))
    assert waited.whole == waited.lately() == 0.5
    waited.add(row(103, input_seconds=0.0))
    assert (waited.whole, waited.lately()) == (0.25, 0.0)
    waited.add(row(104))
    assert waited.whole == 0.25


# --- for machines ---------------------------------------------------------------------------------------


def events(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_what_is_no_number_is_null(capsys):
    JsonView().evaluated({"step": 1, "eval_loss": math.nan, "parts": {"a": math.inf, "b": 1.0}})
    assert events(capsys) == [{"event": "evaluation", "step": 1, "eval_loss": None, "parts": {"a": None, "b": 1.0}}]


def test_any_text_is_one_line_of_ascii(capsys):
    JsonView().say('둘째\n줄 "\x1b[31m')
    out = capsys.readouterr().out
    assert out.isascii()
    assert out.count("\n") == 1
    assert json.loads(out) == {"event": "message", "text": '둘째\n줄 "\x1b[31m'}


def test_a_rank_that_does_not_lead_is_silent(capsys):
    view = JsonView(quiet=True)
    view.notice("x")
    view.start(3)
    view.step(row(), 3, 1.0, log=True)
    view.finished(RESULT)
    assert capsys.readouterr().out == ""


def test_steps_between_the_logged_ones_are_not_told(capsys):
    view = JsonView()
    view.step(row(1), 9, 16.04, log=False)
    view.step(row(2), 9, 14.04, log=True)
    assert events(capsys) == [{"event": "step", **row(2), "seconds_left": 14.0}]


@pytest.mark.parametrize(
    ("error", "event", "code"),
    [
        (InputError("got\nx"), "error", 2), (TrainingError("got x"), "error", 1),
        (Stopped("got x", 143), "stopped", 143),
    ],
)  # fmt: skip
def test_what_ended_a_run(error, event, code, capsys):
    JsonView().ended(error)
    assert events(capsys) == [{"event": event, "message": "got x", "code": code}]


def test_predictions(capsys):
    JsonView().predicted("out/predictions.jsonl", {"predict_samples": 4, "predict_loss": math.nan})
    figures = {"predict_samples": 4, "predict_loss": None}
    assert events(capsys) == [{"event": "predictions", "path": "out/predictions.jsonl", "figures": figures}]


def test_mmlu_before_and_after(capsys):
    JsonView().mmlu({"law": (1, 4), "art": (0, 2)}, {"law": (2, 4), "art": (2, 2)}, 0.125, 0.75)
    (found,) = events(capsys)
    assert found["subjects"]["law"] == {"questions": 4, "right_before": 1, "right_after": 2}
    assert (found["accuracy_before"], found["accuracy_after"]) == (0.125, 0.75)
