"""Adapters in PEFT's format, both ways, and the ones that must be refused."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, LlamaConfig
from transformers import LlamaForCausalLM as TheirLlama

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


@pytest.mark.slow
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
    for change in ({"fan_in_fan_out": True}, {"use_dora": True}, {"modules_to_save": ["norm"]}):
        refused("is not supported", None, config | change)
    refused("modules_to_save names lm_head, but there is no tensor", None, config | {"modules_to_save": ["lm_head"]})
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


# --- what would be taken silently -----------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """A random LLaMA of two layers whose head is its own, and an adapter for it: (base, folder, tensors, config)."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_base(base)
    save_adapter(trained(base), folder)
    state, config = load_file(folder / "adapter_model.safetensors"), (folder / "adapter_config.json").read_text()
    return base, folder, state, json.loads(config)


def save_base(folder, tied=False):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    TheirLlama(LlamaConfig(**sizes, **more)).save_pretrained(folder)


def refused(model, folder, message):
    """Nothing of the model changes: no adapter, and what took gradients does so still."""
    model.requires_grad_(True)
    modules = list(model.modules())
    with pytest.raises(InputError, match=message) as caught:
        load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa', which is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights = 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq'"),
        ({"init_lora_weights": None}, "init_lora_weights = None"),
        ({"init_lora_weights": ["gaussian"]}, r"init_lora_weights = \['gaussian'\]"),
        *[({name: {"x": 1}}, f"{name} = {{'x': 1}}, which is not supported") for name in (
            "arrow_config", "monteclora_config", "velora_config", "kasa_config", "lora_ga_config", "loftq_config",
            "eva_config", "corda_config", "rank_pattern", "alpha_pattern", "of_a_later_peft",
        )],
        ({"ensure_weight_tying": True}, "ensure_weight_tying = True"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan, expected a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf, expected a number"),
        ({"lora_alpha": True}, "lora_alpha = True, expected a number"),
        ({"lora_alpha": 10**400}, r"lora_alpha = 1000.*\.\.\., expected a number"),
        ({"use_rslora": "false"}, "use_rslora = 'false', expected true or false"),
        ({"lora_dropout": 1.5}, "lora_dropout = 1.5, expected 0 <= p < 1"),
        ({"r": 64}, r"has r = 64, but model\.layers\.0\.\S+ has A of rank 4"),
        ({"r": "4"}, "r = '4', expected a number"),
        ({"target_modules": 5}, "target_modules = 5, expected a list of names"),
        ({"modules_to_save": "lm_head"}, "modules_to_save = 'lm_head', expected a list of names"),
        ({"modules_to_save": ["score"]}, "modules_to_save = 'score', which is not supported: expected lm_head"),
    ],
)  # fmt: skip
def test_settings_that_change_the_arithmetic_are_refused(tiny, change, message):
    base, folder, _, config = tiny
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    refused(load_model(base, quantize=None, dtype="fp32", device="cpu"), folder, message)


def test_what_peft_writes_by_default_is_all_known(tiny):
    """A later peft's harmless key would be refused, and show here."""
    base, folder, _, config = tiny
    whole = peft.LoraConfig(task_type="CAUSAL_LM").to_dict()
    for init in (True, False, "gaussian", "orthogonal"):
        written = {"revision": "main", "init_lora_weights": init, "inference_mode": True}
        (folder / "adapter_config.json").write_text(json.dumps(whole | config | written, default=str))
        load_adapter(load_model(base, quantize=None, dtype="fp32", device="cpu"), folder)


def test_tensors_that_do_not_make_an_adapter_are_refused(tiny):
    base, folder, state, _ = tiny
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    second = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    empty = {f"{second}A.weight": torch.ones(0, 96), f"{second}B.weight": torch.ones(64, 0)}
    for message, tensors in (
        ("with r of 1 or more", state | empty),  # in the second layer: the first must not be attached then
        ("finite numbers in fp32", state | {first: torch.full((4, 64), 1e300, dtype=torch.float64)}),
        ("q_proj has lora_A twice", state | {first.removesuffix(".weight"): state[first] + 1}),
        (r"target_modules names model\.layers\.1\.\S+, which has no tensors: the adapter is incomplete",
         {name: value for name, value in state.items() if ".layers.1." not in name}),
        ("lm_head.weight is of no module in modules_to_save", state | {
            "base_model.model.lm_head.weight": torch.ones(96, 64)}),
    ):  # fmt: skip
        save_file(tensors, folder / "adapter_model.safetensors")
        refused(load_model(base, quantize=None, dtype="fp32", device="cpu"), folder, message)


def test_a_lost_layer_is_found_by_the_last_part_of_its_name_too(tiny):
    base, folder, state, config = tiny
    kept = {name: value for name, value in state.items() if ".layers.1." not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": names}))
    model = load_model(base, quantize=None, dtype="fp32", device="cpu")
    refused(model, folder, "has no tensors: the adapter is incomplete")
    # One that was for the first layer only is whole.
    only = config | {"target_modules": names, "layers_to_transform": [0]}
    (folder / "adapter_config.json").write_text(json.dumps(only))
    assert len(list(adapted_layers(load_adapter(model, folder)))) == 7


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_streamed_layers_and_head(tmp_path, tied):
    """The numbers of a model that is all on the device; it trains, and what is saved is what was loaded."""
    save_base(tmp_path / "base", tied)
    save_adapter(trained(tmp_path / "base"), tmp_path / "a")
    ids, found = torch.arange(24)[None], []
    for offload in ({}, {"offload_layers": 2, "offload_head": True, "offload_embedding": True}):
        model = load_adapter(load_model(tmp_path / "base", dtype="fp32", device="cpu", **offload), tmp_path / "a")
        adapter = [value for _, layer in adapted_layers(model) for value in (layer.lora_A, layer.lora_B)]
        assert not any(value.is_meta for value in adapter)
        with torch.no_grad():
            logits = model(ids).logits
        model(ids, labels=ids).loss.backward()
        found.append((logits, *(value.grad for value in adapter)))
        save_adapter(model, tmp_path / "b")
        assert same_tensors(tmp_path / "a", tmp_path / "b")
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def same_tensors(one, other):
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- an embedding and a head of the adapter's own (modules_to_save) ------------------------------------------


def train_with_peft(base, folder, modules):
    """rslora on all linears with a changed head, embedding or both, as peft saves it; its logits."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=True, target_modules="all-linear",
        modules_to_save=modules,
    )  # fmt: skip
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder)
    return logits_of(model)


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(60).view(2, 30)).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_modules_to_save_go_both_ways(tmp_path, tied, offloaded, modules):
    save_base(tmp_path / "base", tied)
    expected = train_with_peft(tmp_path / "base", tmp_path / "theirs", modules)
    plain = load_model(
        tmp_path / "base", quantize=None, dtype="fp32", device="cpu", offload_head=offloaded,
        offload_embedding=offloaded,
    )  # fmt: skip
    before = logits_of(plain)
    model = load_adapter(plain, tmp_path / "theirs")
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.1
    assert all(("lora_" in name) == value.requires_grad for name, value in model.named_parameters())
    save_adapter(model, tmp_path / "ours", base_model="base")
    assert same_tensors(tmp_path / "theirs", tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(back, tmp_path / "ours").eval()
    torch.testing.assert_close(logits_of(theirs), expected, rtol=1e-5, atol=1e-5)
    again = load_adapter(load_model(tmp_path / "base", quantize=None, dtype="fp32", device="cpu"), tmp_path / "ours")
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_falcons_embedding_has_another_name(tmp_path, tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
    FalconForCausalLM(FalconConfig(**sizes, tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")
    expected = train_with_peft(tmp_path / "base", tmp_path / "theirs", ["word_embeddings", "lm_head"])
    model = load_model(tmp_path / "base", quantize=None, dtype="fp32", device="cpu")
    torch.testing.assert_close(logits_of(load_adapter(model, tmp_path / "theirs")), expected, rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    assert same_tensors(tmp_path / "theirs", tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(back, tmp_path / "ours").eval()
    torch.testing.assert_close(logits_of(theirs), expected, rtol=1e-5, atol=1e-5)


def test_a_head_that_does_not_fit_is_refused(tmp_path):
    save_base(tmp_path / "base")
    folder = tmp_path / "a"
    train_with_peft(tmp_path / "base", folder, ["lm_head"])
    state, key = load_file(folder / "adapter_model.safetensors"), "base_model.model.lm_head.weight"
    for message, value, dtype in (
        (r"lm_head.weight has shape \(97, 64\), expected \(96, 64\)", torch.ones(97, 64), "fp32"),
        ("finite numbers in fp32", torch.full((96, 64), torch.nan), "fp32"),
        ("lm_head has values that do not fit torch.float16", torch.full((96, 64), 1e6), "fp16"),
        ("modules_to_save names lm_head, but there is no tensor", None, "fp32"),
    ):
        changed = {name: tensor for name, tensor in state.items() if name != key}
        save_file(changed if value is None else changed | {key: value}, folder / "adapter_model.safetensors")
        refused(load_model(tmp_path / "base", quantize=None, dtype=dtype, device="cpu"), folder, message)


def test_the_head_is_in_the_models_dtype(tmp_path):
    save_base(tmp_path / "base")
    train_with_peft(tmp_path / "base", tmp_path / "a", ["lm_head"])
    model = load_adapter(load_model(tmp_path / "base", dtype="bf16", device="cpu"), tmp_path / "a")
    value = load_file(tmp_path / "a" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(model.lm_head.weight, value.bfloat16())
    save_adapter(model, tmp_path / "b")
    kept = load_file(tmp_path / "b" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(kept, value.bfloat16())
