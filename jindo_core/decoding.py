"""Decoding one token at a time: the shortest way there is for the model at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jindo_core.causal_lm import CausalLM, KVCache
from jindo_core.kernels.attention import causal_mask
from jindo_core.kernels.decode_cpu import DecodeStep, Layer, fits
from jindo_core.kernels.lora_matmul import Projection
from jindo_core.lora import LoraLinear
from jindo_core.model import DecoderLayer, LlamaForCausalLM
from jindo_core.nf4 import NF4Linear
from jindo_core.rotary import rope_frequencies


class Decoder:
    """Logits of one new token a sequence after another, behind a cache that holds the prompt.

    On the CPU a LLaMA in NF4 runs as one prepared call a token, on a GPU as a CUDA graph, captured at the first token;
    any other runs through its modules.

    Args:
        model: in eval mode. cache: filled with the prompt by `model.stack`. Its length may be set back between calls.
    """

    def __init__(self, model: CausalLM, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._step = _prepare(model, cache)
        self._graph = GraphedStep(model, cache) if _capturable(model) else None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """int64 [B] -> fp32 logits [B, V] of what follows, good until the next call; the cache grows by one."""
        model, cache = self._model, self._cache
        if self._graph is not None:
            return self._graph(tokens)
        if self._step is None:
            return model.lm_head(model.stack(tokens[:, None], cache=cache)[:, -1]).float()
        place = torch.tensor([[cache.length]], device=tokens.device)
        cos, sin = model.stack.angles(place, cache.length + 1)
        logits = self._step(model.stack.embedding(tokens), cos.flatten(), sin.flatten(), cache.length)
        cache.length += 1
        return logits


class FixedStep:
    """One token's step whose shapes and addresses never change: its place in the sequence is a tensor, and attention
    goes over the first `size` places of the cache, those beyond the token masked.

    Attributes:
        tokens: int64 [B] and place: int64 [1], filled before a run.
    """

    def __init__(self, model: CausalLM, cache: KVCache, size: int) -> None:
        self._model = model
        self._keys, self._values = cache.keys[:, :, :, :size], cache.values[:, :, :, :size]
        device = cache.keys.device
        self.tokens = torch.zeros(cache.keys.shape[1], dtype=torch.int64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = torch.arange(size, device=device)
        self._windows = [model.config.window(layer) for layer in range(model.config.num_hidden_layers)]
        inverse, self._factor = rope_frequencies(model.config, size)
        self._inverse = inverse.to(device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.extend`: k, v [B, G, 1, D] to their place; returns all places [B, G, size, D]."""
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(2, self.place, k)
        values.index_copy_(2, self.place, v)
        return keys, values

    def run(self) -> Tensor:
        """fp32 logits [B, V]."""
        stack = self._model.stack
        angle = (self.place.float() * self._inverse)[None, None]
        cos, sin = angle.cos() * self._factor, angle.sin() * self._factor
        masks = {w: causal_mask(self.place, self._places, w)[None, None] for w in set(self._windows)}
        x = stack.embedding(self.tokens[:, None])
        for layer, window in zip(stack.layers, self._windows, strict=True):
            x = layer(x, cos, sin, masks[window], False, self)
        return self._model.lm_head(stack.norm(x)[:, -1]).float()


class GraphedStep:
    """`FixedStep` as a CUDA graph: a token costs one launch, where Python and a thousand launches take longer than
    their kernels. Captured again when the sequence outgrows its window."""

    WINDOW = 512

    def __init__(self, model: CausalLM, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._size = 0
        for held in (cache.keys, cache.values):  # a masked place weighs 0, but 0 times the NaN of fresh memory is NaN
            held[:, :, :, cache.length :] = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        cache = self._cache
        capacity = cache.keys.shape[3]
        if cache.length >= capacity:
            raise ValueError(f"the cache holds {capacity} tokens, {cache.length + 1} are needed: make it larger")
        if cache.length >= self._size:
            self._size = min((cache.length // self.WINDOW + 1) * self.WINDOW, capacity)
            self._capture(tokens)
        self._fill(tokens)
        self._captured.replay()
        cache.length += 1
        return self._logits

    def _fill(self, tokens: Tensor) -> None:
        self._step.tokens.copy_(tokens)
        self._step.place.fill_(self._cache.length)

    def _capture(self, tokens: Tensor) -> None:
        self._step = FixedStep(self._model, self._cache, self._size)
        self._fill(tokens)
        self._step.run()  # compiles; what it writes to the cache, the first replay writes again
        self._captured = torch.cuda.CUDAGraph()
        with torch.cuda.device(tokens.device), torch.cuda.graph(self._captured):  # a graph is of the current device
            self._logits = self._step.run()


def _capturable(model: CausalLM) -> bool:
    """Whether the model's steps can be captured: all of it on one GPU, no hooks, no memory that grows, and angles that
    depend on the place alone (those of dynamic NTK change with the length)."""
    devices = {parameter.device for parameter in model.parameters()}
    dynamic = (model.config.rope or {}).get("rope_type") == "dynamic"
    watched = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    still = not dynamic and model.config.memory is None
    return len(devices) == 1 and next(iter(devices)).type == "cuda" and still and not watched


def _prepare(model: CausalLM, cache: KVCache) -> DecodeStep | None:
    """The prepared step, or None where the model is no LLaMA, is not all NF4 on a CPU, has memory, or is watched by
    hooks."""
    if not isinstance(model, LlamaForCausalLM):
        return None
    stack = model.stack
    kinds = {(p.dtype, p.device.type) for p in (stack.norm.weight, model.lm_head.weight, cache.keys)}
    if stack.stream is not None or model.config.memory is not None:
        return None
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
        biases: list[Tensor | None] = []
        for linear in linears:
            base = linear.base if isinstance(linear, LoraLinear) else linear
            if not isinstance(base, NF4Linear):
                return None
            biases.append(base.bias)
            adapter = (linear.lora_A, linear.lora_B) if isinstance(linear, LoraLinear) else (None, None)
            scale = linear.scale if isinstance(linear, LoraLinear) else 1.0
            projections.append(base.projection(*adapter, scale=scale))
            block_sizes.add(base.block_size)
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        held = cache.keys[index], cache.values[index]
        layers.append(Layer(projections, biases, *norms, *held, model.config.window(index)))
    if len(block_sizes) != 1 or not fits(layers, stack.norm.weight, block_size := block_sizes.pop()):
        return None
    config = model.config
    return DecodeStep(
        layers, stack.norm.weight, model.lm_head.weight, heads=config.num_attention_heads, eps=config.rms_norm_eps,
        block_size=block_size,
    )  # fmt: skip

