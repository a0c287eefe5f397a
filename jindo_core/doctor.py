"""What this machine has, which implementation of each operator it would run, and what keeps it from training.

Nothing heavy is imported with the module: a torch that is missing or broken is a finding, not a traceback.
"""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jindo_core import embedded
from jindo_core.errors import CrossoverError
from jindo_core.kernels import crossovers

NEEDED = ("torch", "transformers", "safetensors", "sentencepiece", "gguf", "rich", "matplotlib", "numpy", "yaml")
"""Modules without which training stops."""

DISTRIBUTIONS = {"yaml": "pyyaml"}
PEERS = ("bitsandbytes", "peft", "torchao", "unsloth", "liger-kernel", "accelerate")
NO_COMPILER = "not built: install a C compiler (gcc or clang), then install jindo-core again (pip install .)"


def examine() -> dict[str, Any]:
    """Everything found, ready for JSON. `problems` lists what keeps the machine from training, one line each;
    `notes` what makes it slower or poorer."""
    problems: list[str] = []
    notes: list[str] = []
    found: dict[str, Any] = {
        "jindo_core": version_of("jindo-core"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _module(name, problems) for name in NEEDED},
        "triton": version_of("triton"),
        "peers": {name: version_of(name) for name in PEERS},
        "cpu": {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()},
        "memory_free_mib": memory_free() // 2**20,
        "cache": _cache(notes),
        "crossovers": _crossovers(problems),
    }
    if found["packages"]["torch"] is not None:
        found |= _with_torch(found, problems, notes)
    return found | {"can_train": not problems, "problems": problems, "notes": notes}


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def memory_free() -> int:
    """Bytes of main memory that a process may still take; 0 where the system does not say."""
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def _module(name: str, problems: list[str]) -> str | None:
    """Its version once it has been imported; else None, and a problem."""
    distribution = DISTRIBUTIONS.get(name, name)
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library of torch's is missing
        why = " ".join(str(error).split())
        problems.append(f"{distribution} can't be imported ({why}): pip install {distribution}")
        return None
    return version_of(distribution) or "unknown"


def _cache(notes: list[str]) -> dict[str, Any]:
    folder = embedded.cache_dir()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    held = (folder / Path(embedded.MEMBER).name).is_file()
    writable = nearest.is_dir() and os.access(nearest, os.W_OK)
    if not held and not writable:
        notes.append(f"the cache {folder} can't be written: set JINDO_CACHE to a folder, or name a --base_model")
    return {"folder": str(folder), "embedded_model": held, "writable": writable}


def _crossovers(problems: list[str]) -> dict[str, Any]:
    own = crossovers.user_file()
    try:
        crossovers.find("cpu")
    except CrossoverError as error:
        problems.append(str(error))
    return {"file": str(own if own.exists() else crossovers.SHIPPED)}


def _with_torch(found: dict[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """What only torch can tell. Its warnings become notes."""
    import torch

    from jindo_core.kernels import native
    from jindo_core.loader import pick_device, pick_dtype
    from jindo_core.tune import machine_name

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        library = native.library()
        device = pick_device("auto")
        gpus = [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    notes += [str(warning.message) for warning in said]
    level = None
    if library is not None:
        with native.level(native.LEVELS[-1]) as level:
            pass
    if gpus and found["triton"] is None:
        notes.append("Triton is not installed: the slower PyTorch path runs on the GPU (pip install triton)")
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        problems.append(f"torch is {torch.__version__}, expected 2.11 or newer: pip install -U torch")
    cpu = found["cpu"] | {
        "name": machine_name(torch.device("cpu")),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    kernels = {"built": library is not None, "level": level, "fix": None if library else NO_COMPILER}
    more: dict[str, Any] = {
        "cpu": cpu, "c_kernels": kernels, "cuda": torch.version.cuda, "gpus": gpus, "device": str(device),
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
    }  # fmt: skip
    if not problems:
        more |= {"operators": _operators(device), "crossover": _crossover_row(device, notes)}
        _try_a_step(device, problems)
    return more


def _gpu(index: int) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(index)),
        "memory_mib": total // 2**20,
        "memory_free_mib": free // 2**20,
    }


WIDTH = 14336
"""Of an 8B's MLP, for the choices that depend on the result's width."""


def _operators(device: Any) -> dict[str, str]:
    """Operator -> implementation; by rows where that decides."""
    import torch

    from jindo_core.kernels import dispatch
    from jindo_core.loader import pick_dtype

    probe = torch.empty(0, dtype=pick_dtype("auto", device), device=device)
    chosen = {}
    for operator in dispatch.IMPLEMENTATIONS:
        by_rows = {rows: dispatch.choose(operator, probe, rows=rows, width=WIDTH) for rows in (1, 16, 2048)}
        plain = dispatch.choose(operator, probe)
        if not operator.startswith("lora_matmul"):
            chosen[operator] = plain
        else:
            same = len(set(by_rows.values())) == 1
            chosen[operator] = (
                by_rows[1] if same else ", ".join(f"{name} (M = {rows})" for rows, name in by_rows.items())
            )
            if device.type == "cuda" and not same:
                chosen[operator] += f"; of a result {WIDTH} wide"
    return chosen


def _crossover_row(device: Any, notes: list[str]) -> dict[str, Any]:
    import torch

    key = "cpu" if device.type == "cpu" else "cuda-{}.{}".format(*torch.cuda.get_device_capability(device))
    row = crossovers.find(key)
    if not row.measured:
        notes.append(f"the crossovers of {key} are estimates: jindo-core tune measures them")
    return {"key": key, **row._asdict()}


def _try_a_step(device: Any, problems: list[str]) -> None:
    """Quantize, multiply and differentiate a small layer: what is installed must also run."""
    import torch

    from jindo_core.loader import pick_dtype
    from jindo_core.lora import LoraLinear
    from jindo_core.nf4 import NF4Linear, quantize_nf4

    dtype = pick_dtype("auto", device)
    try:
        layer = LoraLinear(NF4Linear(quantize_nf4(torch.randn(64, 128, device=device, dtype=dtype))), 4, 8)
        layer(torch.randn(3, 128, device=device, dtype=dtype)).float().square().sum().backward()
        gradient = layer.lora_B.grad
        if gradient is None or not gradient.isfinite().all():
            problems.append(f"a small LoRA layer on {device} gave a gradient that is not finite")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        problems.append(f"a small LoRA layer can't be trained on {device}: {' '.join(str(error).split())[:300]}")


def show(found: dict[str, Any]) -> None:
    """Print the findings as a table, then notes and problems."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"jindo-core {found['jindo_core'] or '(not installed)'}", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _lines(found):
        table.add_row(name, value)
    console.print(table)
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for problem in found["problems"]:
        console.print(f"problem: {problem}", style="bold", markup=False, soft_wrap=True)
    console.print("this machine can train" if found["can_train"] else "this machine can't train yet")


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    def named(versions: dict[str, str | None]) -> str:
        return ", ".join(f"{name} {value or '—'}" for name, value in versions.items())

    cpu, cache = found["cpu"], found["cache"]
    lines = [
        ("Python", f"{found['python']} on {found['platform']}"),
        ("packages", named({**found["packages"], "triton": found["triton"]})),
        ("CPU", f"{cpu.get('name', 'unknown')}, {cpu['cores']} cores, {cpu.get('threads', '?')} threads for torch"),
        ("memory free", f"{found['memory_free_mib']:,} MiB"),
    ]
    if "c_kernels" in found:
        kernels = found["c_kernels"]
        lines.append(("C kernels", f"loaded, {kernels['level']}" if kernels["built"] else kernels["fix"]))
        gpus = [
            f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, "
            f"{gpu['memory_free_mib']:,} of {gpu['memory_mib']:,} MiB free"
            for gpu in found["gpus"]
        ]
        lines.append(("GPU", "\n".join(gpus) or "none that torch sees"))
        lines.append(("trains on", f"{found['device']} in {found['dtype']}"))
    if "operators" in found:
        lines.append(("operators", "\n".join(f"{name}: {chosen}" for name, chosen in found["operators"].items())))
        row = found["crossover"]
        origin = "measured" if row["measured"] else "estimates"
        limits = ", ".join(f"{field} {row[field]}" for field in crossovers.LIMITS)
        lines.append(("crossovers", f"{row['key']}: {limits} ({origin})\n{found['crossovers']['file']}"))
    held = "holds the embedded model" if cache["embedded_model"] else "without the embedded model yet"
    lines += [("cache", f"{cache['folder']} ({held})"), ("peers", named(found["peers"]))]
    return lines
