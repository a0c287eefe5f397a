"""Steps within less memory: AdamW's moments and a model's layers, more or less of them resident; and loading.

`python -m bench.budgets load FOLDER` loads a model in a process of its own and prints how much it grew, and how fast it
was beside a plain read of the same files; with --cold the files are not in the page cache before either.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench import peers, steps
from bench.cases import Setup
from bench.shapes import Shape
from bench.timing import OURS, Case
from jindo_core.formats import open_checkpoint
from jindo_core.formats.checksums import checksums
from jindo_core.loader import load_model
from jindo_core.memory import current_bytes, give_back_freed, peak_bytes
from jindo_core.model import LlamaForCausalLM
from jindo_core.nf4 import NF4Linear, quantize_nf4
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.plan import spread
from jindo_core.streaming import LayerStream

SHARES = (1.0, 0.5, 0.1, 0.0)
"""Of what stays on the device."""


def adapters(shape: Shape, device: torch.device, r: int = 8) -> list[nn.Parameter]:
    """All A and B of a model whose linears are all adapted, with gradients."""
    extents = [extent for size in shape.matrices.values() for _ in range(3 * shape.layers) for extent in size]
    made = [nn.Parameter(torch.randn(r, extent, device=device)) for extent in extents]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def optimizer_case(setup: Setup, shape: Shape, share: float, store: str, *, bits: int = 32) -> tuple[Case, PagedAdamW]:
    """A step of PagedAdamW with that share of its moments resident, beside the other optimizers for little memory."""
    params = adapters(shape, setup.device)
    count = sum(p.numel() for p in params)
    size = count * (8 if bits == 32 else 2)
    optimizer = PagedAdamW(params, lr=1e-5, state_bits=bits, resident_bytes=math.ceil(share * size * 1.1), store=store)
    others: dict[str, torch.optim.Optimizer] = {
        "torch": torch.optim.AdamW(adapters(shape, setup.device), lr=1e-5),
    }
    if setup.device.type == "cuda" and peers.available("bitsandbytes", setup.device):
        bnb = peers.load("bitsandbytes").optim
        kind = bnb.PagedAdamW32bit if bits == 32 else bnb.PagedAdamW8bit
        others["bitsandbytes paged"] = kind(adapters(shape, setup.device), lr=1e-5)
    if setup.device.type == "cuda" and peers.available("torchao", setup.device):
        from torchao.optim import CPUOffloadOptimizer

        others["torchao offload"] = CPUOffloadOptimizer(adapters(shape, setup.device), torch.optim.AdamW, lr=1e-5)
    calls: dict[str, Callable[[int], Any]] = {OURS: lambda _: optimizer.step()}
    calls |= {name: lambda _, o=other: o.step() for name, other in others.items()}
    name = f"paged AdamW {bits}-bit, {share:.0%} resident"
    moved = (28 if bits == 32 else 16) * count
    case = Case(
        "paged_adamw", name, f"{shape.name} {count / 1e6:.1f}M", moved, "GB/s", "copy", calls, implementation="paged"
    )  # fmt: skip
    return case, optimizer


def streaming_case(setup: Setup, shape: Shape, share: float, store: str, tokens: int = 512) -> tuple[Case, LayerStream]:
    """A checkpointed training step with that share of the layers resident."""
    weights = steps.random_weights(shape, setup.dtype, setup.device)
    ids = torch.randint(0, shape.vocab, (1, tokens), device=setup.device)
    model = steps.ours(shape, weights, train=True, checkpointing=True)
    assert isinstance(model, LlamaForCausalLM)
    del weights
    stream = LayerStream(setup.device, store)
    for number in spread(round((1 - share) * shape.layers), shape.layers):
        stream.take(number, model.model.layers[number])
    if stream.layers:
        model.model.stream = stream
    step = steps.training_step(model, steps.adamw_of(model, OURS), ids, steps.backward)
    work = 6 * tokens * shape.linear_weights
    case = Case(
        "streaming", f"training step, {share:.0%} of the layers resident", f"{shape.name} x {tokens}", work, "TFLOP/s",
        "gemm", {OURS: step}, rows=tokens, tokens=tokens, implementation="whole step",
    )  # fmt: skip
    return case, stream


def stalled(call: Callable[[int], Any], counted: Any, rounds: int = 3) -> float:
    """The share of a call's time in which it waited for copies. counted: what has the `counters`."""
    before, started = counted.counters.stall_seconds, time.perf_counter()
    for turn in range(rounds):
        call(turn)
    waited = counted.counters.stall_seconds - before
    return waited / (time.perf_counter() - started)


# --- loading --------------------------------------------------------------------------------------------


def write_checkpoint(shape: Shape, folder: Path, *, nf4: bool = False) -> None:
    """A model of that shape with random weights, in Hugging Face's layout: in bf16, or the layers' linears in NF4 and a
    checksum a tensor."""
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    weights: dict[str, Tensor] = {
        name: torch.randn(p.shape).mul_(0.02).bfloat16() for name, p in model.named_parameters()
    }
    if nf4:
        for name in [name for name in weights if "_proj." in name]:
            parts = quantize_nf4(weights.pop(name)).state_dict(name)
            weights |= {key: part.clone() for key, part in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    metadata = checksums(weights) if nf4 else {"format": "pt"}
    save_file(weights, str(folder / "model.safetensors"), metadata=metadata)
    config = {
        "model_type": "llama", "vocab_size": shape.vocab, "hidden_size": shape.hidden, "hidden_act": "silu",
        "intermediate_size": shape.inner, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def plain_read(files: list[Path]) -> float:
    """Seconds to read the files' bytes, 16 MiB at a time, into one buffer."""
    buffer = memoryview(bytearray(1 << 24))
    started = time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - started


def evict(files: list[Path]) -> None:
    """Out of the page cache."""
    for file in files:
        with open(file, "rb") as opened:
            os.fdatasync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loaded(folder: Path, *, cold: bool = False) -> dict[str, float]:
    """Loads; bytes by which the process grew at most, of the loaded model, and of the largest tensor; seconds, bytes of
    the files, and seconds to read these plainly.

    cold: the files are not in the page cache before either; else they are.
    """
    device = torch.device("cpu")
    NF4Linear.from_linear(nn.Linear(64, 64))  # libraries, threads
    checkpoint = open_checkpoint(folder)
    plain_read(checkpoint.files)
    if cold:
        evict(checkpoint.files)
    read = plain_read(checkpoint.files)
    if cold:
        evict(checkpoint.files)
    give_back_freed()
    before = current_bytes(device)
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    model = load_model(folder, device="cpu", dtype="bf16")
    seconds = time.perf_counter() - started
    grown = peak_bytes(device) - before
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if t is not None)
    largest = max(2 * m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    return {
        "peak": grown, "model": held, "largest_tensor": largest, "seconds": seconds, "bytes": checkpoint.nbytes,
        "plain_read_seconds": read,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.budgets")
    parser.add_argument("what", choices=["load"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cold", action="store_true", help="the files are not in the page cache")
    given = parser.parse_args()
    print(json.dumps(loaded(given.folder, cold=given.cold)))


if __name__ == "__main__":
    main()
