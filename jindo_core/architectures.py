"""The model families: from a config.json to a configuration, and from that to its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jindo_core import falcon
from jindo_core.causal_lm import CausalLM, ModelConfig
from jindo_core.falcon import FalconConfig, FalconForCausalLM
from jindo_core.model import LlamaConfig, LlamaForCausalLM


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a config.json describes, by its model_type.

    Raises:
        InputError: a family that is not here, or numbers that can't be.
    """
    if raw.get("model_type") in falcon.MODEL_TYPES:
        return FalconConfig.from_dict(raw)
    return LlamaConfig.from_dict(raw)  # which refuses what it does not know


def model_class(config: ModelConfig) -> type[CausalLM]:
    """The class of the model that `config` describes."""
    return FalconForCausalLM if isinstance(config, FalconConfig) else LlamaForCausalLM


def build(config: ModelConfig) -> CausalLM:
    """The model of `config`, with fresh weights on the default device."""
    if isinstance(config, FalconConfig):
        return FalconForCausalLM(config)
    assert isinstance(config, LlamaConfig)
    return LlamaForCausalLM(config)
