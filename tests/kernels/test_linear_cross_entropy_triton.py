"""The loss kernel in Triton's interpreter: torch's cross_entropy in fp64 is the oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jindo_core.kernels import dispatch
from jindo_core.kernels import linear_cross_entropy as contract
from jindo_core.kernels import linear_cross_entropy_triton as module

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory(nan_in_fresh_memory):
    """Nothing may be left unwritten; what pads a row is never used."""


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """64 lanes, so that a few hundred logits take several steps; chunks of 4 rows at a vocabulary of 50."""
    monkeypatch.setattr(module, "LANES", 64)
    monkeypatch.setattr(contract, "_CHUNK_LOGITS", 100)


def make_case(m, h, v, dtype, ignored=3):
    generator = torch.Generator().manual_seed(m + v)
    hidden = torch.randn(m, h, generator=generator).to(dtype)
    weight = (torch.randn(v, h, generator=generator) / h**0.5 * 2).to(dtype)
    labels = torch.randint(0, v, (m,), generator=generator)
    labels[0], labels[1] = 0, v - 1
    labels[2 : 2 + ignored] = -100
    return hidden, weight, labels


def oracle(hidden, weight, labels, smoothing):
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    loss = F.cross_entropy(leaves[0] @ leaves[1].T, labels, reduction="sum", label_smoothing=smoothing)
    return (loss, *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(9, 24, 50), (7, 16, 256), (5, 8, 1000), (6, 5, 3), (5, 8, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_and_gradients(shape, smoothing, dtype, close, walled):
    hidden, weight, labels = make_case(*shape, dtype)
    expected = oracle(hidden, weight, labels, smoothing)
    args = (walled(hidden), walled(weight), walled(labels), -100, smoothing)
    ours = module.forward(*args, True, True)
    assert [t.dtype for t in ours] == [torch.float32, dtype, dtype]
    for value, wanted in zip(ours, expected, strict=True):
        close("linear_cross_entropy", value, wanted, dtype)
    assert torch.all(ours[1][labels == -100] == 0)
    # What is not asked for is empty, and the rest is the same.
    for needs in ((True, False), (False, True), (False, False)):
        values = module.forward(*args, *needs)
        assert torch.equal(values[0], ours[0])
        for need, value, full in zip(needs, values[1:], ours[1:], strict=True):
            assert torch.equal(value, full) if need else value.numel() == 0


def test_large_logits_stay_finite(close):
    hidden, weight = torch.full((2, 4), 300.0), torch.tensor([[1.0] * 4, [-1.0] * 4, [0.5] * 4])
    labels = torch.tensor([0, 1])
    ours = module.forward(hidden, weight, labels, -100, 0.0, True, True)
    for value, wanted in zip(ours, oracle(hidden, weight, labels, 0.0), strict=True):
        close("linear_cross_entropy", value, wanted)


def test_a_label_outside_the_vocabulary_is_nan():
    hidden, weight, labels = make_case(4, 8, 10, torch.float32, ignored=0)
    for label in (10, -1, 1 << 40):
        labels[1] = label
        assert torch.isnan(module.forward(hidden, weight, labels, -100, 0.0, False, False)[0])


def test_no_label_that_counts():
    hidden, weight, labels = make_case(4, 8, 10, torch.float32)
    labels[:] = -100
    loss, dhidden, dweight = module.forward(hidden, weight, labels, -100, 0.1, True, True)
    assert loss == 0
    assert torch.all(dhidden == 0)
    assert torch.all(dweight == 0)


def test_the_operator_runs_it(close):
    hidden, weight, labels = make_case(9, 16, 40, torch.float16)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with dispatch.override("triton"):
        loss = contract.linear_cross_entropy(*leaves, labels, label_smoothing=0.1, count=1)
        ours = (loss, *torch.autograd.grad(loss, leaves))
    for value, wanted in zip(ours, oracle(hidden, weight, labels, 0.1), strict=True):
        close("linear_cross_entropy", value, wanted, torch.float16)


def test_fp64_is_left_to_the_reference():
    args = (*make_case(5, 8, 10, torch.float64), -100, 0.1, True, True)
    for ours, wanted in zip(module.forward(*args), contract.forward_reference(*args), strict=True):
        assert torch.equal(ours, wanted)
