"""What the kernels compile to, for GPUs that are not here: the gates that a wrong layout or rounding trips.

Every kernel in every shipped configuration, for the architectures of its row. The figures are printed in one
table at the end and, when all gates have passed, written to bench/results/gates.json. Ceilings of instructions
an element stand beside the kernels.

gfx942 (AMD MI300) compiles everything here; what is held there is less. Programs are cut for warps of 32, so in
waves of 64 a thread has half the elements, and 64-bit accesses; exact division is itself made of fma there, so
roundings can't be read off; and no ceilings are set, for want of a machine to set them by.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from compiled import SHARED_LIMIT, TARGETS, Compiled, Figure, Launch, compile_for, recorded, write

from jindo_core.kernels import (
    adamw,
    adamw_triton,
    linear_cross_entropy_triton,
    lora_gemv_triton,
    lora_matmul,
    lora_matmul_triton,
    nf4,
    nf4_triton,
    rms_norm_triton,
    rope_triton,
    swiglu_triton,
)

MODULES = (
    adamw_triton, linear_cross_entropy_triton, lora_gemv_triton, lora_matmul_triton, nf4_triton, rms_norm_triton,
    rope_triton, swiglu_triton,
)  # fmt: skip
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
EVERY = tuple(TARGETS)
SOME = ("sm_75", "sm_80", "sm_90")
TWO = ("sm_80", "sm_90")
DOTS = ("sm_80", "sm_86", "sm_89", "sm_90")  # where Triton has tensor cores
LORA_REGISTERS = 168  # three programs of 128 threads on a multiprocessor


class Gate(NamedTuple):
    """One configuration of one kernel.

    Attributes:
        module, kernel, config: its name in the table.
        run: launches it, among others.
        archs: what it is compiled for.
        elements: of a program, as its constants and options say; what `per_element` divides by.
        loop: count the instructions of the largest loop ("largest"), of all loops ("all") or of the program.
        ceiling: most instructions an element, on sm_80 and later.
        exact: its roundings are the reference's. dot: it holds a matrix product.
        narrow: global loads and stores of less than 128 bits, at most; None: not held.
        registers: a thread may have, where fewer are wanted than there are.
        check: what else is held, of the compiled kernel and its launch.
    """

    module: Any
    kernel: str
    config: str
    run: Callable[[], object]
    archs: tuple[str, ...]
    elements: Callable[[dict], int] | None = None
    loop: str = ""
    ceiling: float | None = None
    exact: bool = False
    dot: bool = False
    narrow: tuple[int, int] | None = None
    registers: int = 255
    check: Callable[[Compiled, Launch, str], None] | None = None

    @property
    def name(self) -> str:
        return f"{self.module.__name__.rsplit('.', 1)[1].removesuffix('_triton')}.{self.kernel.removesuffix('_kernel')}"


# --- NF4 ------------------------------------------------------------------------------------------------


@functools.cache
def quantized(n, k, double_quant=True, block_size=64):
    packed, absmax = nf4.nf4_quantize(torch.ones(n, k), block_size)
    return (packed, *(nf4.nf4_quantize_absmax(absmax) if double_quant else (absmax, None, None)))


def dequantize_gate(dtype, archs, double_quant=True):
    def run():
        nf4_triton.dequantize(torch.empty(64, 256, dtype=dtype), *quantized(64, 256, double_quant), 64)

    def check(compiled, launch, arch):
        # Each thread reads its codes, and beside them its share of the table of pairs, 128 bits at a time.
        each = launch.kwargs["ROW"] * launch.kwargs["ROWS"] / compiled.threads
        assert compiled.count(r"LDG\.E\.128") == each / 2 / 16 + 1
        assert compiled.count(r"STG") == compiled.count(r"STG\.E\.128") == each * dtype.itemsize / 16

    return Gate(
        nf4_triton, "dequantize_kernel", f"{SHORT[dtype]}{'' if double_quant else ', plain maxima'}", run, archs,
        elements=lambda c: c["ROW"] * c["ROWS"], ceiling=nf4_triton.SASS_PER_ELEMENT["dequantize"],
        exact=True, check=check,
    )  # fmt: skip


def quantize_gate(count, dtype, archs):
    blocks = "whole" if count % 64 == 0 else "partial"

    def check(compiled, launch, arch):
        each = nf4_triton.QUANTIZE_ELEMENTS / compiled.threads
        assert "div.rn.f32" in compiled.text
        assert compiled.count(r"LDG\.E\.128") == each * dtype.itemsize / 16
        assert compiled.count(r"STG\.E\.128") == each / 2 / 16

    return Gate(
        nf4_triton, "quantize_kernel", f"{SHORT[dtype]}, {blocks} blocks",
        lambda: nf4_triton.quantize(torch.ones(count, dtype=dtype), 64), archs,
        elements=lambda c: c["BLOCKS"] * c["BLOCK_WIDTH"],
        ceiling=nf4_triton.SASS_PER_ELEMENT[f"quantize, {blocks}"], exact=True, check=check,
    )  # fmt: skip


def odd_count_gates(count):
    packed, absmax = nf4.nf4_quantize(torch.ones(count))
    yield Gate(
        nf4_triton, "quantize_kernel", f"fp32, count {count}", lambda: nf4_triton.quantize(torch.ones(count), 64),
        ("sm_80",), exact=True,
    )  # fmt: skip
    yield Gate(
        nf4_triton, "dequantize_kernel", f"fp32, count {count}",
        lambda: nf4_triton.dequantize(torch.empty(count), packed, absmax, None, None, 64), ("sm_80",), exact=True,
    )  # fmt: skip


# --- LoRA -----------------------------------------------------------------------------------------------


def fused_gates(m, dtype, archs, *, n=256, k=512, r=8, dropout=0.1, double_quant=True, kernels=("forward", "dx")):
    """The kernels of one forward and backward pass."""
    paired = k % 64 == 0

    def run():
        parts, seed = quantized(n, k, double_quant), torch.zeros(1, dtype=torch.int32)
        layers = [lora_matmul.Projection(*parts, n, torch.zeros(r, k), torch.zeros(n, r), 2.0)]
        x, dy = torch.zeros(m, k, dtype=dtype), torch.zeros(m, n, dtype=dtype)
        _, down, _ = lora_matmul_triton.forward(x, layers, 64, dropout, seed, False)
        lora_matmul_triton.backward(dy, x, layers, k, 64, down, None, dropout, seed, True)

    def check(compiled, launch, arch):
        if dtype == FP32:  # TensorFloat-32 would round the operands
            assert "tf32" not in compiled.text
        elif "down" not in launch.kernel.fn.__name__ and paired:
            assert compiled.count(r"LDGSTS.*\.128") > 0, "codes come by 128-bit asynchronous copies"
            assert compiled.count(r"LDG\.E\.U8") <= 3, "bytes read one at a time are the maxima of a stage at most"
            assert arch != "sm_90" or compiled.count("HGMMA") > 0

    config = f"{SHORT[dtype]}, M {m}" + ("" if (n, k, r) == (256, 512, 8) else f", {n} x {k}, rank {r}")
    for kernel in kernels:
        yield Gate(
            lora_matmul_triton, f"{kernel}_kernel", config + ("" if double_quant else ", plain maxima"), run, archs,
            # An fp32 dot is made of fma; elsewhere one would break W's roundings or the mask's.
            exact=dtype != FP32, dot=dtype != FP32, check=check,
            registers=LORA_REGISTERS if paired else 255,
            elements=None if kernel == "down" else lambda c: c["TILE_N"] * c["TILE_K"], loop="largest",
        )  # fmt: skip


def drop_gate(archs):
    x, seed = torch.zeros(64, 64, dtype=FP16), torch.zeros(1, dtype=torch.int32)
    return Gate(
        lora_matmul_triton, "drop_kernel", "fp16", lambda: lora_matmul_triton.mask(x, 0.1, seed), archs, exact=True,
        elements=lambda c: c["TILE"], narrow=(1, 0),
    )  # fmt: skip


def gemv_gates(m, dtype, archs, *, k=4096, r=16, double_quant=True, kernels=("gemv", "sum")):
    n = 512
    tiles = lora_gemv_triton.NARROW_TILES if archs == ("sm_75",) else lora_gemv_triton.PAIRED_TILES

    def run():
        x, out = torch.zeros(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype)
        adapter = (torch.zeros(r, k), torch.zeros(n, r)) if r else (None, None)
        with mock.patch.object(lora_gemv_triton, "PAIRED_TILES", tiles):
            lora_gemv_triton.gemv(x, *quantized(n, k, double_quant), 64, *adapter, 2.0, out)

    def check(compiled, launch, arch):
        assert not compiled.count("ATOM|RED"), "sums are made in a fixed order"
        if launch.kwargs.get("PAIRED"):
            # The codes come in 128 bits a lane; a lookup is a shuffle, one a weight.
            weights = launch.kwargs["TILE_N"] * launch.kwargs["TILE_K"] // 32
            assert compiled.count(r"(LDG|LDGSTS)\.E.*\.128") >= weights // 32
            assert compiled.count(r"SHFL\.IDX") == weights

    shape = "" if k % 64 == 0 else f", {n} x {k}"
    config = f"{SHORT[dtype]}, M {m}{shape}, rank {r}{'' if double_quant else ', plain maxima'}"
    for kernel in kernels:
        main = kernel == "gemv"
        yield Gate(
            lora_gemv_triton, f"{kernel}_kernel", config, run, archs, check=check, loop="largest",
            elements=(lambda c: c["TILE_N"] * c["TILE_K"]) if main else None,
            ceiling=lora_gemv_triton.SASS_PER_WEIGHT[m] if main and k % 64 == 0 else None,
        )  # fmt: skip


# --- norms, SwiGLU, RoPE, loss --------------------------------------------------------------------------


def rms_norm_gates(width, dtype, archs):
    x, weight, rstd = torch.zeros(64, width, dtype=dtype), torch.zeros(width, dtype=dtype), torch.zeros(64)
    whole = width <= rms_norm_triton.LONGEST_TILE

    def gate(kernel, label, run, narrow):
        return Gate(
            rms_norm_triton, f"{kernel}_kernel", f"{SHORT[dtype]}, width {width}{label}", run, archs,
            elements=lambda c: c["ROWS"] * c["COLUMNS"], narrow=narrow,
            ceiling=rms_norm_triton.SASS_PER_ELEMENT[kernel + label] if whole else None,
        )  # fmt: skip

    # Narrow: rstd, one number a row.
    yield gate("forward", "", lambda: rms_norm_triton.forward(x, weight, 1e-5), (0, 1))
    for label, need in (("", False), (", dW", True)):
        yield gate("backward", label, functools.partial(rms_norm_triton.backward, x, x, weight, rstd, need), (1, 0))


def swiglu_gates(dtype, archs, *, joint=True):
    gate, up = torch.zeros(32, 8192, dtype=dtype).chunk(2, dim=-1)
    if not joint:
        gate, up = gate.contiguous(), up.contiguous()
    dh = torch.zeros(32, 4096, dtype=dtype)
    runs = {
        "forward": lambda: swiglu_triton.forward(gate, up),
        "backward": lambda: swiglu_triton.backward(dh, gate, up),
    }
    for kernel, run in runs.items():
        yield Gate(
            swiglu_triton, f"{kernel}_kernel", f"{SHORT[dtype]}, {'joint' if joint else 'dense'}", run, archs,
            elements=lambda c: c["ELEMENTS"], ceiling=swiglu_triton.SASS_PER_ELEMENT[kernel], narrow=(0, 0),
        )  # fmt: skip


def rope_gate(heads, k_heads, d, dtype, archs, inverse=False):
    size = "full" if k_heads * d >= 512 else "small"
    q, k, cos = torch.zeros(2, 16, heads, d, dtype=dtype), torch.zeros(2, 16, k_heads, d), torch.zeros(1, 16, d // 2)
    return Gate(
        rope_triton, "rope_kernel", f"{SHORT[dtype]}, {heads} and {k_heads} heads of {d}{', back' * inverse}",
        lambda: rope_triton.rope(q, k.to(dtype), cos, cos, inverse), archs,
        # Both branches stand in the code, that of q and that of k: the elements of both. Narrow: cos and sin. Where
        # heads are few and short a warp has less than 128 bits a thread, and full sectors all the same.
        elements=lambda c: 2 * 2 * c["HEADS"] * c["HALF_WIDTH"], ceiling=rope_triton.SASS_PER_ELEMENT[size],
        narrow=(2, 0) if size == "full" else None,
    )  # fmt: skip


def adamw_gates(dtype, archs, *, seed=None):
    """Narrow: the codes, eight a thread, the maxima, and six table reads an element: one of each map, two for each new
    code. A seed of 1 is no constant of the kernel."""
    n = 4096
    param, grad, m = torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=dtype), torch.zeros(n)
    codes, absmax = torch.zeros(n, dtype=torch.uint8), torch.zeros(n // adamw.BLOCK)
    update = adamw.Update(1e-3, 0.9, 0.999, 1e-8, 0.1, 1)
    rounding = ", stochastic" if seed else ""
    config = SHORT[dtype] + rounding

    def exact(compiled, launch, arch):
        """Root and divisions correctly rounded: m and v are torch's bit for bit, p but for torch's own root."""
        assert not re.search(r"div\.(full|approx)|rcp\.approx|sqrt\.approx|\.ftz", compiled.text)

    yield Gate(
        adamw_triton, "step_kernel", config, lambda: adamw_triton.step(param, grad, m, m, update, seed), archs,
        elements=lambda c: c["ELEMENTS"], ceiling=adamw_triton.SASS_PER_ELEMENT["step" + rounding], narrow=(0, 0),
        check=exact,
    )  # fmt: skip
    yield Gate(
        adamw_triton, "step_8bit_kernel", config,
        lambda: adamw_triton.step_8bit(param, grad, codes, codes, absmax, absmax, update, seed), archs,
        elements=lambda c: c["BLOCKS"] * c["BLOCK"], ceiling=adamw_triton.SASS_PER_ELEMENT["8-bit" + rounding],
        narrow=(2 + 2 + 6 * 8, 2 + 2),
    )  # fmt: skip


def loss_gate(vocab, dtype, archs, *, smoothing=0.0, gradient=True):
    hidden, weight, labels = torch.zeros(4, 8, dtype=dtype), torch.zeros(vocab, 8, dtype=dtype), torch.zeros(4).long()
    return Gate(
        linear_cross_entropy_triton, "cross_entropy_kernel",
        f"{SHORT[dtype]}, {vocab} classes{', smoothed' * (smoothing > 0)}{', loss alone' * (not gradient)}",
        lambda: linear_cross_entropy_triton.forward(hidden, weight, labels, -100, smoothing, gradient, False), archs,
        elements=lambda c: c["LANES"] * c["VECTOR"], loop="all",
        # Narrow: the label, its logit, the loss.
        ceiling=linear_cross_entropy_triton.SASS_PER_ELEMENT["smoothed" if smoothing else "plain"], narrow=(2, 1),
    )  # fmt: skip


# --- what is held ---------------------------------------------------------------------------------------

GATES = [
    dequantize_gate(BF16, EVERY),
    dequantize_gate(FP16, SOME),
    dequantize_gate(FP32, TWO),
    dequantize_gate(BF16, TWO, double_quant=False),
    quantize_gate(64 * 256, BF16, EVERY),
    quantize_gate(64 * 256, FP32, TWO),
    quantize_gate(64 * 256 + 32, FP32, SOME),
    *itertools.chain.from_iterable(odd_count_gates(count) for count in (1, 2, 12345)),
    *fused_gates(16, BF16, (*DOTS, "gfx942"), kernels=("down", "forward", "dx")),
    *fused_gates(32, BF16, TWO),
    *fused_gates(64, BF16, DOTS),
    *fused_gates(16, FP16, ("sm_80",)),
    *fused_gates(64, FP32, ("sm_80", "sm_86")),
    *fused_gates(1, BF16, ("sm_90",), r=64, dropout=0.0, double_quant=False),
    *fused_gates(17, BF16, TWO, n=33, k=100, r=3, kernels=("down", "forward", "dx")),
    *fused_gates(17, FP32, ("sm_80",), n=33, k=100, r=3),
    drop_gate(EVERY),
    *gemv_gates(1, BF16, EVERY),
    *itertools.chain.from_iterable(gemv_gates(m, BF16, DOTS, kernels=("gemv",)) for m in (2, 3, 4)),
    *itertools.chain.from_iterable(gemv_gates(m, FP16, ("sm_75",), kernels=("gemv",)) for m in (1, 2, 3, 4)),
    *itertools.chain.from_iterable(gemv_gates(m, FP32, ("sm_80",), kernels=("gemv",)) for m in (1, 2, 3, 4)),
    *gemv_gates(1, BF16, TWO, r=64, double_quant=False),
    *gemv_gates(4, BF16, SOME, k=100, r=3, kernels=("gemv",)),
    *rms_norm_gates(4096, BF16, EVERY),
    *rms_norm_gates(576, BF16, TWO),
    *rms_norm_gates(8192, FP16, SOME),
    *rms_norm_gates(16384, BF16, TWO),
    *swiglu_gates(BF16, EVERY),
    *swiglu_gates(FP16, ("sm_75", "sm_80"), joint=False),
    rope_gate(32, 8, 128, BF16, EVERY),
    rope_gate(32, 32, 128, FP16, SOME, inverse=True),
    rope_gate(9, 3, 64, BF16, TWO),
    *adamw_gates(FP32, EVERY),
    *adamw_gates(BF16, TWO, seed=1),
    loss_gate(32000, BF16, EVERY),
    loss_gate(32001, FP16, SOME, smoothing=0.1),
    loss_gate(128256, BF16, TWO, gradient=False),
    loss_gate(49152, FP32, ("sm_80",)),
]
CASES = [(gate, arch) for gate in GATES for arch in gate.archs]


@functools.cache
def launches_of(run):
    with recorded(*MODULES) as launches:
        run()
    return launches


def check_resources(compiled, arch, registers):
    assert compiled.stack == 0
    assert compiled.count("LDL|STL|scratch_") == 0, "local memory"
    assert compiled.shared <= SHARED_LIMIT[arch]
    assert compiled.registers <= registers


def check_roundings(compiled):
    """No contracted multiply-add, no approximate division, nothing flushed to zero."""
    assert not re.search(r"\bfma\b|div\.full|div\.approx|rcp\.approx|\.ftz", compiled.text)


def check_widths(compiled, narrow):
    assert compiled.count(r"LDG\.E\.128") > 0
    for op, allowed in zip(("LDG", "STG"), narrow, strict=True):
        assert compiled.count(op) - compiled.count(rf"{op}\.E\.128") <= allowed, f"{op} of less than 128 bits"


def per_element(gate, compiled, launch):
    if gate.elements is None:
        return None
    counted = {"largest": max, "all": sum}[gate.loop](compiled.loops) if gate.loop else compiled.instructions
    return round(counted / (gate.elements(launch.kwargs) / compiled.threads), 2)


@pytest.fixture(scope="module")
def passed(figures, repo_root):
    """Figures of the gates that passed; once all have, the file beside the benchmarks is written."""
    yield figures
    if len(figures) == len(CASES):
        write(figures, repo_root / "bench" / "results" / "gates.json")


@pytest.mark.parametrize(("gate", "arch"), CASES, ids=[f"{gate.name}-{gate.config}-{arch}" for gate, arch in CASES])
def test_gate(gate, arch, passed):
    launch = launches_of(gate.run)[gate.kernel]
    compiled = compile_for(launch, arch)
    figure = per_element(gate, compiled, launch)
    held = gate.ceiling if arch in DOTS else None
    check_resources(compiled, arch, gate.registers if arch in DOTS else 512)
    if gate.dot and arch != "gfx942":
        assert compiled.count("HMMA|HGMMA") > 0
    assert arch != "sm_75" or not compiled.dots
    if arch != "gfx942":
        if gate.exact:
            check_roundings(compiled)
        if gate.narrow is not None:
            check_widths(compiled, gate.narrow)
        if gate.check is not None:
            gate.check(compiled, launch, arch)
    if held is not None:
        assert figure <= held
    passed.append(
        Figure(gate.name, gate.config, arch, compiled.registers, compiled.shared, compiled.stack, figure, held)
    )


def test_every_kernel_has_a_gate_on_every_architecture_that_runs_it():
    for module in MODULES:
        for name, value in vars(module).items():
            if name.endswith("_kernel") and value.__module__ == module.__name__:
                held = {arch for gate in GATES if (gate.module, gate.kernel) == (module, name) for arch in gate.archs}
                # No product of Triton's before sm_80: dispatch sends it to cuBLAS (test_dispatch.py).
                product = module is lora_matmul_triton and name != "drop_kernel"
                assert held == set(EVERY) - ({"sm_75"} if product else set()), f"{module.__name__}.{name}"
