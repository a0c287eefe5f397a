"""Causal attention on the CPU: the reference's products, with the softmax between them in C (csrc/attention.c).

Contract and reference: attention.py, which also takes what C does not: fp64.
"""

from __future__ import annotations

from torch import Tensor

from jindo_core.kernels import attention as contract
from jindo_core.kernels import native
from jindo_core.kernels.native import FLOAT, INT, LONG, POINTER, TYPES, address


def softmax(
    scores: Tensor, grads: Tensor | None, run: int, first: int, window: int, scale: float, lse: Tensor,
    delta: Tensor | None, p: Tensor, ds: Tensor | None,
) -> None:  # fmt: skip
    """`Softmax` of the contract; every tensor contiguous."""
    rows, keys = scores.shape[0] * scores.shape[1], scores.shape[2]
    call = native.function(
        "jindo_causal_softmax", POINTER, POINTER, LONG, LONG, LONG, LONG, LONG, FLOAT, INT, POINTER, POINTER, POINTER,
        POINTER,
    )  # fmt: skip
    call(
        address(scores), address(grads), rows, run, first, window, keys, scale, TYPES[p.dtype], address(lse),
        address(delta), address(p), address(ds),
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """`causal_attention`: O and the rows' log-sum-exp."""
    run = softmax if q.dtype in TYPES else contract.softmax_reference
    return contract.forward_in_blocks(q, k, v, window, run)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`causal_attention_backward`: dQ, dK and dV."""
    run = softmax if q.dtype in TYPES else contract.softmax_reference
    return contract.backward_in_blocks(do, q, k, v, out, lse, window, run)
