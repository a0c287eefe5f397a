"""RoPE against complex multiplication in fp64, with every implementation that runs on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from jindo_core.kernels.rope import rope

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# B, T, heads of q, heads of k, D
CASES = [(1, 1, 1, 1, 2), (2, 3, 4, 2, 16), (1, 5, 9, 3, 64), (2, 4, 3, 1, 80), (1, 2, 8, 8, 128), (3, 1, 5, 5, 6)]


def make_case(b, t, heads, k_heads, d, dtype, per_row=False):
    generator = torch.Generator().manual_seed(b * t * d + heads)
    q, dq = (torch.randn(b, t, heads, d, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    k, dk = (torch.randn(b, t, k_heads, d, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    angle = torch.rand(b if per_row else 1, t, d // 2, generator=generator, dtype=torch.float64) * 100
    wide = torch.promote_types(dtype, torch.float32)
    return q.requires_grad_(), k.requires_grad_(), angle.cos().to(wide), angle.sin().to(wide), dq, dk


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("each_cpu_implementation")
def test_values_and_gradients(case, per_row, dtype, close, oracles):
    q, k, cos, sin, dq, dk = make_case(*case, dtype, per_row)
    turned = rope(q, k, cos, sin)
    assert all(t.is_contiguous() for t in turned)
    ours = (*turned, *torch.autograd.grad(turned, (q, k), (dq, dk)))
    for value, wanted in zip(ours, oracles.rope(q, k, cos, sin, dq, dk), strict=True):
        assert value.dtype == dtype
        close("rope", value, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("each_cpu_implementation")
def test_q_and_k_inside_a_joint_projection(dtype, close, oracles):
    """As the model has them: columns of one tensor [B, T, (H + 2 G) D], and gradients laid out by attention."""
    b, t, heads, k_heads, d = 2, 5, 4, 2, 16
    _, _, cos, sin, dq, dk = make_case(b, t, heads, k_heads, d, dtype)
    joint = torch.randn(b, t, (heads + 2 * k_heads) * d, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, _ = joint.split([heads * d, k_heads * d, k_heads * d], dim=-1)
    q, k = q.unflatten(-1, (heads, d)).requires_grad_(), k.unflatten(-1, (k_heads, d)).requires_grad_()
    dq, dk = (g.transpose(1, 2).contiguous().transpose(1, 2) for g in (dq, dk))
    turned = rope(q, k, cos, sin)
    ours = (*turned, *torch.autograd.grad(turned, (q, k), (dq, dk)))
    for value, wanted in zip(ours, oracles.rope(q, k, cos, sin, dq, dk), strict=True):
        close("rope", value, wanted)


@pytest.mark.usefixtures("each_cpu_implementation")
def test_the_inverse_undoes_it():
    q, k, cos, sin, _, _ = make_case(1, 4, 2, 1, 8, torch.float64)
    there = torch.ops.jindo.rope(q, k, cos, sin, False)
    back = torch.ops.jindo.rope(*there, cos, sin, True)
    torch.testing.assert_close(back[0], q, rtol=0, atol=1e-14)
    torch.testing.assert_close(back[1], k, rtol=0, atol=1e-14)


@pytest.mark.usefixtures("each_cpu_implementation")
def test_an_expanded_gradient(close, oracles):
    q, k, cos, sin, _, _ = make_case(2, 3, 4, 2, 8, torch.float32)
    expected = oracles.rope(q, k, cos, sin, torch.ones_like(q), torch.ones_like(k))
    turned = rope(q, k, cos, sin)
    for grad, wanted in zip(torch.autograd.grad(turned[0].sum() + turned[1].sum(), (q, k)), expected[2:], strict=True):
        close("rope", grad, wanted)


def test_gradcheck():
    q, k, cos, sin, _, _ = make_case(2, 2, 2, 1, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    q, k, cos, sin, _, _ = make_case(2, 3, 4, 2, 8, dtype)
    for inverse in (False, True):
        opcheck(torch.ops.jindo.rope, (q, k, cos, sin, inverse))


def test_compiles_into_one_graph():
    q, k, cos, sin, dq, dk = make_case(2, 3, 4, 2, 8, torch.float32)

    def run(q, k):
        return rope(q * 2, torch.tanh(k), cos, sin)

    expected = torch.autograd.grad(run(q, k), (q, k), (dq, dk))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(torch.autograd.grad(compiled(q, k), (q, k), (dq, dk)), expected, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize(
    ("q", "k", "angle", "message"),
    [
        ((2, 3, 4, 8), (2, 3, 2, 6), (1, 3, 4), "D even"),
        ((2, 3, 4, 8), (2, 4, 2, 8), (1, 3, 4), r"expected \[B, T, heads, D\]"),
        ((2, 3, 4, 7), (2, 3, 2, 7), (1, 3, 3), "D even"),
        ((2, 3, 4, 8), (2, 3, 2, 8), (3, 3, 4), r"expected \[2 or 1, 3, 4\]"),
        ((2, 3, 4, 8), (2, 3, 2, 8), (1, 3, 8), r"expected \[2 or 1, 3, 4\]"),
    ],
)
def test_refuses(q, k, angle, message):
    with pytest.raises(ValueError, match=message):
        rope(torch.zeros(q), torch.zeros(k), torch.zeros(angle), torch.zeros(angle))


@pytest.mark.parametrize("wrong", ["k", "cos", "sin"])
@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"device": "meta"}])
def test_refuses_other_dtypes_and_devices(wrong, other):
    shapes = {"q": (1, 2, 2, 8), "k": (1, 2, 1, 8), "cos": (1, 2, 4), "sin": (1, 2, 4)}
    given = {name: torch.zeros(shape, **(other if name == wrong else {})) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"expected k as q|expected one device"):
        rope(**given)
