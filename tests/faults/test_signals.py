"""SIGTERM and SIGINT: the step is finished, a checkpoint written, and the exit code is one that schedulers know."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from jindo_core import checkpoint, evaluate
from jindo_core.adapters import WEIGHTS
from jindo_core.errors import Stopped
from jindo_core.interrupt import Broken, StopSignals
from jindo_core.train import train


def started(stories260k, rows, out, code=""):
    """A real run of a thousand steps in a process of its own."""
    argv = [
        "train", "--base_model", str(stories260k), "--data_path", str(rows), "--output_dir", str(out),
        "--batch_size", "4", "--micro_batch_size", "4", "--max_steps", "1000", "--cutoff_len", "96",
        "--val_set_size", "0", "--device", "cpu", "--prompt_template_name", "alpaca_short", "--save_steps", "0",
    ]  # fmt: skip
    program = f"import sys\nfrom jindo_core.cli.main import main\n{code}\nsys.exit(main({argv!r}))"
    environment = os.environ | {"JINDO_CACHE": str(out.parent / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for(log, lines, process):
    until = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= lines):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_process_with_its_code_and_a_checkpoint(kind, code, stories260k, rows, tmp_path):
    out = tmp_path / "out"
    with started(stories260k, rows, out) as process:
        wait_for(out / "metrics.jsonl.part", 3, process)
        process.send_signal(kind)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    found, faults = checkpoint.newest(out)
    assert faults == []
    assert found.step >= 3
    assert f"stopped by {kind.name} after step {found.step}: " in said
    assert f"checkpoint-{found.step} is saved, --resume goes on" in said
    assert not (out / WEIGHTS).exists()


def test_a_second_signal_acts_at_once(stories260k, rows, tmp_path):
    """The step under way would take an hour."""
    out = tmp_path / "out"
    code = (
        "import time, jindo_core.train, jindo_core.step as t\n"
        f"t.accumulate = lambda *_: (open({str(tmp_path / 'in_step')!r}, 'w').close(), time.sleep(3600))"
    )
    with started(stories260k, rows, out, code) as process:
        until = time.monotonic() + 120
        while not (tmp_path / "in_step").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None, "the first one waits for the step"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM
    assert checkpoint.folders(out) == []


def test_a_second_ctrl_c_is_a_keyboard_interrupt(settings, stop_after, tmp_path):
    stop_after(2, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        train(*settings("out"))
    assert checkpoint.folders(tmp_path / "out") == []


@pytest.mark.parametrize("at", [4, 8])
def test_a_measurement_is_left_off_and_made_after_all(at, settings, metrics, tmp_path, monkeypatch):
    """Between two steps, or after the last one: no figure is missing, none is there twice, no weight differs."""
    more = {"eval_steps": 4}
    train(*settings("whole", **more))
    original, log = evaluate._summed, tmp_path / "out" / "metrics.jsonl.part"

    def interrupted(*given):
        if log.read_text().count('"loss"') == at:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it was not left off")
        return original(*given)

    monkeypatch.setattr(evaluate, "_summed", interrupted)
    with pytest.raises(Stopped, match=f"after step {at}: "):
        train(*settings("out", **more))
    monkeypatch.setattr(evaluate, "_summed", original)
    train(*settings("out", **more, resume=True))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    measured = [[row["step"] for row in metrics(tmp_path / name) if "eval_loss" in row] for name in ("out", "whole")]
    assert measured[0] == measured[1] == [0, 4, 8]


def test_what_a_process_ignores_stays_ignored():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.asked is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_handlers_are_given_back_and_what_may_break_breaks():
    former = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        with pytest.raises(Broken), signals.breakable():
            signal.raise_signal(signal.SIGTERM)
        assert signals.asked is signal.SIGTERM
        with pytest.raises(Broken), signals.breakable():
            pytest.fail("nothing new begins")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is former


def test_the_run_after_a_stop_is_the_same(settings, stop_after, tmp_path):
    """Also where no checkpoints were asked for: the signal makes one."""
    train(*settings("whole", save_steps=0))
    assert checkpoint.folders(tmp_path / "whole") == []
    stop_after(3, signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        train(*settings("out", save_steps=0))
    assert stopped.value.code == 130
    train(*settings("out", save_steps=0, resume=True))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
