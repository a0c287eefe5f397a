"""What a person sees while a model is loaded: a bar on a terminal, nothing in a log."""

from __future__ import annotations

import io
import shlex

import pytest
from rich.console import Console

from jindo_core import files
from jindo_core.loader import load_model
from jindo_core.progress import ConversionView, EvaluationRow, draw_loss, loading_bar, tokenizing_bar, typed


def test_a_bar_on_a_terminal(stories260k):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with loading_bar(console) as on_progress:
        load_model(stories260k, dtype="fp32", device="cpu", on_progress=on_progress)
    size = (stories260k / "model.safetensors").stat().st_size
    assert "loading" in screen.getvalue()
    assert f"{size / 1e6:.1f}/{size / 1e6:.1f} MB" in screen.getvalue()


def test_nothing_elsewhere():
    screen = io.StringIO()
    with loading_bar(Console(file=screen, force_terminal=False)) as on_progress:
        assert on_progress is None
    assert screen.getvalue() == ""


def test_names_of_tasks_subjects_and_models_are_no_markup(capsys):
    view = ConversionView()
    view.evaluation(["NF4"], [EvaluationRow("mmlu", "acc_[/law]", [0.5], None, 3, None)])
    view.drift([("[/b].gguf", 1.0, 0.0, 0.0)], "rows")
    with view.bar("[/x] {task}", 4) as advance:
        advance(4)
    said = capsys.readouterr().out
    for text in ("acc_[/law]", "[/b].gguf", "[/x] {task}: 0 MB"):
        assert text in said


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, rows = tmp_path / "loss.png", [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.5}]
    draw_loss(rows, path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        draw_loss([*rows, {"step": 2, "loss": 1.0}], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_command_is_shown_as_it_would_be_typed():
    words = ["jindo-core", "generate", "--instruction", "'우물 안 개구리'는?", "--input", "a\nb", "--x", "it's $5"]
    shown = typed(words)
    assert '''"'우물 안 개구리'는?" --input 'a b' ''' in shown
    assert shlex.split(shown) == [" ".join(word.split()) for word in words]


def test_tokenizing_shows_rows_on_a_terminal_and_nothing_elsewhere():
    out = io.StringIO()
    with tokenizing_bar(Console(file=out), "rows.jsonl") as on_progress:
        assert on_progress is None
    assert out.getvalue() == ""
    with tokenizing_bar(Console(file=out, force_terminal=True, width=120), "[rows].jsonl") as on_progress:
        on_progress(1024, 500_000, 1_000_000)
    assert "tokenizing [rows].jsonl" in out.getvalue()
    assert "1,024 rows" in out.getvalue()
