"""The only place that chooses which implementation of an operator runs.

The choice depends on the device, its compute capability, the number of rows (crossovers.py) and the width of the
result; `override` forces one for tests and benchmarks. Triton is imported only when a kernel of it was chosen, so
that everything imports and runs without Triton and without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jindo_core.kernels import crossovers, native

# operator -> implementation -> "module:function". The reference always exists.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "nf4_quantize": {
        "reference": "nf4:quantize_reference",
        "cpu": "nf4_cpu:quantize",
        "triton": "nf4_triton:quantize",
    },
    "nf4_quantize_absmax": {
        "reference": "nf4:quantize_absmax_reference",
        "cpu": "nf4_cpu:quantize_absmax",
    },
    "nf4_dequantize": {
        "reference": "nf4:dequantize_reference",
        "cpu": "nf4_cpu:dequantize",
        "triton": "nf4_triton:dequantize",
    },
    "lora_matmul": {
        "reference": "lora_matmul_reference:forward_reference",
        "cpu": "lora_matmul_cpu:forward",
        "triton": "lora_matmul_triton:forward",
        "gemv": "lora_gemv_triton:forward",
    },
    "lora_matmul_backward": {
        "reference": "lora_matmul_reference:backward_reference",
        "triton": "lora_matmul_triton:backward",
    },
    "dropout_mask": {
        "reference": "dropout:mask_reference",
        "cpu": "lora_matmul_cpu:mask",
        "triton": "lora_matmul_triton:mask",
    },
    "linear_cross_entropy": {
        "reference": "linear_cross_entropy:forward_reference",
        "cpu": "linear_cross_entropy_cpu:forward",
        "triton": "linear_cross_entropy_triton:forward",
    },
    "attention": {
        "reference": "attention:forward_reference",
        "cpu": "attention_cpu:forward",
    },
    "attention_backward": {
        "reference": "attention:backward_reference",
        "cpu": "attention_cpu:backward",
    },
    "rms_norm": {
        "reference": "rms_norm:forward_reference",
        "cpu": "elementwise_cpu:rms_norm_forward",
        "triton": "rms_norm_triton:forward",
    },
    "rms_norm_backward": {
        "reference": "rms_norm:backward_reference",
        "cpu": "elementwise_cpu:rms_norm_backward",
        "triton": "rms_norm_triton:backward",
    },
    "swiglu": {
        "reference": "swiglu:forward_reference",
        "cpu": "elementwise_cpu:swiglu_forward",
        "triton": "swiglu_triton:forward",
    },
    "swiglu_backward": {
        "reference": "swiglu:backward_reference",
        "cpu": "elementwise_cpu:swiglu_backward",
        "triton": "swiglu_triton:backward",
    },
    "adamw": {
        "reference": "adamw:step_reference",
        "cpu": "adamw_cpu:step",
        "triton": "adamw_triton:step",
    },
    "adamw_8bit": {
        "reference": "adamw:step_8bit_reference",
        "cpu": "adamw_cpu:step_8bit",
        "triton": "adamw_triton:step_8bit",
    },
    "rope": {
        "reference": "rope:rope_reference",
        "cpu": "elementwise_cpu:rope",
        "triton": "rope_triton:rope",
    },
}

_override: ContextVar[tuple[str | None, str | None]] = ContextVar("jindo_override", default=(None, None))


@contextlib.contextmanager
def override(name: str | None, *, only: str | None = None) -> Iterator[None]:
    """Run every operator that has an implementation called `name` with it, whatever the device.

    Args:
        only: the one operator that is meant; those that it calls are chosen as ever.
    """
    token = _override.set((name, only))
    try:
        yield
    finally:
        _override.reset(token)


class Pretended(NamedTuple):
    """A GPU that is not here."""

    capability: tuple[int, int]
    multiprocessors: int


_pretended: ContextVar[Pretended | None] = ContextVar("jindo_pretended", default=None)


@contextlib.contextmanager
def pretend_cuda(capability: tuple[int, int] = (8, 6), multiprocessors: int = 40) -> Iterator[None]:
    """Choose for every tensor as on a GPU with Triton, to reckon with one; what is chosen can't be run."""
    token = _pretended.set(Pretended(capability, multiprocessors))
    try:
        yield
    finally:
        _pretended.reset(token)


FUSED_TILE = 64
"""Columns of the result that a program of the fused products makes."""


def choose(operator: str, tensor: Tensor, *, rows: int | None = None, width: int = 0) -> str:
    """The name of the implementation that runs.

    Args:
        operator: a key of `IMPLEMENTATIONS`.
        tensor: an operand; its device decides.
        rows: M, the rows of the activation, for operators whose best choice depends on it.
        width: the least columns of a result [M, width] of theirs.
    """
    available = IMPLEMENTATIONS[operator]
    forced, only = _override.get()
    if forced is not None and forced in available and only in (None, operator):
        return forced
    pretended = _pretended.get()
    if tensor.device.type == "cpu" and pretended is None:
        if rows is not None and rows > crossovers.find("cpu").gemv_max_rows:
            return "reference"
        # fp64 is the oracle's dtype: only the reference takes it.
        usable = "cpu" in available and tensor.dtype != torch.float64 and native.library() is not None
        return "cpu" if usable else "reference"
    if "triton" not in available or (pretended is None and (tensor.device.type != "cuda" or not _triton_found())):
        return "reference"
    if rows is None:
        return "triton"
    capability = pretended.capability if pretended else _capability(tensor.device)
    crossover = crossovers.find("cuda-{}.{}".format(*capability))
    if "gemv" in available and rows <= crossover.gemv_max_rows:
        return "gemv"
    # No tensor cores for Triton before sm_80 (and none of its dots): scratch + cuBLAS there, and above the
    # crossover. That path is the reference, whose dequantize is the Triton kernel.
    fused = capability >= (8, 0) and rows <= crossover.fused_max_rows
    # With fewer tiles than multiprocessors it takes twice as long as dequantize + GEMM, with enough of them 0.6 times.
    multiprocessors = pretended.multiprocessors if pretended else _multiprocessors(tensor.device)
    return "triton" if fused and width >= FUSED_TILE * multiprocessors else "reference"


def implementation(
    operator: str, tensor: Tensor, *, rows: int | None = None, width: int = 0
) -> Callable[..., Any]:
    """The function that `choose` names."""
    chosen = choose(operator, tensor, rows=rows, width=width)
    run = _load(IMPLEMENTATIONS[operator][chosen])
    return _under_its_name(f"jindo::{operator} ({chosen})", run) if _naming else run


_naming = 0
"""How many `named` blocks are open: a number, for what every call asks must cost nothing."""


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Inside, torch's profiler sees every operator under its name and its implementation's: of what is called in C it
    would see nothing."""
    global _naming
    _naming += 1
    try:
        yield
    finally:
        _naming -= 1


def _under_its_name(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def under(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return run(*args, **kwargs)

    return under


def recorded(x: Tensor) -> bool:
    """Whether something other than autograd follows the call: torch.compile, export, a subclass of Tensor, a dispatch
    mode. (The transforms of torch.func take neither road.)

    Then it goes through the operator registered in torch.ops. Else straight to an autograd.Function: the registered
    operator's own cost in Python is several times a small kernel's time (docs/log.md).
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


@functools.cache
def _load(path: str) -> Callable[..., Any]:
    module, function = path.split(":")
    return getattr(importlib.import_module(f"jindo_core.kernels.{module}"), function)


@functools.cache
def _triton_found() -> bool:
    if importlib.util.find_spec("triton") is None:
        warnings.warn("Triton is not installed: the slower PyTorch path runs on the GPU.", stacklevel=3)
        return False
    return True


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
