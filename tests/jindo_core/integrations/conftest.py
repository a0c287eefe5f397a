"""Tiny random models of several architectures, saved as a user would have them."""

from __future__ import annotations

import pytest
import torch
import transformers

SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = SIZES | {"intermediate_size": 192, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
# Widths are multiples of 64: where a row is not, bitsandbytes' CPU kernel dequantizes wrongly (docs/log.md).
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA_LIKE),
    "mistral": lambda: transformers.MistralConfig(**LLAMA_LIKE, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA_LIKE, tie_word_embeddings=True),
    "falcon": lambda: transformers.FalconConfig(**SIZES, multi_query=True, parallel_attn=True, alibi=False),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=256),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved("llama", dtype): the folder of a tiny random model of that architecture."""
    made = {}

    def make(name, dtype=torch.float32):
        if (name, dtype) not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases that are not all zero
                    parameter.data += torch.randn_like(parameter) * 0.02
            made[name, dtype] = tmp_path_factory.mktemp(name)
            model.to(dtype).save_pretrained(made[name, dtype])
        return made[name, dtype]

    return make


@pytest.fixture(scope="session")
def load():
    """load(folder, config, …): the model, by AutoModelForCausalLM."""

    def run(folder, config=None, **more):
        more |= {} if config is None else {"quantization_config": config}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **more)

    return run


@pytest.fixture
def ids():
    return torch.arange(40).view(2, 20) % 128
