"""Which implementation runs where. No GPU is needed to ask."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jindo_core.kernels import crossovers, dispatch, nf4
from jindo_core.kernels.swiglu import swiglu

CUDA = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
CPU = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
FUSED = ["lora_matmul", "lora_matmul_backward"]


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    """No table of the user's, until a test writes one."""
    monkeypatch.setenv("JINDO_CACHE", str(tmp_path))
    crossovers.forget()
    yield tmp_path / "crossovers.json"
    crossovers.forget()


@pytest.fixture
def gpu(monkeypatch):
    """gpu(major, minor): the dispatcher believes in a GPU of that capability, with Triton."""

    def make(*capability):
        monkeypatch.setattr(dispatch, "_capability", lambda _: capability)
        monkeypatch.setattr(dispatch, "_triton_found", lambda: True)
        monkeypatch.setattr(dispatch, "_multiprocessors", lambda _: 100)

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
@pytest.mark.parametrize(("capability", "limit"), [((8, 0), 32), ((8, 6), 64), ((8, 9), 64), ((9, 0), 64)])
def test_few_rows_are_fused_up_to_the_crossover(operator, capability, limit, gpu):
    gpu(*capability)
    wide = {"width": 6400}
    assert dispatch.choose(operator, CUDA, rows=1, **wide) == ("gemv" if operator == "lora_matmul" else "triton")
    assert dispatch.choose(operator, CUDA, rows=5, **wide) == "triton"
    assert dispatch.choose(operator, CUDA, rows=limit, **wide) == "triton"
    assert dispatch.choose(operator, CUDA, rows=limit + 1, **wide) == "reference"
    assert dispatch.choose(operator, CUDA, rows=8192, **wide) == "reference"
    assert dispatch.choose(operator, CUDA, rows=5, width=6399) == "reference", "a tile for every multiprocessor"


@pytest.mark.parametrize("operator", FUSED)
@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_no_dot_of_triton_before_sm_80(operator, capability, gpu, own_table):
    row = {"gemv_max_rows": 4, "fused_max_rows": 64}
    own_table.write_text(json.dumps({"cuda-7.0": row, "cuda-7.5": row, "cuda-8.0": row}))
    gpu(8, 0)
    assert dispatch.choose(operator, CUDA, rows=16, width=6400) == "triton", "else the test could not fail"
    gpu(*capability)
    for rows in (1, 2, 4, 16, 64, 4096):
        chosen = dispatch.choose(operator, CUDA, rows=rows, width=6400)
        assert chosen == ("gemv" if rows <= 4 and operator == "lora_matmul" else "reference")


def test_the_gemv_of_triton_runs_up_to_its_crossover(gpu):
    for capability in [(7, 5), (8, 0), (9, 0), (12, 0)]:
        gpu(*capability)
        assert dispatch.choose("lora_matmul", CUDA, rows=1) == "gemv"
        assert dispatch.choose("lora_matmul", CUDA, rows=4) == "gemv"
        beyond = "triton" if (8, 0) <= capability < (10,) else "reference"
        assert dispatch.choose("lora_matmul", CUDA, rows=5, width=6400) == beyond


def test_the_user_s_rows_win_and_the_others_stay(gpu, own_table):
    own = {"cuda-8.0": {"gemv_max_rows": 0, "fused_max_rows": 3}, "cpu": {"gemv_max_rows": 2}}
    own_table.write_text(json.dumps(own))
    gpu(8, 0)
    assert dispatch.choose("lora_matmul", CUDA, rows=1, width=6400) == "triton"
    assert dispatch.choose("lora_matmul_backward", CUDA, rows=3, width=6400) == "triton"
    assert dispatch.choose("lora_matmul_backward", CUDA, rows=4, width=6400) == "reference"
    gpu(8, 6)
    assert dispatch.choose("lora_matmul", CUDA, rows=64, width=6400) == "triton"
    assert dispatch.choose("lora_matmul", CPU, rows=3) == "reference"


def test_the_shipped_rows_are_estimates_until_they_are_measured():
    rows = json.loads(crossovers.SHIPPED.read_text())
    assert {"cpu", "cuda"} <= set(rows)
    assert all(isinstance(row["measured"], bool) for row in rows.values())
    assert crossovers.find("cuda-12.0") == crossovers.find("cuda")
    assert crossovers.find("cuda-7.5").fused_max_rows == 0


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "is no JSON"),
        ("[]", "holds a list"),
        ('{"cpu": 3}', "cpu has no gemv_max_rows"),
        ('{"cpu": {"fused_max_rows": 3}}', "cpu has no gemv_max_rows"),
        ('{"cpu": {"gemv_max_rows": -1}}', "gemv_max_rows -1"),
        ('{"cpu": {"gemv_max_rows": true}}', "gemv_max_rows True"),
        ('{"cuda-8.0": {"gemv_max_rows": 1, "fused_max_rows": "x"}}', "fused_max_rows 'x'"),
        ('{"tpu": {"gemv_max_rows": 1}}', "got the row 'tpu'"),
    ],
)
def test_a_broken_table_is_an_error_that_names_it(text, part, own_table):
    own_table.write_text(text)
    with pytest.raises(crossovers.CrossoverError) as caught:
        dispatch.choose("lora_matmul", CPU, rows=1)
    assert str(own_table) in str(caught.value)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_override_of_one_operator_leaves_the_others():
    with dispatch.override("triton", only="lora_matmul"):
        assert dispatch.choose("lora_matmul", CPU, rows=1) == "triton"
        assert dispatch.choose("nf4_dequantize", CPU) != "triton"


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


def test_a_user_s_table_of_an_earlier_version_is_refused(gpu, own_table):
    own_table.write_text(json.dumps({"cuda-8.0": {"gemv_max_rows": 4, "fused_dx_max_rows": 3}}))
    gpu(8, 0)
    with pytest.raises(crossovers.CrossoverError, match="no fused_max_rows: delete the file and run jindo-core tune"):
        dispatch.choose("lora_matmul", CUDA, rows=1)


def test_a_dispatch_mode_sees_the_operators():
    seen = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Listener():
        swiglu(torch.ones(2, 8), torch.ones(2, 8))
    assert "jindo.swiglu.default" in seen
