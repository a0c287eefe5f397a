"""One AdamW update: torch.optim.AdamW bit for bit, bitsandbytes' AdamW8bit to its tolerance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from jindo_core.kernels import adamw_cpu
from jindo_core.kernels.adamw import (
    BLOCK,
    Update,
    adamw_,
    adamw_8bit_,
    decode,
    encode,
    first_codes,
    midpoints,
    unsigned_map,
)
from jindo_core.kernels.nf4 import dynamic_map

CPU = torch.device("cpu")
SIZES = [1, 15, 16, 33, 8192 + 5, adamw_cpu.CHUNK + 77]


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


def hashed_bits(count, seed):
    """The 16 random bits of each element, from Python's definition of the hash in NumPy."""
    h = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(seed % (1 << 32))
    h = (h ^ h >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    return (h ^ h >> np.uint32(13)) * np.uint32(0xC2B2AE35) >> np.uint32(16)


@pytest.mark.parametrize("seed", [1, -3, 1 << 40 | 7])
@pytest.mark.parametrize("eight", [False, True])
def test_every_implementation_rounds_alike(seed, eight, each_cpu_implementation, monkeypatch):
    """Over chunks' ends too."""
    monkeypatch.setattr(adamw_cpu, "CHUNK", 2048)
    generator = torch.Generator().manual_seed(0)
    size = 5000
    start, grad = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    wide, ours = start.bfloat16().float(), start.bfloat16()
    run, make = (adamw_8bit_, make_8bit) if eight else (adamw_, make_states)
    update = Update(1e-2, 0.9, 0.999, 1e-8, 0.1, 1)
    run(wide, grad, *make(wide), update)
    run(ours, grad, *make(ours), update, seed=seed)
    sums = wide.numpy().view(np.uint32) + hashed_bits(size, seed)
    assert (ours.view(torch.int16).numpy().view(np.uint16) == sums >> np.uint32(16)).all()


def test_stochastic_rounding_has_the_mean_of_what_it_rounds(each_cpu_implementation):
    param = torch.full((1 << 16,), 1.0, dtype=torch.bfloat16)
    m, v = make_states(param)
    m += 1
    v += 1
    # p <- 1 - 0.3 ulp: of 65536 draws the mean is within 5 of its deviations.
    update = Update(0.3 * 2.0**-8, 1.0 - 1e-9, 1.0 - 1e-9, 0.0, 0.0, 10**12)
    adamw_(param, torch.ones(param.shape), m, v, update, seed=11)
    moved = (1 - param.float().mean().item()) / 2.0**-8
    assert moved == pytest.approx(0.3, rel=0, abs=5 * math.sqrt(0.3 * 0.7 / param.numel()))


def test_a_seed_is_without_effect_elsewhere(each_cpu_implementation):
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        start, grad = torch.randn(100, generator=generator).to(dtype), torch.randn(100, generator=generator)
        kept, seeded = start.clone(), start.clone()
        adamw_(kept, grad, *make_states(kept), Update(1e-2, 0.9, 0.999, 1e-8, 0.0, 1))
        adamw_(seeded, grad, *make_states(kept), Update(1e-2, 0.9, 0.999, 1e-8, 0.0, 1), seed=5)
        assert torch.equal(kept, seeded)


@pytest.mark.parametrize("shape", [(0,), (), (3, 5, 7)])
def test_any_shape(shape, each_cpu_implementation):
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, generator=generator))
    flat, grad = param.detach().clone().view(-1), torch.randn(shape, generator=generator)
    adamw_(param, grad, *make_states(param), Update(1e-2, 0.9, 0.999, 1e-8, 0.1, 1))
    adamw_(flat, grad.view(-1), *make_states(flat), Update(1e-2, 0.9, 0.999, 1e-8, 0.1, 1))
    assert torch.equal(param.view(-1), flat)
    adamw_8bit_(param, grad, *make_8bit(param), Update(1e-2, 0.9, 0.999, 1e-8, 0.1, 2))
    adamw_8bit_(flat, grad.view(-1), *make_8bit(flat), Update(1e-2, 0.9, 0.999, 1e-8, 0.1, 2))
    assert torch.equal(param.view(-1), flat)


# --- 8-bit moments --------------------------------------------------------------------------------------


def test_maps_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(unsigned_map(CPU), functional.create_dynamic_map(signed=False))
    assert torch.equal(dynamic_map(CPU), functional.create_dynamic_map(signed=True))


def published_step(p, g, m, v, update):
    """fp64 p, m, v after the update of bitsandbytes' CUDA kernel (kOptimizerStatic8bit2StateBlockwise)."""
    b1, b2, t = update.beta1, update.beta2, update.step
    sound = np.isfinite(g)
    with np.errstate(invalid="ignore"):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        correction = math.sqrt(1 - b2**t)
        moved = p - update.lr * correction / (1 - b1**t) * (m / (np.sqrt(v) + correction * update.eps))
    moved = moved * (1 - update.lr * update.weight_decay)
    return np.where(sound, moved, p), np.where(sound, m, 0), np.where(sound, v, 0)


@pytest.mark.parametrize("size", [1, 256, 1000, 8192 + 300])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16")])
def test_each_8bit_step_is_the_published_one(size, dtypes, each_cpu_implementation):
    """From the same states, in fp64."""
    generator = torch.Generator().manual_seed(size)
    param, grad_dtype = torch.randn(size, generator=generator).to(getattr(torch, dtypes[0])), getattr(torch, dtypes[1])
    states = make_8bit(param)
    maps = dynamic_map(CPU), unsigned_map(CPU)
    for step in range(1, 8):
        grad = (torch.randn(size, generator=generator) * 10.0 ** (step - 5)).to(grad_dtype)
        if step == 3:
            grad[size // 2] = math.nan
            grad[size // 3] = -math.inf
        update = Update(1e-2, 0.9, 0.99, 1e-8, 0.1, step)
        before = [decode(codes, peaks, values).double().numpy()
                  for codes, peaks, values in zip(states[:2], states[2:], maps, strict=True)]  # fmt: skip
        p, *moments = published_step(param.double().numpy(), grad.double().numpy(), *before, update)
        adamw_8bit_(param, grad, *states, update)
        ulps = torch.finfo(param.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
        np.testing.assert_allclose(param.double().numpy(), p, rtol=ulps, atol=1e-7)
        for moment, codes, peaks, values in zip(moments, states[:2], states[2:], maps, strict=True):
            blocks = np.pad(moment, (0, -size % BLOCK)).reshape(-1, BLOCK)
            most = np.abs(blocks).max(axis=1, keepdims=True)
            np.testing.assert_allclose(peaks[:, None].double().numpy(), most, rtol=1e-6)
            scaled = (blocks / np.maximum(most, 1e-300)).reshape(-1)[:size]
            made, every = values[codes.int()].double().numpy(), values.double().numpy()
            best = np.abs(scaled[:, None] - every).min(axis=1)
            # The nearest code; of a negative number near zero the least negative one.
            assert (np.abs(scaled - made) <= np.where((scaled < 0) & (scaled > -5.5e-7), 5.5e-7, best + 1e-6)).all()
            assert ((made < 0) == (scaled < 0)).all()


def test_a_bad_gradient_spoils_nothing_but_its_own_moments_with_8_bits(each_cpu_implementation):
    param = torch.linspace(1, 2, 600)
    grad = torch.linspace(0.5, 1, 600)
    param_clean, clean, spoilt = param.clone(), make_8bit(param), make_8bit(param)
    for step, bad in enumerate((None, math.nan, math.inf, -math.inf), 1):
        update = Update(1e-2, 0.9, 0.99, 1e-8, 0.1, step)
        adamw_8bit_(param_clean, grad, *clean, update)
        given = grad.clone()
        if bad is not None:
            given[300] = bad
        kept = param[300].item()
        adamw_8bit_(param, given, *spoilt, update)
        if bad is not None:
            assert param[300] == kept
            assert decode(spoilt[0], spoilt[2], dynamic_map(CPU))[300] == 0
            assert decode(spoilt[1], spoilt[3], unsigned_map(CPU))[300] == 0
    others = torch.arange(600) != 300
    assert torch.equal(param[others], param_clean[others])
    for ours, wanted in zip(spoilt[:2], clean[:2], strict=True):
        assert torch.equal(ours[others], wanted[others])


@pytest.mark.parametrize("scale", [1e-19, 1e-21, 1e-30, 1e-38])
def test_8bit_blocks_of_tiny_gradients_stay_finite(scale, each_cpu_implementation):
    param = torch.ones(BLOCK)
    states = make_8bit(param)
    grad = torch.linspace(-1, 1, BLOCK) * scale
    for step in range(1, 4):
        adamw_8bit_(param, grad, *states, Update(1e-3, 0.9, 0.999, 1e-8, 0.0, step))
    assert (param == 1).all()
    for codes, peaks, values in ((states[0], states[2], dynamic_map(CPU)), (states[1], states[3], unsigned_map(CPU))):
        assert decode(codes, peaks, values).isfinite().all()
        assert (decode(codes, peaks, values).abs() <= peaks).all()


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


@pytest.mark.parametrize(
    ("dtype", "error", "relative"),
    [(torch.float32, 6e-5, 6e-4), (torch.float16, 6e-5, 6e-4), (torch.bfloat16, 1.7e-4, 1.6e-3)],
)
def test_8bit_is_within_bitsandbytes_tolerance_of_fp32(dtype, error, relative, each_cpu_implementation):
    """Its own test's sizes of parameters and gradients, limits, and keeping together of the two after each step."""
    generator = torch.Generator().manual_seed(0)
    ours = (torch.randn(1 << 14, generator=generator) * 0.1).to(dtype)
    small, exact = make_8bit(ours), ours.float()
    states = make_states(exact)
    for step in range(1, 51):
        grad = (torch.randn(ours.shape, generator=generator) * 0.01).to(dtype)
        update = Update(1e-3, 0.9, 0.999, 1e-8, 0.0, step)
        adamw_(exact, grad.float(), *states, update)
        adamw_8bit_(ours, grad, *small, update)
        off = (exact - ours.float()).abs()
        assert off.mean() < error
        assert (off / (exact.abs() + 1e-9)).mean() < relative
        ours.copy_(exact)
        exact.copy_(ours)
        for state, codes, peaks, values in zip(
            states, small[:2], small[2:], (dynamic_map(CPU), unsigned_map(CPU)), strict=True
        ):
            held = decode(codes, peaks, values)
            assert torch.isclose(state, held, atol=3e-3, rtol=1e-3).all()
            state.copy_(held)


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


@pytest.mark.parametrize("signed", [True, False])
def test_the_first_codes_lead_to_the_nearest(signed):
    """At and beside every midpoint, at and beside every edge of their index, and in between."""
    middles, first = midpoints(signed, CPU), first_codes(signed, CPU).int()
    edges = (torch.arange(-(1 << 15), 1 << 15) << 16).to(torch.int32).view(torch.float32)
    edges = edges[edges.isfinite()]
    at = torch.cat([middles[:-1], edges, torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1])
    at = torch.cat([at, *(torch.nextafter(at, torch.tensor(end)) for end in (-math.inf, math.inf))])
    guess = first[(at.view(torch.int32) >> 16) & 0xFFFF]
    assert torch.equal(guess + (middles[guess] < at), torch.bucketize(at, middles[:-1], out_int32=True))


def test_ties_go_to_the_lower_code_and_signs_are_kept():
    for signed, values in ((True, dynamic_map(CPU)), (False, unsigned_map(CPU))):
        middles = midpoints(signed, CPU)
        peaks, codes = torch.ones(1), torch.zeros(255, dtype=torch.uint8)
        encode(torch.cat([middles[1:-1], torch.ones(1)]), codes, peaks, signed)
        assert codes.tolist() == [*range(1, 255), 255]
        near_zero = torch.tensor([-1e-9, 0.0, 1e-9, 1.0])[0 if signed else 1 :]
        codes = torch.zeros(len(near_zero), dtype=torch.uint8)
        encode(near_zero, codes, peaks, signed)
        assert values[codes.int()].sign().tolist() == [-1, 0, 0, 1][0 if signed else 1 :]


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
        ({"grad": torch.zeros(8, device="meta")}, "got grad on meta, the parameter on cpu"),
        ({"exp_avg_sq": torch.zeros(8, device="meta")}, "got exp_avg_sq on meta"),
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
    with pytest.raises(ValueError, match="codes2 on meta"):
        adamw_8bit_(param, param, codes1, codes2.to("meta"), absmax1, absmax2, update)
