"""The card beside an adapter: what it says is so, the command gives the same run, and nobody's own file is lost."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from short_runs import logged, rows_file, settings_of, signal_at

from jindo_core import outcome, resume, run_card
from jindo_core import train as training
from jindo_core.cli.flags import parse_flags
from jindo_core.config import TrainConfig, resolve_train_config
from jindo_core.errors import Stopped
from jindo_core.run_card import MARK, command_of
from jindo_core.run_record import read_run
from jindo_core.run_state import perplexity


@pytest.fixture
def run(stories260k, tmp_path, monkeypatch):
    """run("out", …) trains; its folder."""
    monkeypatch.setattr(outcome, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(training, "draw_loss", lambda rows, path: path.write_bytes(b""))

    def start(out, **changes):
        training.train(*settings_of(stories260k, rows_file(tmp_path), tmp_path / out, **changes))
        return tmp_path / out

    return start


def parsed(command):
    """The settings of a command line that was shown."""
    words = shlex.split(command)
    return resolve_train_config(parse_flags(TrainConfig, words[words.index("train") + 1 :], prog="jindo-core train"))[0]


# --- the card of a run ------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_was(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    digests, original = [], resume.checkpoint.write
    monkeypatch.setattr(
        resume.checkpoint, "write", lambda *given, **more: digests.append(given[2]) or original(*given, **more)
    )
    out = run("out", seed=7)
    text, record = (out / "README.md").read_text(), read_run(out)
    assert MARK in text
    front = ModelCard(text).data.to_dict()  # the Hub's own reader
    assert front == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "qlora", "jindo-core"],
    }  # fmt: skip
    digest = json.loads(digests[0]["state.json"])["data"]
    assert "36 rows, of `rows.json`; SHA-256 of the rows as they were trained on" in text
    assert f"`{digest}`" in text
    before, after = (record.results[f"held_out_loss_{when}"] for when in ("before", "after"))
    assert f"| held-out loss | {before:.4f} | {after:.4f} |" in text
    assert f"| held-out perplexity | {math.exp(before):,.2f} | {math.exp(after):,.2f} |" in text
    assert "4 rows were held out. 6 steps; 0 skipped" in text
    assert "![Loss over steps, training and held out](loss.png)" in text
    assert (out / "loss.png").exists()
    assert "| `seed` | `7` |" in text
    assert "| `num_epochs`" not in text
    assert text.index("### A sample") < text.index("Before:\n\n```text\n") < text.index("After:\n\n```text\n")
    whole = json.loads(text.partition("```json\n")[2].partition("\n```")[0])
    assert whole["base_model"] == "stories260K-hf"
    assert whole.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    command = next(line for line in text.splitlines() if line.startswith("jindo-core train"))
    assert parsed(command).seed == 7
    assert str(tmp_path) not in text
    assert "hf_secret" not in text
    assert "adapter_config.json, metrics.jsonl, loss.png, README.md" in " ".join(capsys.readouterr().out.split())


def test_a_card_of_ours_is_replaced_and_nobody_elses(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("# Mine\n")
    run("out", max_steps=1, save_steps=0)
    assert (out / "README.md").read_text() == "# Mine\n"
    assert MARK in (out / "RUN.md").read_text()
    assert "README.md is not jindo-core's and is left alone: the run card is RUN.md" in said(capsys)
    (out / "RUN.md").write_text("kept")
    run("out", max_steps=1, save_steps=0, overwrite_output_dir=True)
    assert (out / "RUN.md").read_text() == "kept"
    assert "no run card: README.md and RUN.md in" in said(capsys)
    (out / "README.md").write_text(f"{MARK}\nthe former one")
    run("out", max_steps=1, save_steps=0, overwrite_output_dir=True)
    assert "the former one" not in (out / "README.md").read_text()


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_a_card_that_cant_be_written_costs_no_run(run, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_card, "write_atomically", full)
    out = run("out", max_steps=1, save_steps=0)
    assert not (out / "README.md").exists()
    assert (out / "adapter_model.safetensors").exists()
    assert "could not be written (No space left on device): the adapter is saved" in said(capsys)


def test_what_a_model_wrote_stays_inside_its_block(run, monkeypatch):
    """Markdown and HTML in rows and answers mean nothing in the card."""
    monkeypatch.setattr(training, "answer", lambda *_: "```\n# Not a title\n<script>")
    monkeypatch.setattr(training, "one_line", lambda _: "a | b <b>c</b> `d` [e](f)")
    text = (run("out", max_steps=1, save_steps=0) / "README.md").read_text()
    assert "````text\n```\n# Not a title\n<script>\n````" in text
    assert r"Asked: a \| b \<b\>c\</b\> \`d\` \[e\](f)" in text


def test_a_run_that_went_on_says_so_in_its_command(run, monkeypatch):
    original = training.take_step
    monkeypatch.setattr(training, "take_step", signal_at(2, original))
    with pytest.raises(Stopped):
        run("out")
    monkeypatch.setattr(training, "take_step", original)
    text = (run("out", resume=True) / "README.md").read_text()
    command = next(line for line in text.splitlines() if line.startswith("jindo-core train"))
    assert command.endswith("--save_steps 3 --resume")


def test_a_card_that_cant_be_read_costs_no_run(run, monkeypatch, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    original = Path.read_bytes

    def refused(path):
        if path.name == "README.md":
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    out = run("out", max_steps=1, save_steps=0)
    assert (out / "adapter_model.safetensors").exists()
    assert "could not be written (Permission denied): the adapter is saved" in said(capsys)


def test_a_bar_is_only_escaped_where_it_would_end_a_cell():
    assert run_card._code("a|b") == "`a|b`"
    assert run_card._cell("a|b") == "`a\\|b`"


@pytest.mark.parametrize(
    ("base", "files", "shown"),
    [("o/m", [], True), (None, [], True), ("here", ["config.json"], True), ("meta", ["params.json"], False)],
)
def test_peft_is_shown_where_transformers_reads_the_base(base, files, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in files:
        (tmp_path / base).mkdir()
        (tmp_path / base / name).write_text("{}")
    config = resolve_train_config({} if base is None else {"base_model": base, "data_path": "rows.json"})[0]
    text = run_card.Card(Job(config), {}, [], "")._use(tmp_path / "out")
    assert ("from peft import PeftModel" in text) is shown
    assert "jindo-core merge" in text


# --- the front matter -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "language": ["ko"]}),
        ({"base_model": "o/m", "data_path": "o/rows"}, {"base_model": "o/m", "datasets": ["o/rows"]}),
        ({"base_model": "/models/m", "data_path": "hf://datasets/o/r/f.json"}, {"datasets": ["o/r"]}),
        ({"model_name_or_path": "o/m", "dataset": "alpaca"}, {"base_model": "o/m", "datasets": ["tatsu-lab/alpaca"]}),
        ({"base_model": "o/m", "data_path": "rows.json", "quantize": "none"}, {"base_model": "o/m"}),
        ({"base_model": "o/m", "data_path": "sub/*.jsonl"}, {"base_model": "o/m"}),
        ({"base_model": "o/m", "data_path": "hf://datasets/o/[r]/f.json"}, {"base_model": "o/m"}),
    ],
)
def test_the_front_says_only_what_is_known(given, expected):
    config, _, _ = resolve_train_config(given)
    card = run_card.Card(Job(config), {}, [], "")
    front = yaml.safe_load(card._front().strip("-"))
    tags = ["lora", *(["qlora"] if config.quantize == "nf4" else []), "jindo-core"]
    assert front == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": tags, **expected}


@dataclasses.dataclass
class Job:
    config: TrainConfig


# --- the command ------------------------------------------------------------------------------------------

COMMANDS = [
    "jindo-core train",
    "jindo-core train --seed 3 --no_group_by_length --learning_rate 1.2345678e-5",
    "jindo-core train --base_model m --data_path 'my rows.json' \"it's.csv\" --data_weights 1,0.25 --num_epochs 0.5",
    "jindo-core train --base_model m --lora_target_modules q_proj k_proj --cutoff_len 512 --micro_batch_size 3",
    "jindo-core train --model_name_or_path o/m --dataset d",
    "jindo-core train --model_name_or_path o/m --dataset d --do_eval --eval_dataset_size 9 --bits 16 --bf16",
    "jindo-core train --model_name_or_path o/m --num_train_epochs 2 --per_device_train_batch_size 2",
    "jindo-core train --model_name_or_path o/m --cutoff_len 300 --save_strategy no --run_name r --report_to wandb",
    "jindo-core train --model_name_or_path o/m --lr_scheduler_type constant_with_warmup --max_steps 3",
    "jindo-core train --base_model m --profile qlora --warmup_ratio 0.1 --lr_scheduler_type linear",
    "jindo-core train --profile embedded --base_model m --wandb_watch False --resume_from_checkpoint True",
    "jindo-core train --data_path ./-x.json --prompt_template_name templates/mine.yaml --wandb_project 'my project'",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_gives_the_same_settings(command):
    words = shlex.split(command)[2:]
    config, explicit, _ = resolve_train_config(parse_flags(TrainConfig, words, prog="jindo-core train"))
    assert parsed(command_of(config, explicit)) == config
    assert parsed(command_of(config, frozenset())) == config  # made in Python, nobody knows what was given


def test_the_command_is_no_longer_than_what_was_typed():
    config, explicit, _ = resolve_train_config({"base_model": "m", "data_path": "d.json", "lora_r": 4})
    assert command_of(config, explicit) == "jindo-core train --base_model m --data_path d.json --lora_r 4"
    assert command_of(config, explicit, 2).startswith("torchrun --nproc-per-node 2 -m jindo_core train --base_model m")
    config, explicit, _ = resolve_train_config({"model_name_or_path": "m", "dataset": "d.json"})
    shown = command_of(config, explicit)
    assert shown.startswith("jindo-core train --profile qlora --base_model m --data_path d.json")


def test_the_command_shows_no_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {"base_model": "/models/llama", "data_path": [str(tmp_path / "sub" / "rows.json"), "~/more.json"]}
    config, explicit, _ = resolve_train_config({**paths, "output_dir": "../out", "mmlu_path": str(tmp_path)})
    words = "--base_model llama --data_path sub/rows.json more.json --output_dir ../out"
    assert command_of(config, explicit) == f"jindo-core train {words} --mmlu_path {tmp_path.name}"


# --- perplexity -------------------------------------------------------------------------------------------


def test_perplexity_stands_beside_every_held_out_loss(run, capsys):
    out = run("out")
    rows = [row for row in logged(out) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert [row["eval_perplexity"] for row in rows] == [math.exp(row["eval_loss"]) for row in rows]
    results = read_run(out).results
    assert results["held_out_perplexity_after"] == math.exp(results["held_out_loss_after"])
    text = said(capsys)
    assert f"step 2/6 held-out loss {rows[1]['eval_loss']:.4f} perplexity {rows[1]['eval_perplexity']:.2f}" in text
    before, after = (math.exp(results[f"held_out_loss_{when}"]) for when in ("before", "after"))
    assert f"│ perplexity │ {before:,.2f} │ {after:,.2f} │ {after - before:+,.2f} │" in text


def test_a_loss_beyond_any_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_without_held_out_rows_nothing_is_claimed(run):
    out = run("out", val_set_size=0, max_steps=1, save_steps=0)
    results = read_run(out).results
    assert {results[f"held_out_{what}_after"] for what in ("loss", "perplexity")} == {None}
    text = (out / "README.md").read_text()
    assert "| before | after |" not in text
    assert "nan" not in text
