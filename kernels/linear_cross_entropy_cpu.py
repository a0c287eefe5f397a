"""Linear layer and cross entropy on the CPU. Contract: linear_cross_entropy.py.

A chunk's logits stay in the activations' dtype, in a reused buffer, where one pass in C (csrc/elementwise.c)
turns them into their gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jindo_core.kernels import linear_cross_entropy as contract
from jindo_core.kernels import native
from jindo_core.kernels.native import FLOAT, INT, LONG, POINTER, TYPES, address
from jindo_core.kernels.scratch import scratch


def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_dhidden: bool,
    need_dweight: bool,
    counted_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_cross_entropy`: the summed loss, dH and dW of that sum, empty where not asked for."""
    if hidden.dtype not in TYPES:
        return contract.forward_reference(
            hidden, weight, labels, ignore_index, label_smoothing, need_dhidden, need_dweight, counted_rows
        )  # fmt: skip
    total = 0.0
    dhidden = torch.zeros_like(hidden) if need_dhidden else hidden.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=torch.float32) if need_dweight else weight.new_empty(0)
    run = native.function("jindo_softmax_cross_entropy", POINTER, LONG, LONG, POINTER, FLOAT, INT, INT, POINTER)
    classes = weight.shape[0]
    most = contract.chunk_rows(classes)
    for rows in contract.counted(labels, ignore_index, counted_rows).split(most):
        count = rows.numel()
        if not count:
            continue
        h, y = contract.gathered(hidden, rows, most), labels[rows].contiguous()
        if int(y.min()) < 0 or int(y.max()) >= classes:
            raise IndexError(f"labels reach from {int(y.min())} to {int(y.max())}, expected 0 to {classes - 1}")
        logits = torch.mm(h, weight.t(), out=scratch((len(h), classes), hidden.dtype, hidden.device))
        logits[count:].zero_()  # the gradient's, too
        loss = torch.empty(count, dtype=torch.float64)
        run(
            address(logits), count, classes, address(y), label_smoothing, TYPES[hidden.dtype],
            need_dhidden or need_dweight, address(loss),
        )  # fmt: skip
        total += loss.sum().item()
        if need_dhidden:
            dhidden[rows] = (logits @ weight)[:count]
        if need_dweight:
            dweight += logits.t() @ h
    return torch.tensor(total, dtype=torch.float32), dhidden, dweight.to(weight.dtype)
