"""Which implementation runs where. No GPU is needed to ask."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from jindo_core.kernels import dispatch, nf4

CUDA = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
CPU = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
FUSED = ["lora_matmul", "lora_matmul_backward"]


@pytest.fixture
def gpu(monkeypatch):
    """gpu(major, minor): the dispatcher believes in a GPU of that capability, with Triton."""

    def make(*capability):
        monkeypatch.setattr(dispatch, "_capability", lambda _: capability)
        monkeypatch.setattr(dispatch, "_triton_found", lambda: True)

    return make


@pytest.mark.parametrize("operator", dispatch.IMPLEMENTATIONS)
def test_cpu_runs_the_c_kernels_where_there_are_any(operator, monkeypatch):
    built = "cpu" if "cpu" in dispatch.IMPLEMENTATIONS[operator] else "reference"
    assert dispatch.choose(operator, CPU, rows=1) == built
    wide = SimpleNamespace(device=CPU.device, dtype=torch.float64)
    assert dispatch.choose(operator, wide, rows=1) == "reference"
    monkeypatch.setattr(dispatch.native, "library", lambda: None)
    assert dispatch.choose(operator, CPU, rows=1) == "reference"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_gpu_runs_the_elementwise_kernels_of_triton(capability, gpu):
    gpu(*capability)
    assert dispatch.choose("nf4_quantize", CUDA) == "triton"
    assert dispatch.choose("nf4_dequantize", CUDA) == "triton"
    assert dispatch.choose("nf4_quantize_absmax", CUDA) == "reference"
    for operator in ("linear_cross_entropy", "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rope"):
        assert dispatch.choose(operator, CUDA) == "triton"


@pytest.mark.parametrize("operator", FUSED)
@pytest.mark.parametrize(("capability", "limit"), dispatch.FUSED_MAX_ROWS.items())
def test_few_rows_are_fused_up_to_the_crossover(operator, capability, limit, gpu):
    gpu(*capability)
    assert dispatch.choose(operator, CUDA, rows=1) == "triton"
    assert dispatch.choose(operator, CUDA, rows=limit) == "triton"
    assert dispatch.choose(operator, CUDA, rows=limit + 1) == "reference"
    assert dispatch.choose(operator, CUDA, rows=8192) == "reference"


@pytest.mark.parametrize("operator", FUSED)
@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_no_dot_of_triton_before_sm_80(operator, capability, gpu):
    gpu(*capability)
    for rows in (1, 2, 4, 16, 64, 4096):
        assert dispatch.choose(operator, CUDA, rows=rows) == "reference"


def test_override_wins_and_ends_with_its_block():
    with dispatch.override("triton"):
        assert dispatch.choose("lora_matmul", CPU, rows=8192) == "triton"
        with dispatch.override("reference"):
            assert dispatch.choose("lora_matmul", CPU, rows=1) == "reference"
        assert dispatch.choose("nf4_dequantize", CPU) == "triton"
        assert dispatch.choose("nf4_quantize_absmax", CPU) == "cpu", "has no such implementation"
    assert dispatch.choose("nf4_dequantize", CPU) == "cpu"


def test_override_ends_when_its_block_fails():
    with pytest.raises(RuntimeError), dispatch.override("triton"):
        raise RuntimeError
    assert dispatch.choose("nf4_dequantize", CPU) == "cpu"


def test_without_triton_the_gpu_runs_the_reference_and_says_so(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: None)
    dispatch._triton_found.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton is not installed"):
            assert dispatch.choose("nf4_dequantize", CUDA) == "reference"
        assert dispatch.choose("lora_matmul", CUDA, rows=1) == "reference"
    finally:
        dispatch._triton_found.cache_clear()


@pytest.mark.parametrize("operator", dispatch.IMPLEMENTATIONS)
def test_implementations_exist_and_take_the_reference_s_arguments(operator):
    available = dispatch.IMPLEMENTATIONS[operator]
    reference = list(inspect.signature(dispatch._load(available["reference"])).parameters)
    for path in available.values():
        assert list(inspect.signature(dispatch._load(path)).parameters) == reference


def test_the_chosen_implementation_is_what_the_operator_runs(monkeypatch):
    calls = []

    def spy(*args):
        calls.append(args)
        return nf4.quantize_reference(*args)

    monkeypatch.setattr(dispatch, "_load", lambda path: calls.append(path) or spy)
    nf4.nf4_quantize(torch.ones(64))
    assert calls[0] == "nf4_cpu:quantize"
    assert calls[1][1] == 64


def test_everything_imports_and_runs_without_triton():
    """In a process where Triton cannot be imported."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from jindo_core.kernels import dispatch, linear_cross_entropy, lora_matmul, nf4
w = torch.randn(8, 64)
packed, absmax = nf4.nf4_quantize(w)
parts = nf4.nf4_quantize_absmax(absmax)
y = lora_matmul.lora_matmul(torch.randn(2, 64), packed, *parts, 8)
linear_cross_entropy.linear_cross_entropy(y, torch.randn(5, 8), torch.tensor([0, 1]))
assert not any(name.startswith("jindo_core.kernels.") and name.endswith("_triton") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
