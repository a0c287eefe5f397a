"""NF4 quantize and dequantize beside bitsandbytes', at the shapes of LLaMA 7B's attention and MLP."""

from __future__ import annotations

import ctypes

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.cextension import lib

from jindo_core.kernels.nf4 import nf4_dequantize
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("who", ["jindo", "bitsandbytes"])
def test_dequantize_into_a_buffer(median, who, shape):
    """Codes from memory, not from the cache: 150 MB of them in turn. bitsandbytes' kernel (its own entry: the wrapper
    has no such form on the CPU) reads fp32 maxima; ours undoes the double quantization as well."""
    weight = torch.randn(shape, dtype=torch.bfloat16)
    nf4, (packed, state) = quantize_nf4(weight), bnb.quantize_4bit(weight, quant_type="nf4")
    out, copies = torch.empty_like(weight), max(int(300e6 / weight.numel()), 2)
    turns = [(nf4.packed.clone(), packed.clone()) for _ in range(copies)]
    rows, columns = (ctypes.c_longlong(extent) for extent in shape)

    def ours():
        for codes, _ in turns:
            nf4_dequantize(codes, nf4.absmax, nf4.nested_absmax, nf4.offset, shape, dtype=torch.bfloat16, out=out)

    def theirs():
        for _, codes in turns:
            lib.cdequantize_blockwise_cpu_nf4_bf16(
                bnb.get_ptr(codes), bnb.get_ptr(state.absmax), bnb.get_ptr(out), ctypes.c_longlong(64), rows, columns
            )

    theirs()
    assert torch.equal(out, bnb.dequantize_4bit(packed, state))
    median({"jindo": ours, "bitsandbytes": theirs}[who], copies * weight.numel() * (2 + 0.516) / 1e9, "GB/s")
