"""Dropout whose mask is rebuilt from a seed, never kept.

A counter-based mask: element i (row-major, modulo 2^32) is kept when mix(i * GOLDEN + seed), read as a signed
32-bit number, is at least p * 2^32 - 2^31. mix is MurmurHash3's 32-bit finalizer (Appleby 2011) without its last
shift, which only stirs low bits that the comparison hardly sees. Any backend computes it in registers, and every
backend the same. Torch has no uint32 arithmetic: int32 wraps, and a mask after the shift makes it logical.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jindo_core.kernels import dispatch

GOLDEN = 0x9E3779B1
MIX_1 = 0x85EBCA6B
MIX_2 = 0xC2B2AE35


def _signed(constant: int) -> int:
    return constant - (1 << 32) if constant >= 1 << 31 else constant


def drop_threshold(dropout: float) -> int:
    """The signed 32-bit number below which an element is dropped."""
    return int(dropout * (1 << 32)) - (1 << 31)


def hashed(count: int, seed: Tensor) -> Tensor:
    """int32 [count]: the mix of each index with the seed (int32, one number)."""
    if count < 1 << 31:
        h = torch.arange(count, dtype=torch.int32, device=seed.device)
    else:
        h = torch.arange(count, dtype=torch.int64, device=seed.device).to(torch.int32)
    h.mul_(_signed(GOLDEN)).add_(seed)
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(_signed(MIX_1))
    h.bitwise_xor_((h >> 13).bitwise_and_(0x7FFFF)).mul_(_signed(MIX_2))
    return h


def keep_mask(shape: torch.Size, dropout: float, seed: Tensor) -> Tensor:
    """bool tensor of `shape`: True where an element survives dropout of probability `dropout`."""
    return (hashed(shape.numel(), seed) >= drop_threshold(dropout)).view(shape)


def growth(dropout: float) -> float:
    """1/(1-p), which keeps the mean of D(x) that of x."""
    return 1.0 / (1.0 - dropout)


def mask(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """x where kept, else 0, contiguous; without the growth."""
    return dispatch.implementation("dropout_mask", x)(x, dropout, seed)


def mask_reference(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """`mask` in PyTorch."""
    return x.masked_fill(~keep_mask(x.shape, dropout, seed), 0)


def drop(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """D(x): x where kept, times 1/(1-p); x itself when p = 0."""
    if dropout == 0.0 or seed is None:
        return x
    return x * keep_mask(x.shape, dropout, seed) * growth(dropout)
