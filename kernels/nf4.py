"""NF4: 4-bit NormalFloat quantization with double quantization. Contract, reference and registration.

A weight is flattened row-major and cut into blocks of `block_size`. With c the 16 codes of the QLoRA paper
(Dettmers et al. 2023, arXiv:2305.14314, appendix E) and a_b = max |w| over block b,

    code(w) = argmin_k |w / a_b - c_k|          w' = c_code(w) * a_b

Two codes share a byte, the first in the high nibble. Double quantization (section 3 of the paper) stores the
fp32 a_b themselves as 8-bit codes of a signed dynamic map d, in blocks of 256 with fp32 maxima n:

    a_b = d[q_b] * n_{b // 256} + offset,       offset = mean(a)

which makes 4 + 8/64 + 32/(64*256) = 4.127 bits a weight. Every rounding below mirrors bitsandbytes, so that
codes and values are bit-identical both ways; tests hold that.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from jindo_core.kernels import dispatch

NF4_CODES: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 NormalFloat codes in ascending order, as fp32 values (QLoRA, appendix E)."""

NESTED_BLOCK = 256
"""Block size of the second quantization, in absmax values."""

ZERO_CODE = 7
"""The code of 0.0; pads the last nibble of an odd count."""

SMALLEST_ABSMAX = 1e-38
"""Below it the reciprocal of a block's maximum would be infinite."""

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Weights a pass of the reference works on: its fp32 temporaries (8 MiB) stay near the last-level cache.
_CHUNK = 1 << 20


@functools.cache
def code_table(device: torch.device) -> Tensor:
    """The NF4 codes as fp32 [16] on `device`."""
    return torch.tensor(NF4_CODES, dtype=torch.float32, device=device)


@functools.cache
def thresholds(device: torch.device) -> Tensor:
    """Decision thresholds, fp32 [15]: midpoints of neighbouring codes. A value on one takes the lower code."""
    codes = code_table(torch.device("cpu"))
    return ((codes[1:] + codes[:-1]) / 2).to(device)


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """The signed 8-bit dynamic map, fp32 [256], ascending (Dettmers 2016, arXiv:1511.04561; as bitsandbytes').

    0, 1 and, for i = 0..6, +-10^(i-6) times the 2^i midpoints of linspace(0.1, 1, 2^i + 1).
    """
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        midpoints = (bounds[:-1] + bounds[1:]) / 2
        decade = (10 ** (i - 6)) * midpoints
        values += decade.tolist() + (-decade).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.cache
def _nearest_dynamic_code(device: torch.device) -> Tensor:
    """uint8 [65536]: the dynamic code nearest to -1 + 2i/65535, ties to the lower code."""
    codes = dynamic_map(torch.device("cpu"))
    grid = -1 + 2 * torch.arange(65536, dtype=torch.float32) / 65535
    above = torch.searchsorted(codes, grid).clamp(1, 255)
    below = above - 1
    nearer_above = (codes[above] - grid) < (grid - codes[below])
    return torch.where(nearer_above, above, below).to(torch.uint8).to(device)


@functools.cache
def _code_pairs(device: torch.device) -> Tensor:
    """fp32 [256, 2]: the two codes of each byte, high nibble first."""
    byte = torch.arange(256)
    codes = code_table(torch.device("cpu"))
    return torch.stack([codes[byte >> 4], codes[byte & 15]], dim=1).contiguous().to(device)


# --- contracts ------------------------------------------------------------------------------------------


def nf4_quantize(weight: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize to NF4.

    Args:
        weight: any shape and strides, floating point; read in row-major order, N elements.
        block_size: elements that share one maximum; an even number.
    Returns:
        packed: uint8 [ceil(N/2), 1], two codes a byte, high nibble first.
        absmax: fp32 [ceil(N/block_size)].
    Raises:
        TypeError: not a floating dtype. ValueError: empty, or an odd or non-positive block size.
    """
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"nf4_quantize got a {weight.dtype} tensor, expected a floating dtype")
    if weight.numel() == 0:
        raise ValueError(f"nf4_quantize got an empty tensor of shape {tuple(weight.shape)}")
    if block_size < 2 or block_size % 2:
        raise ValueError(f"nf4_quantize got block_size {block_size}, expected an even number >= 2")
    return torch.ops.jindo.nf4_quantize(weight, block_size)


def nf4_quantize_absmax(absmax: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The second quantization.

    Args:
        absmax: fp32 [blocks].
        offset: fp32 [], subtracted first; mean(absmax) by default. The last bit of a mean depends on the
            number of threads, so processes that must agree pass one process's offset to all.
    Returns:
        quantized: uint8 [blocks]; nested_absmax: fp32 [ceil(blocks/256)]; offset: fp32 [].
    """
    if absmax.dtype != torch.float32 or absmax.dim() != 1:
        raise TypeError(f"nf4_quantize_absmax got {absmax.dtype} {tuple(absmax.shape)}, expected fp32 [blocks]")
    if offset is None:
        offset = absmax.mean()
    quantized, nested_absmax = torch.ops.jindo.nf4_quantize_absmax(absmax, offset)
    return quantized, nested_absmax, offset


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    block_size: int = 64,
    out: Tensor | None = None,
) -> Tensor:
    """Rebuild the weight: codes times maxima as an fp32 product, rounded once to `dtype` (to nearest even).

    Args:
        packed: uint8, ceil(N/2) bytes, N = prod(shape).
        absmax: fp32 [blocks], or uint8 [blocks] when double-quantized.
        nested_absmax: fp32 [ceil(blocks/256)], only with a uint8 absmax.
        offset: fp32 [], only with a uint8 absmax.
        shape: shape of the result.
        dtype: bf16, fp16, fp32 or fp64.
        out: contiguous, of `shape` and `dtype`: filled and returned, instead of a new tensor. A buffer that is
            used again spares the CPU the page faults that cost ten times the work.
    Raises:
        TypeError, ValueError: dtypes or sizes that do not fit together.
    """
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"nf4_dequantize got dtype {dtype}, expected a floating one")
    check_layout(packed, absmax, nested_absmax, offset, shape, block_size)
    if out is not None and (
        out.shape != torch.Size(shape) or out.dtype != dtype or not out.is_contiguous() or out.device != packed.device
    ):
        raise ValueError(
            f"nf4_dequantize got out {out.dtype} {tuple(out.shape)} on {out.device}, "
            f"expected {dtype} {tuple(shape)}, contiguous, on {packed.device}"
        )
    if not dispatch.recorded(packed):
        filled = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
        run = dispatch.implementation("nf4_dequantize", packed)
        run(filled, packed, absmax, nested_absmax, offset, block_size)
        torch.autograd.graph.increment_version(filled)  # a kernel writes behind autograd's back
        return filled
    if out is not None:
        torch.ops.jindo.nf4_dequantize_(out, packed, absmax, nested_absmax, offset, block_size)
        return out
    return torch.ops.jindo.nf4_dequantize(packed, absmax, nested_absmax, offset, list(shape), block_size, dtype)


def check_layout(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, ...],
    block_size: int,
) -> None:
    """Raise TypeError or ValueError unless the parts make one quantized weight of `shape`."""
    count = 1
    for extent in shape:
        count *= extent
    blocks = -(-count // block_size)
    if packed.dtype != torch.uint8 or packed.numel() != (count + 1) // 2:
        raise ValueError(
            f"packed is {packed.dtype} with {packed.numel()} bytes, expected uint8 with {(count + 1) // 2} "
            f"for shape {tuple(shape)}"
        )
    if absmax.numel() != blocks:
        raise ValueError(f"absmax has {absmax.numel()} values, expected {blocks} blocks of {block_size}")
    if absmax.dtype == torch.uint8:
        if nested_absmax is None or offset is None:
            raise ValueError("a uint8 absmax is double-quantized: nested_absmax and offset are missing")
        if nested_absmax.dtype != torch.float32 or nested_absmax.numel() != -(-blocks // NESTED_BLOCK):
            raise ValueError(
                f"nested_absmax is {nested_absmax.dtype} with {nested_absmax.numel()} values, "
                f"expected fp32 with {-(-blocks // NESTED_BLOCK)}"
            )
        if offset.dtype != torch.float32 or offset.numel() != 1:
            raise ValueError(f"offset is {offset.dtype} with {offset.numel()} values, expected fp32 with one")
    elif absmax.dtype != torch.float32:
        raise TypeError(f"absmax is {absmax.dtype}, expected fp32, or uint8 when double-quantized")
    elif nested_absmax is not None:
        raise ValueError("nested_absmax came with an fp32 absmax: expected a uint8 one")
    for name, part in (("packed", packed), ("absmax", absmax), ("nested_absmax", nested_absmax), ("offset", offset)):
        # The kernels read the parts by their addresses.
        if part is not None and (not part.is_contiguous() or part.device != packed.device):
            raise ValueError(
                f"{name} has strides {part.stride()} on {part.device}, expected contiguous on {packed.device}"
            )


# --- reference ------------------------------------------------------------------------------------------


def quantize_reference(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`nf4_quantize` in PyTorch, a chunk of blocks at a time."""
    flat = weight.reshape(-1)
    count = flat.numel()
    full = count - count % block_size
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=weight.device)
    step = max(_CHUNK // block_size, 1) * block_size
    for start in range(0, full, step):
        stop = min(start + step, full)
        blocks = flat[start:stop].float().view(-1, block_size)
        peak = blocks.abs().amax(dim=1)
        absmax[start // block_size : stop // block_size] = peak
        scaled = blocks * (1 / peak.clamp_min(SMALLEST_ABSMAX))[:, None]
        packed[start // 2 : stop // 2] = _pack(scaled.clamp_(-1, 1).view(-1))
    if full < count:
        # bitsandbytes divides the partial last block, and stores the clamped maximum.
        tail = flat[full:].float()
        peak = tail.abs().amax().clamp_min(SMALLEST_ABSMAX)
        absmax[-1] = peak
        packed[full // 2 :] = _pack((tail / peak).clamp_(-1, 1))
    return packed.view(-1, 1), absmax


def _pack(scaled: Tensor) -> Tensor:
    """fp32 [n] in [-1, 1] -> uint8 [ceil(n/2)]: nearest codes, two a byte."""
    codes = torch.bucketize(scaled, thresholds(scaled.device), out_int32=True).to(torch.uint8)
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), ZERO_CODE)])
    return (codes[::2] << 4) | codes[1::2]


def quantize_absmax_reference(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """`nf4_quantize_absmax` in PyTorch."""
    centred = absmax - offset
    blocks = -(-absmax.numel() // NESTED_BLOCK)
    padded = torch.nn.functional.pad(centred, (0, blocks * NESTED_BLOCK - absmax.numel()))
    padded = padded.view(blocks, NESTED_BLOCK)
    peak = padded.abs().amax(dim=1)
    scaled = (padded / peak[:, None]).clamp(-1, 1)
    index = ((scaled + 1) * 0.5 * 65535 + 0.5).nan_to_num(0.0).long()  # 0 / 0: a zero block takes code 0
    codes = _nearest_dynamic_code(absmax.device)[index]
    return codes.view(-1)[: absmax.numel()].clone(), peak


def expand_absmax(absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """fp32 [blocks]: the maxima themselves, whether or not they are double-quantized."""
    if nested_absmax is None or offset is None:
        return absmax
    values = dynamic_map(absmax.device)[absmax.int()]
    nested = nested_absmax.repeat_interleave(NESTED_BLOCK)[: values.numel()]
    return values * nested + offset


def dequantize_reference(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
) -> None:
    """`nf4_dequantize` into `out` in PyTorch, a chunk of blocks at a time."""
    peak = expand_absmax(absmax, nested_absmax, offset)
    flat_out, flat_in, pairs = out.view(-1), packed.reshape(-1), _code_pairs(packed.device)
    count = flat_out.numel()
    full = count - count % block_size
    step = max(_CHUNK // block_size, 1) * block_size
    for start in range(0, full, step):
        stop = min(start + step, full)
        codes = torch.nn.functional.embedding(flat_in[start // 2 : stop // 2].int(), pairs)
        scale = peak[start // block_size : stop // block_size, None]
        torch.mul(codes.view(-1, block_size), scale, out=flat_out[start:stop].view(-1, block_size))
    if full < count:
        codes = torch.nn.functional.embedding(flat_in[full // 2 :].int(), pairs).view(-1)
        flat_out[full:] = codes[: count - full] * peak[-1]


# --- registration ---------------------------------------------------------------------------------------


@torch.library.custom_op("jindo::nf4_quantize", mutates_args=())
def _nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return dispatch.implementation("nf4_quantize", weight)(weight, block_size)


@_nf4_quantize.register_fake
def _(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    count = weight.numel()
    packed = weight.new_empty(((count + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty(-(-count // block_size), dtype=torch.float32)


@torch.library.custom_op("jindo::nf4_quantize_absmax", mutates_args=())
def _nf4_quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    return dispatch.implementation("nf4_quantize_absmax", absmax)(absmax, offset)


@_nf4_quantize_absmax.register_fake
def _(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    blocks = -(-absmax.numel() // NESTED_BLOCK)
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), absmax.new_empty(blocks)


@torch.library.custom_op("jindo::nf4_dequantize", mutates_args=())
def _nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    out = packed.new_empty(shape, dtype=dtype)
    dispatch.implementation("nf4_dequantize", packed)(out, packed, absmax, nested_absmax, offset, block_size)
    return out


@_nf4_dequantize.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


@torch.library.custom_op("jindo::nf4_dequantize_", mutates_args=("out",))
def _nf4_dequantize_(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
) -> None:
    dispatch.implementation("nf4_dequantize", packed)(out, packed, absmax, nested_absmax, offset, block_size)


@_nf4_dequantize_.register_fake
def _(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
) -> None:
    return None
