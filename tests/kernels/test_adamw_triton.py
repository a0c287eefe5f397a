"""AdamW's kernels in Triton's interpreter, against the reference. bf16 is seen on a GPU only (bench/correctness.py)."""

from __future__ import annotations

import pytest
import torch

from jindo_core.kernels import adamw_triton, dispatch
from jindo_core.kernels.adamw import BLOCK, Update, adamw_, adamw_8bit_

pytestmark = pytest.mark.interpreter


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
