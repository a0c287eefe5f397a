"""NF4 quantize and dequantize for the GPU. Contract and reference: nf4.py; bit-identical to both.

Compiled Triton contracts a multiply and an add into one fma, and turns `a / b` into an approximate division.
Either would change last bits, so every launch passes `EXACT` and every division is `tl.div_rn`.

What bounds dequantize is instructions per element, not arithmetic: a byte indexes a table of code *pairs* in
shared memory (one 64-bit load for two elements, no nibble shifts), and a row of 64 elements shares one maximum
(the second quantization is undone once per row and thread). 4.6 SASS instructions an element on sm_80 and 5.2
on sm_90, where a tree of selects takes 22.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from jindo_core.kernels import nf4
from jindo_core.kernels.launch import launch

EXACT = {"enable_fp_fusion": False}
"""Launch options that keep the roundings of the reference."""

DEQUANTIZE_ROWS = 64
"""Rows (of up to 64 elements) a program dequantizes to 16 bits: 16 packed bytes a thread, one 128-bit load. On an H100
twice as many take 1.11 times as long at 4096 x 4096, 1.01 times at 14336 x 4096. Twice as many for fp32."""

DEQUANTIZE_WARPS = 4

QUANTIZE_ELEMENTS = 8192
"""Elements a program quantizes, and the largest block: 16 packed bytes a thread, one 128-bit store."""

QUANTIZE_WARPS = 8

MAX_ROW = 64
"""Longest row of `dequantize`'s tiles, in elements."""

SASS_PER_ELEMENT = {"dequantize": 10, "quantize, whole": 28, "quantize, partial": 46}
"""SASS instructions an element on sm_80 and later, at most; dequantize is bound by bytes below 22 (H100, bf16). Of
quantize's, the loop over thresholds is counted once."""


@functools.cache
def pair_table(device: torch.device) -> Tensor:
    """int64 [256]: both codes of a byte as fp32 bit patterns, the first element's in the low half."""
    return nf4._code_pairs(device).view(torch.int64).view(256)


def row_elements(block_size: int) -> int:
    """The longest power of two, up to 64, that divides a block: rows of it never straddle two blocks."""
    return math.gcd(block_size, MAX_ROW)


@triton.jit
def expand_absmax(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, mask, NESTED: tl.constexpr):
    """fp32 maxima of the blocks `block`, whether or not they are double-quantized."""
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        nested = tl.load(nested_ptr + (block >> 8), mask=mask, other=0.0)
        return tl.load(map_ptr + code) * nested + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def look_up_pairs(packed, pairs_ptr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """uint8 [ROWS, BYTES] -> fp32 codes of the high and of the low nibbles, each [ROWS, BYTES]."""
    table = tl.load(pairs_ptr + tl.arange(0, 256))
    pair = tl.gather(table, tl.reshape(packed.to(tl.int32), (ROWS * BYTES,)), 0)
    pair = tl.reshape(pair, (ROWS, BYTES))
    first = pair.to(tl.int32).to(tl.float32, bitcast=True)
    second = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def dequantize_kernel(
    out_ptr,  # [count]
    packed_ptr,  # uint8 [byte_count]
    absmax_ptr,  # uint8 or fp32 [blocks]
    nested_ptr,  # fp32 [ceil(blocks / 256)] when NESTED
    offset_ptr,  # fp32 [] when NESTED
    pairs_ptr,  # int64 [256]
    map_ptr,  # fp32 [256]
    count,
    byte_count,
    block_count,
    ROW: tl.constexpr,  # elements of a row, all in one quantization block
    ROWS_PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a program
    NESTED: tl.constexpr,
):
    HALF: tl.constexpr = ROW // 2
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    # Offsets inside the tile stay 32-bit; a mask that is a multiple of 16 long keeps the accesses 128-bit wide.
    in_bytes = rows[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(packed_ptr + first_row * HALF + in_bytes, mask=in_bytes < byte_count - first_row * HALF, other=0)
    block = (first_row + rows) // ROWS_PER_BLOCK
    peak = expand_absmax(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, block < block_count, NESTED)
    first, second = look_up_pairs(packed, pairs_ptr, ROWS, HALF)
    values = tl.join(first * peak[:, None], second * peak[:, None])
    out = rows[:, None] * ROW + tl.arange(0, ROW)[None, :]
    tl.store(
        out_ptr + first_row * ROW + out,
        tl.reshape(values, (ROWS, ROW)).to(out_ptr.dtype.element_ty),
        mask=out < count - first_row * ROW,
    )


@triton.jit
def quantize_kernel(
    packed_ptr,  # uint8 [byte_count]
    absmax_ptr,  # fp32 [block_count]
    weight_ptr,  # [count]
    thresholds_ptr,  # fp32 [15]
    count,
    byte_count,
    block_count,
    threshold_count,  # 15, but not a constant: unrolled, all thresholds at once in registers would make it spill
    BLOCK_SIZE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,  # BLOCK_SIZE rounded up to a power of two
    BLOCKS: tl.constexpr,  # quantization blocks of a program
    PARTIAL: tl.constexpr,  # whether the last block is a partial one
    SMALLEST: tl.constexpr,  # the least divisor
    ZERO_CODE: tl.constexpr,
):
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    blocks = first_block + tl.arange(0, BLOCKS)
    column = tl.arange(0, BLOCK_WIDTH)
    offsets = tl.arange(0, BLOCKS)[:, None] * BLOCK_SIZE + column[None, :]
    inside = offsets < count - first_block * BLOCK_SIZE
    if BLOCK_WIDTH > BLOCK_SIZE:
        inside = inside & (column < BLOCK_SIZE)[None, :]
    weight = tl.load(weight_ptr + first_block * BLOCK_SIZE + offsets, mask=inside, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(weight), axis=1)
    # tl.full, not a bare constant: 1e-38 is subnormal, and Triton makes an fp64 of such a one.
    divisor = tl.maximum(peak, tl.full((BLOCKS,), SMALLEST, tl.float32))
    scaled = weight * tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), divisor)[:, None]
    if PARTIAL:
        # The rule for the partial last block: divide, and store the divisor.
        last = blocks == block_count - 1
        if first_block + BLOCKS >= block_count:
            scaled = tl.where(last[:, None], tl.div_rn(weight, tl.broadcast_to(divisor[:, None], weight.shape)), scaled)
            peak = tl.where(last, divisor, peak)
    tl.store(absmax_ptr + blocks, peak, mask=blocks < block_count)

    # Clamping to [-1, 1] is left out: the outermost thresholds lie inside it.
    code = tl.zeros((BLOCKS, BLOCK_WIDTH), tl.int32)
    for index in range(threshold_count):
        code += (scaled > tl.load(thresholds_ptr + index)).to(tl.int32)
    code = tl.where(inside, code, ZERO_CODE)
    high, low = tl.split(tl.reshape(code, (BLOCKS, BLOCK_WIDTH // 2, 2)))
    half = tl.arange(0, BLOCK_WIDTH // 2)
    out = tl.arange(0, BLOCKS)[:, None] * (BLOCK_SIZE // 2) + half[None, :]
    inside_out = out < byte_count - first_block * (BLOCK_SIZE // 2)
    if BLOCK_WIDTH > BLOCK_SIZE:
        inside_out = inside_out & (half < BLOCK_SIZE // 2)[None, :]
    tl.store(packed_ptr + first_block * (BLOCK_SIZE // 2) + out, ((high << 4) | low).to(tl.uint8), mask=inside_out)


def weight_arguments(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None
) -> tuple[tuple[Tensor, ...], bool]:
    """The six pointers a kernel reads W through, packed codes to maps, and whether its maxima are quantized."""
    device = packed.device
    tables = (pair_table(device), nf4.dynamic_map(device))
    if nested_absmax is None or offset is None:  # the unused pointers still need some tensor of the device
        return (packed.contiguous(), absmax.contiguous(), absmax, absmax, *tables), False
    return (packed.contiguous(), absmax.contiguous(), nested_absmax.contiguous(), offset, *tables), True


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`nf4_quantize`; the codes of a block that holds NaN are unspecified. Blocks over 8192: the reference."""
    if block_size > QUANTIZE_ELEMENTS:
        return nf4.quantize_reference(weight, block_size)
    flat = weight.reshape(-1).contiguous()  # reshape alone keeps the stride of a vector
    count = flat.numel()
    block_count = triton.cdiv(count, block_size)
    packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(block_count, dtype=torch.float32, device=weight.device)
    width = triton.next_power_of_2(block_size)
    partial = count % block_size != 0
    # A count that is no multiple of 16 is masked element by element. With the division of a partial last block, a
    # subroutine for each, a full-size program spills; its accesses are narrow anyway: a smaller one loses nothing.
    blocks = max(QUANTIZE_ELEMENTS // (2 if count % 16 else 1) // width, 1)
    launch(
        quantize_kernel, (triton.cdiv(block_count, blocks),),
        packed, absmax, flat, nf4.thresholds(weight.device), count, packed.numel(), block_count, 15,
        BLOCK_SIZE=block_size, BLOCK_WIDTH=width, BLOCKS=blocks,
        PARTIAL=partial, SMALLEST=nf4.SMALLEST_ABSMAX,
        ZERO_CODE=nf4.ZERO_CODE, num_warps=QUANTIZE_WARPS, **EXACT,
    )  # fmt: skip
    return packed, absmax


def dequantize(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
) -> None:
    """`nf4_dequantize` into `out` in one kernel, double quantization included; any block size, count and dtype."""
    count = out.numel()
    row = row_elements(block_size)
    rows = DEQUANTIZE_ROWS * (2 if out.dtype == torch.float32 else 1)
    pointers, nested = weight_arguments(packed, absmax, nested_absmax, offset)
    launch(
        dequantize_kernel, (triton.cdiv(count, row * rows),),
        out, *pointers, count, (count + 1) // 2, absmax.numel(), ROW=row, ROWS_PER_BLOCK=block_size // row,
        ROWS=rows, NESTED=nested, num_warps=DEQUANTIZE_WARPS, **EXACT,
    )  # fmt: skip
