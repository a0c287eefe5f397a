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

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jindo_core.kernels import dispatch
from jindo_core.kernels.nf4 import check_layout


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
    _check(x, layers, dropout, seed, block_size)
    adapted = any(layer.lora_A is not None for layer in layers)
    dropout = dropout if adapted else 0.0
    keep_weight = keep_weight and torch.is_grad_enabled() and x.requires_grad
    if not dispatch.recorded(x):
        adapters = [t for layer in layers if layer.rank for t in (layer.lora_A, layer.lora_B)]
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, *adapters)):
            return _run(x, layers, block_size, dropout, seed, False)[0]
        return _LoraMatmul.apply(x, seed, layers, block_size, dropout, keep_weight, *adapters)
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
        dropout,
        seed,
        keep_weight,
    )
    return y


def _check(
    x: Tensor, layers: Sequence[Projection], dropout: float, seed: Tensor | None, block_size: int
) -> None:
    in_features, device = x.shape[-1], x.device
    for layer in layers:
        for name, part in (("W", layer.packed), ("A", layer.lora_A), ("B", layer.lora_B), ("the seed", seed)):
            if part is not None and part.device != device:
                raise ValueError(f"lora_matmul got x on {device} and {name} on {part.device}: expected one device")
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


def workspace_bytes(
    rows: int,
    in_features: int,
    out_features: Sequence[int],
    ranks: Sequence[int],
    dtype: torch.dtype,
    dropout: float,
    *,
    backward: bool,
) -> int:
    """Bytes of temporaries inside one call of the reference, fp32 adapters, x and all adapters taking gradients.

    W's scratch buffer is not among them: it stays (`scratch_bytes`).

    Args:
        out_features, ranks: N and r of each layer.
    """
    rank, item = sum(ranks), dtype.itemsize
    dropped = rows * in_features * item if dropout > 0 and rank else 0
    cast = 0 if dtype == torch.float32 else item
    held = rank * in_features * (cast or (4 if len(ranks) > 1 else 0))  # all A in dtype
    stacked = rank * in_features * ((4 if len(ranks) > 1 else 0) + cast)  # while they are made
    one_b = max((n * r for n, r in zip(out_features, ranks, strict=True)), default=0)
    if not backward:
        return max(stacked, held + dropped, one_b * cast)
    gradients = dropped + rank * in_features * item + one_b * item  # D(x), dA and one dB in dtype
    return rows * rank * item + max(one_b * cast, gradients, stacked, held + dropped)


def scratch_bytes(in_features: int, out_features: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of the scratch buffer that the largest W of a call needs; it is kept from call to call."""
    return in_features * max(out_features) * dtype.itemsize


# --- eager calls ----------------------------------------------------------------------------------------


def _run(
    x: Tensor, layers: Sequence[Projection], block_size: int, dropout: float, seed: Tensor | None, keep_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    width = min(layer.out_features for layer in layers)
    run = dispatch.implementation("lora_matmul", x, rows=x.numel() // x.shape[-1], width=width)
    with _as_given(x.device.type):
        return run(x, layers, block_size, dropout, seed, keep_weight)


def _as_given(kind: str) -> contextlib.AbstractContextManager[None]:
    """No autocast: the products are in x's dtype, and autocast would give another one to results already allocated."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


class _LoraMatmul(torch.autograd.Function):
    """The operator where nothing records it; `adapters`: A and B of each layer that has them, which autograd sees."""

    @staticmethod
    def forward(ctx, x, seed, layers, block_size, dropout, keep_weight, *adapters):  # type: ignore[no-untyped-def]
        y, down, kept = _run(x, layers, block_size, dropout, seed, keep_weight)
        trained = any(ctx.needs_input_grad[6:])
        ctx.save_for_backward(
            x if trained else None, down if trained else None, kept if keep_weight else None, seed, *adapters
        )
        ctx.numbers = (x.shape[-1], layers, block_size, dropout)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, down, kept, seed, *adapters = ctx.saved_tensors
        in_features, layers, block_size, dropout = ctx.numbers
        run = dispatch.implementation(
            "lora_matmul_backward", dy, rows=dy.numel() // dy.shape[-1], width=in_features
        )  # fmt: skip
        need_dx = ctx.needs_input_grad[0]
        with _as_given(dy.device.type):
            dx, grads_a, grads_b = run(
                dy.contiguous(), x, layers, in_features, block_size, down, kept, dropout, seed, need_dx
            )  # fmt: skip
        trained = [g for pair in zip(grads_a, grads_b, strict=True) for g in pair] or [None] * len(adapters)
        return (dx if need_dx else None, None, None, None, None, None, *trained)


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
    return _run(x, layers, block_size, dropout, seed, keep_weight)


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
    run = dispatch.implementation("lora_matmul_backward", dy, rows=dy.numel() // dy.shape[-1], width=in_features)
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
