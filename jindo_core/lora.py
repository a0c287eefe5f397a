"""Low-rank adapters: the layer, and attaching it to a model in place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jindo_core.errors import InputError
from jindo_core.kernels.dropout import drop
from jindo_core.kernels.lora_matmul import lora_matmul_group
from jindo_core.nf4 import NF4Linear


class LoraLinear(nn.Module):
    """y = base(x) + s (D(x) A^T) B^T (Hu et al. 2021, arXiv:2106.09685), with the base frozen.

    On an NF4Linear the whole runs as one operator; on an nn.Linear as plain PyTorch.

    Args:
        base: the frozen layer, [N, K].
        r: rank. alpha: s = alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv:2312.03732).
        dropout: probability that D zeroes an element of x, in training only.
        device: of A and B; the base's by default.
    Attributes:
        lora_A: fp32 [r, K], Kaiming-uniform(sqrt 5). lora_B: fp32 [N, r], zero: y starts as base(x).
    """

    def __init__(
        self,
        base: nn.Linear,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if r < 1:
            raise InputError(f"lora_r is {r}, expected 1 or more")
        if not 0.0 <= dropout < 1.0:
            raise InputError(f"lora_dropout is {dropout}, expected 0 <= p < 1")
        self.base = base.requires_grad_(False)
        self.scale = alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = dropout
        device = device or base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        seed = draw_seed(x) if p > 0 else None
        if isinstance(self.base, NF4Linear):
            return self.base.adapted(x, self.lora_A, self.lora_B, scale=self.scale, dropout=p, seed=seed)
        down = F.linear(drop(x, p, seed), self.lora_A.to(x.dtype))
        return self.base(x) + F.linear(down, self.lora_B.to(x.dtype)) * self.scale

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"


def draw_seed(x: Tensor) -> Tensor:
    """A dropout seed from torch's generator, so that checkpointing, which replays the generator, redraws it."""
    return torch.randint(2**31 - 1, (1,), dtype=torch.int32, device=x.device)


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of layers that read the same x (q, k and v; gate and up).

    NF4 layers, adapted or not, run as one operator and then share their dropout mask. Any other kind, and layers
    with hooks, run one by one.
    """
    bases = [layer.base if isinstance(layer, LoraLinear) else layer for layer in layers]
    rates = {layer.dropout if layer.training else 0.0 for layer in layers if isinstance(layer, LoraLinear)}
    alike = len(rates) < 2 and not any(module._forward_hooks or module._forward_pre_hooks for module in layers)
    if not alike or not all(isinstance(base, NF4Linear) for base in bases):
        return tuple(layer(x) for layer in layers)
    held = [base for base in bases if isinstance(base, NF4Linear)]
    if len({(base.block_size, base.absmax.dtype) for base in held}) > 1 or any(base.compute_dtype for base in held):
        return tuple(layer(x) for layer in layers)
    dropout = next(iter(rates), 0.0)
    parts = [
        base.projection(layer.lora_A, layer.lora_B, scale=layer.scale)
        if isinstance(layer, LoraLinear)
        else base.projection()
        for layer, base in zip(layers, held, strict=True)
    ]
    seed = draw_seed(x) if dropout > 0 else None
    y = lora_matmul_group(
        held[0].operand(x), parts, dropout=dropout, seed=seed, block_size=held[0].block_size,
        keep_weight=held[0].keep_weight,
    )  # fmt: skip
    outputs = y.split([base.out_features for base in held], dim=-1)
    return tuple(
        output if base.bias is None else output + base.bias.to(output.dtype)
        for output, base in zip(outputs, held, strict=True)
    )


def attach_lora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str = ("q_proj", "v_proj"),
    *,
    use_rslora: bool = False,
) -> nn.Module:
    """Freeze `model` and wrap its target layers in `LoraLinear`, in place.

    Args:
        target_modules: names that end a module's path (`q_proj`, `self_attn.q_proj`, a full path), or
            "all-linear": every linear layer but the head.
    Returns:
        The same model; only lora_A and lora_B of the wrapped layers take gradients.
    Raises:
        InputError: no name matches a linear layer, or an adapter is attached already.
    """
    targets = match_targets(model, target_modules)
    return attach_layers(model, lora_layers(model, dict.fromkeys(targets, r), alpha, dropout, use_rslora=use_rslora))


def lora_layers(
    model: nn.Module, ranks: Mapping[str, int], alpha: float, dropout: float = 0.0, *, use_rslora: bool = False
) -> dict[str, LoraLinear]:
    """A `LoraLinear` for each path in `ranks`, beside a model that is as it was: `attach_layers` puts them in.

    Args:
        ranks: {path of a linear layer: r}.
    Raises:
        InputError: a number that is impossible.
    """
    # A streamed layer's weights are placeholders; its adapter lies with the rest of the model.
    places = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    streamed_to = next((device for device in places if device.type != "cpu"), next(iter(places), torch.device("meta")))
    layers = {}
    for path, r in ranks.items():
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear)
        device = streamed_to if base.weight.is_meta else base.weight.device
        layers[path] = LoraLinear(base, r, alpha, dropout, use_rslora=use_rslora, device=device)
    return layers


def attach_layers(model: nn.Module, layers: Mapping[str, LoraLinear]) -> nn.Module:
    """Freeze `model` and put its layers' adapters in, in place; returns the model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, layer.train(owner.training))
    return model


def match_targets(model: nn.Module, target_modules: Sequence[str] | str) -> list[str]:
    """Paths of the linear layers that `target_modules` names, in the model's order (see `attach_lora`)."""
    if next(adapted_layers(model), None) is not None:
        raise InputError("the model has an adapter already: load it afresh before attaching another")
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    # The head is part of the fused loss, which takes its weight as it is.
    linears = [path for path in linears if path.rpartition(".")[2] != "lm_head"]
    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if names == ["all-linear"]:
        return linears
    found = {name: [path for path in linears if path_ends_in(path, name)] for name in names}
    unmatched = [name for name, paths in found.items() if not paths]
    if len(unmatched) == len(names):
        raise InputError(
            f"lora_target_modules {_join(names)} match no linear layer; this model has {_join(_leaves(linears))}"
        )
    if unmatched:
        warnings.warn(
            f"lora_target_modules {_join(unmatched)} match nothing and are left out; "
            f"this model has {_join(_leaves(linears))}",
            stacklevel=3,
        )
    chosen = {path for paths in found.values() for path in paths}
    return [path for path in linears if path in chosen]


def path_ends_in(path: str, name: str) -> bool:
    """Whether `name` is the end of a module's path, at a dot: `up_proj` and `mlp.up_proj` of `layers.0.mlp.up_proj`."""
    return f".{path}".endswith(f".{name}")


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(path, layer) of every `LoraLinear` in the model."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield path, module


def _leaves(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _join(names: Iterable[str]) -> str:
    return "[" + ", ".join(names) + "]"
