"""Optimizers by name, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from jindo_core.errors import InputError, nearest
from jindo_core.paged_adamw import PagedAdamW

OPTIMIZERS = ("paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch")
SCHEDULES = ("linear", "cosine", "constant")


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    resident_bytes: int | str = "auto",
    store: str = "host",
) -> torch.optim.Optimizer:
    """The optimizer called `name` (one of `OPTIMIZERS`), with betas (0.9, 0.999) and eps 1e-8.

    Args:
        resident_bytes, store: of the paged ones, as in `PagedAdamW`.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optim is {name!r}, expected one of {', '.join(OPTIMIZERS)}.{nearest(name, OPTIMIZERS)}")
    if name != "adamw_torch":
        return PagedAdamW(
            list(parameters), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay,
            state_bits=8 if name == "paged_adamw_8bit" else 32, resident_bytes=resident_bytes, store=store,
        )  # fmt: skip
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
