"""One AdamW step over a model's adapters."""

from __future__ import annotations

import pytest

from bench import cases


@pytest.mark.parametrize("eight", [False, True], ids=["fp32", "8-bit"])
def test_step(measure, setup, shape, eight):
    measure(lambda: cases.adamw(setup, shape, eight=eight), "adamw")
