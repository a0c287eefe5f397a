"""AdamW's kernels in Triton's interpreter, against the reference and bitsandbytes' own Triton kernel.

bf16 only where it is rounded stochastically, in integers: the interpreter truncates where a GPU rounds to nearest.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jindo_core.kernels import adamw_triton, dispatch
from jindo_core.kernels.adamw import BLOCK, Update, adamw_, adamw_8bit_, unsigned_map
from jindo_core.kernels.nf4 import dynamic_map

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory(nan_in_fresh_memory):
    """Nothing may be left unwritten."""


def both_ways(run, param, states):
    """(param, *states) after `run` with the kernel and with the reference."""
    results = []
    for name in ("triton", "reference"):
        copies = [t.clone() for t in (param, *states)]
        with dispatch.override(name):
            run(*copies)
        results.append(copies)
    return zip(*results, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1, 33, adamw_triton.ELEMENTS + 5])
@pytest.mark.parametrize(("beta1", "weight_decay"), [(0.9, 0.0), (0.9, 0.1), (0.3, 0.1)])
def test_fp32_moments(dtype, size, beta1, weight_decay):
    generator = torch.Generator().manual_seed(size)
    param, grad = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    states = torch.randn(size, generator=generator), torch.rand(size, generator=generator)
    update = Update(1e-2, beta1, 0.99, 1e-8, weight_decay, 3)
    pairs = both_ways(lambda p, m, v: adamw_(p, grad, m, v, update), param, states)
    for ours, wanted in pairs:
        # The interpreter's fma rounds twice, and numpy's root is not torch's: an ulp or two.
        torch.testing.assert_close(ours, wanted, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-7)


@pytest.mark.parametrize("size", [1, BLOCK, adamw_triton.BLOCKS * BLOCK + 300])
def test_8bit_moments(size):
    generator = torch.Generator().manual_seed(size)
    param, grad = (torch.randn(size, generator=generator) for _ in range(2))
    blocks = -(-size // BLOCK)
    codes = [torch.randint(0, 256, (size,), generator=generator).to(torch.uint8) for _ in range(2)]
    absmax = [torch.rand(blocks, generator=generator) for _ in range(2)]
    update = Update(1e-2, 0.9, 0.99, 1e-8, 0.1, 3)
    (p, codes1, codes2, absmax1, absmax2) = both_ways(
        lambda p, *states: adamw_8bit_(p, grad, *states, update), param, (*codes, *absmax)
    )
    for ours, wanted in (p, absmax1, absmax2):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    for ours, wanted in (codes1, codes2):
        assert (ours.int() - wanted.int()).abs().max() <= 1
        assert (ours != wanted).float().mean() <= 0.01


def test_a_block_of_zeros_stays_zero():
    param = torch.ones(BLOCK)
    states = (*(torch.full((BLOCK,), 9, dtype=torch.uint8) for _ in range(2)), torch.zeros(1), torch.zeros(1))
    update = Update(1e-2, 0.9, 0.99, 1e-8, 0.0, 1)
    for ours, wanted in both_ways(lambda p, *s: adamw_8bit_(p, torch.zeros(BLOCK), *s, update), param, states):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_8bit_equals_bitsandbytes(weight_decay):
    """Its kernel decays first, and divides where ours multiplies with a reciprocal: an ulp or two a step."""
    theirs = pytest.importorskip("bitsandbytes.backends.triton.kernels_optim")
    generator = torch.Generator().manual_seed(0)
    size, cpu = 5 * BLOCK, torch.device("cpu")
    ours = torch.randn(size, generator=generator)
    wanted = ours.clone()
    states, other = (
        [*(torch.zeros(size, dtype=torch.uint8) for _ in range(2)), *(torch.zeros(5) for _ in range(2))]
        for _ in range(2)
    )
    for step in range(1, 11):
        grad = torch.randn(size, generator=generator)
        with dispatch.override("triton"):
            adamw_8bit_(ours, grad, *states, Update(1e-3, 0.9, 0.999, 1e-8, weight_decay, step))
        theirs.optimizer_update_8bit_blockwise_impl(
            "adam", grad, wanted, *other[:2], 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-3, dynamic_map(cpu),
            unsigned_map(cpu), *other[2:], weight_decay,
        )  # fmt: skip
        for codes, expected in zip(states[:2], other[:2], strict=True):
            assert (codes.int() - expected.int()).abs().max() <= 1
            assert (codes != expected).float().mean() <= 2e-3
        for peaks, expected in zip(states[2:], other[2:], strict=True):
            torch.testing.assert_close(peaks, expected, rtol=1e-5, atol=0)
        assert (ours - wanted).abs().max() <= 1e-5
        assert (ours - wanted).abs().mean() <= 5e-7


@pytest.mark.parametrize("seed", [1, 16, -5])
@pytest.mark.parametrize("eight", [False, True])
def test_stochastic_rounding_is_the_references(seed, eight):
    """Bit for bit, but where the fp32 results lie an ulp apart and the random bits fall between them: one in 65536."""
    generator = torch.Generator().manual_seed(1)
    size = 3000
    param = torch.randn(size, generator=generator).bfloat16()
    param[7] = float("nan")
    grad = torch.randn(size, generator=generator)
    if eight:
        states = [*(torch.zeros(size, dtype=torch.uint8) for _ in range(2)), *(torch.zeros(12) for _ in range(2))]
    else:
        states = [torch.zeros(size), torch.zeros(size)]
    run, update = adamw_8bit_ if eight else adamw_, Update(1e-2, 0.9, 0.99, 1e-8, 0.1, 1)
    (ours, wanted), *_ = both_ways(lambda p, *s: run(p, grad, *s, update, seed=seed), param, states)
    assert (ours.view(torch.int16) != wanted.view(torch.int16)).sum() <= 1
    assert ours.isnan().nonzero().tolist() == [[7]]


def test_bad_gradients():
    """They spread as torch's do with fp32 moments; with 8-bit ones they are passed over."""
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(2 * BLOCK, generator=generator) for _ in range(2))
    grad[5], grad[300] = float("nan"), float("inf")
    update = Update(1e-2, 0.9, 0.99, 1e-8, 0.1, 1)
    zeros = torch.zeros(2 * BLOCK), torch.zeros(2 * BLOCK)
    with np.errstate(invalid="ignore"):
        spread = both_ways(lambda p, *s: adamw_(p, grad, *s, update), param, zeros)
    for ours, wanted in spread:
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-7, equal_nan=True)
    states = (*(torch.zeros(2 * BLOCK, dtype=torch.uint8) for _ in range(2)), torch.zeros(2), torch.zeros(2))
    with np.errstate(invalid="ignore"):  # of the interpreter: inf / inf, which is not used
        p, codes1, codes2, *peaks = both_ways(lambda p, *s: adamw_8bit_(p, grad, *s, update), param, states)
    for ours, wanted in (p, *peaks):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    for bad in (5, 300):
        assert p[0][bad] == param[bad]
        assert (codes1[0][bad], codes2[0][bad]) == (codes1[1][bad], codes2[1][bad])


def test_nothing_beyond_the_operands_is_used(walled):
    generator = torch.Generator().manual_seed(0)
    size = BLOCK + 33
    param, grad, m, v = (torch.rand(size, generator=generator) for _ in range(4))
    update = Update(1e-2, 0.9, 0.99, 1e-8, 0.1, 2)
    codes = [torch.randint(0, 256, (size,), generator=generator).to(torch.uint8) for _ in range(2)]
    peaks = [torch.rand(2, generator=generator) for _ in range(2)]
    for run, states in ((adamw_, (m, v)), (adamw_8bit_, (*codes, *peaks))):
        plain = [t.clone() for t in (param, *states)]
        inside = [walled(t) for t in (param, *states)]
        with dispatch.override("triton"):
            run(plain[0], grad, *plain[1:], update)
            run(inside[0], walled(grad), *inside[1:], update)
        for ours, wanted in zip(inside, plain, strict=True):
            assert torch.equal(ours, wanted)
            beyond = torch.as_strided(ours, (1024,), (1,), ours.storage_offset() + ours.numel())
            assert (beyond.isnan() if ours.is_floating_point() else beyond == 255).all()
