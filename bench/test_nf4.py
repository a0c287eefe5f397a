"""NF4 quantize and dequantize."""

from __future__ import annotations

import pytest

from bench import cases

MATRICES = ["attention", "mlp"]


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("into", [True, False], ids=["scratch", "new"])
def test_dequantize(measure, setup, shape, matrix, into):
    measure(lambda: cases.dequantize(setup, shape, matrix, into=into), "nf4")


@pytest.mark.parametrize("matrix", MATRICES)
def test_quantize(measure, setup, shape, matrix):
    measure(lambda: cases.quantize(setup, shape, matrix), "nf4")
