"""AdamW on the CPU, in C (csrc/adamw.c). Contract: adamw.py."""

from __future__ import annotations

import torch
from torch import Tensor

from jindo_core.kernels import native
from jindo_core.kernels.adamw import Update, first_codes, midpoints, unsigned_map
from jindo_core.kernels.native import FLOAT, INT, LONG, POINTER, TYPES, address
from jindo_core.kernels.nf4 import dynamic_map
from jindo_core.kernels.scratch import scratch

CHUNK = 1 << 19
"""Elements worked on at once: their moments and the root, 6 MiB, stay in the cache from one pass to the next. Fewer
would wait more often: all threads meet three times a chunk, which is dear where something else has their core."""


def _moments(update: Update) -> tuple[float, int, float, float]:
    """What the C side takes for m and v: lerp's factor, whether it is counted back from g, b2 and 1 - b2."""
    weight = 1 - update.beta1
    from_end = weight >= 0.5  # torch's lerp starts from the nearer end
    return weight - 1 if from_end else weight, int(from_end), update.beta2, 1 - update.beta2


def _applied(update: Update, seed: int | None) -> tuple[float, float, float, float, int, int]:
    """What it takes for p."""
    decay = update.decay if update.weight_decay else 1.0
    return decay, update.correction, update.eps, -update.step_size, int(seed is not None), seed or 0


def step(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: Update, seed: int | None
) -> None:
    """`adamw_`."""
    moments = native.function(
        "jindo_adamw_moments", POINTER, INT, LONG, FLOAT, INT, FLOAT, FLOAT, POINTER, POINTER
    )  # fmt: skip
    apply = native.function(
        "jindo_adamw_apply", POINTER, INT, POINTER, POINTER, LONG, LONG, FLOAT, FLOAT, FLOAT, FLOAT, INT, INT
    )
    p, g, m, v = (tensor.view(-1) for tensor in (param, grad, exp_avg, exp_avg_sq))
    for first in range(0, p.numel(), CHUNK):
        part = slice(first, min(first + CHUNK, p.numel()))
        count = part.stop - first
        moments(address(g[part]), TYPES[g.dtype], count, *_moments(update), address(m[part]), address(v[part]))
        root = torch.sqrt(v[part], out=scratch((count,), torch.float32, p.device))
        apply(
            address(p[part]), TYPES[p.dtype], address(m[part]), address(root), count, first, *_applied(update, seed)
        )  # fmt: skip


def step_8bit(
    param: Tensor,
    grad: Tensor,
    codes1: Tensor,
    codes2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    update: Update,
    seed: int | None,
) -> None:
    """`adamw_8bit_`, a block at a time."""
    run = native.function(
        "jindo_adamw_8bit", POINTER, INT, POINTER, INT, LONG, *[POINTER] * 10, FLOAT, INT, *[FLOAT] * 5, INT, INT
    )
    device = param.device
    maps = dynamic_map(device), unsigned_map(device)
    tables = [table(signed, device) for signed in (True, False) for table in (midpoints, first_codes)]
    step_size, eps = update.corrected
    run(
        address(param), TYPES[param.dtype], address(grad), TYPES[grad.dtype], param.numel(),
        *(address(t) for t in (codes1, codes2, absmax1, absmax2, *maps, *tables)),
        *_moments(update), update.decay, eps, -step_size, int(seed is not None), seed or 0,
    )  # fmt: skip
