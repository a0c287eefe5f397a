"""Launching Triton kernels with little Python.

Triton's own launcher works out anew, at every call, what its arguments are specialized for: tens of microseconds,
more than most of these kernels run. Here that is one dictionary lookup.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)` on the device of the first argument.

    Args:
        kernel: whose constexpr parameters come last. args: its other arguments (tensors, integers, floats), a tensor
            first.
        constants: its constexprs by name, and launch options (num_warps, num_stages, enable_fp_fusion).
    """
    # A stand-in for a kernel (Triton's interpreter, a test's recorder) has its own way; AMD's compiler specializes
    # for more than `_kind` tells apart.
    if not isinstance(kernel, JITFunction) or torch.version.hip:
        kernel[grid](*args, **constants)
        return
    first = args[0]
    assert isinstance(first, Tensor)
    if first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            _launch(kernel, grid, args, constants)
    else:
        _launch(kernel, grid, args, constants)


def _launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    key = (kernel, torch.cuda.current_device(), tuple(constants.items()), *map(_kind, args))
    held = _compiled.get(key)
    if held is None:
        names = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
        assert [parameter.name for parameter in kernel.params[len(args) :]] == names
        _compiled[key] = kernel[grid](*args, **constants), tuple(constants[name] for name in names)
    else:
        compiled, constexprs = held
        compiled[(*grid, 1, 1)[:3]](*args, *constexprs)


def _kind(value: Tensor | int | float) -> object:
    """What Triton specializes a kernel for: a pointer's type and 16-byte alignment; of an integer whether it is 1,
    whether 16 divides it, and its width; of a float nothing."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return None
    return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
