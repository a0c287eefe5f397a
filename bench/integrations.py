"""The same trainer around bitsandbytes' layers and around ours: a loop with peft, and transformers' Trainer.

Both sides have transformers' model, peft's adapters (ours by `register_fused_lora`) and the same NF4 codes.
bitsandbytes' side has torch's AdamW: its own paged one needs a GPU.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench import peers, steps
from bench.shapes import Shape
from bench.timing import OURS, Case
from jindo_core.nf4 import NF4Linear
from jindo_core.paged_adamw import PagedAdamW

TRAINER_STEPS = 2
OPTIMIZERS: dict[bool, type[torch.optim.Optimizer]] = {True: PagedAdamW, False: torch.optim.AdamW}


def adapted(shape: Shape, weights: steps.Weights, *, ours: bool) -> nn.Module:
    """transformers' LLaMA with peft's adapters on our layers or on bitsandbytes', in training mode."""
    if not ours:
        return steps.peer(shape, weights, train=True)
    from jindo_core.integrations import register_fused_lora

    return steps.peer(shape, weights, train=True, linear=NF4Linear, register=register_fused_lora)


def loop_call(ours: bool, shape: Shape, weights: steps.Weights, ids: Tensor) -> Callable[[int], Tensor]:
    """A step of a plain loop."""
    model = adapted(shape, weights, ours=ours)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[ours](trained, lr=1e-5, weight_decay=0.0)
    return steps.training_step(model, optimizer, ids, Tensor.backward)


def trainer_call(ours: bool, shape: Shape, weights: steps.Weights, ids: Tensor) -> Callable[[int], Tensor]:
    """`Trainer.train()` of TRAINER_STEPS steps, what it does before and after them included."""
    transformers = peers.load("transformers")
    model = adapted(shape, weights, ours=ours)
    rows = [{"input_ids": ids[0], "labels": ids[0]}] * TRAINER_STEPS
    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(), max_steps=TRAINER_STEPS, per_device_train_batch_size=1, save_strategy="no",
        learning_rate=1e-5, use_cpu=ids.device.type == "cpu", report_to="none", disable_tqdm=True, logging_steps=10**9,
    )  # fmt: skip

    def train(_: int) -> Tensor:
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows,
            optimizer_cls_and_kwargs=(OPTIMIZERS[ours], {"lr": 1e-5, "weight_decay": 0.0}),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        return torch.tensor(trainer.train().training_loss)

    return train


def case(what: str, shape: Shape, dtype: torch.dtype, device: torch.device, tokens: int) -> Case:
    """`what`: "peft loop" or "Trainer"."""
    make = {"peft loop": loop_call, "Trainer": trainer_call}[what]
    counted = tokens * (TRAINER_STEPS if what == "Trainer" else 1)
    weights = steps.random_weights(shape, dtype, device)
    ids = torch.randint(0, shape.vocab, (1, tokens), device=device)
    calls: dict[str, Callable[[int], Any]] = {OURS: make(True, shape, weights, ids)}
    if steps.peers_here(device):
        peers.add(calls, "bitsandbytes", functools.partial(make, False, shape, weights, ids))
    flops = steps.training_flops(shape, tokens) * counted // tokens
    return Case(
        "integrations", what, f"{shape.name} seq {tokens}", flops, "TFLOP/s", "gemm", calls, rows=tokens,
        tolerance=steps.LOSSES_AGREE, tokens=counted, implementation="whole step",
    )  # fmt: skip
