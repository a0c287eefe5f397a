"""The LLaMA family's name table and row orders."""

from __future__ import annotations

import pytest
import torch

from jindo_core.formats.names import (
    LAYER_MODULES,
    OTHER_MODULES,
    qk_to_halves,
    qk_to_pairs,
    rename,
    rows_to_halves,
    rows_to_pairs,
)
from jindo_core.model import LlamaConfig, LlamaForCausalLM


def test_published_names():
    """As they stand in files of llama.cpp, Meta and Hugging Face."""
    assert rename("layers.31.feed_forward.w2.weight", "meta", "huggingface") == "model.layers.31.mlp.down_proj.weight"
    assert rename("layers.0.feed_forward.w1.weight", "meta", "gguf") == "blk.0.ffn_gate.weight"
    assert rename("tok_embeddings.weight", "meta", "huggingface") == "model.embed_tokens.weight"
    assert rename("output.weight", "gguf", "huggingface") == "lm_head.weight"
    assert rename("blk.12.attn_output.weight", "gguf", "huggingface") == "model.layers.12.self_attn.o_proj.weight"
    assert rename("model.layers.3.self_attn.q_proj.bias", "huggingface", "gguf") == "blk.3.attn_q.bias"


@pytest.mark.parametrize("name", ["rope.freqs", "blk.x.attn_q.weight", "blk.1.attn_qq.weight", "blk1.attn_q.bias", ""])
def test_unknown_names_are_told(name):
    assert rename(name, "gguf", "huggingface") is None


def test_every_parameter_of_the_model_has_a_name_everywhere():
    config = LlamaConfig(32, 16, 32, 2, 4, 2, 4, attention_bias=True)
    with torch.device("meta"):
        names = [name for name, _ in LlamaForCausalLM(config).named_parameters()]
    assert len(names) == 3 + 2 * 13
    for other in ("gguf", "meta"):
        there = [rename(name, "huggingface", other) for name in names]
        assert len(set(there)) == len(names)
        assert [rename(name, other, "huggingface") for name in there] == names
    assert len(LAYER_MODULES) == 9
    assert len(OTHER_MODULES) == 3


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_row_orders_are_inverse(shape):
    """Two heads of 12: pairs (0, 1), (2, 3), … become rows 0 and 6, 1 and 7, … of a head."""
    value = torch.arange(24).view(24, *(1 for _ in shape[1:])).expand(shape)
    halves = rows_to_halves(value, 2)
    first = halves[:, 0] if len(shape) > 1 else halves
    assert first[:12].tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    assert torch.equal(rows_to_pairs(halves, 2), value)


def test_only_q_and_k_are_put_in_order_each_by_its_own_heads():
    value = torch.arange(24 * 5).view(24, 5)
    for part, heads in (("q", 6), ("k", 2)):
        for leaf in ("weight", "bias"):
            name = f"model.layers.3.self_attn.{part}_proj.{leaf}"
            given = value if leaf == "weight" else value[:, 0]
            there = qk_to_pairs(name, given, 6, 2)
            assert torch.equal(there, rows_to_pairs(given, heads))
            assert torch.equal(qk_to_halves(name, there, 6, 2), given)
    for name in ("model.layers.3.self_attn.v_proj.weight", "model.layers.3.mlp.up_proj.weight", "lm_head.weight"):
        assert qk_to_pairs(name, value, 6, 2) is value
        assert qk_to_halves(name, value, 6, 2) is value
