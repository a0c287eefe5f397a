"""The commands on a Falcon: train it, generate with the adapter, plan its memory."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast

from jindo_core.architectures import build, read_config
from jindo_core.cli.main import main
from jindo_core.config import TrainConfig
from jindo_core.lora import attach_lora
from jindo_core.memory import job_of, sizes_of, usual_targets
from jindo_core.plan import SHAPES, plan

LAYOUTS = {
    "7b": {"multi_query": True},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "tie_word_embeddings": False},
}
ANIMALS = ("cat", "dog", "bird", "fish")
ROWS = [
    {"instruction": f"Name the animal {i}.", "input": "", "output": f"It is a little {ANIMALS[i % 4]}."}
    for i in range(40)
]


@pytest.fixture(scope="module", params=LAYOUTS)
def base(request, tmp_path_factory):
    """A random Falcon with a byte-level tokenizer, as transformers saves them."""
    path = tmp_path_factory.mktemp(request.param)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([json.dumps(row) for row in ROWS], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(path)
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=400, hidden_size=96, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=0, **LAYOUTS[request.param],
    )  # fmt: skip
    FalconForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def train(base, rows, out, *more):
    given = ["--base_model", base, "--data_path", rows, "--output_dir", out, "--batch_size", 4, "--cutoff_len", 64]
    given += ["--micro_batch_size", 4, "--num_epochs", 4, "--learning_rate", 3e-2, "--val_set_size", 4]
    given += ["--device", "cpu", "--prompt_template_name", "alpaca_short", "--dtype", "fp32", "--no_train_on_inputs"]
    return main(["train", *map(str, [*given, *more])])


def test_train_and_generate(base, rows, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(base, rows, out) == 0
    said = capsys.readouterr().out
    assert "this model has no q_proj, v_proj: query_key_value is adapted" in said
    assert "Memory plan" in said
    results = json.loads((out / "jindo_run.json").read_text())
    assert results["settings"]["lora_target_modules"] == ["query_key_value"]
    losses = results["results"]
    assert losses["held_out_loss_after"] < losses["held_out_loss_before"] - 0.5
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert targets == [f"transformer.h.{i}.self_attention.query_key_value" for i in range(2)]
    theirs = peft.PeftModel.from_pretrained(FalconForCausalLM.from_pretrained(base), out)
    ids = torch.arange(20)[None]
    with theirs.disable_adapter():
        plain = theirs(ids).logits
    assert (theirs(ids).logits - plain).abs().max() > 0.01, "the adapter does something in peft"

    assert main(["generate", "--lora_weights", str(out), "--instruction", "Name the animal 2.", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip()


def test_named_targets_stay_or_are_refused(base, rows, tmp_path, capsys):
    assert train(base, rows, tmp_path / "a", "--lora_target_modules", "[q_proj,v_proj]", "--max_steps", 1) == 2
    said = capsys.readouterr().err
    assert "error: lora_target_modules [q_proj, v_proj] match no linear layer; this model has [dense, dense_4h" in said
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()
    more = ["--lora_target_modules", "dense,dense_4h_to_h", "--max_steps", 1, "--gradient_checkpointing"]
    assert train(base, rows, tmp_path / "b", *more, "--offload_layers", 1) == 0
    assert "this model has no" not in capsys.readouterr().out
    targets = json.loads((tmp_path / "b" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 4


def test_plan(base, capsys):
    assert main(["plan", "--base_model", str(base), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["settings"]["targets"] == ["query_key_value"]
    assert main(["plan", "--base_model", str(base), "--lora_target_modules", "q_proj"]) == 2
    assert "expected some of query_key_value, dense, dense_h_to_4h, dense_4h_to_h" in capsys.readouterr().err


def test_plan_of_the_published_models(capsys):
    given = ["plan", "--lora_target_modules", "all-linear", "--cutoff_len", "512", "--micro_batch_size", "1"]
    assert main([*given, "--shape", "falcon-7b", "--max_memory_MB", "5400", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["with_changes"]["peak_bytes"] <= 5.4e9
    assert main([*given, "--shape", "falcon-40b", "--json"]) == 0
    assert 20e9 < json.loads(capsys.readouterr().out)["weights"] < 21e9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_counts_every_weight_once(layout):
    raw = FalconConfig(vocab_size=400, hidden_size=96, num_hidden_layers=2, num_attention_heads=6, **LAYOUTS[layout])
    config = read_config(raw.to_dict())
    sizes = sizes_of(config)
    given = usual_targets(TrainConfig(quantize="none"), False, sizes)
    rows = plan(job_of(given, sizes, length=32, itemsize=4, context=0)).rows
    model = attach_lora(build(config), r=given.lora_r, target_modules=given.lora_target_modules)
    assert rows["adapters"] == sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(4 * p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen == sum(rows[name] for name in ("weights", "embedding", "head", "norms"))


def test_the_published_sizes_are_right():
    seven = {"model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32}
    assert sizes_of(read_config(seven | {"num_attention_heads": 71})) == SHAPES["falcon-7b"]
    forty = seven | {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8}
    assert sizes_of(read_config(forty | {"new_decoder_architecture": True})) == SHAPES["falcon-40b"]
