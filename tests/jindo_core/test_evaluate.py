"""Held-out loss: what it leaves behind where it fails."""

from __future__ import annotations

import pytest
import torch

from jindo_core import evaluate
from jindo_core.data.examples import Example
from jindo_core.loader import load_model


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_as_it_was_though_memory_runs_out(training, stories260k, monkeypatch):
    """Else the steps after one that is tried again would run without dropout and checkpointing."""
    model = load_model(stories260k, dtype="fp32", device="cpu").train(training)
    rows = [Example(list(range(3, 12)), list(range(3, 12)))] * 4
    whole = evaluate.held_out_loss(model, rows, batch_size=2, pad_id=0)
    original, modes = evaluate.collate, []

    def short_of_memory(*given):
        modes.append(model.training)
        if len(modes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*given)

    monkeypatch.setattr(evaluate, "collate", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate.held_out_loss(model, rows, batch_size=2, pad_id=0)
    assert model.training == training
    assert evaluate.held_out_loss(model, rows, batch_size=2, pad_id=0) == whole
    assert not any(modes), "dropout is off inside"
