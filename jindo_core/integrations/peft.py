"""peft's LoRA on NF4 layers as one fused operator, with merging.

peft takes an `NF4Linear` for the nn.Linear that it is, so that a plain LoraConfig works without this module: the base's
product fused, the adapter's as peft writes it. Merging needs the layer below, for peft's would add to packed bytes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from jindo_core.errors import InputError
from jindo_core.lora import draw_seed
from jindo_core.nf4 import NF4Linear, NF4Weight, is_finite, quantize_nf4

INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that do not read the base's weight."""


def register_fused_lora(config: LoraConfig) -> LoraConfig:
    """Make peft put `NF4LoraLinear` on this engine's layers; the same config, for `get_peft_model` or a trainer.

    peft does not write this into adapter_config.json: to load an adapter so,
    `PeftModel.from_pretrained(model, path, config=register_fused_lora(LoraConfig.from_pretrained(path)))`.
    """
    if not isinstance(config, LoraConfig):
        raise InputError(f"register_fused_lora got a {type(config).__name__}, expected peft's LoraConfig")
    config._register_custom_module({NF4Linear: NF4LoraLinear})
    return config


class NF4LoraLinear(Linear):
    """peft's LoRA layer on an `NF4Linear`: one active adapter runs as one operator with the base.

    The dropout mask is the engine's, drawn from torch's generator; A and B are cast to x's dtype, where peft casts x to
    theirs. Several active adapters at once, or `adapter_names`, run as peft's own layer does.

    `merge` adds B A to the dequantized weight in fp32 and quantizes again: the result errs by NF4's rounding, as with
    bitsandbytes. `unmerge` is exact: the codes from before are kept while it is merged (0.52 bytes a weight).
    """

    def __init__(self, base_layer: NF4Linear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._unmerged: NF4Weight | None = None  # what was before the first merge

    def update_layer(self, adapter_name: str, *args: Any, config: LoraConfig, **kwargs: Any) -> None:
        if config.init_lora_weights not in INITIALIZATIONS:
            allowed = ", ".join(repr(value) for value in INITIALIZATIONS)
            given = config.init_lora_weights
            raise InputError(f"init_lora_weights {given!r} reads the base's weight, which is NF4: expected {allowed}")
        if config.lora_bias:
            raise InputError("lora_bias is not supported on NF4 layers: expected False")
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> None:
        fields = [f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")]
        wanted = [name for name in fields if getattr(config, name)]
        if wanted:
            raise InputError(f"{', '.join(wanted)} changes LoRA's arithmetic and is not supported on NF4 layers")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or len(active) != 1:
            return super().forward(x, *args, **kwargs)
        base, dropout = self.get_base_layer(), self.lora_dropout[active[0]]
        p = dropout.p if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0
        return base.adapted(
            x, self.lora_A[active[0]].weight, self.lora_B[active[0]].weight, scale=self.scaling[active[0]],
            dropout=p, seed=draw_seed(x) if p > 0 else None,
        )  # fmt: skip

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's; a sum that is not finite is refused with `safe_merge` and without."""
        chosen = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not chosen:
            return
        base = self.get_base_layer()
        before = base.nf4 if self._unmerged is None else self._unmerged.to(base.weight.device)
        summed = before.dequantize(torch.float32)
        for name in [*self.merged_adapters, *chosen]:
            summed += self.get_delta_weight(name).float()
        if not is_finite(summed):
            raise ValueError(f"the adapter {', '.join(chosen)} makes weights that are not finite: nothing was merged")
        made = quantize_nf4(summed, block_size=before.block_size, double_quant=before.nested_absmax is not None)
        base.hold(dataclasses.replace(made, dtype=before.dtype))
        self._unmerged = before
        self.merged_adapters.extend(chosen)

    def unmerge(self) -> None:
        """The base exactly as it was before the first merge."""
        if self._unmerged is not None:
            base = self.get_base_layer()
            base.hold(self._unmerged.to(base.weight.device))
        self._unmerged = None
        self.merged_adapters.clear()
