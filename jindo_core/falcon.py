"""Falcon 7B, 11B, 40B and 180B (Almazrouei et al. 2023, arXiv:2311.16867), under Hugging Face's module names.

A layer's attention and MLP read the same x side by side: y = x + MLP(norm(x)) + attention(norm'(x)). The two norms are
one in the 7B and 11B, two in the 40B and 180B. Queries, keys and values come from one product, group by group:
[q_1 … q_R, k, v] with R = H / G, which is multi-query attention (Shazeer 2019, arXiv:1911.02150) where G = 1.

Shape suffixes in comments: B batch, T new tokens, C hidden size, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from jindo_core.causal_lm import CausalLM, DecoderStack, KVCache
from jindo_core.config_json import MOST_LAYERS, ConfigReader
from jindo_core.errors import InputError
from jindo_core.kernels.attention import causal_attention
from jindo_core.kernels.document_attention import document_attention
from jindo_core.kernels.rope import rope
from jindo_core.long_memory import LongMemory
from jindo_core.rotary import check_angles

MODEL_TYPES = ("falcon", "RefinedWeb", "RefinedWebModel")
"""As config.json says it; the last two are the first releases' own code (40B, 7B): the same weights and names."""

# What the first releases call a number.
_OLD_NAMES = {
    "hidden_size": "n_embed",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_kv_heads": "n_head_kv",
}


@dataclass(frozen=True)
class FalconConfig:
    """The numbers of a Falcon, under config.json's names where it has one.

    Attributes:
        num_key_value_heads: G; 1 in the 7B. ffn_hidden_size: of the MLP.
        norms: 1 where attention and MLP read one norm (input_layernorm), 2 where each has its own (ln_attn, ln_mlp).
        bias: whether the linear layers have one. rope, memory: always None, these are not scaled and have none.
    """

    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    norms: int
    max_position_embeddings: int = 2048
    layer_norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    bias: bool = False
    tie_word_embeddings: bool = True
    eos_token_ids: tuple[int, ...] = ()
    rope: Mapping[str, Any] | None = None
    memory: LongMemory | None = None

    @property
    def model_type(self) -> str:
        """transformers' name for the family, whatever the first releases say."""
        return MODEL_TYPES[0]

    def window(self, layer: int) -> int | None:
        """None: every layer's queries see all keys up to their own."""
        return None

    @property
    def context(self) -> int:
        """The most tokens a sequence may have."""
        return self.max_position_embeddings

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> FalconConfig:
        """From the contents of a config.json, of transformers or of the first releases.

        Raises:
            InputError: a missing or impossible number, or a variant (ALiBi, attention before the MLP, RoPE scaling,
                dropout in the base) that is not here.
        """
        read = ConfigReader(raw, aliases=_OLD_NAMES)
        _refuse_variants(read)
        heads, groups = read.whole("num_attention_heads"), _groups(read)
        hidden = read.whole("hidden_size")
        if hidden % heads or hidden // heads % 2:
            raise InputError(f"config.json has hidden_size {hidden} and {heads} heads: expected an even size a head")
        if heads % groups:
            raise InputError(f"config.json has {heads} heads and {groups} key/value heads: they don't divide")
        norms = read.whole("num_ln_in_parallel_attn", 2 if _new_layout(read) else 1)
        if norms not in ((1, 2) if _new_layout(read) else (1,)):
            raise InputError(
                f"config.json has num_ln_in_parallel_attn = {norms}, expected 1, or 2 with new_decoder_architecture"
            )
        config = cls(
            vocab_size=read.whole("vocab_size"), hidden_size=hidden,
            ffn_hidden_size=read.whole("ffn_hidden_size", 4 * hidden),
            num_hidden_layers=read.whole("num_hidden_layers", most=MOST_LAYERS), num_attention_heads=heads,
            num_key_value_heads=groups, norms=norms,
            max_position_embeddings=read.whole("max_position_embeddings", 2048),
            layer_norm_epsilon=read.positive("layer_norm_epsilon", 1e-5), rope_theta=_rope_theta(read),
            bias=read.switch("bias", False), tie_word_embeddings=read.switch("tie_word_embeddings", True),
            eos_token_ids=read.token_ids("eos_token_id"),
        )  # fmt: skip
        check_angles(config, "config.json")
        return config


def _new_layout(read: ConfigReader) -> bool:
    """Whether it is the 40B's: keys and values in groups. The first release's own code has no switch for it."""
    return read.switch("new_decoder_architecture", read("model_type") == "RefinedWeb")


def _groups(read: ConfigReader) -> int:
    if _new_layout(read):
        return read.whole("num_kv_heads", read.whole("num_attention_heads"))
    # transformers writes num_kv_heads in the old layout, too, and does not use it.
    return 1 if read.switch("multi_query", True) else read.whole("num_attention_heads")


def _refuse_variants(read: ConfigReader) -> None:
    if read.switch("alibi", False):
        raise InputError("config.json has alibi = true (Falcon-RW): expected rotary positions, ALiBi is not supported")
    if not read.switch("parallel_attn", True):
        raise InputError("config.json has parallel_attn = false: expected attention and MLP side by side")
    if (activation := read("activation", "gelu")) != "gelu":
        raise InputError(f"config.json has activation {activation!r}, expected 'gelu'")
    for name in ("hidden_dropout", "attention_dropout"):
        if read(name, 0):
            raise InputError(f"config.json has {name} = {read(name)!r}, expected 0: the base model has no dropout here")


def _rope_theta(read: ConfigReader) -> float:
    rope = read.rope()
    kind = rope("rope_type", rope("type", "default"))
    if kind != "default":
        raise InputError(f"config.json has rope_type {kind!r}, expected 'default': Falcon's RoPE is not scaled here")
    return rope.positive("rope_theta", read.positive("rope_theta", 10000.0))


# --- layers ---------------------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016, arXiv:1607.06450), over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), queries, keys and values from one layer."""

    def __init__(self, config: FalconConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.groups = layer, config.head_dim, config.num_key_value_heads
        width = (config.num_attention_heads + 2 * self.groups) * config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.grouped = self.groups != config.num_attention_heads

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool, cache: KVCache | None,
        documents: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        parts = self.query_key_value(x).unflatten(-1, (self.groups, -1, self.head_dim))
        q, k, v = parts.split((parts.shape[3] - 2, 1, 1), dim=3)  # [B, T, G, H / G, D] and twice [B, T, G, 1, D]
        k, v = k.squeeze(3), v.squeeze(3)
        q, k = rope(q.flatten(2, 3), k, cos, sin)  # [B, T, H, D] and [B, T, G, D]
        if documents is not None:
            return self.dense(document_attention(q, k, v, documents).flatten(2))
        held_k, held_v = k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            held_k, held_v = cache.extend(self.layer, held_k, held_v)
        if causal:  # a cache was empty: the new tokens are all there is
            return self.dense(causal_attention(q, k, v).flatten(2))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), held_k, held_v, attn_mask=mask, enable_gqa=self.grouped)
        return self.dense(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The exact GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415) between two products."""

    def __init__(self, config: FalconConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=config.bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class DecoderLayer(nn.Module):
    """Attention and MLP side by side, behind one norm or one each."""

    def __init__(self, config: FalconConfig, layer: int) -> None:
        super().__init__()
        self.self_attention = Attention(config, layer)
        self.mlp = MLP(config)
        self.shared = config.norms == 1
        size, eps = config.hidden_size, config.layer_norm_epsilon
        if self.shared:
            self.input_layernorm = LayerNorm(size, eps)
        else:
            self.ln_attn, self.ln_mlp = LayerNorm(size, eps), LayerNorm(size, eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool, cache: KVCache | None,
        documents: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        # One half after the other: query_key_value and dense_h_to_4h as one operator, where the norm is one, took the
        # same time and held both halves' gradients at once.
        normed = self.input_layernorm(x) if self.shared else self.ln_attn(x)
        attended = self.self_attention(normed, cos, sin, mask, causal, cache, documents)
        return x + (self.mlp(normed if self.shared else self.ln_mlp(x)) + attended)


class FalconModel(DecoderStack):
    """Falcon's stack."""

    def __init__(self, config: FalconConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.layer_norm_epsilon)

    @property
    def embedding(self) -> nn.Embedding:
        return self.word_embeddings

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        return self.h

    @property
    def norm(self) -> LayerNorm:
        return self.ln_f


class FalconForCausalLM(CausalLM):
    """Falcon with its language-model head, called as transformers' class of the same name is."""

    LAYERS, EMBEDDING = "transformer.h", "transformer.word_embeddings"
    config: FalconConfig

    def __init__(self, config: FalconConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = FalconModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.word_embeddings.weight

    @property
    def stack(self) -> FalconModel:
        return self.transformer
