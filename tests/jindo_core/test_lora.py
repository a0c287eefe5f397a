"""LoraLinear and attach_lora, against peft on the same numbers."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from torch import nn

from jindo_core.errors import InputError
from jindo_core.loader import load_model
from jindo_core.lora import LoraLinear, adapted_layers, attach_lora
from jindo_core.nf4 import NF4Linear


@pytest.fixture
def model(stories260k):
    return load_model(stories260k, dtype="fp32", device="cpu")


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_forward_and_gradients_equal_peft(quantized, use_rslora):
    torch.manual_seed(0)
    base = nn.Linear(72, 40)
    quantizing = NF4Linear.from_linear(base)
    plain = nn.Linear(72, 40)
    plain.load_state_dict({"weight": quantizing.nf4.dequantize() if quantized else base.weight, "bias": base.bias})
    theirs = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(plain)),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"], use_rslora=use_rslora),
    )
    ours = LoraLinear(quantizing if quantized else plain, 4, 12, use_rslora=use_rslora)
    for name, mine in (("lora_A", ours.lora_A), ("lora_B", ours.lora_B)):
        their = getattr(theirs.base_model.model[0], name)["default"].weight
        with torch.no_grad():
            mine.copy_(torch.randn_like(mine))
            their.copy_(mine)
    x = torch.randn(2, 5, 72, requires_grad=True)
    their_x = x.detach().clone().requires_grad_()
    y, expected = ours(x), theirs(their_x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    layer = theirs.base_model.model[0]
    torch.testing.assert_close(x.grad, their_x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.lora_A.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.lora_B.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-3)


def test_starts_as_the_base_and_as_the_paper_says():
    base = NF4Linear.from_linear(nn.Linear(512, 128))
    layer = LoraLinear(base, 8, 16)
    x = torch.randn(3, 512)
    assert torch.equal(layer(x), base(x))
    assert not layer.lora_B.any()
    bound = 1 / math.sqrt(512)  # Kaiming-uniform with a = sqrt(5)
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound


@pytest.mark.parametrize("quantized", [False, True])
def test_dropout_is_for_training_and_unbiased(quantized):
    torch.manual_seed(0)
    base = nn.Linear(64, 16)
    layer = LoraLinear(NF4Linear.from_linear(base) if quantized else base, 4, 4, dropout=0.5)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(1, 64)
    layer.eval()
    exact = layer(x)
    assert torch.equal(layer(x), exact)
    layer.train()
    draws = torch.stack([layer(x) for _ in range(3000)])
    assert not torch.equal(draws[0], draws[1])
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 5 * standard_error + 1e-5).all()


def test_checkpointing_redraws_the_same_dropout(model):
    attach_lora(model, r=4, alpha=8, dropout=0.3, target_modules="all-linear").train()
    ids = torch.randint(0, 512, (2, 16))
    gradients = []
    for checkpointing in (False, True):
        model.model.gradient_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(1)
        for _, layer in adapted_layers(model):
            with torch.no_grad():
                layer.lora_B.fill_(0.01)
        model(ids, labels=ids).loss.backward()
        gradients.append([layer.lora_A.grad.clone() for _, layer in adapted_layers(model)])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize(("targets", "count"), [
    (["q_proj", "v_proj"], 10),
    ("q_proj", 5),
    ("all-linear", 35),
    (["all-linear"], 35),
    (["self_attn.o_proj"], 5),
    (["model.layers.3.mlp.up_proj"], 1),
])  # fmt: skip
def test_targets(model, targets, count):
    attach_lora(model, target_modules=targets)
    layers = dict(adapted_layers(model))
    assert len(layers) == count
    assert not any("lm_head" in path for path in layers)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * count
    assert all(name.endswith(("lora_A", "lora_B")) for name in trainable)


def test_targets_that_match_nothing_or_in_part(model):
    with pytest.raises(InputError, match=r"\[query\] match no linear layer; this model has \[down_proj, gate_proj"):
        attach_lora(model, target_modules=["query"])
    assert not list(adapted_layers(model))
    with pytest.warns(UserWarning, match=r"\[Wqkv\] match nothing and are left out"):
        attach_lora(model, target_modules=["q_proj", "Wqkv"])
    assert len(list(adapted_layers(model))) == 5
    with pytest.raises(InputError, match="has an adapter already"):
        attach_lora(model)


def test_the_base_is_frozen_and_a_bias_keeps_the_dtype():
    base = nn.Linear(8, 8)
    LoraLinear(base, 2, 4)
    assert not base.weight.requires_grad
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    quantized = NF4Linear.from_linear(base)
    assert quantized(x).dtype == torch.bfloat16
    assert LoraLinear(quantized, 2, 4)(x).dtype == torch.bfloat16


def test_the_head_takes_no_adapter(model):
    with pytest.raises(InputError, match=r"\[lm_head\] match no linear layer"):
        attach_lora(model, target_modules=["lm_head"])


def test_what_is_refused_changes_nothing(model):
    embedding = model.stack.embedding.requires_grad_(True)
    with pytest.raises(InputError, match=r"lora_dropout is 1\.5"):
        attach_lora(model, dropout=1.5)
    assert not list(adapted_layers(model))
    assert embedding.weight.requires_grad


def test_impossible_numbers_are_refused():
    base = nn.Linear(4, 4)
    with pytest.raises(InputError, match="lora_r is 0"):
        LoraLinear(base, 0, 16)
    with pytest.raises(InputError, match=r"lora_dropout is 1\.0"):
        LoraLinear(base, 4, 16, dropout=1.0)
