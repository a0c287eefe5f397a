"""What a command refuses is refused at once, and the error says what to do instead."""

from __future__ import annotations

import json
import re
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
    [({"device": "cuda:99"}, "use --device cpu"),
     ({"lora_target_modules": ["foo"]}, "match no linear layer; this model has .down_proj")],
)  # fmt: skip
def test_train_refuses_before_a_row_is_tokenized(data, stories260k, tmp_path, capsys, given, message):
    values = {"base_model": str(stories260k), "data_path": str(data), "output_dir": str(tmp_path / "o")}
    with pytest.raises(InputError, match=message):
        train(*resolve_train_config(values | given))
    assert "tokenized" not in capsys.readouterr().out


def test_generate_takes_load_8bit_and_suggests_nothing_for_beams(capsys, stories260k):
    argv = ["generate", "--base_model", str(stories260k), "--instruction", "a", "--max_new_tokens", "1"]
    assert main([*argv, "--load_8bit"]) == 0
    assert "served by NF4" in capsys.readouterr().err
    assert main([*argv, "--num_beams", "4"]) == 2
    said = capsys.readouterr().err
    assert "unknown flag '--num_beams'" in said
    assert "Did you mean" not in said


def test_a_model_for_an_adapter_and_other_things_for_a_model(capsys, stories260k, data):
    refused(
        capsys, ["generate", "--lora_weights", stories260k, "--instruction", "a"], "is a model, not an adapter",
        "--base_model",
    )  # fmt: skip
    refused(capsys, ["generate", "--base_model", data.parent, "--instruction", "a"], "no model here")
    (data.parent / "m.gguf").touch()
    refused(capsys, ["generate", "--base_model", data.parent, "--instruction", "a"], "give the file", "m.gguf")


def test_inspect_says_which_recipe_holds_a_step(capsys, tmp_path):
    row = {"instruction": "a  ", "input": "", "output": "<b>x</b> <i>y</i>"}
    (tmp_path / "r.json").write_text(json.dumps([row] * 3))
    assert main(["data", "inspect", "--data_path", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().out
    assert "in recipe" in said
    assert "N in a finding is any number" in said
    assert "default, korean" in said


def test_preview_and_scoring_say_what_the_context_cuts(capsys, data, stories260k, tmp_path):
    base = ["--data_path", str(data), "--base_model", str(stories260k), "--cutoff_len", "4000"]
    assert main(["data", "preview", *base]) == 0
    assert "beyond the model's context: train takes 512 at most" in capsys.readouterr().out
    score = ["data", "refine", "--mode", "score", "--output_path", str(tmp_path / "s.jsonl"), "--device", "cpu"]
    assert main([*score, *base]) == 0
    assert "cutoff_len 4000 is beyond the model's context: 512 is used" in capsys.readouterr().out


def test_a_stopped_refine_says_how_it_goes_on(capsys, data, stories260k, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    argv = ["data", "refine", "--mode", "score", "--data_path", str(data), "--base_model", str(stories260k),
            "--output_path", str(tmp_path / "s.jsonl"), "--device", "cpu"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("jindo_core.refine._work", stop)
        assert main(argv) == 130
    assert "0 rows are kept: the same command goes on" in capsys.readouterr().out
    assert main([*argv, "--cutoff_len", "64"]) == 0  # other settings, and no row of the old ones


def test_every_format_that_is_written_is_in_the_docs(repo_root):
    from jindo_core.data.writers import WRITABLE

    text = (repo_root / "docs" / "data.md").read_text(encoding="utf-8")
    told = re.findall(r"[\w-]+", text.partition("**Written**")[2].partition(" Where")[0])
    assert set(WRITABLE) <= set(told)
