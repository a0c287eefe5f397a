"""One AdamW update: torch.optim.AdamW bit for bit, bitsandbytes' AdamW8bit to its tolerance."""

from __future__ import annotations

import math

import pytest
import torch

from jindo_core.kernels.adamw import BLOCK, Update, adamw_, adamw_8bit_, decode, midpoints, unsigned_map
from jindo_core.kernels.nf4 import dynamic_map

CPU = torch.device("cpu")
SIZES = [1, 15, 16, 33, 8192 + 5, (1 << 18) + 77]


def make_states(param):
    return torch.zeros(param.shape), torch.zeros(param.shape)


def make_8bit(param, value=0):
    codes = [torch.full(param.shape, value, dtype=torch.uint8) for _ in range(2)]
    return (*codes, *(torch.zeros(-(-param.numel() // BLOCK)) for _ in range(2)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("betas", "weight_decay"), [((0.9, 0.999), 0.0), ((0.9, 0.95), 0.1), ((0.45, 0.5), 0.01)])
def test_fp32_equals_torch_bit_for_bit(size, betas, weight_decay, each_cpu_implementation):
    generator = torch.Generator().manual_seed(size)
    theirs = torch.nn.Parameter(torch.randn(size, generator=generator))
    optimizer = torch.optim.AdamW([theirs], lr=1e-3, betas=betas, weight_decay=weight_decay)
    ours = theirs.detach().clone()
    m, v = make_states(ours)
    for step in range(1, 6):
        theirs.grad = torch.randn(size, generator=generator) * 10.0 ** (step - 3)
        optimizer.param_groups[0]["lr"] = lr = 1e-3 / step
        optimizer.step()
        adamw_(ours, theirs.grad, m, v, Update(lr, *betas, 1e-8, weight_decay, step))
        assert torch.equal(ours, theirs)
    assert torch.equal(m, optimizer.state[theirs]["exp_avg"])
    assert torch.equal(v, optimizer.state[theirs]["exp_avg_sq"])


def test_a_nan_in_the_gradient_stays_where_it_is(each_cpu_implementation):
    ours, grad = torch.ones(70), torch.ones(70)
    grad[33] = math.nan
    adamw_(ours, grad, *make_states(ours), Update(1e-3, 0.9, 0.999, 1e-8, 0.0, 1))
    assert ours.isnan().nonzero().tolist() == [[33]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_grad", [False, True])
def test_16_bit_parameters_are_updated_in_fp32_and_rounded_once(dtype, wide_grad, each_cpu_implementation):
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(1000, generator=generator).to(dtype)
    m, v = make_states(ours)
    wide_m, wide_v = make_states(ours)
    for step in range(1, 4):
        update = Update(1e-2, 0.9, 0.999, 1e-8, 0.1, step)
        grad = torch.randn(1000, generator=generator).to(dtype)
        grad = grad.float() if wide_grad else grad
        wide = ours.float()
        adamw_(wide, grad.float(), wide_m, wide_v, update)
        adamw_(ours, grad, m, v, update)
        assert torch.equal(ours, wide.to(dtype))


def test_stochastic_rounding_loses_no_small_step(each_cpu_implementation):
    """A step of a thousandth of an ulp: to nearest nothing moves, stochastically the mean does."""
    size, lr = 1 << 16, 2.0**-8 / 1000
    kept, moved = torch.ones(size, dtype=torch.bfloat16), torch.ones(size, dtype=torch.bfloat16)
    grad = torch.ones(size)
    states = make_states(kept), make_states(kept)
    for step in range(1, 51):
        update = Update(lr, 0.9, 0.999, 0.0, 0.0, step)
        adamw_(kept, grad, *states[0], update)
        adamw_(moved, grad, *states[1], update, seed=step)
    assert (kept == 1).all()
    assert moved.float().mean().item() == pytest.approx(1 - 50 * lr, rel=0, abs=5 * lr)
    assert len(moved.unique()) > 1


def test_every_implementation_rounds_alike(each_cpu_implementation):
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(5000, generator=generator), torch.randn(5000, generator=generator)
    wide, ours = start.bfloat16().float(), start.bfloat16()
    update = Update(1e-2, 0.9, 0.999, 1e-8, 0.0, 1)
    adamw_(wide, grad, *make_states(wide), update)
    adamw_(ours, grad, *make_states(ours), update, seed=7)
    values, results = wide.view(torch.int32).tolist(), ours.view(torch.int16).tolist()
    for index, (value, made) in enumerate(zip(values, results, strict=True)):
        h = (index * 0x9E3779B1 + 7) % (1 << 32)
        h = (h ^ h >> 16) * 0x85EBCA6B % (1 << 32)
        h = (h ^ h >> 13) * 0xC2B2AE35 % (1 << 32)
        assert made % (1 << 16) == (value % (1 << 32) + (h >> 16)) >> 16


# --- 8-bit moments --------------------------------------------------------------------------------------


def test_maps_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(unsigned_map(CPU), functional.create_dynamic_map(signed=False))
    assert torch.equal(dynamic_map(CPU), functional.create_dynamic_map(signed=True))


@pytest.mark.parametrize("size", [1, 256, 1000, 8192 + 300])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_8bit_equals_bitsandbytes(size, weight_decay, each_cpu_implementation):
    from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_pytorch

    generator = torch.Generator().manual_seed(size)
    ours = torch.randn(size, generator=generator)
    theirs = ours.clone()
    mine, other = make_8bit(ours), make_8bit(ours)
    for step in range(1, 20):
        grad = torch.randn(size, generator=generator)
        adamw_8bit_(ours, grad, *mine, Update(1e-3, 0.9, 0.999, 1e-8, weight_decay, step))
        optimizer_update_8bit_blockwise_pytorch(
            theirs, grad, other[0], other[1], 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-3, dynamic_map(CPU),
            unsigned_map(CPU), other[2], other[3], weight_decay, 1.0, False, optimizer_name="adam",
        )  # fmt: skip
        # A moment midway between two codes may go either way; its parameter differs by that then.
        for codes, wanted in zip(mine[:2], other[:2], strict=True):
            assert (codes.int() - wanted.int()).abs().max() <= 1
            assert (codes != wanted).float().mean() <= 0.01
        torch.testing.assert_close(mine[2], other[2], rtol=1e-4, atol=0)
        torch.testing.assert_close(mine[3], other[3], rtol=1e-4, atol=0)
        assert (ours - theirs).abs().max() <= 1e-4
        assert (ours - theirs).abs().mean() <= 1e-6


def test_8bit_follows_fp32(each_cpu_implementation):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4096, generator=generator)
    exact, ours = start.clone(), start.clone()
    states, small = make_states(exact), make_8bit(ours)
    for step in range(1, 101):
        grad = torch.randn(4096, generator=generator) + exact
        update = Update(1e-3, 0.9, 0.999, 1e-8, 0.0, step)
        adamw_(exact, grad, *states, update)
        adamw_8bit_(ours, grad, *small, update)
    travelled = (exact - start).abs().mean()
    assert (ours - exact).abs().mean() <= 0.05 * travelled


def test_8bit_moments_are_the_nearest_codes(each_cpu_implementation):
    generator = torch.Generator().manual_seed(0)
    param = torch.zeros(3 * BLOCK + 7, dtype=torch.bfloat16)
    grad = torch.randn(param.shape, generator=generator)
    grad[BLOCK : 2 * BLOCK] = 0
    states = make_8bit(param, value=3)
    adamw_8bit_(param, grad, *states, Update(1e-3, 0.9, 0.999, 1e-8, 0.0, 1), seed=1)
    for codes, absmax, values, wanted in (
        (states[0], states[2], dynamic_map(CPU), 0.1 * grad),
        (states[1], states[3], unsigned_map(CPU), 0.001 * grad.square()),
    ):
        peaks = absmax.repeat_interleave(BLOCK)[: len(grad)].clamp(min=1e-30)
        distance = (wanted / peaks)[:, None] - values
        best = distance.abs().min(dim=1).values
        ours = (wanted / peaks - values[codes.int()]).abs()
        assert (ours <= best + 1e-6).all()
        assert absmax[1] == 0
        assert (decode(codes, absmax, values)[BLOCK : 2 * BLOCK] == 0).all()


def test_the_middles_are_between_the_codes():
    for signed, values in ((True, dynamic_map(CPU)), (False, unsigned_map(CPU))):
        middles = midpoints(signed, CPU)
        assert (middles[:-1] > values[:-1]).all()
        assert (middles[:-1] < values[1:]).all()
        assert middles[-1] == math.inf


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"param": torch.zeros(8, dtype=torch.float64)}, "expected contiguous fp32, bf16 or fp16"),
        ({"param": torch.zeros(16)[::2]}, "not contiguous"),
        ({"grad": torch.zeros(9)}, "got a gradient torch.float32 (9,)"),
        ({"grad": torch.zeros(8, dtype=torch.bfloat16)}, "got a gradient torch.bfloat16"),
        ({"exp_avg": torch.zeros(8, dtype=torch.bfloat16)}, "got exp_avg torch.bfloat16"),
        ({"exp_avg_sq": torch.zeros(4)}, "got exp_avg_sq torch.float32 (4,), expected contiguous fp32 (8,)"),
        ({"update": Update(1e-3, 0.9, 0.999, 1e-8, 0.0, 0)}, "got step 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {name: torch.zeros(8) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    given |= {"update": Update(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)} | change
    with pytest.raises(ValueError, match="adamw") as error:
        adamw_(**given)
    assert message in str(error.value)


def test_8bit_states_that_do_not_fit_are_refused():
    param = torch.zeros(300)
    update = Update(1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    codes1, codes2, absmax1, absmax2 = make_8bit(param)
    with pytest.raises(ValueError, match="codes1"):
        adamw_8bit_(param, param, codes1.int(), codes2, absmax1, absmax2, update)
    with pytest.raises(ValueError, match="absmax2"):
        adamw_8bit_(param, param, codes1, codes2, absmax1, absmax2[:1], update)
