"""The head and the loss in one, with the gradient of the hidden states."""

from __future__ import annotations

import pytest

from bench import cases


@pytest.mark.parametrize("rows", [512, 2048])
def test_loss(measure, setup, shape, rows):
    measure(lambda: cases.loss(setup, shape, rows), "linear_cross_entropy")
