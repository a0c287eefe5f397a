"""RMSNorm for the GPU: one read of every operand. Contract, equations and reference: rms_norm.py.

A program holds whole rows in registers, several short ones or one of up to 8192 numbers; a longer row is read
twice. dW is summed without atomics, so that it is the same in every run: each program adds up its own rows, and
the fixed number of partial sums is added up afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jindo_core.kernels import rms_norm as contract
from jindo_core.kernels.launch import launch

LONGEST_TILE = 8192
"""Columns a program holds in registers; in a longer row, those of one step."""

ELEMENTS = 2048
"""Least elements of a program's tile: several rows where they are short."""

PARTIAL_SUMS = 512
"""Programs that share the rows when dW is asked for: one number for all GPUs, so that dW is the same on all."""

SASS_PER_ELEMENT = {"forward": 11.5, "backward": 18, "backward, dW": 23}
"""SASS instructions an element on sm_80 and later, at most, where a row fits. Below 34, forward, and 51 bytes are
what bounds (bf16, H100)."""


class Tile(NamedTuple):
    """`rows` rows and `columns` columns a step of a program takes."""

    rows: int
    columns: int
    warps: int


def tile_for(width: int) -> Tile:
    """The tile for rows of `width` numbers: 16 of them a thread."""
    columns = min(triton.next_power_of_2(width), LONGEST_TILE)
    rows = max(ELEMENTS // columns, 1)
    return Tile(rows, columns, min(max(rows * columns // 512, 1), 16))


@triton.jit
def forward_kernel(
    y_ptr,  # [M, C]
    rstd_ptr,  # fp32 [M]
    x_ptr,  # [M, C]
    w_ptr,  # [C]
    M, C, one_over_c, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """y = w * (x * rstd)"""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * C + column[None, :]
    there = (row < M)[:, None]
    if WHOLE:
        inside = there & (column < C)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        w = tl.load(w_ptr + column, mask=column < C, other=0.0)
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) * one_over_c + eps)
        normal = (wide * rstd[:, None]).to(x.dtype)  # rounded before it meets w, as in LLaMA
        y = normal.to(tl.float32) * w.to(tl.float32)[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, C, COLUMNS):
            wide = tl.load(x_ptr + at + start, mask=there & (column < C - start)[None, :], other=0.0).to(tl.float32)
            squares += wide * wide
        rstd = tl.rsqrt(tl.sum(squares, axis=1) * one_over_c + eps)
        for start in range(0, C, COLUMNS):
            inside = there & (column < C - start)[None, :]
            x = tl.load(x_ptr + at + start, mask=inside, other=0.0)
            w = tl.load(w_ptr + start + column, mask=column < C - start, other=0.0)
            normal = (x.to(tl.float32) * rstd[:, None]).to(x.dtype)
            y = normal.to(tl.float32) * w.to(tl.float32)[None, :]
            tl.store(y_ptr + at + start, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < M)


@triton.jit
def backward_kernel(
    dx_ptr,  # [M, C]
    partial_ptr,  # fp32 [programs, C] when NEED_DW, zeros unless WHOLE
    dy_ptr,  # [M, C]
    x_ptr,  # [M, C]
    w_ptr,  # [C]
    rstd_ptr,  # fp32 [M]
    M, C, one_over_c,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, NEED_DW: tl.constexpr,
):  # fmt: skip
    """dX = rstd * (g - xhat * mean(g * xhat)), g = dY * w; this program's share of dW = sum_rows dY * xhat"""
    column = tl.arange(0, COLUMNS)
    partial_ptr += tl.program_id(0).to(tl.int64) * C
    if WHOLE:
        w = tl.load(w_ptr + column, mask=column < C, other=0.0).to(tl.float32)
        dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * C + column[None, :]
        there = (row < M)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
        if WHOLE:
            inside = there & (column < C)[None, :]
            normal = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd[:, None]
            dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
            g = dy * w[None, :]
            mean = tl.sum(g * normal, axis=1) * one_over_c
            dx = (g - normal * mean[:, None]) * rstd[:, None]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            if NEED_DW:
                dw += dy * normal
        else:
            products = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, C, COLUMNS):
                inside = there & (column < C - start)[None, :]
                w = tl.load(w_ptr + start + column, mask=column < C - start, other=0.0).to(tl.float32)
                normal = tl.load(x_ptr + at + start, mask=inside, other=0.0).to(tl.float32) * rstd[:, None]
                dy = tl.load(dy_ptr + at + start, mask=inside, other=0.0).to(tl.float32)
                products += dy * w[None, :] * normal
                if NEED_DW:  # every number of the share is read and written by one thread: no races
                    share = tl.load(partial_ptr + start + column, mask=column < C - start, other=0.0)
                    share += tl.sum(dy * normal, axis=0)
                    tl.store(partial_ptr + start + column, share, mask=column < C - start)
            mean = tl.sum(products, axis=1) * one_over_c
            for start in range(0, C, COLUMNS):
                inside = there & (column < C - start)[None, :]
                w = tl.load(w_ptr + start + column, mask=column < C - start, other=0.0).to(tl.float32)
                normal = tl.load(x_ptr + at + start, mask=inside, other=0.0).to(tl.float32) * rstd[:, None]
                dy = tl.load(dy_ptr + at + start, mask=inside, other=0.0).to(tl.float32)
                dx = (dy * w[None, :] - normal * mean[:, None]) * rstd[:, None]
                tl.store(dx_ptr + at + start, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if WHOLE and NEED_DW:
        tl.store(partial_ptr + column, tl.sum(dw, axis=0), mask=column < C)


# --- launches -------------------------------------------------------------------------------------------


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm`: returns y [..., C] and rstd [rows]. fp64 is left to the reference."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return contract.forward_reference(x, weight, eps)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows, width = flat.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    tile = tile_for(width)
    launch(
        forward_kernel, (triton.cdiv(rows, tile.rows),),
        y, rstd, flat, weight.contiguous(), rows, width, 1.0 / width, eps,
        ROWS=tile.rows, COLUMNS=tile.columns, WHOLE=width <= tile.columns,
        num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y, rstd


def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_dweight: bool) -> tuple[Tensor, Tensor]:
    """`rms_norm_backward`: returns dX and dW, empty where it was not asked for."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return contract.backward_reference(dy, x, weight, rstd, need_dweight)
    width = x.shape[-1]
    flat, flat_dy = x.reshape(-1, width).contiguous(), dy.reshape(-1, width).contiguous()
    rows = flat.shape[0]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = tile_for(width)
    whole = width <= tile.columns
    programs = triton.cdiv(rows, tile.rows)
    partial = flat
    if need_dweight:
        programs = min(programs, PARTIAL_SUMS)
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        if not whole:
            partial.zero_()
    launch(
        backward_kernel, (programs,),
        dx, partial, flat_dy, flat, weight.contiguous(), rstd, rows, width, 1.0 / width,
        ROWS=tile.rows, COLUMNS=tile.columns, WHOLE=whole, NEED_DW=need_dweight,
        num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if need_dweight else dy.new_empty(0)
