"""LoRA linear on frozen NF4 weights. Contract, reference, autograd and registration.

    y  = x W^T + s (D(x) A^T) B^T                       s = alpha / r, D = dropout
    dX = dY W + s D'((dY B) A)        dA = s (dY B)^T D(x)        dB = s dY^T (D(x) A^T)

Hu et al. 2021 (arXiv:2106.09685, section 4.1) on the quantized base of Dettmers et al. 2023
(arXiv:2305.14314, equation 5). Layers that read the same x (q/k/v, gate/up) run as a group: their results lie
side by side in one tensor, x is dropped out and multiplied by all A once, and dX is summed in the products.
Kept for the backward pass: x, D(x)A^T (M x r) and the dropout seed. W is rebuilt from its 4-bit codes, unless
it is asked for to be kept, and the dropout mask from the seed.

Shapes: M rows (any leading dimensions, flattened), K = in_features, N = out_features, r = rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jindo_core.kernels import dispatch
from jindo_core.kernels.nf4 import check_layout
from jindo_core.kernels.scratch import scratch


class Projection(NamedTuple):
    """One layer of a group: W [N, K] as `nf4_quantize` and `nf4_quantize_absmax` give it, and its adapter.

    Attributes:
        packed, absmax, nested_absmax, offset: W. out_features: N.
        lora_A: [r, K] and lora_B: [N, r], any floating dtype (cast to x's), or neither.
        scale: s, alpha / r.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    out_features: int
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    def dequantize_into(self, out: Tensor, block_size: int) -> Tensor:
        """W in `out` [N, K]."""
        run = dispatch.implementation("nf4_dequantize", self.packed)
        run(out, self.packed, self.absmax, self.nested_absmax, self.offset, block_size)
        return out


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
    keep_weight: bool = False,
) -> Tensor:
    """`lora_matmul_group` of one layer; the arguments are those of `Projection` and of the group."""
    layer = Projection(packed, absmax, nested_absmax, offset, out_features, lora_A, lora_B, scale)
    return lora_matmul_group(
        x, [layer], dropout=dropout, seed=seed, block_size=block_size, keep_weight=keep_weight
    )  # fmt: skip


def lora_matmul_group(
    x: Tensor,
    layers: Sequence[Projection],
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    block_size: int = 64,
    keep_weight: bool = False,
) -> Tensor:
    """y = x W^T + s (D(x) A^T) B^T of every layer, side by side; differentiable in x and every A and B.

    Args:
        x: [..., K], bf16, fp16, fp32 or fp64: the dtype of the products and of y.
        layers: what reads x; all double-quantized or none.
        dropout: probability in [0, 1) that D zeroes an element of x before A; the rest grow by 1/(1-p).
        seed: int32 [1] on x's device; names the mask, which the layers share. Needed when dropout > 0.
        block_size: elements a quantization block.
        keep_weight: keep W (2 bytes a weight in bf16) for dX instead of dequantizing it again. Under gradient
            checkpointing that holds one layer's W from its recompute to its backward pass, and no more.
    Returns:
        [..., sum of N] in x's dtype.
    Raises:
        ValueError: shapes that do not fit together, a dropout outside [0, 1), or dropout without a seed.
    """
    _check(x.shape[-1], layers, dropout, seed, block_size)
    adapted = any(layer.lora_A is not None for layer in layers)
    none = x.new_empty(0)
    y, _, _ = torch.ops.jindo.lora_matmul(
        x,
        [layer.packed for layer in layers],
        [layer.absmax for layer in layers],
        [layer.nested_absmax for layer in layers if layer.nested_absmax is not None],
        [layer.offset for layer in layers if layer.offset is not None],
        [layer.out_features for layer in layers],
        block_size,
        [none if layer.lora_A is None else layer.lora_A for layer in layers] if adapted else [],
        [none if layer.lora_B is None else layer.lora_B for layer in layers] if adapted else [],
        [layer.scale for layer in layers],
        dropout if adapted else 0.0,
        seed,
        keep_weight and torch.is_grad_enabled() and x.requires_grad,
    )
    return y


def _check(
    in_features: int, layers: Sequence[Projection], dropout: float, seed: Tensor | None, block_size: int
) -> None:
    for layer in layers:
        check_layout(
            layer.packed, layer.absmax, layer.nested_absmax, layer.offset, (layer.out_features, in_features), block_size
        )
        if (layer.lora_A is None) != (layer.lora_B is None):
            raise ValueError("lora_matmul got one of lora_A and lora_B: expected both or neither")
        if layer.lora_A is not None and layer.lora_B is not None:
            rank = layer.lora_A.shape[0]
            if layer.lora_A.shape != (rank, in_features) or layer.lora_B.shape != (layer.out_features, rank):
                raise ValueError(
                    f"lora_matmul got A {tuple(layer.lora_A.shape)} and B {tuple(layer.lora_B.shape)}, "
                    f"expected [r, {in_features}] and [{layer.out_features}, r]"
                )
    if len({layer.absmax.dtype for layer in layers}) != 1:
        raise ValueError("lora_matmul_group got layers with and without double quantization: expected one kind")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora_matmul got dropout {dropout}, expected 0 <= p < 1")
    if dropout > 0 and seed is None and any(layer.lora_A is not None for layer in layers):
        raise ValueError("lora_matmul got dropout without a seed: the mask could not be rebuilt in backward")


def workspace_bytes(rows: int, in_features: int, out_features: int, dtype: torch.dtype, dropout: float) -> int:
    """Bytes of temporaries inside one call: the scratch copy of W, and D(x) where dropout needs one."""
    scratch_copy = in_features * out_features
    dropped = rows * in_features if dropout > 0 else 0
    return (scratch_copy + dropped) * dtype.itemsize


# --- reference ------------------------------------------------------------------------------------------


def forward_reference(
    x: Tensor, layers: Sequence[Projection], block_size: int, dropout: float, seed: Tensor | None, keep_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantize each W into a scratch buffer, then plain matrix products, the adapter's first: the product with W
    adds to it where it is stored. Returns y, D(x)A^T [M, sum of r], and W [sum of N, K] where it is kept."""
    in_features = x.shape[-1]
    flat = x.reshape(-1, in_features)
    rows, width = flat.shape[0], sum(layer.out_features for layer in layers)
    y = x.new_empty(rows, width)
    kept = x.new_empty(width if keep_weight else 0, in_features)
    down = down_product(flat, layers, dropout, seed)
    first, r = 0, 0
    for layer in layers:
        n = slice(first, first + layer.out_features)
        first = n.stop
        w = kept[n] if keep_weight else scratch((layer.out_features, in_features), x.dtype, x.device)
        layer.dequantize_into(w, block_size)
        if layer.lora_B is None or not layer.rank:
            torch.mm(flat, w.t(), out=y[:, n])
            continue
        up = layer.lora_B.to(x.dtype) * layer.scale
        torch.mm(down[:, r : r + layer.rank], up.t(), out=y[:, n])
        y[:, n].addmm_(flat, w.t())
        r += layer.rank
    return y.view(*x.shape[:-1], width), down, kept


def down_product(flat: Tensor, layers: Sequence[Projection], dropout: float, seed: Tensor | None) -> Tensor:
    """D(x) A^T of all layers side by side, [M, sum of r]."""
    stacked = [layer.lora_A.to(flat.dtype) for layer in layers if layer.lora_A is not None and layer.rank]
    if not stacked:
        return flat.new_empty(flat.shape[0], 0)
    a = torch.cat(stacked)
    if dropout == 0.0 or seed is None:
        return flat @ a.t()
    # The growth goes onto the r columns of the product, not onto the K of x.
    return (mask(flat, dropout, seed) @ a.t()).mul_(growth(dropout))


def backward_reference(
    dy: Tensor,
    x: Tensor | None,
    layers: Sequence[Projection],
    in_features: int,
    block_size: int,
    down: Tensor | None,
    kept: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns dX (empty where not asked for), and dA and dB of the layers with an adapter, when x is given."""
    flat = dy.reshape(-1, dy.shape[-1])
    parts = list(flat.split([layer.out_features for layer in layers], dim=1))
    adapted = [(layer, part) for layer, part in zip(layers, parts, strict=True) if layer.rank]
    masked = dropout > 0 and seed is not None
    through_b = flat.new_empty(flat.shape[0], sum(layer.rank for layer, _ in adapted))
    r = 0
    for layer, part in adapted:
        assert layer.lora_B is not None
        torch.mm(part, layer.lora_B.to(dy.dtype) * layer.scale, out=through_b[:, r : r + layer.rank])
        r += layer.rank
    grads_a, grads_b = [], []
    if x is not None and down is not None and adapted:
        seen = x.reshape(-1, in_features)
        seen = mask(seen, dropout, seed) if masked and seed is not None else seen
        grad_a = through_b.t() @ seen
        grown = growth(dropout) if masked else 1.0
        r = 0
        for layer, part in adapted:
            assert layer.lora_A is not None
            assert layer.lora_B is not None
            columns = slice(r, r + layer.rank)
            grads_a.append(grad_a[columns].to(layer.lora_A.dtype, copy=True).mul_(grown))
            # (d^T dY)^T, not dY^T d: the long side stays contiguous.
            grads_b.append((down[:, columns].t() @ part).t().to(layer.lora_B.dtype).contiguous().mul_(layer.scale))
            r = columns.stop
    dx = dy.new_empty(0)
    if need_dx:
        dx = _dx(parts, layers, in_features, block_size, through_b, kept, dropout if masked else 0.0, seed)
        dx = dx.view(*dy.shape[:-1], in_features)
    return dx, grads_a, grads_b


def _dx(
    parts: Sequence[Tensor],
    layers: Sequence[Projection],
    in_features: int,
    block_size: int,
    through_b: Tensor,
    kept: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """dX [M, K] = sum over the layers of dY W + s D'((dY B) A)."""
    dy = parts[0]
    dx = dy.new_empty(dy.shape[0], in_features)
    started = through_b.shape[1] > 0
    if started:
        a = torch.cat([layer.lora_A.to(dy.dtype) for layer in layers if layer.lora_A is not None and layer.rank])
        torch.mm(through_b, a, out=dx)
        if dropout > 0 and seed is not None:
            dx = mask(dx, dropout, seed).mul_(growth(dropout))
    first = 0
    for layer, part in zip(layers, parts, strict=True):
        if kept is not None:
            w = kept[first : first + layer.out_features]
        else:
            w = scratch((layer.out_features, in_features), dy.dtype, dy.device)
            layer.dequantize_into(w, block_size)
        dx = dx.addmm_(part, w) if started else torch.mm(part, w, out=dx)
        started = True
        first += layer.out_features
    return dx


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


# --- registration ---------------------------------------------------------------------------------------


def _projections(
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    nested_absmax: Sequence[Tensor],
    offset: Sequence[Tensor],
    out_features: Sequence[int],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Projection]:
    """The operator's flat lists as the implementations take them; an empty A stands for no adapter."""
    layers = []
    for i, codes in enumerate(packed):
        a, b = (lora_A[i], lora_B[i]) if lora_A and lora_A[i].numel() else (None, None)
        nested, mean = (nested_absmax[i], offset[i]) if nested_absmax else (None, None)
        layers.append(Projection(codes, absmax[i], nested, mean, out_features[i], a, b, scales[i]))
    return layers


@torch.library.custom_op("jindo::lora_matmul", mutates_args=())
def _lora_matmul(
    x: Tensor,
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    nested_absmax: Sequence[Tensor],
    offset: Sequence[Tensor],
    out_features: Sequence[int],
    block_size: int,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scales: Sequence[float],
    dropout: float,
    seed: Tensor | None,
    keep_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    layers = _projections(packed, absmax, nested_absmax, offset, out_features, lora_A, lora_B, scales)
    run = dispatch.implementation("lora_matmul", x, rows=x.numel() // x.shape[-1])
    return run(x, layers, block_size, dropout, seed, keep_weight)


@_lora_matmul.register_fake
def _(
    x: Tensor,
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    nested_absmax: Sequence[Tensor],
    offset: Sequence[Tensor],
    out_features: Sequence[int],
    block_size: int,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scales: Sequence[float],
    dropout: float,
    seed: Tensor | None,
    keep_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rank = sum(a.shape[0] for a in lora_A if a.dim() == 2)
    rows = functools.reduce(lambda a, b: a * b, x.shape[:-1], 1)
    width = sum(out_features)
    kept = x.new_empty(width if keep_weight else 0, x.shape[-1])
    return x.new_empty(*x.shape[:-1], width), x.new_empty(rows, rank), kept


@torch.library.custom_op("jindo::lora_matmul_backward", mutates_args=())
def _lora_matmul_backward(
    dy: Tensor,
    x: Tensor | None,
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    nested_absmax: Sequence[Tensor],
    offset: Sequence[Tensor],
    out_features: Sequence[int],
    in_features: int,
    block_size: int,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scales: Sequence[float],
    down: Tensor | None,
    kept: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    layers = _projections(packed, absmax, nested_absmax, offset, out_features, lora_A, lora_B, scales)
    run = dispatch.implementation("lora_matmul_backward", dy, rows=dy.numel() // dy.shape[-1])
    return run(dy, x, layers, in_features, block_size, down, kept, dropout, seed, need_dx)


@_lora_matmul_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    nested_absmax: Sequence[Tensor],
    offset: Sequence[Tensor],
    out_features: Sequence[int],
    in_features: int,
    block_size: int,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scales: Sequence[float],
    down: Tensor | None,
    kept: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dx = dy.new_empty(*dy.shape[:-1], in_features) if need_dx else dy.new_empty(0)
    adapted = [(a, b) for a, b in zip(lora_A, lora_B, strict=True) if a.numel()] if x is not None else []
    return dx, [torch.empty_like(a) for a, _ in adapted], [torch.empty_like(b) for _, b in adapted]


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    (x, packed, absmax, nested, offset, widths, block_size, lora_A, lora_B, scales, dropout, seed, keep) = inputs
    adapter_trains = any(t.requires_grad for t in (*lora_A, *lora_B))
    ctx.save_for_backward(
        x if adapter_trains else None,
        output[1] if adapter_trains else None,
        output[2] if keep else None,
        seed, *packed, *absmax, *nested, *offset, *lora_A, *lora_B,
    )  # fmt: skip
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.counts = [len(group) for group in (packed, absmax, nested, offset, lora_A, lora_B)]
    ctx.numbers = (x.shape[-1], widths, block_size, scales, dropout)


def _backward(ctx, dy: Tensor, _down: Tensor, _kept: Tensor):  # type: ignore[no-untyped-def]
    x, down, kept, seed, *rest = ctx.saved_tensors
    in_features, widths, block_size, scales, dropout = ctx.numbers
    groups = []
    for count in ctx.counts:
        groups.append(rest[:count])
        rest = rest[count:]
    packed, absmax, nested, offset, lora_A, lora_B = groups
    need_dx = ctx.needs_input_grad[0]
    dx, grads_a, grads_b = torch.ops.jindo.lora_matmul_backward(
        dy.contiguous(), x, packed, absmax, nested, offset, widths, in_features, block_size,
        lora_A, lora_B, scales, down, kept, dropout, seed, need_dx,
    )  # fmt: skip
    dA: list[Tensor | None] = [None] * len(lora_A)
    dB: list[Tensor | None] = [None] * len(lora_B)
    if grads_a:
        for i, da, db in zip([i for i, a in enumerate(lora_A) if a.numel()], grads_a, grads_b, strict=True):
            dA[i], dB[i] = da, db
    nothing = [[None] * count for count in ctx.counts[:4]]
    return (dx if need_dx else None, *nothing, None, None, dA, dB, None, None, None, None)


_lora_matmul.register_autograd(_backward, setup_context=_save_for_backward)
