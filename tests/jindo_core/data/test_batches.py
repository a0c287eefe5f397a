"""Batches by their properties, and a cursor that goes on where another one was."""

from __future__ import annotations

import collections
import itertools
import json
import random

import numpy as np
import pytest
import torch

from jindo_core.data.batches import BatchCursor, Portion, epoch_batches, steps_of
from jindo_core.errors import InputError

LENGTHS = random.Random(0).choices(range(5, 200), k=403)


def padded(batches, lengths):
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize(("count", "size"), [(403, 8), (403, 1), (7, 8), (1, 4), (8, 8), (0, 3), (33, 32)])
def test_every_index_once_and_the_costliest_first(group, count, size):
    lengths = LENGTHS[:count]
    batches = epoch_batches(lengths, size, group_by_length=group, seed=42, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert len(batches) == -(-count // size)
    assert sorted(map(len, batches), reverse=True)[: count // size] == [size] * (count // size)
    if batches:
        costs = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
        assert costs[0] == max(costs)


@pytest.mark.parametrize("group", [True, False])
def test_order_depends_on_seed_and_epoch_alone(group):
    def order(seed, epoch):
        return list(epoch_batches(LENGTHS, 8, group_by_length=group, seed=seed, epoch=epoch))

    assert order(42, 0) == order(42, 0)
    distinct = [order(42, 0), order(42, 1), order(43, 0), order(43, 1)]
    assert all(a != b for n, a in enumerate(distinct) for b in distinct[:n])
    # Other batches too, not the same ones in another order.
    assert {frozenset(b) for b in distinct[0]} != {frozenset(b) for b in distinct[1]}


def test_the_order_is_frozen():
    """Literal numbers: a run that resumes under another numpy must find the order it began with."""
    batches = epoch_batches([3, 9, 4, 1, 5], 2, group_by_length=False, seed=42, epoch=1)
    assert list(batches) == [[1, 3], [0, 2], [4]]
    batches = epoch_batches([3, 9, 4, 1, 5], 2, group_by_length=True, seed=42, epoch=1)
    assert list(batches) == [[1, 3], [2, 0], [4]]


def test_grouping_saves_padding_as_transformers_does():
    from transformers.trainer_pt_utils import get_length_grouped_indices

    plain = epoch_batches(LENGTHS, 8, group_by_length=False, seed=42, epoch=0)
    grouped = epoch_batches(LENGTHS, 8, group_by_length=True, seed=42, epoch=0)
    theirs = get_length_grouped_indices(LENGTHS, 8, generator=torch.Generator().manual_seed(42))
    theirs = [theirs[start : start + 8] for start in range(0, len(theirs), 8)]
    assert padded(grouped, LENGTHS) < 0.75 * padded(plain, LENGTHS)
    assert padded(grouped, LENGTHS) == pytest.approx(padded(theirs, LENGTHS), rel=0.05)


def test_the_order_does_not_follow_the_lengths():
    grouped = epoch_batches(LENGTHS, 8, group_by_length=True, seed=42, epoch=0)
    longest = [max(LENGTHS[i] for i in batch) for batch in grouped[1:]]
    falls = sum(a > b for a, b in itertools.pairwise(longest))
    assert 0.3 < falls / (len(longest) - 1) < 0.7


# --- the cursor -----------------------------------------------------------------------------------------


def cursor(**changes):
    given = {"lengths": LENGTHS, "batch_size": 4, "accumulation": 3, "group_by_length": True, "seed": 42} | changes
    return BatchCursor(given.pop("lengths"), **given)


@pytest.mark.parametrize("examples", [1, 4, 5, 12, 13, 403])
def test_an_epoch_is_all_examples_in_its_number_of_steps(examples):
    steps = cursor(lengths=LENGTHS[:examples])
    assert steps.steps_per_epoch == steps_of(examples, 4, 3) == -(-examples // 12)
    for _ in range(2):
        epoch = [next(steps) for _ in range(steps.steps_per_epoch)]
        assert sorted(i for step in epoch for batch in step for i in batch) == list(range(examples))
        assert [len(step) for step in epoch[:-1]] == [3] * (len(epoch) - 1)


@pytest.mark.parametrize("done", [0, 1, 33, 34, 35, 68, 80])
def test_it_goes_on_where_another_one_was(done):
    """At an epoch's first step, within it, at its end, and epochs later; the place goes through JSON."""
    first = cursor()
    assert first.steps_per_epoch == 34
    for _ in range(done):
        next(first)
    state = json.loads(json.dumps(first.state()))
    second = cursor()
    second.load(state)
    assert second.state() == state
    assert [next(second) for _ in range(50)] == [next(first) for _ in range(50)]


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": LENGTHS[:-1]}, {"lengths": [*LENGTHS[:-1], 4]}, {"batch_size": 3}, {"accumulation": 2},
        {"group_by_length": False}, {"seed": 43}, {"portions": [Portion(0, 403, 1.5)]},
        {"portions": [Portion(0, 3), Portion(3, 403)]},
    ],
)  # fmt: skip
def test_another_order_is_refused(change):
    state = cursor().state()
    with pytest.raises(InputError, match=r"in another order than the one it resumes: expected the same data"):
        cursor(**change).load(state)


@pytest.mark.parametrize("place", [{"epoch": -1}, {"step": 35}, {"step": "1"}, {"epoch": None}])
def test_a_damaged_place_is_refused(place):
    steps = cursor()
    with pytest.raises(InputError, match="expected a place in epochs of 34 steps: the checkpoint is damaged"):
        steps.load(steps.state() | place)


def test_weights_say_how_often_an_epoch_sees_a_file():
    portions = [Portion(0, 100, 2.0), Portion(100, 300, 0.25), Portion(300, 403, 1.5)]
    steps = cursor(portions=portions)
    parts = []
    for _ in range(3):
        seen = collections.Counter(i for _ in range(steps.steps_per_epoch) for batch in next(steps) for i in batch)
        assert sum(seen.values()) == 200 + 50 + 154
        assert [seen[i] for i in range(100)] == [2] * 100
        assert sorted(seen[i] for i in range(100, 300)) == [0] * 150 + [1] * 50
        assert sorted(seen[i] for i in range(300, 403)) == [1] * 52 + [2] * 51
        parts.append(frozenset(i for i in seen if 100 <= i < 300))
    assert len(set(parts)) == 3, "the part is drawn anew"
    assert next(cursor(portions=portions)) == next(cursor(portions=portions))


def test_the_longest_batch_comes_first_in_every_epoch():
    steps = cursor(accumulation=1, group_by_length=False, portions=[Portion(0, 403, 0.5)])
    for _ in range(3):
        epoch = [next(steps)[0] for _ in range(steps.steps_per_epoch)]
        costs = [len(batch) * max(LENGTHS[i] for i in batch) for batch in epoch]
        assert costs[0] == max(costs)


def test_a_small_weight_draws_one_at_least():
    assert Portion(0, 5, 0.01).drawn == 1
    assert Portion(0, 5, 1.8).drawn == 9
    for wrong in ((0, 0, 1.0), (0, 5, 0.0), (5, 3, 1.0)):
        with pytest.raises(ValueError, match="expected examples, and a weight above 0"):
            Portion(*wrong)
    with pytest.raises(ValueError, match="no examples"):
        cursor(lengths=[])


def test_a_million_examples_take_a_few_arrays():
    """8 bytes a number and array, not the forty of a list of Python's integers."""
    import tracemalloc

    lengths = np.random.RandomState(0).randint(5, 200, 1_000_000).astype(np.int32)
    tracemalloc.start()
    steps = BatchCursor(lengths, batch_size=8, accumulation=1, group_by_length=True, seed=0)
    next(steps)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60 * len(lengths)
