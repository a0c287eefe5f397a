"""What a training run will hold in memory, worked out before it starts."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from jindo_core.kernels import linear_cross_entropy, lora_matmul
from jindo_core.model import LlamaConfig, LlamaForCausalLM
from jindo_core.nf4 import NF4Linear

CUDA_CONTEXT = 500 << 20
"""What a CUDA process occupies before its first tensor; no allocator's figures show it."""


@dataclass(frozen=True)
class MemoryPlan:
    """Rows of (what, bytes) that add up to the expected peak."""

    rows: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        return sum(size for _, size in self.rows)


def plan_training(model: LlamaForCausalLM, *, rows: int, length: int, gradient_checkpointing: bool) -> MemoryPlan:
    """The plan of one training step.

    Args:
        model: with its adapter attached.
        rows: sequences in a micro-batch. length: tokens of the longest one, padding included.
    """
    config, itemsize = model.config, model.dtype.itemsize
    linears = [module for module in model.modules() if isinstance(module, NF4Linear)]
    packed = sum(linear.nf4.nbytes for linear in linears)
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    dense = sum(p.nbytes for p in model.parameters() if not p.requires_grad and p.dtype != torch.uint8)
    tokens = rows * length
    layer = activation_bytes(config, tokens, itemsize)
    boundary = tokens * config.hidden_size * itemsize
    if gradient_checkpointing:
        activations = config.num_hidden_layers * boundary + layer
    else:
        activations = config.num_hidden_layers * layer
    head = linear_cross_entropy.workspace_bytes(tokens, config.vocab_size, model.dtype) + 4 * boundary
    widest = max(
        (
            lora_matmul.workspace_bytes(tokens, m.in_features, m.out_features, model.dtype, dropout=0.1)
            for m in linears
        ),
        default=0,
    )
    process = CUDA_CONTEXT if model.device.type == "cuda" else _process_bytes(packed + trainable + dense)
    return MemoryPlan(
        (
            ("weights in NF4", packed),
            (f"embedding, norms, head ({_short(model.dtype)})", dense),
            ("adapter (fp32)", trainable),
            ("its gradients", trainable),
            ("AdamW states (fp32)", 2 * trainable),
            (f"activations ({rows} × {length} tokens)", activations),
            ("loss, a chunk of logits at a time", head),
            ("scratch for one dequantized layer", widest),
            ("CUDA context" if model.device.type == "cuda" else "Python and its libraries", process),
        )
    )


def activation_bytes(config: LlamaConfig, tokens: int, itemsize: int) -> int:
    """Bytes one decoder layer keeps for its backward pass, every linear adapted.

    Both norms keep their input in fp32. Of the hidden size: the two norms' outputs. Of the query width: q and
    the attention's output; of the key/value width: k and v. Of the MLP's width: gate, silu(gate), up and
    their product.
    """
    queries = config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    narrow = 2 * config.hidden_size + 2 * queries + 2 * groups + 4 * config.intermediate_size
    return tokens * (narrow * itemsize + 8 * config.hidden_size + 4 * config.num_attention_heads)


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: the allocator's peak and the context on CUDA, else the RSS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) + CUDA_CONTEXT
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss: a child inherits its parent's
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) << 10
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def current_bytes(device: torch.device) -> int:
    """What this process holds now."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) + CUDA_CONTEXT
    status = Path("/proc/self/statm")
    if not status.exists():  # no Linux: the peak is the nearest figure there is
        return peak_bytes(device)
    import resource

    return int(status.read_text().split()[1]) * resource.getpagesize()


def give_back_freed() -> None:
    """Return to the system what the C allocator keeps of freed tensors; a loaded 1.1B model is 0.9 GB smaller then.

    glibc only: elsewhere freed memory stays with the process.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _process_bytes(model: int) -> int:
    """What the process holds beyond the model that it has loaded."""
    return max(current_bytes(torch.device("cpu")) - model, 0)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))
