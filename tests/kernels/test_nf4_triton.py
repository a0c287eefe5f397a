"""The Triton NF4 kernels in Triton's interpreter: bit-identical to the reference.

The interpreter truncates fp32 to bf16, so bf16 outputs are compared only where no rounding happens; whether
the compiled kernels keep the roundings too is what test_gates.py holds.
"""

from __future__ import annotations

import pytest
import torch

from jindo_core.kernels import dispatch, nf4, nf4_triton

pytestmark = pytest.mark.interpreter

BOUNDARY = 256 * 64
COUNTS = [1, 2, 63, 64, 65, 8191, 8192, 8193, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1, BOUNDARY + 64]


def filled(dequantize, shape, dtype, *parts):
    """What `dequantize` puts into a fresh tensor."""
    out = torch.empty(shape, dtype=dtype)
    dequantize(out, *parts)
    return out


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory(nan_in_fresh_memory):
    """Nothing may be left unwritten."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", COUNTS)
def test_quantize(count, dtype, make_weight):
    weight = make_weight((count,), dtype)
    packed, absmax = nf4_triton.quantize(weight, 64)
    expected = nf4.quantize_reference(weight, 64)
    assert torch.equal(packed, expected[0])
    assert torch.equal(absmax, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("count", COUNTS)
def test_dequantize(count, dtype, make_weight):
    packed, absmax = nf4.nf4_quantize(make_weight((count,)))
    for parts in ((absmax, None, None), nf4.nf4_quantize_absmax(absmax)):
        ours = filled(nf4_triton.dequantize, [count], dtype, packed, *parts, 64)
        assert torch.equal(ours, filled(nf4.dequantize_reference, [count], dtype, packed, *parts, 64))


@pytest.mark.parametrize("block_size", [2, 6, 32, 48, 96, 128, 4096, 16384])
def test_other_block_sizes(block_size, make_weight):
    weight = make_weight((3, 2777))
    packed, absmax = nf4_triton.quantize(weight, block_size)
    expected = nf4.quantize_reference(weight, block_size)
    assert torch.equal(packed, expected[0])
    assert torch.equal(absmax, expected[1])
    parts = nf4.nf4_quantize_absmax(absmax)
    values = filled(nf4_triton.dequantize, [3, 2777], torch.float32, packed, *parts, block_size)
    reference = filled(nf4.dequantize_reference, [3, 2777], torch.float32, packed, *parts, block_size)
    assert torch.equal(values, reference)


def test_maxima_too_small_for_a_reciprocal():
    weight = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 1e-38
    weight[64:128] *= 1e-3
    weight[192:] *= 1e-3
    packed, absmax = nf4_triton.quantize(weight, 64)
    expected = nf4.quantize_reference(weight, 64)
    assert torch.equal(packed, expected[0])
    assert torch.equal(absmax, expected[1])
    values = filled(nf4_triton.dequantize, [200], torch.float32, packed, absmax, None, None, 64)
    assert torch.equal(values, filled(nf4.dequantize_reference, [200], torch.float32, packed, absmax, None, None, 64))


def test_a_tie_takes_the_lower_code():
    weight = torch.zeros(64)
    weight[0] = 1.0
    weight[1:16] = nf4.thresholds(torch.device("cpu"))
    assert torch.equal(nf4_triton.quantize(weight, 64)[0], nf4.quantize_reference(weight, 64)[0])


@pytest.mark.parametrize("count", [65, 8193, BOUNDARY + 1])
def test_nothing_beyond_the_inputs_is_used(count, make_weight, walled):
    weight = make_weight((count,))
    packed, absmax = nf4_triton.quantize(walled(weight), 64)
    expected = nf4.quantize_reference(weight, 64)
    assert torch.equal(packed, expected[0])
    assert torch.equal(absmax, expected[1])
    quantized, nested, offset = nf4.nf4_quantize_absmax(absmax)
    for parts in ((absmax, None, None), (quantized, nested, offset)):
        walls = [t if t is None or t.dim() == 0 else walled(t) for t in parts]
        ours = filled(nf4_triton.dequantize, [count], torch.float32, walled(packed), *walls, 64)
        assert torch.equal(ours, filled(nf4.dequantize_reference, [count], torch.float32, packed, *parts, 64))


def test_bf16_where_nothing_is_rounded():
    """Codes 0 and +-1 times powers of two are bf16 already."""
    packed = torch.tensor([0x0F, 0xF7, 0x70], dtype=torch.uint8).repeat(64)
    absmax = torch.tensor([2.0, 0.5, 4.0, 1.0, 0.125, 8.0])
    values = filled(nf4_triton.dequantize, [384], torch.bfloat16, packed, absmax, None, None, 64)
    assert torch.equal(values, filled(nf4.dequantize_reference, [384], torch.bfloat16, packed, absmax, None, None, 64))


def test_non_contiguous_input(make_weight):
    for weight in (make_weight((96, 130)).t(), make_weight((1000,))[::2], make_weight((96, 130))[:, 1:-1]):
        packed, absmax = nf4_triton.quantize(weight, 64)
        expected = nf4.quantize_reference(weight.contiguous(), 64)
        assert torch.equal(packed, expected[0])
        assert torch.equal(absmax, expected[1])


def test_the_operators_run_them_when_told_to(make_weight, monkeypatch):
    ran = []
    for name in ("quantize", "dequantize"):
        kernel = getattr(nf4_triton, name)
        monkeypatch.setattr(nf4_triton, name, lambda *args, k=kernel, n=name: ran.append(n) or k(*args))
    dispatch._load.cache_clear()
    weight = make_weight((40, 33))
    with dispatch.override("triton"):
        packed, absmax = nf4.nf4_quantize(weight)
        values = nf4.nf4_dequantize(packed, *nf4.nf4_quantize_absmax(absmax), (40, 33), dtype=torch.float32)
    dispatch._load.cache_clear()
    assert ran == ["quantize", "dequantize"]
    assert torch.equal(
        values, nf4.nf4_dequantize(packed, *nf4.nf4_quantize_absmax(absmax), (40, 33), dtype=torch.float32)
    )
