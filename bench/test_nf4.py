"""NF4 quantize and dequantize beside bitsandbytes', at the shapes of LLaMA 7B's attention and MLP."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from jindo_core.nf4 import quantize_nf4

SHAPES = [(1536, 576), (4096, 4096), (11008, 4096)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("who", ["jindo", "bitsandbytes"])
def test_dequantize(median, who, shape):
    weight = torch.randn(shape, dtype=torch.bfloat16)
    ours = quantize_nf4(weight)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))
    calls = {"jindo": ours.dequantize, "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state)}
    median(calls[who], weight.numel() * (2 + 0.516) / 1e9, "GB/s")


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("who", ["jindo", "bitsandbytes"])
def test_quantize(median, who, shape):
    weight = torch.randn(shape, dtype=torch.bfloat16)
    theirs = lambda: bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)  # noqa: E731
    assert torch.equal(quantize_nf4(weight).packed, theirs()[0])
    median({"jindo": lambda: quantize_nf4(weight), "bitsandbytes": theirs}[who], weight.numel() / 1e9, "Gweights/s")
