"""Settings: profiles, bounds, config files, and messages of one line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from jindo_core.config import (
    PROFILES,
    GenerateConfig,
    TrainConfig,
    resolve_generate_config,
    resolve_train_config,
    settings,
)
from jindo_core.config_files import read_config_file
from jindo_core.errors import InputError


def message(function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Profiles -------------------------------------------------------------------------------------------------


def test_a_constant_schedule_that_warms_up_says_so():
    """transformers' never does."""
    given = {"base_model": "m", "lr_scheduler_type": "constant", "warmup_steps": 100}
    note = "--warmup_steps: warms up to the constant rate; transformers' constant schedule never does (0: nor here)"
    assert note in resolve_train_config(given)[2]
    for other in ({"lr_scheduler_type": "constant_with_warmup"}, {"warmup_steps": 0}, {"lr_scheduler_type": "linear"}):
        assert note not in resolve_train_config(given | other)[2]


def test_a_named_model_takes_alpaca_loras_defaults():
    config, explicit, _ = resolve_train_config({"base_model": "m"})
    assert explicit == {"base_model"}
    assert (config.output_dir, config.batch_size, config.micro_batch_size) == ("./lora-alpaca", 128, 4)
    assert (config.num_epochs, config.learning_rate, config.cutoff_len) == (3.0, 3e-4, 256)
    assert (config.val_set_size, config.lora_r, config.lora_alpha, config.lora_dropout) == (2000, 8, 16, 0.05)
    assert config.lora_target_modules == ("q_proj", "v_proj")
    assert (config.train_on_inputs, config.group_by_length) == (True, False)
    assert (config.prompt_template_name, config.lr_scheduler_type) == ("alpaca", "linear")
    assert (config.logging_steps, config.warmup_steps, config.seed) == (10, 100, 42)
    assert config.accumulation_steps == 32
    assert TrainConfig(base_model="m", profile="alpaca") == config


def test_without_a_model_the_embedded_job_is_meant():
    config, explicit, _ = resolve_train_config({})
    assert explicit == frozenset()
    assert config.base_model is None
    assert (config.prompt_template_name, config.lora_target_modules) == ("korean_short", ("all-linear",))
    assert (config.train_on_inputs, config.group_by_length) == (False, True)
    assert (config.batch_size, config.micro_batch_size, config.num_epochs) == (4, 4, 1.0)
    assert (config.val_set_size, config.lr_scheduler_type, config.logging_steps) == (32, "cosine", 1)


def test_what_is_given_wins_over_the_profile_and_is_named():
    config, explicit, _ = resolve_train_config({"lora_r": 4, "train_on_inputs": True, "data_path": None})
    assert (config.lora_r, config.train_on_inputs, config.data_path) == (4, True, None)
    assert explicit == {"lora_r", "train_on_inputs"}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_names_only_settings_and_all_name_what_alpacas_does(profile):
    assert PROFILES[profile].keys() <= settings(TrainConfig).keys()
    assert PROFILES[profile].keys() >= PROFILES["alpaca"].keys()


@pytest.mark.parametrize(
    ("given", "batch", "micro"),
    [
        ({"batch_size": 2}, 2, 2),
        ({"micro_batch_size": 16}, 16, 16),
        ({"base_model": "m", "batch_size": 3}, 3, 3),
        ({"base_model": "m", "micro_batch_size": 8}, 128, 8),
    ],
)
def test_a_default_batch_gives_way_to_a_given_one(given, batch, micro):
    config, _, _ = resolve_train_config(given)
    assert (config.batch_size, config.micro_batch_size) == (batch, micro)


def test_two_given_batches_that_contradict_are_refused():
    text = message(resolve_train_config, {"batch_size": 2, "micro_batch_size": 4})
    assert text.startswith("--micro_batch_size: got 4, expected at most --batch_size (2)")


# Values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_model", ""),
        ("data_path", "  "),
        ("output_dir", 3),
        ("output_dir", None),
        ("batch_size", 0),
        ("batch_size", "four"),
        ("batch_size", "1e3"),
        ("batch_size", 4.0),
        ("batch_size", True),
        ("num_epochs", 0),
        ("num_epochs", "-1"),
        ("num_epochs", "inf"),
        ("learning_rate", "nan"),
        ("learning_rate", 0),
        ("learning_rate", 10**400),
        ("learning_rate", []),
        ("max_steps", -2),
        ("max_steps", 0),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("cutoff_len", 1),
        ("val_set_size", -1),
        ("lora_r", 0),
        ("lora_alpha", 0),
        ("lora_dropout", 1),
        ("lora_dropout", -0.1),
        ("lora_target_modules", []),
        ("lora_target_modules", "[]"),
        ("lora_target_modules", "[q_proj"),
        ("lora_target_modules", [1]),
        ("lora_target_modules", ["all-linear", "q_proj"]),
        ("train_on_inputs", "maybe"),
        ("train_on_inputs", 2),
        ("lr_scheduler_type", "cosin"),
        ("optim", "adamw"),
        ("quantize", False),
        ("dtype", "fp16"),
        ("device", "gpu"),
        ("device", "cuda:"),
        ("logging_steps", 0),
        ("eval_steps", 0),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(name, value):
    for text in (
        message(TrainConfig, **{name: value}),
        message(resolve_train_config, {name: value}) if value is not None else None,
    ):
        if text is not None:
            assert text.startswith(f"--{name}: got ")
            assert "expected" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("instruction", ""),
        ("instruction", "\udcff"),
        ("input", "ok \udcff"),
        ("device", "tpu"),
        ("stream", "later"),
    ],
)
def test_a_wrong_value_of_generate_is_named(name, value):
    text = message(GenerateConfig, **{name: value})
    assert text.startswith(f"--{name}: got ")
    assert "expected" in text


def test_messages_say_how_to_put_it_right():
    assert message(TrainConfig, batch_size="x") == (
        "--batch_size: got 'x', expected a whole number of at least 1, for example 128"
    )
    assert "expected a number of at least 0 and below 1" in message(TrainConfig, lora_dropout=2)
    assert "one of linear, cosine, constant" in message(TrainConfig, lr_scheduler_type="x")
    assert "nf4 or none" in message(TrainConfig, quantize="int8")
    assert len(message(TrainConfig, batch_size="9x" * 5000)) < 200


def test_text_is_read_in_the_settings_own_type():
    config = TrainConfig(
        batch_size="16", micro_batch_size="2", learning_rate="1e-4", num_epochs=2, train_on_inputs="no"
    )
    assert (config.batch_size, config.learning_rate, config.train_on_inputs) == (16, 1e-4, False)
    assert isinstance(config.num_epochs, float)


@pytest.mark.parametrize(
    "value",
    [
        "[q_proj,v_proj]",
        "[q_proj, v_proj]",
        '["q_proj","v_proj"]',
        "['q_proj', 'v_proj']",
        "(q_proj,v_proj)",
        "q_proj,v_proj",
        "q_proj v_proj",
        " q_proj , v_proj, ",
        '"q_proj","v_proj"',
        "q_proj,v_proj,q_proj",
        ["q_proj", "v_proj"],
        ("q_proj", "v_proj"),
    ],
)
def test_every_spelling_of_a_list(value):
    assert TrainConfig(lora_target_modules=value).lora_target_modules == ("q_proj", "v_proj")


def test_paths_may_be_path_objects_and_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = TrainConfig(base_model=Path("models") / "m", output_dir="~/out")
    assert (config.base_model, config.output_dir) == ("models/m", "/home/someone/out")
    # A template's name is no path of the shell's, and a text is nobody's business.
    assert GenerateConfig(instruction="~/x is what?").instruction == "~/x is what?"


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:11"])
def test_devices(device):
    assert TrainConfig(device=device).device == device


def test_generate_defaults_are_greedy():
    config = resolve_generate_config({"instruction": "써 줘", "input": ""})
    assert (config.instruction, config.input) == ("써 줘", None)
    assert (config.temperature, config.top_p, config.top_k, config.max_new_tokens) == (0.0, 1.0, 0, 128)
    assert config.stream


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lora_r = 3


@pytest.mark.parametrize(
    ("name", "meant"),
    [("lora_rank", "lora_r"), ("lr", "learning_rate"), ("epochs", "num_epochs"), ("train_file", "data_path")],
)
def test_an_unknown_setting_names_the_nearest(name, meant):
    assert f"Did you mean '{meant}'?" in message(resolve_train_config, {name: 1})


def test_a_name_of_the_other_command_is_not_suggested():
    assert "instruction" not in message(resolve_train_config, {"prompt": 1})
    assert "Did you mean 'instruction'?" in message(resolve_generate_config, {"prompt": 1})


@pytest.mark.parametrize("config_class", [TrainConfig, GenerateConfig])
def test_every_setting_is_explained_in_a_line(config_class):
    for setting in settings(config_class).values():
        assert setting.help
        assert setting.group
        assert len(setting.help) < 75, setting.name


# Files ----------------------------------------------------------------------------------------------------


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_yaml_and_toml_give_the_same(tmp_path):
    yaml = """
        base_model: ./m
        learning-rate: 1e-4   # PyYAML takes this for a string
        lora_target_modules: [q_proj, v_proj]
        train_on_inputs: no
        data_path:
    """
    toml = """
        base_model = "./m"
        learning_rate = 1e-4
        lora-target-modules = ["q_proj", "v_proj"]
        train_on_inputs = false
    """
    expected = {
        "base_model": "./m",
        "learning_rate": 1e-4,
        "lora_target_modules": ("q_proj", "v_proj"),
        "train_on_inputs": False,
    }
    assert read_config_file(write(tmp_path, "a.yaml", yaml)) == expected
    assert read_config_file(write(tmp_path, "a.YML", yaml)) == expected
    assert read_config_file(str(write(tmp_path, "a.toml", toml))) == expected


def test_an_empty_file_gives_nothing_and_a_bom_is_no_letter(tmp_path):
    assert read_config_file(write(tmp_path, "a.yaml", "# nothing yet\n")) == {}
    assert read_config_file(write(tmp_path, "b.toml", b"\xef\xbb\xbflora_r = 4")) == {"lora_r": 4}


def test_the_other_class_has_its_own_keys(tmp_path):
    path = write(tmp_path, "a.yaml", "temperature: 0.7\nstream: false\n")
    assert read_config_file(path, GenerateConfig) == {"temperature": 0.7, "stream": False}
    assert "unknown key 'stream'" in message(read_config_file, path)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.yaml", "lora_rank: 8", "unknown key 'lora_rank'"),
        ("a.yaml", "lora_rank: 8", "Did you mean 'lora_r'?"),
        ("a.yaml", "1: 8", "unknown key '1'"),
        ("a.yaml", "lora_r: eight", "lora_r: got 'eight', expected a whole number of at least 1"),
        ("a.yaml", "output_dir: null\nbatch_size: {a: 1}", "batch_size: got {'a': 1}"),
        ("a.yaml", "- lora_r\n- 8", "got a list at the top"),
        ("a.yaml", "just words", "got a str at the top"),
        ("a.yaml", "a: 1\nb: [1,\nc: 2", "got broken YAML in line 3"),
        ("a.yaml", "a: !!python/object:os.system 1", "got broken YAML in line 1"),
        ("a.yaml", b"output_dir: \xff\xfe", "at offset 12 that is no UTF-8"),
        ("a.toml", "lora_r: 8", "got broken TOML"),
        ("a.toml", "[lora]\nr = 8", "unknown key 'lora'"),
        ("a.json", "{}", "expected a .yaml, .yml or .toml file"),
        ("noending", "", "expected a .yaml, .yml or .toml file"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_path(tmp_path, name, text, part):
    path = write(tmp_path, name, text)
    said = message(read_config_file, path)
    assert said.startswith(str(path))
    assert part in said


def test_a_file_that_is_not_there_or_a_folder(tmp_path):
    assert "No such file" in message(read_config_file, tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "Is a directory" in message(read_config_file, tmp_path / "folder.yaml")


def test_nothing_heavy_is_imported():
    code = (
        "import sys, jindo_core.config; print(sorted({'torch', 'numpy', 'yaml', 'rich'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


# Data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["a b,c.json", ["a b,c.json"], ("a b,c.json",), Path("a b,c.json")])
def test_a_path_keeps_its_commas_and_spaces(value):
    assert TrainConfig(data_path=value).data_path == ("a b,c.json",)


def test_several_paths_and_a_weight_for_each(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = TrainConfig(data_path=["~/a.json", "b"], data_weights="1, 0.5")
    assert (config.data_path, config.data_weights) == (("/home/someone/a.json", "b"), (1.0, 0.5))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"data_path": []}, "--data_path: got [], expected one path or several, none blank"),
        ({"data_path": ["a", " "]}, "--data_path: got ['a', ' '], expected one path"),
        ({"data_path": [1]}, "--data_path: got [1]"),
        ({"data_path": "a", "data_weights": 0}, "--data_weights: got 0, expected a number above 0, or several"),
        ({"data_path": "a", "data_weights": [1, True]}, "--data_weights: got [1, True]"),
        ({"data_path": "a", "data_weights": "1,x"}, "--data_weights: got '1,x'"),
        ({"data_path": "a", "data_weights": ""}, "--data_weights: got ''"),
        ({"data_path": "a", "data_weights": [1, 1]}, "--data_weights: got 2 for 1 of --data_path"),
        ({"data_weights": 1}, "--data_weights: got 1 for 0 of --data_path"),
        ({"source_max_len": 16}, "--source_max_len: got it alone, expected --target_max_len beside it"),
        ({"target_max_len": 16}, "--target_max_len: got it alone, expected --source_max_len beside it"),
        ({"preview": -1}, "--preview: got -1, expected a whole number of at least 0"),
        ({"max_train_samples": 0}, "--max_train_samples: got 0"),
        ({"profile": "lora"}, "--profile: got 'lora', expected one of alpaca, qlora, embedded"),
        ({"mmlu_split": "train"}, "--mmlu_split: got 'train', expected eval or test"),
    ],
)
def test_what_is_wrong_with_the_data_is_said(given, part):
    assert part in message(TrainConfig, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_train_samples": 0}, "--max_train_samples: got 0, expected a whole number of at least 1"),
        ({"seed": -1}, "--seed: got -1, expected a whole number of at least 0 and at most 4294967295, for example 42"),
    ],
)
def test_bounds_are_exact_and_no_example_is_none(given, said):
    assert message(resolve_train_config, given) == said
