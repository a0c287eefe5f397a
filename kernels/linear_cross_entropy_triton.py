"""Linear + cross entropy for the GPU. Contract, equations and reference: linear_cross_entropy.py.

The products are cuBLAS's. Between them one kernel goes twice over each row of a chunk's logits: once for their
logsumexp (online: Milakov and Gimelshein 2018, arXiv:1805.02867), once to overwrite them with their gradient.
So a chunk is one tensor in the logits' own dtype, where the reference holds the logits, an fp32 copy of them
and the gradient. The second pass mostly finds its row in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from jindo_core.kernels import linear_cross_entropy as contract
from jindo_core.kernels.launch import launch

LANES = 512
"""Running maxima and sums of a program, two a thread: two independent chains, and no traffic between threads."""

WARPS = 8

PADDING = 16
"""Rows of the logits lie a multiple of it apart, so that a vocabulary of 32001 is read 128 bits at a time too."""

SASS_PER_ELEMENT = {"plain": 26, "smoothed": 29}
"""SASS instructions an element on sm_80 and later, at most, both passes. Below 34 bytes are what bounds (bf16,
H100)."""


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # [rows, width], overwritten when GRADIENT
    loss_ptr,  # fp32 [rows]
    label_ptr,  # int64 [rows]
    vocab,
    width,  # vocab and its padding
    smoothing,
    each,  # smoothing / vocab
    LANES: tl.constexpr, VECTOR: tl.constexpr, SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """loss = logsumexp(z) - (1 - e) z[y] - e mean(z); z <- softmax(z) - (1 - e) onehot(y) - e / V"""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * width
    label = tl.load(label_ptr + row)
    # A label outside the vocabulary gives NaN, not a stray read.
    label_logit = tl.load(logits_ptr + label, mask=(label >= 0) & (label < vocab), other=float("nan")).to(tl.float32)
    column = tl.arange(0, LANES * VECTOR)
    peak = tl.full((LANES,), -3.0e38, tl.float32)  # finite: -inf - -inf is NaN
    total = tl.zeros((LANES,), tl.float32)
    plain = tl.zeros((LANES,), tl.float32)
    for start in range(0, width, LANES * VECTOR):
        z = tl.load(logits_ptr + start + column, mask=column < width - start, other=0.0).to(tl.float32)
        inside = column < vocab - start
        if SMOOTHED:
            plain += tl.sum(tl.reshape(tl.where(inside, z, 0.0), (LANES, VECTOR)), axis=1)
        z = tl.reshape(tl.where(inside, z, -float("inf")), (LANES, VECTOR))  # VECTOR neighbours lie in one thread
        higher = tl.maximum(peak, tl.max(z, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
        peak = higher
    top = tl.max(peak, axis=0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(peak - top), axis=0))
    loss = log_sum - (1.0 - smoothing) * label_logit
    if SMOOTHED:
        loss -= each * tl.sum(plain, axis=0)
    tl.store(loss_ptr + row, loss)
    if GRADIENT:
        label = label.to(tl.int32)
        for start in range(0, width, LANES * VECTOR):
            z = tl.load(logits_ptr + start + column, mask=column < width - start, other=0.0).to(tl.float32)
            dz = tl.exp(z - log_sum)
            if SMOOTHED:
                dz -= each
            dz = tl.where(column == label - start, dz - (1.0 - smoothing), dz)
            tl.store(logits_ptr + start + column, dz.to(logits_ptr.dtype.element_ty), mask=column < width - start)


def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_dhidden: bool,
    need_dweight: bool,
    counted_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_cross_entropy`: the summed loss, dH and dW of that sum. fp64 is left to the reference."""
    if hidden.dtype == torch.float64:
        return contract.forward_reference(
            hidden, weight, labels, ignore_index, label_smoothing, need_dhidden, need_dweight, counted_rows
        )
    vocab = weight.shape[0]
    dhidden = torch.zeros_like(hidden) if need_dhidden else hidden.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=torch.float32) if need_dweight else weight.new_empty(0)
    counted = contract.counted(labels, ignore_index, counted_rows)
    losses = torch.empty(counted.numel(), dtype=torch.float32, device=hidden.device)
    step = contract.chunk_rows(vocab, in_place=True)
    width = triton.cdiv(vocab, PADDING) * PADDING
    buffer = torch.empty(min(step, counted.numel()), width, dtype=hidden.dtype, device=hidden.device)
    for rows, loss in zip(counted.split(step), losses.split(step), strict=True):
        if rows.numel() == 0:
            break
        h, chunk = hidden[rows], buffer[: rows.numel()]
        logits = chunk[:, :vocab]
        torch.mm(h, weight.t(), out=logits)
        launch(
            cross_entropy_kernel, (rows.numel(),),
            chunk, loss, labels[rows], vocab, width, label_smoothing, label_smoothing / vocab,
            LANES=LANES, VECTOR=16 // hidden.element_size(), SMOOTHED=label_smoothing > 0,
            GRADIENT=need_dhidden or need_dweight, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        if need_dhidden:
            dhidden[rows] = logits @ weight
        if need_dweight:
            dweight += logits.t() @ h
    return losses.sum(), dhidden, dweight.to(weight.dtype)
