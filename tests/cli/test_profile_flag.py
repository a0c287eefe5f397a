"""`--profile`: whose defaults count, or how many steps to profile; from flags and from files."""

from __future__ import annotations

import shlex

import pytest

from jindo_core.cli.flags import parse_flags
from jindo_core.config import TrainConfig
from jindo_core.errors import InputError


def parse(line):
    return parse_flags(TrainConfig, shlex.split(line))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--profile", {"profile_steps": 3}),
        ("--profile --lora_r 4", {"profile_steps": 3, "lora_r": 4}),
        ("--profile 5", {"profile_steps": 5}),
        ("--profile=5", {"profile_steps": 5}),
        ("--profile True --lora_r=4", {"profile_steps": 3, "lora_r": 4}),
        ("--profile False", {"profile_steps": 0}),
        ("--profile 0", {"profile_steps": 0}),
        ("--profile_steps 7", {"profile_steps": 7}),
        ("--profile qlora", {"profile": "qlora"}),
        ("--profile=embedded", {"profile": "embedded"}),
        ("--profile qlora --profile 2", {"profile": "qlora", "profile_steps": 2}),
        ("--profile --profile alpaca", {"profile": "alpaca", "profile_steps": 3}),
    ],
)
def test_profile_says_whose_defaults_or_how_many_steps_to_profile(line, expected):
    assert parse(line) == expected


@pytest.mark.parametrize(("said", "expected"), [("true", 3), ("4", 4), ('"4"', 4), ("false", 0)])
@pytest.mark.parametrize("ending", ["yaml", "toml"])
def test_profile_in_a_config_file(said, expected, ending, tmp_path):
    path = tmp_path / f"c.{ending}"
    path.write_text(f"profile: {said}" if ending == "yaml" else f"profile = {said}")
    assert parse(f"--config {path}") == {"profile_steps": expected}
    path.write_text("profile: qlora" if ending == "yaml" else 'profile = "qlora"')
    assert parse(f"--config {path} --profile 2") == {"profile": "qlora", "profile_steps": 2}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--profile=-1", "--profile_steps: got '-1', expected a whole number of at least 0"),
        ("--profile llama", "--profile: got 'llama', expected one of alpaca, qlora, embedded"),
    ],
)
def test_a_profile_that_is_neither(line, expected):
    with pytest.raises(InputError) as caught:
        parse(line)
    assert str(caught.value).startswith(expected)
