"""Causal attention: every implementation against fp64, as a torch operator, and its memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from jindo_core.kernels import attention
from jindo_core.kernels.attention import causal_attention

# (B, T, H, G, D): one token, odd everything, grouped and not, more queries than a block has.
SHAPES = [(1, 1, 1, 1, 4), (2, 7, 6, 2, 10), (1, 65, 4, 4, 48), (2, 130, 9, 3, 64), (1, 600, 8, 1, 16)]
# Beyond the sequence, its length, odd, two keys; in a shape with several blocks, so that some keys are skipped.
WINDOWS = [(SHAPES[1], 9), (SHAPES[1], 7), (SHAPES[1], 3), (SHAPES[2], 2), (SHAPES[3], 50), (SHAPES[4], 37)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make_case(shape, dtype):
    b, t, h, g, d = shape
    generator = torch.Generator().manual_seed(t)

    def normal(heads):
        return torch.randn(b, t, heads, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return normal(h), normal(g), normal(g)


def oracle(q, k, v, window=None):
    """softmax(Q K^T / sqrt(D)) V in fp64, a query seeing what is not later than itself, nor before the window."""
    shared = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(shared, dim=2), v.repeat_interleave(shared, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[3])
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    unseen = later | torch.ones_like(later).tril(-window) if window else later
    p = scores.masked_fill(unseen, -math.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", p, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "window"), [(shape, None) for shape in SHAPES] + WINDOWS, ids=str)
def test_values_and_gradients(shape, window, dtype, each_cpu_implementation, close):
    leaves = make_case(shape, dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    y, expected = causal_attention(*leaves, window), oracle(*wide, window)
    assert y.dtype == dtype
    assert y.is_contiguous()
    close("attention", y, expected)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    wanted = torch.autograd.grad(expected, wide, dy.double())
    for grad, want in zip(torch.autograd.grad(y, leaves, dy), wanted, strict=True):
        close("attention", grad, want)


def test_log_sum_exp_is_that_of_the_scores(each_cpu_implementation):
    q, k, v = (x.detach() for x in make_case((2, 40, 4, 2, 16), torch.float32))
    _, lse = torch.ops.jindo.causal_attention(q, k, v, 40)
    keys = k.double().repeat_interleave(2, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.double(), keys) / 4
    scores.masked_fill_(torch.ones(40, 40, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1).transpose(1, 2), atol=1e-5, rtol=0)


def test_strided_input_and_large_scores(each_cpu_implementation, close):
    """q, k and v as slices of one joint tensor; scores of a hundred neither overflow nor lose the maximum."""
    joint = torch.randn(2, 33, 4 * 8 + 2 * 2 * 8, generator=torch.Generator().manual_seed(0)) * 5
    q, k, v = (x.unflatten(-1, (-1, 8)) for x in joint.split((32, 16, 16), dim=-1))
    y = causal_attention(q, k, v)
    assert y.isfinite().all()
    close("attention", y, oracle(q.double(), k.double(), v.double()), torch.float32)


def test_torch_serves_other_devices_with_the_same_result(close):
    """What runs on CUDA, run here: no window, and one with grouped heads."""
    leaves = make_case((2, 33, 6, 2, 16), torch.float32)
    for window in (None, 33, 5):
        y = attention._torch_attention(*leaves, window or 33)
        assert y.is_contiguous()
        close("attention", y, oracle(*(x.double() for x in leaves), window), torch.float32)


def test_keys_outside_the_window_are_never_read(each_cpu_implementation):
    """Not even their NaN, which a mask of minus infinity would let through: blocks start at the window."""
    q, k, v = (x.detach() for x in make_case((1, 700, 8, 1, 16), torch.float32))
    expected = causal_attention(q, k, v, 40)
    k[:, :100] = math.nan
    y = causal_attention(q, k, v, 40)
    block = attention.block_rows(8, 700, 40)
    after = -(-(100 + 39) // block) * block
    assert after < 600
    assert torch.equal(y[:, after:], expected[:, after:])


def test_a_nan_stays_visible(each_cpu_implementation):
    q, k, v = (x.detach() for x in make_case((1, 20, 2, 2, 16), torch.float32))
    k[0, 5, 1, 3] = math.nan
    y = causal_attention(q, k, v)
    assert y[0, 5:, 1].isnan().all()
    assert y[0, :5].isfinite().all()
    assert y[0, :, 0].isfinite().all()


def test_the_precision_of_other_products_is_left_alone(each_cpu_implementation):
    before = torch.backends.mkldnn.matmul.fp32_precision
    leaves = make_case((1, 20, 2, 1, 16), torch.bfloat16)
    causal_attention(*leaves).sum().backward()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, each_cpu_implementation):
    leaves = make_case((2, 9, 4, 2, 8), dtype)
    opcheck(torch.ops.jindo.causal_attention, (*leaves, 4))
    q, k, v = (x.detach() for x in leaves)
    out, lse = torch.ops.jindo.causal_attention(q, k, v, 4)
    opcheck(torch.ops.jindo.causal_attention_backward, (torch.ones_like(out), q, k, v, out, lse, 4))


def test_no_scores_are_kept(each_cpu_implementation):
    """Saved beside the inputs: O and one number a row."""
    q, k, v = make_case((1, 64, 4, 2, 8), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        causal_attention(q, k, v)
    assert sorted(tuple(t.shape) for t in saved) == sorted([*(tuple(x.shape) for x in (q, k, v, q)), (1, 64, 4)])


@pytest.mark.parametrize(("heads", "tokens"), [(1, 1), (32, 512), (32, 8192), (512, 100_000), (9, 96)])
def test_a_block_holds_at_most_two_to_the_twenty_scores(heads, tokens):
    rows = attention.block_rows(heads, tokens)
    assert 1 <= rows <= tokens
    assert heads * rows * tokens <= 1 << 20 or rows == 16
    assert attention.workspace_bytes(1, tokens, heads, 1, 0, 2, backward=True) == heads * rows * tokens * 12


@pytest.mark.parametrize(("heads", "tokens", "window"), [(32, 8192, 512), (32, 4096, 4095), (9, 300, 1), (4, 9, 3)])
def test_a_window_makes_blocks_smaller(heads, tokens, window):
    rows = attention.block_rows(heads, tokens, window)
    assert attention.block_rows(heads, tokens) <= rows <= tokens
    keys = min(tokens, rows + window - 1)
    assert heads * rows * keys <= 1 << 20 or rows == 16
    held = attention.workspace_bytes(1, tokens, heads, 1, 0, 2, backward=True, window=window)
    assert held == heads * rows * keys * 12


@pytest.mark.parametrize("window", [0, -3])
def test_refuses_a_window_that_holds_no_key(window):
    x = torch.zeros(2, 7, 2, 8)
    with pytest.raises(ValueError, match=f"got a window of {window}, expected 1 or more"):
        causal_attention(x, x, x, window)


@pytest.mark.parametrize("change", [{"k": (2, 6, 2, 8)}, {"v": (2, 7, 1, 8)}, {"k": (2, 7, 3, 8), "v": (2, 7, 3, 8)}])
def test_refuses_shapes_that_do_not_fit(change):
    shapes = {"q": (2, 7, 4, 8), "k": (2, 7, 2, 8), "v": (2, 7, 2, 8)} | change
    with pytest.raises(ValueError, match=r"expected \[B, T, H, D\]"):
        causal_attention(*(torch.zeros(shapes[name]) for name in "qkv"))


@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"device": "meta"}])
def test_refuses_what_the_kernels_would_misread(other):
    x = torch.zeros(2, 7, 2, 8)
    with pytest.raises(ValueError, match="expected one dtype and device"):
        causal_attention(x, x, torch.zeros(2, 7, 2, 8, **other))
