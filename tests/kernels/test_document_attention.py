"""Attention within documents: every implementation against causal attention of each alone, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from jindo_core.kernels import document_attention as module
from jindo_core.kernels.attention import causal_attention
from jindo_core.kernels.document_attention import document_attention

# (B, T, H, G, D), lengths, window: one document a sequence, one token, a document of several blocks beside small ones.
CASES = [
    ((1, 7, 6, 2, 10), (7,), None),
    ((2, 9, 4, 4, 8), (4, 5, 1, 8), None),
    ((3, 16, 4, 2, 16), (16, 5, 11, 1, 1, 14), None),
    ((3, 16, 4, 2, 16), (16, 5, 11, 1, 1, 14), 3),
    ((1, 700, 4, 1, 16), (3, 600, 97), None),
    ((1, 700, 4, 1, 16), (3, 600, 97), 50),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make_case(shape, dtype):
    b, t, h, g, d = shape
    generator = torch.Generator().manual_seed(t)
    return [
        torch.randn(b, t, n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for n in (h, g, g)
    ]


def oracle(q, k, v, lengths, window):
    """softmax(Q K^T / sqrt(D)) V in fp64 under one mask over all tokens: one document, not later, in the window."""
    batch, tokens, heads, size = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    shared = heads // k.shape[1]
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ahead = torch.arange(len(number))[:, None] - torch.arange(len(number))[None]
    seen = (number[:, None] == number[None]) & (ahead >= 0) & (ahead < (window or math.inf))
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(size)
    p = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", p, v).view(batch, tokens, heads, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "lengths", "window"), CASES, ids=str)
def test_values_and_gradients(shape, lengths, window, dtype, each_cpu_implementation, close):
    leaves = make_case(shape, dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    y, expected = document_attention(*leaves, lengths, window), oracle(*wide, lengths, window)
    assert y.dtype == dtype
    assert y.is_contiguous()
    close("attention", y, expected)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    wanted = torch.autograd.grad(expected, wide, dy.double())
    for grad, want in zip(torch.autograd.grad(y, leaves, dy), wanted, strict=True):
        close("attention", grad, want)


@pytest.mark.parametrize("window", [None, 3])
def test_one_call_a_document_as_on_a_gpu(window, close):
    """The path of devices that have torch's own kernel, here on the CPU."""
    lengths = (3, 1, 12)
    leaves = make_case((1, 16, 4, 2, 8), torch.float32)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    y, expected = module._one_by_one(*leaves, lengths, window), oracle(*wide, lengths, window)
    close("attention", y, expected)
    wanted = torch.autograd.grad(expected.square().sum(), wide)
    for grad, want in zip(torch.autograd.grad(y.square().sum(), leaves), wanted, strict=True):
        close("attention", grad, want)


def test_another_document_is_never_read(each_cpu_implementation):
    q, k, v = (x.detach() for x in make_case((1, 20, 2, 2, 16), torch.float32))
    expected = document_attention(q, k, v, (5, 9, 6))
    for x in (q, k, v):
        x[:, 5:14] = math.nan
    y = document_attention(q, k, v, (5, 9, 6))
    assert torch.equal(y[:, :5], expected[:, :5])
    assert torch.equal(y[:, 14:], expected[:, 14:])


def test_a_document_alone_is_causal_attention_bit_for_bit(each_cpu_implementation):
    q, k, v = (x.detach() for x in make_case((2, 33, 4, 2, 8), torch.float32))
    y = document_attention(q, k, v, (10, 23, 33))
    assert torch.equal(y[:1, :10], causal_attention(q[:1, :10], k[:1, :10], v[:1, :10]))
    assert torch.equal(y[1:], causal_attention(q[1:], k[1:], v[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, each_cpu_implementation):
    leaves, lengths = make_case((1, 9, 4, 2, 8), dtype), [2, 7]
    opcheck(torch.ops.jindo.document_attention, (*leaves, lengths, 4))
    q, k, v = (x.detach() for x in leaves)
    out, lse = torch.ops.jindo.document_attention(q, k, v, lengths, 4)
    more = (torch.ones_like(out), q, k, v, out, lse, lengths, 4)
    opcheck(torch.ops.jindo.document_attention_backward, more)


def test_no_more_is_saved_than_for_the_whole(each_cpu_implementation):
    q, k, v = make_case((1, 64, 4, 2, 8), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        document_attention(q, k, v, (30, 34))
    assert sorted(tuple(t.shape) for t in saved) == sorted([*(tuple(x.shape) for x in (q, k, v, q)), (1, 64, 4)])


@pytest.mark.parametrize("lengths", [(7,), (7, 8), (7, 7, 0), (10, 4), (6, 8), (7, 6), (-1, 8, 7), (), (7, 7, 7)])
def test_refuses_lengths_that_do_not_fill_the_sequences(lengths):
    x = torch.zeros(2, 7, 2, 8)
    with pytest.raises(ValueError, match="that fill 2 sequences of 7, none across"):
        document_attention(x, x, x, lengths)


def test_refuses_what_causal_attention_refuses():
    x = torch.zeros(2, 7, 2, 8)
    with pytest.raises(ValueError, match="document_attention got a window of 0"):
        document_attention(x, x, x, (7, 7), 0)
    with pytest.raises(ValueError, match=r"document_attention got q .* expected \[B, T, H, D\]"):
        document_attention(x, x[:, :5], x[:, :5], (7, 7))
