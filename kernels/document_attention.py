"""Causal attention that stops at document bounds: several rows of training data side by side in one sequence.

    O_d = causal_attention(Q_d, K_d, V_d) for each document d, the tokens of all others unseen

Packing without contamination (Krell et al. 2021, arXiv:2107.02027). A document is a slice: no T x T mask is made, and
no score between two documents is computed. Equation, window and reference of one document: attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from jindo_core.kernels import dispatch
from jindo_core.kernels.attention import causal_attention, check_shapes


def document_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None = None) -> Tensor:
    """`causal_attention` within each document; differentiable in q, k and v.

    Args:
        q: [B, T, H, D]. k, v: [B, T, G, D], G dividing H; one dtype.
        lengths: tokens of one document after another, sequence by sequence: they add up to B * T, and every sequence
            ends with a document.
        window: as in `causal_attention`.
    Returns:
        [B, T, H, D], contiguous.
    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit together, or a window below 1.
    """
    check_shapes("document_attention", q, k, v, window)
    shape, (batch, tokens) = q.shape, q.shape[:2]
    _check_lengths(lengths, batch, tokens)
    q, k, v = (x.reshape(1, batch * tokens, *x.shape[2:]) for x in (q, k, v))
    if q.device.type == "cpu":
        width = tokens if window is None else min(window, tokens)
        return torch.ops.jindo.document_attention(q, k, v, list(lengths), width)[0].view(shape)
    return _one_by_one(q, k, v, lengths, window).view(shape)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None) -> Tensor:
    """On CUDA: a call of torch's kernel for each document of [1, T, H, D]. Their outputs are held beside the whole."""
    # split, not slices: its gradient is one concatenation, a slice's is a tensor of zeros for every document.
    documents = zip(*(x.split(list(lengths), dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([causal_attention(one_q, one_k, one_v, window) for one_q, one_k, one_v in documents], dim=1)


def _check_lengths(lengths: Sequence[int], batch: int, tokens: int) -> None:
    filled = 0
    for length in lengths:
        filled += length
        if length < 1 or filled > tokens:
            break
        filled %= tokens
    else:
        if sum(lengths) == batch * tokens:
            return
    raise ValueError(
        f"document_attention got documents of {list(lengths)} tokens, expected lengths of 1 or more that fill "
        f"{batch} sequences of {tokens}, none across their bounds"
    )


def _slices(lengths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


@torch.library.custom_op("jindo::document_attention", mutates_args=())
def _document_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int
) -> tuple[Tensor, Tensor]:
    """O and the rows' log-sum-exp of [1, T, H, D], filled document by document."""
    run = dispatch.implementation("attention", q)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for here in _slices(lengths):
        own = min(window, here.stop - here.start)
        out[:, here], lse[:, here] = run(q[:, here], k[:, here], v[:, here], own)
    return out, lse


@_document_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("jindo::document_attention_backward", mutates_args=())
def _document_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Sequence[int], window: int
) -> tuple[Tensor, Tensor, Tensor]:
    run = dispatch.implementation("attention_backward", do)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for here in _slices(lengths):
        own = min(window, here.stop - here.start)
        found = run(*(x[:, here] for x in (do, q, k, v, out, lse)), own)
        dq[:, here], dk[:, here], dv[:, here] = found
    return dq, dk, dv


@_document_attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Sequence[int], window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.lengths, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do: Tensor, _dlse: Tensor):  # type: ignore[no-untyped-def]
    grads = torch.ops.jindo.document_attention_backward(do.contiguous(), *ctx.saved_tensors, ctx.lengths, ctx.window)
    return *grads, None, None


_document_attention.register_autograd(_backward, setup_context=_save_for_backward)
