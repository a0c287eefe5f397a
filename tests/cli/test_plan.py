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
