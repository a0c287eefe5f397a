"""Which layers of a foreign model can be quantized, and swapping them in place."""

from __future__ import annotations

import collections
import functools
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from jindo_core.errors import InputError, nearest
from jindo_core.nf4 import NF4Linear


def patch_model(
    model: nn.Module,
    *,
    target_modules: Sequence[str] | str = "all-linear",
    skip: Sequence[str] = ("lm_head",),
    double_quant: bool = True,
    block_size: int = 64,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Swap the linear layers of any model for `NF4Linear`, in place and one by one: the peak is the model and a layer.

    Layers whose weight another module shares (a head tied to the embedding) stay as they are, and so do subclasses of
    nn.Linear that compute something else (a router); these are named in a warning.

    Args:
        target_modules: names that end a layer's path (`q_proj`, `mlp.up_proj`, a full path), or "all-linear".
        skip: names of the same kind that stay as they are.
        double_quant: also quantize the block maxima: 4.127 instead of 4.5 bits a weight.
        block_size: elements that share one maximum.
        dtype: of the parameters that stay; unchanged by default. Buffers are never cast.
    Returns:
        The same model. NF4 weights take no gradients; the other parameters do as before.
    Raises:
        InputError: a name or the whole choice matches nothing, a weight is not finite or not loaded, a layer has
            hooks. Nothing was changed then.
    """
    chosen = _choose(model, target_modules, skip)
    for path, layer in chosen.items():
        _check(path, layer)
    for path in chosen:
        layer = chosen[path]
        new = NF4Linear.from_linear(layer, double_quant=double_quant, block_size=block_size).train(layer.training)
        model.set_submodule(path, new)
        chosen[path] = new  # the full weight goes
        del layer
    if dtype is not None:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    if hasattr(model, "num_parameters"):
        mark_as_4bit(model)
    return model


def _choose(model: nn.Module, target_modules: Sequence[str] | str, skip: Sequence[str]) -> dict[str, nn.Linear]:
    owners = collections.Counter(id(p) for module in model.modules() for p in module._parameters.values())
    linears = {path: layer for path, layer in quantizable(model) if owners[id(layer.weight)] == 1}
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if names != ["all-linear"]:
        leaves = sorted({path.rpartition(".")[2] for path in linears})
        for name in names:
            if not any(_ends(path, name) for path in linears):
                raise InputError(
                    f"target_modules {name!r} matches no linear layer, expected some of {', '.join(leaves)}."
                    + nearest(name, leaves)
                )
        linears = {path: layer for path, layer in linears.items() if any(_ends(path, name) for name in names)}
    linears = {path: layer for path, layer in linears.items() if not any(_ends(path, name) for name in skip)}
    if not linears:
        kind = type(model).__name__
        raise InputError(f"{kind} has no linear layer left to quantize: look at target_modules and skip")
    return linears


def _ends(path: str, name: str) -> bool:
    return f".{path}".endswith(f".{name}")


def _check(path: str, layer: nn.Linear) -> None:
    if layer.weight.is_meta:
        raise InputError(f"{path}.weight is on the meta device: load the model's weights before patch_model")
    if not bool(layer.weight.isfinite().all()):
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
