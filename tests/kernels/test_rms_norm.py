"""RMSNorm against torch's rms_norm in fp64, with every implementation that runs on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from jindo_core.kernels import rms_norm as module
from jindo_core.kernels.rms_norm import rms_norm

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def make_case(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return x.requires_grad_(), weight.to(dtype).requires_grad_(), dy


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 5, 64), (9, 100), (4, 576), (2, 3, 2049)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("each_cpu_implementation")
def test_values_and_gradients(shape, dtype, close, oracles):
    x, weight, dy = make_case(shape, dtype)
    y = rms_norm(x, weight, EPS)
    ours = (y, *torch.autograd.grad(y, (x, weight), dy, retain_graph=True))
    for value, wanted in zip(ours, oracles.rms_norm(x, weight, EPS, dy), strict=True):
        assert value.dtype == dtype
        close("rms_norm", value, wanted)
    # A frozen weight takes another path.
    close("rms_norm", torch.autograd.grad(rms_norm(x, weight.detach(), EPS), x, dy)[0], ours[1].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("each_cpu_implementation")
def test_strided_inputs(dtype, close, oracles):
    wide, weight, dy = make_case((6, 4, 130), dtype)
    x = wide[:, 1:3, 1:-1].detach().requires_grad_()
    weight, dy = weight[1:-1], dy.transpose(0, 1).contiguous().transpose(0, 1)[:, 1:3, 1:-1]
    assert not x.is_contiguous()
    assert not dy.is_contiguous()
    y = rms_norm(x, weight, EPS)
    expected = oracles.rms_norm(x, weight, EPS, dy)
    close("rms_norm", y, expected[0])
    close("rms_norm", torch.autograd.grad(y, x, dy)[0], expected[1])


@pytest.mark.usefixtures("each_cpu_implementation")
def test_rows_of_zeros_and_of_large_numbers():
    x = torch.tensor([[0.0] * 8, [1e18] * 8]).requires_grad_()
    y = rms_norm(x, torch.ones(8), EPS)
    torch.testing.assert_close(y, torch.tensor([[0.0] * 8, [1.0] * 8]))
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


@pytest.mark.usefixtures("each_cpu_implementation")
def test_fp16_squares_do_not_overflow():
    x = torch.full((1, 64), 6e4, dtype=torch.float16)
    assert torch.equal(rms_norm(x, torch.ones(64, dtype=torch.float16), EPS), torch.ones_like(x))


def test_gradcheck():
    x, weight, _ = make_case((2, 3, 5), torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, weight, dy = make_case((2, 3, 16), dtype)
    opcheck(torch.ops.jindo.rms_norm, (x, weight, EPS))
    opcheck(torch.ops.jindo.rms_norm, (x, weight.detach(), EPS))
    x, weight = x.detach(), weight.detach()
    rstd = module.forward_reference(x, weight, EPS)[1]
    for need_dweight in (True, False):
        opcheck(torch.ops.jindo.rms_norm_backward, (dy, x, weight, rstd, need_dweight))


def test_compiles_into_one_graph():
    x, weight, dy = make_case((4, 32), torch.float32)

    def run(x, weight):
        return rms_norm(torch.tanh(x), weight, EPS) * 2

    expected = torch.autograd.grad(run(x, weight), (x, weight), dy)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(torch.autograd.grad(compiled(x, weight), (x, weight), dy), expected, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("weight", [(9,), (1,), (8, 8)])
def test_refuses(weight):
    with pytest.raises(ValueError, match=r"expected \[8\]"):
        rms_norm(torch.zeros(4, 8), torch.zeros(weight), EPS)


@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"device": "meta"}])
def test_refuses_a_weight_of_another_kind(other):
    with pytest.raises(ValueError, match=r"expected x's torch.float32 on cpu"):
        rms_norm(torch.zeros(4, 8), torch.zeros(8, **other), EPS)
