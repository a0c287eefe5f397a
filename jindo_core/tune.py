"""The dispatcher's crossovers, measured: for each implementation of the LoRA linear that is made for few rows,
the largest M at which it still beats dequantize + matrix product on this machine."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from jindo_core.errors import InputError
from jindo_core.kernels import crossovers, dispatch, native
from jindo_core.kernels.crossovers import Crossover
from jindo_core.kernels.lora_matmul import Projection, lora_matmul_group
from jindo_core.kernels.nf4 import NESTED_BLOCK
from jindo_core.loader import pick_device, pick_dtype
from jindo_core.nf4 import NF4Weight

RANK = 8
GAIN = 1.03
"""A kernel counts as faster from here: one that falls back to the reference beyond its own limit only ties."""

# [N, K]: LLaMA 7B/8B's on a GPU, smaller ones (1B's) on a CPU.
GPU_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
CPU_SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))
GEMV_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
FUSED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
GEMV_MOST_ROWS = 4
"""What Triton's GEMV takes. The C one hands more than its 8 on to the reference."""

GRAPHED_CALLS = 8
"""Calls in a CUDA graph that is timed: so many that its own start does not count."""

ROTATED_BYTES = 256 << 20
"""Weights are taken in turn from so many bytes (an eighth on a CPU): decoding finds none in a cache."""


@dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Attributes:
        key: the row's name in the table. crossover: the row. before: the one that was in use.
        ratios: implementation (and product) -> shape -> M -> time of the best alternative / its own time.
        written: the file, or None after a dry run.
    """

    key: str
    crossover: Crossover
    before: Crossover
    ratios: dict[str, dict[str, dict[int, float]]]
    written: Path | None


def tune(
    device: torch.device | str = "auto",
    *,
    shapes: Sequence[tuple[int, int]] | None = None,
    rounds: int = 15,
    dry_run: bool = False,
) -> Tuning:
    """Measure this machine's row of the crossover table, and write it into the user's copy.

    Args:
        device: "cpu", "cuda", "cuda:1" or "auto". shapes: [N, K] of the weights; a LLaMA's by default.
        rounds: paired timings of each; their medians count.
        dry_run: measure only.
    Raises:
        InputError: the device is not there, or has no kernel to compare. CrossoverError: a broken table.
    """
    device = pick_device(device)
    dtype = pick_dtype("auto", device)
    candidates = _candidates(device)
    key = "cpu" if device.type == "cpu" else "cuda-{}.{}".format(*torch.cuda.get_device_capability(device))
    before = crossovers.find(key)
    chosen = shapes or (CPU_SHAPES if device.type == "cpu" else GPU_SHAPES)
    ratios: dict[str, dict[str, dict[int, float]]] = {candidate.label: {} for candidate in candidates}
    for shape in chosen:
        wide = [candidate for candidate in candidates if candidate.wide_enough(shape, device)]
        for name, found in _measure_shape(shape, wide, device, dtype, rounds).items():
            ratios[name][f"{shape[0]} x {shape[1]}"] = found
    limits = {}
    for field in {candidate.field for candidate in candidates}:
        measured = [ratios[c.label].values() for c in candidates if c.field == field]
        limits[field] = _crossover([by_rows for by_shape in measured for by_rows in by_shape])
    crossover = Crossover(**limits, measured=True)
    tuning = Tuning(key, crossover, before, ratios, None)
    if dry_run:
        return tuning
    written = crossovers.save(
        key, crossover, date=date.today().isoformat(), machine=machine_name(device), torch=torch.__version__
    )
    return replace(tuning, written=written)


class Candidate(NamedTuple):
    """An implementation for few rows, and the table's field that limits it. `most`: rows that it takes."""

    field: str
    operator: str
    implementation: str
    most: int

    @property
    def label(self) -> str:
        return self.implementation + (", dX" if self.operator == "lora_matmul_backward" else "")

    def wide_enough(self, shape: tuple[int, int], device: torch.device) -> bool:
        """Whether the dispatcher would think of it for a W [N, K] of that shape."""
        if self.implementation != "triton":
            return True
        width = shape[1] if self.operator == "lora_matmul_backward" else shape[0]
        return width >= dispatch.FUSED_TILE * dispatch._multiprocessors(device)


def _candidates(device: torch.device) -> list[Candidate]:
    """What is to be measured on this machine."""
    if device.type == "cpu":
        if native.library() is None:
            raise InputError("the C kernels are not built, so there is nothing to compare: see jindo-core doctor")
        return [Candidate("gemv_max_rows", "lora_matmul", "cpu", max(GEMV_ROWS))]
    found = [Candidate("gemv_max_rows", "lora_matmul", "gemv", GEMV_MOST_ROWS)]
    if torch.cuda.get_device_capability(device) >= (8, 0):
        found.append(Candidate("fused_max_rows", "lora_matmul", "triton", max(FUSED_ROWS)))
        found.append(Candidate("fused_max_rows", "lora_matmul_backward", "triton", max(FUSED_ROWS)))
    if not dispatch._triton_found():
        raise InputError(f"{torch.cuda.get_device_name(device)} has no kernel to compare: Triton is missing or too old")
    return found


def _measure_shape(
    shape: tuple[int, int], candidates: Sequence[Candidate], device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, dict[int, float]]:
    """Candidate's label -> M -> ratio, for one [N, K]."""
    total = ROTATED_BYTES // (8 if device.type == "cpu" else 1)
    weights = [random_nf4(shape, dtype, device) for _ in range(max(total // (shape[0] * shape[1] // 2), 2))]
    a = torch.randn(RANK, shape[1], device=device, dtype=dtype)
    b = torch.randn(shape[0], RANK, device=device, dtype=dtype)
    layers = [Projection(w.packed, w.absmax, w.nested_absmax, w.offset, shape[0], a, b, 2.0) for w in weights]
    found: dict[str, dict[int, float]] = {candidate.label: {} for candidate in candidates}
    for rows in sorted({*GEMV_ROWS, *(FUSED_ROWS if len(candidates) > 1 else ())}):
        x = torch.randn(rows, shape[1], device=device, dtype=dtype)
        dy = torch.randn(rows, shape[0], device=device, dtype=dtype)

        def forward(name: str, x: Tensor, turn: int) -> Tensor:
            with dispatch.override(name, only="lora_matmul"), torch.no_grad():
                return lora_matmul_group(x, [layers[turn % len(layers)]])

        def backward(name: str, dy: Tensor, turn: int) -> object:
            with dispatch.override(name, only="lora_matmul_backward"), torch.no_grad():
                run = dispatch.implementation("lora_matmul_backward", dy)
                return run(dy, None, [layers[turn % len(layers)]], shape[1], 64, None, None, 0.0, None, True)

        for operator, call, given in (("lora_matmul", forward, x), ("lora_matmul_backward", backward, dy)):
            here = [c for c in candidates if c.operator == operator and rows <= c.most]
            if not here:
                continue
            names = ["reference", *(c.implementation for c in here)]
            seconds = paired_medians({name: functools.partial(call, name, given) for name in names}, device, rounds)
            for candidate in here:
                # The GEMV has to beat the fused product too, where there is one.
                others = {"reference"} if candidate.implementation == "triton" else set(names)
                rivals = [seconds[name] for name in others - {candidate.implementation}]
                found[candidate.label][rows] = min(rivals) / seconds[candidate.implementation]
    return found


def paired_medians(
    calls: dict[str, Callable[[int], object]], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median seconds of each call, all of them once a round in turn; a call is given the round's number."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(2):  # compilation, page faults
        for call in calls.values():
            call(turn)
    timers = {name: timer(call, device) for name, call in calls.items()}
    for turn in range(rounds):
        for name, seconds in timers.items():
            taken[name].append(seconds(turn))
    return {name: statistics.median(values) for name, values in taken.items()}


def timer(call: Callable[[int], object], device: torch.device, *, graph: bool = True) -> Callable[[int], float]:
    """A function of the round's number that runs `call` with it and gives the seconds of one call.

    On a GPU the kernels of several calls are captured into a CUDA graph once, and its replays are timed: a kernel's
    own time, without Python's and the launches'. The call must have run before.

    Args:
        graph: False for calls that wait for the device, which no graph can hold: events alone time them.
    """
    if device.type != "cuda" or not graph:
        return lambda turn: elapsed(functools.partial(call, turn), device)
    torch.cuda.synchronize(device)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(captured):  # a graph, as an event, is of the current device
        for turn in range(GRAPHED_CALLS):
            call(turn)
    captured.replay()
    return lambda _: elapsed(captured.replay, device) / GRAPHED_CALLS


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: by events on a GPU, whose queue is filled first, else by the clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # the launches queue up behind it: the kernels' time is meant, not Python's
        first.record()
        call()
        last.record()
        last.synchronize()
    return first.elapsed_time(last) / 1e3


def _crossover(by_shape: Sequence[dict[int, float]]) -> int:
    """The largest M up to which the geometric mean of the ratios over the shapes stays above `GAIN`."""
    limit = 0
    for rows in by_shape[0] if by_shape else ():  # ascending
        mean = math.exp(statistics.fmean(math.log(ratios[rows]) for ratios in by_shape))
        if mean < GAIN:
            break
        limit = rows
    return limit


def random_nf4(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> NF4Weight:
    """Random codes with the layout and the magnitudes of a quantized LLaMA weight, made on the device."""
    count = math.prod(shape)
    blocks = -(-count // 64)
    packed = torch.randint(0, 256, (-(-count // 2), 1), dtype=torch.uint8, device=device)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    nested = torch.rand(-(-blocks // NESTED_BLOCK), device=device) * 0.01 + 0.01
    return NF4Weight(packed, absmax, nested, torch.tensor(0.05, device=device), shape, dtype)


def machine_name(device: torch.device) -> str:
    """What the device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "unknown CPU")


def show(tuning: Tuning) -> None:
    """Print the ratios by shape and M, and what became of them."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, by_shape in tuning.ratios.items():
        table = Table(title=f"{name}: time of the best alternative / its own, by rows of x (above 1: faster)")
        table.add_column("W [N x K]")
        columns = list(next(iter(by_shape.values()), ()))
        for rows in columns:
            table.add_column(f"M = {rows}", justify="right")
        for shape, ratios in by_shape.items():
            table.add_row(shape, *(f"{ratios[rows]:.2f}" for rows in columns))
        console.print(table)
    limits = crossovers.LIMITS if tuning.key != "cpu" else crossovers.LIMITS[:1]
    for field in limits:
        old, new = getattr(tuning.before, field), getattr(tuning.crossover, field)
        said = "measured" if tuning.before.measured else "estimated"
        console.print(f"{tuning.key} {field}: {new} (was {old}, {said})")
    console.print(f"written to {tuning.written}" if tuning.written else "nothing written (--dry_run)", soft_wrap=True)
