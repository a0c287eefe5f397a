"""The RoPE kernel in Triton's interpreter. No bf16: the interpreter truncates where a GPU rounds."""

from __future__ import annotations

import pytest
import torch

from jindo_core.kernels import dispatch, rope_triton
from jindo_core.kernels.rope import rope, rope_reference

pytestmark = pytest.mark.interpreter

# B, T, heads of q, heads of k, D: heads fewer and more than a program's, D/2 no power of two.
CASES = [(1, 1, 1, 1, 2), (2, 3, 4, 2, 16), (1, 2, 9, 3, 64), (2, 2, 3, 1, 80), (1, 2, 16, 16, 128), (1, 2, 1, 3, 2048)]


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory(nan_in_fresh_memory):
    """Nothing may be left unwritten."""


def make_case(b, t, heads, k_heads, d, dtype, per_row):
    generator = torch.Generator().manual_seed(b * t * d + heads)
    q, dq = (torch.randn(b, t, heads, d, generator=generator).to(dtype) for _ in range(2))
    k, dk = (torch.randn(b, t, k_heads, d, generator=generator).to(dtype) for _ in range(2))
    angle = torch.rand(b if per_row else 1, t, d // 2, generator=generator, dtype=torch.float64) * 100
    return q, k, angle.cos().float(), angle.sin().float(), dq, dk


def check(case, close, oracles):
    q, k, cos, sin, dq, dk = case
    ours = (*rope_triton.rope(q, k, cos, sin, False), *rope_triton.rope(dq, dk, cos, sin, True))
    for value, wanted in zip(ours, oracles.rope(*case), strict=True):
        assert value.dtype == q.dtype
        assert value.is_contiguous()
        close("rope", value, wanted)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_and_inverse(case, per_row, dtype, close, oracles):
    check(make_case(*case, dtype, per_row), close, oracles)


def test_nothing_beyond_the_inputs_is_used(close, oracles, walled):
    check([walled(t) for t in make_case(2, 3, 5, 2, 20, torch.float32, False)], close, oracles)


def test_any_strides(close, oracles):
    q, k, cos, sin, dq, dk = make_case(2, 3, 4, 2, 16, torch.float32, True)
    joint = torch.cat((q.flatten(2), k.flatten(2), k.flatten(2)), dim=-1)
    q, k = joint[..., :64].unflatten(-1, (4, 16)), joint[..., 64:96].unflatten(-1, (2, 16))
    dq, dk = dq.transpose(1, 2).contiguous().transpose(1, 2), dk.transpose(0, 3).contiguous().transpose(0, 3)
    check((q, k, cos, sin, dq, dk), close, oracles)
    check((q, k, cos, sin, dq[:1, :1, :1, :1].expand(dq.shape), dk), close, oracles)


def test_the_operator_runs_it(close, oracles):
    q, k, cos, sin, dq, dk = make_case(2, 3, 4, 2, 16, torch.float16, False)
    q.requires_grad_(), k.requires_grad_()
    with dispatch.override("triton"):
        turned = rope(q, k, cos, sin)
        ours = (*turned, *torch.autograd.grad(turned, (q, k), (dq, dk)))
    for value, wanted in zip(ours, oracles.rope(q, k, cos, sin, dq, dk), strict=True):
        close("rope", value, wanted)


def test_fp64_and_no_tokens_are_left_to_the_reference():
    case = make_case(1, 2, 2, 1, 8, torch.float64, False)[:4]
    for ours, wanted in zip(rope_triton.rope(*case, False), rope_reference(*case, False), strict=True):
        assert torch.equal(ours, wanted)
    empty = [t[:, :0].float() for t in case]
    assert rope_triton.rope(*empty, False)[0].shape == (1, 0, 2, 8)
