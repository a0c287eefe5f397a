"""A benchmark of an operator runs only after the operator gave the right answer in the same process."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def median(benchmark):
    """Time `call` and note its rate: median(call, work, unit) puts work / median into the row."""

    def run(call, work, unit):
        benchmark.pedantic(call, warmup_rounds=2, rounds=9)
        benchmark.extra_info[unit] = round(work / benchmark.stats.stats.median, 3)

    return run
