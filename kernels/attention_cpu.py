"""Causal attention on the CPU: batched matrix products, a block of queries at a time, and the softmax between
them in C (csrc/attention.c). Contract: attention.py.

A block sees only the keys up to its last query, which halves the work, and its scores stay in the cache. Scores
and their gradients are fp32; P and dS are rounded to the activations' dtype for the products that follow, as
FlashAttention does. The queries of one key/value head lie side by side, so that grouped heads share a product.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from jindo_core.kernels import attention as contract
from jindo_core.kernels import native
from jindo_core.kernels.native import FLOAT, INT, LONG, POINTER, TYPES, address


def _softmax(
    scores: Tensor, grads: Tensor | None, run: int, first: int, scale: float, lse: Tensor, delta: Tensor | None,
    p: Tensor, ds: Tensor | None,
) -> None:  # fmt: skip
    rows, keys = scores.shape[0] * scores.shape[1], scores.shape[2]
    native.function(
        "jindo_causal_softmax", POINTER, POINTER, LONG, LONG, LONG, LONG, FLOAT, INT, POINTER, POINTER, POINTER,
        POINTER,
    )(
        address(scores), address(grads), rows, run, first, keys, scale, TYPES[p.dtype], address(lse),
        address(delta), address(p), address(ds),
    )  # fmt: skip


@contextlib.contextmanager
def _exact_in_bf16(dtype: torch.dtype) -> Iterator[None]:
    """Let fp32 products of tensors that were bf16 run on the processor's bf16 instructions: twice as fast, and as
    exact, for the operands lose nothing and the sums stay fp32. torch has no bf16 product with an fp32 result here.
    """
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    if dtype == torch.bfloat16:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


class _Buffer:
    """Memory for the largest block, cut to the size of each."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.flat = torch.empty(count, dtype=dtype)

    def cut(self, *shape: int) -> Tensor:
        return self.flat[: math.prod(shape)].view(shape)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[B, n, H, ...] -> [B * G, (H / G) * n, ...], contiguous: the heads of one key/value head one after another."""
    b, n, h = x.shape[:3]
    x = x.unflatten(2, (groups, h // groups)).movedim(1, 3)  # [B, G, H / G, n, ...]
    return x.reshape(b * groups, h // groups * n, *x.shape[4:]).contiguous()


def _from_group(x: Tensor, batch: int, n: int) -> Tensor:
    """The inverse of `_by_group`, as a view: [B, n, H, D]."""
    x = x.unflatten(0, (batch, -1)).unflatten(2, (-1, n))  # [B, G, H / G, n, D]
    return x.movedim(3, 1).flatten(2, 3)


def _blocks(q: Tensor) -> Iterator[tuple[int, int]]:
    tokens = q.shape[1]
    step = contract.block_rows(q.shape[0] * q.shape[2], tokens)
    for first in range(0, tokens, step):
        yield first, min(first + step, tokens)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`causal_attention`: O [B, T, H, D] and the rows' log-sum-exp [B, T, H]."""
    if q.dtype not in TYPES:
        return contract.forward_reference(q, k, v)
    (batch, tokens, heads, size), groups = q.shape, k.shape[2]
    scale = 1.0 / math.sqrt(size)
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(batch, tokens, heads)
    keys, values = _by_group(k, groups).float(), _by_group(v, groups)
    largest = batch * heads * contract.block_rows(batch * heads, tokens) * tokens
    wide, narrow = _Buffer(largest, torch.float32), _Buffer(largest, q.dtype)
    for first, last in _blocks(q):
        queries = _by_group(q[:, first:last], groups)
        shape = (*queries.shape[:2], last)
        with _exact_in_bf16(q.dtype):
            scores = torch.bmm(queries.float(), keys[:, :last].transpose(1, 2), out=wide.cut(*shape))
        p, sums = narrow.cut(*shape), torch.empty(shape[:2])
        _softmax(scores, None, last - first, first, scale, sums, None, p, None)
        out[:, first:last] = _from_group(torch.bmm(p, values[:, :last]), batch, last - first)
        lse[:, first:last] = _from_group(sums[..., None], batch, last - first)[..., 0]
    return out, lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`causal_attention_backward`: dQ, dK, dV."""
    if q.dtype not in TYPES:
        return contract.backward_reference(do, q, k, v, out, lse)
    (batch, tokens, heads, size), groups = q.shape, k.shape[2]
    scale = 1.0 / math.sqrt(size)
    dq = torch.empty(q.shape, dtype=q.dtype)
    own = _by_group(k, groups)
    keys, values = own.float(), _by_group(v, groups).float()
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    delta = (do.float() * out.float()).sum(-1)
    largest = batch * heads * contract.block_rows(batch * heads, tokens) * tokens
    wide, narrow = [_Buffer(largest, torch.float32) for _ in "sg"], [_Buffer(largest, q.dtype) for _ in "pd"]
    for first, last in _blocks(q):
        queries, gradient = _by_group(q[:, first:last], groups), _by_group(do[:, first:last], groups)
        shape = (*queries.shape[:2], last)
        with _exact_in_bf16(q.dtype):
            scores = torch.bmm(queries.float(), keys[:, :last].transpose(1, 2), out=wide[0].cut(*shape))
            grads = torch.bmm(gradient.float(), values[:, :last].transpose(1, 2), out=wide[1].cut(*shape))
        p, ds = narrow[0].cut(*shape), narrow[1].cut(*shape)
        sums, rows = _by_group(lse[:, first:last], groups), _by_group(delta[:, first:last], groups)
        _softmax(scores, grads, last - first, first, scale, sums, rows, p, ds)
        dvalues[:, :last] += torch.bmm(p.transpose(1, 2), gradient)
        dkeys[:, :last] += torch.bmm(ds.transpose(1, 2), queries)
        dq[:, first:last] = _from_group(torch.bmm(ds, own[:, :last]), batch, last - first)
    dk = _from_group(dkeys, batch, tokens).to(q.dtype).contiguous()
    return dq, dk, _from_group(dvalues, batch, tokens).to(q.dtype).contiguous()
