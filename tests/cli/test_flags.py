"""Flags: every spelling that is promised, and one line for what is wrong."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

from jindo_core.cli.flags import add_flags, parse_flags
from jindo_core.config import GenerateConfig, TrainConfig, resolve_train_config
from jindo_core.errors import InputError
from jindo_core.settings import settings

# alpaca-lora's README, with `python finetune.py` replaced.
SEED_SPACES = """
jindo-core train \\
    --base_model 'decapoda-research/llama-7b-hf' \\
    --data_path 'yahma/alpaca-cleaned' \\
    --output_dir './lora-alpaca' \\
    --batch_size 128 \\
    --micro_batch_size 4 \\
    --num_epochs 3 \\
    --learning_rate 1e-4 \\
    --cutoff_len 512 \\
    --val_set_size 2000 \\
    --lora_r 8 \\
    --lora_alpha 16 \\
    --lora_dropout 0.05 \\
    --lora_target_modules '[q_proj,v_proj]' \\
    --train_on_inputs \\
    --group_by_length
"""
SEED_EQUALS = """
jindo-core train \\
    --base_model='decapoda-research/llama-7b-hf' \\
    --num_epochs=10 \\
    --cutoff_len=512 \\
    --group_by_length \\
    --output_dir='./lora-alpaca' \\
    --lora_target_modules='[q_proj,k_proj,v_proj,o_proj]' \\
    --lora_r=16 \\
    --micro_batch_size=8
"""


def parse(line, config_class=TrainConfig):
    return parse_flags(config_class, shlex.split(line))


def message(argv, config_class=TrainConfig):
    with pytest.raises(InputError) as caught:
        parse_flags(config_class, argv if isinstance(argv, list) else shlex.split(argv), prog="jindo-core x")
    text = str(caught.value)
    assert "\n" not in text
    return text


def seed_argv(command):
    return shlex.split(command.replace("\\\n", " "))[2:]


# The seed's command lines ---------------------------------------------------------------------------------


def test_the_seeds_command_with_spaces():
    assert parse_flags(TrainConfig, seed_argv(SEED_SPACES)) == {
        "base_model": "decapoda-research/llama-7b-hf",
        "data_path": ("yahma/alpaca-cleaned",),
        "output_dir": "./lora-alpaca",
        "batch_size": 128,
        "micro_batch_size": 4,
        "num_epochs": 3.0,
        "learning_rate": 1e-4,
        "cutoff_len": 512,
        "val_set_size": 2000,
        "lora_r": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.05,
        "lora_target_modules": ("q_proj", "v_proj"),
        "train_on_inputs": True,
        "group_by_length": True,
    }


def test_the_seeds_command_with_equals_signs():
    given = parse_flags(TrainConfig, seed_argv(SEED_EQUALS))
    assert given == {
        "base_model": "decapoda-research/llama-7b-hf",
        "num_epochs": 10.0,
        "cutoff_len": 512,
        "group_by_length": True,
        "output_dir": "./lora-alpaca",
        "lora_target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "lora_r": 16,
        "micro_batch_size": 8,
    }
    config, _, _ = resolve_train_config(given)
    assert (config.data_path, config.batch_size, config.accumulation_steps) == (None, 128, 16)


@pytest.mark.parametrize("command", [SEED_SPACES, SEED_EQUALS])
def test_the_seeds_commands_as_windows_cmd_hands_them_on(command):
    # CMD leaves single quotes in the words; shlex in posix=False mode does the same.
    words = shlex.split(command.replace("\\\n", " "), posix=False)[2:]
    assert any("'" in word for word in words)
    assert parse_flags(TrainConfig, words) == parse_flags(TrainConfig, seed_argv(command))


# Spellings ------------------------------------------------------------------------------------------------


def test_dashes_and_underscores_are_the_same():
    assert parse("--base-model m --lora-r=4 --train-on-inputs --no-group-by-length") == {
        "base_model": "m",
        "lora_r": 4,
        "train_on_inputs": True,
        "group_by_length": False,
    }
    assert parse("--base-model a-b_c")["base_model"] == "a-b_c"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--use_rslora", True),
        ("--use_rslora True", True),
        ("--use_rslora=1", True),
        ("--use_rslora yes", True),
        ("--use_rslora False", False),
        ("--use_rslora=false", False),
        ("--use_rslora 0", False),
        ("--use-rslora no", False),
        ("--no_use_rslora", False),
        ("--no-use-rslora", False),
        ("--use_rslora=\"'True'\"", True),
    ],
)
@pytest.mark.parametrize("rest", ["", " --lora_r 4"])
def test_switches(flag, value, rest):
    assert parse(flag + rest)["use_rslora"] is value


@pytest.mark.parametrize(
    "value",
    [
        "'[q_proj,v_proj]'",
        "[q_proj,v_proj]",
        "[q_proj, v_proj]",
        '["q_proj","v_proj"]',
        '\'["q_proj", "v_proj"]\'',
        "q_proj,v_proj",
        "q_proj v_proj",
        "q_proj, v_proj",
        '"\'[q_proj," "v_proj]\'"',
    ],
)
@pytest.mark.parametrize("joint", [" ", "="])
@pytest.mark.parametrize("rest", ["", " --train_on_inputs"])
def test_lists(value, joint, rest):
    given = parse(f"--lora_target_modules{joint}{value}{rest}")
    assert given["lora_target_modules"] == ("q_proj", "v_proj")
    assert len(given) == (2 if rest else 1)


@pytest.mark.parametrize(
    "line",
    [
        "--data_path a.json 'b c,d.json' --seed 1",
        "--data-path=a.json 'b c,d.json' --seed=1",
        "--seed 1 --data_path \"'a.json'\" \"'b c,d.json'\"",
        "--data_path a.json --seed 1 --data-path 'b c,d.json'",
        "--data_path=a.json --data_path='b c,d.json' --seed 1",
    ],
)
def test_several_paths(line):
    assert parse(line) == {"data_path": ("a.json", "b c,d.json"), "seed": 1}


@pytest.mark.parametrize(
    "line", ["1,0.5", "1 0.5", "1, 0.5", "[1,0.5]", "1 --data_weights 0.5", "[1] --data-weights=.5"]
)
def test_several_numbers(line):
    assert parse(f"--data_weights {line}") == {"data_weights": (1.0, 0.5)}


def test_a_repeated_path_is_one_more(tmp_path):
    """With the other trainers' name for it too, and in place of the file's; the same one twice is there twice."""
    assert parse("--dataset a.json --dataset b.json c.json") == {"dataset": ("a.json", "b.json", "c.json")}
    assert parse("--data_path a --data_path a") == {"data_path": ("a", "a")}
    path = tmp_path / "run.yaml"
    path.write_text("data_path: [x, y]\n")
    assert parse(f"--data_path a --config {path} --data_path b") == {"data_path": ("a", "b")}
    assert "--data_path: got '', expected one path or several" in message("--data_path a --data_path ''")


@pytest.mark.parametrize("word", ["'x'", '"x"', "x"])
@pytest.mark.parametrize("joint", [[], ["="]])
def test_matched_quotes_are_stripped(word, joint):
    argv = [f"--output_dir={word}"] if joint else ["--output_dir", word]
    assert parse_flags(TrainConfig, argv) == {"output_dir": "x"}


@pytest.mark.parametrize("word", ["'x", 'x"', "'", "'a' and 'b'"])
def test_other_quotes_stay(word):
    assert parse_flags(TrainConfig, ["--output_dir", word]) == {"output_dir": word}


def test_the_last_of_a_repeated_flag_wins():
    assert parse("--lora_r 4 --lora-r=8 --train_on_inputs --no_train_on_inputs") == {
        "lora_r": 8,
        "train_on_inputs": False,
    }


def test_nothing_given_is_nothing_set():
    assert parse("") == {}


def test_a_number_may_be_negative_or_have_an_exponent():
    assert parse("--max_steps -1 --learning_rate 2E-5") == {"max_steps": -1, "learning_rate": 2e-5}


@pytest.mark.parametrize(
    "text",
    [
        "- 목록으로",
        "--- 표",
        "-h 는 뭐야?",
        "'인용'",
        '"전부 인용"',
        "a=b",
        "--no 라고 해",
        "줄\n바꿈",
        " 앞뒤 ",
        "100%",
    ],
)
@pytest.mark.parametrize("joint", [True, False])
def test_an_instruction_is_taken_as_it_is(text, joint):
    argv = [f"--instruction={text}"] if joint else ["--instruction", text, "--seed", "1"]
    assert parse_flags(GenerateConfig, argv)["instruction"] == text


def test_an_empty_input_is_none():
    assert parse_flags(GenerateConfig, ["--input", "", "--instruction=x"]) == {
        "input": None,
        "instruction": "x",
    }


# Wrong flags and values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--lora_rank", "--lora_r"),
        ("--lora_target_module", "--lora_target_modules"),
        ("--epochs=3", "--num_epochs"),
        ("--lr", "--learning_rate"),
        ("--model_name", "--base_model"),
        ("--per_device_batch_size", "--per_device_train_batch_size"),
        ("--no_gradient_checkpoint", "--gradient_checkpointing"),
        ("-base_model", "--base_model"),
        ("—base_model", "--base_model"),
        ("base_model", "--base_model"),
    ],
)
def test_an_unknown_flag_names_the_nearest(word, meant):
    assert f"Did you mean '{meant}'?" in message([word, "1"])


def test_other_commands_know_what_theirs_is_called():
    assert "Did you mean '--base_model'?" in message("--model_name_or_path m", GenerateConfig)
    assert "Did you mean" not in message("--gradient_accumulation_steps 4", GenerateConfig)


def test_flags_are_not_abbreviated():
    assert "unknown flag '--gradient'" in message("--gradient")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("--zzzzqqq 1", "got the unknown flag '--zzzzqqq'. See jindo-core x --help"),
        ("--", "got the unknown flag '--'"),
        (
            "--output_dir my folder",
            "got 'folder', which belongs to no flag: a value with spaces needs quotes",
        ),
        (
            "--batch_size",
            "--batch_size: got nothing after it, expected a value: a whole number of at least 1",
        ),
        ("--output_dir --seed 1", "--output_dir: got the flag --seed after it, expected a value: a path"),
        ("--lora_target_modules --seed 1", "--lora_target_modules: got the flag --seed after it"),
        ("--config", "--config: got nothing after it, expected a value: a .yaml or .toml file"),
        ("--config ''", "expected a .yaml, .yml or .toml file"),
        ("--batch_size=", "--batch_size: got '', expected a whole number of at least 1"),
        ("--output_dir ''", "--output_dir: got '', expected a path"),
        ("--batch_size 4.5", "--batch_size: got '4.5', expected a whole number of at least 1"),
        ("--lora_dropout 1.5", "--lora_dropout: got '1.5', expected a number of at least 0 and below 1"),
        ("--lr_scheduler_type step", "--lr_scheduler_type: got 'step', expected one of linear, cosine"),
        ("--train_on_inputs data.json", "--train_on_inputs: got 'data.json', expected True or False"),
        ("--no_train_on_inputs=False", "--no_train_on_inputs: got the value 'False', expected none"),
        ("--no_train_on_inputs False", "got 'False', which belongs to no flag"),
        ("--no_lora_r", "got the unknown flag '--no_lora_r'. Did you mean '--lora_r'?"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(line, part):
    assert part in message(line)


# Files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["--config {0} --lora_r 4", "--lora_r 4 --config={0}"])
def test_flags_win_over_the_file(tmp_path, order):
    path = tmp_path / "run.yaml"
    path.write_text("lora_r: 16\nbase_model: m\n")
    given = parse(order.format(path))
    assert given == {"lora_r": 4, "base_model": "m"}
    config, explicit, _ = resolve_train_config(given)
    assert (config.batch_size, explicit) == (128, {"lora_r", "base_model"})


def test_a_wrong_file_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lora_rank: 16\n")
    assert message(["--config", str(path)]).startswith(f"{path}: got the unknown key 'lora_rank'")


# Help -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--lora_r", "4", "--nonsense", "--help"]])
def test_help_wins_over_everything(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_flags(TrainConfig, argv)
    assert stop.value.code == 0
    assert "--lora_target_modules" in capsys.readouterr().out


@pytest.mark.parametrize("config_class", [TrainConfig, GenerateConfig])
def test_every_field_is_a_flag(config_class):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, config_class)
    text = parser.format_help()
    for name, known in settings(config_class).items():
        assert (re.search(rf"--{name}\s", text) is None) is known.hidden
    assert vars(parser.parse_args([])) == {}
