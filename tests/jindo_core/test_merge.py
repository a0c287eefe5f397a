"""An adapter added to its base: exact numbers, peft's result, and the drift that is printed."""

from __future__ import annotations

import json
import math
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers import LlamaForCausalLM as TheirLlama

from jindo_core.adapters import load_adapter, read_adapter, save_adapter
from jindo_core.convert import open_source, run_export, run_merge
from jindo_core.convert_config import ExportConfig, MergeConfig
from jindo_core.data.examples import Example
from jindo_core.drift import TRAINED, measure_drift
from jindo_core.errors import InputError
from jindo_core.loader import load_model
from jindo_core.lora import adapted_layers, attach_lora
from jindo_core.merge import MergedCheckpoint
from jindo_core.nf4 import quantize_nf4

IDS = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    TheirLlama(LlamaConfig(**sizes, **more)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def train(base, folder, targets="all-linear", *, rslora=False, std=0.05):
    """An adapter that is not trivial, as training leaves it."""
    model = load_model(base, quantize=None, dtype="fp32", device="cpu")
    torch.manual_seed(2)
    attach_lora(model, r=4, alpha=12, target_modules=targets)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=std)
    save_adapter(model, folder, base_model=str(base))
    if rslora:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    return folder


def merge(adapter, target, onto, **options):
    values = {"eval_rows": 0, "device": "cpu", "lora_weights": str(adapter), "output_dir": str(target), "onto": onto}
    return run_merge(MergeConfig(**values | options))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("onto", ["original", "nf4"])
def test_w_plus_s_b_a_rounded_once(base, tmp_path, onto, rslora):
    adapter = train(base, tmp_path / "a", ["q_proj", "model.layers.1.mlp.down_proj"], rslora=rslora)
    merged = load_file(merge(adapter, tmp_path / "m", onto) / "model.safetensors")
    original, parts = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    scale = 12 / (math.sqrt(4) if rslora else 4)
    assert merged.keys() == original.keys()
    adapted = set()
    for name, weight in original.items():
        linear = ".self_attn." in name or ".mlp." in name
        expected = quantize_nf4(weight).dequantize(torch.float32) if onto == "nf4" and linear else weight.float()
        a, b = (parts.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
        if a is not None:
            adapted.add(name)
            expected = expected + (b @ a) * scale
            exact = (expected.double() - merged[name].double()).abs()
            # Nothing but the one rounding to bf16's 8 bits.
            assert bool((exact <= expected.double().abs() * 2.0**-8).all())
        assert torch.equal(merged[name], expected.bfloat16())
        assert merged[name].dtype == torch.bfloat16
    assert len(adapted) == 3


def test_as_peft_merges(stories260k, tmp_path):
    """Onto fp32 weights, where rounding hides nothing."""
    adapter = train(stories260k, tmp_path / "a", rslora=True)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32), adapter
    ).merge_and_unload()
    ours = load_file(merge(adapter, tmp_path / "m", "original") / "model.safetensors")
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs.state_dict()[name], atol=1e-6, rtol=1e-6)


def test_a_real_adapter_is_merged(assets, smollm2_gguf):
    """Tensor by tensor, with no model in memory: the sums are peft's file's own."""
    folder = assets / "adapters" / "smollm-135m-medical-r16-qv"
    source = open_source(str(smollm2_gguf))
    adapter = read_adapter(folder, source.linears)
    assert len(adapter.pairs) == 60
    merged = MergedCheckpoint(source.checkpoint, adapter, "original", source.linears)
    name = "model.layers.7.self_attn.v_proj"
    a, b = (load_file(folder / "adapter_model.safetensors")[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    expected = source.checkpoint.read(f"{name}.weight") + 2.0 * (b.float() @ a.float())
    assert torch.equal(merged.read(f"{name}.weight"), expected)
    assert torch.equal(merged.read("model.norm.weight"), source.checkpoint.read("model.norm.weight"))


def test_export_merges_on_the_way(base, tmp_path):
    adapter = train(base, tmp_path / "a")
    merged = merge(adapter, tmp_path / "m", "nf4")
    values = {"lora_weights": str(adapter), "onto": "nf4", "format": "meta", "device": "cpu"}
    exported = run_export(ExportConfig(output_dir=str(tmp_path / "meta"), **values))
    logits = [load_model(path, quantize=None, dtype="fp32", device="cpu")(IDS).logits for path in (merged, exported)]
    assert torch.equal(*logits)


def test_nf4_files_have_no_original(base, tmp_path):
    from jindo_core.convert import run_quantize
    from jindo_core.convert_config import QuantizeConfig

    adapter = train(base, tmp_path / "a")
    quantized = run_quantize(QuantizeConfig(base_model=str(base), output_dir=str(tmp_path / "q"), device="cpu"))
    with pytest.raises(InputError, match="--onto original: the base model's files hold NF4"):
        merge(adapter, tmp_path / "m", "original", base_model=str(quantized))
    ours = load_file(merge(adapter, tmp_path / "m", "nf4", base_model=str(quantized)) / "model.safetensors")
    expected = load_file(merge(adapter, tmp_path / "direct", "nf4") / "model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def train_with_peft(base, folder):
    """All linears in rslora, with a head and an embedding of the adapter's own, as peft saves it."""
    torch.manual_seed(4)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear",
        modules_to_save=["lm_head", "embed_tokens"],
    )  # fmt: skip
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                value.add_(torch.randn_like(value) * 0.02)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("onto", ["original", "nf4"])
def test_a_head_and_an_embedding_that_the_adapter_brings(base, tmp_path, onto):
    theirs = train_with_peft(base, tmp_path / "a")
    merged = load_file(merge(tmp_path / "a", tmp_path / "m", onto, base_model=str(base)) / "model.safetensors")
    whole = theirs.merge_and_unload().state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(merged[name], whole[name].bfloat16())
        assert not torch.equal(merged[name], load_file(base / "model.safetensors")[name])
    if onto == "original":
        for name, value in merged.items():
            torch.testing.assert_close(value.float(), whole[name], atol=1e-6, rtol=2.0**-8)


def test_a_head_of_its_own_has_no_place_where_it_is_the_embedding(stories260k, tmp_path):
    train_with_peft(stories260k, tmp_path / "a")
    for onto in ("original", "nf4"):
        with pytest.raises(InputError, match=r"brings its own lm_head and .*, but the base model's head"):
            merge(tmp_path / "a", tmp_path / "m", onto, base_model=str(stories260k))
    assert not (tmp_path / "m").exists()


def test_drift_goes_through_the_adapters_own_head(base, tmp_path):
    """Against models that are loaded whole, in fp32."""
    train_with_peft(base, tmp_path / "a")
    source = open_source(str(base))
    shape = source.checkpoint.shapes["lm_head.weight"]
    adapter = read_adapter(tmp_path / "a", source.linears, {"lm_head": shape, "model.embed_tokens": shape})
    both = {name: MergedCheckpoint(source.checkpoint, adapter, name, source.linears) for name in ("original", "nf4")}
    trained = MergedCheckpoint(source.checkpoint, None, "nf4", source.linears)
    rows = [Example(row.tolist(), row.tolist()) for row in IDS]
    found = {row.model: row for row in measure_drift(both, trained, adapter, rows, 0, torch.device("cpu"))}
    models = {TRAINED: load_adapter(load_model(base, dtype="fp32", device="cpu"), tmp_path / "a")}
    for onto in both:
        target = merge(tmp_path / "a", tmp_path / onto, onto, base_model=str(base))
        models[onto] = load_model(target, quantize=None, dtype="fp32", device="cpu")
    with torch.no_grad():
        reference = models[TRAINED](IDS).logits[:, :-1]
        for name, model in models.items():
            logits = model(IDS).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()).item()
            assert found[name].loss == pytest.approx(loss, rel=1e-5)
            largest = (logits - reference).abs().max().item()
            assert found[name].largest == pytest.approx(largest, rel=1e-2, abs=1e-5)
    assert found["nf4"].largest > 1e-4, "the head is rounded to the base's bf16"


# --- drift ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(stories260k, tmp_path_factory):
    return train(stories260k, tmp_path_factory.mktemp("stories"), std=0.02)


def numbers(said):
    """{model: [loss, KL, largest]} of the printed table."""
    lines = [line.strip("│ ") for line in said.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line.split("│")] for line in lines]
    return {row[0]: [float(cell) for cell in row[1:] if cell] for row in rows}


TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog."


def test_drift_is_that_of_whole_models(stories, stories260k, tmp_path, capsys):
    """The table, made a layer at a time, against models that are loaded whole."""
    (tmp_path / "text.txt").write_text(TEXT)
    target = merge(stories, tmp_path / "m", "original", eval_rows=4, eval_text=str(tmp_path / "text.txt"))
    found = numbers(capsys.readouterr().out)
    from jindo_core.tokenizer import load_tokenizer

    ids = torch.tensor([load_tokenizer(stories260k).encode(TEXT)])
    trained = load_adapter(load_model(stories260k, dtype="fp32", device="cpu"), stories)
    onto_nf4 = merge(stories, tmp_path / "n", "nf4")
    models = {
        "adapter on NF4, as trained": trained,
        "merged onto the original": load_model(target, quantize=None, dtype="fp32", device="cpu"),
        "merged onto NF4": load_model(onto_nf4, quantize=None, dtype="fp32", device="cpu"),
    }
    assert found.keys() == models.keys()
    with torch.no_grad():
        reference = trained(ids).logits[0, :-1]
        for name, model in models.items():
            logits = model(ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
            assert found[name][0] == pytest.approx(loss, abs=2e-4)
            if name == "adapter on NF4, as trained":
                continue
            p, q = reference.log_softmax(-1), logits.log_softmax(-1)
            divergence = (p.exp() * (p - q)).sum(-1).mean().item()
            assert found[name][1] == pytest.approx(divergence, rel=2e-2, abs=1e-7)
            assert found[name][2] == pytest.approx((logits - reference).abs().max().item(), rel=2e-2, abs=1e-4)
    # An adapter of all linears on fp32 weights: merging onto NF4 is what was trained, onto the original is not.
    assert found["merged onto NF4"][1] < 1e-6 < 1e-3 < found["merged onto the original"][1]


def test_the_rows_that_training_held_out(stories, stories260k, tmp_path, capsys):
    adapter = tmp_path / "run"
    shutil.copytree(stories, adapter)
    rows = [{"instruction": f"Tell {i}", "output": f"It was number {i} in the park."} for i in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    settings = {"data_path": str(tmp_path / "data.json"), "val_set_size": 3, "seed": 1, "double_quant": False}
    record = {"base_model": str(stories260k), "prompt_template_name": "alpaca_short", "settings": settings}
    (adapter / "jindo_run.json").write_text(json.dumps(record | {"results": {}}))
    merge(adapter, tmp_path / "m", "nf4", eval_rows=32)
    said = capsys.readouterr().out
    assert "On 3 rows held out of data.json" in said
    # double_quant as in training: the merged weights are those of a single quantization
    found = load_file(tmp_path / "m" / "model.safetensors")
    norm = "model.layers.0.self_attn.q_proj.weight"
    source = open_source(str(stories260k))
    weight = quantize_nf4(source.checkpoint.read(norm), double_quant=False).dequantize(torch.float32)
    delta = read_adapter(adapter, source.linears).delta(norm.removesuffix(".weight"))
    assert torch.equal(found[norm], weight + delta)
    (tmp_path / "data.json").unlink()
    with pytest.raises(InputError, match=r"data.json does not exist.*; or give --eval_text FILE, or --eval_rows 0"):
        merge(adapter, tmp_path / "n", "nf4", eval_rows=32)
    assert not (tmp_path / "n").exists()


def test_text_that_can_not_be_measured(stories, tmp_path):
    def refused(content, message):
        (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            merge(stories, tmp_path / "m", "nf4", eval_rows=2, eval_text=str(tmp_path / "t.txt"))
        assert not (tmp_path / "m").exists()

    refused(b"", "holds no text")
    refused(b"ab\xff", "a byte at offset 2 that is no UTF-8")
    with pytest.raises(InputError, match="No such file"):
        merge(stories, tmp_path / "m", "nf4", eval_rows=2, eval_text=str(tmp_path / "nowhere.txt"))


def test_adapters_for_other_models(stories, assets, base, tmp_path):
    with pytest.raises(InputError, match="the adapter is for another model"):
        merge(stories, tmp_path / "m", "original", base_model=str(base))
    with pytest.raises(InputError, match="fits no linear layer"):
        merge(assets / "adapters" / "gpt2-r8-fan_in_fan_out", tmp_path / "m", "original", base_model=str(base))
    with pytest.raises(InputError, match="is no folder"):
        merge(tmp_path / "nowhere", tmp_path / "m", "original")
    assert not list(tmp_path.iterdir())
