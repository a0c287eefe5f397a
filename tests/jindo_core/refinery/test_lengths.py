"""Lengths in bounded memory: as numpy counts them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jindo_core.refinery.lengths import PERCENTILES, Lengths, draw_lengths, text_histogram


def filled(values):
    lengths = Lengths()
    for value in values:
        lengths.add(value)
    return lengths


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1 << 45), min_size=1, max_size=60))
def test_percentiles_and_limits_as_numpy(values):
    lengths = filled(values)
    for percent in (0, *PERCENTILES, 100):
        expected = int(np.percentile(np.array(values), percent, method="inverted_cdf"))
        found = lengths.percentile(percent)
        assert found == expected if expected < 1 << 14 else expected * (1 - 1 / 2048) <= found <= expected
    for limit in (0, 255, 256, 4096, 16382):
        assert lengths.above(limit) == sum(value > limit for value in values)
    assert (lengths.count, lengths.total, lengths.longest) == (len(values), sum(values), max(values))
    assert lengths.mean == pytest.approx(sum(values) / len(values))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1 << 20), max_size=60), st.integers(1, 40))
def test_bins_hold_every_length_once(values, most):
    bins = filled(values).bins(most)
    assert sum(count for *_, count in bins) == len(values)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bins))
    assert len(bins) <= most + 1
    for start, end, count in bins:
        if end <= 1 << 14:
            assert count == sum(start <= value < end for value in values)


def test_memory_is_bounded():
    lengths = filled([1, 1 << 62, (1 << 63) - 1])
    assert lengths._seen.nbytes < 1_000_000


def test_the_terminal_s_histogram():
    lines = text_histogram(filled([1] * 8 + [2] * 4 + [1000]), width=8)
    assert lines[0] == "       1-1                 8 ████████"
    assert lines[1].endswith(" 4 ████")
    assert lines[-1].split()[-2:] == ["1", "█"]
    assert text_histogram(Lengths()) == []


def test_nothing_is_told_of_nothing():
    assert set(Lengths().as_json().values()) == {0}


def test_the_picture(tmp_path):
    many = filled([int(math.exp(i / 50)) for i in range(400)])
    draw_lengths([("characters", {"a": many, "b": filled([7])}), ("tokens", {"rows": many})], [256], tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 10_000
