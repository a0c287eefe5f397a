"""Which layers of a foreign model can be quantized, and swapping them in place."""

from __future__ import annotations

import collections
import functools
import types
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from jindo_core.errors import InputError, nearest
from jindo_core.kernels.nf4 import FLOAT_DTYPES
from jindo_core.lora import path_ends_in
from jindo_core.nf4 import BLOCK_SIZES, NF4Linear, is_finite

SKIPPED = ("lm_head",)
"""What `patch_model` leaves as it is by default; a model need not have it."""


def patch_model(
    model: nn.Module,
    *,
    target_modules: Sequence[str] | str = "all-linear",
    skip: Sequence[str] | str = SKIPPED,
    double_quant: bool = True,
    block_size: int = 64,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Swap the linear layers of any model for `NF4Linear`, in place and one by one: the peak is the model and a layer.

    Layers whose weight another module shares (a head tied to the embedding) stay as they are, and so do subclasses of
    nn.Linear that compute something else (a router); these are named in a warning. A layer that stands in several
    places is one layer in all of them.

    Args:
        target_modules: names that end a layer's path (`q_proj`, `mlp.up_proj`, a full path), or "all-linear".
        skip: names of the same kind, or one, that stay as they are.
        double_quant: also quantize the block maxima: 4.127 instead of 4.5 bits a weight.
        block_size: elements that share one maximum: 32, 64, … 4096.
        dtype: of the parameters that stay; unchanged by default. Buffers are never cast.
    Returns:
        The same model. NF4 weights take no gradients; the other parameters do as before.
    Raises:
        InputError: a setting is of the wrong kind, a name or the whole choice matches nothing, a weight is not finite,
            not loaded or of a dtype that can't be quantized, a layer has hooks. Nothing was changed then.
    """
    check_settings(double_quant, block_size)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected {', '.join(map(str, FLOAT_DTYPES))}, or None")
    if not isinstance(model, nn.Module) or isinstance(model, nn.Linear):
        kind = type(model).__name__
        raise InputError(f"patch_model got a {kind}, expected a module that holds linear layers: put it into one")
    everywhere = all_paths(model)
    chosen = _choose(model, everywhere, _names("target_modules", target_modules), _names("skip", skip))
    for path, layer in chosen.items():
        _check(path, layer)
    for path in chosen:
        layer = chosen[path]
        new = NF4Linear.from_linear(layer, double_quant=double_quant, block_size=block_size).train(layer.training)
        for place in everywhere[id(layer)]:
            model.set_submodule(place, new)
        chosen[path] = new  # the full weight goes
        del layer
    if dtype is not None:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    if hasattr(model, "num_parameters"):
        mark_as_4bit(model)
    return model


def check_settings(double_quant: bool, block_size: int) -> None:
    """InputError unless a weight can be quantized so and read back."""
    if not isinstance(double_quant, bool):
        raise InputError(f"double_quant is {double_quant!r}, expected True or False")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise InputError(f"block_size is {block_size!r}, expected one of {', '.join(map(str, BLOCK_SIZES))}")


def _names(setting: str, given: Sequence[str] | str) -> list[str]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{setting} is {given!r}, expected a name or a list of names")
    return list(names)


def _choose(
    model: nn.Module, everywhere: Mapping[int, list[str]], targets: list[str], skip: list[str]
) -> dict[str, nn.Linear]:
    def named(layer: nn.Module, names: list[str]) -> bool:
        return any(path_ends_in(path, name) for path in everywhere[id(layer)] for name in names)

    def see(setting: str, names: list[str], layers: Collection[nn.Module]) -> None:
        leaves = sorted({path.rpartition(".")[2] for layer in layers for path in everywhere[id(layer)]})
        for name in names:
            if not any(named(layer, [name]) for layer in layers):
                raise InputError(
                    f"{setting} {name!r} matches no linear layer, expected some of {', '.join(leaves)}."
                    + nearest(name, leaves)
                )

    owners = collections.Counter(id(p) for module in model.modules() for p in module._parameters.values())
    linears = {path: layer for path, layer in quantizable(model) if owners[id(layer.weight)] == 1}
    if targets != ["all-linear"]:
        see("target_modules", targets, linears.values())
        linears = {path: layer for path, layer in linears.items() if named(layer, targets)}
    every = [module for module in model.modules() if isinstance(module, nn.Linear)]
    see("skip", [name for name in skip if name not in SKIPPED], every)
    linears = {path: layer for path, layer in linears.items() if not named(layer, skip)}
    if not linears:
        kind = type(model).__name__
        raise InputError(f"{kind} has no linear layer left to quantize: look at target_modules and skip")
    return linears


def all_paths(model: nn.Module) -> dict[int, list[str]]:
    """id of each module in `model` -> the paths of its places; those inside a module that has several by its first."""
    found = collections.defaultdict(list)
    for path, owner in model.named_modules():
        for name, child in owner._modules.items():
            if child is not None:
                found[id(child)].append(f"{path}.{name}" if path else name)
    return found


def _check(path: str, layer: nn.Linear) -> None:
    if layer.weight.is_meta:
        raise InputError(f"{path}.weight is on the meta device: load the model's weights before patch_model")
    if layer.weight.dtype not in FLOAT_DTYPES or layer.weight.numel() == 0:
        held = f"{layer.weight.dtype} {tuple(layer.weight.shape)}"
        raise InputError(f"{path}.weight is {held}, expected values in {', '.join(map(str, FLOAT_DTYPES))}")
    if not is_finite(layer.weight.detach()):
        raise InputError(f"{path}.weight has values that are not finite: the model is broken")
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or "forward" in vars(layer):
        raise InputError(f"{path} has hooks, which would be lost: call patch_model before they are put on")


# --- what can be quantized -------------------------------------------------------------------------------


def quantizable(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(path, layer) of every linear layer with a floating weight, subclasses that compute the same included."""
    others: dict[str, str] = {}
    found = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if not isinstance(module, nn.Linear) or weight is None or not weight.is_floating_point():
            continue
        if isinstance(module, NF4Linear) or parametrize.is_parametrized(module):
            continue
        if computes_as_linear(type(module)):  # type: ignore[arg-type]  # mypy takes a class for unhashable
            found.append((path, module))
        else:
            others[type(module).__name__] = path
    if others:
        named = ", ".join(f"{kind} ({path})" for kind, path in others.items())
        warnings.warn(f"left unquantized, for they compute something else than x W^T + b: {named}", stacklevel=3)
    yield from found


@functools.cache
def computes_as_linear(kind: type[nn.Linear]) -> bool:
    """Whether a subclass of nn.Linear still computes x W^T + b: a small one of it is asked.

    Some only write it differently (Falcon's), others are routers or take further weights.
    """
    if issubclass(kind, NonDynamicallyQuantizableLinear):  # attention reads its weight without calling it
        return False
    if kind.forward is nn.Linear.forward:
        return True
    probe = kind.__new__(kind)
    nn.Module.__init__(probe)  # not its own, whose arguments are unknown and which would draw random numbers
    probe.in_features, probe.out_features = 3, 2
    probe.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]], device="cpu"))
    probe.bias = nn.Parameter(torch.tensor([0.25, -3.0], device="cpu"))
    x = torch.tensor([[2.0, 1.0, -1.0], [0.5, 3.0, 7.0]], device="cpu")
    try:
        y = probe(x)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # it needs more
        return False
    return isinstance(y, Tensor) and torch.equal(y, F.linear(x, probe.weight, probe.bias))


# --- a transformers model that says it is in 4 bits --------------------------------------------------------


def mark_as_4bit(model: Any) -> None:
    """Set `is_loaded_in_4bit`, which peft asks for before it turns on gradient checkpointing.

    transformers' `num_parameters`, which its Trainer calls, would then import bitsandbytes and count half the weights:
    this model gets one of its own.
    """
    model.is_loaded_in_4bit = True
    model.num_parameters = types.MethodType(_num_parameters, model)


def _num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    modules = dict(model.named_modules())
    total = 0
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        if (exclude_embeddings and isinstance(owner, nn.Embedding)) or (only_trainable and not parameter.requires_grad):
            continue
        packed = isinstance(owner, NF4Linear) and not parameter.is_floating_point()
        total += owner.in_features * owner.out_features if packed else parameter.numel()
    return total
