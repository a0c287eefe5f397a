"""Causal grouped-query attention, exact, without the T x T scores kept. Contract, reference and registration.

    P = softmax(s Q K^T), a query seeing the keys up to its own place      O = P V      s = 1 / sqrt(D)
    dV = P^T dO     dS = P * (dO V^T - rowsum(dO * O))     dQ = s dS K     dK = s dS^T Q

Vaswani et al. 2017 (arXiv:1706.03762); the backward pass from the rows' log-sum-exp as in FlashAttention
(Dao et al. 2022, arXiv:2205.14135, algorithm 4). On CUDA torch's own kernel serves; on the CPU it runs at a
third of what the matrix products allow, hence this operator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from jindo_core.kernels import dispatch


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of T new tokens among themselves; differentiable in q, k and v.

    Args:
        q: [B, T, H, D]. k, v: [B, T, G, D], G dividing H; one dtype.
    Returns:
        [B, T, H, D], contiguous.
    Raises:
        ValueError: shapes that do not fit together.
    """
    b, t, h, d = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (b, t, d) or h % k.shape[2]:
        raise ValueError(
            f"causal_attention got q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}, "
            "expected [B, T, H, D] and twice [B, T, G, D], G dividing H"
        )
    if q.device.type == "cpu":
        return torch.ops.jindo.causal_attention(q, k, v)[0]
    return _torch_attention(q, k, v)


def workspace_bytes(batch: int, tokens: int, heads: int, itemsize: int) -> int:
    """Bytes of temporaries on the CPU: two blocks of scores in fp32 and two in the activations' dtype."""
    rows = block_rows(batch * heads, tokens)
    return batch * heads * rows * tokens * (8 + 2 * itemsize)


def block_rows(heads: int, tokens: int) -> int:
    """Queries worked on at once: 2^20 scores, so that they stay in the cache, but 16 queries at least."""
    rows = max((1 << 20) // max(heads * tokens, 1), 16)
    return min(1 << (rows.bit_length() - 1), 256, max(tokens, 1))


def _torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=grouped)
    return y.transpose(1, 2).contiguous()


def forward_reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns O [B, T, H, D] and the rows' log-sum-exp [B, T, H], in fp32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    h, g = q.shape[2], k.shape[2]
    keys = k.repeat_interleave(h // g, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), keys.to(wide)) / math.sqrt(q.shape[3])
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    lse = scores.masked_fill_(later, -math.inf).logsumexp(-1)
    return _torch_attention(q, k, v), lse.transpose(1, 2).contiguous()


def backward_reference(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV by torch's autograd through its own attention."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        y = _torch_attention(*leaves)
    dq, dk, dv = torch.autograd.grad(y, leaves, do)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


# --- registration ---------------------------------------------------------------------------------------


@torch.library.custom_op("jindo::causal_attention", mutates_args=())
def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return dispatch.implementation("attention", q)(q, k, v)


@_causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("jindo::causal_attention_backward", mutates_args=())
def _causal_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.implementation("attention_backward", do)(do, q, k, v, out, lse)


@_causal_attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do: Tensor, _dlse: Tensor):  # type: ignore[no-untyped-def]
    return torch.ops.jindo.causal_attention_backward(do.contiguous(), *ctx.saved_tensors)


_causal_attention.register_autograd(_backward, setup_context=_save_for_backward)
