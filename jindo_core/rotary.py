"""The angles of rotary position embedding, as every architecture here takes them: frequencies and their scalings, and
what a config.json says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from jindo_core.config_json import ConfigReader
from jindo_core.errors import InputError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_MAY_HAVE = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


class RotaryConfig(Protocol):
    """What the angles depend on. rope: the scaling's parameters, with `rope_type`; None without scaling."""

    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope(self) -> Mapping[str, Any] | None: ...


def read_rope(read: ConfigReader, default_theta: float) -> tuple[float, dict[str, Any] | None]:
    """RoPE's base, and its scaling's parameters with `rope_type`, None without scaling; each seen to be possible.

    Raises:
        InputError: a scaling that is not known, a parameter that is missing or impossible.
    """
    given = read.rope()
    theta = given.positive("rope_theta", read.positive("rope_theta", default_theta))
    kind = given("rope_type", given("type", "default"))
    if kind not in ROPE_TYPES:
        raise InputError(f"{read.source} has rope_type {kind!r}, expected one of {ROPE_TYPES}")
    if kind == "default":
        return theta, None
    for name in _NEEDS.get(kind, ()):
        given.positive(name)
    for name in _MAY_HAVE:
        if isinstance(given(name), bool) or given(name, 0) != 0:  # 0 counts as left out
            given.positive(name)
    given.switch("truncate", True)
    rope = {name: value for name, value in given.raw.items() if name not in ("type", "rope_theta")}
    rope["rope_type"] = kind
    context = "original_max_position_embeddings"
    for reader in (given, read):
        if reader(context) is not None:
            rope[context] = reader.whole(context)
    return theta, rope


def check_angles(config: RotaryConfig, source: str) -> None:
    """See that numbers that are possible each by itself give angles together. Raises InputError; `source` has them."""
    try:
        with torch.device("cpu"):  # whatever device a model is being made on
            inverse, attention = rope_frequencies(config, config.max_position_embeddings)
        sound = bool(inverse.isfinite().all()) and math.isfinite(attention)
    except ArithmeticError:  # a base of 1 has no logarithm to divide by
        sound = False
    if not sound:
        scaling = "" if config.rope is None else f" and the scaling {dict(config.rope)}"
        raise InputError(f"{source} has rope_theta {config.rope_theta}{scaling}: expected what gives finite angles")


def rope_frequencies(config: RotaryConfig, length: int) -> tuple[Tensor, float]:
    """Inverse frequencies, fp32 [D/2] on the CPU, and the factor on cos and sin, for a sequence of `length`.

    RoPE: Su et al. 2021 (arXiv:2104.09864). Scalings: linear (arXiv:2306.15595), dynamic NTK, llama3
    (arXiv:2407.21783), yarn (arXiv:2309.00071).
    """
    dim, base = config.head_dim, config.rope_theta
    scaling = config.rope or {"rope_type": "default"}
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    match scaling["rope_type"]:
        case "linear":
            return 1.0 / base**exponent / scaling["factor"], 1.0
        case "dynamic":
            # The base grows with the sequence once it outgrows the context of the pretraining.
            context, factor = config.max_position_embeddings, scaling["factor"]
            stretch = factor * max(length, context) / context - (factor - 1)
            return 1.0 / (base * stretch ** (dim / (dim - 2))) ** exponent, 1.0
        case "llama3":
            return _llama3_frequencies(1.0 / base**exponent, config, scaling), 1.0
        case "yarn":
            return _yarn_frequencies(base**exponent, config, scaling)
        case "factors":  # GGUF writes llama3 scaling out as a divisor for each frequency
            return 1.0 / base**exponent / torch.tensor(scaling["factors"], dtype=torch.float32), 1.0
    return 1.0 / base**exponent, 1.0


def _llama3_frequencies(inverse: Tensor, config: RotaryConfig, scaling: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
    rotations = context * inverse / (2 * math.pi)  # turns within the original context
    smooth = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / scaling["factor"] + smooth * inverse


def _yarn_frequencies(
    frequency: Tensor, config: RotaryConfig, scaling: Mapping[str, Any]
) -> tuple[Tensor, float]:
    dim, base = config.head_dim, config.rope_theta
    context = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
    factor = scaling.get("factor") or config.max_position_embeddings / context

    def dimension(rotations: float) -> float:
        """The dimension that turns so many times within the original context."""
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    inverse = ramp / (factor * frequency) + (1 - ramp) / frequency

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return inverse, attention
