"""A whole QLoRA step of SmolLM2-135M beside transformers + peft + bitsandbytes on the same weights and rows."""

from __future__ import annotations

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from jindo_core.embedded import embedded_model
from jindo_core.loader import load_model
from jindo_core.lora import attach_lora

ROWS, LENGTH = 8, 96
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours():
    model = load_model(embedded_model(), dtype="bf16", device="cpu")
    return attach_lora(model, r=8, alpha=16, target_modules="all-linear").train()


def theirs():
    path = embedded_model()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            layer.load_state_dict(module.state_dict())
            setattr(model.model.get_submodule(parent), leaf, layer.to("cpu"))
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)).train()


@pytest.mark.parametrize("who", ["jindo", "peers"])
def test_step(benchmark, who):
    model = ours() if who == "jindo" else theirs()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids = torch.randint(0, 49152, (ROWS, LENGTH))
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100

    def step():
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    assert step().isfinite()
    benchmark.pedantic(step, warmup_rounds=1, rounds=5)
    benchmark.extra_info["tokens/s"] = round(ids.numel() / benchmark.stats.stats.median, 1)
