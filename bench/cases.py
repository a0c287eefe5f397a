"""The rows of each operator: data, our call, the peers' calls and the work in it. Used by pytest and by gpu.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.shapes import Shape
from bench.timing import OURS, Case
from jindo_core.kernels import dispatch
from jindo_core.kernels.adamw import BLOCK, Update, adamw_, adamw_8bit_
from jindo_core.kernels.linear_cross_entropy import linear_cross_entropy
from jindo_core.kernels.lora_matmul import lora_matmul
from jindo_core.kernels.nf4 import nf4_dequantize
from jindo_core.kernels.rms_norm import rms_norm
from jindo_core.kernels.rope import rope
from jindo_core.kernels.swiglu import swiglu
from jindo_core.nf4 import quantize_nf4
from jindo_core.tune import random_nf4

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a double-quantized weight takes."""

EPS = 1e-5
BF16_AGREES = 4e-2
"""Two roads through bf16 differ by a few of its roundings."""


@dataclass(frozen=True)
class Setup:
    """device, dtype: of the data. quick: no rotation of inputs, for the tests of this folder."""

    device: torch.device
    dtype: torch.dtype
    quick: bool = False

    def copies(self, size: int) -> int:
        """Copies of an input of `size` bytes that no cache holds together, 16 at most."""
        return 1 if self.quick else min(max(math.ceil(2 * cache_bytes(self.device) / size), 2), 16)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def which(self, operator: str, *, rows: int | None = None, width: int = 0) -> str:
        """The name of our implementation that runs."""
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        return dispatch.choose(operator, probe, rows=rows, width=width)


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory; 32 MiB where the machine does not say, 128 MiB at most."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    said = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = said.read_text().strip() if said.exists() else "32768K"
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
    return min(int(text.rstrip("KM")) * unit, 128 << 20)


def dequantize(setup: Setup, shape: Shape, matrix: str, *, into: bool) -> Case:
    """Double-quantized codes to bf16, into a new tensor or into a buffer that is used again."""
    n, k = shape.matrices[matrix]
    weights = [random_nf4((n, k), setup.dtype, setup.device) for _ in range(setup.copies(n * k // 2))]
    buffer = torch.empty(n, k, dtype=setup.dtype, device=setup.device)
    out = buffer if into else None

    def ours(turn: int) -> Tensor:
        w = weights[turn % len(weights)]
        return nf4_dequantize(w.packed, w.absmax, w.nested_absmax, w.offset, (n, k), dtype=setup.dtype, out=out)

    others = peers.dequantize_into(weights, buffer) if into else peers.dequantize(weights, setup.dtype)
    return Case(
        "nf4", "dequantize into scratch" if into else "dequantize", f"{shape.name} {n}x{k}",
        n * k * (NF4_BYTES + setup.dtype.itemsize), "GB/s", "copy", {OURS: ours, **others},
        implementation=setup.which("nf4_dequantize"), tolerance=0.0, unlike=frozenset({"torchao"}), graph=True,
    )  # fmt: skip


def quantize(setup: Setup, shape: Shape, matrix: str) -> Case:
    """bf16 to double-quantized codes."""
    n, k = shape.matrices[matrix]
    weights = [setup.randn(n, k) * 0.02 for _ in range(setup.copies(2 * n * k))]
    others = peers.quantize(weights)
    return Case(
        "nf4", "quantize", f"{shape.name} {n}x{k}", n * k * (NF4_BYTES + setup.dtype.itemsize), "GB/s", "copy",
        {OURS: lambda turn: quantize_nf4(weights[turn % len(weights)]).packed, **others},
        implementation=setup.which("nf4_quantize"), tolerance=0.0, unlike=frozenset({"torchao"}),
    )  # fmt: skip


def lora_linear(setup: Setup, shape: Shape, matrix: str, rows: int, *, backward: bool) -> Case:
    """The LoRA linear, r = 8, without dropout; `backward` adds dX, dA and dB."""
    n, k = shape.matrices[matrix]
    r, device = 8, setup.device
    weights = [random_nf4((n, k), setup.dtype, device) for _ in range(setup.copies(n * k // 2))]
    x, dy = setup.randn(rows, k).requires_grad_(backward), setup.randn(rows, n)
    a, b = torch.randn(r, k, device=device) / math.sqrt(k), torch.randn(n, r, device=device) * 0.1
    own = (x, a.requires_grad_(backward), b.requires_grad_(backward))

    def ours(turn: int) -> Any:
        w = weights[turn % len(weights)]
        with torch.set_grad_enabled(backward):
            y = lora_matmul(x, w.packed, w.absmax, w.nested_absmax, w.offset, n, own[1], own[2], scale=2.0)
            return torch.autograd.grad(y, own, dy) if backward else y

    calls: dict[str, Callable[[int], Any]] = {OURS: ours}
    if peers.available("bitsandbytes", device) and peers.available("peft", device):

        def build() -> Callable[[int], Any]:
            layers = [layer.train(backward) for layer in peers.lora_layers(weights, a.detach(), b.detach())]

            def theirs(turn: int) -> Any:
                layer = layers[turn % len(layers)]
                leaves = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
                with torch.set_grad_enabled(backward):
                    y = layer(x)
                    return torch.autograd.grad(y, leaves, dy) if backward else y

            return theirs

        peers.add(calls, "peft + bitsandbytes", build)
    decoding = rows <= 8 and not backward
    adapter = 2 * rows * r * (n + k)
    flops = (4 * rows * n * k + 3 * adapter) if backward else (2 * rows * n * k + adapter)
    moved = n * k * NF4_BYTES + rows * (n + k) * setup.dtype.itemsize + 4 * r * (n + k)
    return Case(
        "lora_matmul", f"lora_matmul {'forward + backward' if backward else 'forward'}",
        f"{shape.name} {n}x{k} M={rows}", moved if decoding else flops, "GB/s" if decoding else "TFLOP/s",
        "read" if decoding else "gemm", calls, rows=rows, implementation=setup.which("lora_matmul", rows=rows, width=n),
        tolerance=BF16_AGREES, graph=True,
    )  # fmt: skip


def _elementwise(
    setup: Setup, operator: str, shape: str, moved: float, backward: bool, tensors: Sequence[Sequence[Tensor]],
    ours: Callable[..., Any], others: dict[str, Callable[..., Any]], frozen: Sequence[Any] = (),
) -> Case:  # fmt: skip
    """Functions of `tensors` (which take gradients) and `frozen`; `tensors` holds several copies of the inputs."""
    leaves = [[t.requires_grad_(backward) for t in copy] for copy in tensors]

    def call(function: Callable[..., Any]) -> Callable[[int], Any]:
        def run(turn: int) -> Any:
            inputs = leaves[turn % len(leaves)]
            with torch.set_grad_enabled(backward):
                result = function(*inputs, *frozen)
                if not backward:
                    return result
                outputs = result if isinstance(result, tuple) else (result,)
                return torch.autograd.grad(outputs, inputs, upstream[: len(outputs)])

        return run

    upstream: list[Tensor] = []
    if backward:
        result = ours(*leaves[0], *frozen)
        upstream = [torch.randn_like(part) for part in (result if isinstance(result, tuple) else (result,))]
    calls = {OURS: call(ours), **{name: call(function) for name, function in others.items()}}
    return Case(
        operator, f"{operator} {'forward + backward' if backward else 'forward'}", shape, moved, "GB/s", "copy", calls,
        implementation=setup.which(operator), tolerance=BF16_AGREES, graph=True,
    )  # fmt: skip


def norm(setup: Setup, shape: Shape, rows: int, *, backward: bool) -> Case:
    """RMSNorm with a frozen weight, as in LoRA training. Moved: x and y, and x, dY, dX backward."""
    size = rows * shape.hidden * setup.dtype.itemsize
    weight = torch.ones(shape.hidden, dtype=setup.dtype, device=setup.device)
    x = [[setup.randn(rows, shape.hidden)] for _ in range(setup.copies(size))]
    return _elementwise(
        setup, "rms_norm", f"{shape.name} {rows}x{shape.hidden}", size * (5 if backward else 2), backward, x,
        rms_norm, _eager_and_liger(setup, "rms_norm"), (weight, EPS),
    )  # fmt: skip


def activation(setup: Setup, shape: Shape, rows: int, *, backward: bool) -> Case:
    """SwiGLU. Moved: gate, up and h, and gate, up, dH, dGate, dUp backward."""
    size = rows * shape.inner * setup.dtype.itemsize
    pairs = [[setup.randn(rows, shape.inner) for _ in range(2)] for _ in range(setup.copies(2 * size))]
    return _elementwise(
        setup, "swiglu", f"{shape.name} {rows}x{shape.inner}", size * (8 if backward else 3), backward, pairs,
        swiglu, _eager_and_liger(setup, "swiglu"),
    )  # fmt: skip


def rotary(setup: Setup, shape: Shape, rows: int, *, backward: bool) -> Case:
    """RoPE of q and k, [1, T, heads, D]. The peers' heads come first, and their cos and sin are whole and rounded."""
    d = shape.hidden // shape.heads
    size = rows * (shape.heads + shape.groups) * d * setup.dtype.itemsize
    inputs = [
        [setup.randn(1, rows, heads, d) for heads in (shape.heads, shape.groups)] for _ in range(setup.copies(size))
    ]
    angle = torch.rand(1, rows, d // 2, device=setup.device) * 6.28
    cos, sin = angle.cos(), angle.sin()
    whole = [torch.cat((t, t), dim=-1)[:, None].to(setup.dtype) for t in (cos, sin)]

    def theirs(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(q: Tensor, k: Tensor, *_: Tensor) -> Any:
            turned = function(q.transpose(1, 2), k.transpose(1, 2), *whole)
            return tuple(t.transpose(1, 2) for t in turned)

        return run

    others = {name: theirs(function) for name, function in _eager_and_liger(setup, "rope").items()}
    return _elementwise(
        setup, "rope", f"{shape.name} {rows}x{shape.heads}+{shape.groups}x{d}", size * (4 if backward else 2), backward,
        inputs, rope, others, (cos, sin),
    )  # fmt: skip


def _eager_and_liger(setup: Setup, operator: str) -> dict[str, Callable[..., Any]]:
    return {"eager": getattr(peers, operator)} | peers.liger(setup.device, operator)


def loss(setup: Setup, shape: Shape, rows: int) -> Case:
    """Linear + cross entropy with the gradient of the hidden states; the head is frozen."""
    head = setup.randn(shape.vocab, shape.hidden) * 0.02
    labels = torch.randint(0, shape.vocab, (rows,), device=setup.device)
    hidden = setup.randn(rows, shape.hidden).requires_grad_()

    def with_gradient(function: Callable[..., Tensor]) -> Callable[[int], Any]:
        def run(_: int) -> Any:
            value = function(hidden, head, labels)
            return value.detach(), torch.autograd.grad(value, hidden)[0]

        return run

    calls = {OURS: with_gradient(linear_cross_entropy)}
    calls |= {name: with_gradient(f) for name, f in _eager_and_liger(setup, "linear_cross_entropy").items()}
    return Case(
        "linear_cross_entropy", "linear_cross_entropy forward + backward",
        f"{shape.name} {rows}x{shape.hidden}x{shape.vocab}",
        4 * rows * shape.hidden * shape.vocab, "TFLOP/s", "gemm", calls, rows=rows,
        implementation=setup.which("linear_cross_entropy"), tolerance=BF16_AGREES,
    )  # fmt: skip


def adamw(setup: Setup, shape: Shape, *, eight: bool = False) -> Case:
    """One AdamW step over a model's adapters (r = 8, all linears), ours over one flat tensor of all of them: parameter,
    gradient and both moments read, all but the gradient written. `eight`: with 8-bit moments."""
    matrices = [s for s in shape.matrices.values() for _ in range(3 * shape.layers)]
    sizes = [size for n, k in matrices for size in ((8, k), (n, 8))]

    def parameters() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.randn(size, device=setup.device)) for size in sizes]
        for parameter in made:
            parameter.grad = torch.randn_like(parameter)
        return made

    count = sum(math.prod(size) for size in sizes)
    flat, grad = torch.randn(count, device=setup.device), torch.randn(count, device=setup.device)
    update = Update(1e-4, 0.9, 0.999, 1e-8, 0.0, 10)
    optimizers: dict[str, Any] = {}
    bnb = peers.load("bitsandbytes") if peers.available("bitsandbytes", setup.device) else None
    if eight:
        codes = [torch.randint(0, 256, (count,), dtype=torch.uint8, device=setup.device) for _ in range(2)]
        absmax = [torch.rand(-(-count // BLOCK), device=setup.device) for _ in range(2)]
        if setup.device.type == "cuda" and bnb:
            optimizers["bitsandbytes"] = bnb.optim.AdamW8bit(parameters(), lr=1e-4, weight_decay=0.0)
    else:
        moments = torch.randn(count, device=setup.device), torch.rand(count, device=setup.device)
        optimizers["torch"] = torch.optim.AdamW(parameters(), lr=1e-4, weight_decay=0.0)
        optimizers["torch fused"] = torch.optim.AdamW(parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        if setup.device.type == "cuda" and bnb:
            optimizers["bitsandbytes paged"] = bnb.optim.PagedAdamW32bit(parameters(), lr=1e-4, weight_decay=0.0)

    def ours(_: int) -> None:
        if eight:
            adamw_8bit_(flat, grad, *codes, *absmax, update)
        else:
            adamw_(flat, grad, *moments, update)

    calls = {OURS: ours} | {name: lambda _, o=optimizer: o.step() for name, optimizer in optimizers.items()}
    name = "adamw step, 8-bit moments" if eight else "adamw step"
    return Case(
        "adamw", name, f"{shape.name} {count / 1e6:.1f}M", (16 if eight else 28) * count, "GB/s", "copy", calls,
        implementation=setup.which("adamw"),
    )  # fmt: skip


def operator_cases(
    setup: Setup, shape: Shape, rows: Sequence[int], few: Sequence[int] = (1, 4)
) -> Iterator[Callable[[], Case]]:
    """All rows of a model's layers, each made when called: gpu.py's list."""
    make: Callable[..., Case]
    for matrix in shape.matrices:
        for into in (True, False):
            yield functools.partial(dequantize, setup, shape, matrix, into=into)
        yield functools.partial(quantize, setup, shape, matrix)
        for count in few:
            yield functools.partial(lora_linear, setup, shape, matrix, count, backward=False)
        for count in rows:
            for backward in (False, True):
                yield functools.partial(lora_linear, setup, shape, matrix, count, backward=backward)
    for make in (norm, activation, rotary):
        for backward in (False, True):
            yield functools.partial(make, setup, shape, max(rows), backward=backward)
    yield functools.partial(loss, setup, shape, max(rows))
    for eight in (False, True):
        yield functools.partial(adamw, setup, shape, eight=eight)
