"""Linear layer and cross entropy in one, a chunk of rows at a time: the logits are never held whole.

    loss = sum_m [ logsumexp(z_m) - (1 - e) z_m[y_m] - e mean(z_m) ],    z_m = h_m W^T,   over rows m not ignored
    dH_m = (softmax(z_m) - (1 - e) onehot(y_m) - e / V) W

with e the label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7), 0 unless asked for.
The gradient is made in the forward pass, while a chunk's logits exist, and scaled in the backward pass
(Hsu et al. 2024, Liger Kernel, arXiv:2410.10989, section 3.2). Ignored rows (prompt and padding) cost nothing:
they are left out before the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jindo_core.kernels import dispatch

Slices = Callable[[], Iterator[Tensor]]

_CHUNK_LOGITS = 1 << 24
"""Logits a chunk holds at most: 64 MiB in fp32."""

_PRODUCT_STEP = 32
"""Rows; two of AMX's tiles."""


def chunk_rows(vocab_size: int, *, in_place: bool = False) -> int:
    """Rows of one chunk for a vocabulary of that size.

    Args:
        in_place: of the GPU kernel, which overwrites the logits with their gradient and so has room for twice as
            many; a multiple of 128 where there are that many, as the tiles of a matrix product like it.
    """
    rows = max(_CHUNK_LOGITS * (2 if in_place else 1) // vocab_size, 1)
    return rows // 128 * 128 if in_place and rows >= 128 else rows


def workspace_bytes(
    rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, *, in_place: bool = False
) -> int:
    """Bytes of temporaries inside one call with a frozen head: a chunk's hidden states and their gradient, and its
    logits in `dtype` and fp32 and their gradient.

    With `in_place`, of the GPU kernel: the logits in `dtype` alone, rows padded to 16.
    """
    rows = min(rows, chunk_rows(vocab_size, in_place=in_place))
    narrow = dtype.itemsize if dtype.itemsize < 4 else 0  # beside fp32 ones, before and after
    logits = -(-vocab_size // 16) * 16 * dtype.itemsize if in_place else vocab_size * (4 + narrow)
    return rows * (logits + 2 * hidden_size * dtype.itemsize)


def product_rows(rows: int, most: int, like: Tensor) -> int:
    """Rows that a chunk's products are made with: on the CPU in 16 bits few sizes, else as many as there are.

    There oneDNN compiles a product for every shape that it meets (0.6 MB each, seen with AMX), and keeps it whatever
    ONEDNN_PRIMITIVE_CACHE_CAPACITY says; the number of supervised rows differs from step to step. So it is rounded up,
    by at most 31 or an eighth.

    Args:
        most: of a whole chunk, whose size never changes. like: a tensor of the product.
    """
    if like.device.type != "cpu" or like.dtype.itemsize != 2 or not rows:
        return rows
    step = max(_PRODUCT_STEP, (1 << rows.bit_length() - 1) // 8)
    return min(-(-rows // step) * step, max(most, rows))


def gathered(hidden: Tensor, rows: Tensor, most: int) -> Tensor:
    """hidden[rows], and zeros below up to `product_rows`."""
    return extended(hidden[rows], product_rows(len(rows), most, hidden))


def extended(part: Tensor, rows: int) -> Tensor:
    """`part` [M, …] with zeros below up to so many rows."""
    return part if len(part) == rows else torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    count: Tensor | float | None = None,
    counted_rows: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of `hidden @ weight.T` against `labels`; differentiable in hidden and weight.

    Args:
        hidden: [M, H], floating. weight: [V, H], same dtype. labels: int64 [M], in [0, V) or ignore_index.
        label_smoothing: e in [0, 1]; as torch's cross_entropy, (1 - e) nll + e * the mean over classes of -log p.
        count: divisor; the number of labels that are not ignored by default. A step of several micro-batches
            passes the number in all of them, so that every token weighs the same.
        counted_rows: int64 [N], in order the rows that count, from a caller who knows: a label elsewhere is not looked
            at. To find them a GPU is waited for.
    Returns:
        fp32 scalar (fp64 for fp64 input); NaN when no label counts, as torch's cross_entropy.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a label smoothing outside [0, 1].
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy got hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}, "
            "expected [M, H] and [V, H]"
        )
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        raise ValueError(
            f"linear_cross_entropy got a weight in {weight.dtype} on {weight.device}, expected hidden's "
            f"{hidden.dtype} on {hidden.device}"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64 or labels.device != hidden.device:
        raise ValueError(
            f"linear_cross_entropy got {labels.dtype} labels {tuple(labels.shape)}, expected [{hidden.shape[0]}] "
            f"in torch.int64 on {hidden.device}, got {labels.device}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy got label_smoothing {label_smoothing}, expected 0 <= e <= 1")
    grad = torch.is_grad_enabled()
    numbers = (ignore_index, label_smoothing, grad and hidden.requires_grad, grad and weight.requires_grad)
    if dispatch.recorded(hidden):
        total, _, _ = torch.ops.jindo.linear_cross_entropy(hidden, weight, labels, *numbers, counted_rows)
    else:
        total = _LinearCrossEntropy.apply(hidden, weight, labels, *numbers, counted_rows)
    return total / (_count(labels, ignore_index, counted_rows) if count is None else count)


def counted(labels: Tensor, ignore_index: int, known: Tensor | None = None) -> Tensor:
    """int64, the rows whose label is not ignored; `known` where the caller knew them."""
    return (labels != ignore_index).nonzero().squeeze(1) if known is None else known


def _count(labels: Tensor, ignore_index: int, known: Tensor | None) -> Tensor | float:
    if known is None:
        return (labels != ignore_index).sum()
    return len(known) or math.nan  # of none: 0 / 0, as the tensor's


def forward_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_dhidden: bool,
    need_dweight: bool,
    counted_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the summed loss, dH and dW of that sum; an empty tensor stands for what was not asked for."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.new_zeros((), dtype=wide)
    dhidden = torch.zeros_like(hidden) if need_dhidden else hidden.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=wide) if need_dweight else weight.new_empty(0)
    most = chunk_rows(weight.shape[0])
    for rows in counted(labels, ignore_index, counted_rows).split(most):
        h, y = gathered(hidden, rows, most), labels[rows, None]
        logits = (h @ weight.t())[: len(rows)].to(wide)
        log_sum = logits.logsumexp(dim=1, keepdim=True)
        loss = log_sum - logits.gather(1, y) * (1 - label_smoothing)
        if label_smoothing:
            loss -= logits.mean(dim=1, keepdim=True) * label_smoothing
        total += loss.sum()
        if need_dhidden or need_dweight:
            dlogits = logits.sub_(log_sum).exp_()
            dlogits.scatter_add_(1, y, dlogits.new_full((1, 1), label_smoothing - 1).expand(y.shape))
            if label_smoothing:
                dlogits -= label_smoothing / weight.shape[0]
            narrow = h.new_empty(len(h), weight.shape[0])  # one tensor, not one cut down and one extended
            narrow[: len(rows)] = dlogits
            narrow[len(rows) :] = 0
            if need_dhidden:
                dhidden[rows] = (narrow @ weight)[: len(rows)]
            if need_dweight:
                dweight += (narrow.t() @ h).to(wide)
            del dlogits, narrow
        del logits  # before the next chunk's are made
    return total, dhidden, dweight.to(weight.dtype)


def sliced_cross_entropy(
    hidden: Tensor, slices: Slices, labels: Tensor, *, ignore_index: int = -100, count: Tensor | float | None = None,
    counted_rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`linear_cross_entropy` of a head that is never on the device whole; differentiable in hidden.

    The log-sum-exp of a row is gathered slice by slice (Milakov and Gimelshein 2018, arXiv:1805.02867); the gradient
    takes a second pass, and a third product where the whole head takes two.

    Args:
        hidden: [M, H]. labels: int64 [M], in [0, V) or ignore_index.
        slices: called for each pass; gives the head's rows in order, [v, H] each, good until the next.
        count, counted_rows: as in `linear_cross_entropy`.
    Returns:
        fp32 scalar (fp64 for fp64 input).
    """
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"sliced_cross_entropy got labels {tuple(labels.shape)} in {labels.dtype}, expected "
                         f"[{hidden.shape[0]}] in torch.int64")  # fmt: skip
    total = _SlicedCrossEntropy.apply(hidden, slices, labels, ignore_index, counted_rows)
    return total / (_count(labels, ignore_index, counted_rows) if count is None else count)


class _SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, slices, labels, ignore_index, counted_rows):  # type: ignore[no-untyped-def]
        rows = counted(labels, ignore_index, counted_rows)
        count = len(rows)
        h = extended(hidden[rows], product_rows(count, 1 << 62, hidden))
        y = torch.cat([labels[rows], labels.new_full((len(h) - count,), -1)])  # in no slice
        log_sum, own = _log_sums(h, slices, y)
        if ctx.needs_input_grad[0]:
            ctx.rows, ctx.shape = rows, hidden.shape
            ctx.save_for_backward(_sliced_gradient(h, slices, y, log_sum)[:count])
        return (log_sum - own)[:count].sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtotal):  # type: ignore[no-untyped-def]
        (dh,) = ctx.saved_tensors
        dhidden = dh.new_zeros(ctx.shape)
        dhidden[ctx.rows] = torch.mul(dh, dtotal.view(1, 1), out=torch.empty_like(dh))
        return dhidden, None, None, None, None


def _log_sums(h: Tensor, slices: Slices, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row its logits' log-sum-exp and its own label's logit, fp32 [M]."""
    wide = torch.promote_types(h.dtype, torch.float32)
    log_sum = h.new_full(labels.shape, -math.inf, dtype=wide)
    own = torch.zeros_like(log_sum)
    start = 0
    for weight in slices():
        for first in range(0, len(h), step := chunk_rows(len(weight))):
            part = slice(first, first + step)
            logits = (h[part] @ weight.t()).to(wide)
            log_sum[part] = torch.logaddexp(log_sum[part], logits.logsumexp(1))
            place = labels[part] - start
            here = (place >= 0) & (place < len(weight))
            found = logits.gather(1, place.clamp(0, len(weight) - 1)[:, None])[:, 0]
            own[part] = torch.where(here, found, own[part])
            del logits
        start += len(weight)
    return log_sum, own


def _sliced_gradient(h: Tensor, slices: Slices, labels: Tensor, log_sum: Tensor) -> Tensor:
    """dH of the summed loss, [M, H] in h's dtype; summed over the slices in fp32."""
    dh, start = torch.zeros_like(h, dtype=log_sum.dtype), 0
    for weight in slices():
        for first in range(0, len(h), step := chunk_rows(len(weight))):
            part = slice(first, first + step)
            p = (h[part] @ weight.t()).to(log_sum.dtype).sub_(log_sum[part, None]).exp_()
            place = labels[part] - start
            here = (place >= 0) & (place < len(weight))
            p.scatter_add_(1, place.clamp(0, len(weight) - 1)[:, None], -here.to(p.dtype)[:, None])
            dh[part] += p.to(h.dtype) @ weight
            del p
        start += len(weight)
    return dh.to(h.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """The operator where nothing records it."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, *numbers):  # type: ignore[no-untyped-def]
        run = dispatch.implementation("linear_cross_entropy", hidden)
        total, dhidden, dweight = run(hidden, weight, labels, *numbers)
        ctx.save_for_backward(dhidden, dweight)
        ctx.given = numbers[2:4]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dtotal):  # type: ignore[no-untyped-def]
        return _backward(ctx, dtotal, dtotal, dtotal)


@torch.library.custom_op("jindo::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_dhidden: bool,
    need_dweight: bool,
    counted_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    run = dispatch.implementation("linear_cross_entropy", hidden)
    return run(hidden, weight, labels, ignore_index, label_smoothing, need_dhidden, need_dweight, counted_rows)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_dhidden: bool,
    need_dweight: bool,
    counted_rows: Tensor | None = None,
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
    ctx.given = inputs[5:7]


def _backward(ctx, dtotal: Tensor, _dh: Tensor, _dw: Tensor):  # type: ignore[no-untyped-def]
    dhidden, dweight = ctx.saved_tensors
    gave_hidden, gave_weight = ctx.given

    def scaled(gradient: Tensor) -> Tensor:
        """The product in fp32: a dtotal rounded to 16 bits first would put its error into every element."""
        return torch.mul(gradient, dtotal.view(1, 1), out=torch.empty_like(gradient))

    return (
        scaled(dhidden) if gave_hidden else None,
        scaled(dweight) if gave_weight else None,
        None, None, None, None, None, None,
    )  # fmt: skip


_linear_cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)
