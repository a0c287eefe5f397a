"""quantize, merge, export and drift of every family, against transformers, bitsandbytes and peft."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    GgufConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from jindo_core.adapters import load_adapter, read_adapter, save_adapter
from jindo_core.convert import open_source, run_export, run_merge, run_quantize
from jindo_core.convert_config import ExportConfig, MergeConfig, QuantizeConfig
from jindo_core.data.examples import IGNORE, Example, collate
from jindo_core.drift import TRAINED, measure_drift
from jindo_core.errors import InputError
from jindo_core.formats import open_checkpoint
from jindo_core.integrations import JindoNF4Config
from jindo_core.loader import load_model
from jindo_core.lora import adapted_layers, attach_lora
from jindo_core.merge import MergedCheckpoint
from jindo_core.nf4 import NF4Linear

CPU = torch.device("cpu")
VOCABULARY, WINDOW = 512, 7
IDS = torch.randint(3, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))
BASE = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = BASE | {"intermediate_size": 160, "num_key_value_heads": 2, "max_position_embeddings": 128}
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False, "bias": True}
CASES = {
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "falcon-7b": FalconConfig(**BASE, multi_query=True, max_position_embeddings=128),
    "falcon-40b": FalconConfig(**BASE, **GROUPED, max_position_embeddings=128),
    "longllama": LlamaConfig(**SIZES),
}
MEMORY = {"model_type": "longllama", "mem_layers": [1], "last_context_length": 8, "mem_dtype": "float32"}
FALCONS = ["falcon-7b", "falcon-40b"]
IN_TRANSFORMERS = [name for name in CASES if name != "longllama"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(name, dtype) -> the folder of a random model of that case, as transformers saves it."""
    made = {}

    def one(name, dtype=torch.float32):
        if (name, dtype) in made:
            return made[name, dtype]
        folder = made[name, dtype] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CASES[name], dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
        model.save_pretrained(folder)
        if name == "longllama":
            raw = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(raw | MEMORY | {"auto_map": {"AutoConfig": "code.Config"}}))
            (folder / "code.py").write_text("# the model's own\n")
        return folder

    return one


def quantize(base, target, **options):
    return run_quantize(QuantizeConfig(base_model=str(base), output_dir=str(target), device="cpu", **options))


def export(base, format, target, **options):
    place = {"output_file" if format == "gguf" else "output_dir": str(target)}
    return run_export(ExportConfig(base_model=str(base), format=format, device="cpu", **place, **options))


def load(path, quantize=None):
    return load_model(path, quantize=quantize, dtype="fp32", device="cpu")


def logits(path, ids=IDS, **options):
    with torch.no_grad():
        return load(path, **options)(ids).logits


def equal_states(ours, theirs):
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def settings(**more):
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, **more,
    )  # fmt: skip


# --- quantize -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_transformers_loads_it_as_bitsandbytes_would_have_made_it(saved, tmp_path, name):
    base = saved(name, torch.bfloat16)
    folder = quantize(base, tmp_path / "q", format="bitsandbytes")
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings(), device_map="cpu")
    ours = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert sum(isinstance(module, Linear4bit) for module in ours.modules()) == 14
    equal_states(ours, theirs)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("name", CASES)
def test_our_format_loads_as_the_model_itself_does(saved, tmp_path, name):
    base = saved(name)
    folder = quantize(base, tmp_path / "q", max_shard_size="40KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(logits(folder, quantize="nf4"), logits(base, quantize="nf4"))
    config, original = (json.loads((path / "config.json").read_text()) for path in (folder, base))
    carried = original.keys() - {"dtype"}
    assert {key: config[key] for key in carried} == {key: original[key] for key in carried}
    assert (folder / "code.py").is_file() == (name == "longllama")


@pytest.mark.parametrize("name", FALCONS)
def test_a_falcon_is_read_by_our_integration(saved, tmp_path, name):
    """bitsandbytes would leave it whole, and can't be given it in 4 bits."""
    base = saved(name, torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings(), device_map="cpu")
    assert not any(isinstance(module, Linear4bit) for module in theirs.modules())
    with pytest.raises(InputError, match=r"is a 'falcon', of which bitsandbytes finds no linear layer.*--format jindo"):
        quantize(base, tmp_path / "q", format="bitsandbytes")
    assert not list(tmp_path.iterdir())
    folder = quantize(base, tmp_path / "q")
    ours = AutoModelForCausalLM.from_pretrained(folder)
    directly = AutoModelForCausalLM.from_pretrained(base, quantization_config=JindoNF4Config())
    assert sum(isinstance(module, NF4Linear) for module in ours.modules()) == 8
    equal_states(ours, directly)
    assert torch.equal(ours(IDS).logits, directly(IDS).logits)
    # What transformers saves of it has the same method, and is read by us.
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again", quantize="nf4"), logits(folder, quantize="nf4"))


def test_layers_that_a_checkpoint_left_whole_stay_whole(saved, tmp_path):
    """transformers is told of them: else it reads 16-bit values as NF4."""
    skip = ["lm_head", "model.layers.0.mlp.up_proj"]
    theirs = AutoModelForCausalLM.from_pretrained(
        saved("qwen2", torch.bfloat16), quantization_config=settings(llm_int8_skip_modules=skip), device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    folder = quantize(tmp_path / "theirs", tmp_path / "q", format="bitsandbytes")
    ours = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    equal_states(ours, theirs)
    assert type(ours.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


# --- merge and drift ----------------------------------------------------------------------------------------


def train(base, folder, std=0.05):
    """An adapter of all linears that is not trivial, as training leaves it."""
    model = load(base)
    torch.manual_seed(2)
    attach_lora(model, r=4, alpha=12, target_modules="all-linear")
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=std)
    return save_adapter(model, folder, base_model=str(base))


def merge(adapter, target, onto):
    values = {"eval_rows": 0, "device": "cpu", "lora_weights": str(adapter), "output_dir": str(target), "onto": onto}
    return run_merge(MergeConfig(**values))


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_merged_as_peft_merges(saved, tmp_path, name):
    base = saved(name)
    adapter = train(base, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).merge_and_unload()
    folder = merge(adapter, tmp_path / "m", "original")
    ours, before = (load_file(path / "model.safetensors") for path in (folder, base))
    state = theirs.state_dict()
    for key, value in ours.items():
        torch.testing.assert_close(value, state[key], atol=1e-6, rtol=1e-6)
    changed = {key for key, value in ours.items() if not torch.equal(value, before[key])}
    assert len(changed) == (8 if name in FALCONS else 14)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, atol=2e-4, rtol=0)


def drifts(base, adapter, examples, others):
    """{model: (loss, KL, largest)} as `merge` measures it, and of models that are loaded whole."""
    source = open_source(str(base))
    parts = read_adapter(adapter, source.linears)
    onto = {
        name: MergedCheckpoint(source.checkpoint, parts, name, source.linears)
        for name in ("original", "nf4")
        if name in others
    }
    trained = MergedCheckpoint(source.checkpoint, None, "nf4", source.linears)
    rows = measure_drift(onto, trained, parts, examples, 0, CPU)
    found = {row.model: (row.loss, row.divergence, row.largest) for row in rows}

    models = {TRAINED: load_adapter(load(base, "nf4"), adapter), **{name: load(path) for name, path in others.items()}}
    batch = collate(examples, 0)  # padded: that decides where a LongLLaMA's windows begin
    ids, labels = batch["input_ids"], batch["labels"][:, 1:]
    with torch.no_grad():
        kept = {name: model(ids).logits[:, :-1][labels != IGNORE] for name, model in models.items()}
    expected, reference = {}, kept[TRAINED]
    for name, values in kept.items():
        p, q = reference.log_softmax(-1), values.log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1).mean().item()
        loss = F.cross_entropy(values, labels[labels != IGNORE]).item()
        expected[name] = (loss, divergence, (values - reference).abs().max().item())
    return found, expected


def rows_of(ids):
    return [Example(row, [IGNORE] * 4 + row[4:]) for row in ids.tolist()]


@pytest.mark.parametrize("name", CASES)
def test_drift_is_that_of_whole_models(saved, tmp_path, name):
    base = saved(name)
    adapter = train(base, tmp_path / "a", std=0.02)
    others = {onto: merge(adapter, tmp_path / onto, onto) for onto in ("original", "nf4")}
    found, expected = drifts(base, adapter, rows_of(IDS), others)
    assert found.keys() == expected.keys() == {TRAINED, "original", "nf4"}
    for key, (loss, divergence, largest) in expected.items():
        assert found[key][0] == pytest.approx(loss, abs=1e-4)
        assert found[key][1] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
        assert found[key][2] == pytest.approx(largest, rel=1e-3, abs=1e-3)
    # All linears are adapted, weights are fp32: onto NF4 is what was trained, onto the original is not.
    assert found["nf4"][1] < 1e-5 < 1e-3 < found["original"][1]


def test_drift_where_the_base_left_a_layer_whole(saved, tmp_path):
    """What was trained had it whole too."""
    skip = ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    theirs = AutoModelForCausalLM.from_pretrained(
        saved("qwen2"), quantization_config=settings(llm_int8_skip_modules=skip), device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "base")
    adapter = train(tmp_path / "base", tmp_path / "a", std=0.02)
    others = {"nf4": merge(adapter, tmp_path / "m", "nf4")}
    found, expected = drifts(tmp_path / "base", adapter, rows_of(IDS), others)
    assert found[TRAINED][0] == pytest.approx(expected[TRAINED][0], abs=1e-4)
    assert found["nf4"][1] < 1e-5


# --- export ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_safetensors_in_another_dtype(saved, tmp_path, name):
    base = saved(name)
    folder = export(base, "safetensors", tmp_path / "s", dtype="bf16", max_shard_size="50KB")
    original, checkpoint = load_file(base / "model.safetensors"), open_checkpoint(folder)
    assert len(checkpoint.files) > 1
    assert checkpoint.shapes.keys() == original.keys()
    assert all(torch.equal(checkpoint.read(key), value.bfloat16()) for key, value in original.items())
    assert checkpoint.config == open_checkpoint(base).config
    if name in IN_TRANSFORMERS:
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
        torch.testing.assert_close(theirs, logits(folder), atol=2e-4, rtol=0)


def test_a_first_falcon_keeps_its_own_config(saved, tmp_path):
    """The 40B's first release: its names of numbers, its model_type, its code."""
    base = tmp_path / "base"
    shutil.copytree(saved("falcon-40b"), base)
    raw = {
        "model_type": "RefinedWeb", "vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4,
        "n_head_kv": 2, "bias": True, "alibi": False, "architectures": ["RWForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_RW.RWConfig"}, "tie_word_embeddings": False,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(raw))
    (base / "configuration_RW.py").write_text("# its own\n")
    folder = quantize(base, tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in raw} == raw
    assert (folder / "configuration_RW.py").read_text() == "# its own\n"
    assert torch.equal(logits(folder, quantize="nf4"), logits(saved("falcon-40b"), quantize="nf4"))


@pytest.mark.parametrize("name", [*FALCONS, "longllama"])
@pytest.mark.parametrize("format", ["meta", "gguf"])
def test_what_a_format_has_no_place_for(saved, tmp_path, name, format):
    what = "a 'longllama' with memory layers" if name == "longllama" else "a 'falcon'"
    told = "GGUF" if format == "gguf" else "Meta's format"
    with pytest.raises(InputError, match=f"the model is {what}, which {told} has no place for: give --format safet"):
        export(saved(name), format, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mistral", "qwen2", "llama with biases"])
def test_gguf_and_back(saved, stories260k, tmp_path, name, capsys):
    base = tmp_path / "base"
    shutil.copytree(saved(name), base)
    for file in stories260k.glob("token*"):
        shutil.copyfile(file, base / file.name)
    file = export(base, "gguf", tmp_path / "m.gguf", dtype="f32")
    assert ("llama.cpp sees all tokens, this model the last 7" in capsys.readouterr().out) == (name == "mistral")
    assert torch.equal(logits(file), logits(base))
    if name != "llama with biases":  # which transformers leaves out
        theirs = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        ids = IDS[:, :WINDOW]  # transformers, too, takes a Mistral's file for a LLaMA's, without a window
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, logits(base, ids), atol=2e-4, rtol=0)
    back = export(file, "safetensors", tmp_path / "back")
    assert torch.equal(logits(back), logits(base))
    again = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    assert again.config.model_type == CASES[name].model_type
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, logits(base), atol=2e-4, rtol=0)
