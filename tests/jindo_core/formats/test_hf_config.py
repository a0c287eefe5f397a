"""config.json for what is written, and families that a format has no rules for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, BitsAndBytesConfig

from jindo_core.errors import InputError
from jindo_core.formats.gguf_writer import model_fields
from jindo_core.formats.hf_config import bitsandbytes_config, hf_config
from jindo_core.formats.meta_writer import meta_params
from jindo_core.model import LlamaConfig
from jindo_core.rotary import rope_frequencies

CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=64, intermediate_size=172, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, eos_token_ids=(2, 5), tie_word_embeddings=True,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("rope", [None, LLAMA3, {"rope_type": "linear", "factor": 2.0}])
def test_what_is_made_is_read_by_transformers_and_by_us(tmp_path, rope):
    config = LlamaConfig(**vars(CONFIG) | {"rope": rope})
    raw = hf_config(config, tmp_path / "model.gguf", torch.bfloat16)
    assert LlamaConfig.from_dict(raw) == config
    theirs = AutoConfig.for_model(**raw)
    assert (theirs.head_dim, theirs.num_key_value_heads, theirs.eos_token_id) == (16, 2, [2, 5])
    assert theirs.dtype == torch.bfloat16


def test_ggufs_divisors_become_llama_3s_rule_again(tmp_path):
    plain, _ = rope_frequencies(CONFIG, 100)
    ruled = LlamaConfig(**vars(CONFIG) | {"rope": LLAMA3})
    factors = (plain / rope_frequencies(ruled, 100)[0]).tolist()
    config = LlamaConfig(**vars(CONFIG) | {"rope": {"rope_type": "factors", "factors": factors}})
    assert hf_config(config, tmp_path / "x.gguf", torch.float16)["rope_scaling"] == LLAMA3
    config = LlamaConfig(**vars(CONFIG) | {"rope": {"rope_type": "factors", "factors": [1.0, 3.0] * 4}})
    with pytest.raises(InputError, match="are not Llama 3's rule"):
        hf_config(config, tmp_path / "x.gguf", torch.float16)


@pytest.mark.parametrize("double", [True, False])
def test_quantization_as_transformers_writes_it(double):
    theirs = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float16,
    )  # fmt: skip
    assert bitsandbytes_config(torch.float16, double) == theirs.to_dict()


@pytest.mark.parametrize("more", [{"model_type": "qwen2"}, {"model_type": "mistral", "sliding_window": 4096}])
def test_other_families_are_refused_where_llamas_rules_would_be_wrong(more):
    config = SimpleNamespace(**vars(CONFIG) | more)
    with pytest.raises(InputError, match="expected a LLaMA for GGUF: give --format safetensors"):
        model_fields(config, "x", "f16")
    with pytest.raises(InputError, match="expected a LLaMA for Meta's format"):
        meta_params(config)
