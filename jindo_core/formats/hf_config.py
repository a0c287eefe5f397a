"""config.json of a model that is written in Hugging Face's layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from jindo_core.causal_lm import ModelConfig
from jindo_core.errors import InputError
from jindo_core.files import read_json
from jindo_core.formats.bitsandbytes import OUR_METHOD
from jindo_core.model import LlamaConfig
from jindo_core.rotary import rope_frequencies


def hf_config(config: ModelConfig, source: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json: those of the source's where it has one, else made from `config`.

    Args:
        source: the model's folder or file. dtype: of the weights that are not quantized.
    """
    file = source / "config.json"
    raw = read_json(file) if source.is_dir() and file.is_file() else _made(config)
    raw.pop("quantization_config", None)
    raw.pop("dtype", None)
    return raw | {"torch_dtype": str(dtype).removeprefix("torch.")}


ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
UNSEEN = ("falcon",)
"""Families whose linear layers are a subclass of nn.Linear, which transformers' bitsandbytes passes over."""


def require_llama(config: ModelConfig, format: str) -> LlamaConfig:
    """The configuration, of a model that a format's rules for LLaMA's shape hold for.

    Raises:
        InputError: another family, or a LongLLaMA whose memory would be forgotten while the text still looks right.
    """
    if not isinstance(config, LlamaConfig) or config.memory is not None:
        what = f"a {config.model_type!r}" + ("" if config.memory is None else " with memory layers")
        raise InputError(f"the model is {what}, which {format} has no place for: give --format safetensors")
    return config


def require_bitsandbytes(config: ModelConfig) -> None:
    """Refuse a model whose quantized weights transformers would not load through bitsandbytes.

    Raises:
        InputError: a Falcon.
    """
    if config.model_type in UNSEEN:
        raise InputError(
            f"the model is a {config.model_type!r}, of which bitsandbytes finds no linear layer to read NF4 into: give "
            "--format jindo, which transformers loads with jindo_core.integrations"
        )


def _made(config: ModelConfig) -> dict[str, Any]:
    kind, eos = config.model_type, config.eos_token_ids
    if not isinstance(config, LlamaConfig) or kind not in ARCHITECTURES:
        raise InputError(f"no config.json can be made for a {kind!r}: take the model from its source")
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        **{
            name: getattr(config, name)
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
                "tie_word_embeddings", "attention_bias", "mlp_bias",
            )
        },
    }  # fmt: skip
    if kind != "llama":  # whose absent window would be 4096
        raw |= {"sliding_window": config.sliding_window}
    if config.rope is not None:
        raw["rope_scaling"] = _named_scaling(config)
    if eos:
        raw["eos_token_id"] = eos[0] if len(eos) == 1 else list(eos)
    return raw


def _named_scaling(config: LlamaConfig) -> dict[str, Any]:
    """RoPE's scaling; GGUF's list of divisors becomes Llama 3's rule again, where that gives the same."""
    assert config.rope is not None
    if config.rope["rope_type"] != "factors":
        return dict(config.rope)
    rule = {
        "rope_type": "llama3", "factor": float(max(config.rope["factors"])), "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    length = config.max_position_embeddings
    ruled, _ = rope_frequencies(LlamaConfig(**{**vars(config), "rope": rule}), length)
    if not torch.allclose(ruled, rope_frequencies(config, length)[0], rtol=1e-5, atol=0):
        raise InputError("the RoPE divisors of this GGUF are not Llama 3's rule: config.json has no place for others")
    return rule


def nf4_config(config: ModelConfig, dtype: torch.dtype, *, double_quant: bool, whole: Sequence[str]) -> dict[str, Any]:
    """config.json's quantization_config: bitsandbytes', or ours (`JindoNF4Config`) where that would find no layer.

    Args:
        dtype: of the arithmetic. whole: paths of linear layers, beside the head, that are not quantized.
    """
    if config.model_type not in UNSEEN:
        return bitsandbytes_config(dtype, double_quant, whole)
    return {
        "block_size": 64, "compute_dtype": None, "double_quant": double_quant, "modules_to_not_convert": None,
        "quant_method": OUR_METHOD,
    }  # fmt: skip


def bitsandbytes_config(dtype: torch.dtype, double_quant: bool, whole: Sequence[str] = ()) -> dict[str, Any]:
    """config.json's quantization_config, as transformers writes it for bitsandbytes' NF4.

    Args:
        dtype: of the arithmetic. whole: paths of linear layers, beside the head, that are not quantized.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [*whole, "lm_head"] if whole else None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
