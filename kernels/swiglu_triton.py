"""SwiGLU for the GPU: one read of every operand, one rounding. Contract, equations and reference: swiglu.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from jindo_core.kernels import swiglu as contract
from jindo_core.kernels.launch import launch

ELEMENTS = 1024
"""Elements of a program: eight a thread, 128 bits of a 16-bit type."""

WARPS = 4

SASS_PER_ELEMENT = {"forward": 24, "backward": 33}
"""SASS instructions an element on sm_80 and later, at most. Below 51 and 85 bytes are what bounds (bf16, H100)."""


@triton.jit
def forward_kernel(
    h_ptr,  # [M, I], contiguous
    gate_ptr,  # [M, I], rows `gate_row` apart
    up_ptr,  # [M, I], rows `up_row` apart
    width, gate_row, up_row,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """h = silu(g) * u"""
    row, column = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ELEMENTS
    inside = tl.arange(0, ELEMENTS)
    mask = inside < width - column
    g = tl.load(gate_ptr + row * gate_row + column + inside, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * up_row + column + inside, mask=mask, other=0.0).to(tl.float32)
    h = g / (1 + tl.exp(-g)) * u
    tl.store(h_ptr + row * width + column + inside, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dgate_ptr, dup_ptr,  # [M, I], contiguous
    dh_ptr,  # [M, I], rows `dh_row` apart
    gate_ptr,  # [M, I], rows `gate_row` apart
    up_ptr,  # [M, I], rows `up_row` apart
    width, dh_row, gate_row, up_row,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """dU = dH * silu(g), dG = dH * u * sigmoid(g) * (1 + g * (1 - sigmoid(g)))"""
    row, column = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ELEMENTS
    inside = tl.arange(0, ELEMENTS)
    mask = inside < width - column
    dh = tl.load(dh_ptr + row * dh_row + column + inside, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + row * gate_row + column + inside, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * up_row + column + inside, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    d = dh * sigmoid
    out = row * width + column + inside
    tl.store(dup_ptr + out, (d * g).to(dup_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_ptr + out, (d * u * (1 + g * (1 - sigmoid))).to(dgate_ptr.dtype.element_ty), mask=mask)


# --- launches -------------------------------------------------------------------------------------------


def as_rows(tensor: Tensor) -> Tensor:
    """[M, I] with contiguous rows: a view where the rows are at one distance, as the halves of a joint tensor are."""
    width = tensor.shape[-1]
    if tensor.stride(-1) != 1 and width > 1:
        return tensor.contiguous().view(-1, width)
    return tensor.reshape(-1, width)


def row_layout(*tensors: Tensor) -> tuple[int, int, list[int]]:
    """Rows, their width, and the distance of each tensor's rows: one row of all elements where all are dense."""
    rows, width = tensors[0].shape
    if all(tensor.is_contiguous() for tensor in tensors):
        return 1, rows * width, [rows * width] * len(tensors)
    return rows, width, [tensor.stride(0) for tensor in tensors]


MOST_ROWS = 65535
"""The second dimension of a grid ends there."""


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu`. fp64 is left to the reference."""
    if gate.dtype == torch.float64 or gate.numel() == 0:
        return contract.forward_reference(gate, up)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    operands = [as_rows(tensor) for tensor in (gate, up)]
    if operands[0].shape[0] > MOST_ROWS:
        operands = [tensor.contiguous() for tensor in operands]
    rows, width, distances = row_layout(*operands)
    launch(
        forward_kernel, (triton.cdiv(width, ELEMENTS), rows),
        h, *operands, width, *distances, ELEMENTS=ELEMENTS, num_warps=WARPS, enable_fp_fusion=True
    )
    return h


def backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu_backward`: returns dG and dU."""
    if gate.dtype == torch.float64 or gate.numel() == 0:
        return contract.backward_reference(dh, gate, up)
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    operands = [as_rows(tensor) for tensor in (dh, gate, up)]
    if operands[0].shape[0] > MOST_ROWS:
        operands = [tensor.contiguous() for tensor in operands]
    rows, width, distances = row_layout(*operands)
    launch(
        backward_kernel, (triton.cdiv(width, ELEMENTS), rows),
        dgate, dup, *operands, width, *distances, ELEMENTS=ELEMENTS, num_warps=WARPS, enable_fp_fusion=True
    )
    return dgate, dup
