"""The launcher of Triton kernels, as far as it can be seen without a GPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from jindo_core.kernels import launch as module
from jindo_core.kernels import rope_triton

MODULES = sorted(path.stem for path in Path(rope_triton.__file__).parent.glob("*_triton.py"))


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that notes what it is launched with, and the launcher that takes it for Triton's."""
    launched = []

    class Kernel:
        def __init__(self):
            names = ("x", "n", "s", "TILE", "WIDE")
            self.params = [SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in names]

        def __getitem__(self, grid):
            def run(*args, **constants):
                launched.append(("compiled", grid, args, constants))
                return Compiled()

            return run

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: launched.append(("again", grid, args))

    monkeypatch.setattr(module, "JITFunction", Kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel(), launched


def test_a_second_launch_of_the_same_kind_skips_triton(kernel):
    run, launched = kernel
    x = torch.zeros(64)
    module.launch(run, (3,), x, 48, 0.5, WIDE=True, TILE=16, num_warps=4)
    module.launch(run, (5, 2), x[16:], 32, 0.25, WIDE=True, TILE=16, num_warps=4)
    assert launched[0] == ("compiled", (3,), (x, 48, 0.5), {"WIDE": True, "TILE": 16, "num_warps": 4})
    assert launched[1][:2] == ("again", (5, 2, 1))
    assert launched[1][2][1:] == (32, 0.25, 16, True)  # constexprs in the kernel's order


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(64, dtype=torch.float16), 48, 0.5, 16),  # another dtype
        (torch.zeros(65)[1:], 48, 0.5, 16),  # not aligned
        (torch.zeros(64), 47, 0.5, 16),  # not divisible
        (torch.zeros(64), 1, 0.5, 16),  # a constant to Triton
        (torch.zeros(64), 2**31, 0.5, 16),  # wider
        (torch.zeros(64), 48, 0.5, 32),  # another tile
    ],
)
def test_another_specialization_is_triton_s(kernel, other):
    run, launched = kernel
    *args, tile = other
    module.launch(run, (3,), torch.zeros(64), 48, 0.5, TILE=16, WIDE=True)
    module.launch(run, (3,), *args, TILE=tile, WIDE=True)
    assert [kind for kind, *_ in launched] == ["compiled", "compiled"]


@pytest.mark.parametrize("name", MODULES)
def test_constexprs_come_last_and_a_tensor_first(name):
    found = vars(importlib.import_module(f"jindo_core.kernels.{name}"))
    kernels = [value for key, value in found.items() if key.endswith("_kernel")]
    assert kernels
    for kernel in kernels:
        if not isinstance(kernel, triton.runtime.jit.JITFunction):  # the interpreter's
            continue
        flags = [parameter.is_constexpr for parameter in kernel.params]
        assert flags == sorted(flags)
        assert kernel.params[0].name.endswith("_ptr")
