"""`jindo-core plan`: the table, the JSON, and wrong input."""

from __future__ import annotations

import json

import pytest

from jindo_core.cli.main import main
from jindo_core.plan import SHAPES

GOAL = ["plan", "--shape", "llama-7b", "--lora_target_modules", "all-linear", "--cutoff_len", "512"]
GOAL += ["--micro_batch_size", "1", "--lora_dropout", "0"]


def test_the_goal(capsys):
    assert main([*GOAL, "--max_memory_MB", "5400"]) == 0
    said = capsys.readouterr().out
    for part in ("weights in NF4", "3,238.0", "CUDA context", "does not fit", "with these changes it fits"):
        assert part in said
    assert main([*GOAL, "--max_memory_MB", "5400", "--gradient_checkpointing"]) == 0
    assert "fits: " in capsys.readouterr().out


def test_json_has_every_row(capsys):
    assert main([*GOAL, "--gradient_checkpointing", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["weights"] == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) // 2
    assert content["fits"] is None
    assert content["peak_bytes"] == sum(content[name] for name in content["at_peak"])
    assert content["peak_bytes"] < 5.4e9


def test_a_budget_that_nothing_keeps(capsys):
    assert main([*GOAL, "--max_memory_MB", "700"]) == 1
    assert "even with all of these it does not" in capsys.readouterr().out
    assert main([*GOAL, "--max_memory_MB", "700", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert main([*GOAL, "--max_memory_MB", "5400", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["fits"] is False
    assert content["with_changes"]["fits"] is True
    assert content["with_changes"]["peak_bytes"] <= 5.4e9


def test_torch_s_optimizer_is_never_paged(capsys):
    assert main([*GOAL, "--max_memory_MB", "5400", "--optim", "adamw_torch", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["with_changes"]["settings"]["resident_states"] is None
    assert content["with_changes"]["settings"]["checkpointed_layers"] > 0


@pytest.mark.parametrize("name", [*SHAPES, "7b", "65B", "8b", "70b"])
def test_every_shape(name, capsys):
    assert main(["plan", "--shape", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_bytes"] > 5e8


def test_a_model_of_one_s_own(stories15m, capsys):
    assert main(["plan", "--base_model", str(stories15m)]) == 0
    assert "Memory plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "got neither of --base_model and --shape, expected one"),
        (["--shape", "7b", "--base_model", "x"], "got both of --base_model and --shape"),
        (["--shape", "llama2-7"], "--shape: got 'llama2-7', expected one of llama-7b"),
        (["--shape", "7b", "--lora_r", "0"], "--lora_r: got '0', expected a whole number of at least 1"),
        (["--shape", "7b", "--lora_target_modules", "q_prj"], "--lora_target_modules: got q_prj, expected some of q_"),
        (["--shape", "7b", "--max_memory_MB", "-1"], "--max_memory_MB: got '-1'"),
        (["--shape", "7b", "--micro_batch_size", "0"], "--micro_batch_size: got '0'"),
        (["--base_model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--shape", "7b", "--fsdp"], "--fsdp: got it in one process, expected several: --processes N"),
        (["--shape", "7b", "--processes", "0"], "--processes: got '0'"),
        (
            ["--shape", "7b", "--fsdp", "--processes", "2", "--offload_layers", "3"],
            "--offload_layers: got it beside --fsdp",
        ),
    ],
)
def test_wrong_input(flags, said, capsys):
    assert main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_train_s_own_command_line_and_file(stories15m, tmp_path, capsys):
    """What a step's memory does not depend on is taken and ignored."""
    config = tmp_path / "run.yaml"
    config.write_text(f"base_model: {stories15m}\ndata_path: rows.json\nlearning_rate: 1e-4\nlora_r: 16\n")
    assert main(["plan", "--config", str(config), "--offload_folder", "x", "--output_dir", "y", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["lora_r"] == 16
    assert main(["plan", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--lora_r" in said
    assert "exit codes" in said
    assert "--learning_rate" not in said
    assert "left out: SmolLM2" not in said


@pytest.mark.parametrize("budget", [5400, 4700, 1500])
def test_the_flags_it_names_give_the_plan_it_promises(budget, capsys):
    assert main([*GOAL, "--max_memory_MB", str(budget)]) == 0
    said = capsys.readouterr().out
    promised = next(line for line in said.splitlines() if "with these changes it fits" in line)
    flags = next(line for line in said.splitlines() if "by hand: " in line).split("by hand: ")[1].split()
    assert main([*GOAL, *flags, "--max_memory_MB", str(budget)]) == 0
    said = capsys.readouterr().out
    assert f"fits: {promised.split('fits: ')[1].split(' MB')[0]} of {budget:,} MB" in said


@pytest.mark.parametrize("name", ["offload_layers", "checkpointed_layers"])
def test_more_layers_than_there_are(name, capsys):
    assert main([*GOAL, f"--{name}", "33"]) == 2
    assert f"--{name}: got 33, expected at most 32, the model's layers" in capsys.readouterr().err


SHARDED = ["plan", "--shape", "llama2-70b", "--lora_target_modules", "all-linear", "--cutoff_len", "512"]
SHARDED += ["--micro_batch_size", "1", "--gradient_checkpointing", "--resident_optimizer_MB", "0", "--fsdp"]


def test_70b_in_two_shards(capsys):
    assert main([*SHARDED, "--processes", "2", "--max_memory_MB", "24000"]) == 0
    said = capsys.readouterr().out
    assert "fits: " in said
    assert "64 of them to a step of each of 2 processes" in said
    assert "layers gathered from all processes" in said
    assert main([*SHARDED, "--processes", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    codes = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672) // 2
    assert found["weights"] == codes // 2
    assert found["gathered"] == 3 * codes // 80
    assert main([*SHARDED, "--processes", "3", "--json"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert more["weights"] == pytest.approx(codes / 3, rel=1e-6)
    assert more["peak_bytes"] - found["peak_bytes"] == pytest.approx(more["weights"] - found["weights"], rel=1e-3)


def test_a_config_json_without_weights(tmp_path, capsys):
    numbers = {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    found = []
    for model in (SHARDED[1:3], ["--base_model", str(tmp_path)]):
        assert main(["plan", *model, *SHARDED[3:], "--processes", "2", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    (tmp_path / "config.json").write_text(json.dumps(numbers | {"quantization_config": {"quant_method": "gptq"}}))
    assert main(["plan", "--base_model", str(tmp_path)]) == 2
    assert "gptq" in capsys.readouterr().err


def test_a_budget_beside_shards_streams_no_layer(capsys):
    """All else gives way."""
    assert main([*SHARDED, "--processes", "2", "--cutoff_len", "4096", "--max_memory_MB", "24000"]) == 0
    said = capsys.readouterr().out
    assert "with these changes it fits" in said
    assert "--offload_checkpoints" in said
    assert "--offload_layers" not in said
    assert main([*SHARDED, "--processes", "2", "--max_memory_MB", "12000", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["with_changes"]
    assert found["settings"]["offload_layers"] == 0
    assert found["settings"]["offload_head"]
    assert not found["fits"]


def test_processes_without_shards_share_rows_alone(capsys):
    """A step's micro-batches are dealt out, and its gradients summed."""
    found = []
    for count in ("1", "4"):
        assert main([*GOAL, "--batch_size", "6", "--processes", count, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["settings"]["accumulation"] for one in found] == [6, 2]
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["gradient_bucket"] == 0
    assert found[1]["gradient_bucket"] == found[1]["adapters"]
