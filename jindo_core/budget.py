"""What to change in a training step until its plan keeps within a budget of memory: the cheapest changes first.

Arithmetic alone, as `plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from jindo_core.plan import PAGE, Job, optimizer_states, plan


class Change(NamedTuple):
    """One way to save memory: what to set, and what it costs."""

    text: str
    cost: str


def fit(job: Job, budget: int, *, exact: bool = False) -> tuple[Job, list[Change], bool]:
    """The cheapest changes, in the order of what they cost in time, that bring the peak within `budget` bytes.

    Args:
        exact: only those that change no bit of what is computed.
    Returns:
        The changed job, what was changed, and whether it fits (if not, the job with everything changed). Layers in
        shards are not streamed besides.
    """
    found = job
    for make in _LADDER:
        if exact and make in _ROUNDED:
            continue
        if plan(found).peak_bytes <= budget:
            break
        for tried in make(found):  # from little to all of it
            found = tried
            if plan(found).peak_bytes <= budget:
                break
    fits = plan(found).peak_bytes <= budget
    if fits:
        found = _undone(job, found, budget)
    return found, list(_told(job, found)), fits


def _paged(job: Job) -> Iterator[Job]:
    if not job.paged:
        return
    states, _ = optimizer_states(job)
    now = states if job.resident_states is None else job.resident_states
    for eighths in range(7, -1, -1):
        if (resident := states * eighths // 8 // PAGE * PAGE) < now:
            yield replace(job, resident_states=resident)


def _embedding(job: Job) -> Iterator[Job]:
    if not job.sizes.tied:
        yield replace(job, offload_embedding=True)


def _checkpointed(job: Job) -> Iterator[Job]:
    for layers in range(job.checkpointed_layers + 1, job.sizes.layers + 1):
        yield replace(job, checkpointed_layers=layers)


def _away(job: Job) -> Iterator[Job]:
    yield replace(job, offload_checkpoints=True)


def _smaller(job: Job) -> Iterator[Job]:
    for rows in range(job.micro_batch - 1, 0, -1):
        if job.micro_batch % rows == 0:  # as many rows in a step as before
            yield replace(job, micro_batch=rows, accumulation=job.accumulation * (job.micro_batch // rows))


def _head(job: Job) -> Iterator[Job]:
    yield replace(job, offload_head=True)


def _streamed(job: Job) -> Iterator[Job]:
    if job.quantized and not job.sharded:
        for layers in range(job.offload_layers + 1, job.sizes.layers + 1):
            yield replace(job, offload_layers=layers)


_LADDER: tuple[Callable[[Job], Iterator[Job]], ...] = (
    _paged, _embedding, _checkpointed, _away, _smaller, _head, _streamed,
)  # fmt: skip
_ROUNDED = (_smaller, _head)
"""Steps of the ladder after which sums are rounded otherwise."""

_FIELDS = (
    "resident_states", "offload_embedding", "checkpointed_layers", "offload_checkpoints", "micro_batch",
    "offload_head",
)  # fmt: skip


def _undone(before: Job, after: Job, budget: int) -> Job:
    """Without the changes that later, larger ones made needless."""
    for field in _FIELDS:
        names = (field, "accumulation") if field == "micro_batch" else (field,)
        tried = replace(after, **{name: getattr(before, name) for name in names})
        if plan(tried).peak_bytes <= budget:
            after = tried
    if after.resident_states == before.resident_states:
        return after
    more = _paged(replace(after, resident_states=before.resident_states))  # as many moments as there is room for
    return next((tried for tried in more if plan(tried).peak_bytes <= budget), after)


def _told(before: Job, after: Job) -> Iterator[Change]:
    if before.resident_states != after.resident_states and after.resident_states is not None:
        stays = f"{after.resident_states / 1e6:.0f} MB of AdamW's moments stay on the device"
        said = f"{stays}, the rest is paged (--resident_optimizer_MB)"
        yield Change(said, "a copy of the rest each way every step")
    if after.offload_embedding > before.offload_embedding:
        yield Change("the embedding stays on the host (--offload_embedding)", "a lookup there every micro-batch")
    if after.checkpointed_layers > before.checkpointed_layers:
        layers = after.sizes.layers
        share = after.checkpointed_layers / layers / 3
        yield Change(
            f"{after.checkpointed_layers} of {layers} layers run again in the backward pass (--checkpointed_layers)",
            f"about {share:.0%} more time",
        )
    if after.offload_checkpoints > before.offload_checkpoints:
        yield Change("checkpoints lie on the host (--offload_checkpoints)", "copies beside the computation")
    if after.micro_batch < before.micro_batch:
        whose = " of each process" if after.processes > 1 else ""
        said = f"micro-batches of {after.micro_batch} (--micro_batch_size), {after.accumulation} of them to a step"
        yield Change(said + whose, "smaller matrix products; the same loss, up to rounding and the dropout's draws")
    if after.offload_head > before.offload_head:
        yield Change("the head is streamed from the host (--offload_head)", "it crosses the bus twice a micro-batch")
    if after.offload_layers > before.offload_layers:
        said = f"{after.offload_layers} of {after.sizes.layers} layers are streamed from the host (--offload_layers)"
        yield Change(said, "their weights cross the bus twice a micro-batch")
