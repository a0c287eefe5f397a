"""NF4 for every model of transformers, through its own registration; and bitsandbytes' configuration taken over.

`AutoModelForCausalLM.from_pretrained(path, quantization_config=JindoNF4Config())`. Importing this module registers the
method `jindo_nf4`, which reading a checkpoint saved with it needs. What is saved has bitsandbytes' keys.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from jindo_core.errors import InputError, nearest
from jindo_core.formats.bitsandbytes import OUR_METHOD as METHOD
from jindo_core.integrations.patch import mark_as_4bit, quantizable
from jindo_core.nf4 import STATE_KEY, NF4Linear, NF4Weight, quantize_nf4

PARTS = ("weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax", f"weight.{STATE_KEY}")
"""What stands beside `weight` in a checkpoint."""


@register_quantization_config(METHOD)
class JindoNF4Config(QuantizationConfigMixin):
    """How a model is quantized while transformers loads it: as with
    `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)`.

    Args:
        double_quant: also quantize the block maxima: 4.127 instead of 4.5 bits a weight.
        block_size: elements that share one maximum.
        compute_dtype: of the products, a torch dtype or its name; by default the inputs', where bitsandbytes has fp32.
        modules_to_not_convert: names of layers that stay as they are. By default the head, what is tied, and the last
            layer; a list of your own takes their place (tied weights stay in any case). `llm_int8_skip_modules`,
            bitsandbytes' name for it, is taken too.
    """

    def __init__(
        self,
        double_quant: bool = True,
        block_size: int = 64,
        compute_dtype: torch.dtype | str | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        method = kwargs.pop("quant_method", METHOD)
        theirs = kwargs.pop("llm_int8_skip_modules", None)
        if kwargs:
            name = next(iter(kwargs))
            known = ("double_quant", "block_size", "compute_dtype", "modules_to_not_convert")
            raise InputError(f"JindoNF4Config has no {name!r}, expected {', '.join(known)}.{nearest(name, known)}")
        if method != METHOD:
            raise InputError(f"quant_method is {method!r}, expected {METHOD!r}")
        if theirs is not None and modules_to_not_convert is not None:
            raise InputError("modules_to_not_convert and llm_int8_skip_modules are the same: give one of them")
        skip = modules_to_not_convert if theirs is None else theirs
        if isinstance(skip, str):
            raise InputError(f"modules_to_not_convert is {skip!r}, expected a list of names")
        if isinstance(compute_dtype, str):
            compute_dtype = getattr(torch, compute_dtype, compute_dtype)
        if compute_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"compute_dtype is {compute_dtype!r}, expected float32, float16 or bfloat16")
        if not isinstance(block_size, int) or block_size < 2 or block_size % 2:
            raise InputError(f"block_size is {block_size!r}, expected an even number of at least 2")
        self.quant_method = METHOD
        self.double_quant, self.block_size, self.compute_dtype = bool(double_quant), block_size, compute_dtype
        self.modules_to_not_convert = None if skip is None else list(skip)

    @classmethod
    def from_bitsandbytes(cls, config: BitsAndBytesConfig) -> JindoNF4Config:
        """The same settings under our names."""
        return cls(
            double_quant=config.bnb_4bit_use_double_quant,
            compute_dtype=config.bnb_4bit_compute_dtype,
            modules_to_not_convert=config.llm_int8_skip_modules,
        )

    def to_dict(self) -> dict[str, Any]:
        dtype = None if self.compute_dtype is None else str(self.compute_dtype).removeprefix("torch.")
        return super().to_dict() | {"compute_dtype": dtype}


@register_quantizer(METHOD)
class JindoNF4Quantizer(HfQuantizer):
    """Swaps a model's linears for `NF4Linear` before its weights come, and quantizes each as it comes.

    Args:
        quantization_config: ours, or a `BitsAndBytesConfig`, which the model then keeps.
    """

    requires_calibration = False
    is_trainable = True
    serialized_names = {"weight": ["weight", *PARTS]}  # noqa: RUF012 - as the base class has it

    def __init__(self, quantization_config: JindoNF4Config | BitsAndBytesConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        theirs = isinstance(quantization_config, BitsAndBytesConfig)
        self.settings = JindoNF4Config.from_bitsandbytes(quantization_config) if theirs else quantization_config
        self.offloads = theirs and quantization_config.llm_int8_enable_fp32_cpu_offload
        self.replaced: dict[str, nn.Module] = {}  # while weights come
        self.transposed: set[str] = set()  # paths of what was a Conv1D, whose weight is [in, out]

    def is_serializable(self) -> bool:
        return True

    @property
    def quantized_element_size(self) -> float:
        bits = 8 + 32 / 256 if self.settings.double_quant else 32
        return (4 + bits / self.settings.block_size) / 8

    def validate_environment(self, *_: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        away = places & {"cpu", "disk"}
        if away and places != {"cpu"} and not self.offloads:
            raise InputError(
                f"device_map puts layers on {', '.join(sorted(away))} beside a GPU, which NF4 layers of transformers "
                "can't: jindo_core.load_model(offload_layers=…) streams them"
            )

    def update_device_map(self, device_map: Any) -> Any:
        # As bitsandbytes: onto the GPU if there is one. On a CPU nothing is said, so that accelerate is not needed.
        return {"": torch.cuda.current_device()} if device_map is None and torch.cuda.is_available() else device_map

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        # As bitsandbytes: a tensor is there in full before it is quantized.
        return {place: room * 0.9 for place, room in max_memory.items()}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        path, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(path), NF4Linear)

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        skip = self.get_modules_to_not_convert(
            model, self.settings.modules_to_not_convert, model._keep_in_fp32_modules
        )  # fmt: skip
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        if self.offloads and isinstance(device_map, dict):
            skip += [path for path, place in device_map.items() if place in ("cpu", "disk")]
        layers: list[tuple[str, Any]] = [*quantizable(model)]
        layers += [(path, module) for path, module in model.named_modules() if isinstance(module, Conv1D)]
        layers = [
            (path, layer)
            for path, layer in layers
            if should_convert_module(path, skip) and f"{path}.weight" not in tied
        ]
        if not layers:
            kind = type(model).__name__
            raise InputError(f"{kind} has no linear layer to quantize: load it without a quantization_config")
        for path, layer in layers:
            rows, columns = layer.weight.shape
            if isinstance(layer, Conv1D):
                rows, columns = columns, rows
                self.transposed.add(path)
            new = NF4Linear.placeholder(columns, rows, bias=layer.bias is not None, dtype=layer.weight.dtype)
            new.compute_dtype = self.settings.compute_dtype
            model.set_submodule(path, new)
            self.replaced[path] = layer

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.replaced.clear()
        for path, layer in model.named_modules():
            if isinstance(layer, NF4Linear) and layer.is_placeholder:
                raise InputError(f"the checkpoint holds no {path}.weight: it does not fit the model or its config")
        # Ours has no inverse and needs none: the layers save what they hold. The model's own conversions stay.
        model._weight_conversions = [
            used
            for used in model._weight_conversions
            if not (isinstance(used, WeightConverter) and any(isinstance(op, _Take) for op in used.operations))
        ]
        mark_as_4bit(model)
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _Take}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for path, layer in [(path, m) for path, m in model.named_modules() if isinstance(m, NF4Linear)]:
            weight = layer.nf4.dequantize(dtype)
            with torch.device("meta"):
                new: nn.Module = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                if path in self.transposed:
                    new, weight = Conv1D(layer.out_features, layer.in_features), weight.t().contiguous()
            new.weight = nn.Parameter(weight, requires_grad=False)
            new.bias = layer.bias if dtype is None or layer.bias is None else nn.Parameter(layer.bias.to(dtype), False)
            model.set_submodule(path, new.train(layer.training))
        model.is_loaded_in_4bit = False
        del model.num_parameters
        return model


# --- one tensor at a time ---------------------------------------------------------------------------------


class _Quantize(ConversionOps):
    """A weight in full, as it comes from the checkpoint."""

    def __init__(self, quantizer: JindoNF4Quantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        settings = self.quantizer.settings
        found: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            if not bool(weight.isfinite().all()):
                raise InputError(f"{name} has values that are not finite: the checkpoint is broken")
            weight = weight.t() if path in self.quantizer.transposed else weight
            quantized = quantize_nf4(weight, block_size=settings.block_size, double_quant=settings.double_quant)
            found[name] = _give(model.get_submodule(path), name, quantized)
        return found


class _Take(ConversionOps):
    """A quantized weight from the parts in a checkpoint; every tensor called `weight` comes through here."""

    def __init__(self, quantizer: JindoNF4Quantizer) -> None:
        self.hf_quantizer = quantizer  # by this name transformers knows not to cast the parts

    def __deepcopy__(self, _: dict[int, Any]) -> _Take:
        return self  # transformers copies an operation for each tensor

    def _put_back(self, model: Any, path: str, layer: NF4Linear) -> None:
        whole = self.hf_quantizer.replaced[path]
        whole.bias = layer.bias  # which may have come already
        self.hf_quantizer.transposed.discard(path)
        model.set_submodule(path, whole)

    def convert(
        self, input_dict: dict[str, Any], *_: Any, model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        layer = model.get_submodule(full_layer_name.rpartition(".")[0])
        parts = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        if not isinstance(layer, NF4Linear):
            if len(parts) > 1:
                raise InputError(f"{full_layer_name} is quantized in the checkpoint, but its config says it is not")
            return parts
        if parts["weight"].is_floating_point():  # bitsandbytes leaves subclasses of nn.Linear (Falcon's) as they are
            self._put_back(model, full_layer_name.rpartition(".")[0], layer)
            return parts
        try:
            weight = NF4Weight.from_state_dict(parts)
        except KeyError as error:
            raise InputError(f"{full_layer_name}: the checkpoint holds no {error.args[0]!r} of it") from None
        return {"weight": _give(layer, full_layer_name, weight)}


def _give(layer: NF4Linear, name: str, weight: NF4Weight) -> Tensor:
    """Puts `weight` into the layer; returns the parameter, which transformers sets once more."""
    if weight.shape != (layer.out_features, layer.in_features):
        expected = (layer.out_features, layer.in_features)
        raise InputError(f"{name} has shape {weight.shape}, expected {expected}: the checkpoint is for another model")
    layer.hold(weight)
    for buffer in layer.buffers(recurse=False):
        buffer.__dict__["_is_hf_initialized"] = True  # else remote code's initialization may overwrite it
    return layer.weight


# --- bitsandbytes' configuration ----------------------------------------------------------------------------


def use_for_bitsandbytes() -> Callable[[], None]:
    """From now on `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")` loads into this engine's layers.

    Checkpoints in bitsandbytes' format load and are written as before. Logits are the same, but linears it does not
    find (Falcon's) are quantized too. 8-bit, fp4, and a bnb_4bit_quant_storage other than uint8 are left to
    bitsandbytes, which is said once.

    Returns:
        A function that gives everything back to bitsandbytes; models loaded meanwhile stay as they are.
    """
    kinds = ("bitsandbytes_4bit", "bitsandbytes_8bit")
    before = {kind: AUTO_QUANTIZER_MAPPING[kind] for kind in kinds}
    for kind, theirs in before.items():
        if not isinstance(theirs, _Chooser):
            AUTO_QUANTIZER_MAPPING[kind] = _Chooser(theirs)

    def restore() -> None:
        AUTO_QUANTIZER_MAPPING.update(before)

    return restore


class _Chooser:
    """Stands for a quantizer class where transformers makes one."""

    def __init__(self, theirs: type[HfQuantizer]) -> None:
        self.theirs = theirs

    def __call__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any) -> HfQuantizer:
        if quantization_config.load_in_8bit:
            why = "8-bit quantization"
        elif quantization_config.bnb_4bit_quant_type != "nf4":
            why = f"bnb_4bit_quant_type {quantization_config.bnb_4bit_quant_type!r}"
        elif quantization_config.bnb_4bit_quant_storage != torch.uint8:
            why = f"bnb_4bit_quant_storage {quantization_config.bnb_4bit_quant_storage}"
        else:
            return JindoNF4Quantizer(quantization_config, **kwargs)
        _say(f"{why} is left to bitsandbytes: jindo_core has NF4 stored as uint8")
        return self.theirs(quantization_config, **kwargs)


@functools.cache
def _say(text: str) -> None:
    warnings.warn(text, stacklevel=4)
