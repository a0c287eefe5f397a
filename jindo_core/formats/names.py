"""The LLaMA family's tensors in three formats: their names, and the row order of q and k.

One table, for readers and writers. A tensor is a module's name with .weight or .bias after it; within a layer, its
number comes first. Mistral's and Qwen2's names are the same ones.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from torch import Tensor

Format = Literal["huggingface", "gguf", "meta"]


class _Names(NamedTuple):
    huggingface: str
    gguf: str
    meta: str


LAYER_PREFIX = _Names("model.layers.", "blk.", "layers.")
LAYER_MODULES = (
    _Names("input_layernorm", "attn_norm", "attention_norm"),
    _Names("self_attn.q_proj", "attn_q", "attention.wq"),
    _Names("self_attn.k_proj", "attn_k", "attention.wk"),
    _Names("self_attn.v_proj", "attn_v", "attention.wv"),
    _Names("self_attn.o_proj", "attn_output", "attention.wo"),
    _Names("post_attention_layernorm", "ffn_norm", "ffn_norm"),
    _Names("mlp.gate_proj", "ffn_gate", "feed_forward.w1"),
    _Names("mlp.up_proj", "ffn_up", "feed_forward.w3"),
    _Names("mlp.down_proj", "ffn_down", "feed_forward.w2"),
)
OTHER_MODULES = (
    _Names("model.embed_tokens", "token_embd", "tok_embeddings"),
    _Names("model.norm", "output_norm", "norm"),
    _Names("lm_head", "output", "output"),
)


def rename(name: str, source: Format, target: Format) -> str | None:
    """A tensor's name in another format; None where the table has no such tensor.

    >>> rename("layers.3.attention.wq.weight", "meta", "huggingface")
    'model.layers.3.self_attn.q_proj.weight'
    """
    module, dot, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    numbered = re.fullmatch(re.escape(getattr(LAYER_PREFIX, source)) + r"(\d+)\.(.+)", module)
    table, rest = (LAYER_MODULES, numbered[2]) if numbered else (OTHER_MODULES, module)
    found = next((row for row in table if getattr(row, source) == rest), None)
    if found is None:
        return None
    prefix = f"{getattr(LAYER_PREFIX, target)}{numbered[1]}." if numbered else ""
    return f"{prefix}{getattr(found, target)}{dot}{leaf}"


def rows_to_halves(value: Tensor, heads: int) -> Tensor:
    """q or k (weight [heads * D, C] or bias [heads * D]) from Meta's and llama.cpp's row order to Hugging Face's.

    They rotate the pairs (2i, 2i + 1) of a head, Hugging Face (i, i + D/2); each stores rows in its own order.
    """
    pairs = value.view(heads, -1, 2, *value.shape[1:])
    return pairs.transpose(1, 2).reshape(value.shape)


def rows_to_pairs(value: Tensor, heads: int) -> Tensor:
    """The inverse of `rows_to_halves`."""
    halves = value.view(heads, 2, -1, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def qk_to_halves(name: str, value: Tensor, heads: int, groups: int) -> Tensor:
    """A tensor under its name in Hugging Face's layout: q's and k's rows by `rows_to_halves`, all others as they are.

    Args:
        heads: query heads. groups: key/value heads.
    """
    count = _heads_of(name, heads, groups)
    return value if count is None else rows_to_halves(value, count)


def qk_to_pairs(name: str, value: Tensor, heads: int, groups: int) -> Tensor:
    """The inverse of `qk_to_halves`."""
    count = _heads_of(name, heads, groups)
    return value if count is None else rows_to_pairs(value, count)


def _heads_of(name: str, heads: int, groups: int) -> int | None:
    """So many heads lie in the rows of q or k; None: it is another tensor."""
    return heads if ".q_proj." in name else groups if ".k_proj." in name else None
