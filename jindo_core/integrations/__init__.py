"""The engine inside other trainers: transformers, peft, and any model made of nn.Linear.

    from jindo_core.integrations import JindoNF4Config         # transformers: quantization_config=JindoNF4Config()
    from jindo_core.integrations import use_for_bitsandbytes   # existing BitsAndBytesConfig code runs on this engine
    from jindo_core.integrations import register_fused_lora    # peft: get_peft_model(m, register_fused_lora(c))
    from jindo_core import patch_model                         # any model, in place

Names load on first use, and each needs only its own library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jindo_core.errors import InputError

if TYPE_CHECKING:
    from jindo_core.integrations.patch import patch_model
    from jindo_core.integrations.peft import NF4LoraLinear, register_fused_lora
    from jindo_core.integrations.transformers import JindoNF4Config, JindoNF4Quantizer, use_for_bitsandbytes

__all__ = [
    "JindoNF4Config",
    "JindoNF4Quantizer",
    "NF4LoraLinear",
    "patch_model",
    "register_fused_lora",
    "use_for_bitsandbytes",
]

_HOME = {
    "JindoNF4Config": "transformers",
    "JindoNF4Quantizer": "transformers",
    "NF4LoraLinear": "peft",
    "patch_model": "patch",
    "register_fused_lora": "peft",
    "use_for_bitsandbytes": "transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jindo_core.integrations' has no attribute {name!r}")
    home = _HOME[name]
    try:
        module = importlib.import_module(f"jindo_core.integrations.{home}")
    except ModuleNotFoundError as error:
        if error.name != home:
            raise
        raise InputError(f"{name} needs {home}, which is not installed: pip install {home}") from None
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
