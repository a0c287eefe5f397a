"""What a command refuses is refused at once, and the error says what to do instead."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jindo_core import hub
from jindo_core.cli.main import main
from jindo_core.config import resolve_train_config
from jindo_core.errors import InputError
from jindo_core.train import train


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n' * 4)
    return path


def refused(capsys, argv, *parts):
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in parts), said


@pytest.mark.parametrize("command", ["inspect", "split", "preview", "clean", "convert"])
def test_a_second_file_for_a_command_of_one(capsys, data, command):
    refused(capsys, ["data", command, "--data_path", data, data], "takes one: give a folder or a quoted pattern")


def test_paths_that_match_nothing_are_not_asked_of_the_hub(data):
    with pytest.raises(InputError, match="several are separated by spaces, not commas"):
        hub.resolve_data("a.json,b.json")
    for pattern in ("mix/*.nope", "*.json"):
        with pytest.raises(InputError, match="no file matches this pattern"):
            hub.resolve_data(pattern)


def test_an_earlier_report_stays(capsys, data, tmp_path):
    argv = ["data", "inspect", "--data_path", data, "--output_dir", tmp_path / "r"]
    assert main([str(word) for word in argv]) == 0
    refused(capsys, argv, "report.json is there already", "--overwrite")
    assert main([str(word) for word in [*argv, "--overwrite"]]) == 0


def test_preview_says_the_rule_and_takes_a_tokenizer(capsys, data, stories260k):
    argv = ["data", "preview", "--data_path", str(data), "--tokenizer", str(stories260k)]
    assert main(argv) == 0
    assert "prompts are learned too, alpaca-lora's default" in capsys.readouterr().out
    assert main([*argv, "--train_on_inputs", "False"]) == 0
    assert "prompts are not" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"instruction": "a", "output": None}, ("'output' is null, expected text", "data clean leaves such rows out")),
        ({"instruction": "a", "output": 3}, ("'output' is the number 3, expected text",)),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
         ("turns alternate", "data clean --recipe korean", "conversation_roles")),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_has_a_way_out(capsys, tmp_path, stories260k, row, parts):
    (tmp_path / "r.json").write_text(json.dumps([row]))
    refused(capsys, ["data", "preview", "--data_path", tmp_path / "r.json", "--base_model", stories260k], *parts)


@pytest.mark.parametrize(
    "argv",
    [["quantize", "--output_dir"], ["merge", "--onto", "nf4", "--lora_weights", "x", "--output_dir"],
     ["export", "--format", "gguf", "--output_file"]],
)  # fmt: skip
def test_what_is_in_the_way_is_said_before_torch_is_imported(tmp_path, argv):
    (tmp_path / "old.gguf").write_text("x")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "x").write_text("x")
    target = tmp_path / ("old.gguf" if argv[0] == "export" else "old")
    code = f"import sys; from jindo_core.cli.main import main; c = main({[*argv, str(target)]}); "
    run = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(c + 10 * ('torch' in sys.modules))"], capture_output=True, text=True
    )
    assert run.returncode == 2, run.stderr
    assert "is there already" in run.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [({"device": "cuda:99"}, "use --device cpu"), ({"lora_target_modules": ["foo"]}, "match no linear layer; this model has .down_proj")],
)
def test_train_refuses_before_a_row_is_tokenized(data, stories260k, tmp_path, capsys, given, message):
    values = {"base_model": str(stories260k), "data_path": str(data), "output_dir": str(tmp_path / "o")}
    with pytest.raises(InputError, match=message):
        train(*resolve_train_config(values | given))
    assert "tokenized" not in capsys.readouterr().out
