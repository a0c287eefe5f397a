"""peft on NF4 layers: its plain layer, the fused one, merging, files both ways, gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.layer import Linear
from torch import nn

import jindo_core as jc
from jindo_core.integrations import JindoNF4Config, NF4LoraLinear, register_fused_lora
from jindo_core.nf4 import NF4Linear, quantize_nf4

TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(fused=False, **more):
    made = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | more)
    return register_fused_lora(made) if fused else made


def adapted(model, given, name="default", seed=1):
    """With B drawn at random, so that the adapter does something."""
    torch.manual_seed(seed)
    if isinstance(model, PeftModel):
        model.add_adapter(name, given)
    else:
        model = get_peft_model(model, given, adapter_name=name)
    for path, parameter in model.named_parameters():
        if f".lora_B.{name}" in path:
            nn.init.normal_(parameter, std=0.05)
    return model


def dequantized(model):
    """The same values in ordinary layers."""
    for path, layer in [(p, m) for p, m in model.named_modules() if isinstance(m, NF4Linear)]:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.data = layer.nf4.dequantize()
        if layer.bias is not None:
            plain.bias.data = layer.bias.detach().clone()
        model.set_submodule(path, plain)
    return model


def gradients(model, ids):
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.float().log_softmax(-1)[..., 5].mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


VARIANTS = {
    "targets": {},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture
def nf4(saved, load):
    return load(saved("llama"), JindoNF4Config())


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_are_peft_s_on_the_dequantized_model(saved, load, nf4, ids, variant, fused):
    wanted = adapted(dequantized(load(saved("llama"), JindoNF4Config())), config(**VARIANTS[variant]))
    model = adapted(nf4, config(fused, **VARIANTS[variant]))
    kinds = {type(m) for m in model.modules() if isinstance(m, Linear)}
    assert kinds == {NF4LoraLinear if fused else Linear}
    logits, grads = gradients(model, ids)
    their_logits, their_grads = gradients(wanted, ids)
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)
    assert grads.keys() == their_grads.keys()
    assert len(grads) == {"all-linear": 28, "modules_to_save": 13}.get(variant, 12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, their_grads[name], rtol=1e-4, atol=1e-7)


def test_dropout_is_the_engine_s(nf4, ids):
    """The layer draws the mask that LoraLinear draws, in training only."""
    model = adapted(nf4, config(True, lora_dropout=0.5)).train()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    twin = jc.LoraLinear(layer.base_layer, 4, 8, 0.5)
    twin.lora_A, twin.lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(20, 192)
    torch.manual_seed(5)
    got = layer(x)
    torch.manual_seed(5)
    assert torch.equal(got, twin(x))
    assert not torch.equal(got, layer(x))
    assert torch.equal(layer.eval()(x), twin.eval()(x))


def test_several_adapters_and_none(nf4, saved, load, ids):
    """What the fused operator does not do runs as peft's own layer."""
    plain = load(saved("llama"), JindoNF4Config())
    base = plain(ids).logits
    both = []
    for model, fused in ((nf4, True), (plain, False)):
        model = adapted(adapted(model, config(fused)), config(fused, r=2), "second", seed=2).eval()
        model.base_model.set_adapter(["default", "second"])
        both.append(model(input_ids=ids).logits)
        mixed = model(input_ids=ids, adapter_names=["second", "__base__"]).logits
        torch.testing.assert_close(mixed[1], base[1])
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, base)
    torch.testing.assert_close(*both)


def test_merging_is_a_quantization_of_the_sum_and_unmerging_is_exact(nf4, ids):
    model = adapted(nf4, config(True)).eval()
    apart = model(input_ids=ids).logits
    layers = [m for m in model.modules() if isinstance(m, NF4LoraLinear)]
    before = [{k: v.clone() for k, v in layer.base_layer.state_dict().items()} for layer in layers]
    sums = [layer.base_layer.nf4.dequantize() + layer.get_delta_weight("default") for layer in layers]
    model.merge_adapter()
    for layer, total in zip(layers, sums, strict=True):
        assert torch.equal(layer.base_layer.nf4.dequantize(), quantize_nf4(total).dequantize())
        assert layer.merged
    drift = (model(input_ids=ids).logits - apart).norm() / apart.norm()
    assert 0 < drift < 0.1
    model.unmerge_adapter()
    for layer, state in zip(layers, before, strict=True):
        after = layer.base_layer.state_dict()
        assert all(torch.equal(after[key], state[key]) for key in state)
    assert torch.equal(model(input_ids=ids).logits, apart)


def test_adapters_are_merged_from_the_original(nf4):
    """One after another gives the same as both at once: the rounding happens once."""
    model = adapted(adapted(nf4, config(True)), config(True, r=2), "second", seed=2)
    layer = next(m for m in model.modules() if isinstance(m, NF4LoraLinear))
    layer.merge(adapter_names=["default", "second"])
    together = layer.base_layer.nf4.dequantize()
    layer.unmerge()
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    assert torch.equal(layer.base_layer.nf4.dequantize(), together)
    assert layer.merged_adapters == ["default", "second"]


def test_merge_and_unload_leaves_a_quantized_model(nf4, ids, tmp_path, load):
    model = adapted(nf4, config(True)).merge_and_unload()
    assert len([m for m in model.modules() if isinstance(m, NF4Linear)]) == 14
    assert not [m for m in model.modules() if isinstance(m, Linear)]
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)


def test_an_adapter_that_is_not_finite_is_not_merged(nf4):
    model = adapted(nf4, config(True))
    layer = next(m for m in model.modules() if isinstance(m, NF4LoraLinear))
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    state = {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
    with pytest.raises(ValueError, match="default makes weights that are not finite: nothing was merged"):
        layer.merge()
    assert all(torch.equal(value, state[key]) for key, value in layer.base_layer.state_dict().items())


def test_peft_s_own_layer_refuses_to_merge(nf4):
    """Bytes are not weights: it must not go through unseen."""
    model = adapted(nf4, config())
    state = {k: v.clone() for k, v in nf4.state_dict().items()}
    with pytest.raises(RuntimeError, match="size of tensor"):
        model.merge_adapter()
    assert all(torch.equal(value, state[key]) for key, value in nf4.state_dict().items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"use_dora": True}, "use_dora changes LoRA's arithmetic"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' reads the base's weight"),
        ({"lora_bias": True}, "lora_bias is not supported"),
    ],
)
def test_variants_are_refused(nf4, given, said):
    with pytest.raises(jc.InputError, match=said):
        get_peft_model(nf4, config(True, **given))
    with pytest.raises(jc.InputError, match="got a NF4Linear, expected peft's LoraConfig"):
        register_fused_lora(nf4.model.layers[0].mlp.up_proj)


# --- files, and preparing for training ------------------------------------------------------------------


def test_adapters_travel_both_ways(saved, load, ids, tmp_path):
    """peft on transformers' model -> load_adapter on the engine's, and back."""
    model = adapted(load(saved("llama"), JindoNF4Config()), config(True, use_rslora=True)).eval()
    model.save_pretrained(tmp_path / "peft")
    engine = jc.load_adapter(jc.load_model(saved("llama"), dtype="fp32", device="cpu"), tmp_path / "peft")
    wanted = model(input_ids=ids).logits
    torch.testing.assert_close(engine(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    jc.save_adapter(engine, tmp_path / "ours")
    for fused in (False, True):
        given = LoraConfig.from_pretrained(tmp_path / "ours")
        more = {"config": register_fused_lora(given)} if fused else {}
        back = PeftModel.from_pretrained(load(saved("llama"), JindoNF4Config()), tmp_path / "ours", **more)
        assert any(isinstance(m, NF4LoraLinear) for m in back.modules()) == fused
        torch.testing.assert_close(back(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_preparing_for_kbit_training_leaves_the_weights(saved, load, ids, dtype):
    model = load(saved("llama", dtype), JindoNF4Config(), dtype=dtype)
    before = {k: v.clone() for k, v in model.state_dict().items() if ".weight." in k or "proj.weight" in k}
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert model.model.norm.weight.dtype == torch.float32
    after = model.state_dict()
    assert before
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value)
    logits, grads = gradients(adapted(model, config(True)).train(), ids)
    assert logits.isfinite().all()
    assert len(grads) == 12
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())
