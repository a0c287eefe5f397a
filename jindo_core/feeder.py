"""A step's rows, read and collated on a thread while the step before runs.

Only the rows are ahead of the run: the cursor that checkpoints keep moves with the steps, and a copy of it looks ahead.
The thread reads and reckons; what meets the other ranks, draws random numbers or touches the model is the main
thread's.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor
from torch.nn import functional as F

from jindo_core.causal_lm import Documents
from jindo_core.data.batches import BatchCursor
from jindo_core.data.examples import IGNORE, Example
from jindo_core.data.lazy import LazySequence
from jindo_core.data.packing import collate_documents
from jindo_core.prepare import TrainingJob

_IDLE = Example([0, 0], [IGNORE, IGNORE])
"""A row of which nothing is learnt."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one pass, on the host; for a GPU in pinned memory, from which copies don't hold the host up.

    Attributes:
        input_ids, labels: int64 [B, T]. documents: as the model takes them.
        supervised: int64 [N], places in the flattened [B * T] whose next token is learnt.
    """

    input_ids: Tensor
    labels: Tensor
    supervised: Tensor
    documents: Documents | None


class StepRows(LazySequence[list[int]]):
    """A step's micro-batches, as numbers of examples; this rank's part of them is being read.

    Args:
        batches: of all ranks. micro_batch, coming: what is read, for micro-batches of so many rows.
    Attributes:
        waited: seconds that the step has waited for its rows.
        counted: supervised tokens of all ranks, once they have agreed on it.
    """

    def __init__(
        self, job: TrainingJob, batches: Sequence[list[int]], micro_batch: int = 0,
        coming: Future[list[MicroBatch]] | None = None,
    ) -> None:  # fmt: skip
        self._job, self._batches, self._micro_batch, self._coming = job, batches, micro_batch, coming
        self._read: list[MicroBatch] | None = None
        self.waited = 0.0
        self.counted = 0

    def __len__(self) -> int:
        return len(self._batches)

    def _at(self, index: int) -> list[int]:
        return self._batches[index]

    def collated(self) -> list[MicroBatch]:
        """This rank's part, in micro-batches of what memory leaves room for now. Where that is less than it was when
        they were read, and where reading failed, they are read here."""
        began, coming = time.perf_counter(), self._coming
        self._coming = None
        micro_batch = self._job.relief.micro_batch
        try:
            if micro_batch != self._micro_batch:
                self._micro_batch, self._read, coming = micro_batch, None, None
            if self._read is None:
                self._read = collated(self._job, self._batches, micro_batch) if coming is None else coming.result()
            return self._read
        finally:
            self.waited += time.perf_counter() - began

    def supervised(self) -> int:
        """Tokens that are learnt in this rank's part."""
        return sum(len(batch.supervised) for batch in self.collated())


def collated(job: TrainingJob, batches: Sequence[list[int]], micro_batch: int) -> list[MicroBatch]:
    """This rank's part of a step's rows, read now. A micro-batch without rows has one of which nothing is learnt."""
    own = job.ranks.share(batches, micro_batch, lambda i: int(job.examples.lengths[i]))
    device = job.model.device
    # Pinning asks for the current device, which is a thread's own setting.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        pad = job.tokenizer.pad_id
        return [_collate([job.examples[i] for i in numbers] or [_IDLE], pad, device) for numbers in own]


def _collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> MicroBatch:
    batch, documents = collate_documents(examples, pad_id)
    labels = batch["labels"]
    supervised = (F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten() != IGNORE).nonzero()[:, 0]
    found = (batch["input_ids"], labels, supervised)
    input_ids, labels, supervised = (part.pin_memory() for part in found) if device.type == "cuda" else found
    return MicroBatch(input_ids, labels, supervised, documents)


class Feeder(Iterator[StepRows]):
    """A context manager that gives step after step, one of them ahead; without end, as the cursor.

    Args:
        cursor: moves with the steps that are given out, never ahead of them.
        steps: that will be asked for: nothing is read beyond them.
        ahead: whether a thread reads; else each step reads its own (to measure what that takes).

    What fails on the thread (a file cut short, no memory) is raised when its step asks for its rows.
    """

    def __init__(self, job: TrainingJob, cursor: BatchCursor, steps: int, *, ahead: bool = True) -> None:
        self._job, self._cursor, self._left, self._ahead = job, cursor, steps, ahead
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="feeder")
        self._next = cursor.fork()  # the thread's own
        self._coming: tuple[Future[list[list[int]]], int, Future[list[MicroBatch]]] | None = None

    def __enter__(self) -> Feeder:
        if self._ahead and self._left > 0:
            self._coming = self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)

    def __next__(self) -> StepRows:
        if not self._ahead:
            return StepRows(self._job, next(self._cursor))
        began = time.perf_counter()
        numbers, micro_batch, rows = self._coming or self._read()
        self._coming = None
        step = StepRows(self._job, numbers.result(), micro_batch, rows)
        self._cursor.advance()
        self._left -= 1
        if self._left > 0:
            self._coming = self._read()
        step.waited = time.perf_counter() - began
        return step

    def _read(self) -> tuple[Future[list[list[int]]], int, Future[list[MicroBatch]]]:
        """Have the thread read the next step; the numbers of its rows are there first."""
        micro_batch = self._job.relief.micro_batch
        numbers = self._reader.submit(next, self._next)
        return numbers, micro_batch, self._reader.submit(functools.partial(self._collated, numbers, micro_batch))

    def _collated(self, numbers: Future[list[list[int]]], micro_batch: int) -> list[MicroBatch]:
        return collated(self._job, numbers.result(), micro_batch)
