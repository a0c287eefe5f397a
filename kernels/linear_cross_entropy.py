"""Linear layer and cross entropy in one, a chunk of rows at a time: the logits are never held whole.

    loss = sum_m [ logsumexp(h_m W^T) - (h_m W^T)_{y_m} ]          over rows m whose label is not ignored
    dH_m = (softmax(h_m W^T) - onehot(y_m)) W

The gradient is made in the forward pass, while a chunk's logits exist, and scaled in the backward pass
(Hsu et al. 2024, Liger Kernel, arXiv:2410.10989, section 3.2). Ignored rows (prompt and padding) cost nothing:
they are left out before the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jindo_core.kernels import dispatch

_CHUNK_LOGITS = 1 << 24
"""Logits a chunk holds at most: 64 MiB in fp32."""


def chunk_rows(vocab_size: int) -> int:
    """Rows of one chunk for a vocabulary of that size."""
    return max(_CHUNK_LOGITS // vocab_size, 1)


def workspace_bytes(rows: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Bytes of temporaries inside one call: a chunk's logits in `dtype` and fp32, and their gradient."""
    return min(rows, chunk_rows(vocab_size)) * vocab_size * (4 + 2 * dtype.itemsize)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    count: Tensor | float | None = None,
) -> Tensor:
    """Mean cross entropy of `hidden @ weight.T` against `labels`; differentiable in hidden and weight.

    Args:
        hidden: [M, H], floating. weight: [V, H], same dtype. labels: int64 [M], in [0, V) or ignore_index.
        count: divisor; the number of labels that are not ignored by default. A step of several micro-batches
            passes the number in all of them, so that every token weighs the same.
    Returns:
        fp32 scalar (fp64 for fp64 input); NaN when no label counts, as torch's cross_entropy.
    Raises:
        ValueError: shapes that do not fit together.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy got hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}, "
            "expected [M, H] and [V, H]"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"linear_cross_entropy got labels {tuple(labels.shape)}, expected [{hidden.shape[0]}]")
    grad = torch.is_grad_enabled()
    total, _, _ = torch.ops.jindo.linear_cross_entropy(
        hidden, weight, labels, ignore_index, grad and hidden.requires_grad, grad and weight.requires_grad
    )
    return total / ((labels != ignore_index).sum() if count is None else count)


def forward_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, need_dhidden: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the summed loss, dH and dW of that sum; an empty tensor stands for what was not asked for."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.new_zeros((), dtype=wide)
    dhidden = torch.zeros_like(hidden) if need_dhidden else hidden.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=wide) if need_dweight else weight.new_empty(0)
    counted = (labels != ignore_index).nonzero().squeeze(1)
    for rows in counted.split(chunk_rows(weight.shape[0])):
        h, y = hidden[rows], labels[rows, None]
        logits = (h @ weight.t()).to(wide)
        log_sum = logits.logsumexp(dim=1, keepdim=True)
        total += (log_sum - logits.gather(1, y)).sum()
        if need_dhidden or need_dweight:
            dlogits = logits.sub_(log_sum).exp_()
            dlogits.scatter_add_(1, y, dlogits.new_full((1, 1), -1.0).expand(y.shape))
            narrow = dlogits.to(hidden.dtype)
            if need_dhidden:
                dhidden[rows] = narrow @ weight
            if need_dweight:
                dweight += (narrow.t() @ h).to(wide)
    return total, dhidden, dweight.to(weight.dtype)


@torch.library.custom_op("jindo::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, need_dhidden: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    run = dispatch.implementation("linear_cross_entropy", hidden)
    return run(hidden, weight, labels, ignore_index, need_dhidden, need_dweight)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, need_dhidden: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden) if need_dhidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_dweight else weight.new_empty(0),
    )


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, dhidden, dweight = output
    ctx.save_for_backward(dhidden, dweight)
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.given = inputs[4:6]


def _backward(ctx, dtotal: Tensor, _dh: Tensor, _dw: Tensor):  # type: ignore[no-untyped-def]
    dhidden, dweight = ctx.saved_tensors
    gave_hidden, gave_weight = ctx.given
    scale = dtotal.to(dhidden.dtype)
    return (
        dhidden * scale if gave_hidden else None,
        dweight * scale if gave_weight else None,
        None, None, None, None,
    )  # fmt: skip


_linear_cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)
