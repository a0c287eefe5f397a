"""Adapters in PEFT's format, both ways, and the ones that must be refused."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jindo_core import adapters
from jindo_core.adapters import load_adapter, save_adapter
from jindo_core.errors import InputError
from jindo_core.loader import load_model
from jindo_core.lora import adapted_layers, attach_lora


def trained(path, targets="all-linear", seed=0):
    """A model whose adapter is not trivial."""
    model = load_model(path, quantize=None, dtype="fp32", device="cpu")
    torch.manual_seed(seed)
    attach_lora(model, r=4, alpha=12, dropout=0.1, target_modules=targets)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["model.layers.2.mlp.up_proj"]])
def test_peft_loads_ours_and_gives_our_logits(stories260k, tmp_path, targets):
    model = trained(stories260k, targets)
    save_adapter(model, tmp_path, base_model="stories")
    base = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.randint(0, 512, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)
        with theirs.disable_adapter():
            assert (theirs(ids).logits - model(ids).logits).abs().max() > 0.1  # the adapter does something


def test_a_real_adapter_gives_pefts_logits(assets, smollm2_gguf):
    folder = assets / "adapters" / "smollm-135m-medical-r16-qv"
    model = load_model(smollm2_gguf, quantize=None, dtype="fp32", device="cpu")
    ids = torch.randint(0, 49152, (1, 24), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        plain = model(ids).logits
        load_adapter(model, folder)
        got = model(ids).logits
        expected = theirs(ids).logits
        # fp32 sums in another order, through 30 layers.
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (got - plain).abs().max() > 0.1
    assert len(list(adapted_layers(model))) == 60


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_round_trip(stories260k, tmp_path, quantize):
    model = trained(stories260k)
    save_adapter(model, tmp_path)
    back = load_adapter(load_model(stories260k, quantize=quantize, dtype="fp32", device="cpu"), tmp_path)
    for (path, mine), (other, theirs) in zip(adapted_layers(model), adapted_layers(back), strict=True):
        assert path == other
        assert torch.equal(mine.lora_A, theirs.lora_A)
        assert torch.equal(mine.lora_B, theirs.lora_B)
        assert (mine.scale, mine.dropout) == (theirs.scale, theirs.dropout)
    assert not back.training


def test_rslora_keeps_its_factor(stories260k, tmp_path):
    model = load_model(stories260k, quantize=None, dtype="fp32", device="cpu")
    attach_lora(model, r=4, alpha=16, use_rslora=True)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories260k), tmp_path)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_reads_the_older_bin(stories260k, tmp_path):
    model = trained(stories260k)
    save_adapter(model, tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    back = load_adapter(load_model(stories260k, quantize=None, dtype="fp32", device="cpu"), tmp_path)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits, back(ids).logits)


def test_what_learnt_nothing_is_not_saved(stories260k, tmp_path):
    model = load_model(stories260k, dtype="fp32", device="cpu")
    with pytest.raises(InputError, match="no adapter to save"):
        save_adapter(model, tmp_path / "a")
    attach_lora(model)
    with pytest.raises(InputError, match="B matrices are all zero"):
        save_adapter(model, tmp_path / "a")
    model = trained(stories260k)
    next(adapted_layers(model))[1].lora_A.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_disk_that_lies_is_found(stories260k, tmp_path, monkeypatch):
    model = trained(stories260k)
    original = adapters.read_adapter_weights

    def flip(folder):
        state = original(folder)
        next(iter(state.values()))[0, 0] += 1
        return state

    monkeypatch.setattr(adapters, "read_adapter_weights", flip)
    with pytest.raises(InputError, match="differs from the one in memory"):
        save_adapter(model, tmp_path)


def test_an_adapter_of_another_architecture_is_refused(assets, stories260k):
    model = load_model(stories260k, dtype="fp32", device="cpu")
    with pytest.raises(InputError, match=r"\S+ fits no linear layer: the adapter is for another model"):
        load_adapter(model, assets / "adapters" / "gpt2-r8-fan_in_fan_out")
    with pytest.raises(InputError, match=r"expected \[r, 64\]|fits no linear layer"):
        load_adapter(model, assets / "adapters" / "smollm-135m-medical-r16-qv")
    assert not list(adapted_layers(model))


def test_broken_adapters_are_refused(stories260k, tmp_path):
    good = tmp_path / "good"
    save_adapter(trained(stories260k), good)
    state = load_file(good / "adapter_model.safetensors")
    config = json.loads((good / "adapter_config.json").read_text())
    model = load_model(stories260k, dtype="fp32", device="cpu")
    first = sorted(state)[0]

    def refused(message, tensors=None, settings=None):
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        if tensors is not None:
            save_file(tensors, folder / "adapter_model.safetensors")
        if settings is not None:
            (folder / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(InputError, match=message) as caught:
            load_adapter(model, folder)
        assert "\n" not in str(caught.value)
        assert not list(adapted_layers(model))

    refused("has lora_B only", {k: v for k, v in state.items() if k != first})
    refused("fits no linear layer", state | {"base_model.model.lm_tail.lora_A.weight": torch.ones(4, 64)})
    refused("fits no linear layer", state | {"unknown": torch.ones(1)})
    refused("expected .r, 172", state | {first: torch.ones(4, 63)})
    refused("not finite", state | {first: torch.full_like(state[first], float("inf"))})
    refused("the adapter is empty", {})
    for change in ({"fan_in_fan_out": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}):
        refused("is not supported", None, config | change)
    refused("bias = 'all'", None, config | {"bias": "all"})
    refused("lora_alpha = 'x', expected a number", None, config | {"lora_alpha": "x"})
    head = {f"base_model.model.lm_head.lora_{h}.weight": torch.ones(s) for h, s in (("A", (4, 64)), ("B", (512, 4)))}
    refused("fits no linear layer", state | head)
    refused("peft_type 'IA3'", None, config | {"peft_type": "IA3"})
    (good / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes()[:-7])
    refused("truncated or corrupt")
    (good / "adapter_model.safetensors").unlink()
    torch.save({first: torch.zeros(1).expand(1 << 20, 64)}, good / "adapter_model.bin")
    refused("needs more bytes than its storage")
    torch.save({first: print}, good / "adapter_model.bin")
    refused("needs more than weights")
    (good / "adapter_model.bin").unlink()
    refused("holds no adapter_model.safetensors")
    with pytest.raises(InputError, match="is no folder"):
        load_adapter(model, tmp_path / "nowhere")
