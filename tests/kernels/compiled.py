"""Compiles the kernels for GPUs that are not here and reads what came out. Used by test_gates.py.

Nothing is launched. The launchers run with kernels that only note their arguments, and what was noted is
compiled for an architecture, so that exactly the shipped configurations are held.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {f"sm_{cc}": GPUTarget("cuda", cc, 32) for cc in (75, 80, 86, 89, 90)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
# Shared memory a block may have, in bytes (CUDA programming guide, "compute capabilities"; CDNA3 ISA, LDS).
SHARED_LIMIT = {
    "sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10,
    "gfx942": 64 << 10,
}  # fmt: skip
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Launch(NamedTuple):
    """One launch that a launcher made: the kernel and what it was given."""

    kernel: triton.runtime.jit.JITFunction
    args: tuple
    kwargs: dict


class Compiled(NamedTuple):
    """What one kernel became on one architecture.

    Attributes:
        text: the PTX, or AMD's assembly. ops: how often each SASS (AMD: assembly) instruction stands there.
        loops: instructions of each outermost loop. dots: whether the kernel holds a matrix product.
        registers: a thread's (AMD: vector registers). stack, shared: bytes. threads: of a program.
    """

    text: str
    ops: Counter
    loops: list[int]
    dots: bool
    registers: int
    stack: int
    shared: int
    threads: int

    def count(self, pattern: str) -> int:
        """Instructions whose opcode begins like `pattern`."""
        return sum(n for op, n in self.ops.items() if re.match(pattern, op))

    @property
    def instructions(self) -> int:
        return sum(self.ops.values())


class Recorder:
    """Stands in for a kernel: kernel[grid](...) is noted, not run."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


def kernels_of(module: ModuleType) -> list[str]:
    """Names of the kernels that a module defines and its launchers start."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.jit.JITFunction) and name.endswith("_kernel")
    ]


@contextlib.contextmanager
def recorded(*modules: ModuleType) -> Iterator[dict[str, Launch]]:
    """Inside, launches of the modules' kernels are noted; afterwards the result holds the last one of each name."""
    launches: list[Launch] = []
    found: dict[str, Launch] = {}
    with contextlib.ExitStack() as patches:
        for module in modules:
            for name in kernels_of(module):
                patches.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name), launches)))
        yield found
    found.update({launch.kernel.fn.__name__: launch for launch in launches})


def specialize(launch: Launch) -> tuple[dict, dict, dict, dict]:
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


def compile_for(launch: Launch, arch: str) -> Compiled:
    """The launch's kernel, compiled for `arch`."""
    signature, constants, attributes, options = specialize(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = TARGETS[arch]
    built = triton.compile(source, target=target, options=options)
    cuda = target.backend == "cuda"
    code, registers, stack = (_read_cuda if cuda else _read_hip)(built.asm)
    return Compiled(
        text=built.asm["ptx" if cuda else "amdgcn"],
        ops=Counter(op for op, _ in code),
        loops=outermost_loops(code),
        dots="tt.dot" in built.asm["ttir"],
        registers=registers,
        stack=stack,
        shared=built.metadata.shared,
        threads=options.get("num_warps", 4) * target.warp_size,
    )


def outermost_loops(code: list[tuple[str, int | None]]) -> list[int]:
    """Lengths of the spans from a branch's target back up to the branch; what lies in another span is left out."""
    spans = sorted((to, at) for at, (_, to) in enumerate(code) if to is not None and to < at)
    found, end = [], -1
    for start, stop in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start > end:
            found.append(stop - start + 1)
            end = stop
    return found


def _tool(name: str, *args: str | Path) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def _parse(text: str, instruction: str, label: str) -> list[tuple[str, int | None]]:
    """Every instruction, with where it branches to, if it does. The patterns' groups: opcode, operands; label."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(code)
        elif (found := re.search(instruction, line)) and found[1] != "NOP":
            code.append((found[1], found[2]))
    targets = re.compile(r"\.L\w+")
    return [(op, labels.get(found[0]) if (found := targets.search(rest)) else None) for op, rest in code]


def _read_cuda(asm: dict) -> tuple[list[tuple[str, int | None]], int, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        sass, usage = _tool("nvdisasm", "-c", cubin), _tool("cuobjdump", "-res-usage", cubin)
    code = _parse(sass, r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)", r"\s*(\.L\w+):")
    return code, int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])


def _read_hip(asm: dict) -> tuple[list[tuple[str, int | None]], int, int]:
    text = asm["amdgcn"]
    code = _parse(text, r"^\t([svdgb]\w*_\w+)(.*)", r"(\.L\w+):")
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
    return code, registers, int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1])


# --- figures --------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """One line of the table. `per_element` counts instructions, in the loop where most of the work is one."""

    kernel: str
    config: str
    arch: str
    registers: int
    shared: int
    stack: int
    per_element: float | None
    ceiling: float | None


def table(figures: Iterable[Figure]) -> str:
    """All figures, for people."""
    lines = Table(title=f"Kernels as Triton {triton.__version__} compiles them")
    for name in ("kernel", "config", "arch"):
        lines.add_column(name)
    for name in ("registers", "shared", "stack", "per element", "ceiling"):
        lines.add_column(name, justify="right")
    for figure in sorted(figures, key=_order):
        lines.add_row(*("" if value is None else str(value) for value in figure))
    text = StringIO()
    Console(file=text, width=150).print(lines)
    return text.getvalue()


def write(figures: Iterable[Figure], path: Path) -> None:
    """All figures, for programs; the same bytes from the same kernels and the same Triton. Another Triton's stay."""
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["triton"] != triton.__version__:
        return
    rows = [json.dumps(figure._asdict()) for figure in sorted(figures, key=_order)]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(rows)
    path.write_text(f'{{"triton": "{triton.__version__}", "figures": [\n  {lines}\n]}}\n', encoding="utf-8")


def _order(figure: Figure) -> tuple[str, str, int]:
    return figure.kernel, figure.config, list(TARGETS).index(figure.arch)
