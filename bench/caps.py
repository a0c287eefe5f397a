"""Training steps of whole models under a hard cap on a GPU's memory, as the planner chose them.

    python -m bench.caps 7b 5400
    python -m bench.caps 70b 24000 --tokens 2048

Random NF4 weights are made on the device, a layer at a time, so that a model larger than the cap can be built under it.
The allocator is capped at the budget less the context; what the plan says stands beside what was held.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import nn

from bench.shapes import SHAPES, Shape
from jindo_core.budget import fit
from jindo_core.head import StreamedHead
from jindo_core.lora import attach_lora
from jindo_core.memory import CUDA_CONTEXT, Relief, current_bytes, keep_budget, peak_bytes, sizes_of
from jindo_core.model import LlamaForCausalLM
from jindo_core.nf4 import NF4Linear
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.plan import LINEARS, Job, plan, spread
from jindo_core.recompute import CheckpointOffload
from jindo_core.step import backward
from jindo_core.streaming import LayerStream
from jindo_core.tune import machine_name, random_nf4

GOALS = (
    ("7b", 5400), ("8b", 8000), ("13b", 10_000), ("33b", 20_000), ("70b", 24_000), ("65b", 40_000), ("70b", 48_000),
)  # fmt: skip
"""(shape, MB): the budgets of the design, all linears, r 8, one row."""


def build(shape: Shape, job: Job, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """The model of a plan, with its adapters, each part where the plan has it."""
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    stack = model.model
    if job.offload_layers:
        stack.stream = LayerStream(device)
    streamed = set(spread(job.offload_layers, shape.layers))
    for number, layer in enumerate(stack.layers):
        for path, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                parent, _, name = path.rpartition(".")
                weight = random_nf4((linear.out_features, linear.in_features), dtype, device)
                setattr(layer.get_submodule(parent), name, NF4Linear(weight))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight = nn.Parameter(torch.ones(shape.hidden, dtype=dtype, device=device), requires_grad=False)
        if number in streamed and stack.stream is not None:
            stack.stream.take(number, layer)
    stack.norm.weight = nn.Parameter(torch.ones(shape.hidden, dtype=dtype, device=device), requires_grad=False)

    def table(place: torch.device) -> nn.Parameter:
        made = torch.randn(shape.vocab, shape.hidden, dtype=dtype, device=place).mul_(0.02)
        return nn.Parameter(made, requires_grad=False)

    host = torch.device("cpu")
    stack.embed_tokens.weight = table(host if job.offload_embedding else device)
    head = table(host if job.offload_head else device)
    if job.offload_head:
        model.lm_head = StreamedHead(head, device)
    else:
        model.lm_head.weight = head
    attach_lora(model, job.lora_r, 16, job.dropout, "all-linear")
    stack.checkpointed_layers = job.checkpointed_layers
    if job.offload_checkpoints:
        stack.checkpoint_offload = CheckpointOffload()
    return model.train()


def run(
    shape: Shape, budget_MB: int, tokens: int, dtype: torch.dtype, device: torch.device, steps: int
) -> dict[str, Any]:
    """`steps` steps under the cap, after one that compiles; the plan's peak beside the one that was held, in bytes."""
    sizes = sizes_of(shape.config())
    asked = Job(sizes=sizes, length=tokens, micro_batch=1, lora_r=8, targets=LINEARS, dropout=0.0)
    job, changes, fits = fit(asked, budget_MB * 1_000_000)
    if not fits:
        raise RuntimeError(f"{shape.name} does not fit {budget_MB} MB: {plan(job).peak_bytes / 1e6:,.0f} planned")
    keep_budget(device, budget_MB)
    model = build(shape, job, dtype, device)
    loaded = current_bytes(device)
    resident = "auto" if job.resident_states is None else job.resident_states
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, resident_bytes=resident)
    relief, given_way = Relief(model, optimizer, 1), []
    ids = torch.randint(0, shape.vocab, (1, tokens), device=device)

    def forward_and_back() -> float:
        loss = model(ids, labels=ids).loss
        assert loss is not None
        backward(loss)
        return loss.item()

    seconds, losses = [], []
    for step in range(steps + 1):
        started = time.perf_counter()
        losses.append(relief.outlive(forward_and_back, step, given_way.append))
        relief.outlive(optimizer.step, step, given_way.append, in_update=True)
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    best = min(seconds[1:])
    held = peak_bytes(device)
    stalled = optimizer.counters.stall_seconds
    stalled += model.model.stream.counters.stall_seconds if model.model.stream is not None else 0.0
    return {
        "what": "train under a cap", "shape": shape.name, "tokens": tokens, "budget_MB": budget_MB,
        "device": machine_name(device), "planned_bytes": plan(job).peak_bytes, "peak_bytes": held,
        "allocated_bytes": torch.cuda.max_memory_allocated(device) + CUDA_CONTEXT if device.type == "cuda" else None,
        "loaded_bytes": loaded, "planned_over_held": plan(job).peak_bytes / held, "seconds": best,
        "tokens_per_s": tokens / best, "stalled_share": stalled / sum(seconds), "losses": losses,
        "changes": [change.text for change in changes], "gave_way": given_way, "capped": device.type == "cuda",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.caps", allow_abbrev=False)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("budget_MB", type=int)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    dtype, device = getattr(torch, given.dtype), torch.device(given.device)
    print(json.dumps(run(SHAPES[given.shape], given.budget_MB, given.tokens, dtype, device, given.steps)))


if __name__ == "__main__":
    main()
