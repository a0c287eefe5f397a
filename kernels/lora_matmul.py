"""LoRA linear on a frozen NF4 weight. Contract, reference, autograd and registration.

    y  = x W^T + s (D(x) A^T) B^T                       s = alpha / r, D = dropout
    dX = dY W + s D'((dY B) A)        dA = s (dY B)^T D(x)        dB = s dY^T (D(x) A^T)

Hu et al. 2021 (arXiv:2106.09685, section 4.1) on the quantized base of Dettmers et al. 2023
(arXiv:2305.14314, equation 5). Kept for the backward pass: x, D(x)A^T (M x r) and the dropout seed. W is
rebuilt from its 4-bit codes, and the dropout mask from the seed.

Shapes: M rows (any leading dimensions, flattened), K = in_features, N = out_features, r = rank.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from jindo_core.kernels import dispatch
from jindo_core.kernels.nf4 import check_layout, nf4_dequantize


def lora_matmul(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    block_size: int = 64,
) -> Tensor:
    """y = x W^T + scale * (D(x) A^T) B^T with W [N, K] in NF4; differentiable in x, A and B.

    Args:
        x: [..., K], bf16, fp16, fp32 or fp64: the dtype of the products and of y.
        packed, absmax, nested_absmax, offset: W as `nf4_quantize` and `nf4_quantize_absmax` give it.
        out_features: N.
        lora_A: [r, K] and lora_B: [N, r], any floating dtype (cast to x's), or neither.
        scale: s, alpha / r.
        dropout: probability in [0, 1) that D zeroes an element of x before A; the rest grow by 1/(1-p).
        seed: int32 [1] on x's device; names the mask. Needed when dropout > 0.
        block_size: elements a quantization block.
    Returns:
        [..., N] in x's dtype.
    Raises:
        ValueError: shapes that do not fit together, a dropout outside [0, 1), or dropout without a seed.
    """
    in_features = x.shape[-1]
    check_layout(packed, absmax, nested_absmax, offset, (out_features, in_features), block_size)
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_matmul got one of lora_A and lora_B: expected both or neither")
    if lora_A is not None and lora_B is not None:
        rank = lora_A.shape[0]
        if lora_A.shape != (rank, in_features) or lora_B.shape != (out_features, rank):
            raise ValueError(
                f"lora_matmul got A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}, "
                f"expected [r, {in_features}] and [{out_features}, r]"
            )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora_matmul got dropout {dropout}, expected 0 <= p < 1")
    if dropout > 0 and lora_A is not None and seed is None:
        raise ValueError("lora_matmul got dropout without a seed: the mask could not be rebuilt in backward")
    y, _ = torch.ops.jindo.lora_matmul(
        x, packed, absmax, nested_absmax, offset, out_features, block_size, lora_A, lora_B, scale, dropout, seed
    )
    return y


def workspace_bytes(rows: int, in_features: int, out_features: int, dtype: torch.dtype, dropout: float) -> int:
    """Bytes of temporaries inside one call: the scratch copy of W, and D(x) where dropout needs one."""
    scratch = in_features * out_features
    dropped = rows * in_features if dropout > 0 else 0
    return (scratch + dropped) * dtype.itemsize


# --- dropout --------------------------------------------------------------------------------------------
# A counter-based mask: element i (row-major, modulo 2^32) is kept when mix(i * GOLDEN + seed), read as a signed
# 32-bit number, is at least p * 2^32 - 2^31. mix is MurmurHash3's 32-bit finalizer (Appleby 2011) without its last
# shift, which only stirs low bits that the comparison hardly sees. Any backend computes it in registers, and every
# backend the same. Torch has no uint32 arithmetic: int32 wraps, and a mask after the shift makes it logical.

GOLDEN = 0x9E3779B1
MIX_1 = 0x85EBCA6B
MIX_2 = 0xC2B2AE35


def _signed(constant: int) -> int:
    return constant - (1 << 32) if constant >= 1 << 31 else constant


def drop_threshold(dropout: float) -> int:
    """The signed 32-bit number below which an element is dropped."""
    return int(dropout * (1 << 32)) - (1 << 31)


def keep_mask(shape: torch.Size, dropout: float, seed: Tensor) -> Tensor:
    """bool tensor of `shape`: True where an element survives dropout of probability `dropout`."""
    count = shape.numel()
    if count < 1 << 31:
        h = torch.arange(count, dtype=torch.int32, device=seed.device)
    else:
        h = torch.arange(count, dtype=torch.int64, device=seed.device).to(torch.int32)
    h.mul_(_signed(GOLDEN)).add_(seed)
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(_signed(MIX_1))
    h.bitwise_xor_((h >> 13).bitwise_and_(0x7FFFF)).mul_(_signed(MIX_2))
    return (h >= drop_threshold(dropout)).view(shape)


def growth(dropout: float) -> float:
    """1/(1-p), which keeps the mean of D(x) that of x."""
    return 1.0 / (1.0 - dropout)


def drop(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """D(x): x where kept, times 1/(1-p); x itself when p = 0."""
    if dropout == 0.0 or seed is None:
        return x
    return x * keep_mask(x.shape, dropout, seed) * growth(dropout)


# --- reference ------------------------------------------------------------------------------------------


def forward_reference(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    block_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Dequantize W into a scratch tensor, then plain matrix products. Returns y and D(x)A^T [M, r]."""
    shape = (out_features, x.shape[-1])
    flat = x.reshape(-1, shape[1])
    weight = nf4_dequantize(packed, absmax, nested_absmax, offset, shape, dtype=x.dtype, block_size=block_size)
    y = flat @ weight.t()
    if lora_A is None or lora_B is None:
        return y.view(*x.shape[:-1], out_features), x.new_empty(flat.shape[0], 0)
    if dropout > 0 and seed is not None:
        # The growth goes onto the r columns of the product, not onto the K of x.
        kept = flat.masked_fill(~keep_mask(flat.shape, dropout, seed), 0)
        down = (kept @ lora_A.to(x.dtype).t()).mul_(growth(dropout))
    else:
        down = flat @ lora_A.to(x.dtype).t()
    y.addmm_(down, lora_B.to(x.dtype).t(), alpha=scale)
    return y.view(*x.shape[:-1], out_features), down


def backward_reference(
    dy: Tensor,
    x: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    block_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    down: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dX, dA, dB; an empty tensor stands for what was not asked for."""
    flat = dy.reshape(-1, dy.shape[-1])
    dx, dA, dB = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    masked = lora_A is not None and dropout > 0 and seed is not None
    dropped = None  # True where an element of x was dropped
    if masked:
        assert seed is not None
        dropped = ~keep_mask(torch.Size((flat.shape[0], in_features)), dropout, seed)
    grown = scale * growth(dropout) if masked else scale
    through_b = None
    if lora_A is not None and lora_B is not None:
        through_b = flat @ lora_B.to(dy.dtype)
        if x is not None and down is not None:
            seen = x.reshape(-1, in_features)
            seen = seen if dropped is None else seen.masked_fill(dropped, 0)
            dA = (through_b.t() @ seen).to(lora_A.dtype).mul_(grown)
            dB = (flat.t() @ down).to(lora_B.dtype).mul_(scale)
    if need_dx:
        shape = (dy.shape[-1], in_features)
        dx = flat @ nf4_dequantize(
            packed, absmax, nested_absmax, offset, shape, dtype=dy.dtype, block_size=block_size
        )
        if through_b is not None and lora_A is not None:
            if dropped is not None:
                dx.add_((through_b @ lora_A.to(dy.dtype)).masked_fill_(dropped, 0), alpha=grown)
            else:
                dx.addmm_(through_b, lora_A.to(dy.dtype), alpha=scale)
        dx = dx.view(*dy.shape[:-1], in_features)
    return dx, dA, dB


# --- registration ---------------------------------------------------------------------------------------


@torch.library.custom_op("jindo::lora_matmul", mutates_args=())
def _lora_matmul(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    block_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    run = dispatch.implementation("lora_matmul", x, rows=x.numel() // x.shape[-1])
    return run(
        x, packed, absmax, nested_absmax, offset, out_features, block_size, lora_A, lora_B, scale, dropout, seed
    )


@_lora_matmul.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    block_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rank = 0 if lora_A is None else lora_A.shape[0]
    rows = functools.reduce(lambda a, b: a * b, x.shape[:-1], 1)
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty(rows, rank)


@torch.library.custom_op("jindo::lora_matmul_backward", mutates_args=())
def _lora_matmul_backward(
    dy: Tensor,
    x: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    block_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    down: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    run = dispatch.implementation("lora_matmul_backward", dy, rows=dy.numel() // dy.shape[-1])
    return run(
        dy, x, packed, absmax, nested_absmax, offset, in_features, block_size,
        lora_A, lora_B, down, scale, dropout, seed, need_dx,
    )  # fmt: skip


@_lora_matmul_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    block_size: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    down: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty(*dy.shape[:-1], in_features) if need_dx else dy.new_empty(0)
    if lora_A is None or lora_B is None or x is None:
        return dx, dy.new_empty(0), dy.new_empty(0)
    return dx, torch.empty_like(lora_A), torch.empty_like(lora_B)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    (x, packed, absmax, nested_absmax, offset, _, block_size, lora_A, lora_B, scale, dropout, seed) = inputs
    adapter_trains = lora_A is not None and (lora_A.requires_grad or lora_B.requires_grad)
    ctx.save_for_backward(
        x if adapter_trains else None,
        packed, absmax, nested_absmax, offset, lora_A, lora_B,
        output[1] if adapter_trains else None,
        seed,
    )  # fmt: skip
    ctx.mark_non_differentiable(output[1])
    ctx.numbers = (x.shape[-1], block_size, scale, dropout)


def _backward(ctx, dy: Tensor, _down_grad: Tensor):  # type: ignore[no-untyped-def]
    x, packed, absmax, nested_absmax, offset, lora_A, lora_B, down, seed = ctx.saved_tensors
    in_features, block_size, scale, dropout = ctx.numbers
    need = ctx.needs_input_grad
    dx, dA, dB = torch.ops.jindo.lora_matmul_backward(
        dy.contiguous(), x, packed, absmax, nested_absmax, offset, in_features, block_size,
        lora_A, lora_B, down, scale, dropout, seed, need[0],
    )  # fmt: skip
    return (
        dx if need[0] else None, None, None, None, None, None, None,
        dA if need[7] else None, dB if need[8] else None, None, None, None,
    )  # fmt: skip


_lora_matmul.register_autograd(_backward, setup_context=_save_for_backward)
