"""`jindo-core quantize`, `merge` and `export`: one line for what is wrong, exit codes, and a run of each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from jindo_core.adapters import save_adapter
from jindo_core.cli.main import main
from jindo_core.loader import load_model
from jindo_core.lora import adapted_layers, attach_lora


@pytest.fixture
def adapter(stories260k, tmp_path):
    model = load_model(stories260k, dtype="fp32", device="cpu")
    attach_lora(model, r=2, alpha=4)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return save_adapter(model, tmp_path / "adapter", base_model=str(stories260k))


def fails(capsys, argv, message):
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said


def test_a_run_of_each(stories260k, adapter, tmp_path, capsys):
    base = ["--base_model", str(stories260k), "--device", "cpu"]
    assert main(["quantize", *base, "--output_dir", str(tmp_path / "q"), "--format", "bitsandbytes"]) == 0
    assert main(["export", *base, "--format", "gguf", "--output-file", str(tmp_path / "m.gguf"), "--dtype=q8_0"]) == 0
    merge = ["merge", "--lora_weights", str(adapter), "--output_dir", str(tmp_path / "m"), "--onto", "original"]
    assert main([*merge, "--eval_rows", "2"]) == 0
    said = capsys.readouterr().out
    for part in ("read back and compared", "adapter on NF4, as trained", "merged onto NF4", "KL from the first"):
        assert part in said
    assert "On 2 rows (perhaps trained on: its run held none out) of the bundled Korean instructions" in said
    assert "\x1b" not in said  # no bar, no colours without a terminal
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"
    fails(capsys, merge, "is there already: give another name, or --overwrite to replace it")
    assert main([*merge, "--overwrite", "--eval_rows=0"]) == 0


def test_a_config_file_serves(stories260k, tmp_path):
    (tmp_path / "c.yaml").write_text(f"base_model: {stories260k}\nformat: meta\noutput_dir: {tmp_path / 'out'}\n")
    assert main(["export", "--config", str(tmp_path / "c.yaml")]) == 0
    assert (tmp_path / "out" / "params.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quantize"], "--output_dir: got nothing, expected folder to write"),
        (["quantize", "--output_dir", "x", "--base_model", "nowhere"], "base model nowhere does not exist"),
        (["quantize", "--output_dir", "x", "--format", "gguf"], "--format: got 'gguf', expected jindo or bitsandbytes"),
        (["quantize", "--output_dir", "x", "--max_shard_size", "big"], "expected a size such as 4GB or 400MB"),
        (["quantize", "--output_dir", "x", "--max_shard_size", "0"], "expected a size such as 4GB or 400MB"),
        (["quantize", "--output_dir", "x", "--device", "tpu"], "--device: got 'tpu'"),
        (["quantize", "--force"], "Did you mean '--overwrite'?"),
        (["merge", "--output_dir", "x", "--onto", "nf4"], "--lora_weights: got nothing"),
        (["merge", "--lora_weights", "a", "--output_dir", "x"], "--onto: got nothing, expected original or nf4 ("),
        (["merge", "--lora_weights", "a", "--output_dir", "x", "--onto", "nf4"], "lora_weights a is no folder"),
        (["merge", "--adapter", "a"], "Did you mean '--lora_weights'?"),
        (["export", "--output_dir", "x"], "--format: got nothing, expected one of safetensors, meta, gguf"),
        (["export", "--format", "gguf", "--output_dir", "x"], "--output_file: got nothing"),
        (["export", "--format", "meta", "--output_file", "x"], "--output_dir: got nothing"),
        (["export", "--format", "gguf", "--output_file", "x"], "expected a name that ends in .gguf"),
        (
            ["export", "--format", "gguf", "--output_file", "x.gguf", "--output_dir", "y"],
            "--output_dir: got y, expected --output_file with --format gguf",
        ),
        (["export", "--format", "meta", "--output_dir", "x", "--dtype", "q8_0"], "--dtype: got q8_0, expected f16"),
        (["export", "--format", "meta", "--output_dir", "x", "--lora_weights", "a"], "--onto: got nothing"),
        (["export", "--format", "meta", "--output_dir", "x", "--onto", "nf4"], "together with --lora_weights only"),
        (["export", "--outfile", "x"], "Did you mean '--output_file'?"),
    ],
)
def test_wrong_input_is_one_line(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    fails(capsys, argv, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["quantize", "merge", "export"])
def test_help_needs_no_torch(command):
    code = (
        "import sys; from jindo_core.cli.main import main; code = main([sys.argv[1], '--help']); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 False\n")
    for flag in ("--base_model", "--overwrite", "examples:"):
        assert flag in done.stdout


@pytest.fixture
def falcon(stories260k, tmp_path):
    """A random Falcon of the 7B's layout, with stories260K's tokenizer and an adapter."""
    folder, sizes = tmp_path / "falcon", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    FalconForCausalLM(FalconConfig(vocab_size=512, **sizes)).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(stories260k / name, folder / name)
    model = load_model(folder, dtype="fp32", device="cpu")
    attach_lora(model, r=2, alpha=4, target_modules="all-linear")
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return folder, save_adapter(model, tmp_path / "adapter", base_model=str(folder))


def test_a_falcon_and_what_has_no_place_for_it(falcon, tmp_path, capsys):
    base, adapter = falcon
    place = ["--output_dir", str(tmp_path / "m")]
    assert main(["merge", "--lora_weights", str(adapter), *place, "--onto=original", "--eval_rows=2"]) == 0
    said = capsys.readouterr().out
    for part in ("read back and compared", "adapter on NF4, as trained", "merged onto the original", "merged onto NF4"):
        assert part in said
    quantize = ["quantize", "--base_model", str(tmp_path / "m"), "--output_dir", str(tmp_path / "q")]
    assert main(quantize) == 0
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "jindo_nf4"
    assert config["multi_query"] is True
    fails(capsys, [*quantize, "--overwrite", "--format=bitsandbytes"], "bitsandbytes finds no linear layer")
    export = ["export", "--base_model", str(base), "--format"]
    fails(capsys, [*export, "meta", "--output_dir", str(tmp_path / "x")], "which Meta's format has no place for")
    fails(capsys, [*export, "gguf", "--output_file", str(tmp_path / "x.gguf")], "which GGUF has no place for")
