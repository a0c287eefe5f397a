"""`train --json` as a program meets it: a JSON object a line and nothing else, whatever ends the run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from jindo_core import ceiling
from jindo_core.cli.main import main
from jindo_core.training_view import EVENTS

ROW = {"step", "epoch", "loss", "learning_rate", "grad_norm", "skipped_steps", "tokens", "tokens_per_second",
       "memory_bytes", "seconds"}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.json"
    data = [{"instruction": f"Name animal {i}.", "input": "", "output": f"It is cat {i % 3}."} for i in range(24)]
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def command(stories260k, rows, tmp_path, monkeypatch):
    """command(max_steps=…) -> the words of a short run."""
    monkeypatch.setenv("JINDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def words(**changes):
        given = {
            "base_model": stories260k, "data_path": rows, "output_dir": tmp_path / "out", "batch_size": 8,
            "micro_batch_size": 4, "max_steps": 5, "cutoff_len": 96, "val_set_size": 4, "device": "cpu",
            "dtype": "fp32", "prompt_template_name": "alpaca_short", "save_steps": 3, "logging_steps": 2,
            "eval_steps": 2, "lora_r": 2,
        } | changes  # fmt: skip
        return ["train", "--json", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]

    return words


def run(words, **more):
    return subprocess.run(
        [sys.executable, "-m", "jindo_core.cli.main", *words], capture_output=True, text=True, timeout=120, **more
    )


def parsed(text):
    """Every line an object with what its event always has."""
    assert text.endswith("\n")
    found = [json.loads(line) for line in text.splitlines()]
    for one in found:
        keys = set(one) - {"event"}
        assert set(EVENTS[one["event"]]) <= keys, one
        assert one["event"] in ("step", "evaluation") or keys == set(EVENTS[one["event"]]), one
    return found


def of(found, name):
    return [{k: v for k, v in one.items() if k != "event"} for one in found if one["event"] == name]


def test_a_run_line_by_line(command, tmp_path):
    done = run(command())
    assert (done.returncode, done.stderr) == (0, "")
    found = parsed(done.stdout)
    order = list(dict.fromkeys(one["event"] for one in found if one["event"] not in ("message", "notice")))
    assert order == ["plan", "device", "evaluation", "start", "step", "checkpoint", "answer", "results"]
    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = of(found, "step")
    assert [step["step"] for step in steps] == [1, 2, 4, 5]
    assert [{k: v for k, v in step.items() if k != "seconds_left"} for step in steps] == [
        row for row in log if "loss" in row and row["step"] != 3
    ]
    assert set(steps[0]) - {"share_of_ceiling", "seconds_left", "input_seconds"} == ROW
    assert of(found, "evaluation") == [row for row in log if "eval_loss" in row]
    assert of(found, "checkpoint") == [{"step": 3, "path": str(tmp_path / "out" / "checkpoint-3")}]
    (device,), (start,), (results,) = of(found, "device"), of(found, "start"), of(found, "results")
    assert device == {
        "device": "cpu", "dtype": "float32", "training_rows": 20, "held_out_rows": 4,
        "trainable_parameters": 5 * 2 * (64 + 64 + 64 + 32),
    }  # fmt: skip
    assert (start["step"], start["steps"]) == (0, 5)
    assert start["planned_bytes"] == of(found, "plan")[0]["peak_bytes"]
    assert (results["output_dir"], results["steps"]) == (str(tmp_path / "out"), 5)
    assert results["loss_after"] == log[-1]["eval_loss"]


def test_the_share_in_metrics_is_what_was_measured(command, monkeypatch, capsys, tmp_path):
    """A ceiling that no machine reaches: the share is there, and is the operations of a token over it."""
    monkeypatch.setattr(ceiling, "products_per_second", lambda *_: 1e18)
    assert main(command()) == 0
    found = parsed(capsys.readouterr().out)
    (start,), (results,) = of(found, "start"), of(found, "results")
    assert start["ceiling"] == 1e18
    for step in of(found, "step"):
        reached = start["token_operations"] * step["tokens_per_second"] / 1e18
        assert step["share_of_ceiling"] == pytest.approx(reached)
    assert results["share_of_ceiling"] == step["share_of_ceiling"]
    words = [word for word in command(output_dir=tmp_path / "second") if word != "--json"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "% of this device's matrix products; " in out
    assert "% of ceiling  " in out
    assert re.search(r"step 4/5  .* \d+/\d+ MB  held out \d\.\d{3}  ", out)


def test_a_signal_is_told_and_what_went_on_is_the_same_stream(command):
    with subprocess.Popen(
        [sys.executable, "-m", "jindo_core.cli.main", *command(max_steps=100_000, logging_steps=1, save_steps=0)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        lines = []
        while not (lines and json.loads(lines[-1])["event"] == "step"):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        process.send_signal(signal.SIGTERM)
        rest, said = process.communicate(timeout=60)
    assert process.returncode == 143
    found = parsed("".join(lines) + rest)
    stopped = found[-1]
    assert (stopped["event"], stopped["code"]) == ("stopped", 143)
    assert stopped["message"] == said.strip()
    (saved,) = of(found, "checkpoint")
    assert found[-2]["event"] == "checkpoint"
    assert saved["step"] == of(found, "step")[-1]["step"]
    assert os.path.isdir(saved["path"])


def test_a_run_that_goes_on_says_from_where(command, capsys):
    assert main(command(max_steps=3)) == 0
    capsys.readouterr()
    assert main([*command(max_steps=5), "--resume", "--overwrite_output_dir"]) == 0
    (start,) = of(parsed(capsys.readouterr().out), "start")
    assert (start["step"], start["steps"]) == (3, 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "--lora_rank", "4"], "got the unknown flag '--lora_rank'"),
        (["--json=true", "--batch_size", "x"], "--batch_size: got 'x'"),
        (["--json", "--base_model", "nowhere"], "base model nowhere does not exist"),
        (["--json", "--preview", "3"], "--json: got it beside --preview"),
    ],
)
def test_wrong_input_is_an_event_and_still_an_error(words, message, capsys):
    assert main(["train", *words]) == 2
    out, err = capsys.readouterr()
    last = parsed(out)[-1]
    assert (last["event"], last["code"]) == ("error", 2)
    assert last["message"].startswith(message)
    assert err == f"error: {last['message']}\n"


def test_a_file_may_ask_for_it(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("json: true\nbase_model: nowhere\n")
    assert main(["train", "--config", str(path)]) == 2
    assert parsed(capsys.readouterr().out)[-1]["event"] == "error"


@pytest.mark.parametrize("name", ["run.yaml", "run.toml"])
def test_what_is_wrong_in_that_file_is_an_event_too(name, tmp_path, capsys):
    path = tmp_path / name
    sign = " =" if name.endswith("toml") else ":"
    path.write_text(f"json{sign} true\nlora_rank{sign} 4\n")
    assert main(["train", "--config", str(path)]) == 2
    assert parsed(capsys.readouterr().out)[-1]["event"] == "error"
    path.write_text(f"json{sign} true\n: [\n")
    assert main(["train", f"--config={path}"]) == 2
    assert parsed(capsys.readouterr().out)[-1]["event"] == "error"
    assert main(["train", "--config", str(path), "--no_json"]) == 2  # flags win
    assert main(["train", "--config", str(tmp_path / "no.yaml")]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("rank", "tells"), [("0", 1), ("1", 0)])
def test_of_torchruns_processes_the_first_tells_of_a_wrong_flag(rank, tells, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    if tells:
        assert main(["train", "--json", "--lora_rank", "4"]) == 2
    else:
        with pytest.raises(SystemExit) as caught:
            main(["train", "--json", "--lora_rank", "4"])
        assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert (out.count("\n"), err.count("error: ")) == (tells, tells)


@pytest.mark.parametrize(
    ("json_too", "why"), [(True, "No space left on device"), (False, "Broken pipe")], ids=["json, full", "gone"]
)
def test_a_display_that_takes_no_more_ends_no_run(json_too, why, command, tmp_path):
    """/dev/full, and a reader as `| head` leaves; Python's own flush at the end is no error, either."""
    words = [word for word in command(max_steps=2, save_steps=2) if json_too or word != "--json"]
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") if json_too else os.fdopen(write, "w") as target:
        done = subprocess.run(
            [sys.executable, "-m", "jindo_core.cli.main", *words], stdout=target, stderr=subprocess.PIPE, text=True,
            timeout=120,
        )  # fmt: skip
    note = f"note: standard output takes no more ({why}): the run goes on and shows nothing\n"
    assert (done.returncode, done.stderr) == (0, note)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "checkpoint-2").exists()


@pytest.mark.parametrize("words", [["--json", "False"], ["--no_json"], ["--json=0"], ["--json", "--no_json"], []])
def test_without_it_standard_output_holds_no_event(words, capsys):
    assert main(["train", *words, "--lora_rank", "4"]) == 2
    assert capsys.readouterr().out == ""


def test_no_step_that_could_be_made_is_an_event_with_code_1(command, monkeypatch, capsys):
    from jindo_core import step as stepping

    monkeypatch.setattr(stepping, "accumulate", lambda *_: torch.tensor(float("nan")))
    assert main(command()) == 1
    last = parsed(capsys.readouterr().out)[-1]
    assert (last["event"], last["code"]) == ("error", 1)
    assert "the loss at step 5 is nan" in last["message"]


@pytest.mark.slow
def test_of_two_processes_the_first_alone_prints(command):
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "jindo_core", *command(max_steps=2)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = parsed(done.stdout)
    assert [step["step"] for step in of(found, "step")] == [1, 2]
    assert len(of(found, "start")) == len(of(found, "results")) == 1


def test_disable_tqdm_leaves_the_bar_off():
    from jindo_core.config import resolve_train_config

    assert resolve_train_config({})[0].bar is True
    assert resolve_train_config({"disable_tqdm": True})[0].bar is False
    assert resolve_train_config({"disable_tqdm": False})[0].bar is True


def test_the_document_has_every_event_with_its_keys(repo_root):
    text = (repo_root / "docs" / "output.md").read_text(encoding="utf-8")
    table = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| `")]
    documented = {name.strip().strip("`"): set(re.findall(r"`(\w+)`", keys)) for name, keys, _ in table}
    assert documented == {name: set(keys) for name, keys in EVENTS.items()}


def test_without_a_standard_output_a_run_is_a_run(command, tmp_path):
    """Closed by who started it, as `>&-` does."""
    words = [word for word in command(max_steps=1, save_steps=0) if word != "--json"]
    program = [sys.executable, "-m", "jindo_core.cli.main", *words]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *program], stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
