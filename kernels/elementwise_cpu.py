"""RMSNorm, SwiGLU and RoPE on the CPU, in C (csrc/elementwise.c): one pass each, fp32 inside.

Contracts: rms_norm.py, swiglu.py, rope.py, whose references take what C does not: fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jindo_core.kernels import native, rms_norm, swiglu
from jindo_core.kernels import rope as reference
from jindo_core.kernels.native import FLOAT, INT, LONG, POINTER, TYPES, address


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm`."""
    if x.dtype not in TYPES:
        return rms_norm.forward_reference(x, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    size = x.shape[-1]
    rows = x.numel() // size
    y, rstd = torch.empty_like(x), torch.empty(rows)
    run = native.function("jindo_rms_norm", POINTER, POINTER, FLOAT, LONG, LONG, INT, POINTER, POINTER)
    run(address(x), address(weight), eps, rows, size, TYPES[x.dtype], address(y), address(rstd))
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """`rms_norm_backward`; dW, which frozen norms never need, comes from the reference."""
    if need_dweight or x.dtype not in TYPES:
        return rms_norm.backward_reference(dy, x, weight, rstd, need_dweight)
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    size = x.shape[-1]
    dx = torch.empty_like(x)
    run = native.function(
        "jindo_rms_norm_backward", POINTER, POINTER, POINTER, POINTER, LONG, LONG, INT, POINTER
    )
    run(
        address(dy), address(x), address(weight), address(rstd), x.numel() // size, size, TYPES[x.dtype], address(dx)
    )  # fmt: skip
    return dx, dy.new_empty(0)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x with its rows at one distance, and that distance, in elements."""
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]  # a view wherever one distance serves
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu`."""
    if gate.dtype not in TYPES:
        return swiglu.forward_reference(gate, up)
    h = torch.empty(gate.shape, dtype=gate.dtype)
    _swiglu(None, gate, up, h, None, None)
    return h


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu_backward`."""
    if gate.dtype not in TYPES:
        return swiglu.backward_reference(dh, gate, up)
    dgate, dup = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(up.shape, dtype=up.dtype)
    _swiglu(dh.contiguous(), gate, up, None, dgate, dup)
    return dgate, dup


def _swiglu(
    dh: Tensor | None, gate: Tensor, up: Tensor, h: Tensor | None, dgate: Tensor | None, dup: Tensor | None
) -> None:
    kind = TYPES[gate.dtype]
    (gate, gate_stride), (up, up_stride) = _rows(gate), _rows(up)
    run = native.function(
        "jindo_swiglu", POINTER, POINTER, LONG, POINTER, LONG, LONG, LONG, INT, POINTER, POINTER, POINTER
    )
    run(
        address(dh), address(gate), gate_stride, address(up), up_stride, gate.shape[0], gate.shape[1], kind,
        address(h), address(dgate), address(dup),
    )  # fmt: skip


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """`rope`."""
    if q.dtype not in TYPES:
        return reference.rope_reference(q, k, cos, sin, inverse)
    run = native.function(
        "jindo_rope", POINTER, LONG, LONG, LONG, LONG, LONG, LONG, LONG, POINTER, POINTER, LONG, FLOAT, INT, POINTER
    )
    cos, sin = cos.contiguous(), sin.contiguous()
    apart = 0 if cos.shape[0] == 1 else cos.shape[1] * cos.shape[2]

    def turn(x: Tensor) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        run(
            address(x), *x.shape, *x.stride()[:3], address(cos), address(sin), apart, -1.0 if inverse else 1.0,
            TYPES[x.dtype], address(out),
        )  # fmt: skip
        return out

    return turn(q), turn(k)
