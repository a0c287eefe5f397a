"""LoRA adapters on disk, in PEFT's format both ways."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jindo_core import embedded
from jindo_core.errors import InputError
from jindo_core.files import read_json, write_atomically
from jindo_core.formats.safetensors_file import read_header
from jindo_core.formats.torch_file import read_records
from jindo_core.lora import LoraLinear, adapted_layers

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."

# Variants of LoRA that change the arithmetic: refused unless they are off, never ignored.
_MUST_BE_OFF = (
    "fan_in_fan_out", "use_dora", "modules_to_save", "layer_replication", "rank_pattern", "alpha_pattern",
    "trainable_token_indices", "target_parameters", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens",
)  # fmt: skip


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, fp32, on the CPU: lora_A [r, K] and lora_B [N, r] a layer."""
    state: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model):
        state[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A.detach().float().cpu().contiguous()
        state[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B.detach().float().cpu().contiguous()
    return state


def save_adapter(model: nn.Module, folder: str | Path, *, base_model: str | None = None) -> Path:
    """Write the model's adapter so that peft loads it, then read it back and compare.

    Args:
        folder: made if missing; adapter_model.safetensors and adapter_config.json in it are replaced.
        base_model: name or path of the base, for the reader's information.
    Returns:
        The folder.
    Raises:
        InputError: the model has no adapter, its B matrices are all zero (nothing was learnt), a value is
            not finite, or what was read back differs.
    """
    from safetensors.torch import save

    folder = Path(folder)
    layers = list(adapted_layers(model))
    if not layers:
        raise InputError("the model has no adapter to save: attach_lora comes first")
    state = adapter_state(model)
    if all(not bool(value.any()) for name, value in state.items() if ".lora_B." in name):
        raise InputError("the adapter's B matrices are all zero: it was not trained, saving it would be of no use")
    for name, value in state.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"the adapter's tensor {name} has values that are not finite: it was not saved")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    config = json.dumps(_config(layers, base_model), indent=2, ensure_ascii=False)
    write_atomically(folder / CONFIG, (config + "\n").encode())
    _verify(folder, state)
    return folder


def _config(layers: list[tuple[str, LoraLinear]], base_model: str | None) -> dict[str, Any]:
    layer = layers[0][1]
    rank = layer.lora_A.shape[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": layer.scale * rank,
        "lora_dropout": layer.dropout,
        # Full paths: exact, even where only some layers of a name are adapted.
        "target_modules": [path for path, _ in layers],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,  # its factor is in lora_alpha already
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _verify(folder: Path, state: Mapping[str, Tensor]) -> None:
    back = read_adapter_weights(folder)
    if back.keys() != state.keys() or any(not torch.equal(back[name], state[name]) for name in state):
        raise InputError(f"the adapter read back from {folder} differs from the one in memory: the disk is faulty")


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors, or of the older adapter_model.bin.

    Raises:
        InputError: neither is there, or the file does not hold plain tensors as it says.
    """
    path, old = folder / WEIGHTS, folder / "adapter_model.bin"
    if not path.exists() and not old.exists():
        raise InputError(f"{folder} holds no {WEIGHTS}: expected an adapter in PEFT's format")
    places = read_header(path).places if path.exists() else read_records(old)
    return {name: place.read() for name, place in places.items()}


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Attach the adapter in `folder` to `model`, in place, and return the model.

    Args:
        model: without an adapter. Its LoRA parameters are trainable afterwards, everything else is frozen.
        folder: adapter_config.json with adapter_model.safetensors (or .bin), as peft or `save_adapter` wrote.
    Raises:
        InputError: a variant of LoRA that is not supported, or a key or shape that fits no layer of this
            model: nothing was attached then.
    """
    folder = Path(folder).expanduser()
    if folder.is_dir() and next(adapted_layers(model), None) is not None:
        raise InputError("the model has an adapter already: load it afresh before attaching another")
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    linears.pop("lm_head", None)  # it is part of the fused loss and takes no adapter
    adapter = read_adapter(folder, {path: (m.out_features, m.in_features) for path, m in linears.items()})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, (a, b) in adapter.pairs.items():
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        layer = LoraLinear(
            getattr(owner, name), a.shape[0], adapter.alpha, adapter.dropout, use_rslora=adapter.use_rslora
        )  # fmt: skip
        layer.train(owner.training)
        with torch.no_grad():
            layer.lora_A.copy_(a)
            layer.lora_B.copy_(b)
        setattr(owner, name, layer)
    return model


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as it lies on disk, seen to fit a model's layers.

    Attributes:
        pairs: {path of a layer: (A [r, K], B [N, r])}.
        alpha, dropout, use_rslora: as in adapter_config.json.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    alpha: float
    dropout: float
    use_rslora: bool

    def delta(self, path: str) -> Tensor:
        """What the adapter adds to a layer's weight: s B A, fp32 [N, K]."""
        a, b = self.pairs[path]
        rank = a.shape[0]
        scale = self.alpha / (math.sqrt(rank) if self.use_rslora else rank)
        return (b.float() @ a.float()) * scale


def read_adapter(folder: str | Path, linears: Mapping[str, tuple[int, int]]) -> Adapter:
    """The adapter in `folder`, for a model that need not be in memory.

    Args:
        linears: {path: (N, K)} of the layers that may carry one.
    Raises:
        InputError: as `load_adapter`.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"lora_weights {folder} is no folder: expected one that holds {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    pairs = _pair_up(read_adapter_weights(folder), linears, folder)
    _check_config(config, folder)
    _check_numbers(config, folder)
    return Adapter(
        pairs, config.get("lora_alpha", 8), config.get("lora_dropout", 0.0), bool(config.get("use_rslora"))
    )


def base_of(folder: str | Path | None) -> str | None:
    """The base that an adapter of another tool names; None (the embedded model) without an adapter.

    Raises:
        InputError: it names none.
    """
    if folder is None:
        return None
    name = read_json(Path(folder).expanduser() / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{folder}/{CONFIG} names no base model: expected --base_model")
    return None if name == embedded.HUB_ID else name


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder / CONFIG} has peft_type {config.get('peft_type')!r}, expected 'LORA'")
    for name in _MUST_BE_OFF:
        if config.get(name):
            raise InputError(f"{folder / CONFIG} has {name} = {config[name]!r}, which is not supported: expected none")
    if config.get("bias", "none") != "none":
        raise InputError(f"{folder / CONFIG} has bias = {config['bias']!r}, which is not supported: expected 'none'")


def _check_numbers(config: Mapping[str, Any], folder: Path) -> None:
    for name, default in (("lora_alpha", 8), ("lora_dropout", 0.0)):
        if not isinstance(config.get(name, default), int | float):
            raise InputError(f"{folder / CONFIG} has {name} = {config[name]!r}, expected a number")


def _pair_up(
    weights: Mapping[str, Tensor], linears: Mapping[str, tuple[int, int]], folder: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """{path of a layer: (A, B)}; every tensor must fit one of the layers."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        path, _, half = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if path not in linears or half not in ("lora_A", "lora_B") or not key.startswith(PREFIX):
            raise InputError(f"{folder}: the tensor {key} fits no linear layer: the adapter is for another model")
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise InputError(f"{folder}: the tensor {key} ({value.dtype}) has values that are not finite numbers")
        halves.setdefault(path, {})[half] = value
    pairs = {}
    for path, found in halves.items():
        if len(found) != 2:
            raise InputError(f"{folder}: {path} has {next(iter(found))} only, expected lora_A and lora_B")
        a, b = found["lora_A"], found["lora_B"]
        rows, columns = linears[path]
        if a.dim() != 2 or a.shape[1] != columns or b.shape != (rows, a.shape[0]):
            raise InputError(
                f"{folder}: {path} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected [r, {columns}] and "
                f"[{rows}, r]: the adapter is for another model"
            )
        pairs[path] = (a, b)
    if not pairs:
        raise InputError(f"{folder / WEIGHTS} holds no tensors: the adapter is empty")
    return pairs
