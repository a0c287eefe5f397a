"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467). Contract, reference and registration.

    y = w * (x * rstd),      rstd = 1 / sqrt(mean(x^2) + eps)
    dX = rstd * (g - xhat * mean(g * xhat)),    xhat = x * rstd,  g = dY * w        dW = sum_rows dY * xhat

The mean and rstd are fp32 (fp64 for fp64). As in LLaMA, xhat is rounded to x's dtype before it meets w.
Kept for the backward pass: x and rstd (one number a row).
"""

from __future__ import annotations

import torch
from torch import Tensor

from jindo_core.kernels import dispatch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize the last dimension; differentiable in x and weight.

    Args:
        x: [..., C], bf16, fp16, fp32 or fp64. weight: [C], the same dtype.
        eps: added to the mean of squares.
    Raises:
        ValueError: weight does not fit x: its last dimension, dtype or device.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm got weight {tuple(weight.shape)} for x {tuple(x.shape)}, expected [{x.shape[-1]}]")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"rms_norm got weight in {weight.dtype} on {weight.device}, expected x's {x.dtype} on {x.device}"
        )
    if dispatch.recorded(x):
        return torch.ops.jindo.rms_norm(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)


def forward_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y [..., C] and rstd [rows]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * rstd).to(x.dtype), rstd.view(-1)


def backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Returns dX and dW; an empty tensor stands for a dW that was not asked for."""
    wide = rstd.dtype
    normal = x.to(wide) * rstd.view(*x.shape[:-1], 1)
    g = dy.to(wide) * weight.to(wide)
    dx = (g - normal * (g * normal).mean(-1, keepdim=True)) * rstd.view(*x.shape[:-1], 1)
    dweight = dy.new_empty(0)
    if need_dweight:
        dweight = (dy.to(wide) * normal).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx.to(x.dtype), dweight


class _RMSNorm(torch.autograd.Function):
    """The operator where nothing records it."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        y, rstd = dispatch.implementation("rms_norm", x)(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        need_dweight = ctx.needs_input_grad[1]
        run = dispatch.implementation("rms_norm_backward", dy)
        dx, dweight = run(dy, *ctx.saved_tensors, need_dweight)
        return dx, dweight if need_dweight else None, None


# --- registration ---------------------------------------------------------------------------------------


@torch.library.custom_op("jindo::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return dispatch.implementation("rms_norm", x)(x, weight, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=wide)


@torch.library.custom_op("jindo::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    return dispatch.implementation("rms_norm_backward", dy)(dy, x, weight, rstd, need_dweight)


@_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_dweight: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight) if need_dweight else dy.new_empty(0)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy: Tensor, _drstd: Tensor):  # type: ignore[no-untyped-def]
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.jindo.rms_norm_backward(dy, x, weight, rstd, ctx.needs_input_grad[1])
    return dx, dweight if ctx.needs_input_grad[1] else None, None


_rms_norm.register_autograd(_backward, setup_context=_save_for_backward)
