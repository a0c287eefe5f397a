"""Packing: several rows to a sequence, so that little of a batch is padding. Attention, positions and loss stop at the
rows' bounds (`documents` of the model): each row is learnt as it would be alone.

A pack is an Example like any other: it is shuffled, batched and counted as one row is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jindo_core.data.examples import IGNORE, Example, collate
from jindo_core.data.lazy import LazySequence

if TYPE_CHECKING:
    from torch import Tensor

_AT_ONCE = 1 << 16
"""Rows that are Python's own integers at a time: thirty bytes more each than in an array."""


@dataclass(frozen=True)
class Pack(Example):
    """Rows one after another. documents: their lengths. No label of a row's first token: nothing comes before it."""

    documents: tuple[int, ...]


class Packs(LazySequence[list[int]]):
    """Which rows lie in which pack.

    Attributes:
        rows: int64, pack by pack. starts: int64, one more than packs: where each begins in `rows`.
    """

    def __init__(self, rows: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        self.rows, self.starts = rows, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def _at(self, number: int) -> list[int]:
        found: list[int] = self.rows[self.starts[number] : self.starts[number + 1]].tolist()
        return found

    def sums(self, lengths: NDArray[Any]) -> NDArray[np.int64]:
        """Tokens of each pack. lengths: of each row."""
        if not len(self):
            return np.zeros(0, np.int64)
        return np.add.reduceat(lengths[self.rows], self.starts[:-1], dtype=np.int64)


def pack(lengths: ArrayLike, capacity: int, seed: int) -> Packs:
    """Fill sequences with rows, best fit decreasing: the longest first, each where it leaves least room.

    At most 11/9 of the fewest sequences there can be, and 1 more (Johnson 1973); rows of one length come in the order
    of `seed`.

    Args:
        lengths: tokens of each row, 1 to capacity. capacity: tokens of a sequence.
    Raises:
        ValueError: a row that is empty, or longer than a sequence.
    """
    tokens = np.asarray(lengths, np.int64)
    if tokens.size and not 1 <= tokens.min() <= tokens.max() <= capacity:
        raise ValueError(f"pack got rows of {tokens.min()} to {tokens.max()} tokens, expected 1 to {capacity}")
    order = np.random.RandomState(seed).permutation(len(tokens))
    order = order[np.argsort(-tokens[order], kind="stable")]
    number_of = np.empty(len(tokens), np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity)]  # [r]: packs with r tokens left
    rooms, count = 0, 0  # bit r: there is one with r left
    for start in range(0, len(order), _AT_ONCE):
        here = order[start : start + _AT_ONCE]
        numbers = []
        for length in tokens[here].tolist():
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                number = with_room[room].pop()
                if not with_room[room]:
                    rooms ^= 1 << room
            else:
                room, number, count = capacity, count, count + 1
            room -= length
            if room:
                with_room[room].append(number)
                rooms |= 1 << room
            numbers.append(number)
        number_of[here] = numbers
    by_pack = np.argsort(number_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(number_of, minlength=count))]).astype(np.int64)
    return Packs(by_pack, starts)


def pack_apart(
    lengths: ArrayLike, bounds: Sequence[tuple[int, int]], capacity: int, seed: int
) -> tuple[Packs, list[tuple[int, int]]]:
    """`pack` for each stretch of rows by itself.

    Args:
        bounds: (first row, the one after the last) of each, one after another, and all rows in them.
    Returns:
        All packs, and the bounds of each stretch's among them.
    """
    tokens, rows, starts, found = np.asarray(lengths, np.int64), [], [np.zeros(1, np.int64)], []
    count = 0
    for first, end in bounds:
        packs = pack(tokens[first:end], capacity, seed)
        rows.append(packs.rows + first)
        starts.append(packs.starts[1:] + first)
        found.append((count, count + len(packs)))
        count += len(packs)
    return Packs(np.concatenate(rows), np.concatenate(starts)), found


class PackedRows(LazySequence[Pack]):
    """Rows as packs.

    Attributes:
        lengths: int64, tokens of each pack. rows: how many there are in all.
    """

    def __init__(self, rows: Sequence[Example], packs: Packs, lengths: NDArray[Any]) -> None:
        """lengths: of each row."""
        self._rows, self._packs = rows, packs
        self.lengths, self.rows = packs.sums(lengths), len(lengths)

    def __len__(self) -> int:
        return len(self._packs)

    def members(self, number: int) -> list[int]:
        """The rows of a pack."""
        return self._packs[number]

    def _at(self, number: int) -> Pack:
        ids: list[int] = []
        labels: list[int] = []
        documents = []
        for example in (self._rows[row] for row in self._packs[number]):
            documents.append(len(example.input_ids))
            ids += example.input_ids
            labels += [IGNORE, *example.labels[1:]]
        return Pack(ids, labels, tuple(documents))


def collate_documents(
    examples: Sequence[Example], pad_id: int, *, multiple_of: int = 8
) -> tuple[dict[str, Tensor], list[tuple[int, ...]] | None]:
    """`collate`, and what the model takes as `documents`: None where no example is a pack. Padding is one, too."""
    batch = collate(examples, pad_id, multiple_of=multiple_of)
    if not any(isinstance(example, Pack) for example in examples):
        return batch, None
    width, documents = batch["input_ids"].shape[1], []
    for example in examples:
        own = example.documents if isinstance(example, Pack) else (len(example.input_ids),)
        rest = width - len(example.input_ids)
        documents.append((*own, rest) if rest else own)
    return batch, documents
