"""What the kernels compile to, for GPUs that are not here: the gates that a wrong layout or rounding trips.

Nothing is launched. The launchers run with kernels that only note their arguments, and what was noted is
compiled for each compute capability, so that exactly the shipped configurations are held.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jindo_core.kernels import lora_matmul, lora_matmul_triton, nf4, nf4_triton

KERNELS = {
    nf4_triton: ["quantize_kernel", "dequantize_kernel"],
    lora_matmul_triton: ["down_kernel", "forward_kernel", "dx_kernel", "drop_kernel"],
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory a block may have, in bytes (CUDA programming guide, "compute capabilities").
SHARED_LIMIT = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
SASS_PER_ELEMENT = 10
REGISTERS = 168  # three blocks of 128 threads on a multiprocessor
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Launch(NamedTuple):
    """One launch that a launcher made: the kernel and what it was given."""

    kernel: object
    args: tuple
    kwargs: dict


class Compiled(NamedTuple):
    ptx: str
    ops: Counter  # SASS opcodes
    registers: int
    stack: int
    shared: int
    threads: int

    def count(self, pattern):
        return sum(n for op, n in self.ops.items() if re.match(pattern, op))


class Recorder:
    """Stands in for a kernel: kernel[grid](...) is noted, not run."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


@pytest.fixture
def record(monkeypatch):
    """record(run) -> {kernel name: Launch} of what `run` launches."""

    def record(run):
        launches = []
        with monkeypatch.context() as patch:
            for module, names in KERNELS.items():
                for name in names:
                    patch.setattr(module, name, Recorder(getattr(module, name), launches))
            run()
        return {launch.kernel.fn.__name__: launch for launch in launches}

    return record


def specialize(launch):
    """Signature, constants, attributes and options: what Triton's launcher makes of the arguments."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False)) | {k: v for k, v in launch.kwargs.items() if k in names}
    options = {k: v for k, v in launch.kwargs.items() if k not in names}
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(names, launch.kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[index,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[index,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def tool(name, *args):
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def compile_for(launch, cc, folder):
    signature, constants, attributes, options = specialize(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", tool("nvdisasm", "-c", cubin))
    usage = tool("cuobjdump", "-res-usage", cubin)
    return Compiled(
        ptx=built.asm["ptx"],
        ops=Counter(op for op in code if op != "NOP"),
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=built.metadata.shared,
        threads=options.get("num_warps", 4) * 32,
    )


def check_resources(compiled, cc, registers=REGISTERS):
    assert compiled.stack == 0
    assert compiled.count(r"LDL|STL") == 0, "local memory"
    assert compiled.shared <= SHARED_LIMIT[cc]
    assert compiled.registers <= registers


def check_roundings(compiled):
    """No contracted multiply-add, no approximate division, nothing flushed to zero."""
    assert not re.search(r"\bfma\b|div\.full|div\.approx|rcp\.approx|\.ftz", compiled.ptx)


# --- NF4 ------------------------------------------------------------------------------------------------


@functools.cache
def quantized(n, k, double_quant=True, block_size=64):
    generator = torch.Generator().manual_seed(0)
    packed, absmax = nf4.nf4_quantize(torch.randn(n, k, generator=generator), block_size)
    return (packed, *(nf4.nf4_quantize_absmax(absmax) if double_quant else (absmax, None, None)))


@pytest.mark.parametrize(
    ("dtype", "double_quant"),
    [(torch.bfloat16, True), (torch.float16, True), (torch.float32, True), (torch.bfloat16, False)],
)
@pytest.mark.parametrize("cc", SHARED_LIMIT)
def test_dequantize(cc, dtype, double_quant, record, tmp_path):
    parts = quantized(64, 256, double_quant)
    launch = record(lambda: nf4_triton.dequantize(torch.empty(64, 256, dtype=dtype), *parts, 64))["dequantize_kernel"]
    compiled = compile_for(launch, cc, tmp_path)
    check_resources(compiled, cc)
    check_roundings(compiled)
    elements = launch.kwargs["ROW"] * launch.kwargs["ROWS"] / compiled.threads
    # Each thread reads its codes, and beside them its share of the table of pairs, 128 bits at a time.
    assert compiled.count(r"LDG\.E\.128") == elements / 2 / 16 + 1
    assert compiled.count(r"STG") == compiled.count(r"STG\.E\.128") == elements * dtype.itemsize / 16
    if cc >= 80:  # sm_75 has no instruction that rounds to bf16
        assert sum(compiled.ops.values()) / elements <= SASS_PER_ELEMENT


@pytest.mark.parametrize(
    ("count", "dtype"), [(64 * 256, torch.bfloat16), (64 * 256, torch.float32), (64 * 256 + 32, torch.float32)]
)
@pytest.mark.parametrize("cc", SHARED_LIMIT)
def test_quantize(cc, count, dtype, record, tmp_path):
    weight = torch.zeros(count, dtype=dtype)
    compiled = compile_for(record(lambda: nf4_triton.quantize(weight, 64))["quantize_kernel"], cc, tmp_path)
    check_resources(compiled, cc)
    check_roundings(compiled)
    assert "div.rn.f32" in compiled.ptx
    elements = nf4_triton.QUANTIZE_ELEMENTS / compiled.threads
    assert compiled.count(r"LDG\.E\.128") == elements * dtype.itemsize / 16
    assert compiled.count(r"STG\.E\.128") == elements / 2 / 16


@pytest.mark.parametrize("count", [1, 2, 12345])
def test_odd_counts_compile_and_keep_their_roundings(count, record, tmp_path):
    weight = torch.ones(count)
    packed, absmax = nf4.nf4_quantize(weight)
    launches = record(lambda: nf4_triton.quantize(weight, 64))
    launches |= record(lambda: nf4_triton.dequantize(torch.empty(count), packed, absmax, None, None, 64))
    for launch in launches.values():
        compiled = compile_for(launch, 80, tmp_path)
        check_roundings(compiled)
        assert compiled.stack == 0


# --- LoRA -----------------------------------------------------------------------------------------------


def launches_of(record, m, dtype, *, n=256, k=512, r=8, dropout=0.1, double_quant=True):
    """The launches of a forward and a backward pass."""
    parts = quantized(n, k, double_quant)
    x, dy = torch.zeros(m, k, dtype=dtype), torch.zeros(m, n, dtype=dtype)
    a, b, seed = torch.zeros(r, k), torch.zeros(n, r), torch.zeros(1, dtype=torch.int32)

    def run():
        layers = [lora_matmul.Projection(*parts, n, a, b, 2.0)]
        _, down, _ = lora_matmul_triton.forward(x, layers, 64, dropout, seed, False)
        lora_matmul_triton.backward(dy, x, layers, k, 64, down, None, dropout, seed, True)

    return record(run)


def check_lora(launches, cc, folder, *, tensor_cores=True, registers=REGISTERS):
    """Gates of one forward and backward pass; returns what was compiled."""
    compiled = {name: compile_for(launch, cc, folder) for name, launch in launches.items()}
    assert {"down_kernel", "forward_kernel", "dx_kernel"} <= set(compiled)
    for name, kernel in compiled.items():
        check_resources(kernel, cc, registers)
        if name != "drop_kernel" and tensor_cores:
            assert kernel.count("HMMA|HGMMA") > 0
        if tensor_cores:  # an fp32 dot is made of fma; elsewhere one would break W's roundings or the mask's
            check_roundings(kernel)
    return compiled


@pytest.mark.parametrize(
    ("cc", "m", "dtype"),
    [
        (80, 4, torch.bfloat16), (80, 32, torch.bfloat16), (80, 64, torch.bfloat16), (80, 16, torch.float16),
        (90, 4, torch.bfloat16), (90, 32, torch.bfloat16), (90, 64, torch.bfloat16),
        (86, 16, torch.bfloat16), (86, 64, torch.bfloat16), (89, 64, torch.bfloat16),
    ],
)  # fmt: skip
def test_fused_linear(cc, m, dtype, record, tmp_path):
    compiled = check_lora(launches_of(record, m, dtype), cc, tmp_path)
    for name in ("forward_kernel", "dx_kernel"):
        kernel = compiled[name]
        assert kernel.count(r"LDGSTS.*\.128") > 0, "codes come by 128-bit asynchronous copies"
        assert kernel.count(r"LDG\.E\.U8") <= 3, "bytes read one at a time are the maxima of a stage at most"
        if cc == 90:
            assert kernel.count("HGMMA") > 0


def test_fused_linear_of_one_token_with_a_wide_adapter_and_plain_maxima(record, tmp_path):
    check_lora(launches_of(record, 1, torch.bfloat16, r=64, dropout=0.0, double_quant=False), 90, tmp_path)


@pytest.mark.parametrize(("cc", "dtype"), [(80, torch.bfloat16), (80, torch.float32), (90, torch.bfloat16)])
def test_fused_linear_of_unaligned_shapes(cc, dtype, record, tmp_path):
    launches = launches_of(record, 17, dtype, n=33, k=100, r=3)
    check_lora(launches, cc, tmp_path, tensor_cores=dtype != torch.float32, registers=255)


@pytest.mark.parametrize("cc", [80, 86])
def test_fused_linear_in_fp32(cc, record, tmp_path):
    compiled = check_lora(launches_of(record, 64, torch.float32), cc, tmp_path, tensor_cores=False)
    assert all("tf32" not in kernel.ptx for kernel in compiled.values())


def test_dropout_mask_compiles_for_sm_75(record, tmp_path):
    """The only kernel of the fused linear that is no matrix product."""
    x, seed = torch.zeros(64, 64, dtype=torch.float16), torch.zeros(1, dtype=torch.int32)
    compiled = compile_for(record(lambda: lora_matmul_triton.mask(x, 0.1, seed))["drop_kernel"], 75, tmp_path)
    check_resources(compiled, 75)
    check_roundings(compiled)
