"""LoRA adapters on disk, in PEFT's format both ways."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jindo_core import embedded
from jindo_core.causal_lm import CausalLM
from jindo_core.errors import InputError
from jindo_core.files import read_json, write_atomically
from jindo_core.formats.safetensors_file import read_header
from jindo_core.formats.torch_file import read_records
from jindo_core.head import StreamedHead
from jindo_core.lora import LoraLinear, adapted_layers, attach_layers, lora_layers

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."

# What adapter_config.json may say: what is read here, what was of use in training alone, and what informs. Any other
# key that is set may change the arithmetic, and is refused.
_KNOWN = frozenset((
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "target_modules", "modules_to_save",
    "init_lora_weights", "exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "megatron_core", "qalora_group_size",  # set by default, of use to what is refused
))  # fmt: skip
# Others take something from the base's weights when they begin.
_INITS = (True, False, "gaussian", "orthogonal")
_SAVED = "saved_with_adapter"
"""Of a model: paths of its modules that came with the adapter."""


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, on the CPU: fp32 lora_A [r, K] and lora_B [N, r] a layer, and the
    embedding and head that came with it, in the model's dtype."""
    state: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model):
        state[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A.detach().float().cpu().contiguous()
        state[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B.detach().float().cpu().contiguous()
    for path in saved_modules(model):
        module = model.get_submodule(path)
        weight = module.whole() if isinstance(module, StreamedHead) else module.get_parameter("weight").detach()
        state[f"{PREFIX}{path}.weight"] = weight.cpu().contiguous()
    return state


def saved_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that `load_adapter` replaced whole (`modules_to_save`), and `save_adapter` writes."""
    return getattr(model, _SAVED, ())


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
    state, saved = adapter_state(model), saved_modules(model)
    if not saved and all(not bool(value.any()) for name, value in state.items() if ".lora_B." in name):
        raise InputError("the adapter's B matrices are all zero: it was not trained, saving it would be of no use")
    for name, value in state.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"the adapter's tensor {name} has values that are not finite: it was not saved")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG, adapter_config(model, base_model))
    _verify(folder, state)
    return folder


def adapter_config(model: nn.Module, base_model: str | None = None) -> bytes:
    """The adapter_config.json of the model's adapter. base_model: name or path of the base."""
    config = _config(list(adapted_layers(model)), saved_modules(model), base_model)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def restore_adapter(model: nn.Module, weights: Mapping[str, Tensor], origin: Path) -> None:
    """Put an adapter's values in place of those of the one that is attached; nothing changes unless all fit.

    Args:
        weights: under PEFT's names. origin: where they lie, for messages.
    Raises:
        InputError: they are of other layers or of another rank.
    """
    own = adapter_state(model)
    for name in sorted(own.keys() ^ weights.keys()):
        whose = "and this run's adapter has none" if name in weights else "which this run's adapter has"
        said = f"has a tensor {name}," if name in weights else f"has no tensor {name},"
        raise InputError(f"{origin} {said} {whose}: expected the same --lora_target_modules and base model")
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"{origin}: {name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}: it is of another "
                "--lora_r, or of another base model"
            )
        _check_values(name, value, origin)
    with torch.no_grad():
        for path, layer in adapted_layers(model):
            layer.lora_A.copy_(weights[f"{PREFIX}{path}.lora_A.weight"])
            layer.lora_B.copy_(weights[f"{PREFIX}{path}.lora_B.weight"])


def _config(layers: list[tuple[str, LoraLinear]], saved: tuple[str, ...], base_model: str | None) -> dict[str, Any]:
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
        "modules_to_save": [path.rpartition(".")[2] for path in saved] or None,
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
        model: without an adapter. Its LoRA parameters are trainable afterwards, everything else is frozen: also an
            embedding and a head that the adapter brings (`modules_to_save`), which take the place of the model's.
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
    ends = ("lm_head", model.EMBEDDING) if isinstance(model, CausalLM) else ()
    modules = {path: model.get_submodule(path) for path in ends}
    shapes = {path: tuple(module.get_parameter("weight").shape) for path, module in modules.items()}
    adapter = read_adapter(folder, {path: (m.out_features, m.in_features) for path, m in linears.items()}, shapes)
    saved = {path: _as_before(adapter.saved[path], modules[path], f"{folder}: {path}") for path in adapter.saved}
    ranks = {path: a.shape[0] for path, (a, _) in adapter.pairs.items()}
    layers = lora_layers(model, ranks, adapter.alpha, adapter.dropout, use_rslora=adapter.use_rslora)
    with torch.no_grad():
        for path, (a, b) in adapter.pairs.items():
            layers[path].lora_A.copy_(a)
            layers[path].lora_B.copy_(b)
    attach_layers(model, layers)
    for path, value in saved.items():
        module = modules[path]
        if isinstance(module, StreamedHead):
            module.write(value)
        else:
            # A parameter of its own: where embedding and head were one, the other stays what it was, as in peft.
            module.register_parameter("weight", nn.Parameter(value, requires_grad=False))
    setattr(model, _SAVED, tuple(saved))
    return model


def _as_before(value: Tensor, module: nn.Module, said: str) -> Tensor:
    """A weight in the dtype of the module's own and where that lies; seen to be finite there."""
    old = module.get_parameter("weight")
    new = value.to("cpu" if old.is_meta else old.device, old.dtype, copy=True)
    if not _is_finite(new):
        raise InputError(f"{said} has values that do not fit {old.dtype}: load the model with dtype fp32")
    return new


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as it lies on disk, seen to fit a model's layers.

    Attributes:
        pairs: {path of a layer: (A [r, K], B [N, r])}, fp32.
        alpha, dropout, use_rslora: as in adapter_config.json.
        saved: {path of the embedding or the head: its weight [V, C], in place of the base's}.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    alpha: float
    dropout: float
    use_rslora: bool
    saved: dict[str, Tensor] = field(default_factory=dict)

    def delta(self, path: str) -> Tensor:
        """What the adapter adds to a layer's weight: s B A, fp32 [N, K]."""
        a, b = self.pairs[path]
        rank = a.shape[0]
        scale = self.alpha / (math.sqrt(rank) if self.use_rslora else rank)
        return (b.float() @ a.float()) * scale


def read_adapter(
    folder: str | Path, linears: Mapping[str, tuple[int, int]], savable: Mapping[str, tuple[int, ...]] | None = None
) -> Adapter:
    """The adapter in `folder`, for a model that need not be in memory.

    Args:
        linears: {path: (N, K)} of the layers that may carry one.
        savable: {path: (V, C)} of the embedding and the head, which an adapter may replace whole; none by default.
    Raises:
        InputError: as `load_adapter`.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"lora_weights {folder} is no folder: expected one that holds {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    weights = read_adapter_weights(folder)
    saved = _take_saved(weights, config, savable or {}, folder)
    pairs = _pair_up(weights, linears, folder)
    _check_config(config, folder)
    _check_complete(config, pairs, linears, folder)
    rank = _number(config, "r", 8, folder)
    for path, (a, _) in pairs.items():
        if a.shape[0] != rank:
            raise InputError(f"{folder / CONFIG} has r = {rank}, but {path} has A of rank {a.shape[0]}")
    dropout = _number(config, "lora_dropout", 0.0, folder)
    if not 0.0 <= dropout < 1.0:
        raise InputError(f"{folder / CONFIG} has lora_dropout = {dropout}, expected 0 <= p < 1")
    alpha = _number(config, "lora_alpha", 8, folder)
    return Adapter(pairs, alpha, dropout, _switch(config, "use_rslora", folder), saved)


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


def digest(folder: str | Path) -> str:
    """sha256 of an adapter's files."""
    found = hashlib.sha256()
    for path in (Path(folder).expanduser() / name for name in (CONFIG, WEIGHTS)):
        if path.is_file():
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder / CONFIG} has peft_type {_said(config.get('peft_type'))}, expected 'LORA'")
    for name, value in config.items():
        if value and name not in _KNOWN:
            raise InputError(f"{folder / CONFIG} has {name} = {_said(value)}, which is not supported: expected none")
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{folder / CONFIG} has bias = {_said(config['bias'])}, which is not supported: expected 'none'"
        )
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in _INITS:
        raise InputError(
            f"{folder / CONFIG} has init_lora_weights = {_said(init)}, which is not supported: expected true, false, "
            "'gaussian' or 'orthogonal': convert the adapter to plain LoRA with peft"
        )


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _number(config: Mapping[str, Any], name: str, default: float, folder: Path) -> float:
    value = config.get(name, default)
    # A comparison with the largest float is exact for an int of any size, and False for NaN.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InputError(f"{folder / CONFIG} has {name} = {_said(value)}, expected a number")
    return value


def _switch(config: Mapping[str, Any], name: str, folder: Path) -> bool:
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise InputError(f"{folder / CONFIG} has {name} = {_said(value)}, expected true or false")
    return bool(value)


def _names(config: Mapping[str, Any], name: str, folder: Path) -> list[str]:
    """A setting that is a list of names, or null."""
    value = config.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InputError(f"{folder / CONFIG} has {name} = {_said(value)}, expected a list of names")
    return value


def _check_complete(
    config: Mapping[str, Any], pairs: Mapping[str, Any], linears: Mapping[str, Any], folder: Path
) -> None:
    """See that every layer that `target_modules` names has its pair."""
    if isinstance(config.get("target_modules"), str):  # an expression, which was for the trainer
        return
    names = _names(config, "target_modules", folder)
    if any(config.get(name) is not None for name in ("exclude_modules", "layers_to_transform", "layers_pattern")):
        return
    ends = tuple(f".{name}" for name in names)
    for path in linears:
        if f".{path}".endswith(ends) and path not in pairs:
            raise InputError(f"{folder}: target_modules names {path}, which has no tensors: the adapter is incomplete")


def _take_saved(
    weights: dict[str, Tensor], config: Mapping[str, Any], savable: Mapping[str, tuple[int, ...]], folder: Path
) -> dict[str, Tensor]:
    """Takes out of `weights` what `modules_to_save` names: {path: weight [V, C]}."""
    paths: list[str] = []
    for name in _names(config, "modules_to_save", folder):
        found = [path for path in savable if f".{path}".endswith(f".{name}")]
        if not found:
            known = " and ".join(savable) or "none"
            raise InputError(
                f"{folder / CONFIG} has modules_to_save = {_said(name)}, which is not supported: expected {known}"
            )
        paths += [path for path in found if path not in paths]
    saved = {}
    for path in paths:
        key = f"{PREFIX}{path}.weight"
        if key not in weights:
            raise InputError(f"{folder}: modules_to_save names {path}, but there is no tensor {key}: it is incomplete")
        value = weights.pop(key)
        _check_values(key, value, folder)
        if value.shape != savable[path]:
            raise InputError(
                f"{folder}: {key} has shape {tuple(value.shape)}, expected {tuple(savable[path])}: the adapter is for "
                "another model, or for another vocabulary"
            )
        saved[path] = value
    for path in savable:
        if f"{PREFIX}{path}.weight" in weights:
            raise InputError(f"{folder}: the tensor {PREFIX}{path}.weight is of no module in modules_to_save")
    return saved


def _check_values(key: str, value: Tensor, folder: Path) -> None:
    if not value.is_floating_point() or not _is_finite(value):
        raise InputError(f"{folder}: the tensor {key} ({value.dtype}) has values that are not finite numbers in fp32")


def _is_finite(value: Tensor) -> bool:
    """In fp32, where what 64 bits hold may not fit. A head is large: this makes no copy of it."""
    if value.dtype.itemsize == 1:  # aminmax knows no fp8
        value = value.float()
    return value.numel() == 0 or all(bool(end.float().isfinite()) for end in torch.aminmax(value))


def _pair_up(
    weights: Mapping[str, Tensor], linears: Mapping[str, tuple[int, int]], folder: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """{path of a layer: (A, B)} in fp32; every tensor must fit one of the layers."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        path, _, half = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if path not in linears or half not in ("lora_A", "lora_B") or not key.startswith(PREFIX):
            raise InputError(f"{folder}: the tensor {key} fits no linear layer: the adapter is for another model")
        _check_values(key, value, folder)
        if half in halves.setdefault(path, {}):
            raise InputError(f"{folder}: {path} has {half} twice, with and without .weight: expected one")
        halves[path][half] = value.float()
    pairs = {}
    for path, found in halves.items():
        if len(found) != 2:
            raise InputError(f"{folder}: {path} has {next(iter(found))} only, expected lora_A and lora_B")
        a, b = found["lora_A"], found["lora_B"]
        rows, columns = linears[path]
        if a.dim() != 2 or a.shape[0] < 1 or a.shape[1] != columns or b.shape != (rows, a.shape[0]):
            raise InputError(
                f"{folder}: {path} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected [r, {columns}] and "
                f"[{rows}, r] with r of 1 or more: the adapter is for another model"
            )
        pairs[path] = (a, b)
    if not pairs:
        raise InputError(f"{folder / WEIGHTS} holds no LoRA tensors: the adapter is empty")
    return pairs
