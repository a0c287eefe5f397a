"""Any causal LM of transformers in NF4: load, use, save, load again.

    python examples/transformers_nf4.py my-quantized-model [MODEL]

MODEL is a folder or a Hub id; without one a tiny random Falcon, whose linears bitsandbytes does not find.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, FalconConfig

from jindo_core.integrations import JindoNF4Config


def main(folder: str, source: str | None = None) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        source or tiny_model(), quantization_config=JindoNF4Config(modules_to_not_convert=["lm_head"])
    )
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    print(f"{model.num_parameters():,} parameters in {held:,} bytes")
    prompt = torch.tensor([[1, 2, 3]])
    print(model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())

    # Written under bitsandbytes' keys; reading it back needs jindo_core.integrations imported, and no configuration.
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    print("the same logits:", torch.equal(again(prompt).logits, model(prompt).logits))


def tiny_model() -> str:
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False)
    folder = tempfile.mkdtemp()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "my-quantized-model", *sys.argv[2:3])
