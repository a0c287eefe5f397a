"""config.json for what is written, and families that a format has no rules for."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, BitsAndBytesConfig

from jindo_core.errors import InputError
from jindo_core.falcon import FalconConfig
from jindo_core.formats.gguf_writer import model_fields
from jindo_core.formats.hf_config import bitsandbytes_config, hf_config, nf4_config
from jindo_core.formats.meta_writer import meta_params
from jindo_core.integrations.transformers import JindoNF4Config
from jindo_core.long_memory import LongMemory
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


def test_ours_as_our_integration_writes_it():
    falcon = FalconConfig(
        vocab_size=32, hidden_size=64, ffn_hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, norms=1,
    )  # fmt: skip
    assert nf4_config(falcon, torch.float16, double_quant=False, whole=[]) == JindoNF4Config(False).to_dict()
    assert nf4_config(CONFIG, torch.float16, double_quant=True, whole=[]) == bitsandbytes_config(torch.float16, True)


def test_a_made_mistral_keeps_its_window(tmp_path):
    """Absent, it would be transformers' 4096."""
    for window in (None, 7):
        types = () if window is None else ("sliding_attention",)
        more = {"model_type": "mistral", "sliding_window": window, "layer_types": types}
        config = LlamaConfig(**vars(CONFIG) | more)
        raw = hf_config(config, tmp_path / "x.gguf", torch.float16)
        assert LlamaConfig.from_dict(raw) == config
        assert AutoConfig.for_model(**raw).sliding_window == window


MEMORY = LongMemory(layers=(0,), context=2048)


@pytest.mark.parametrize(
    ("more", "meta", "gguf"),
    [
        ({"model_type": "longllama"}, None, None),
        ({"model_type": "longllama", "memory": MEMORY}, "a 'longllama' with memory layers", "with memory layers"),
        ({"model_type": "mistral"}, None, None),
        ({"model_type": "mistral", "sliding_window": 4096}, "sees 4096 tokens", None),
        ({"model_type": "qwen2", "attention_bias": True}, "has biases", None),
        ({"model_type": "qwen2", "attention_bias": True, "sliding_window": 9}, "sees 9", "a 'qwen2' with a sliding"),
        ({"model_type": "qwen2", "attention_bias": True, "rope": LLAMA3}, "has biases", "'llama3' has no place in"),
    ],
)
def test_families_are_refused_where_their_text_would_be_wrong(more, meta, gguf):
    config = LlamaConfig(**vars(CONFIG) | more)
    for job, message in ((lambda: meta_params(config), meta), (lambda: model_fields(config, "x", "f16"), gguf)):
        if message is None:
            job()
            continue
        with pytest.raises(InputError, match=f"{message}.*: give --format safetensors$"):
            job()
