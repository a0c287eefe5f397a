"""Packs: every row once, few sequences, and what the model is given of them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from jindo_core.data.examples import Example
from jindo_core.data.packing import Pack, PackedRows, collate_documents, pack

LENGTHS = random.Random(0).choices(range(3, 200), k=500)


@pytest.mark.parametrize(
    ("lengths", "capacity"),
    [(LENGTHS, 256), (LENGTHS, 199), (LENGTHS, 4096), ([7], 7), ([], 16), ([1] * 33, 8), ([5, 5, 5], 8)],
)
def test_every_row_once_and_no_pack_too_full(lengths, capacity):
    packs = pack(lengths, capacity, seed=1)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in rows) for rows in packs]
    assert all(0 < total <= capacity for total in sums)
    assert packs.sums(np.array(lengths, np.int32)).tolist() == sums
    # Best fit decreasing: 11/9 of the fewest, and 1; the fewest is at least what the sum takes, and the large rows.
    fewest = max(-(-sum(lengths) // capacity), sum(2 * n > capacity for n in lengths))
    assert fewest <= len(packs) <= 11 / 9 * fewest + 1


def test_little_is_left_empty():
    packs = pack(LENGTHS, 512, seed=0)
    assert sum(LENGTHS) / (len(packs) * 512) > 0.99


def test_the_best_fit_is_taken():
    """Longest first: 4 fills what 6 leaves, and 3 what 7 leaves; nothing is left for 5."""
    packs = [sorted(rows) for rows in pack([6, 3, 7, 4, 5], 10, seed=0)]
    assert sorted(packs) == [[0, 3], [1, 2], [4]]


def test_seeds_differ_among_rows_of_one_length():
    lengths = [5] * 40
    orders = [list(pack(lengths, 10, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("lengths", [[3, 0], [3, 9], [-1]])
def test_rows_that_no_pack_holds(lengths):
    with pytest.raises(ValueError, match=r"pack got rows of .* expected 1 to 8"):
        pack(lengths, 8, 0)


def test_packs_are_a_sequence():
    packs = pack(LENGTHS, 256, 0)
    assert packs[-1] == packs[len(packs) - 1] == packs[-1:][0]
    with pytest.raises(IndexError):
        packs[len(packs)]


def make_rows():
    rows = [Example([10 + i, 20 + i, 30 + i][: 1 + i % 3], [-100, 20 + i, 30 + i][: 1 + i % 3]) for i in range(9)]
    rows[4] = Example([1, 2, 3, 4], [1, 2, 3, 4])  # the prompt is learnt, too
    return rows


def test_a_pack_is_its_rows_side_by_side():
    rows = make_rows()
    lengths = np.array([len(row.input_ids) for row in rows])
    packed = PackedRows(rows, pack(lengths, 8, 3), lengths)
    assert packed.lengths.tolist() == [len(example.input_ids) for example in packed]
    assert packed.rows == 9
    found = []
    for example in packed:
        assert isinstance(example, Pack)
        start = 0
        for length in example.documents:
            found.append(Example(example.input_ids[start : start + length], example.labels[start : start + length]))
            start += length
        assert start == len(example.input_ids) == len(example.labels) <= 8
    expected = [Example(row.input_ids, [-100, *row.labels[1:]]) for row in rows]
    assert sorted(found, key=lambda e: e.input_ids) == sorted(expected, key=lambda e: e.input_ids)


def test_collated_documents_fill_their_sequences():
    packs = [Pack([1, 2, 3, 4, 5], [-100, 2, -100, 4, 5], (2, 3)), Pack(list(range(8)), [-100] * 8, (8,))]
    batch, documents = collate_documents(packs, 0)
    assert documents == [(2, 3, 3), (8,)]
    assert batch["input_ids"].shape == (2, 8)
    assert batch["labels"][0].tolist() == [-100, 2, -100, 4, 5, -100, -100, -100]
    rows = [Example([1, 2], [1, 2])]
    assert collate_documents(rows, 0)[1] is None
    assert collate_documents([packs[0], rows[0]], 0)[1] == [(2, 3, 3), (2, 6)]
