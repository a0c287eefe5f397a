"""One optimizer step: its rows' forward and backward passes, clipping, the update; or none where it can't be made."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from jindo_core.data.examples import IGNORE, Example
from jindo_core.data.packing import collate_documents
from jindo_core.optim import learning_rate_factor
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.prepare import TrainingJob
from jindo_core.run_state import Skipped
from jindo_core.training_view import TrainingView

_IDLE = Example([0, 0], [IGNORE, IGNORE])
"""A row of which nothing is learnt."""


def take_step(
    job: TrainingJob, batches: list[list[int]], step: int, total: int, skipped: Skipped, view: TrainingView
) -> dict[str, float]:
    """One optimizer step, or none where the gradient is not finite; its row of metrics."""
    config, optimizer = job.config, job.optimizer
    warmup = config.warmup(total)
    rate = config.learning_rate * learning_rate_factor(config.lr_scheduler_type, step - 1, total, warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip() -> float:
        """The gradients' norm before."""
        return float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf))

    loss = job.relief.outlive(lambda: accumulate(job, batches), step, view.notice)
    loss = job.ranks.sum_gradients(parameters, loss)
    norm = job.relief.outlive(clip, step, view.notice, in_update=True)
    if not skipped.count(step, loss, norm, lambda: job.data.said(batches), view.notice):
        # The norm says that all are finite: the paged ones need not look again, and wait for the device.
        known = {"finite": True} if isinstance(optimizer, PagedAdamW) else {}
        job.relief.outlive(functools.partial(optimizer.step, **known), step, view.notice, in_update=True)
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "learning_rate": rate, "grad_norm": norm}


def accumulate(job: TrainingJob, batches: list[list[int]]) -> float:
    """Forward and backward of this rank's part of a step; returns its part of the loss. Every supervised token of all
    ranks weighs the same."""
    own = job.ranks.share(batches, job.relief.micro_batch, lambda i: int(job.examples.lengths[i]))
    collated = [collate_documents([job.examples[i] for i in batch] or [_IDLE], job.tokenizer.pad_id) for batch in own]
    counted = int(*job.ranks.totals(sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch, _ in collated)))
    device = job.model.device
    parts = []
    for batch, documents in collated:
        # No attention mask: padding is on the right, where no causal token sees it.
        part = job.model(
            batch["input_ids"].to(device), labels=batch["labels"].to(device), num_items_in_batch=counted,
            documents=documents,
        ).loss  # fmt: skip
        assert part is not None
        backward(part)
        parts.append(part.detach())
    # Looked at once a step: on a GPU it waits for all that was launched.
    return torch.stack(parts).sum().item() if parts else 0.0


def backward(loss: Tensor) -> None:
    """The backward pass on this thread. Handing a GPU's nodes to autograd's own costs a quarter of a short step's."""
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()
