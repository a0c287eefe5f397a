"""The LLaMA-shaped families: how each says in its config.json what differs from LLaMA, in one set of names.

What transformers reads from a config.json is read here alike, its defaults for absent keys included; what would be
computed otherwise than it says is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from jindo_core.config_json import MOST_LAYERS, ConfigReader
from jindo_core.errors import InputError

FULL, SLIDING = "full_attention", "sliding_attention"

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "longllama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
}
"""model_type -> transformers' defaults for keys that the file leaves out, where they are not LLaMA's."""

ELSEWHERE = {
    "gpt_neox": "a GPT-NeoX, as Polyglot-Ko, KoAlpaca and KULLM are",
    "qwen3": "a Qwen3, whose queries and keys are normed",
    "mixtral": "a mixture of experts",
    "qwen2_moe": "a mixture of experts",
    "exaone": "an EXAONE, whose layers are named otherwise",
}
"""Known models of other shapes: what to call them."""

MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, 1.0),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "use_mrope": (False,),
}
"""Keys that would change what is computed, and the values that do not."""


def as_llama(raw: Mapping[str, Any], source: str = "config.json") -> dict[str, Any]:
    """The contents of a config.json in LLaMA's terms: defaults filled in, `attention_bias` (of q, k and v),
    `sliding_window` (None where no layer has one) and `layer_types` (empty where none has). `source`: its name in
    messages.

    Raises:
        InputError: another architecture, or a setting that is not computed here.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        said = f", {ELSEWHERE[kind]}" if isinstance(kind, str) and kind in ELSEWHERE else ""
        raise InputError(
            f"{source} has model_type {kind!r}{said}, expected one of {', '.join(FAMILIES)} or falcon: "
            "quantize other models through transformers with jindo_core.integrations"
        )
    for name, allowed in MUST_BE.items():
        if raw.get(name) is not None and raw[name] not in allowed:
            raise InputError(f"{source} has {name} {raw[name]!r}, expected {allowed[0]!r}")
    _check_rope(raw.get("rope_parameters") or raw.get("rope_scaling"), source)
    if raw.get("attention_dropout"):
        # Attention keeps no probabilities that could be dropped; adapters have a dropout of their own.
        warnings.warn(
            f"{source} has attention_dropout {raw['attention_dropout']}: attention is trained without dropout",
            stacklevel=3,
        )
    config: dict[str, Any] = {**FAMILIES[kind], **raw}
    if kind != "llama":  # whose classes alone read these two
        config["attention_bias"], config["mlp_bias"] = kind == "qwen2", False
    config["sliding_window"], config["layer_types"] = _windows(ConfigReader(config, source))
    return config


def _check_rope(rope: Any, source: str) -> None:
    if not isinstance(rope, Mapping):
        return
    if FULL in rope or SLIDING in rope:
        raise InputError(f"{source} has RoPE parameters for each kind of layer, expected one set of them for all")
    if rope.get("partial_rotary_factor", 1) != 1 or rope.get("mrope_section"):
        raise InputError(f"{source} has a RoPE that turns parts of a head otherwise, expected all of it alike")


def _windows(read: ConfigReader) -> tuple[int | None, tuple[str, ...]]:
    """The window's size and which layers have it, as transformers' classes of each family decide."""
    kind, layers, source = read("model_type"), read("num_hidden_layers"), read.source
    types = read("layer_types")
    has_window = read("sliding_window") is not None
    if kind == "qwen2" and not read.switch("use_sliding_window", False):
        has_window = False
    if kind in ("llama", "longllama"):
        has_window, types = False, None  # LLaMA has neither: transformers does not read them
    if types is not None:
        _check_types(types, layers, has_window, source)
    if not has_window or type(layers) is not int or layers > MOST_LAYERS:
        return None, ()  # a number of layers that can't be is refused with the other sizes
    window = read.whole("sliding_window")
    if types is None:
        first = read("max_window_layers", 28) if kind == "qwen2" else 0
        if type(first) is not int:
            raise read.fault("max_window_layers", first, "a whole number")
        types = [SLIDING if layer >= first else FULL for layer in range(layers)]
    if kind == "mistral" and FULL in types:
        raise InputError(
            f"{source} has a mistral with full_attention among its layer_types, expected sliding_attention in all "
            "of them or sliding_window null"
        )
    return (window, tuple(types)) if SLIDING in types else (None, ())


def _check_types(types: Any, layers: Any, has_window: bool, source: str) -> None:
    if not isinstance(types, list | tuple) or any(name not in (FULL, SLIDING) for name in types):
        raise InputError(f"{source} has layer_types {types!r}, expected a list of {FULL!r} and {SLIDING!r}")
    if len(types) != layers:
        raise InputError(f"{source} has {len(types)} layer_types, expected one for each of {layers} layers")
    if not has_window and SLIDING in types:
        raise InputError(f"{source} has {SLIDING!r} among its layer_types but no sliding_window: expected its size")
