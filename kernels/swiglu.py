"""SwiGLU (Shazeer 2020, arXiv:2002.05202). Contract, reference and registration.

    h = silu(g) * u,      silu(g) = g * sigmoid(g)
    dU = dH * silu(g)     dG = dH * u * sigmoid(g) * (1 + g * (1 - sigmoid(g)))

Computed in fp32 (fp64 for fp64) and rounded once. Kept for the backward pass: g and u, never silu(g).
"""

from __future__ import annotations

import torch
from torch import Tensor

from jindo_core.kernels import dispatch


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; differentiable in both.

    Args:
        gate, up: the same shape [..., I] and dtype (bf16, fp16, fp32, fp64); the last dimension contiguous, rows
            at any one distance: the two halves of a joint projection go in as they are.
    Returns:
        [..., I], contiguous.
    Raises:
        ValueError: shapes, dtypes or devices differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        said = " and ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (gate, up))
        raise ValueError(f"swiglu got {said}: they differ")
    if dispatch.recorded(gate):
        return torch.ops.jindo.swiglu(gate, up)
    return _SwiGLU.apply(gate, up)


def forward_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in PyTorch."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype).contiguous()


def backward_reference(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns dG and dU, contiguous."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, d = gate.to(wide), dh.to(wide)
    sigmoid = torch.sigmoid(g)
    dgate = d * up.to(wide) * sigmoid * (1 + g * (1 - sigmoid))
    return dgate.to(gate.dtype).contiguous(), (d * g * sigmoid).to(up.dtype).contiguous()


class _SwiGLU(torch.autograd.Function):
    """The operator where nothing records it."""

    @staticmethod
    def forward(ctx, gate, up):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        return dispatch.implementation("swiglu", gate)(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh):  # type: ignore[no-untyped-def]
        return dispatch.implementation("swiglu_backward", dh)(dh, *ctx.saved_tensors)


@torch.library.custom_op("jindo::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return dispatch.implementation("swiglu", gate)(gate, up)


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("jindo::swiglu_backward", mutates_args=())
def _swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return dispatch.implementation("swiglu_backward", dh)(dh, gate, up)


@_swiglu_backward.register_fake
def _(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, dh: Tensor):  # type: ignore[no-untyped-def]
    return torch.ops.jindo.swiglu_backward(dh, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_save_for_backward)
