"""One AdamW update (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2) on flat tensors. Contract, reference.

    p <- p (1 - lr wd)                        m <- m + (1 - b1)(g - m)         v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

With fp32 moments every rounding is that of torch.optim.AdamW on the CPU, so results there are the same bit for bit.

With 8-bit moments (Dettmers et al. 2022, arXiv:2110.02861) each block of 256 is a maximum and codes into a dynamic
map, signed for m and unsigned for v, as bitsandbytes' AdamW8bit holds them. The update is that of its CUDA kernel (its
CPU and Triton ones differ from it by less than a code, by lr^2 wd and in what they do to a NaN):

    p <- (p - lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps sqrt(1 - b2^t))) (1 - lr wd)

A negative m never takes the code of zero, so that it keeps its sign. Where the gradient is NaN or infinite p stays and
the moments become zero: one bad element would else take its block's maximum, and so all 256, with it for good.

bf16 and fp16 parameters are updated in fp32 and rounded once: to nearest, or, bf16 alone, stochastically (up with
the probability of the distance), so that steps below half an ulp are not lost. The random bits are a hash of the
element's index and a seed (dropout.py), the same in every implementation.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from jindo_core.kernels import dispatch
from jindo_core.kernels.dropout import hashed
from jindo_core.kernels.nf4 import dynamic_map

BLOCK = 256
"""Elements that share a maximum of the 8-bit moments."""

TINY = torch.finfo(torch.float32).tiny
"""The least maximum whose reciprocal is finite for sure; of a smaller one only codes near zero are used."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Update(NamedTuple):
    """The numbers of one update.

    Attributes:
        lr, beta1, beta2, eps, weight_decay: as in torch.optim.AdamW. step: t, 1 for the first update.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    @property
    def decay(self) -> float:
        """What p is multiplied by; 1 without weight decay."""
        return 1 - self.lr * self.weight_decay

    @property
    def step_size(self) -> float:
        return self.lr / (1 - self.beta1**self.step)

    @property
    def correction(self) -> float:
        """sqrt(1 - b2^t)."""
        return math.sqrt(1 - self.beta2**self.step)

    @property
    def corrected(self) -> tuple[float, float]:
        """Step size and eps with the correction moved out of the denominator: the 8-bit form."""
        return self.step_size * self.correction, self.eps * self.correction


def adamw_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: Update, *, seed: int | None = None
) -> None:
    """Update `param` and its moments in place.

    Args:
        param: any shape, contiguous; fp32, bf16 or fp16. grad: the same shape, fp32 or param's dtype.
        exp_avg, exp_avg_sq: m and v, fp32, the same shape.
        seed: of stochastic rounding, for bf16; another one each step. None: to nearest.
    Raises:
        ValueError: a shape, dtype, layout or device that does not fit, or a step before the first.
    """
    _check(param, grad, update, exp_avg=(exp_avg, param.shape), exp_avg_sq=(exp_avg_sq, param.shape))
    with torch.no_grad():
        if dispatch.recorded(param):
            torch.ops.jindo.adamw_(param, grad, exp_avg, exp_avg_sq, *update[:5], update.step, _seed(param, seed))
            return
        dispatch.implementation("adamw", param)(param, grad, exp_avg, exp_avg_sq, update, _seed(param, seed))


def adamw_8bit_(
    param: Tensor,
    grad: Tensor,
    codes1: Tensor,
    codes2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    update: Update,
    *,
    seed: int | None = None,
) -> None:
    """`adamw_` with 8-bit moments.

    Args:
        codes1, codes2: uint8 of param's shape: indices into `dynamic_map` (m) and `unsigned_map` (v).
        absmax1, absmax2: fp32 [ceil(count / 256)]; all zeros before the first update.
    """
    blocks = torch.Size([-(-param.numel() // BLOCK)])
    _check(param, grad, update, absmax1=(absmax1, blocks), absmax2=(absmax2, blocks))
    for name, codes in (("codes1", codes1), ("codes2", codes2)):
        if codes.dtype != torch.uint8 or codes.shape != param.shape or not codes.is_contiguous():
            raise ValueError(f"adamw_8bit_ got {name} {_say(codes)}, expected contiguous uint8 {tuple(param.shape)}")
        if codes.device != param.device:
            raise ValueError(f"adamw_8bit_ got {name} on {codes.device}, the parameter on {param.device}")
    with torch.no_grad():
        if dispatch.recorded(param):
            states = (codes1, codes2, absmax1, absmax2)
            torch.ops.jindo.adamw_8bit_(param, grad, *states, *update[:5], update.step, _seed(param, seed))
            return
        run = dispatch.implementation("adamw_8bit", param)
        run(param, grad, codes1, codes2, absmax1, absmax2, update, _seed(param, seed))


def _check(param: Tensor, grad: Tensor, update: Update, **states: tuple[Tensor, torch.Size]) -> None:
    if param.dtype not in DTYPES or not param.is_contiguous():
        raise ValueError(f"adamw got a parameter {_say(param)}, expected contiguous fp32, bf16 or fp16")
    if grad.shape != param.shape or grad.dtype not in (torch.float32, param.dtype) or not grad.is_contiguous():
        raise ValueError(f"adamw got a gradient {_say(grad)} for a parameter {_say(param)}")
    if update.step < 1:
        raise ValueError(f"adamw got step {update.step}, expected 1 for the first update")
    for name, tensor in [("grad", grad), *((name, state) for name, (state, _) in states.items())]:
        if tensor.device != param.device:
            raise ValueError(f"adamw got {name} on {tensor.device}, the parameter on {param.device}")
    for name, (state, shape) in states.items():
        if state.dtype != torch.float32 or state.shape != shape or not state.is_contiguous():
            raise ValueError(f"adamw got {name} {_say(state)}, expected contiguous fp32 {tuple(shape)}")


def _say(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}" + ("" if tensor.is_contiguous() else ", not contiguous")


def _seed(param: Tensor, seed: int | None) -> int | None:
    """The seed as a signed 32-bit number, where it has an effect."""
    if seed is None or param.dtype != torch.bfloat16:
        return None
    return (seed + (1 << 31)) % (1 << 32) - (1 << 31)


# --- reference ------------------------------------------------------------------------------------------


def step_reference(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: Update, seed: int | None
) -> None:
    """`adamw_` in PyTorch."""
    wide = param if param.dtype == torch.float32 else param.float()
    if update.weight_decay:
        wide.mul_(update.decay)
    _moments(grad.float(), exp_avg, exp_avg_sq, update)
    denominator = exp_avg_sq.sqrt().div_(update.correction).add_(update.eps)
    _store(param, wide.addcdiv_(exp_avg, denominator, value=-update.step_size), seed)


def _moments(g: Tensor, m: Tensor, v: Tensor, update: Update) -> None:
    m.lerp_(g, 1 - update.beta1)
    v.mul_(update.beta2).addcmul_(g, g, value=1 - update.beta2)


def _store(param: Tensor, wide: Tensor, seed: int | None) -> None:
    if seed is not None:
        round_stochastically(param, wide, seed)
    elif wide is not param:
        param.copy_(wide)


def round_stochastically(out: Tensor, wide: Tensor, seed: int) -> None:
    """fp32 -> bf16: 16 random bits are added to the ones that are cut off."""
    bits = wide.contiguous().view(torch.int32)
    index = hashed(bits.numel(), torch.tensor(seed, dtype=torch.int32, device=wide.device))
    noise = (index >> 16).bitwise_and_(0xFFFF).view(bits.shape)
    rounded = ((bits + noise) >> 16).to(torch.int16).view(torch.bfloat16)
    out.copy_(torch.where(wide.isnan(), wide.to(torch.bfloat16), rounded))


def step_8bit_reference(
    param: Tensor,
    grad: Tensor,
    codes1: Tensor,
    codes2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    update: Update,
    seed: int | None,
) -> None:
    """`adamw_8bit_` in PyTorch."""
    maps = dynamic_map(param.device), unsigned_map(param.device)
    states = (codes1, absmax1), (codes2, absmax2)
    m, v = (decode(*state, values) for state, values in zip(states, maps, strict=True))
    g, wide = grad.float(), param.float()
    sound = g.isfinite()
    _moments(g, m, v, update)
    step_size, eps = update.corrected
    moved = wide.addcdiv(m, v.sqrt().add_(eps), value=-step_size).mul_(update.decay)
    _store(param, torch.where(sound, moved, wide), seed)
    for moment, (codes, absmax), signed in zip((m, v), states, (True, False), strict=True):
        encode(moment.masked_fill_(~sound, 0), codes, absmax, signed)


@functools.cache
def unsigned_map(device: torch.device) -> Tensor:
    """The unsigned 8-bit dynamic map, fp32 [256], ascending: `dynamic_map` with the sign's bit in the fraction."""
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (i + 1) + 1, dtype=torch.float32)
        values += ((10 ** (i - 6)) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.cache
def midpoints(signed: bool, device: torch.device) -> Tensor:
    """fp32 [256], ascending: code i is nearest between numbers i - 1 and i; the last is infinite.

    The one below the signed map's zero lies as near to zero as a normal number does, so that a sign is kept.
    """
    values = (dynamic_map if signed else unsigned_map)(torch.device("cpu")).double()
    between = ((values[:-1] + values[1:]) / 2).float()
    if signed:
        between[int((values < 0).sum()) - 1] = -TINY
    return torch.cat([between, torch.tensor([math.inf])]).to(device)


@functools.cache
def first_codes(signed: bool, device: torch.device) -> Tensor:
    """uint8 [65536]: the code of the least fp32 number whose upper 16 bits are the index.

    No two midpoints share their upper 16 bits, so any other such number has this code or the next one.
    """
    index = torch.arange(1 << 16, dtype=torch.int64)
    least = (index << 16) | torch.where(index >= 1 << 15, 0xFFFF, 0)  # of negative numbers the one with most bits set
    least = torch.where(least >= 1 << 31, least - (1 << 32), least).to(torch.int32).view(torch.float32)
    return torch.bucketize(least, midpoints(signed, least.device)[:-1]).to(torch.uint8).to(device)


def decode(codes: Tensor, absmax: Tensor, values: Tensor) -> Tensor:
    """fp32 of the codes' shape."""
    count = codes.numel()
    peaks = absmax.repeat_interleave(BLOCK)[:count]
    return (values[codes.view(-1).int()] * peaks).view(codes.shape)


def encode(moment: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    """The nearest codes, ties to the lower, and the blocks' maxima, in place."""
    count = moment.numel()
    blocks = torch.nn.functional.pad(moment.view(-1), (0, -count % BLOCK)).view(-1, BLOCK)
    torch.amax(blocks.abs(), dim=1, out=absmax)
    scaled = blocks * absmax.clamp(min=TINY).reciprocal()[:, None]
    found = torch.bucketize(scaled, midpoints(signed, moment.device)[:-1])
    codes.copy_(found.view(-1)[:count].view(codes.shape).to(torch.uint8))


# --- registration ---------------------------------------------------------------------------------------


@torch.library.custom_op("jindo::adamw_", mutates_args=("param", "exp_avg", "exp_avg_sq"))
def _adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int | None,
) -> None:
    update = Update(lr, beta1, beta2, eps, weight_decay, step)
    dispatch.implementation("adamw", param)(param, grad, exp_avg, exp_avg_sq, update, seed)


@torch.library.custom_op("jindo::adamw_8bit_", mutates_args=("param", "codes1", "codes2", "absmax1", "absmax2"))
def _adamw_8bit_(
    param: Tensor,
    grad: Tensor,
    codes1: Tensor,
    codes2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int | None,
) -> None:
    update = Update(lr, beta1, beta2, eps, weight_decay, step)
    dispatch.implementation("adamw_8bit", param)(param, grad, codes1, codes2, absmax1, absmax2, update, seed)


@_adamw_.register_fake
def _(*_: object) -> None:
    return None


@_adamw_8bit_.register_fake
def _(*_: object) -> None:
    return None
