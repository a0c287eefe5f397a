"""Causal grouped-query attention, exact, without the T x T scores kept. Contract, reference and registration.

    P = softmax(s Q K^T), a query seeing the keys up to its own place      O = P V      s = 1 / sqrt(D)
    (with a window, the last `window` of them: Beltagy et al. 2020, arXiv:2004.05150; Mistral, arXiv:2310.06825)
    dV = P^T dO     dS = P * (dO V^T - rowsum(dO * O))     dQ = s dS K     dK = s dS^T Q

Vaswani et al. 2017 (arXiv:1706.03762); the backward pass from the rows' log-sum-exp as in FlashAttention
(Dao et al. 2022, arXiv:2205.14135, algorithm 4). On CUDA torch's own kernel serves; on the CPU it runs at a
third of what the matrix products allow, hence this operator. A window skips the keys outside it on the CPU; on CUDA it
is a T x T boolean mask, which torch's memory-efficient kernel reads: no work is saved there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from jindo_core.kernels import dispatch


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Attention of T new tokens among themselves; differentiable in q, k and v.

    Args:
        q: [B, T, H, D]. k, v: [B, T, G, D], G dividing H; one dtype.
        window: a query sees so many keys, its own the last; None: all up to its own.
    Returns:
        [B, T, H, D], contiguous.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a window below 1.
    """
    check_shapes("causal_attention", q, k, v, window)
    t = q.shape[1]
    width = t if window is None or window > t else window
    if q.device.type == "cpu":
        return torch.ops.jindo.causal_attention(q, k, v, width)[0]
    return _torch_attention(q, k, v, width)


def check_shapes(operator: str, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    """Raises ValueError for shapes, dtypes or devices that do not fit together, or a window below 1."""
    b, t, h, d = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (b, t, d) or h % k.shape[2]:
        raise ValueError(
            f"{operator} got q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}, "
            "expected [B, T, H, D] and twice [B, T, G, D], G dividing H"
        )
    if len({(x.device, x.dtype) for x in (q, k, v)}) > 1:
        said = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"{operator} got q, k and v in {said}: expected one dtype and device")
    if window is not None and window < 1:
        raise ValueError(f"{operator} got a window of {window}, expected 1 or more, or None")


def causal_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """bool [len(queries), len(keys)]: which keys a query sees.

    Args:
        queries, keys: int64 [n], places in the sequence. window: as in `causal_attention`.
    """
    ahead = queries[:, None] - keys[None]
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)


def workspace_bytes(
    batch: int, tokens: int, heads: int, groups: int, size: int, itemsize: int, *, backward: bool,
    window: int | None = None,
) -> int:  # fmt: skip
    """Bytes of temporaries on the CPU: a block of scores in fp32 and one in the activations' dtype, and keys and values
    by head. In the backward pass two of each, the keys' and values' gradients in fp32, and, before the blocks, the
    product of dO and O."""
    block = _block_scores(batch * heads, tokens, window or tokens) * (4 + itemsize)
    keys = batch * groups * tokens * size
    if not backward:
        return block + keys * (4 + itemsize)
    return keys * (4 * 4 + itemsize) + max(2 * block, 3 * batch * heads * tokens * size * 4)


def cuda_workspace_bytes(batch: int, tokens: int, heads: int, groups: int, size: int, itemsize: int) -> int:
    """Bytes of temporaries of the backward pass of torch's FlashAttention-2: dQ summed in fp32, a number a row, and,
    where heads share keys, dK and dV of every head before they are summed. Rows padded to 128, heads to 32."""
    rows, padded = -(-tokens // 128) * 128, -(-size // 32) * 32
    expanded = 2 * tokens * heads * size * itemsize if heads != groups else 0
    return batch * (rows * heads * (padded + 1) * 4 + expanded)


MOST_ROWS = 256


def block_rows(heads: int, tokens: int, window: int | None = None) -> int:
    """Queries worked on at once: 2^20 scores, so that they stay in the cache, but 16 queries at least."""
    keys = min(tokens, (window or tokens) + MOST_ROWS)
    rows = max((1 << 20) // max(heads * keys, 1), 16)
    return min(1 << (rows.bit_length() - 1), MOST_ROWS, max(tokens, 1))


def _block_scores(heads: int, tokens: int, window: int) -> int:
    """The most scores of a block."""
    return heads * max((last - first) * (reach - start) for first, last, start, reach in _blocks(heads, tokens, window))


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tokens, grouped = q.shape[2], q.shape[1] != k.shape[1]
    if window >= tokens:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=grouped)
        return y.transpose(1, 2).contiguous()
    if grouped:  # with a mask, only torch's plain kernel takes grouped heads, and that one keeps the scores
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    place = torch.arange(tokens, device=q.device)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(place, place, window))
    return y.transpose(1, 2).contiguous()


# --- reference ------------------------------------------------------------------------------------------
# A block of queries at a time, batched over the key/value heads. A block sees only the keys up to its last query, from
# the first one in the window of its first query: half of the work without a window. Its scores stay in the cache.
# Scores and their gradients are fp32 at least; P and dS are rounded to the activations' dtype for the products that
# follow, as FlashAttention does. The queries of one key/value head lie side by side, so that grouped heads share a
# product.


class Softmax(Protocol):
    """The softmax between the products, for rows of scores that come in runs of `run` queries.

    Query i of a run sees the `window` keys up to key `first + i`; p and ds are 0 for the others.

    Args:
        scores: [*, rows, keys], Q K^T; used up. grads: dO V^T, or None in the forward pass. scale: s.
        lse: [*, rows], made in the forward pass and read in the backward. delta: rowsum(dO * O), for the backward.
        p, ds: P and dS s, in the activations' dtype: filled.
    """

    def __call__(
        self, scores: Tensor, grads: Tensor | None, run: int, first: int, window: int, scale: float, lse: Tensor,
        delta: Tensor | None, p: Tensor, ds: Tensor | None,
    ) -> None: ...  # fmt: skip


def softmax_reference(
    scores: Tensor, grads: Tensor | None, run: int, first: int, window: int, scale: float, lse: Tensor,
    delta: Tensor | None, p: Tensor, ds: Tensor | None,
) -> None:  # fmt: skip
    """`Softmax` in PyTorch."""
    place = first + torch.arange(scores.shape[1], device=scores.device) % run
    unseen = ~causal_mask(place, torch.arange(scores.shape[2], device=scores.device), window)
    scores.mul_(scale).masked_fill_(unseen, -math.inf)
    if grads is None or delta is None or ds is None:
        lse.copy_(scores.logsumexp(-1))
        p.copy_(scores.sub_(lse[..., None]).exp_())
        return
    scores.sub_(lse[..., None]).exp_()
    p.copy_(scores)
    ds.copy_(scores.mul_(grads - delta[..., None]).mul_(scale).masked_fill_(unseen, 0))


def forward_reference(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Returns O [B, T, H, D] and the rows' log-sum-exp [B, T, H]."""
    return forward_in_blocks(q, k, v, window, softmax_reference)


def backward_reference(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dQ, dK and dV."""
    return backward_in_blocks(do, q, k, v, out, lse, window, softmax_reference)


class _Buffer:
    """Memory for the largest block, cut to the size of each."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = torch.empty(count, dtype=dtype, device=device)

    def cut(self, *shape: int) -> Tensor:
        return self.flat[: math.prod(shape)].view(shape)


def _buffers(q: Tensor, window: int, wide: torch.dtype, count: int) -> tuple[list[_Buffer], list[_Buffer]]:
    """`count` buffers of each kind: for scores, and for what is rounded."""
    batch, tokens, heads, _ = q.shape
    largest = _block_scores(batch * heads, tokens, window)
    return tuple([_Buffer(largest, dtype, q.device) for _ in range(count)] for dtype in (wide, q.dtype))  # type: ignore[return-value]


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[B, n, H, ...] -> [B * G, (H / G) * n, ...], contiguous: the heads of one key/value head one after another."""
    b, n, h = x.shape[:3]
    x = x.unflatten(2, (groups, h // groups)).movedim(1, 3)  # [B, G, H / G, n, ...]
    return x.reshape(b * groups, h // groups * n, *x.shape[4:]).contiguous()


def _from_group(x: Tensor, batch: int, n: int) -> Tensor:
    """The inverse of `_by_group`, as a view: [B, n, H, D]."""
    x = x.unflatten(0, (batch, -1)).unflatten(2, (-1, n))  # [B, G, H / G, n, D]
    return x.movedim(3, 1).flatten(2, 3)


def _blocks(heads: int, tokens: int, window: int) -> Iterator[tuple[int, int, int, int]]:
    """(first query, the one after the last, first key, the one after the last) of each block.

    Keys in steps, beyond those that the queries see: oneDNN keeps a compiled product for every shape, and takes
    milliseconds to make one. At 2,048 tokens, with a shape a block, those held 290 MB.
    """
    rows = block_rows(heads, tokens, window)
    keys = max(64, 1 << max(min(tokens, window + rows).bit_length() - 5, 0))
    for first in range(0, tokens, rows):
        last = min(first + rows, tokens)
        yield first, last, max(first - window + 1, 0) // keys * keys, min(-(-last // keys) * keys, tokens)


@contextlib.contextmanager
def _exact_in_bf16(x: Tensor) -> Iterator[None]:
    """Let fp32 products of tensors that were bf16 run on the processor's bf16 instructions: twice as fast, and as
    exact, for the operands lose nothing and the sums stay fp32. torch has no bf16 product with an fp32 result here.
    """
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def forward_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """O and the rows' log-sum-exp, with `softmax` between the products."""
    (batch, tokens, heads, size), groups = q.shape, k.shape[2]
    wide, scale = torch.promote_types(q.dtype, torch.float32), 1.0 / math.sqrt(size)
    out, lse = q.new_empty(q.shape), q.new_empty(batch, tokens, heads, dtype=wide)
    keys, values = _by_group(k, groups).to(wide), _by_group(v, groups)
    (for_scores,), (for_p,) = _buffers(q, window, wide, 1)
    for first, last, start, reach in _blocks(batch * heads, tokens, window):
        queries = _by_group(q[:, first:last], groups)
        shape = (*queries.shape[:2], reach - start)
        with _exact_in_bf16(q):
            scores = torch.bmm(queries.to(wide), keys[:, start:reach].transpose(1, 2), out=for_scores.cut(*shape))
        p, sums = for_p.cut(*shape), lse.new_empty(shape[:2])
        softmax(scores, None, last - first, first - start, window, scale, sums, None, p, None)
        out[:, first:last] = _from_group(torch.bmm(p, values[:, start:reach]), batch, last - first)
        lse[:, first:last] = _from_group(sums[..., None], batch, last - first)[..., 0]
    return out, lse


def backward_in_blocks(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int, softmax: Softmax
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV, with `softmax` between the products."""
    (batch, tokens, heads, size), groups = q.shape, k.shape[2]
    wide, scale = lse.dtype, 1.0 / math.sqrt(size)
    dq, own = q.new_empty(q.shape), _by_group(k, groups)
    keys, values = own.to(wide), _by_group(v, groups).to(wide)
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    delta = (do.to(wide) * out.to(wide)).sum(-1)
    for_scores, for_rounded = _buffers(q, window, wide, 2)
    for first, last, start, reach in _blocks(batch * heads, tokens, window):
        queries, gradient = _by_group(q[:, first:last], groups), _by_group(do[:, first:last], groups)
        shape = (*queries.shape[:2], reach - start)
        with _exact_in_bf16(q):
            scores = torch.bmm(queries.to(wide), keys[:, start:reach].transpose(1, 2), out=for_scores[0].cut(*shape))
            grads = torch.bmm(gradient.to(wide), values[:, start:reach].transpose(1, 2), out=for_scores[1].cut(*shape))
        p, ds = for_rounded[0].cut(*shape), for_rounded[1].cut(*shape)
        sums, rows = _by_group(lse[:, first:last], groups), _by_group(delta[:, first:last], groups)
        softmax(scores, grads, last - first, first - start, window, scale, sums, rows, p, ds)
        dvalues[:, start:reach] += torch.bmm(p.transpose(1, 2), gradient)
        dkeys[:, start:reach] += torch.bmm(ds.transpose(1, 2), queries)
        dq[:, first:last] = _from_group(torch.bmm(ds, own[:, start:reach]), batch, last - first)
    dk, dv = (_from_group(x, batch, tokens).to(q.dtype).contiguous() for x in (dkeys, dvalues))
    return dq, dk, dv


# --- registration ---------------------------------------------------------------------------------------


@torch.library.custom_op("jindo::causal_attention", mutates_args=())
def _causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return dispatch.implementation("attention", q)(q, k, v, window)


@_causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("jindo::causal_attention_backward", mutates_args=())
def _causal_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.implementation("attention_backward", do)(do, q, k, v, out, lse, window)


@_causal_attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do: Tensor, _dlse: Tensor):  # type: ignore[no-untyped-def]
    grads = torch.ops.jindo.causal_attention_backward(do.contiguous(), *ctx.saved_tensors, ctx.window)
    return *grads, None


_causal_attention.register_autograd(_backward, setup_context=_save_for_backward)
