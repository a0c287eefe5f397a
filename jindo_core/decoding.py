"""Decoding one token at a time: the shortest way there is for the model at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jindo_core.kernels.decode_cpu import DecodeStep, Layer, fits
from jindo_core.kernels.lora_matmul import Projection
from jindo_core.lora import LoraLinear
from jindo_core.model import DecoderLayer, KVCache, LlamaForCausalLM
from jindo_core.nf4 import NF4Linear


class Decoder:
    """Logits of one new token a sequence after another, behind a cache that holds the prompt.

    On the CPU an NF4 model runs as one prepared call a token; any other runs through its modules.

    Args:
        model: in eval mode. cache: filled with the prompt by `model.model`.
    """

    def __init__(self, model: LlamaForCausalLM, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._step = _prepare(model, cache)

    def __call__(self, tokens: Tensor) -> Tensor:
        """int64 [B] -> fp32 logits [B, V] of what follows, good until the next call; the cache grows by one."""
        model, cache = self._model, self._cache
        if self._step is None:
            return model.lm_head(model.model(tokens[:, None], cache=cache)[:, -1]).float()
        place = torch.tensor([[cache.length]], device=tokens.device)
        cos, sin = model.model.angles(place, cache.length + 1)
        logits = self._step(model.model.embed_tokens(tokens), cos.flatten(), sin.flatten(), cache.length)
        cache.length += 1
        return logits


def _prepare(model: LlamaForCausalLM, cache: KVCache) -> DecodeStep | None:
    """The prepared step, or None where the model is not all NF4 on a CPU, or is watched by hooks."""
    stack = model.model
    kinds = {(p.dtype, p.device.type) for p in (stack.norm.weight, model.lm_head.weight, cache.keys)}
    if len(kinds) != 1 or stack.norm.weight.device.type != "cpu" or type(model.lm_head) is not nn.Linear:
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None
    layers: list[Layer] = []
    block_sizes: set[int] = set()
    for index, layer in enumerate(stack.layers):
        assert isinstance(layer, DecoderLayer)
        own = layer.self_attn, layer.mlp
        linears = (*(getattr(own[0], f"{n}_proj") for n in "qkvo"), own[1].gate_proj, own[1].up_proj, own[1].down_proj)
        projections: list[Projection] = []
        for linear in linears:
            base = linear.base if isinstance(linear, LoraLinear) else linear
            if not isinstance(base, NF4Linear) or base.bias is not None:
                return None
            adapter = (linear.lora_A, linear.lora_B) if isinstance(linear, LoraLinear) else (None, None)
            scale = linear.scale if isinstance(linear, LoraLinear) else 1.0
            projections.append(base.projection(*adapter, scale=scale))
            block_sizes.add(base.block_size)
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        layers.append(Layer(projections, *norms, cache.keys[index], cache.values[index]))
    if len(block_sizes) != 1 or not fits(layers, stack.norm.weight, block_size := block_sizes.pop()):
        return None
    config = model.config
    return DecodeStep(
        layers, stack.norm.weight, model.lm_head.weight, heads=config.num_attention_heads, eps=config.rms_norm_eps,
        block_size=block_size,
    )  # fmt: skip

