"""NF4 for every model of transformers, through its own registration; and bitsandbytes' configuration taken over.

`AutoModelForCausalLM.from_pretrained(path, quantization_config=JindoNF4Config())`. Importing this module registers the
method `jindo_nf4`, which reading a checkpoint saved with it needs. What is saved has bitsandbytes' keys.
"""

from __future__ import annotations

import functools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
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
from jindo_core.integrations.patch import all_paths, check_settings, mark_as_4bit, quantizable
from jindo_core.nf4 import DTYPES, PARTS, NF4Linear, NF4Weight, is_finite, quantize_nf4

_COMPUTE_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)


@register_quantization_config(METHOD)
class JindoNF4Config(QuantizationConfigMixin):
    """How a model is quantized while transformers loads it: as with
    `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)`.

    Args:
        double_quant: also quantize the block maxima: 4.127 instead of 4.5 bits a weight.
        block_size: elements that share one maximum: 32, 64, … 4096.
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
        listed = isinstance(skip, Collection | None) and not isinstance(skip, str)
        if not listed or not all(isinstance(name, str) for name in skip or ()):
            raise InputError(f"modules_to_not_convert is {skip!r}, expected a list of names")
        dtype = DTYPES.get(compute_dtype, compute_dtype) if isinstance(compute_dtype, str) else compute_dtype
        if dtype not in _COMPUTE_DTYPES:
            raise InputError(f"compute_dtype is {compute_dtype!r}, expected float32, float16 or bfloat16")
        check_settings(double_quant, block_size)
        self.quant_method = METHOD
        self.double_quant, self.block_size, self.compute_dtype = double_quant, block_size, dtype
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
    serialized_names = {"weight": ["weight", *(f"weight.{part}" for part in PARTS)]}  # noqa: RUF012 - as the base has it

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
        everywhere = all_paths(model)
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
            for place in everywhere[id(layer)]:
                model.set_submodule(place, new)
                self.replaced[place] = layer

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

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if isinstance(dtype, str):  # a config's, once it has been saved
            if dtype not in DTYPES:
                raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
            dtype = DTYPES[dtype]
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


class _PastReport(Exception):
    """Carries an InputError through transformers, which makes a line of its report of what a conversion raises and ends
    with a RuntimeError that names neither weight nor fault. To write that line it asks for the text: then it goes on.
    """

    def __init__(self, fault: InputError) -> None:
        super().__init__()
        self.fault = fault

    def __str__(self) -> str:
        raise self.fault from None


class _Conversion(ConversionOps):
    """One tensor's conversion, whose InputError reaches the caller of `from_pretrained`."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return self.converted(input_dict, **kwargs)
        except InputError as fault:
            raise _PastReport(fault) from None

    @abstractmethod
    def converted(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """{name: what the module is to hold}."""


class _Quantize(_Conversion):
    """A weight in full, as it comes from the checkpoint."""

    def __init__(self, quantizer: JindoNF4Quantizer) -> None:
        self.quantizer = quantizer

    def converted(self, input_dict: dict[str, Any], *, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        settings = self.quantizer.settings
        found: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            if not is_finite(weight):
                raise InputError(f"{name} has values that are not finite: the checkpoint is broken")
            weight = weight.t() if path in self.quantizer.transposed else weight
            layer = model.get_submodule(path)
            _see_shape(layer, name, tuple(weight.shape))
            quantized = quantize_nf4(weight, block_size=settings.block_size, double_quant=settings.double_quant)
            found[name] = _give(layer, quantized)
        return found


class _Take(_Conversion):
    """A quantized weight from the parts in a checkpoint; every tensor called `weight` comes through here."""

    def __init__(self, quantizer: JindoNF4Quantizer) -> None:
        self.hf_quantizer = quantizer  # by this name transformers knows not to cast the parts

    def __deepcopy__(self, _: dict[int, Any]) -> _Take:
        return self  # transformers copies an operation for each tensor

    def _put_back(self, model: Any, path: str, layer: NF4Linear) -> None:
        whole = self.hf_quantizer.replaced[path]
        whole.bias = layer.bias  # which may have come already
        self.hf_quantizer.transposed.discard(path)
        for place, other in self.hf_quantizer.replaced.items():
            if other is whole:
                model.set_submodule(place, whole)

    def converted(
        self, input_dict: dict[str, Any], *, model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        path = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(path)
        parts = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        if "weight" not in parts:
            raise InputError(f"the checkpoint holds {', '.join(parts)} of {path}, but no weight: download it again")
        if not isinstance(layer, NF4Linear):
            if len(parts) > 1:
                raise InputError(f"{full_layer_name} is quantized in the checkpoint, but its config says it is not")
            return parts
        if parts["weight"].is_floating_point():  # bitsandbytes leaves subclasses of nn.Linear (Falcon's) as they are
            self._put_back(model, path, layer)
            return parts
        try:
            weight = NF4Weight.from_state_dict(parts)
        except KeyError as error:
            raise InputError(f"{full_layer_name}: the checkpoint holds no {error.args[0]!r} of it") from None
        except ValueError as error:
            raise InputError(f"{full_layer_name} is damaged in the checkpoint ({error}): copy it again") from None
        _see_shape(layer, full_layer_name, weight.shape)
        return {"weight": _give(layer, weight)}


def _give(layer: NF4Linear, weight: NF4Weight) -> Tensor:
    """Puts `weight` into the layer; returns the parameter, which transformers sets once more."""
    layer.hold(weight)
    for buffer in layer.buffers(recurse=False):
        buffer.__dict__["_is_hf_initialized"] = True  # else remote code's initialization may overwrite it
    return layer.weight


def _see_shape(layer: NF4Linear, name: str, shape: tuple[int, ...]) -> None:
    expected = (layer.out_features, layer.in_features)
    if shape != expected:
        raise InputError(f"{name} has shape {shape}, expected {expected}: the checkpoint is for another model")


# --- bitsandbytes' configuration ----------------------------------------------------------------------------


def use_for_bitsandbytes() -> Callable[[], None]:
    """From now on `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")` loads into this engine's layers.

    Checkpoints in bitsandbytes' format load and are written as before. Logits are the same, but linears it does not
    find (Falcon's) are quantized too. 8-bit, fp4, and a bnb_4bit_quant_storage other than uint8 are left to
    bitsandbytes, which is said once.

    Returns:
        A function that gives everything back to bitsandbytes; models loaded meanwhile stay as they are. After several
        calls it is given back when the function of each has been called, in any order.
    """
    choosers: list[tuple[str, _Chooser]] = []
    for kind in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        found = AUTO_QUANTIZER_MAPPING[kind]
        chooser = found if isinstance(found, _Chooser) else _Chooser(found)
        AUTO_QUANTIZER_MAPPING[kind] = chooser
        choosers.append((kind, chooser))
    user = object()
    for _, chooser in choosers:
        chooser.users.add(user)

    def restore() -> None:
        for kind, chooser in choosers:
            chooser.users.discard(user)
            if not chooser.users and AUTO_QUANTIZER_MAPPING[kind] is chooser:
                AUTO_QUANTIZER_MAPPING[kind] = chooser.theirs

    return restore


class _Chooser:
    """Stands for a quantizer class where transformers makes one; `users`: who have not given it back."""

    def __init__(self, theirs: type[HfQuantizer]) -> None:
        self.theirs = theirs
        self.users: set[object] = set()

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
