"""LoRA linear on an NF4 weight for few rows on the GPU. Contract, equations and reference: lora_matmul.py.

At small M the product is bound by reading W: the forward and the dX kernel read it as 4-bit codes and rebuild
it in registers in the main loop, so that W in 16 bits never exists. W is the *first* operand of the dot
(y^T = W x^T): its rows fill the tensor core's 64-row side, which M <= 64 rows of x could not.

Reading W, a tile of it is [ROWS, COLUMNS] of out x in features. Where 64 divides K and the block size, its
64-element groups are byte-aligned and share one maximum (PAIRED); any other K goes element by element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jindo_core.kernels import lora_matmul as contract
from jindo_core.kernels import lora_matmul_reference as reference
from jindo_core.kernels.dropout import GOLDEN, MIX_1, MIX_2, drop_threshold, growth
from jindo_core.kernels.launch import launch
from jindo_core.kernels.nf4_triton import EXACT, expand_absmax, look_up_pairs, weight_arguments

GROUP = 64
"""Elements of a row of W that share one maximum on the PAIRED path."""


class Tiles(NamedTuple):
    """Tile of one program: `m` rows of the activation, `n` out features, `k` in features."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# By M rounded up to a power of two. Three stages, and a forward deep in K, keep enough loads in flight.
FORWARD_TILES = {16: Tiles(16, 64, 128, 4, 3), 32: Tiles(32, 64, 128, 4, 3), 64: Tiles(64, 64, 64, 4, 3)}
DX_TILES = {16: Tiles(16, 64, 64, 4, 3), 32: Tiles(32, 64, 64, 4, 3), 64: Tiles(64, 64, 64, 4, 3)}
# Element by element, a tile costs 20 times the registers: no pipelining, or it spills and outgrows shared memory.
UNPAIRED_TILES = Tiles(16, 32, 32, 4, 1)
DOWN_TILES = Tiles(16, 16, 128, 4, 3)
DROP_ELEMENTS = 1024


def tiles_for(table: dict[int, Tiles], rows: int, dtype: torch.dtype, paired: bool) -> Tiles:
    """The tile for M rows; more rows than it has take several programs."""
    if not paired:
        return UNPAIRED_TILES
    if dtype == torch.float32:  # no tensor cores: a wider tile spills
        return table[16]
    return table[min(max(triton.next_power_of_2(rows), 16), 64)]


def is_paired(in_features: int, block_size: int) -> bool:
    """Whether 64-element groups of W are byte-aligned and inside one quantization block each."""
    return in_features % GROUP == 0 and block_size % GROUP == 0


@triton.jit
def keep(m, k, K, seed_ptr, threshold, GOLDEN: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr):
    """The dropout mask at row m, column k: `keep_mask` of the contract, in registers."""
    h = (m.to(tl.uint32) * K + k.to(tl.uint32)).to(tl.uint32)
    h = h * tl.full((1, 1), GOLDEN, tl.uint32) + tl.load(seed_ptr).to(tl.uint32)
    h = (h ^ (h >> 16)) * tl.full((1, 1), MIX_1, tl.uint32)
    h = (h ^ (h >> 13)) * tl.full((1, 1), MIX_2, tl.uint32)
    return h.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def weight_tile(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, pairs_ptr, map_ptr,
    n, k0, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """fp32 [ROWS, COLUMNS] of W: rows n [ROWS], columns from k0 (a multiple of COLUMNS). Finite outside W."""
    if PAIRED:
        # Written as multiples of a constant, so that the compiler knows the alignment: 128-bit async copies.
        row_bytes = (K // 64) * 32
        GROUPS: tl.constexpr = COLUMNS // 64
        group = k0 // 64 + tl.arange(0, GROUPS)
        inside = (n < N)[:, None] & (group < K // 64)[None, :]
        block = (n.to(tl.int64)[:, None] * (K // 64) + group[None, :]) // (BLOCK_SIZE // 64)
        peak = expand_absmax(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, inside, NESTED)
        byte = k0 // 2 + tl.arange(0, COLUMNS // 2)
        inside_byte = (n < N)[:, None] & (byte < row_bytes)[None, :]
        packed = tl.load(packed_ptr + n.to(tl.int64)[:, None] * row_bytes + byte[None, :], mask=inside_byte, other=0)
        high, low = look_up_pairs(packed, pairs_ptr, ROWS, COLUMNS // 2)
        codes = tl.reshape(tl.join(high, low), (ROWS, GROUPS, 64))
        return tl.reshape(codes * peak[:, :, None], (ROWS, COLUMNS))
    else:
        column = tl.arange(0, COLUMNS)
        inside = (n < N)[:, None] & (k0 + column < K)[None, :]
        element = n.to(tl.int64)[:, None] * K + k0 + column[None, :]
        peak = expand_absmax(absmax_ptr, nested_ptr, offset_ptr, map_ptr, element // BLOCK_SIZE, inside, NESTED)
        packed = tl.load(packed_ptr + element // 2, mask=inside, other=0)
        high, low = look_up_pairs(packed, pairs_ptr, ROWS, COLUMNS)
        return tl.where(element % 2 == 0, high, low) * peak


@triton.jit
def down_kernel(
    down_ptr,  # [M, R], some columns of a group's
    x_ptr,  # [M, K]
    a_ptr,  # [R, K]
    seed_ptr,  # int32 [1] when DROPOUT
    M, K, R, down_stride, threshold, growth,
    GOLDEN: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr,
    TILE_M: tl.constexpr, TILE_R: tl.constexpr, TILE_K: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """down = D(x) A^T"""
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    r = tl.program_id(1) * TILE_R + tl.arange(0, TILE_R)
    total = tl.zeros((TILE_M, TILE_R), tl.float32)
    for k0 in range(0, K, TILE_K):
        k = k0 + tl.arange(0, TILE_K)
        inside_x = (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=inside_x, other=0.0)
        if DROPOUT:
            kept = keep(m[:, None], k[None, :], K, seed_ptr, threshold, GOLDEN, MIX_1, MIX_2)
            x = tl.where(kept, x.to(tl.float32) * growth, 0.0).to(x_ptr.dtype.element_ty)
        a = tl.load(a_ptr + r[None, :] * K + k[:, None], mask=(r < R)[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(x, a.to(x_ptr.dtype.element_ty), total, input_precision="ieee")
    out = down_ptr + m[:, None] * down_stride + r[None, :]
    tl.store(out, total.to(down_ptr.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit
def forward_kernel(
    y_ptr,  # [M, N], some columns of a group's
    x_ptr,  # [M, K]
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, pairs_ptr, map_ptr,
    down_ptr,  # [M, R] when LORA
    b_ptr,  # [N, R] when LORA
    M, N, K, R, y_stride, down_stride, scale,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, TILE_R: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, PAIRED: tl.constexpr, LORA: tl.constexpr,
):  # fmt: skip
    """y^T = W x^T + scale * B down^T; rows of y and of down lie a stride apart"""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    total = tl.zeros((TILE_N, TILE_M), tl.float32)
    if LORA:
        for r0 in range(0, R, TILE_R):
            r = r0 + tl.arange(0, TILE_R)
            b = tl.load(b_ptr + n[:, None] * R + r[None, :], mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
            inside_down = (m < M)[None, :] & (r < R)[:, None]
            down = tl.load(down_ptr + m[None, :] * down_stride + r[:, None], mask=inside_down, other=0.0)
            total = tl.dot(b.to(down_ptr.dtype.element_ty), down, total, input_precision="ieee")
        total *= scale
    for k0 in range(0, K, TILE_K):
        k = k0 + tl.arange(0, TILE_K)
        x = tl.load(x_ptr + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
        w = weight_tile(
            packed_ptr, absmax_ptr, nested_ptr, offset_ptr, pairs_ptr, map_ptr,
            n, k0, N, K, TILE_N, TILE_K, BLOCK_SIZE, NESTED, PAIRED,
        )  # fmt: skip
        total = tl.dot(w.to(x_ptr.dtype.element_ty), x, total, input_precision="ieee")
    out = y_ptr + m[None, :] * y_stride + n[:, None]
    tl.store(out, total.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def dx_kernel(
    dx_ptr,  # [M, K]
    dy_ptr,  # [M, N]
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, pairs_ptr, map_ptr,
    through_b_ptr,  # [M, R] when LORA
    a_ptr,  # [R, K] when LORA
    seed_ptr,  # int32 [1] when DROPOUT
    M, N, K, R, scale, threshold, growth,
    GOLDEN: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, TILE_R: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, PAIRED: tl.constexpr,
    LORA: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dX^T = W^T dY^T + scale * D'(A^T (dY B)^T)"""
    k0 = tl.program_id(0) * TILE_K
    k = k0 + tl.arange(0, TILE_K)
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    total = tl.zeros((TILE_K, TILE_M), tl.float32)
    if LORA:
        for r0 in range(0, R, TILE_R):
            r = r0 + tl.arange(0, TILE_R)
            a = tl.load(a_ptr + r[None, :] * K + k[:, None], mask=(r < R)[None, :] & (k < K)[:, None], other=0.0)
            inside = (m < M)[None, :] & (r < R)[:, None]
            through_b = tl.load(through_b_ptr + m[None, :] * R + r[:, None], mask=inside, other=0.0)
            total = tl.dot(a.to(through_b_ptr.dtype.element_ty), through_b, total, input_precision="ieee")
        if DROPOUT:
            kept = keep(m[None, :], k[:, None], K, seed_ptr, threshold, GOLDEN, MIX_1, MIX_2)
            total = tl.where(kept, total * growth, 0.0)
        total *= scale
    for n0 in range(0, N, TILE_N):
        n = n0 + tl.arange(0, TILE_N)
        dy = tl.load(dy_ptr + m[None, :] * N + n[:, None], mask=(m < M)[None, :] & (n < N)[:, None], other=0.0)
        w = weight_tile(
            packed_ptr, absmax_ptr, nested_ptr, offset_ptr, pairs_ptr, map_ptr,
            n, k0, N, K, TILE_N, TILE_K, BLOCK_SIZE, NESTED, PAIRED,
        )  # fmt: skip
        total = tl.dot(tl.trans(w.to(dy_ptr.dtype.element_ty)), dy, total, input_precision="ieee")
    out = dx_ptr + m[None, :] * K + k[:, None]
    tl.store(out, total.to(dx_ptr.dtype.element_ty), mask=(m < M)[None, :] & (k < K)[:, None])


@triton.jit
def drop_kernel(
    out_ptr, x_ptr, seed_ptr, count, threshold, factor,
    GOLDEN: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x * factor where kept, else 0."""
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
    x = tl.load(x_ptr + index, mask=index < count, other=0.0)
    kept = keep(tl.zeros((1, 1), tl.int32), index, 0, seed_ptr, threshold, GOLDEN, MIX_1, MIX_2)
    dropped = tl.where(kept, x.to(tl.float32) * factor, 0.0)
    tl.store(out_ptr + index, dropped.to(out_ptr.dtype.element_ty), mask=index < count)


# --- launches -------------------------------------------------------------------------------------------


def mask_arguments(dropout: float) -> tuple[int, float]:
    """The mask's threshold and the factor of what is kept."""
    return drop_threshold(dropout), growth(dropout)


HASH = {"GOLDEN": GOLDEN, "MIX_1": MIX_1, "MIX_2": MIX_2}


def rank_tile(rank: int) -> int:
    """Columns of A and B an iteration takes: the rank padded to a power of two, 16 to 64."""
    return min(max(triton.next_power_of_2(rank), 16), 64)


def drop(x: Tensor, dropout: float, factor: float, seed: Tensor) -> Tensor:
    """x * factor where kept, else 0, in one pass. x is contiguous."""
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), DROP_ELEMENTS),)
    threshold = drop_threshold(dropout)
    launch(drop_kernel, grid, out, x, seed, x.numel(), threshold, factor, TILE=DROP_ELEMENTS, **HASH, **EXACT)
    return out


def mask(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """`mask` of the contract: x where kept, else 0."""
    return drop(x.contiguous(), dropout, 1.0, seed)


def down_product(x: Tensor, lora_A: Tensor, dropout: float, seed: Tensor | None, down: Tensor) -> None:
    """D(x) A^T [M, r] into `down`, in x's dtype."""
    (rows, in_features), rank = x.shape, lora_A.shape[0]
    masked = dropout > 0.0 and seed is not None
    tile = DOWN_TILES
    launch(
        down_kernel, (triton.cdiv(rows, tile.m), triton.cdiv(rank, tile.n)),
        down, x, lora_A.contiguous(), seed if masked else x, rows, in_features, rank, down.stride(0),
        *mask_arguments(dropout),
        TILE_M=tile.m, TILE_R=tile.n, TILE_K=tile.k, DROPOUT=masked,
        num_warps=tile.warps, num_stages=tile.stages, **HASH, **EXACT,
    )  # fmt: skip


def forward(
    x: Tensor,
    layers: Sequence[contract.Projection],
    block_size: int,
    dropout: float,
    seed: Tensor | None,
    keep_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lora_matmul`: returns y, D(x)A^T [M, sum of r] and no W. Tensor cores multiply no fp64, and a W that is to be
    kept has to be made: both are left to the reference."""
    if x.dtype == torch.float64 or x.numel() == 0 or keep_weight:
        return reference.forward_reference(x, layers, block_size, dropout, seed, keep_weight)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows, in_features = flat.shape
    # No view is returned: autograd lets nobody change the view of a Function in place, as Falcon does.
    whole = x.new_empty(*x.shape[:-1], sum(layer.out_features for layer in layers))
    y = whole.view(rows, whole.shape[-1])
    down = x.new_empty(rows, sum(layer.rank for layer in layers))
    paired = is_paired(in_features, block_size)
    tile = tiles_for(FORWARD_TILES, rows, x.dtype, paired)
    first, r = 0, 0
    for layer in layers:
        rank, out_features = layer.rank, layer.out_features
        b = flat if layer.lora_B is None else layer.lora_B.contiguous()
        mine = down[:, r : r + rank]
        if layer.rank and layer.lora_A is not None:
            down_product(flat, layer.lora_A, dropout, seed, mine)
        weight, nested = weight_arguments(layer.packed, layer.absmax, layer.nested_absmax, layer.offset)
        launch(
            forward_kernel, (triton.cdiv(out_features, tile.n), triton.cdiv(rows, tile.m)),
            y[:, first:], flat, *weight, mine if rank else flat, b, rows, out_features, in_features, rank,
            y.stride(0), down.stride(0), layer.scale,
            TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, TILE_R=rank_tile(rank), LORA=rank > 0,
            BLOCK_SIZE=block_size, NESTED=nested, PAIRED=paired,
            num_warps=tile.warps, num_stages=tile.stages, **EXACT,
        )  # fmt: skip
        first, r = first + out_features, r + rank
    return whole, down, x.new_empty(0, in_features)


def backward(
    dy: Tensor,
    x: Tensor | None,
    layers: Sequence[contract.Projection],
    in_features: int,
    block_size: int,
    down: Tensor | None,
    kept: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`lora_matmul_backward`: dX in one kernel a layer; dA and dB, small products, by cuBLAS."""
    if dy.dtype == torch.float64 or dy.numel() == 0 or kept is not None:
        return reference.backward_reference(
            dy, x, layers, in_features, block_size, down, kept, dropout, seed, need_dx
        )  # fmt: skip
    flat = dy.reshape(-1, dy.shape[-1]).contiguous()
    dx, grads_a, grads_b = dy.new_empty(0), [], []
    first, r = 0, 0
    seen = None
    if x is not None:
        seen = x.reshape(-1, in_features).contiguous()
        if dropout > 0.0 and seed is not None:
            seen = drop(seen, dropout, growth(dropout), seed)
    for layer in layers:
        part = flat[:, first : first + layer.out_features].contiguous()
        through_b = None
        if layer.rank and layer.lora_A is not None and layer.lora_B is not None:
            through_b = part @ layer.lora_B.to(dy.dtype)
            if seen is not None and down is not None:
                mine = down[:, r : r + layer.rank]
                grads_a.append((through_b.t() @ seen).to(layer.lora_A.dtype).mul_(layer.scale))
                grads_b.append((part.t() @ mine).to(layer.lora_B.dtype).mul_(layer.scale))
        if need_dx:
            weight = weight_arguments(layer.packed, layer.absmax, layer.nested_absmax, layer.offset)
            one = dx_product(
                part, weight, in_features, block_size, through_b, layer.lora_A, layer.scale, dropout, seed
            )  # fmt: skip
            dx = dx.add_(one) if dx.numel() else one
        first, r = first + layer.out_features, r + layer.rank
    return dx.view(*dy.shape[:-1], in_features) if need_dx else dx, grads_a, grads_b


def dx_product(
    dy: Tensor,
    weight: tuple[tuple[Tensor, ...], bool],
    in_features: int,
    block_size: int,
    through_b: Tensor | None,
    lora_A: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """dX [M, K] from dY [M, N] and dY B [M, r]."""
    rows, out_features = dy.shape
    pointers, nested = weight
    dx = torch.empty(rows, in_features, dtype=dy.dtype, device=dy.device)
    rank = 0 if lora_A is None or through_b is None else lora_A.shape[0]
    masked = rank > 0 and dropout > 0.0 and seed is not None
    paired = is_paired(in_features, block_size)
    tile = tiles_for(DX_TILES, rows, dy.dtype, paired)
    launch(
        dx_kernel, (triton.cdiv(in_features, tile.k), triton.cdiv(rows, tile.m)),
        dx, dy, *pointers, through_b if rank else dy, lora_A.contiguous() if rank and lora_A is not None else dy,
        seed if masked else dy, rows, out_features, in_features, rank, scale, *mask_arguments(dropout),
        TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, TILE_R=rank_tile(rank), LORA=rank > 0, DROPOUT=masked,
        BLOCK_SIZE=block_size, NESTED=nested, PAIRED=paired,
        num_warps=tile.warps, num_stages=tile.stages, **HASH, **EXACT,
    )  # fmt: skip
    return dx
