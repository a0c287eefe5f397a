"""LLaMA against transformers: logits, losses, gradients, every RoPE scaling, padding, caching."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM as Theirs

from jindo_core.causal_lm import KVCache
from jindo_core.errors import InputError
from jindo_core.loader import load_model
from jindo_core.model import LlamaConfig, LlamaForCausalLM

SMALL = {
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
}
SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
}


def pair(**changes):
    """The same random weights in both implementations."""
    torch.manual_seed(0)
    raw = SMALL | changes
    theirs = Theirs(TheirConfig(**{k: dict(v) if isinstance(v, dict) else v for k, v in raw.items()})).eval()
    ours = LlamaForCausalLM(LlamaConfig.from_dict(raw)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("length", [20, 50])  # within the context and beyond it
@pytest.mark.parametrize("scaling", SCALINGS)
def test_logits_with_every_rope_scaling(scaling, length):
    ours, theirs = pair(rope_scaling=SCALINGS[scaling])
    ids = torch.randint(0, 131, (2, length))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [
    {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72},
    {"num_key_value_heads": 6},
    {"num_key_value_heads": 1},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 20},
])  # fmt: skip
def test_logits_of_every_shape(changes):
    ours, theirs = pair(**changes)
    ids = torch.randint(0, 131, (2, 17))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_by_mask(side):
    ours, theirs = pair()
    ids = torch.randint(0, 131, (3, 21))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 13)):
        if padding:
            mask[row, slice(None, padding) if side == "left" else slice(-padding, None)] = 0
    real = mask.bool()
    got, expected = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=0)
    assert got.isfinite().all()
    if side == "right":  # which needs no mask at all
        torch.testing.assert_close(ours(ids).logits[real], expected[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients(checkpointing):
    ours, theirs = pair(tie_word_embeddings=True)
    ours.train()
    ours.model.gradient_checkpointing = checkpointing
    ids = torch.randint(0, 131, (2, 19))
    labels = ids.clone()
    labels[:, :5] = -100
    got, expected = ours(ids, labels=labels), theirs(ids, labels=labels)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=0)
    got.loss.backward()
    expected.loss.backward()
    for (name, mine), (_, their) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, their.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_loss_of_micro_batches_adds_up():
    ours, _ = pair()
    ids = torch.randint(0, 131, (4, 11))
    labels = ids.clone()
    labels[0, :8] = -100
    count = int((labels[:, 1:] != -100).sum())
    parts = [ours(ids[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=count).loss for i in (0, 2)]
    torch.testing.assert_close(sum(parts), ours(ids, labels=labels).loss)


def test_cache_in_pieces_equals_one_pass():
    ours, _ = pair()
    ids = torch.randint(0, 131, (2, 16))
    cache = KVCache(ours.config, 2, 16, torch.float32, torch.device("cpu"))
    pieces = [ours(part, cache=cache).logits for part in ids.split([9, 5, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), ours(ids).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="holds 16 tokens, 17 are needed"):
        ours(ids[:, :1], cache=cache)


@pytest.mark.parametrize("name", ["stories260K-hf", "stories15M-hf"])
def test_logits_of_the_story_models(assets, name):
    path = assets / "models" / name
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours = load_model(path, quantize=None, dtype="fp32", device="cpu")
    ids = torch.randint(0, ours.config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_torch_compile_takes_a_quantized_layer(stories260k):
    model = load_model(stories260k, dtype="fp32", device="cpu")
    ids = torch.randint(0, 512, (1, 12))
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model.model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
    ({"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope', expected one of"),
    ({"num_attention_heads": 7}, "7 heads and 2 key/value heads"),
    ({"hidden_size": None}, "hidden_size = None, expected a positive whole number"),
    ({"head_dim": "8"}, "head_dim = '8', expected a positive whole number"),
    ({"rope_theta": 0}, "rope_theta = 0, expected a positive number"),
    ({"rope_scaling": {"type": "linear"}}, "RoPE factor = None, expected a positive number"),
    ({"rope_scaling": [1]}, r"RoPE parameters \[1\], expected an object"),
    ({"eos_token_id": "x"}, "eos_token_id = 'x', expected a token id"),
    ({"eos_token_id": [True]}, r"eos_token_id = \[True\], expected a token id"),
    ({"rope_theta": "x"}, "rope_theta = 'x', expected a positive number"),
    ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta = 'x', expected a positive number"),
    ({"rope_parameters": {"rope_theta": -1}}, "rope_theta = -1, expected a positive number"),
    ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta = nan, expected a positive number"),
    ({"rope_parameters": {"rope_theta": 1e-300}}, "rope_theta 1e-300: expected what gives finite angles"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "RoPE factor = 0, expected a positive number"),
    ({"rope_scaling": {"type": "yarn", "factor": "a"}}, "RoPE factor = 'a', expected a positive number"),
    ({"rope_scaling": {"type": "yarn", "beta_fast": [1]}}, r"RoPE beta_fast = \[1\], expected a positive number"),
    ({"rope_scaling": {"type": "yarn", "truncate": "no"}}, "RoPE truncate = 'no', expected true or false"),
    ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0.5}}, "= 0.5, expected a positive whole"),
    ({"rope_scaling": {"type": "yarn"}, "rope_theta": 1}, "rope_theta 1 and the scaling .*expected what gives finite"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan, expected a positive number"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps = inf, expected a positive number"),
    ({"rms_norm_eps": True}, "rms_norm_eps = True, expected a positive number"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps = 1000*, expected a positive number"),
    ({"hidden_size": True}, "hidden_size = True, expected a positive whole number"),
    ({"vocab_size": 10**30}, "vocab_size = 10*, expected at most 536870912"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, expected at most 65536"),
    ({"num_key_value_heads": 2.0}, "num_key_value_heads = 2.0, expected a positive whole number"),
    ({"head_dim": 9}, "6 heads of 9: expected an even size"),
    ({"head_dim": 1 << 30}, "head_dim = 1073741824, expected at most 65536"),
    ({"hidden_size": 4}, "head_dim = 0, expected a positive whole number"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no', expected true or false"),
    ({"attention_bias": 1}, "attention_bias = 1, expected true or false"),
    ({"mlp_bias": "false"}, "mlp_bias = 'false', expected true or false"),
])  # fmt: skip
def test_a_config_that_can_not_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        LlamaConfig.from_dict(SMALL | changes)
