"""A program that was written for bitsandbytes, on this engine: one line more, and bitsandbytes need not be installed.

    python examples/bitsandbytes_code.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from jindo_core.integrations import use_for_bitsandbytes


def main() -> None:
    restore = use_for_bitsandbytes()  # the line
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), quantization_config=config)
    layer = model.model.layers[0].mlp.up_proj
    print(type(layer).__name__, layer)
    print("logits:", tuple(model(torch.tensor([[1, 2, 3]])).logits.shape))
    restore()  # what is loaded from now on is bitsandbytes' again


def tiny_model() -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    folder = tempfile.mkdtemp()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
