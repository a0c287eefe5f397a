"""RoPE for the GPU: q and k in one launch, read where they lie. Contract, equation and reference: rope.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from jindo_core.kernels import rope as contract
from jindo_core.kernels.launch import launch

PAIRS = 512
"""Pairs a program turns, at most: eight a thread, so that each half of a head moves 128 bits at a time."""

SASS_PER_ELEMENT = {"full": 10, "small": 15}  # small: heads too few and short for `PAIRS`
"""SASS instructions an element on sm_80 and later, at most. Below 34 bytes are what bounds (bf16, H100)."""


@triton.jit
def turn(
    out_ptr, x_ptr, cos, sin, token, first_head, at, head_stride, heads,
    HALF: tl.constexpr, HALF_WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: read at `at`, written to row `token` of a contiguous [B * T, heads, D]."""
    head = first_head + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF_WIDTH)
    mask = (head < heads)[:, None] & (pair < HALF)[None, :]
    x = x_ptr + at + head.to(tl.int64)[:, None] * head_stride + pair[None, :]
    a = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + token * heads * (2 * HALF) + head[:, None] * (2 * HALF) + pair[None, :]
    tl.store(out, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope_kernel(
    out_q_ptr,  # [B, T, H, D], contiguous
    out_k_ptr,  # [B, T, G, D], contiguous
    q_ptr,  # [B, T, H, D], any strides but the last
    k_ptr,  # [B, T, G, D], likewise
    cos_ptr, sin_ptr,  # fp32 [B or 1, T, D/2]
    T, H, G,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, cos_stride_b,
    HALF: tl.constexpr, HALF_WIDTH: tl.constexpr, HEADS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """[a cos - b sin, b cos + a sin]; the first blocks of heads of a token are q's, the rest k's"""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    pair = tl.arange(0, HALF_WIDTH)
    angle = b * cos_stride_b + t * HALF + pair
    cos = tl.load(cos_ptr + angle, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=pair < HALF, other=0.0)[None, :]
    if INVERSE:
        sin = -sin
    block = tl.program_id(1)
    q_blocks = tl.cdiv(H, HEADS)
    if block < q_blocks:
        at = b * q_stride_b + t * q_stride_t
        turn(out_q_ptr, q_ptr, cos, sin, token, block * HEADS, at, q_stride_h, H, HALF, HALF_WIDTH, HEADS)
    else:
        at = b * k_stride_b + t * k_stride_t
        turn(out_k_ptr, k_ptr, cos, sin, token, (block - q_blocks) * HEADS, at, k_stride_h, G, HALF, HALF_WIDTH, HEADS)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """`rope`, or its inverse. fp64 is left to the reference."""
    if q.dtype == torch.float64 or q.numel() == 0 or k.numel() == 0:
        return contract.rope_reference(q, k, cos, sin, inverse)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))  # the gradient of a sum has stride 0
    b, t, q_heads, d = q.shape
    k_heads, half = k.shape[2], d // 2
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    width = triton.next_power_of_2(half)
    heads = max(min(triton.next_power_of_2(min(q_heads, k_heads)), PAIRS // width), 1)
    warps = min(max(heads * width // 256, 1), 8)
    launch(
        rope_kernel, (b * t, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads)),
        out_q, out_k, q, k, cos.contiguous(), sin.contiguous(), t, q_heads, k_heads,
        *q.stride()[:3], *k.stride()[:3], t * half if cos.shape[0] > 1 else 0,
        HALF=half, HALF_WIDTH=width, HEADS=heads, INVERSE=inverse,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out_q, out_k
