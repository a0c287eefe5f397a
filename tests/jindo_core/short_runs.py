"""Runs of a few steps on stories260K, for tests of what a run leaves behind."""

from __future__ import annotations

import json
import signal

from jindo_core.config import resolve_train_config


def rows_file(folder):
    """40 rows of differing length."""
    animals = ("cat", "dog", "bird", "fish", "little red fox")
    data = [
        {"instruction": f"Name animal {i}.", "input": "", "output": f"It is a {animals[i % 5]}" + ", I think" * (i % 4)}
        for i in range(40)
    ]
    path = folder / "rows.json"
    path.write_text(json.dumps(data))
    return path


def settings_of(model, rows, out, **changes):
    """What `train` takes: 6 steps of two micro-batches, with dropout, measured every two, a checkpoint every three."""
    given = {
        "base_model": str(model), "data_path": str(rows), "output_dir": str(out), "batch_size": 8,
        "micro_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "cutoff_len": 96, "val_set_size": 4,
        "lora_dropout": 0.2, "prompt_template_name": "alpaca_short", "device": "cpu", "dtype": "fp32",
        "save_steps": 3, "eval_steps": 2, "lora_r": 2,
    }  # fmt: skip
    return resolve_train_config(given | changes)


def signal_at(step, original, kind=signal.SIGTERM):
    """A `take_step` during whose step a signal comes, once."""
    seen = []

    def interrupted(job, batches, number, *rest):
        if number == step and not seen:
            seen.append(number)
            signal.raise_signal(kind)
        return original(job, batches, number, *rest)

    return interrupted


def logged(out):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
