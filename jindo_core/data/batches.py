"""The order in which a run sees its examples: from the seed alone, epoch by epoch, and where it has got to.

What is ordered are numbers of examples, whether an example is a row or a pack of rows. The generators are numpy's
RandomState, whose streams are frozen: an order outlives a new version, and a run that resumes goes on as it would have.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jindo_core.data.lazy import LazySequence
from jindo_core.errors import InputError


class Batches(LazySequence[list[int]]):
    """Batches of one epoch, made as they are asked for. All hold `size` numbers but one that may hold fewer.

    Args:
        order: the epoch's numbers. sequence: which batch of `order` comes when.
    """

    def __init__(self, order: NDArray[np.int64], size: int, sequence: NDArray[np.int64]) -> None:
        self._order, self._size, self._sequence = order, size, sequence

    def __len__(self) -> int:
        return len(self._sequence)

    def _at(self, place: int) -> list[int]:
        start = int(self._sequence[place]) * self._size
        found: list[int] = self._order[start : start + self._size].tolist()
        return found


def epoch_batches(
    lengths: ArrayLike,
    batch_size: int,
    *,
    group_by_length: bool,
    seed: int,
    epoch: int,
    drawn: NDArray[np.int64] | None = None,
) -> Batches:
    """The batches of an epoch: every index of `lengths` once, shuffled by `seed` and `epoch` alone.

    The batch that takes the most memory comes first, so that running out of it shows at once.

    Args:
        lengths: tokens of each example.
        group_by_length: fill batches with examples of like length. As transformers does, groups of up to 50
            batches are sorted; unlike there, the batches are then shuffled, or else the loss would follow the
            falling lengths of each group.
        drawn: the epoch's indices instead, some of them several times perhaps.
    """
    tokens = np.asarray(lengths)
    chance = np.random.RandomState([seed, epoch])
    order = chance.permutation(np.arange(len(tokens), dtype=np.int64) if drawn is None else drawn)
    count = -(-len(order) // batch_size)
    if group_by_length:
        # At least four groups where there are rows enough: one sorted group would be the same every epoch.
        group = batch_size * max(min(len(order) // (batch_size * 4), 50), 1)
        for start in range(0, len(order), group):
            here = order[start : start + group]
            order[start : start + group] = here[np.argsort(-tokens[here], kind="stable")]
    sequence = chance.permutation(count) if group_by_length else np.arange(count)
    if count:
        starts = np.arange(count) * batch_size
        widest = np.maximum.reduceat(tokens[order], starts)
        costs = (widest.astype(np.int64) * np.minimum(batch_size, len(order) - starts))[sequence]
        first = int(np.argmax(costs))
        sequence = np.concatenate([sequence[first : first + 1], np.delete(sequence, first)])
    return Batches(order, batch_size, sequence)


@dataclass(frozen=True, slots=True)
class Portion:
    """Examples of one file. weight: how often an epoch sees each; of a fraction a part, drawn anew in each epoch."""

    start: int
    end: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (self.weight > 0 and 0 <= self.start < self.end):
            raise ValueError(f"got {self}, expected examples, and a weight above 0")

    @property
    def drawn(self) -> int:
        """Examples an epoch sees, counted as often as it sees them; at least one."""
        return max(round(self.weight * (self.end - self.start)), 1)

    def draw(self, chance: np.random.RandomState) -> NDArray[np.int64]:
        """Their numbers."""
        here = np.arange(self.start, self.end, dtype=np.int64)
        times, rest = divmod(self.drawn, len(here))
        part = chance.permutation(here)[:rest] if rest else here[:0]
        return np.concatenate([np.tile(here, times), part])


class BatchCursor(Iterator[list[list[int]]]):
    """A run's steps, epoch after epoch, without end: the micro-batches of each, as numbers of examples.

    Args:
        lengths: tokens of each example.
        batch_size: examples of a micro-batch. accumulation: micro-batches of a step; the last of an epoch has what is
            left.
        portions: the files, side by side and all examples in them; left out: one, each of whose examples an epoch sees
            once.
    """

    def __init__(
        self, lengths: ArrayLike, *, batch_size: int, accumulation: int, group_by_length: bool, seed: int,
        portions: Sequence[Portion] = (),
    ) -> None:  # fmt: skip
        self._lengths = np.asarray(lengths)
        if not len(self._lengths):
            raise ValueError("BatchCursor got no examples, expected at least one")
        self._portions = tuple(portions) or (Portion(0, len(self._lengths)),)
        self._size, self._accumulation = batch_size, accumulation
        self._group, self._seed = group_by_length, seed
        self._epoch = self._step = 0
        self._batches: Batches | None = None  # of the epoch; made when its first step is asked for

    @property
    def steps_per_epoch(self) -> int:
        """The same in every epoch."""
        return steps_of(sum(part.drawn for part in self._portions), self._size, self._accumulation)

    def __next__(self) -> list[list[int]]:
        self.advance()
        if self._batches is None:
            self._batches = self._of(self._epoch)
        end = self._step * self._accumulation
        return self._batches[end - self._accumulation : end]

    def advance(self) -> None:
        """Go on by a step, as `next` does, whose micro-batches are somebody else's to make."""
        if self._step == self.steps_per_epoch:
            self._epoch, self._step, self._batches = self._epoch + 1, 0, None
        self._step += 1

    def fork(self) -> BatchCursor:
        """Another one at the same place, which goes on by itself."""
        return copy.copy(self)

    def state(self) -> dict[str, Any]:
        """Where the run has got to, as JSON takes it: whole steps that were given out."""
        return {"epoch": self._epoch, "step": self._step, "order": self._fingerprint()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on behind the last step before `state()` was asked for.

        Raises:
            InputError: it is another order's: other examples, or settings that order depends on.
        """
        place = [state.get("epoch"), state.get("step")]
        if not all(isinstance(n, int) and n >= 0 for n in place) or state["step"] > self.steps_per_epoch:
            raise InputError(
                f"got epoch {place[0]!r} and step {place[1]!r}, expected a place in epochs of "
                f"{self.steps_per_epoch} steps: the checkpoint is damaged"
            )
        if state.get("order") != self._fingerprint():
            raise InputError(
                "this run's examples come in another order than the one it resumes: expected the same data, batch "
                "sizes, packing, group_by_length, data_weights and seed"
            )
        self._epoch, self._step, self._batches = state["epoch"], state["step"], None

    def _of(self, epoch: int) -> Batches:
        drawn = [
            part.draw(np.random.RandomState([self._seed, epoch, number]))
            for number, part in enumerate(self._portions)
        ]
        return epoch_batches(
            self._lengths, self._size, group_by_length=self._group, seed=self._seed, epoch=epoch,
            drawn=np.concatenate(drawn),
        )  # fmt: skip

    def _fingerprint(self) -> str:
        parts = [(part.start, part.end, part.weight) for part in self._portions]
        said = repr((self._size, self._accumulation, self._group, self._seed, parts)).encode()
        return hashlib.sha256(said + self._lengths.astype("<i8").tobytes()).hexdigest()


def steps_of(examples: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps that so many examples make."""
    batches = -(-examples // batch_size)
    return -(-batches // accumulation)
