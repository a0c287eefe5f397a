"""Optimizers by name, and learning-rate schedules.

`adamw_torch` is the only optimizer yet; the paged ones take their place beside it in `build_optimizer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from jindo_core.errors import InputError, nearest

OPTIMIZERS = ("adamw_torch",)
SCHEDULES = ("linear", "cosine", "constant")


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer called `name` (one of `OPTIMIZERS`), with betas (0.9, 0.999) and eps 1e-8."""
    if name not in OPTIMIZERS:
        raise InputError(f"optim is {name!r}, expected {' or '.join(OPTIMIZERS)}.{nearest(name, OPTIMIZERS)}")
    return torch.optim.AdamW(list(parameters), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)


def learning_rate_factor(schedule: str, step: int, total: int, warmup: int) -> float:
    """What the peak learning rate is multiplied by at `step` (0-based) of `total`.

    A linear warmup from 0 over `warmup` steps; then constant, linear to 0, or half a cosine to 0, as
    transformers' schedules of these names.
    """
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(total - warmup, 1)
    if schedule == "linear":
        return max(1.0 - progress, 0.0)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    raise InputError(f"lr_scheduler_type is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
