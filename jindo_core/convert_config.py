"""Every setting of `quantize`, `merge` and `export`, as `config` has those of `train` and `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jindo_core.config import check_device, read_fields
from jindo_core.errors import InputError
from jindo_core.settings import Config, setting, settings, size_in_bytes

_MODEL, _OUTPUT, _DRIFT = "model and files", "what is written", "drift"
_SOURCE = "folder, .gguf file or Hub id; left out: "
_ONTO_HELP = (
    "original: onto the 16-bit weights, for use in 16 bits (the base's own quality); nf4: onto NF4's values, for what "
    "the adapter saw in training"
)


def _shard_setting() -> Any:
    return setting("4GB", _OUTPUT, "largest file of weights", metavar="SIZE")


def _overwrite_setting() -> Any:
    return setting(False, _OUTPUT, "replace what is there, once the new one is complete")


def _device_setting() -> Any:
    return setting("auto", _OUTPUT, "auto, cpu, cuda or cuda:N", metavar="DEVICE")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """The settings of `jindo-core quantize`. Raises InputError when a value is wrong."""

    base_model: str | None = setting(None, _MODEL, _SOURCE + "SmolLM2-135M", path=True, metavar="MODEL")
    output_dir: str | None = setting(None, _MODEL, "folder to write", path=True, metavar="DIR")
    format: Literal["jindo", "bitsandbytes"] = setting(
        "jindo", _OUTPUT, "jindo: bitsandbytes' and a checksum a tensor; transformers loads both, Falcon from jindo"
    )
    double_quant: bool = setting(True, _OUTPUT, "quantize NF4's scales too")
    max_shard_size: str = _shard_setting()
    overwrite: bool = _overwrite_setting()
    device: str = _device_setting()

    def __post_init__(self) -> None:
        _check_output(self, self.max_shard_size, self.device, "output_dir")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """The settings of `jindo-core merge`. Raises InputError when a value is wrong."""

    lora_weights: str | None = setting(None, _MODEL, "folder of the LoRA adapter", path=True, metavar="DIR")
    base_model: str | None = setting(None, _MODEL, _SOURCE + "the adapter's", path=True, metavar="MODEL")
    output_dir: str | None = setting(None, _MODEL, "folder to write", path=True, metavar="DIR")
    onto: Literal["original", "nf4"] | None = setting(None, _OUTPUT, _ONTO_HELP)
    max_shard_size: str = _shard_setting()
    overwrite: bool = _overwrite_setting()
    double_quant: bool | None = setting(None, _OUTPUT, "NF4's scales quantized too; left out: as in training")
    eval_text: str | None = setting(
        None, _DRIFT, "text, .json or .jsonl; left out: the rows that training held out", path=True, metavar="FILE"
    )
    eval_rows: int = setting(32, _DRIFT, "held-out rows to measure it on (0: don't)", at_least=0)
    cutoff_len: int = setting(256, _DRIFT, "longest row in tokens", at_least=2)
    device: str = _device_setting()

    def __post_init__(self) -> None:
        _check_output(self, self.max_shard_size, self.device, "lora_weights", "output_dir", "onto")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The settings of `jindo-core export`. Raises InputError when a value is wrong."""

    base_model: str | None = setting(
        None, _MODEL, _SOURCE + "the adapter's, else SmolLM2-135M", path=True, metavar="MODEL"
    )
    lora_weights: str | None = setting(
        None, _MODEL, "LoRA adapter to merge on the way; left out: none", path=True, metavar="DIR"
    )
    onto: Literal["original", "nf4"] | None = setting(None, _MODEL, _ONTO_HELP)
    double_quant: bool | None = setting(None, _MODEL, "NF4's scales quantized too; left out: as in training")
    format: Literal["safetensors", "meta", "gguf"] | None = setting(
        None, _OUTPUT, "for Hugging Face, for Meta's code, for llama.cpp"
    )
    output_dir: str | None = setting(None, _OUTPUT, "folder (safetensors, meta)", path=True, metavar="DIR")
    output_file: str | None = setting(None, _OUTPUT, "file (gguf)", path=True, metavar="FILE.gguf")
    dtype: Literal["f16", "bf16", "f32", "q8_0"] | None = setting(
        None, _OUTPUT, "of the weights; left out: as they are, f16 for gguf; q8_0: gguf only"
    )
    max_shard_size: str = _shard_setting()
    overwrite: bool = _overwrite_setting()
    device: str = _device_setting()

    def __post_init__(self) -> None:
        _check_output(self, self.max_shard_size, self.device, "format")
        needed, other = ("output_file", "output_dir") if self.format == "gguf" else ("output_dir", "output_file")
        _need(self, needed)
        if getattr(self, other) is not None:
            raise InputError(f"--{other}: got {getattr(self, other)}, expected --{needed} with --format {self.format}")
        if self.format == "gguf" and not str(self.output_file).endswith(".gguf"):
            raise InputError(f"--output_file: got {self.output_file}, expected a name that ends in .gguf")
        if self.dtype == "q8_0" and self.format != "gguf":
            raise InputError(f"--dtype: got q8_0, expected f16, bf16 or f32 with --format {self.format}")
        if self.lora_weights is not None:
            _need(self, "onto")
        elif self.onto is not None:
            raise InputError(f"--onto: got {self.onto}, expected it together with --lora_weights only")


def check_free(name: str | None, overwrite: bool) -> None:
    """See that nothing is in the way, before anything is loaded that takes time. Raises InputError."""
    target = Path(name or "").expanduser()
    try:
        taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    except (OSError, ValueError):
        return  # what is wrong with it, writing says
    if name is not None and taken and not overwrite:
        raise InputError(f"{target} is there already: give another name, or --overwrite to replace it")


def _need(config: Config, name: str) -> None:
    if getattr(config, name) is None:
        known = settings(type(config))[name]
        expected = f"{known.expected()} ({known.help})" if known.choices else known.help
        raise InputError(f"--{name}: got nothing, expected {expected}")


def _check_output(config: Config, max_shard_size: str, device: str, *needed: str) -> None:
    read_fields(config)
    for name in needed:
        _need(config, name)
    check_device(device)
    if size_in_bytes(max_shard_size) is None:
        raise InputError(f"--max_shard_size: got {max_shard_size!r}, expected a size such as 4GB or 400MB")
