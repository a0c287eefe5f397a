"""Gradients that are not finite: the step is skipped and counted, so many in a row end the run, and rows are named."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from jindo_core import step as stepping
from jindo_core import train as training
from jindo_core.errors import Stopped, TrainingError
from jindo_core.train import train


@pytest.mark.parametrize("packing", [False, True])
def test_the_batch_is_named_by_rows_and_file(packing, settings, rows, tmp_path, monkeypatch):
    second = tmp_path / "more.json"
    second.write_text(json.dumps([{"instruction": f"Count {i}.", "output": f"{i} and more"} for i in range(30)]))
    seen = []

    def poisoned(job, batches):
        ids = [token for batch in batches for i in batch for token in job.examples[i].input_ids]
        seen.append(job.tokenizer.decode(ids))
        return torch.tensor(math.nan)

    monkeypatch.setattr(stepping, "accumulate", poisoned)
    with pytest.raises(TrainingError, match="the loss at step 5 is nan, and 4 steps before it failed so") as caught:
        train(*settings("out", data_path=(str(rows), str(second)), packing=packing, cutoff_len=200))
    said = str(caught.value)
    learnt = {("rows.json", int(n) + 1) for n in re.findall(r"Name animal (\d+)\.", seen[-1])}
    learnt |= {("more.json", int(n) + 1) for n in re.findall(r"Count (\d+)\.", seen[-1])}
    found = re.search(r"here row (.*)", said)[1]
    cut = re.search(r", and (\d+) more$", found)
    named = {
        (name, int(row))
        for part in found.removesuffix(cut[0] if cut else "").split(" and ")
        for numbers, _, name in [part.partition(" of ")]
        for row in numbers.split(", ")
    }
    assert named <= learnt
    assert len(named) == (12 if cut else len(learnt))
    assert len(learnt) == len(named) + (int(cut[1]) if cut else 0)


def test_skipped_steps_are_counted_through_a_stop(settings, stop_after, tmp_path, monkeypatch, metrics):
    """Two before it and three after it are five in a row."""
    original = stepping.accumulate

    def poisoned(job, batches):
        original(job, batches)
        return torch.tensor(math.inf)

    monkeypatch.setattr(stepping, "accumulate", poisoned)
    stop_after(2)
    with pytest.raises(Stopped):
        train(*settings("out"))
    with pytest.raises(TrainingError, match="the loss at step 5 is inf, and 4 steps before it failed so"):
        train(*settings("out", resume=True))
    monkeypatch.setattr(stepping, "accumulate", original)
    train(*settings("out", resume=True))  # from step 3, where three had failed
    counts = [row["skipped_steps"] for row in metrics(tmp_path / "out") if "loss" in row]
    assert counts == [1, 2, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("best", [True, False])
def test_weights_that_are_spoilt_at_the_end_are_not_saved(best, settings, tmp_path, monkeypatch):
    """The held-out loss is no number after the last step: the best checkpoint's adapter serves, or none does."""
    losses = iter([3.0, 1.0, 2.0, math.nan])
    monkeypatch.setattr(training, "held_out_sums", lambda *_, **__: (next(losses), 1))
    more = {"eval_steps": 3, "load_best_model_at_end": best}
    if best:
        result = train(*settings("out", **more))
        assert (result.adapter_step, result.loss_after) == (3, 1.0)
        return
    with pytest.raises(TrainingError, match="the held-out loss is nan after the last step: no adapter was saved"):
        train(*settings("out", **more))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
