"""Held-out loss: what it leaves behind where it fails."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from jindo_core import evaluate
from jindo_core.data.examples import Encoder, Example
from jindo_core.data.formats import detect_format
from jindo_core.data.readers import open_rows
from jindo_core.data.store import Selection, tokenize
from jindo_core.data.templates import load_template
from jindo_core.loader import load_model
from jindo_core.tokenizer import load_tokenizer


def test_rows_on_disk_are_read_once(stories260k, tmp_path, monkeypatch):
    """Their lengths are known: sorting by them reads no row."""
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a" * n, "output": "b"} for n in range(1, 6)]))
    source, tokenizer = open_rows(str(tmp_path / "rows.json")), load_tokenizer(stories260k)
    encoder = Encoder(tokenizer, load_template("alpaca_short"), cutoff_len=256, train_on_inputs=False)
    rows = Selection([tokenize(source, detect_format(source), encoder, cache=None)], np.arange(5))
    read, original = [], Selection.__getitem__
    monkeypatch.setattr(Selection, "__getitem__", lambda self, i: read.append(i) or original(self, i))
    model = load_model(stories260k, dtype="fp32", device="cpu")
    assert evaluate.held_out_loss(model, rows, batch_size=2, pad_id=0) > 0
    assert sorted(read) == [0, 1, 2, 3, 4]


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
