"""One AdamW step over a model's adapters."""

from __future__ import annotations

import importlib.util

import pytest

from bench import cases


@pytest.mark.skipif(importlib.util.find_spec("jindo_core.kernels.adamw") is None, reason="kernels/adamw.py is to come")
def test_step(measure, setup, shape):
    measure(lambda: cases.adamw(setup, shape), "adamw")
