"""LLaMA (Touvron et al. 2023, arXiv:2307.09288), under Hugging Face's module names, and what all architectures share.

Shape suffixes in comments: B batch, T new tokens, S tokens attended to (cache and new), C hidden size,
H query heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jindo_core.errors import InputError
from jindo_core.kernels.attention import causal_attention
from jindo_core.kernels.linear_cross_entropy import linear_cross_entropy
from jindo_core.kernels.rms_norm import rms_norm
from jindo_core.kernels.rope import rope
from jindo_core.kernels.swiglu import swiglu
from jindo_core.lora import project
from jindo_core.recompute import CheckpointOffload, recomputed
from jindo_core.rotary import RotaryConfig, rope_frequencies
from jindo_core.streaming import LayerStream

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")

ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


class ModelConfig(RotaryConfig, Protocol):
    """What the engine asks of any architecture's configuration."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of a LLaMA, under config.json's names. rope: the scaling's parameters, with `rope_type`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LlamaConfig:
        """From the contents of a config.json.

        Raises:
            InputError: another architecture, a missing or impossible number, or an unknown RoPE scaling.
        """
        kind = raw.get("model_type")
        if kind != "llama":
            raise InputError(f"config.json has model_type {kind!r}, expected 'llama': other models can't be loaded")
        if raw.get("hidden_act", "silu") != "silu":
            raise InputError(f"config.json has hidden_act {raw['hidden_act']!r}, expected 'silu'")
        given = {field.name: raw[field.name] for field in fields(cls) if raw.get(field.name) is not None}
        given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if not isinstance(given.get(name), int) or given[name] < 1:
                raise InputError(f"config.json has {name} = {raw.get(name)!r}, expected a positive whole number")
        heads, groups = given["num_attention_heads"], given["num_key_value_heads"]
        if not isinstance(groups, int) or groups < 1 or heads % groups:
            raise InputError(f"config.json has {heads} heads and {groups} key/value heads: they don't divide")
        given.setdefault("head_dim", given["hidden_size"] // heads)
        for name in ("head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta"):
            value = given.get(name, 1)
            whole = name in ("head_dim", "max_position_embeddings")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value <= 0:
                raise InputError(f"config.json has {name} = {value!r}, expected a positive number")
        # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
        scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise InputError(f"config.json has RoPE parameters {scaling!r}, expected an object")
        rope = dict(scaling)
        rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
        if rope["rope_type"] not in ROPE_TYPES:
            raise InputError(f"config.json has rope_type {rope['rope_type']!r}, expected one of {ROPE_TYPES}")
        for name in ROPE_NEEDS.get(rope["rope_type"], ()):
            if not isinstance(rope.get(name), int | float):
                raise InputError(f"config.json has RoPE {name} = {rope.get(name)!r}, expected a number")
        if (theta := rope.pop("rope_theta", None)) is not None:
            given["rope_theta"] = theta
        if raw.get("original_max_position_embeddings") is not None:
            rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
        given["rope"] = None if rope["rope_type"] == "default" else rope
        eos = raw.get("eos_token_id")
        if any(not isinstance(i, int) for i in (eos if isinstance(eos, list) else [eos or 0])):
            raise InputError(f"config.json has eos_token_id = {eos!r}, expected a token id or a list of them")
        given["eos_token_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        return cls(**given)


# --- key/value cache ------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens so far; given to the model as an argument, and filled by it.

    Args:
        batch: B. capacity: the most tokens a sequence may reach. dtype, device: the activations'.
    Attributes:
        length: tokens held. Memory: 2 * layers * B * G * capacity * D * itemsize bytes.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, G, T, D] of one layer; returns all of that layer's [B, G, S, D]."""
        end = self.length + k.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} tokens, {end} are needed: make it larger")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


# --- layers ---------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467), the mean in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, groups, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.grouped = config.num_key_value_heads != config.num_attention_heads

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool, cache: KVCache | None
    ) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = rope(q, k, cos, sin)  # [B, T, H, D] and [B, T, G, D]
        if causal and cache is None:
            return self.o_proj(causal_attention(q, k, v).flatten(2))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*project(x, self.gate_proj, self.up_proj)))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and a residual."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, causal, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderStack(nn.Module, ABC):
    """The stack below the head: token ids to hidden states. A subclass holds the modules, under its own names.

    Attributes:
        layers: each called as `DecoderLayer` is. norm: behind the last one; its weight says device and dtype.
    """

    layers: nn.ModuleList
    norm: RMSNorm | nn.LayerNorm

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointed_layers = 0
        self.checkpoint_offload: CheckpointOffload | None = None
        self.stream: LayerStream | None = None

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """Of the input tokens."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether every layer is checkpointed in training. `checkpointed_layers` says how many of the first are: the
        activations of the others are gone again by the time the first ones run a second time."""
        return self.checkpointed_layers >= len(self.layers)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, every: bool) -> None:
        self.checkpointed_layers = len(self.layers) if every else 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, T] -> [B, T, C]; arguments as in `CausalLM.forward`."""
        past = 0 if cache is None else cache.length
        new = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + new, device=input_ids.device)[None]
        x = self._embed(input_ids)
        cos, sin = self.angles(position_ids, past + new)
        mask = _attention_mask(attention_mask, past, new, x.device)
        causal = mask is None and new > 1
        for i, layer in enumerate(self.layers):
            run = functools.partial(layer, cos=cos, sin=sin, mask=mask, causal=causal, cache=cache)
            if self._checkpointed(i):
                around = functools.partial(self._weights, i)
                x = recomputed(run, x, tuple(layer.parameters()), around=around, offload=self.checkpoint_offload)
            else:
                with self._weights(i, False):
                    x = run(x)
        if cache is not None:
            cache.length += new
        return self.norm(x)

    def _embed(self, input_ids: Tensor) -> Tensor:
        """The table may lie on the CPU while the layers do not."""
        embedding = self.embedding
        return embedding(input_ids.to(embedding.weight.device)).to(self.norm.weight.device)

    def _checkpointed(self, layer: int) -> bool:
        # A streamed layer's weights are gone when its backward pass comes: it has to run again.
        streamed = self.stream is not None and layer in self.stream
        return torch.is_grad_enabled() and (streamed or (self.training and layer < self.checkpointed_layers))

    def _weights(self, layer: int, again: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.stream is None else self.stream.use(layer, backwards=again)

    def angles(self, position_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [B or 1, T, D/2]."""
        inverse, factor = rope_frequencies(self.config, length)
        angle = position_ids[:, :, None].float() * inverse.to(position_ids.device)
        return angle.cos() * factor, angle.sin() * factor


class LlamaModel(DecoderStack):
    """LLaMA's stack."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def embedding(self) -> nn.Embedding:
        return self.embed_tokens


def _attention_mask(attention_mask: Tensor | None, past: int, new: int, device: torch.device) -> Tensor | None:
    """bool [B or 1, 1, T, S], True where a query may look; None when plain causal attention says it all."""
    if attention_mask is None and (past == 0 or new == 1):
        return None
    query = torch.arange(past, past + new, device=device)[:, None]
    key = torch.arange(past + new, device=device)[None]
    mask = (key <= query)[None, None]
    if attention_mask is not None:
        # A padded query sees itself: with no key at all its softmax, and its gradient, would be NaN.
        mask = mask & (attention_mask.bool()[:, None, None] | (key == query))
    return mask


class CausalLMOutput:
    """What the model returns: `.loss` (fp32 scalar, or None without labels) and `.logits` [B, T, V].

    With labels the logits are made only when asked for: the loss never needs them whole.
    """

    def __init__(self, hidden: Tensor, head: nn.Linear, loss: Tensor | None) -> None:
        self.loss = loss
        self._hidden, self._head = hidden, head
        self._logits = head(hidden) if loss is None else None

    @property
    def logits(self) -> Tensor:
        if self._logits is None:
            self._logits = self._head(self._hidden)
        return self._logits


class CausalLM(nn.Module, ABC):
    """A decoder with its language-model head: what every architecture's model is to the rest of the engine.

    Attributes:
        LAYERS, EMBEDDING: paths of the list of layers and of the input embedding, in the checkpoint's names.
        lm_head: without bias; its weight may be the embedding's.
    """

    LAYERS: ClassVar[str]
    EMBEDDING: ClassVar[str]
    config: ModelConfig
    lm_head: nn.Linear

    @property
    @abstractmethod
    def stack(self) -> DecoderStack:
        """All below the head."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> CausalLMOutput:
        """
        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, S], 1 for tokens and 0 for padding. Right padding needs none: a causal token
                never sees what follows it.
            labels: int64 [B, T], the token ids with -100 where no loss counts; shifted here.
            position_ids: int64 [B, T]; counted from the cache's length by default.
            cache: filled with this call's keys and values.
            num_items_in_batch: divisor of the loss; the counted labels of this call by default.
        Returns:
            `.loss`: mean cross entropy, or None. `.logits`: [B, T, V].
        """
        hidden = self.stack(input_ids, attention_mask, position_ids, cache)
        if labels is None:
            return CausalLMOutput(hidden, self.lm_head, None)
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        loss = linear_cross_entropy(
            hidden.flatten(0, 1), self.lm_head.weight, shifted.flatten(), count=num_items_in_batch
        )
        return CausalLMOutput(hidden, self.lm_head, loss)

    @property
    def device(self) -> torch.device:
        return self.stack.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, embedding, norms and head."""
        return self.stack.norm.weight.dtype


class LlamaForCausalLM(CausalLM):
    """LLaMA with its language-model head, called as transformers' class of the same name is."""

    LAYERS, EMBEDDING = "model.layers", "model.embed_tokens"
    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def stack(self) -> LlamaModel:
        return self.model
