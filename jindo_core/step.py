"""One optimizer step: its rows' forward and backward passes, clipping, the update; or none where it can't be made."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from jindo_core.feeder import StepRows
from jindo_core.optim import learning_rate_factor
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.prepare import TrainingJob
from jindo_core.run_state import Skipped
from jindo_core.training_view import TrainingView


def take_step(
    job: TrainingJob, rows: StepRows, step: int, total: int, skipped: Skipped, view: TrainingView
) -> dict[str, float]:
    """One optimizer step, or none where the gradient is not finite; its row of metrics.

    The device is waited for once: for loss and norm, which must be known before anything is changed.
    """
    config, optimizer = job.config, job.optimizer
    warmup = config.warmup(total)
    rate = config.learning_rate * learning_rate_factor(config.lr_scheduler_type, step - 1, total, warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip() -> tuple[float, float]:
        """Loss, and the gradients' norm before."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        found: list[float] = torch.stack([summed.to(norm), norm]).tolist()
        return found[0], found[1]

    # Rows may fail on one rank alone: all know that they have theirs before any meets the others over a number.
    supervised = job.relief.outlive(rows.supervised, step, view.notice)
    rows.counted = int(*job.ranks.totals(supervised))
    own = job.relief.outlive(lambda: accumulate(job, rows), step, view.notice)
    summed = job.ranks.sum_gradients(parameters, own)
    loss, norm = job.relief.outlive(clip, step, view.notice, in_update=True)
    if not skipped.count(step, loss, norm, lambda: job.data.said(rows), view.notice):
        # The norm says that all are finite: the paged ones need not look again, and wait for the device.
        known = {"finite": True} if isinstance(optimizer, PagedAdamW) else {}
        job.relief.outlive(functools.partial(optimizer.step, **known), step, view.notice, in_update=True)
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "learning_rate": rate, "grad_norm": norm, "input_seconds": rows.waited}


def accumulate(job: TrainingJob, rows: StepRows) -> Tensor:
    """Forward and backward of this rank's part of a step, whose tokens are counted; returns its part of the loss, a
    scalar on the device that nobody has waited for. Every supervised token of all ranks weighs the same. It meets the
    others only inside sharded layers: what fails here fails on one rank."""
    own = rows.collated()
    device, embedded_on = job.model.device, job.model.stack.embedding.weight.device
    parts = []
    for batch in own:
        # No attention mask: padding is on the right, where no causal token sees it.
        part = job.model(
            batch.input_ids.to(embedded_on, non_blocking=True), labels=batch.labels.to(device, non_blocking=True),
            num_items_in_batch=rows.counted, documents=batch.documents,
            supervised=batch.supervised.to(device, non_blocking=True),
        ).loss  # fmt: skip
        assert part is not None
        backward(part)
        parts.append(part.detach())
    return torch.stack(parts).sum() if parts else torch.zeros((), device=device)


def backward(loss: Tensor) -> None:
    """The backward pass on this thread. Handing a GPU's nodes to autograd's own costs a quarter of a short step's."""
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()
