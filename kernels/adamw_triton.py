"""AdamW on the GPU: one pass over parameter, gradient and moments. Contract: adamw.py.

With fp32 moments it reads 16 and writes 12 bytes an element (fp32 parameters), and that is what bounds it. With
8-bit moments a program holds whole blocks of 256, so that a block's new maximum never leaves its registers; the
nearest code takes two reads of tables that stay in the first cache (a few KiB of them are ever used).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from jindo_core.kernels.adamw import BLOCK, TINY, Update, first_codes, midpoints, unsigned_map
from jindo_core.kernels.dropout import GOLDEN, MIX_1, MIX_2
from jindo_core.kernels.launch import launch
from jindo_core.kernels.nf4 import dynamic_map
from jindo_core.kernels.nf4_triton import EXACT

ELEMENTS = 1024
"""Elements of a program, 8 a thread."""

BLOCKS = 4
"""Blocks of a program with 8-bit moments, 8 elements a thread."""

WARPS = 4

HASH = {"GOLDEN": GOLDEN, "MIX_1": MIX_1, "MIX_2": MIX_2}

SASS_PER_ELEMENT = {"step": 80, "step, stochastic": 98, "8-bit": 104, "8-bit, stochastic": 110}
"""SASS instructions an element on sm_80 and later, at most; two correctly rounded divisions and a root are half of the
first, the tables' addresses most of the second. Below 123 (H100, fp32 moments) or 70 (8-bit ones) bytes are what
bounds."""


@triton.jit
def moments(m, v, g, lerp, beta2, rest2, FROM_END: tl.constexpr):
    """m and v after the update; the multiply-adds that the contract has fused."""
    m = tl.fma(g - m + tl.zeros_like(g), tl.zeros_like(g) + lerp, g if FROM_END else m)
    return m, tl.fma(rest2 * g, g, v * beta2)


@triton.jit
def rounded(p, index, seed, GOLDEN: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr):
    """fp32 -> bf16, up with the probability of the distance."""
    # The sum: a seed of 1 may come as a constant, which has no .to.
    h = index.to(tl.uint32) * tl.full((1,), GOLDEN, tl.uint32) + (seed + tl.zeros((1,), tl.int32)).to(tl.uint32)
    h = (h ^ (h >> 16)) * tl.full((1,), MIX_1, tl.uint32)
    h = (h ^ (h >> 13)) * tl.full((1,), MIX_2, tl.uint32)
    bits = (p.to(tl.uint32, bitcast=True) + (h >> 16)) >> 16
    return tl.where(p == p, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def stored(p_ptr, at, p, index, inside, seed, STOCHASTIC: tl.constexpr,
           GOLDEN: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr):  # fmt: skip
    if STOCHASTIC:
        tl.store(p_ptr + at, rounded(p, index, seed, GOLDEN, MIX_1, MIX_2), mask=inside)
    else:
        tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])  # a new one each step: neither 1 nor a multiple of 16 is a kernel of its own
def step_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr,  # [count]
    count, seed, lerp, beta2, rest2, decay, correction, eps, step_size,
    FROM_END: tl.constexpr, STOCHASTIC: tl.constexpr,
    GOLDEN: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ELEMENTS
    at = tl.arange(0, ELEMENTS)
    inside = at < count - first
    p = tl.load(p_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + first + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + first + at, mask=inside, other=0.0)
    m, v = moments(m, v, g, lerp, beta2, rest2, FROM_END)
    tl.store(m_ptr + first + at, m, mask=inside)
    tl.store(v_ptr + first + at, v, mask=inside)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(p) + correction) + eps
    p = p * decay + tl.div_rn(step_size * m, denominator)
    stored(p_ptr + first, at, p, first + at, inside, seed, STOCHASTIC, GOLDEN, MIX_1, MIX_2)


@triton.jit
def encoded(x, first_ptr, middles_ptr, TINY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """uint8 codes [BLOCKS, BLOCK] and fp32 maxima [BLOCKS]."""
    peak = tl.max(tl.abs(x), axis=1)
    scaled = x * tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), tl.maximum(peak, TINY))[:, None]
    code = tl.load(first_ptr + (scaled.to(tl.uint32, bitcast=True) >> 16).to(tl.int32)).to(tl.int32)
    return (code + (tl.load(middles_ptr + code) < scaled).to(tl.int32)).to(tl.uint8), peak


@triton.jit(do_not_specialize=["seed"])
def step_8bit_kernel(
    p_ptr, g_ptr,  # [count]
    codes1_ptr, codes2_ptr,  # uint8 [count]
    absmax1_ptr, absmax2_ptr,  # fp32 [ceil(count / BLOCK)]
    map1_ptr, map2_ptr, middles1_ptr, middles2_ptr,  # fp32 [256]
    first1_ptr, first2_ptr,  # uint8 [65536]
    count, seed, lerp, beta2, rest2, decay, eps, step_size,
    FROM_END: tl.constexpr, STOCHASTIC: tl.constexpr, GOLDEN: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr,
    TINY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK)
    at = tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < count - first
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < (count + BLOCK - 1) // BLOCK
    p = tl.load(p_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
    code1 = tl.load(codes1_ptr + first + at, mask=inside, other=0).to(tl.int32)
    code2 = tl.load(codes2_ptr + first + at, mask=inside, other=0).to(tl.int32)
    m = tl.load(map1_ptr + code1) * tl.load(absmax1_ptr + block, mask=there, other=0.0)[:, None]
    v = tl.load(map2_ptr + code2) * tl.load(absmax2_ptr + block, mask=there, other=0.0)[:, None]
    m, v = moments(m, v, g, lerp, beta2, rest2, FROM_END)
    sound = tl.abs(g) < float("inf")  # not of a NaN either
    # 8-bit moments err by far more than an ulp: neither root nor division is exact.
    p = tl.where(sound, (p + step_size * m / (tl.sqrt(v) + eps)) * decay, p)
    stored(p_ptr + first, at, p, first + at, inside, seed, STOCHASTIC, GOLDEN, MIX_1, MIX_2)
    used = inside & sound
    code1, peak1 = encoded(tl.where(used, m, 0.0), first1_ptr, middles1_ptr, TINY, BLOCKS, BLOCK)
    tl.store(codes1_ptr + first + at, code1, mask=inside)
    tl.store(absmax1_ptr + block, peak1, mask=there)
    code2, peak2 = encoded(tl.where(used, v, 0.0), first2_ptr, middles2_ptr, TINY, BLOCKS, BLOCK)
    tl.store(codes2_ptr + first + at, code2, mask=inside)
    tl.store(absmax2_ptr + block, peak2, mask=there)


def _numbers(update: Update, seed: int | None, *applied: float) -> tuple[tuple[int | float, ...], dict[str, object]]:
    """The kernels' scalars behind the count, `applied` the last of them, and their constants."""
    weight = 1 - update.beta1
    from_end = weight >= 0.5  # torch's lerp starts from the nearer end
    decay = update.decay if update.weight_decay else 1.0
    lerp = weight - 1 if from_end else weight
    scalars = (seed or 0, lerp, update.beta2, 1 - update.beta2, decay, *applied)
    return scalars, {"FROM_END": from_end, "STOCHASTIC": seed is not None, **HASH, "num_warps": WARPS, **EXACT}


def step(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: Update, seed: int | None
) -> None:
    """`adamw_`; equal to the reference but for its square root."""
    count = param.numel()
    scalars, constants = _numbers(update, seed, update.correction, update.eps, -update.step_size)
    launch(
        step_kernel, (triton.cdiv(count, ELEMENTS),), param, grad, exp_avg, exp_avg_sq, count, *scalars,
        ELEMENTS=ELEMENTS, **constants,
    )  # fmt: skip


def step_8bit(
    param: Tensor,
    grad: Tensor,
    codes1: Tensor,
    codes2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    update: Update,
    seed: int | None,
) -> None:
    """`adamw_8bit_`."""
    count, device = param.numel(), param.device
    step_size, eps = update.corrected
    scalars, constants = _numbers(update, seed, eps, -step_size)
    maps = dynamic_map(device), unsigned_map(device)
    tables = [table(signed, device) for table in (midpoints, first_codes) for signed in (True, False)]
    launch(
        step_8bit_kernel, (triton.cdiv(count, BLOCKS * BLOCK),), param, grad, codes1, codes2, absmax1, absmax2,
        *maps, *tables, count, *scalars, TINY=TINY, BLOCKS=BLOCKS, BLOCK=BLOCK, **constants,
    )  # fmt: skip
