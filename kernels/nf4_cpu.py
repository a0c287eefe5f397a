"""NF4 quantize and dequantize on the CPU, in C (csrc/nf4.c). Contract and reference: nf4.py; bit-identical."""

from __future__ import annotations

import torch
from torch import Tensor

from jindo_core.kernels import native, nf4
from jindo_core.kernels.native import FLOAT, INT, LONG, POINTER, TYPES, address


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`nf4_quantize`."""
    if weight.dtype == torch.float64:
        return nf4.quantize_reference(weight, block_size)
    flat = weight.reshape(-1).contiguous()
    count = flat.numel()
    packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32)
    threads = torch.get_num_threads() if count >= 32768 else 1
    scratch = torch.empty(threads, block_size)
    run = native.function("jindo_nf4_quantize", POINTER, INT, LONG, LONG, POINTER, POINTER, POINTER, INT)
    run(
        address(flat), TYPES[flat.dtype], count, block_size, address(packed), address(absmax), address(scratch),
        threads,
    )  # fmt: skip
    return packed, absmax


def quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """`nf4_quantize_absmax`."""
    absmax = absmax.contiguous()
    codes = torch.empty(absmax.numel(), dtype=torch.uint8)
    nested = torch.empty(-(-absmax.numel() // nf4.NESTED_BLOCK))
    nearest = nf4._nearest_dynamic_code(absmax.device)
    run = native.function("jindo_nf4_quantize_absmax", POINTER, LONG, FLOAT, POINTER, POINTER, POINTER)
    run(address(absmax), absmax.numel(), float(offset), address(nearest), address(codes), address(nested))
    return codes, nested


def dequantize(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
) -> None:
    """`nf4_dequantize` into `out`."""
    if out.dtype == torch.float64:
        nf4.dequantize_reference(out, packed, absmax, nested_absmax, offset, block_size)
        return
    packed, absmax = packed.contiguous(), absmax.contiguous()
    run = native.function(
        "jindo_nf4_dequantize", POINTER, POINTER, POINTER, POINTER, POINTER, LONG, LONG, POINTER, INT
    )
    nested = absmax.dtype == torch.uint8
    run(
        address(packed), address(absmax), address(nested_absmax) if nested else None, address(offset),
        address(nf4.dynamic_map(packed.device)), block_size, out.numel(), address(out), TYPES[out.dtype],
    )  # fmt: skip
