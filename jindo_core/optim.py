"""Optimizers by name, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from jindo_core.adamw_pages import bits_of
from jindo_core.adamw_state import Moments, empty
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


def updates(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, int]:
    """How often each parameter was updated, in the order in which `stream_moments` has them."""
    if isinstance(optimizer, PagedAdamW):
        return optimizer.updates
    return {param: int(optimizer.state[param]["step"]) for param in _updated(optimizer)}


def _updated(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"] if param in optimizer.state]


def moment_bytes(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, int]]:
    """The size of every moment, in the order in which `stream_moments` has them."""
    bits = optimizer.bits if isinstance(optimizer, PagedAdamW) else 32
    with torch.device("meta"):
        held = {param: empty(param, bits_of(param, bits)) for param in updates(optimizer)}
    return {param: {name: value.nbytes for name, value in found.items()} for param, found in held.items()}


def stream_moments(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, Moments]]:
    """Copies of the moments of each parameter that was updated: flat, on the CPU, one after another."""
    if isinstance(optimizer, PagedAdamW):
        yield from optimizer.stream_moments()
        return
    for param in _updated(optimizer):
        state = optimizer.state[param]
        yield param, {name: state[name].detach().to("cpu", copy=True).view(-1) for name in ("exp_avg", "exp_avg_sq")}


def load_moments(
    optimizer: torch.optim.Optimizer, steps: Mapping[nn.Parameter, int], moments: Mapping[nn.Parameter, Moments]
) -> None:
    """Give an optimizer that `build_optimizer` has just made the state of another of its kind.

    Raises:
        ValueError: moments of another kind or size.
    """
    if isinstance(optimizer, PagedAdamW):
        optimizer.load_moments(steps, moments)
        return
    for param, step in steps.items():
        found = moments[param]
        sizes = {name: value.numel() for name, value in found.items()}
        if sizes != dict.fromkeys(("exp_avg", "exp_avg_sq"), param.numel()):
            raise ValueError(f"moments of a parameter of {tuple(param.shape)} have {sizes} elements")
        flat = {name: value.to(param.device).view(param.shape) for name, value in found.items()}
        optimizer.state[param] = {"step": torch.tensor(float(step)), **flat}


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
