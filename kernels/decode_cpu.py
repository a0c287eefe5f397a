"""One decoding step of a LLaMA on the CPU, all layers in one call of C (csrc/decode.c).

At one token the matrices of a small model take less time than the Python that calls them one by one. What the
step computes is what jindo_core/model.py computes; its activations stay fp32 between the layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jindo_core.kernels import native
from jindo_core.kernels.lora_matmul import Projection
from jindo_core.kernels.lora_matmul_cpu import MOST_IN_FEATURES, MOST_ROWS
from jindo_core.kernels.native import FLOAT, INT, LONG, POINTER, TYPES, address
from jindo_core.kernels.nf4 import dynamic_map


class Layer(NamedTuple):
    """One decoder layer: q, k, v, o, gate, up and down, its two norms' weights [C], and its part of the cache.

    Attributes:
        biases: [out] or None, one for each projection.
        keys, values: [B, G, capacity, D], contiguous, of the activations' dtype.
        window: so many keys are seen, the new one the last; None: all.
    """

    projections: Sequence[Projection]
    biases: Sequence[Tensor | None]
    attention_norm: Tensor
    mlp_norm: Tensor
    keys: Tensor
    values: Tensor
    window: int | None = None


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class _Matrix(ctypes.Structure):
    _fields_ = (
        *_fields(POINTER, "codes", "absmax", "nested", "offset", "a", "b", "bias"),
        *_fields(LONG, "inputs", "outputs", "rank"),
        ("scale", FLOAT),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("m", _Matrix * 7),
        *_fields(POINTER, "attention_norm", "mlp_norm", "keys", "values"),
        ("window", LONG),
    )


_SIZES = (
    "layers", "rows", "width", "heads", "groups", "head", "inner", "vocabulary", "capacity", "length", "block_size",
)  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = (
        *_fields(LONG, *_SIZES),
        ("layer", ctypes.POINTER(_Layer)),
        *_fields(POINTER, "map", "norm", "lm_head", "cos", "sin"),
        ("eps", FLOAT),
        *_fields(INT, "type", "threads"),
        *_fields(POINTER, "x", "logits", "work"),
    )


class DecodeStep:
    """A step prepared once and run for every token; it holds on to every tensor it points to.

    Args:
        layers: the decoder layers, all on the CPU.
        norm: the final norm's weight [C]. lm_head: [V, C]. Both of the activations' dtype.
        heads: H. eps: of the norms. block_size: of the quantization.
    """

    def __init__(
        self, layers: Sequence[Layer], norm: Tensor, lm_head: Tensor, *, heads: int, eps: float, block_size: int
    ) -> None:
        keys = layers[0].keys
        rows, groups, capacity, head = keys.shape
        self._kept: list[Any] = [list(layers), norm, lm_head.contiguous()]
        self._rows, self._width, self._threads = rows, norm.shape[0], torch.get_num_threads()
        step = self._step = _Step(
            layers=len(layers), rows=rows, width=norm.shape[0], heads=heads, groups=groups, head=head,
            inner=layers[0].projections[4].out_features, vocabulary=lm_head.shape[0], capacity=capacity,
            block_size=block_size, map=address(dynamic_map(norm.device)), norm=address(norm),
            lm_head=address(self._kept[2]), eps=eps, type=TYPES[norm.dtype], threads=self._threads,
        )  # fmt: skip
        described = (_Layer * len(layers))(*(self._describe(layer) for layer in layers))
        step.layer = ctypes.cast(described, ctypes.POINTER(_Layer))
        rank = max(projection.rank for layer in layers for projection in layer.projections)
        self._kept.append(described)
        count = native.function("jindo_decode_work", ctypes.POINTER(_Step), LONG, returns=LONG)(step, rank)
        self._work, self.logits = torch.zeros(count), torch.empty(rows, lm_head.shape[0])
        step.work, step.logits = address(self._work), address(self.logits)
        self._run = native.function("jindo_decode", ctypes.POINTER(_Step), returns=INT)

    def _describe(self, layer: Layer) -> _Layer:
        matrices = (self._matrix(*both) for both in zip(layer.projections, layer.biases, strict=True))
        return _Layer(
            (_Matrix * 7)(*matrices), address(layer.attention_norm), address(layer.mlp_norm), address(layer.keys),
            address(layer.values), layer.window or layer.keys.shape[2],
        )  # fmt: skip

    def _matrix(self, w: Projection, bias: Tensor | None) -> _Matrix:
        bias = None if bias is None else bias.detach().float().contiguous()
        a = None if w.lora_A is None else w.lora_A.detach().float().contiguous()
        b = None if w.lora_B is None else w.lora_B.detach().float().contiguous()
        packed, absmax = w.packed.contiguous(), w.absmax.contiguous()
        self._kept.append((a, b, bias, packed, absmax, w.nested_absmax, w.offset))
        return _Matrix(
            address(packed), address(absmax), address(w.nested_absmax), address(w.offset), address(a), address(b),
            address(bias), packed.numel() * 2 // w.out_features, w.out_features, w.rank, w.scale,
        )  # fmt: skip

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, length: int) -> Tensor:
        """Logits of the next token.

        Args:
            x: embedded tokens [B, C]. cos, sin: fp32 [D/2] of the new position. length: tokens in the cache, to
                which the new one's keys and values are added.
        Returns:
            fp32 [B, V], overwritten by the next call.
        Raises:
            ValueError: the cache is full. RuntimeError: torch's number of threads has changed.
        """
        step, x = self._step, x.float().contiguous().clone()
        if length >= step.capacity:
            raise ValueError(f"the cache holds {step.capacity} tokens, {length + 1} are needed: make it larger")
        step.length, step.x, step.cos, step.sin = length, address(x), address(cos), address(sin)
        if torch.get_num_threads() != self._threads or not self._run(step):
            raise RuntimeError(f"a decoding step was prepared for {self._threads} threads: prepare another")
        return self.logits


def fits(layers: Sequence[Layer], norm: Tensor, block_size: int) -> bool:
    """Whether `DecodeStep` takes these layers; where not, the model runs operator by operator."""
    if native.library() is None or norm.device.type != "cpu" or norm.dtype not in TYPES or block_size % 64:
        return False
    if layers[0].keys.shape[0] > MOST_ROWS or layers[0].keys.shape[3] % 2:
        return False
    for layer in layers:
        for w in layer.projections:
            inputs = w.packed.numel() * 2 // w.out_features
            if inputs % 64 or inputs > MOST_IN_FEATURES:
                return False
    return len({w.absmax.dtype for layer in layers for w in layer.projections}) == 1
