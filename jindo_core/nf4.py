"""Quantized weights: a tensor in NF4, and the linear layer that holds one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from jindo_core.kernels.lora_matmul import Projection, lora_matmul_group
from jindo_core.kernels.nf4 import (
    FLOAT_DTYPES,
    NESTED_BLOCK,
    check_layout,
    code_table,
    dynamic_map,
    nf4_dequantize,
    nf4_quantize,
    nf4_quantize_absmax,
)

STATE_KEY = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY)
"""What stands beside a quantized weight X in a state dict, as X.absmax and so on; the nested ones not always."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""bitsandbytes' own, and all that `NF4Weight.from_state_dict` takes."""
CONSTANTS = ("absmax", "nested_absmax", "offset")
"""The buffers of an `NF4Linear`: what its codes are multiplied by."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
"""Name -> dtype, of the dtypes a weight may have."""


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite; without a temporary of the tensor's size, which isfinite has several of."""
    return value.numel() == 0 or all(math.isfinite(end.item()) for end in torch.aminmax(value))


@dataclass(frozen=True)
class NF4Weight:
    """A weight in 4-bit NormalFloat (QLoRA, arXiv:2305.14314), bit-identical to bitsandbytes'.

    Attributes:
        packed: uint8 [ceil(N/2), 1], two codes a byte, high nibble first, row-major.
        absmax: block maxima: uint8 [blocks] when double-quantized, else fp32 [blocks].
        nested_absmax: fp32 [ceil(blocks/256)], or None without double quantization.
        offset: fp32 [], the mean that was subtracted before the second quantization, or None.
        shape: the weight's shape. dtype: what `dequantize()` gives by default.
        block_size: weights that share one maximum.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = 64

    def __post_init__(self) -> None:
        check_layout(self.packed, self.absmax, self.nested_absmax, self.offset, self.shape, self.block_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a tensor of `shape`, in `dtype` (its own by default)."""
        return nf4_dequantize(
            self.packed,
            self.absmax,
            self.nested_absmax,
            self.offset,
            self.shape,
            dtype=dtype or self.dtype,
            block_size=self.block_size,
        )

    def to(self, device: torch.device) -> NF4Weight:
        """The same weight with its parts on `device`."""
        nested_absmax = None if self.nested_absmax is None else self.nested_absmax.to(device)
        offset = None if self.offset is None else self.offset.to(device)
        return replace(
            self,
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            nested_absmax=nested_absmax,
            offset=offset,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of storage: 0.5159 a weight when double-quantized in blocks of 64."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The parts under the key suffixes of bitsandbytes' 4-bit checkpoints."""
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        parts = {
            prefix: self.packed,
            f"{prefix}.absmax": self.absmax,
            f"{prefix}.quant_map": code_table(self.packed.device).clone(),  # safetensors refuses shared tensors
        }
        if self.nested_absmax is not None and self.offset is not None:
            state |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": self.offset.item(),
            }
            parts[f"{prefix}.nested_absmax"] = self.nested_absmax
            parts[f"{prefix}.nested_quant_map"] = dynamic_map(self.packed.device).clone()
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return parts | {f"{prefix}.{STATE_KEY}": text.to(self.packed.device)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> NF4Weight:
        """The inverse of `state_dict`; also reads what bitsandbytes wrote.

        Raises:
            KeyError: a part is missing; with its name. ValueError: the parts do not fit, use other code maps, hold
                values that are not finite, or have a quant_state that can't be read.
        """
        described = described_state(state[f"{prefix}.{STATE_KEY}"])
        check_described(described)
        packed, absmax = state[prefix], state[f"{prefix}.absmax"]
        if not _is_table(state[f"{prefix}.quant_map"], code_table):
            raise ValueError(f"{prefix} was quantized with other codes than NF4's")
        nested_absmax, offset = None, None
        if f"{prefix}.nested_absmax" in state:
            nested_absmax = state[f"{prefix}.nested_absmax"]
            if not _is_table(state[f"{prefix}.nested_quant_map"], dynamic_map):
                raise ValueError(f"{prefix} was double-quantized with another map")
            offset = torch.tensor(_nested_offset(described), dtype=torch.float32, device=packed.device)
        try:
            whole = cls(
                packed, absmax, nested_absmax, offset, tuple(described["shape"]), DTYPES[described["dtype"]],
                described["blocksize"],
            )  # fmt: skip
        except TypeError as error:
            raise ValueError(str(error)) from None
        for name in CONSTANTS:
            scale = getattr(whole, name)
            if scale is not None and scale.dtype != torch.uint8 and not is_finite(scale):
                raise ValueError(f"{prefix} has a {name} that is not finite")
        return whole


def _is_table(found: Tensor, table: Callable[[torch.device], Tensor]) -> bool:
    return found.dtype == torch.float32 and torch.equal(found, table(found.device))


def _nested_offset(described: Mapping[str, Any]) -> float:
    value = described.get("nested_offset")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"nested_offset {value!r}, expected a number")
    if described.get("nested_blocksize") != NESTED_BLOCK:
        raise ValueError(f"nested_blocksize {described.get('nested_blocksize')!r}, expected {NESTED_BLOCK}")
    # Python's integers have no bound; what fp32 can't hold becomes infinite, which is refused.
    return float(value) if abs(value) <= torch.finfo(torch.float32).max else math.inf


def described_state(text: Tensor) -> dict[str, Any]:
    """The object in a `quant_state` tensor: uint8, JSON. ValueError where it holds none."""
    if text.dtype != torch.uint8:
        raise ValueError(f"a quant_state of {text.dtype}, expected uint8")
    try:
        described = json.loads(bytes(text.cpu().tolist()))
    except RecursionError:
        raise ValueError("a quant_state nested beyond reading") from None
    if not isinstance(described, dict):
        raise ValueError(f"a quant_state that is {type(described).__name__}, expected an object")
    return described


def check_described(described: Mapping[str, Any]) -> None:
    """See that a quant_state describes what `NF4Weight` can hold. ValueError: it does not."""
    for key, fits, expected in _EXPECTED:
        if not fits(described.get(key)):
            raise ValueError(f"{key} {described.get(key)!r}, expected {expected}")
    if described.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
        raise ValueError(f"nested_blocksize {described['nested_blocksize']!r}, expected {NESTED_BLOCK}")


_EXPECTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("quant_type", lambda value: value == "nf4", "'nf4'"),
    ("blocksize", lambda value: type(value) is int and value in BLOCK_SIZES, f"one of {BLOCK_SIZES}"),
    ("dtype", lambda value: isinstance(value, str) and value in DTYPES, "a floating dtype"),
    (
        "shape",
        lambda value: isinstance(value, list) and bool(value) and all(type(n) is int and n > 0 for n in value),
        "sizes",
    ),
)


def quantize_nf4(weight: Tensor, *, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantize a tensor to NF4.

    Args:
        weight: any shape, bf16, fp16, fp32 or fp64.
        block_size: elements that share one maximum; even.
        double_quant: also quantize the maxima, to 8 bits in blocks of 256: 4.127 bits a weight instead of 4.5.
    Raises:
        TypeError: not a floating dtype. ValueError: an empty tensor or an odd block size.
    """
    packed, absmax = nf4_quantize(weight.detach(), block_size)
    nested_absmax, offset = None, None
    if double_quant:
        absmax, nested_absmax, offset = nf4_quantize_absmax(absmax)
    return NF4Weight(packed, absmax, nested_absmax, offset, tuple(weight.shape), weight.dtype, block_size)


class NF4Linear(nn.Linear):
    """A frozen linear layer y = x W^T + b with W [N, K] in NF4; differentiable in x and b.

    W is rebuilt at every use and not kept unless `keep_weight` is set (see `lora_matmul_group`). The product is in x's
    dtype, under autocast in autocast's, or in `compute_dtype` where that is set, as bitsandbytes' Linear4bit; y is in
    x's dtype, or autocast's. State dict keys are bitsandbytes'.

    Args:
        weight: W, shape [N, K]. bias: [N], or None.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    keep_weight: bool = False
    compute_dtype: torch.dtype | None = None

    def __init__(self, weight: NF4Weight, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a full weight
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.hold(weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, double_quant: bool = True, block_size: int = 64) -> NF4Linear:
        """Quantize an ordinary linear layer."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(quantize_nf4(linear.weight, double_quant=double_quant, block_size=block_size), bias)

    @classmethod
    def placeholder(cls, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> NF4Linear:
        """A layer on the meta device whose weight is to come by `hold`; until then a full one of `dtype` stands in."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = in_features, out_features
        for name, shape in (("weight", (out_features, in_features)), ("bias", (out_features,) if bias else None)):
            value = None if shape is None else torch.empty(shape, dtype=dtype, device="meta")
            layer.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))
        for name in CONSTANTS:
            layer.register_buffer(name, None)
        return layer

    @property
    def is_placeholder(self) -> bool:
        """Whether the weight is still to come."""
        return self.absmax is None

    def hold(self, weight: NF4Weight) -> None:
        """Take `weight` [N, K] in place of what there is."""
        self.block_size, self.weight_dtype = weight.block_size, weight.dtype
        self.weight = nn.Parameter(weight.packed, requires_grad=False)
        # Buffers, not parameters: sharding engines cast and cut parameters, and these must stay whole fp32. Persistent,
        # though saved under other names: transformers takes others for something to be computed anew.
        for name in CONSTANTS:
            self.register_buffer(name, getattr(weight, name))

    @property
    def nf4(self) -> NF4Weight:
        """The quantized weight; its tensors are this layer's own."""
        shape = (self.out_features, self.in_features)
        return NF4Weight(
            self.weight.data, self.absmax, self.nested_absmax, self.offset, shape, self.weight_dtype, self.block_size
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(x)

    def operand(self, x: Tensor) -> Tensor:
        """x in the dtype that the product is computed in."""
        if _autocast(x):
            return x.to(torch.get_autocast_dtype(x.device.type))
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def projection(
        self, lora_A: Tensor | None = None, lora_B: Tensor | None = None, *, scale: float = 1.0
    ) -> Projection:
        """W, and an adapter where one is given, as `lora_matmul_group` takes them."""
        return Projection(
            self.weight, self.absmax, self.nested_absmax, self.offset, self.out_features, lora_A, lora_B, scale
        )  # fmt: skip

    def adapted(
        self,
        x: Tensor,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        """x W^T + b, plus scale * (D(x) A^T) B^T when an adapter is given. See `lora_matmul`."""
        y = lora_matmul_group(
            self.operand(x), [self.projection(lora_A, lora_B, scale=scale)], dropout=dropout, seed=seed,
            block_size=self.block_size, keep_weight=self.keep_weight,
        )  # fmt: skip
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y if _autocast(x) else y.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # .to(dtype) may move the maxima, never cast them: a bf16 absmax changes every weight of its block.
        kept = {name: self._buffers[name] for name in CONSTANTS}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _fqn_modifiers(self) -> dict[str, str]:
        # torch.distributed.checkpoint looks each key up by attributes, `weight.absmax` too; by this hook in a stand-in.
        return {"weight": "_keys"}

    @property
    def _keys(self) -> _AnyKey:
        return _AnyKey()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in CONSTANTS:
            destination.pop(prefix + name, None)
        if self.is_placeholder:
            return
        parts = self.nf4.state_dict()
        del parts["weight"]
        destination.update({prefix + key: part for key, part in parts.items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        extra = {key for key in state_dict if key.startswith(prefix + "weight.")}
        if prefix + "weight" not in state_dict or not extra:
            missing_keys.append(prefix + "weight." + STATE_KEY)
            return
        own = {key.removeprefix(prefix): state_dict[key] for key in (extra | {prefix + "weight"})}
        try:
            weight = NF4Weight.from_state_dict(own)
        except KeyError as error:
            error_msgs.append(f"{prefix}{error.args[0]} is missing")
            return
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        if weight.shape != (self.out_features, self.in_features):
            error_msgs.append(
                f"{prefix}weight has shape {weight.shape}, expected {(self.out_features, self.in_features)}"
            )
            return
        bias = state_dict.get(prefix + "bias")
        if self.bias is not None and bias is not None and bias.shape != self.bias.shape:
            error_msgs.append(f"{prefix}bias has shape {tuple(bias.shape)}, expected {tuple(self.bias.shape)}")
            return
        self.hold(weight.to(weight.packed.device if self.weight.is_meta else self.weight.device))
        if self.bias is not None and bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)
        elif self.bias is not None:
            missing_keys.append(prefix + "bias")

    def extra_repr(self) -> str:
        if self.is_placeholder:
            return f"in_features={self.in_features}, out_features={self.out_features}, no weight yet"
        bits = self.nf4.nbytes * 8 / math.prod((self.out_features, self.in_features))
        return f"in_features={self.in_features}, out_features={self.out_features}, {bits:.3f} bits/weight"


class _AnyKey:
    """Has every public attribute."""

    def __getattr__(self, name: str) -> _AnyKey:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64  # which torch's own layers keep too
