"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout. Contract and reference.

    [a', b'] = [a cos - b sin, b cos + a sin],      a and b the halves of a head's D numbers

The backward pass is the same rotation by the opposite angle. Computed in fp32 (fp64 for fp64), rounded once.
q and k are turned in one call; nothing but cos and sin is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jindo_core.kernels import dispatch


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions; differentiable in q and k.

    Args:
        q: [B, T, H, D]. k: [B, T, G, D], the same dtype; each head contiguous, any other strides.
        cos, sin: [B or 1, T, D/2], fp32 (fp64 for fp64 q), contiguous.
    Returns:
        The turned q and k, contiguous.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    b, t, _, d = q.shape
    if k.shape[:2] != (b, t) or k.shape[3] != d or d % 2:
        raise ValueError(f"rope got q {tuple(q.shape)} and k {tuple(k.shape)}, expected [B, T, heads, D], D even")
    if cos.shape != sin.shape or cos.shape[0] not in (1, b) or cos.shape[1:] != (t, d // 2):
        raise ValueError(f"rope got cos {tuple(cos.shape)} for q {tuple(q.shape)}, expected [{b} or 1, {t}, {d // 2}]")
    wide = torch.promote_types(q.dtype, torch.float32)
    if k.dtype != q.dtype or cos.dtype != wide or sin.dtype != wide:
        raise ValueError(
            f"rope got q {q.dtype}, k {k.dtype}, cos {cos.dtype}, sin {sin.dtype}, expected k as q, cos and sin {wide}"
        )
    if len({t.device for t in (q, k, cos, sin)}) > 1:
        raise ValueError(f"rope got q on {q.device}, k on {k.device}, cos on {cos.device}: expected one device")
    if dispatch.recorded(q):
        turned_q, turned_k = torch.ops.jindo.rope(q, k, cos, sin, False)
        return turned_q, turned_k
    return _RoPE.apply(q, k, cos, sin)


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """`rope` in PyTorch; `inverse` turns the other way."""
    wide = torch.promote_types(q.dtype, cos.dtype)
    cos, sin = cos[:, :, None], (-sin if inverse else sin)[:, :, None]

    def turn(x: Tensor) -> Tensor:
        a, b = x.to(wide).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(q), turn(k)


class _RoPE(torch.autograd.Function):
    """The operator where nothing records it."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return dispatch.implementation("rope", q)(q, k, cos, sin, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):  # type: ignore[no-untyped-def]
        return (*dispatch.implementation("rope", dq)(dq, dk, *ctx.saved_tensors, True), None, None)


@torch.library.custom_op("jindo::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return dispatch.implementation("rope", q)(q, k, cos, sin, inverse)


@_rope.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.inverse = inputs[4]


def _backward(ctx, dq: Tensor, dk: Tensor):  # type: ignore[no-untyped-def]
    return (*torch.ops.jindo.rope(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None)


_rope.register_autograd(_backward, setup_context=_save_for_backward)
