"""LLaMA (Touvron et al. 2023, arXiv:2307.09288) and the models of its shape, under Hugging Face's module names: Mistral
(arXiv:2310.06825: windows), Qwen2 (arXiv:2407.10671: biases), LongLLaMA (long_memory.py).

Shape suffixes in comments: B batch, T new tokens, S tokens attended to (cache and new), C hidden size,
H query heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jindo_core.causal_lm import CausalLM, DecoderStack, KVCache
from jindo_core.config_json import LARGEST, MOST_LAYERS, ConfigReader
from jindo_core.errors import InputError
from jindo_core.families import SLIDING, as_llama
from jindo_core.kernels.attention import causal_attention
from jindo_core.kernels.document_attention import document_attention
from jindo_core.kernels.rms_norm import rms_norm
from jindo_core.kernels.rope import rope
from jindo_core.kernels.swiglu import swiglu
from jindo_core.long_memory import LongMemory, attention_in_windows, memory_attention
from jindo_core.lora import project
from jindo_core.rotary import check_angles, read_rope

_LARGEST_HEAD = 1 << 16


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of a LLaMA, under config.json's names.

    Attributes:
        attention_bias: q, k and v have one, and o but in a Qwen2. rope: the scaling's parameters, with `rope_type`.
        sliding_window: tokens that the layers so named in `layer_types` see; None, and no names: all see everything.
        memory: a LongLLaMA's; None: no layer has memory.
    """

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
    model_type: str = "llama"
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    memory: LongMemory | None = None

    def window(self, layer: int) -> int | None:
        """So many keys a query of this layer sees, its own the last; None: all up to its own."""
        return self.sliding_window if self.layer_types and self.layer_types[layer] == SLIDING else None

    @property
    def output_bias(self) -> bool:
        """Whether o_proj has a bias."""
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def context(self) -> int | None:
        """The most tokens a sequence may have; None where memory takes what the window can't hold."""
        return self.max_position_embeddings if self.memory is None else None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> LlamaConfig:
        """From the contents of a config.json; `source` is what messages call them.

        Raises:
            InputError: another architecture, a missing or impossible value, or an unknown RoPE scaling.
        """
        read = ConfigReader(as_llama(raw, source), source)
        layers = read.whole("num_hidden_layers", most=MOST_LAYERS)
        hidden, heads = read.whole("hidden_size"), read.whole("num_attention_heads")
        groups = read.whole("num_key_value_heads", heads)
        if heads % groups:
            raise InputError(f"{source} has {heads} heads and {groups} key/value heads: they don't divide")
        head_dim = read.whole("head_dim", hidden // heads, most=_LARGEST_HEAD)
        if head_dim % 2 or heads * head_dim > LARGEST:
            raise InputError(f"{source} has {heads} heads of {head_dim}: expected an even size, {LARGEST} in all")
        context = read.whole("max_position_embeddings", cls.max_position_embeddings)
        theta, rope = read_rope(read, cls.rope_theta)
        config = cls(
            vocab_size=read.whole("vocab_size"), hidden_size=hidden,
            intermediate_size=read.whole("intermediate_size"), num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=groups, head_dim=head_dim, max_position_embeddings=context,
            rms_norm_eps=read.positive("rms_norm_eps", cls.rms_norm_eps), rope_theta=theta, rope=rope,
            tie_word_embeddings=read.switch("tie_word_embeddings", False),
            attention_bias=read.switch("attention_bias", False), mlp_bias=read.switch("mlp_bias", False),
            eos_token_ids=read.token_ids("eos_token_id"), model_type=read("model_type"),
            sliding_window=read("sliding_window"), layer_types=read("layer_types"),
            memory=LongMemory.from_dict(raw, layers, context),
        )  # fmt: skip
        check_angles(config, source)
        return config


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
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.output_bias)
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        self.window, self.memory = config.window(layer), config.memory
        self.remembers = self.memory is not None and layer in self.memory.layers

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool, cache: KVCache | None,
        documents: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        plain_k = k  # as memory keeps it
        if not self.remembers or (self.memory is not None and self.memory.positionals):
            q, k = rope(q, k, cos, sin)  # [B, T, H, D] and [B, T, G, D]
        if cache is not None:
            y = self._behind(cache, q, k, v, plain_k, mask, causal)
        elif self.memory is not None and q.shape[1] > self.memory.last_context_length:
            y = attention_in_windows(self.memory, self.layer, q, k, v, plain_k, mask)
        elif documents is not None:
            y = document_attention(q, k, v, documents, self.window)
        elif causal:
            y = causal_attention(q, k, v, self.window)
        else:
            y = self._masked(q, k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.o_proj(y.flatten(2))

    def _behind(
        self, cache: KVCache, q: Tensor, k: Tensor, v: Tensor, plain_k: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        """[B, T, H, D] of new tokens behind those in the cache, which takes them."""
        held_k, held_v = cache.extend(self.layer, k.transpose(1, 2), v.transpose(1, 2))
        if self.remembers and cache.memory is not None and self.memory is not None:
            cache.memory.put(self.layer, cache.length, plain_k.transpose(1, 2), v.transpose(1, 2))
            if cache.memory.length:
                past_k, past_v = cache.memory.read(self.layer)
                grouping = self.memory.grouping
                y = memory_attention(q.transpose(1, 2), held_k, held_v, past_k, past_v, grouping=grouping)
                return y.transpose(1, 2)
        if causal:  # the cache was empty: the new tokens are all there is
            return causal_attention(q, k, v, self.window)
        if self.window is not None and mask is None:  # one token, which sees the last keys
            held_k, held_v = held_k[:, :, -self.window :], held_v[:, :, -self.window :]
        return self._masked(q, held_k, held_v, mask)

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [B, T, H, D], k and v [B, G, S, D] -> [B, T, H, D]; mask None: all keys are seen."""
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=self.grouped)
        return y.transpose(1, 2)


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
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool, cache: KVCache | None,
        documents: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, causal, cache, documents)
        return x + self.mlp(self.post_attention_layernorm(x))


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
