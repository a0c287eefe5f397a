"""jindo-core: a self-contained QLoRA engine.

    import jindo_core as jc

    model = jc.load_model("path/to/llama")            # NF4 with double quantization, as it is read
    tokenizer = jc.load_tokenizer("path/to/llama")
    jc.attach_lora(model, r=8, alpha=16, target_modules="all-linear")
    loss = model(input_ids, labels=labels).loss       # trains lora_A and lora_B only
    jc.save_adapter(model, "my-adapter")              # PEFT's format
    jc.generate(model, tokenizer, "안녕하세요")

Names load on first use: importing the package imports neither torch nor Triton.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jindo_core.adapters import load_adapter, save_adapter
    from jindo_core.errors import InputError, TrainingError
    from jindo_core.generation import generate
    from jindo_core.integrations.patch import patch_model
    from jindo_core.loader import load_model
    from jindo_core.lora import LoraLinear, attach_lora
    from jindo_core.nf4 import NF4Linear, NF4Weight, quantize_nf4
    from jindo_core.paged_adamw import PagedAdamW
    from jindo_core.tokenizer import load_tokenizer

__all__ = [
    "InputError",
    "LoraLinear",
    "NF4Linear",
    "NF4Weight",
    "PagedAdamW",
    "TrainingError",
    "attach_lora",
    "generate",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "patch_model",
    "quantize_nf4",
    "save_adapter",
]

_HOME = {
    "InputError": "errors",
    "LoraLinear": "lora",
    "NF4Linear": "nf4",
    "NF4Weight": "nf4",
    "PagedAdamW": "paged_adamw",
    "TrainingError": "errors",
    "attach_lora": "lora",
    "generate": "generation",
    "load_adapter": "adapters",
    "load_model": "loader",
    "load_tokenizer": "tokenizer",
    "patch_model": "integrations.patch",
    "quantize_nf4": "nf4",
    "save_adapter": "adapters",
}

try:
    __version__ = version("jindo-core")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jindo_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jindo_core.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
