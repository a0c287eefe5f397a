"""The command line as a person meets it: help, exit codes, one error line, and what reaches the engine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import types

import pytest

from jindo_core.cli.main import main
from jindo_core.errors import InputError, TrainingError

HEAVY = ("torch", "transformers", "datasets", "triton", "numpy", "rich", "matplotlib", "yaml")


@pytest.fixture
def engine(monkeypatch):
    """Stands in for the trainer and the generator; `engine.calls` holds what reached them."""
    calls = []
    train, generate = types.ModuleType("jindo_core.train"), types.ModuleType("jindo_core.generation")
    train.train = lambda *args: calls.append(args)
    generate.run_generate = lambda *args: calls.append(args)
    monkeypatch.setitem(sys.modules, "jindo_core.train", train)
    monkeypatch.setitem(sys.modules, "jindo_core.generation", generate)
    monkeypatch.delenv("BASE_MODEL", raising=False)
    return types.SimpleNamespace(calls=calls, train=train, generate=generate)


def pipe_in(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def failing(error):
    def fail(*args):
        raise error

    return fail


def one_error(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


# Help and version -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_the_commands(argv, capsys):
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "train" in out
    assert "generate" in out
    assert len(out.splitlines()) <= 18
    assert err == ""


@pytest.mark.parametrize("columns", ["80", "100", "200"])
@pytest.mark.parametrize("argv", [["train", "--help"], ["help", "train"]])
def test_train_help_is_short_and_shows_both_profiles(argv, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "rows to one optimizer step [128 / 4]" in out
    assert "[q_proj,v_proj / all-linear]" in " ".join(out.split())
    assert "rank [8]" in out
    assert len(out.splitlines()) < 77
    flags = [line for line in out.splitlines() if not line.startswith("  jindo-core")]
    assert max(map(len, flags)) <= min(int(columns), 110)


def test_generate_help(capsys):
    assert main(["generate", "--help"]) == 0
    assert "--max_new_tokens N" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jindo-core ")


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["train", "--help"], ["generate", "--help"], ["train", "--lora_rank", "4"], ["--version"]],
)
def test_cheap_commands_import_nothing_heavy(argv):
    code = (
        "import sys; from jindo_core.cli.main import main; main(sys.argv[1:]); "
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "heavy: []"


# Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (
            ["trian"],
            "got 'trian', expected a command (train or generate or eval or quantize or merge or export or data or "
            "plan or doctor or tune). Did you mean",
        ),
        (["--base_model", "m"], "got the flag '--base_model' first, expected a command (train or generate"),
        (["train", "--lora_rank", "4"], "Did you mean '--lora_r'? See jindo-core train --help"),
        (["train", "--batch_size", "x"], "--batch_size: got 'x', expected a whole number"),
        (["generate", "--top_p", "2"], "--top_p: got '2', expected a number above 0 and at most 1"),
        (["train", "--config", "none.yaml"], "none.yaml: got 'No such file or directory'"),
    ],
)
def test_wrong_input_is_one_line_and_2(argv, part, engine, capsys):
    assert main(argv) == 2
    assert part in one_error(capsys)
    assert engine.calls == []


def test_the_engines_own_input_error_is_one_line_too(engine, capsys):
    engine.train.train = failing(InputError("rows.json: got\nnothing, expected rows"))
    assert main(["train"]) == 2
    assert one_error(capsys) == "error: rows.json: got nothing, expected rows\n"


def test_a_broken_checkpoint_is_one_line_too(tmp_path, capsys):
    """Through the real engine: a pickle where weights are expected."""
    import torch

    config = {
        "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"model.norm.weight": print}, tmp_path / "pytorch_model.bin")
    assert main(["plan", "--base_model", str(tmp_path)]) == 2
    assert "needs more than weights" in one_error(capsys)


def test_a_run_that_cannot_go_on_is_one_line_and_1(engine, capsys):
    engine.train.train = failing(TrainingError("the loss is nan in step 3"))
    assert main(["train"]) == 1
    assert one_error(capsys) == "error: the loss is nan in step 3\n"


def test_a_defect_keeps_its_traceback(engine):
    engine.train.train = failing(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        main(["train"])


def test_ctrl_c_is_130_without_a_traceback(engine, capsys):
    engine.train.train = failing(KeyboardInterrupt())
    assert main(["train"]) == 130
    assert capsys.readouterr().err.strip() == "stopped by Ctrl-C"


def test_an_exit_from_below_keeps_its_message(engine):
    engine.train.train = failing(SystemExit("a library gave up"))
    with pytest.raises(SystemExit, match="a library gave up"):
        main(["train"])


@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_terminal_without_the_letters_is_no_traceback(command):
    result = subprocess.run(
        [sys.executable, "-m", "jindo_core.cli.main", command, "--help"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_a_reader_that_leaves_early_is_no_traceback(argv, unbuffered):
    # A closed pipe, as `jindo-core ... | head` leaves it, before the first line is written.
    code = "import sys; from jindo_core.cli.main import main; sys.stdin.read(); sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 141


def test_the_installed_command_exits_with_the_code(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "jindo_core.cli.main", "train", "--nonsense-zz"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: got the unknown flag '--nonsense-zz'")
    assert list(tmp_path.iterdir()) == []


# What reaches the engine ----------------------------------------------------------------------------------


def test_train_hands_over_the_config_and_what_was_given(engine):
    assert main(["train", "--base-model", "m", "--no_train_on_inputs"]) == 0
    ((config, explicit, _),) = engine.calls
    assert (config.base_model, config.train_on_inputs, config.batch_size) == ("m", False, 128)
    assert explicit == {"base_model", "train_on_inputs"}


def test_train_without_flags_is_the_embedded_job(engine):
    assert main(["train"]) == 0
    ((config, explicit, _),) = engine.calls
    assert (config.base_model, config.data_path, explicit) == (None, None, frozenset())


def test_generate_hands_over_the_instruction(engine, monkeypatch):
    pipe_in(monkeypatch, b"not read")
    assert main(["generate", "--instruction", "안녕?", "--lora_weights", "a", "--no_stream"]) == 0
    ((config,),) = engine.calls
    assert (config.instruction, config.lora_weights, config.stream) == ("안녕?", "a", False)
    assert sys.stdin.read() == "not read"


@pytest.mark.parametrize("data", ["봄은\n왜 오나?\n", "\ufeff봄은\n왜 오나?\r\n"])
def test_generate_reads_standard_input(data, engine, monkeypatch):
    pipe_in(monkeypatch, data.encode())
    assert main(["generate", "--input", "x"]) == 0
    ((config,),) = engine.calls
    assert (config.instruction, config.input) == ("봄은\n왜 오나?", "x")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "standard input: got nothing"),
        (b" \n", "standard input: got nothing"),
        (b"ab\xff", "got a byte at offset 2 that is no UTF-8"),
    ],
)
def test_generate_refuses_empty_and_broken_standard_input(data, part, engine, monkeypatch, capsys):
    pipe_in(monkeypatch, data)
    assert main(["generate"]) == 2
    assert part in one_error(capsys)
    assert engine.calls == []


def test_a_terminal_is_asked(engine, monkeypatch, capsys):
    pipe_in(monkeypatch, "안녕\n".encode())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["generate"]) == 0
    assert "Ctrl-D" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "expected"), [([], "from-env"), (["--base_model", "m"], "m")])
def test_the_environments_base_model_gives_way_to_the_flag(argv, expected, engine, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", "from-env")
    assert main(["generate", "--instruction", "x", *argv]) == 0
    ((config,),) = engine.calls
    assert config.base_model == expected
