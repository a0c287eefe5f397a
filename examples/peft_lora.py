"""peft on NF4 layers with the fused LoRA operator: train in a plain loop, save, merge.

Needs `pip install peft`.

    python examples/peft_lora.py my-adapter
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, LlamaConfig

import jindo_core as jc
from jindo_core.integrations import register_fused_lora


def main(folder: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    # A model that is in memory already; one from disk comes with quantization_config=JindoNF4Config().
    model = jc.patch_model(AutoModelForCausalLM.from_config(config))
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    # Without register_fused_lora peft's own layer runs: the same numbers, but slower, and it can't merge.
    model = get_peft_model(model, register_fused_lora(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")))
    model.print_trainable_parameters()

    optimizer = jc.PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    ids = torch.arange(24).view(2, 12)  # to be learnt by heart
    for step in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            print(f"step {step + 1}  loss {loss.item():.3f}")
    model.save_pretrained(folder)  # peft's files, which jindo_core.load_adapter reads

    model.eval()
    apart = model(input_ids=ids).logits
    merged = model.merge_and_unload()  # onto NF4: dequantized, added, quantized again
    drift = (merged(input_ids=ids).logits - apart).norm() / apart.norm()
    print(f"merged; the logits moved by {drift:.1%}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "my-adapter")
