"""SwiGLU against torch's silu in fp64, with every implementation that runs on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from jindo_core.kernels.swiglu import swiglu

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make_case(shape, dtype):
    """Gate and up, the halves of a joint tensor, and a gradient; gates reach far into both tails."""
    generator = torch.Generator().manual_seed(sum(shape))
    joint = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator, dtype=torch.float64)
    joint[..., : shape[-1]] *= 4
    gate, up = joint.to(dtype).chunk(2, dim=-1)
    dh = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return gate.requires_grad_(), up.requires_grad_(), dh


@pytest.mark.parametrize("strided", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7,), (3, 33), (2, 5, 64), (4, 1536), (2, 2049)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("each_cpu_implementation")
def test_values_and_gradients(shape, strided, dtype, close, oracles):
    gate, up, dh = make_case(shape, dtype)
    if not strided:
        gate, up = (t.detach().clone().contiguous().requires_grad_() for t in (gate, up))
    h = swiglu(gate, up)
    assert h.is_contiguous()
    ours = (h, *torch.autograd.grad(h, (gate, up), dh))
    for value, wanted in zip(ours, oracles.swiglu(gate, up, dh), strict=True):
        assert value.dtype == dtype
        close("swiglu", value, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("each_cpu_implementation")
def test_any_strides(dtype, close, oracles):
    gate, up, dh = make_case((6, 4, 10), dtype)
    gate, up = gate.detach().transpose(0, 2).requires_grad_(), up.detach()[..., ::2].transpose(0, 2)
    gate = gate[::2].detach().requires_grad_()
    dh = dh.transpose(0, 2)[::2]
    h = swiglu(gate, up)
    expected = oracles.swiglu(gate, up, dh)
    close("swiglu", h, expected[0])
    close("swiglu", torch.autograd.grad(h, gate, dh)[0], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("each_cpu_implementation")
def test_the_tails_stay_finite(dtype):
    gate = torch.tensor([-6e4, -200.0, -89.0, 0.0, 89.0, 200.0, 6e4], dtype=dtype).requires_grad_()
    h = swiglu(gate, torch.ones(7, dtype=dtype))
    torch.testing.assert_close(h, gate.detach().relu())
    (grad,) = torch.autograd.grad(h, gate, torch.ones(7, dtype=dtype))
    torch.testing.assert_close(grad, torch.tensor([0, 0, 0, 0.5, 1, 1, 1], dtype=dtype))


@pytest.mark.usefixtures("each_cpu_implementation")
def test_an_expanded_gradient(close, oracles):
    gate, up, _ = make_case((3, 20), torch.float32)
    expected = oracles.swiglu(gate, up, torch.ones(3, 20))
    close("swiglu", torch.autograd.grad(swiglu(gate, up).sum(), gate)[0], expected[1])


def test_gradcheck():
    gate, up, _ = make_case((2, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    gate, up, dh = make_case((3, 8), dtype)
    opcheck(torch.ops.jindo.swiglu, (gate, up))
    opcheck(torch.ops.jindo.swiglu_backward, (dh, gate.detach(), up.detach()))


def test_compiles_into_one_graph():
    gate, up, dh = make_case((4, 16), torch.float32)

    def run(gate, up):
        return swiglu(gate * 2, torch.tanh(up)) + 1

    expected = torch.autograd.grad(run(gate, up), (gate, up), dh)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(torch.autograd.grad(compiled(gate, up), (gate, up), dh), expected, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(
    ("gate", "up"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float16)),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta")),
    ],
)
def test_refuses(gate, up):
    with pytest.raises(ValueError, match=r"swiglu got torch.float32 \(2, 3\) on cpu and"):
        swiglu(gate, up)
