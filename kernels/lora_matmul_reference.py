"""The LoRA linear in PyTorch, for any device and any number of rows: W goes through a scratch buffer, then plain matrix
products. On a GPU this is the path for many rows, with the dequantize as its one kernel. Contract: lora_matmul.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jindo_core.kernels.dropout import growth, mask
from jindo_core.kernels.lora_matmul import Projection
from jindo_core.kernels.scratch import scratch


def forward_reference(
    x: Tensor, layers: Sequence[Projection], block_size: int, dropout: float, seed: Tensor | None, keep_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantize each W into a scratch buffer, then plain matrix products, the adapter's first: the product with W
    adds to it where it is stored. Returns y, D(x)A^T [M, sum of r], and W [sum of N, K] where it is kept."""
    in_features = x.shape[-1]
    flat = x.reshape(-1, in_features)
    rows, width = flat.shape[0], sum(layer.out_features for layer in layers)
    # No view is returned: autograd lets nobody change the view of a Function in place, as Falcon does.
    whole = x.new_empty(*x.shape[:-1], width)
    y = whole.view(rows, whole.shape[-1])
    kept = x.new_empty(width if keep_weight else 0, in_features)
    down = down_product(flat, layers, dropout, seed)
    first, r = 0, 0
    for layer in layers:
        n = slice(first, first + layer.out_features)
        first = n.stop
        w = kept[n] if keep_weight else scratch((layer.out_features, in_features), x.dtype, x.device)
        layer.dequantize_into(w, block_size)
        if layer.lora_B is None or not layer.rank:
            torch.mm(flat, w.t(), out=y[:, n])
            continue
        mine, up = down[:, r : r + layer.rank], layer.lora_B.to(x.dtype)
        torch.addmm(y[:, n], mine, up.t(), beta=0, alpha=layer.scale, out=y[:, n])
        y[:, n].addmm_(flat, w.t())
        r += layer.rank
    return whole, down, kept


def down_product(flat: Tensor, layers: Sequence[Projection], dropout: float, seed: Tensor | None) -> Tensor:
    """D(x) A^T of all layers side by side, [M, sum of r]."""
    a = _stacked_A(layers, flat.dtype)
    if a is None:
        return flat.new_empty(flat.shape[0], 0)
    if dropout == 0.0 or seed is None:
        return flat @ a.t()
    # The growth goes onto the r columns of the product, not onto the K of x.
    return (mask(flat, dropout, seed) @ a.t()).mul_(growth(dropout))


def _stacked_A(layers: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    """A of all layers, [sum of r, K]; None without adapters."""
    stacked = [layer.lora_A for layer in layers if layer.lora_A is not None and layer.rank]
    if not stacked:
        return None
    return (torch.cat(stacked) if len(stacked) > 1 else stacked[0]).to(dtype)


def backward_reference(
    dy: Tensor,
    x: Tensor | None,
    layers: Sequence[Projection],
    in_features: int,
    block_size: int,
    down: Tensor | None,
    kept: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns dX (empty where not asked for), and dA and dB of the layers with an adapter, when x is given."""
    flat = dy.reshape(-1, dy.shape[-1])
    parts = list(flat.split([layer.out_features for layer in layers], dim=1))
    adapted = [(layer, part) for layer, part in zip(layers, parts, strict=True) if layer.rank]
    masked = dropout > 0 and seed is not None
    through_b = flat.new_empty(flat.shape[0], sum(layer.rank for layer, _ in adapted))
    r = 0
    for layer, part in adapted:
        assert layer.lora_B is not None
        mine = through_b[:, r : r + layer.rank]
        torch.addmm(mine, part, layer.lora_B.to(dy.dtype), beta=0, alpha=layer.scale, out=mine)
        r += layer.rank
    grads_a: list[Tensor] = []
    grads_b: list[Tensor] = []
    if x is not None and down is not None and adapted:
        seen = x.reshape(-1, in_features)
        grads_a, grads_b = _adapter_gradients(seen, adapted, through_b, down, dropout if masked else 0.0, seed)
    dx = dy.new_empty(0)
    if need_dx:
        dx = _dx(parts, layers, in_features, block_size, through_b, kept, dropout if masked else 0.0, seed)
        dx = dx.view(*dy.shape[:-1], in_features)
    return dx, grads_a, grads_b


def _adapter_gradients(
    x: Tensor,
    adapted: Sequence[tuple[Projection, Tensor]],
    through_b: Tensor,
    down: Tensor,
    dropout: float,
    seed: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """dA and dB of each layer and its part of dY; D(x) is gone again when dX is made."""
    masked = dropout > 0 and seed is not None
    grad_a = through_b.t() @ (mask(x, dropout, seed) if masked and seed is not None else x)
    grads_a, grads_b, r = [], [], 0
    for layer, part in adapted:
        assert layer.lora_A is not None
        assert layer.lora_B is not None
        columns = slice(r, r + layer.rank)
        own = grad_a[columns].to(layer.lora_A.dtype, copy=True)
        grads_a.append(own.mul_(growth(dropout)) if masked else own)
        # (d^T dY)^T, not dY^T d: the long side stays contiguous.
        grad_b = part.new_empty(layer.rank, part.shape[1])
        torch.addmm(grad_b, down[:, columns].t(), part, beta=0, alpha=layer.scale, out=grad_b)
        grads_b.append(torch.empty_like(layer.lora_B).copy_(grad_b.t()))
        r = columns.stop
    return grads_a, grads_b


def _dx(
    parts: Sequence[Tensor],
    layers: Sequence[Projection],
    in_features: int,
    block_size: int,
    through_b: Tensor,
    kept: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """dX [M, K] = sum over the layers of dY W + s D'((dY B) A)."""
    dy = parts[0]
    dx = dy.new_empty(dy.shape[0], in_features)
    a = _stacked_A(layers, dy.dtype)
    started = a is not None
    if a is not None:
        torch.mm(through_b, a, out=dx)
        if dropout > 0 and seed is not None:
            dx = mask(dx, dropout, seed).mul_(growth(dropout))
    first = 0
    for layer, part in zip(layers, parts, strict=True):
        if kept is not None:
            w = kept[first : first + layer.out_features]
        else:
            w = scratch((layer.out_features, in_features), dy.dtype, dy.device)
            layer.dequantize_into(w, block_size)
        dx = dx.addmm_(part, w) if started else torch.mm(part, w, out=dx)
        started = True
        first += layer.out_features
    return dx
