"""bitsandbytes' 4-bit weights in a checkpoint: a weight X is the tensors X, X.absmax, X.quant_map, … (`NF4Weight`).

Our own NF4 files use the same keys, so that transformers and bitsandbytes load them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from jindo_core.errors import InputError
from jindo_core.nf4 import PARTS, NF4Weight, check_described, described_state

STATE_PREFIX = "quant_state.bitsandbytes__"
OUR_METHOD = "jindo_nf4"
"""config.json's quant_method of what `jindo_core.integrations` saves: the same tensors."""


def check_quantization(raw: Mapping[str, Any], file: Path) -> None:
    """See that a config.json's quantization, if it has one, is bitsandbytes' NF4 or ours.

    Raises:
        InputError: another method, 8 bits, or FP4.
    """
    settings = raw.get("quantization_config")
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise InputError(f"{file} has quantization_config {settings!r}, expected an object")
    method = settings.get("quant_method", "bitsandbytes")
    if method == OUR_METHOD:
        return
    if method != "bitsandbytes":
        raise InputError(f"{file} is quantized with {method!r}: expected bitsandbytes' NF4, or the 16-bit original")
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        raise InputError(f"{file} is quantized in bitsandbytes' 8 bits: expected its NF4, or the 16-bit original")
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise InputError(f"{file} is quantized in {kind!r}: expected bitsandbytes' NF4, or the 16-bit original")
    if settings.get("bnb_4bit_quant_storage", "uint8") not in ("uint8", None):
        storage = settings["bnb_4bit_quant_storage"]
        raise InputError(f"{file} stores its 4-bit weights as {storage!r}: save it with bnb_4bit_quant_storage 'uint8'")


def group_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """{quantized weight: its tensors' names}, from the names of all tensors.

    Raises:
        InputError: a weight in 4 bits of another kind than NF4.
    """
    names = set(names)
    weights: dict[str, list[str]] = {}
    for name in sorted(names):
        weight, _, kind = name.partition("." + STATE_PREFIX)
        if not kind:
            continue
        if kind != "nf4":
            raise InputError(f"the tensor {weight} is quantized in {kind!r}: expected NF4, or the 16-bit original")
        if weight not in names:
            raise InputError(f"the tensor {weight} is missing, while {name} is there: download the checkpoint again")
        weights[weight] = [weight, *(f"{weight}.{part}" for part in PARTS if f"{weight}.{part}" in names)]
    return weights


def logical_shape(weight: str, state: Tensor, file: Path) -> tuple[int, ...]:
    """The shape a quantized weight stands for, from its quant_state.

    Raises:
        InputError: the state can't be read, or says what can't be done with it.
    """
    try:
        described = described_state(state)
    except ValueError as error:
        raise InputError(f"the quant_state of {weight} in {file} can't be read ({error}): copy it again") from None
    try:
        check_described(described)
    except ValueError as error:
        raise InputError(
            f"the tensor {weight} in {file} was quantized with {error}: quantize the original again"
        ) from None
    return tuple(described["shape"])


def assemble(weight: str, parts: Mapping[str, Tensor], file: Path) -> NF4Weight:
    """The weight from its tensors, bytes as they are.

    Raises:
        InputError: a part is missing, does not fit, or holds values that are not finite.
    """
    try:
        return NF4Weight.from_state_dict(parts, weight)
    except KeyError as error:
        raise InputError(f"the tensor {error.args[0]} is missing in {file}: download the checkpoint again") from None
    except ValueError as error:
        raise InputError(f"the NF4 weight {weight} in {file} is damaged ({error}): copy it again") from None
