"""transformers' models in NF4: which layers, saved and read back, and bitsandbytes' configuration taken over."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from jindo_core import InputError
from jindo_core.integrations import JindoNF4Config, JindoNF4Quantizer, use_for_bitsandbytes
from jindo_core.integrations import transformers as ours
from jindo_core.nf4 import STATE_KEY, NF4Linear, quantize_nf4

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
BLOOM = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
LAYERS = {
    "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "falcon": BLOOM, "gpt_neox": BLOOM,
    "gpt2": {"c_attn", "c_proj", "c_fc"},
}  # fmt: skip


def theirs(**more):
    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(**given | more)


def quantized(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, NF4Linear)}


@pytest.fixture
def takeover():
    restore = use_for_bitsandbytes()
    yield
    restore()


@pytest.mark.parametrize("name", LAYERS)
def test_an_architecture_is_quantized_saved_and_read_back(saved, load, ids, tmp_path, name):
    whole, model = load(saved(name)), load(saved(name), JindoNF4Config())
    layers = quantized(model)
    assert {path.rpartition(".")[2] for path in layers} == LAYERS[name]
    assert not [p for p, m in model.named_modules() if type(m).__name__ in ("FalconLinear", "Conv1D")]
    for path, layer in layers.items():
        source = whole.get_submodule(path)
        weight = source.weight.t() if isinstance(source, Conv1D) else source.weight
        assert torch.equal(layer.nf4.dequantize(), quantize_nf4(weight).dequantize()), path
        with torch.no_grad():
            values = layer.nf4.dequantize()
            source.weight.copy_(values.t() if isinstance(source, Conv1D) else values)
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)
    if whole.config.tie_word_embeddings:
        assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    state, back = model.state_dict(), again.state_dict()
    assert state.keys() == back.keys()
    assert all(torch.equal(state[key], back[key]) for key in state)
    assert quantized(again).keys() == layers.keys()
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ("llama", "mistral", "qwen2", "gpt_neox", "gpt2")]
    + [(name, torch.bfloat16) for name in ("llama", "gpt_neox")],
)
def test_bitsandbytes_code_gives_the_same_numbers(saved, load, ids, tmp_path, name, dtype):
    """The same configuration before and after: logits, what is saved, and bitsandbytes' own checkpoint loaded."""
    before = load(saved(name, dtype), theirs(), dtype=dtype).train()
    restore = use_for_bitsandbytes()
    after = load(saved(name, dtype), theirs(), dtype=dtype).train()
    before.save_pretrained(tmp_path / "theirs")
    after.save_pretrained(tmp_path / "ours")
    loaded = load(tmp_path / "theirs").train()
    restore()
    assert len(quantized(after)) == len(quantized(loaded)) > 0
    a, b = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key].view(-1), b[key].view(-1)) for key in a)
    for model in (before, after, loaded):  # without gradients bitsandbytes takes another, inexact way on some CPUs
        model.enable_input_require_grads()
    wanted, got = before(ids).logits, after(ids).logits
    assert torch.equal(got, loaded(ids).logits)
    if dtype == torch.float32 and name in ("gpt_neox", "gpt2"):  # every layer has a bias, which they add in the product
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    else:
        assert torch.equal(got, wanted)


def test_double_quantization_and_skipped_modules_are_taken_over(saved, load, takeover):
    config = theirs(bnb_4bit_use_double_quant=False, llm_int8_skip_modules=["lm_head", "down_proj"])
    layers = quantized(load(saved("llama"), config))
    assert {path.rpartition(".")[2] for path in layers} == LLAMA - {"down_proj"}
    assert all(layer.absmax.dtype == torch.float32 for layer in layers.values())
    assert all(layer.compute_dtype == torch.float32 for layer in layers.values())  # BitsAndBytesConfig's default


def test_what_bitsandbytes_left_of_falcon_stays(saved, load, ids, tmp_path):
    """bitsandbytes finds none of Falcon's linears; its checkpoint of them loads all the same."""
    before = load(saved("falcon"), theirs())
    assert not [m for m in before.modules() if type(m).__name__ == "Linear4bit"]
    before.save_pretrained(tmp_path)
    restore = use_for_bitsandbytes()
    after = load(tmp_path)
    restore()
    assert quantized(after) == {}
    assert type(after.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"
    assert torch.equal(after(ids).logits, load(saved("falcon"))(ids).logits)


def test_what_is_not_nf4_stays_with_bitsandbytes(saved, load, recwarn, takeover):
    ours._say.cache_clear()
    for _ in range(2):
        load(saved("llama"), theirs(bnb_4bit_quant_type="fp4"))
    model = load(saved("llama"), BitsAndBytesConfig(load_in_8bit=True))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    said = [str(w.message) for w in recwarn if "left to bitsandbytes" in str(w.message)]
    assert len(said) == 2
    assert said[0].startswith("bnb_4bit_quant_type 'fp4'")
    assert said[1].startswith("8-bit")


@pytest.mark.parametrize("first", [0, 1])
def test_the_takeover_is_reversible(first):
    """Of two, it is on until both have given it back, in whichever order; twice is as once."""
    before = dict(AUTO_QUANTIZER_MAPPING)
    restores = [use_for_bitsandbytes(), use_for_bitsandbytes()]
    for _ in range(2):
        restores[first]()
        assert isinstance(AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"](theirs()), JindoNF4Quantizer)
    restores[1 - first]()
    assert before == AUTO_QUANTIZER_MAPPING
    again = use_for_bitsandbytes()
    restores[first]()
    assert isinstance(AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"](theirs()), JindoNF4Quantizer)
    again()
    assert before == AUTO_QUANTIZER_MAPPING


# --- what does not fit ------------------------------------------------------------------------------------


def spoil(source, target, change):
    """A copy of a saved model with other tensors."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_weight_is_refused(saved, load, tmp_path):
    folder = spoil(saved("llama"), tmp_path / "a", lambda tensors: tensors.pop(UP))
    with pytest.raises(InputError, match=f"holds no {UP}"):
        load(folder, JindoNF4Config())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.view(-1).index_fill(0, torch.tensor([7]), torch.nan).view(t.shape),
            "has values that are not finite",
        ),
        (lambda t: t[:-1], r"has shape \(191, 64\), expected \(192, 64\)"),
    ],
)
def test_a_weight_that_can_t_be_quantized_is_named(saved, load, tmp_path, change, said):
    """Past transformers' own report, which would end in a RuntimeError without name or reason."""
    folder = spoil(saved("llama"), tmp_path / "a", lambda tensors: tensors.update({UP: change(tensors[UP])}))
    with pytest.raises(InputError, match=f"{UP} {said}"):
        load(folder, JindoNF4Config())


def changed(state, **changes):
    described = json.loads(bytes(state.tolist())) | changes
    return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


STATE = f"{UP}.{STATE_KEY}"


@pytest.mark.parametrize("bitsandbytes", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(UP), "but no weight"),
        (lambda t: t.pop(f"{UP}.absmax"), "holds no 'weight.absmax' of it"),
        (lambda t: t.pop(STATE), f"holds no 'weight.{STATE_KEY}' of it"),
        (lambda t: t[f"{UP}.nested_absmax"].fill_(torch.nan), "nested_absmax that is not finite"),
        (lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"][:-1].clone()}), "absmax has 191 values"),
        (lambda t: t.update({STATE: changed(t[STATE], nested_offset=float("inf"))}), "offset that is not finite"),
        (lambda t: t.update({STATE: changed(t[STATE], nested_offset="a")}), "nested_offset 'a', expected a number"),
        (lambda t: t.update({STATE: changed(t[STATE], dtype="load")}), "dtype 'load', expected a floating dtype"),
        (lambda t: t.update({STATE: changed(t[STATE], blocksize=0)}), "blocksize 0, expected one of"),
        (lambda t: t.update({STATE: changed(t[STATE], blocksize="64")}), "blocksize '64'"),
        (lambda t: t.update({STATE: changed(t[STATE], shape=[64, 192])}), r"shape \(64, 192\), expected \(192, 64\)"),
    ],
)
def test_a_damaged_quantized_weight_is_refused(saved, load, tmp_path, bitsandbytes, change, said):
    config = theirs() if bitsandbytes else JindoNF4Config()
    restore = use_for_bitsandbytes()
    load(saved("llama"), config).save_pretrained(tmp_path / "whole")
    folder = spoil(tmp_path / "whole", tmp_path / "a", change)
    try:
        with pytest.raises(InputError, match=rf"{UP.removesuffix('.weight')}.*{said}") as caught:
            load(folder)
    finally:
        restore()
    assert "\n" not in str(caught.value)


def test_a_quantized_weight_that_the_config_leaves_out_is_refused(saved, load, tmp_path):
    load(saved("llama"), JindoNF4Config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["up_proj", "lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"up_proj\.weight is quantized in the checkpoint, but its config says it is not"
    ):
        load(tmp_path)


def test_a_device_map_with_layers_away_is_refused(saved, load):
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(InputError, match=r"puts layers on cpu, disk .*offload_layers"):
        load(saved("llama"), JindoNF4Config(), device_map=places)


def test_a_model_without_linears_is_refused(saved, load):
    config = JindoNF4Config(modules_to_not_convert=["model", "lm_head"])
    with pytest.raises(InputError, match="LlamaForCausalLM has no linear layer"):
        load(saved("llama"), config)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"double_quantization": True}, "no 'double_quantization'.*Did you mean 'double_quant'"),
        ({"block_size": 63}, "block_size is 63, expected one of 32, 64"),
        ({"block_size": 48}, "block_size is 48, expected one of 32, 64"),
        ({"block_size": 10**9}, "block_size is 1000000000, expected one of"),
        ({"block_size": 64.0}, r"block_size is 64\.0, expected one of"),
        ({"double_quant": "no"}, "double_quant is 'no', expected True or False"),
        ({"compute_dtype": "int8"}, "compute_dtype is 'int8', expected float32, float16 or bfloat16"),
        ({"compute_dtype": "load"}, "compute_dtype is 'load', expected float32"),
        ({"compute_dtype": torch.int8}, r"compute_dtype is torch\.int8"),
        ({"compute_dtype": "float64"}, "compute_dtype is 'float64'"),
        ({"modules_to_not_convert": 5}, "modules_to_not_convert is 5, expected a list of names"),
        ({"modules_to_not_convert": ["lm_head", 5]}, "expected a list of names"),
        ({"compute_dtype": "half precision"}, "compute_dtype is 'half precision'"),
        ({"modules_to_not_convert": "lm_head"}, "expected a list of names"),
        ({"modules_to_not_convert": ["a"], "llm_int8_skip_modules": ["b"]}, "are the same: give one"),
        ({"quant_method": "awq"}, "quant_method is 'awq', expected 'jindo_nf4'"),
    ],
)
def test_a_wrong_setting_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        JindoNF4Config(**given)


# --- a loaded model -----------------------------------------------------------------------------------------


def test_settings_travel_in_config_json(saved, load, tmp_path):
    config = JindoNF4Config(
        double_quant=False, block_size=128, compute_dtype=torch.bfloat16, llm_int8_skip_modules=["o_proj", "lm_head"]
    )
    load(saved("llama"), config).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.quantization_config.to_dict() == config.to_dict()
    layer = again.model.layers[0].mlp.up_proj
    assert (layer.block_size, layer.absmax.dtype, layer.compute_dtype) == (128, torch.float32, torch.bfloat16)
    assert "model.layers.0.self_attn.o_proj" not in quantized(again)


def test_casts_and_counts(saved, load):
    whole, model = load(saved("llama")), load(saved("llama"), JindoNF4Config(double_quant=False), device_map="cpu")
    layer = model.model.layers[0].mlp.up_proj
    before = layer.nf4.dequantize(torch.float32)
    model.to(torch.float16)
    assert (layer.absmax.dtype, layer.weight.dtype) == (torch.float32, torch.uint8)
    assert torch.equal(layer.nf4.dequantize(torch.float32), before)
    assert model.is_loaded_in_4bit
    assert model.num_parameters() == whole.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == whole.num_parameters(exclude_embeddings=True)
    packed = sum(m.in_features * m.out_features for m in quantized(model).values())
    assert model.num_parameters(only_trainable=True) == whole.num_parameters() - packed


@pytest.mark.parametrize("name", ["falcon", "gpt2"])
def test_dequantize_gives_the_model_back(saved, load, ids, name):
    model = load(saved(name), JindoNF4Config())
    wanted = model(ids).logits
    plain = model.dequantize()
    assert quantized(plain) == {}
    assert [m for m in plain.modules() if isinstance(m, Conv1D)] or name != "gpt2"
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(plain(ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_dequantize_after_saving(saved, load, ids, tmp_path):
    """transformers' config then holds its dtype as a string."""
    model = load(saved("llama"), JindoNF4Config())
    wanted = model(ids).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(model.dequantize()(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    again = load(tmp_path)
    with pytest.raises(InputError, match="dtype is 'int8', expected one of bfloat16"):
        again.dequantize("int8")
    assert quantized(again)
    assert {p.dtype for p in again.dequantize("bfloat16").model.layers[0].mlp.parameters()} == {torch.bfloat16}


def test_neither_bitsandbytes_nor_accelerate_is_needed(saved):
    code = """
import sys
sys.modules["bitsandbytes"] = sys.modules["accelerate"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from jindo_core.integrations import JindoNF4Config, use_for_bitsandbytes
use_for_bitsandbytes()
for config in (JindoNF4Config(), BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
    assert model(torch.arange(9)[None]).logits.isfinite().all()
    print(model.num_parameters())
"""
    command = [sys.executable, "-c", code, str(saved("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 1


def test_it_generates(saved, load):
    model = load(saved("mistral"), JindoNF4Config())
    prompt = torch.arange(12)[None]
    cached = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False)
    assert cached.shape == (1, 17)
    assert torch.equal(cached, plain)


def test_importing_integrations_alone_is_light():
    code = "import sys, jindo_core.integrations; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
