"""The LoRA linear on NF4 weights: decoding (M = 1, 4) and training (M = 512, 2048)."""

from __future__ import annotations

import pytest

from bench import cases

MATRICES = ["attention", "mlp"]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("rows", [1, 4, 512, 2048])
def test_forward(measure, setup, shape, matrix, rows):
    measure(lambda: cases.lora_linear(setup, shape, matrix, rows, backward=False), "lora_matmul")


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("rows", [512, 2048])
def test_forward_and_backward(measure, setup, shape, matrix, rows):
    measure(lambda: cases.lora_linear(setup, shape, matrix, rows, backward=True), "lora_matmul")
