"""Two trainers, one folder: the second is refused, whoever was first, and a lock never outlives its process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jindo_core import prepare
from jindo_core import train as training
from jindo_core.adapters import WEIGHTS
from jindo_core.cli.main import main
from jindo_core.errors import InputError
from jindo_core.train import train

HOLD = "import sys; from jindo_core.files import held; from pathlib import Path\n" + (
    "with held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def hold(folder):
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_trainer_in_a_folder_is_refused_before_it_reads_anything(settings, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with hold(out) as first:
        monkeypatch.setattr(training, "prepare", lambda *_: pytest.fail("it read on"))
        with pytest.raises(InputError, match="out is being written by another run: wait for it, or give another"):
            train(*settings("out"))
        assert main(["train", "--output_dir", str(out)]) == 2
        assert "error: " in capsys.readouterr().err
        assert list(out.iterdir()) == []
        first.kill()
    monkeypatch.undo()
    out.rmdir()


def test_a_killed_trainer_s_lock_is_gone(settings, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with hold(out) as first:
        first.kill()
        first.wait()
        train(*settings("out", max_steps=1))
    assert (out / WEIGHTS).exists()


def test_of_two_that_start_together_one_is_refused(settings, tmp_path, monkeypatch):
    """The folder was not there when either looked."""
    out, first = tmp_path / "out", []
    load = prepare.load_model

    def overtaken(*given, **more):
        out.mkdir()
        first.append(hold(out))
        return load(*given, **more)

    monkeypatch.setattr(prepare, "load_model", overtaken)
    with pytest.raises(InputError, match="is being written by another run"):
        train(*settings("out"))
    assert list(out.iterdir()) == []
    first[0].kill()
    first[0].communicate()
