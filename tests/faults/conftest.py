"""Runs that are short enough to be broken many times: stories260K, a few steps."""

from __future__ import annotations

import json
import signal

import pytest

from jindo_core import outcome
from jindo_core import train as training
from jindo_core.config import resolve_train_config


@pytest.fixture
def rows(tmp_path):
    """40 rows of differing length, in two files' worth of topics."""
    animals = ("cat", "dog", "bird", "fish", "little red fox")
    data = [
        {"instruction": f"Name animal {i}.", "input": "", "output": f"It is a {animals[i % 5]}" + ", I think" * (i % 4)}
        for i in range(40)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def settings(stories260k, rows, tmp_path, monkeypatch):
    """settings("out", …) -> what `train` takes: 8 steps with dropout, five to an epoch, two micro-batches each."""
    monkeypatch.setattr(outcome, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(training, "draw_loss", lambda *_: None)  # with the answers, half of such a run's time
    monkeypatch.setenv("JINDO_CACHE", str(tmp_path / "cache"))

    def make(out, **changes):
        given = {
            "base_model": str(stories260k), "data_path": str(rows), "output_dir": str(tmp_path / out),
            "batch_size": 8, "micro_batch_size": 4, "max_steps": 8, "learning_rate": 1e-2, "cutoff_len": 96,
            "val_set_size": 4, "lora_dropout": 0.2, "prompt_template_name": "alpaca_short", "device": "cpu",
            "dtype": "fp32", "save_steps": 3, "lora_r": 2,
        }  # fmt: skip
        return resolve_train_config(given | changes)

    return make


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(4): a signal comes while step 4 is under way; once."""

    def arrange(step, kind=signal.SIGTERM, times=1):
        original, seen = training.take_step, []

        def interrupted(job, batches, number, *rest):
            if number == step and not seen:
                seen.append(number)
                for _ in range(times):
                    signal.raise_signal(kind)
            return original(job, batches, number, *rest)

        monkeypatch.setattr(training, "take_step", interrupted)

    return arrange


@pytest.fixture(scope="session")
def metrics():
    """metrics(out) -> the rows of its metrics.jsonl."""
    return lambda out: [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
