"""LoRA linear on an NF4 weight for one to four rows on the GPU: decoding. Contract and equations: lora_matmul.py.

    y = x W^T + scale * (x A^T) B^T

Bound by reading W, so W is read once, 0.516 bytes a weight, and never written: its codes are looked up and met
with x in registers, in fp32, by multiply-adds (a tensor core would idle, and sm_75 has none for Triton). A block's
maximum multiplies the sum of 32 products, not every weight. A program is one warp, so that `tl.gather` from the 16
codes is a shuffle: 32 lookups a cycle and multiprocessor, where a table in shared memory gives 10 for its bank
conflicts, a third of what an H100's memory delivers.

K is split over several programs where N alone has too few for the GPU. Each writes its partial sum to a buffer,
and a second kernel adds them up in a fixed order, the adapter's share with them: no atomics, so the same result
in every run. x A^T is made by extra programs of the first launch, split in the same way.

W keeps its fp32 product here, where the reference rounds it to x's dtype: a little nearer to the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jindo_core.kernels import lora_matmul as contract
from jindo_core.kernels import lora_matmul_reference as reference
from jindo_core.kernels import nf4
from jindo_core.kernels.launch import launch
from jindo_core.kernels.lora_matmul_triton import is_paired
from jindo_core.kernels.nf4_triton import expand_absmax, weight_arguments

MAX_ROWS = 4
"""Rows of x at most: their products are kept in registers beside the codes."""

PROGRAMS = 1024
"""Programs wanted: K is split until there are that many. One number for all GPUs, so that sums are the same on all."""

SUM_ELEMENTS = 4096
"""Numbers of B that a program of the second kernel reads, 32 a thread."""

SASS_PER_WEIGHT = {1: 6.2, 2: 8.5, 3: 10.5, 4: 15.5}
"""SASS instructions a weight in the main loop on sm_80 and later, at most, by M. Below 4.4 (H100), 6.5 (A100), 12
(3070) and 21 (4090) bytes are what bounds."""


class Tiles(NamedTuple):
    """A program's tile of W: `n` rows, `k` columns a step."""

    n: int
    k: int


# A step reads 256 or 512 bytes of each row, 8 or 16 a lane; x's numbers for them stay in registers from row to row.
# Measured on an H100: half the step at M = 1 leaves room for twice the programs at a time, 0.79 of the time.
PAIRED_TILES = {1: Tiles(8, 512), 2: Tiles(4, 1024), 3: Tiles(4, 1024), 4: Tiles(4, 1024)}
# x's numbers at M = 4 are 128 registers: more than two rows of W beside them spill before sm_80, and in fp32.
NARROW_TILES = PAIRED_TILES | {4: Tiles(2, 1024)}
UNPAIRED_TILES = Tiles(4, 128)


@triton.jit
def look_up(codes_ptr, code, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 [ROWS, COLUMNS] in 0..15 -> the fp32 codes."""
    table = tl.load(codes_ptr + tl.arange(0, 16))
    return tl.reshape(tl.gather(table, tl.reshape(code, (ROWS * COLUMNS,)), 0), (ROWS, COLUMNS))


@triton.jit
def adapter_products(
    out_ptr, x_ptr, a_ptr, r, k_start, k_stop, K, R,
    ROWS: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Row r of A times every row of x, over columns k_start to k_stop."""
    for m in tl.static_range(ROWS):
        total = tl.zeros((TILE_K,), tl.float32)
        for k0 in range(k_start, k_stop, TILE_K):
            k = k0 + tl.arange(0, TILE_K)
            a = tl.load(a_ptr + r.to(tl.int64) * K + k, mask=k < k_stop, other=0.0).to(tl.float32)
            total += a * tl.load(x_ptr + m * K + k, mask=k < k_stop, other=0.0).to(tl.float32)
        tl.store(out_ptr + m * R, tl.sum(total, axis=0))


@triton.jit
def paired_products(x_ptr, even, odd, peak, k0, k_stop, TILE_N: tl.constexpr, TILE_K: tl.constexpr):
    """fp32 [TILE_N, TILE_K / 32]: products of one row of x with each half-group of W."""
    k = k0 + tl.arange(0, TILE_K)
    x = tl.load(x_ptr + k, mask=k < k_stop, other=0.0).to(tl.float32)
    x_even, x_odd = tl.split(tl.reshape(x, (TILE_K // 2, 2)))
    products = even * x_even[None, :] + odd * x_odd[None, :]
    return tl.sum(tl.reshape(products, (TILE_N, TILE_K // 32, 16)), axis=2) * peak


@triton.jit
def unpaired_tile(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, codes_ptr, map_ptr, row, k0, k_stop, K,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """fp32 [TILE_N, TILE_K] of W, element by element."""
    k = k0 + tl.arange(0, TILE_K)
    inside = (k < k_stop)[None, :]
    element = row * K + k[None, :]
    peak = expand_absmax(absmax_ptr, nested_ptr, offset_ptr, map_ptr, element // BLOCK_SIZE, inside, NESTED)
    packed = tl.load(packed_ptr + element // 2, mask=inside, other=0).to(tl.int32)
    return look_up(codes_ptr, tl.where(element % 2 == 0, packed >> 4, packed & 15), TILE_N, TILE_K) * peak


@triton.jit
def gemv_kernel(
    out_ptr,  # [SPLIT, M, N] partial sums, or y itself where there is nothing to add
    down_ptr,  # fp32 [SPLIT, M, R] when R > 0, partial sums of x A^T
    x_ptr,  # [M, K]
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, codes_ptr, map_ptr,
    a_ptr,  # [R, K] when R > 0
    N, K, R, split_k, out_row, out_split,
    ROWS: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """x W^T over columns [split * split_k, (split + 1) * split_k), and in the first R programs x A^T over them"""
    split, tile = tl.program_id(1), tl.program_id(0)
    k_start = split * split_k
    k_stop = tl.minimum(k_start + split_k, K)
    if tile < R:  # first, because theirs are the longest
        adapter_products(down_ptr + split * ROWS * R + tile, x_ptr, a_ptr, tile, k_start, k_stop, K, R, ROWS, TILE_K)
    else:
        n = (tile - R) * TILE_N + tl.arange(0, TILE_N)
        row = tl.minimum(n, N - 1).to(tl.int64)[:, None]  # rows beyond N read the last one
        SUMS: tl.constexpr = TILE_K // 32 if PAIRED else TILE_K
        # One row: more programs at a time serve better than copies under way in each, 0.82 of the time on an H100.
        # Element by element, three steps under way would spill.
        STAGES: tl.constexpr = 3 if PAIRED and ROWS > 1 else 1
        y0 = tl.zeros((TILE_N, SUMS), tl.float32)
        y1, y2, y3 = y0, y0, y0
        for k0 in tl.range(k_start, k_stop, TILE_K, num_stages=STAGES):
            if PAIRED:
                # Multiples of a constant, so that the compiler knows the alignment: 128-bit loads.
                byte = k0 // 64 * 32 + tl.arange(0, TILE_K // 2)
                inside = (byte < k_stop // 64 * 32)[None, :]
                packed = tl.load(packed_ptr + row * (K // 64 * 32) + byte[None, :], mask=inside, other=0)
                half = k0 // 32 + tl.arange(0, TILE_K // 32)
                block = (row * (K // 64) + half[None, :] // 2) // (BLOCK_SIZE // 64)
                there = (half < k_stop // 32)[None, :]
                peak = expand_absmax(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, there, NESTED)
                code = packed.to(tl.int32)
                even = look_up(codes_ptr, code >> 4, TILE_N, TILE_K // 2)
                odd = look_up(codes_ptr, code & 15, TILE_N, TILE_K // 2)
                y0 += paired_products(x_ptr, even, odd, peak, k0, k_stop, TILE_N, TILE_K)
                if ROWS > 1:
                    y1 += paired_products(x_ptr + K, even, odd, peak, k0, k_stop, TILE_N, TILE_K)
                if ROWS > 2:
                    y2 += paired_products(x_ptr + 2 * K, even, odd, peak, k0, k_stop, TILE_N, TILE_K)
                if ROWS > 3:
                    y3 += paired_products(x_ptr + 3 * K, even, odd, peak, k0, k_stop, TILE_N, TILE_K)
            else:
                w = unpaired_tile(
                    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, codes_ptr, map_ptr,
                    row, k0, k_stop, K, TILE_N, TILE_K, BLOCK_SIZE, NESTED,
                )  # fmt: skip
                k = k0 + tl.arange(0, TILE_K)
                inside = k < k_stop
                y0 += w * tl.load(x_ptr + k, mask=inside, other=0.0).to(tl.float32)[None, :]
                if ROWS > 1:
                    y1 += w * tl.load(x_ptr + K + k, mask=inside, other=0.0).to(tl.float32)[None, :]
                if ROWS > 2:
                    y2 += w * tl.load(x_ptr + 2 * K + k, mask=inside, other=0.0).to(tl.float32)[None, :]
                if ROWS > 3:
                    y3 += w * tl.load(x_ptr + 3 * K + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        out = out_ptr + split * out_split + n
        tl.store(out, tl.sum(y0, axis=1).to(out_ptr.dtype.element_ty), mask=n < N)
        if ROWS > 1:
            tl.store(out + out_row, tl.sum(y1, axis=1).to(out_ptr.dtype.element_ty), mask=n < N)
        if ROWS > 2:
            tl.store(out + 2 * out_row, tl.sum(y2, axis=1).to(out_ptr.dtype.element_ty), mask=n < N)
        if ROWS > 3:
            tl.store(out + 3 * out_row, tl.sum(y3, axis=1).to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def sum_kernel(
    y_ptr,  # [M, N], rows `y_row` apart
    down_out_ptr,  # [M, R], rows `down_row` apart
    partial_ptr,  # fp32 [SPLIT, M, N]
    down_ptr,  # fp32 [SPLIT, M, R]
    b_ptr,  # [N, R]
    N, R, y_row, down_row, splits, scale,
    TILE_N: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    """y = sum of the partial sums + scale * B down^T, for one row of x; the first program also stores down"""
    m, rows = tl.program_id(1), tl.num_programs(1)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    r = tl.arange(0, TILE_R)
    total = tl.zeros((TILE_N,), tl.float32)
    down = tl.zeros((TILE_R,), tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + (split * rows + m) * N + n, mask=n < N, other=0.0)
        down += tl.load(down_ptr + (split * rows + m) * R + r, mask=r < R, other=0.0)
    if R > 0:
        # B by columns would be read in pieces of one number; by rows a thread has a whole row of it.
        inside = (n < N)[:, None] & (r < R)[None, :]
        b = tl.load(b_ptr + n.to(tl.int64)[:, None] * R + r[None, :], mask=inside, other=0.0).to(tl.float32)
        total += scale * tl.sum(b * down[None, :], axis=1)
        if tl.program_id(0) == 0:
            tl.store(down_out_ptr + m * down_row + r, down.to(down_out_ptr.dtype.element_ty), mask=r < R)
    tl.store(y_ptr + m * y_row + n, total.to(y_ptr.dtype.element_ty), mask=n < N)


# --- launches -------------------------------------------------------------------------------------------


def splits_of(out_features: int, in_features: int, tile: Tiles) -> tuple[int, int]:
    """Parts that K is cut into, and the columns of one: enough parts for `PROGRAMS`, each of whole steps."""
    steps = triton.cdiv(in_features, tile.k)
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(out_features, tile.n))
    each = triton.cdiv(steps, min(wanted, steps))
    return triton.cdiv(steps, each), each * tile.k


def _tile(x: Tensor, paired: bool) -> Tiles:
    """Of the rows of x; fewer where registers are short."""
    turing = x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0)
    tiles = NARROW_TILES if turing or x.dtype == torch.float32 else PAIRED_TILES
    return tiles[len(x)] if paired else UNPAIRED_TILES


def gemv(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scale: float,
    out: Tensor,
    down: Tensor | None = None,
) -> Tensor:
    """y = x W^T + scale * (x A^T) B^T into `out`; no dropout: this is for generation.

    Args:
        x: [M, K], M <= 4, bf16, fp16 or fp32. packed, absmax, nested_absmax, offset: W [N, K], as in `Projection`.
        lora_A: [r, K] and lora_B: [N, r], any floating dtype, or neither.
        out: [M, N] in x's dtype, each row contiguous: it may be some columns of a wider tensor.
        down: [M, r], rows likewise, for x A^T; a new one by default.
    Returns:
        x A^T [M, r] in x's dtype.
    """
    rows, in_features = x.shape
    out_features = out.shape[1]
    rank = 0 if lora_A is None else lora_A.shape[0]
    x = x.contiguous()
    paired = is_paired(in_features, block_size)
    tile = _tile(x, paired)
    (*weight, _, absmax_map), nested = weight_arguments(packed, absmax, nested_absmax, offset)
    splits, split_k = splits_of(out_features, in_features, tile)
    if down is None:
        down = torch.empty(rows, rank, dtype=x.dtype, device=x.device)
    direct = splits == 1 and rank == 0
    partial, partial_down = out, x
    if not direct:
        partial = torch.empty(splits, rows, out_features, dtype=torch.float32, device=x.device)
        partial_down = torch.empty(splits, rows, rank, dtype=torch.float32, device=x.device)
    launch(
        gemv_kernel, (rank + triton.cdiv(out_features, tile.n), splits),
        partial, partial_down, x, *weight, nf4.code_table(x.device), absmax_map,
        x if lora_A is None else lora_A.contiguous(),
        out_features, in_features, rank, split_k, partial.stride(-2), 0 if direct else partial.stride(0),
        ROWS=rows, TILE_N=tile.n, TILE_K=tile.k, BLOCK_SIZE=block_size, NESTED=nested, PAIRED=paired,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    if not direct:
        tile_r = triton.next_power_of_2(max(rank, 1))
        tile_n = min(max(SUM_ELEMENTS // tile_r, 16), 256)
        launch(
            sum_kernel, (triton.cdiv(out_features, tile_n), rows),
            out, down, partial, partial_down, x if lora_B is None else lora_B.contiguous(),
            out_features, rank, out.stride(0), down.stride(0), splits, scale,
            TILE_N=tile_n, TILE_R=tile_r, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return down


def forward(
    x: Tensor,
    layers: Sequence[contract.Projection],
    block_size: int,
    dropout: float,
    seed: Tensor | None,
    keep_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lora_matmul`. What is not decoding (fp64, no row or more than four, dropout, a kept W): the reference."""
    in_features = x.shape[-1]
    rows = x.numel() // in_features
    masked = dropout > 0.0 and any(layer.rank for layer in layers)
    if not 1 <= rows <= MAX_ROWS or x.dtype == torch.float64 or masked or keep_weight:
        return reference.forward_reference(x, layers, block_size, dropout, seed, keep_weight)
    flat = x.reshape(rows, in_features)
    # No view is returned: autograd lets nobody change the view of a Function in place, as Falcon does.
    whole = x.new_empty(*x.shape[:-1], sum(layer.out_features for layer in layers))
    y = whole.view(rows, whole.shape[-1])
    down = x.new_empty(rows, sum(layer.rank for layer in layers))
    first, r = 0, 0
    for layer in layers:
        adapter = (layer.lora_A, layer.lora_B) if layer.rank else (None, None)
        out = y[:, first : first + layer.out_features]
        weight = (layer.packed, layer.absmax, layer.nested_absmax, layer.offset)
        gemv(flat, *weight, block_size, *adapter, layer.scale, out, down[:, r : r + layer.rank])
        first, r = first + layer.out_features, r + layer.rank
    return whole, down, x.new_empty(0, in_features)
