"""A LoRA adapter added to its base model's weights, a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from jindo_core.adapters import Adapter
from jindo_core.errors import InputError
from jindo_core.formats import Checkpoint
from jindo_core.nf4 import NF4Weight, quantize_nf4

Onto = Literal["original", "nf4"]


class MergedCheckpoint:
    """W + s B A, added in fp32 and rounded once to W's own dtype; a `Checkpoint` of whole weights. An embedding and a
    head that the adapter brings take the place of the base's.

    Args:
        base: the model that the adapter was trained on; its original, or in NF4.
        adapter: None: nothing is added.
        onto: "original": W as the base's files hold it. "nf4": W as the adapter saw it in training, quantized to NF4
            and back; all linear layers become that, adapted or not.
        linears: paths of the layers that NF4 quantizes.
        double_quant: as in training. device: where it is computed.
    Attributes:
        nf4_names: the weights that are, or become, NF4.
    Raises:
        InputError: `onto` is "original" and the base's files hold NF4; or the adapter brings an embedding or a head,
            and the base's are one.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: Adapter | None,
        onto: Onto,
        linears: Collection[str],
        *,
        double_quant: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if onto == "original" and base.quantized:
            raise InputError("--onto original: the base model's files hold NF4; give --onto nf4, or its original")
        if adapter is not None and adapter.saved and base.config.tie_word_embeddings:
            raise InputError(
                f"the adapter brings its own {' and '.join(adapter.saved)}, but the base model's head is its "
                "embedding: they can't be merged, use the adapter as it is (generate --lora_weights)"
            )
        self.config, self.shapes, self.files, self.nbytes = base.config, base.shapes, base.files, base.nbytes
        self.quantized: frozenset[str] = frozenset()
        self._base, self._adapter, self._onto = base, adapter, onto
        # A base that was quantized says itself which layers were left out.
        names = frozenset(f"{path}.weight" for path in linears)
        self.nf4_names = names & base.quantized if base.quantized else names
        self._double_quant, self._device = double_quant, device

    def read(self, name: str) -> Tensor:
        path = name.removesuffix(".weight")
        if self._adapter is not None and path in self._adapter.saved and name.endswith(".weight"):
            return self._adapter.saved[path].to("cpu", self._base.dtype_of(name))
        adapted = self._adapter is not None and path in self._adapter.pairs and name.endswith(".weight")
        if self._onto == "nf4" and name in self.nf4_names:
            quantized = self.quantize(name)
            value, dtype = quantized.dequantize(torch.float32), quantized.dtype
        else:
            value = self._base.read(name)
            dtype = value.dtype
        if adapted:
            assert self._adapter is not None
            value = value.to(self._device, torch.promote_types(dtype, torch.float32))
            value = value + self._adapter.delta(path).to(value.device)
        return value.to("cpu", dtype)

    def quantize(self, name: str) -> NF4Weight:
        """A linear layer's weight in NF4, without the adapter; as it lies in the files where they hold NF4."""
        if name in self._base.quantized:
            return self._base.read_nf4(name).to(torch.device(self._device))
        return quantize_nf4(self._base.read(name).to(self._device), double_quant=self._double_quant)

    def read_nf4(self, name: str) -> NF4Weight:
        raise KeyError(f"{name}: merged weights are whole")

    def dtype_of(self, name: str) -> torch.dtype:
        return self._base.dtype_of(name)

    def nbytes_of(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtype_of(name).itemsize

