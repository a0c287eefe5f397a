"""The SwiGLU kernels in Triton's interpreter. No bf16: the interpreter truncates where a GPU rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jindo_core.kernels import dispatch, swiglu_triton
from jindo_core.kernels.swiglu import forward_reference, swiglu

pytestmark = pytest.mark.interpreter

SHAPES = [(1, 1), (7,), (3, 33), (2, 2, 64), (2, 1025), (3, 2048)]


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory(nan_in_fresh_memory):
    """Nothing may be left unwritten."""


def make_case(shape, dtype, strided):
    generator = torch.Generator().manual_seed(sum(shape))
    joint = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
    joint[..., : shape[-1]] *= 4
    gate, up = joint.to(dtype).chunk(2, dim=-1)
    dh = torch.randn(shape, generator=generator).to(dtype)
    return (gate, up, dh) if strided else (gate.clone(), up.clone(), dh)


def check(case, close, oracles):
    gate, up, dh = case
    ours = (swiglu_triton.forward(gate, up), *swiglu_triton.backward(dh, gate, up))
    for value, wanted in zip(ours, oracles.swiglu(gate, up, dh), strict=True):
        assert value.dtype == gate.dtype
        assert value.is_contiguous()
        close("swiglu", value, wanted)


@pytest.mark.parametrize("strided", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_and_gradients(shape, strided, dtype, close, oracles):
    check(make_case(shape, dtype, strided), close, oracles)


def test_nothing_beyond_the_inputs_is_used(close, oracles, walled):
    gate, up, dh = make_case((3, 33), torch.float32, False)
    check((walled(gate), walled(up), walled(dh)), close, oracles)
    joint = walled(torch.cat((gate, up), dim=-1))
    check((*joint.chunk(2, dim=-1), walled(dh)), close, oracles)


def test_other_strides_and_more_rows_than_a_grid_has(close, oracles, monkeypatch):
    gate, up, dh = make_case((6, 4, 10), torch.float32, True)
    check((gate.transpose(0, 2), up.transpose(0, 2), dh.transpose(0, 2)), close, oracles)
    check((gate, up, dh[:1, :1, :1].expand(6, 4, 10)), close, oracles)
    monkeypatch.setattr(swiglu_triton, "MOST_ROWS", 5)
    check((gate, up, dh), close, oracles)


def test_the_tails_stay_finite():
    gate = torch.tensor([-6e4, -200.0, -89.0, 0.0, 89.0, 200.0, 6e4])
    one = torch.ones(7)
    with np.errstate(over="ignore"):  # of the interpreter: e^89 is infinite, and 1 / it is 0
        h, (dgate, _) = swiglu_triton.forward(gate, one), swiglu_triton.backward(one, gate, one)
    torch.testing.assert_close(h, gate.relu())
    torch.testing.assert_close(dgate, torch.tensor([0, 0, 0, 0.5, 1, 1, 1]))


def test_the_operator_runs_them(close, oracles):
    gate, up, dh = make_case((2, 3, 40), torch.float16, True)
    gate.requires_grad_()
    with dispatch.override("triton"):
        h = swiglu(gate, up)
        (dgate,) = torch.autograd.grad(h, gate, dh)
    expected = oracles.swiglu(gate, up, dh)
    close("swiglu", h, expected[0])
    close("swiglu", dgate, expected[1])


def test_fp64_and_no_rows_are_left_to_the_reference():
    gate, up, dh = make_case((2, 8), torch.float64, True)
    assert torch.equal(swiglu_triton.forward(gate, up), forward_reference(gate, up))
    assert swiglu_triton.backward(dh, gate, up)[0].dtype == torch.float64
    assert swiglu_triton.forward(gate[:0].float(), up[:0].float()).shape == (0, 8)
