"""LoRA linear on the CPU: a GEMV for few rows, in C (csrc/lora_gemv.c), and the dropout mask (csrc/elementwise.c).

More rows take the reference, whose dequantize runs in C too. Contract: lora_matmul.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jindo_core.kernels import lora_matmul as contract
from jindo_core.kernels import lora_matmul_reference as reference
from jindo_core.kernels import native
from jindo_core.kernels.dropout import drop_threshold, mask_reference
from jindo_core.kernels.native import FLOAT, INT, LONG, POINTER, TYPES, address
from jindo_core.kernels.nf4 import dynamic_map

MOST_ROWS = 8
"""Rows of x that the GEMV takes."""

MOST_IN_FEATURES = 64 * 1024


def forward(
    x: Tensor,
    layers: Sequence[contract.Projection],
    block_size: int,
    dropout: float,
    seed: Tensor | None,
    keep_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lora_matmul`. What the GEMV does not take (fp64, dropout, K no multiple of 64, many rows): the reference."""
    in_features = x.shape[-1]
    rows = x.numel() // in_features
    fits = in_features % 64 == 0 and block_size % 64 == 0 and in_features <= MOST_IN_FEATURES
    if not 1 <= rows <= MOST_ROWS or not fits or x.dtype not in TYPES or dropout > 0 or keep_weight:
        return reference.forward_reference(x, layers, block_size, dropout, seed, keep_weight)
    flat = x.reshape(rows, in_features).contiguous()
    width, kind = sum(layer.out_features for layer in layers), TYPES[x.dtype]
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype)
    wide = torch.empty(2 * rows * (-(-in_features // 128) * 128))
    native.function("jindo_gemv_lay_out", POINTER, INT, LONG, LONG, POINTER)(
        address(flat), kind, rows, in_features, address(wide)
    )
    gemv = native.function(
        "jindo_lora_gemv", POINTER, LONG, LONG, LONG, POINTER, POINTER, POINTER, POINTER, POINTER, LONG,
        POINTER, POINTER, LONG, FLOAT, POINTER, POINTER, LONG, INT, INT,
    )  # fmt: skip
    codes, threads = dynamic_map(x.device), torch.get_num_threads()
    downs, place = [], y.data_ptr()
    for layer in layers:
        rank = layer.rank
        down = torch.empty(rows, rank)
        a = None if layer.lora_A is None else layer.lora_A.detach().float().contiguous()
        b = None if layer.lora_B is None else layer.lora_B.detach().float().contiguous()
        packed, absmax = layer.packed.contiguous(), layer.absmax.contiguous()
        gemv(
            address(wide), rows, in_features, layer.out_features, address(packed), address(absmax),
            address(layer.nested_absmax), address(layer.offset), address(codes), block_size, address(a), address(b),
            rank, layer.scale, address(down), place, width, kind, threads,
        )  # fmt: skip
        place += layer.out_features * y.element_size()
        if rank:
            downs.append(down.to(x.dtype))
    down = torch.cat(downs, dim=1) if downs else y.new_empty(rows, 0)
    return y, down, y.new_empty(0, in_features)


def mask(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """`mask` of the contract: x where kept, else 0."""
    if x.dtype not in TYPES:
        return mask_reference(x, dropout, seed)
    x = x.contiguous()
    out = torch.empty_like(x)
    drop = native.function("jindo_drop", POINTER, LONG, INT, INT, INT, POINTER)
    drop(address(x), x.numel(), int(seed), drop_threshold(dropout), TYPES[x.dtype], address(out))
    return out
