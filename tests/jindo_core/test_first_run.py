"""What a newcomer's first run is told, and what it leaves: notices, lengths, and the template that `generate` needs."""

from __future__ import annotations

import json

import pytest

from jindo_core import prepare
from jindo_core import train as training
from jindo_core.config import GenerateConfig, resolve_train_config
from jindo_core.errors import InputError
from jindo_core.generation import run_generate
from jindo_core.run_record import read_run
from jindo_core.training_view import TrainingView

ROWS = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(12)]


def settings(model, folder, rows=ROWS, **changes):
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    given = {
        "base_model": str(model), "data_path": str(path), "output_dir": str(folder / "out"), "batch_size": 4,
        "micro_batch_size": 4, "max_steps": 1, "cutoff_len": 96, "val_set_size": 2, "device": "cpu", "dtype": "fp32",
    }  # fmt: skip
    return resolve_train_config({k: v for k, v in (given | changes).items() if v is not None})


def opened(model, folder, **changes):
    config, explicit, _ = settings(model, folder, **changes)
    return prepare._open(config, explicit, TrainingView()).config


def test_a_default_that_learns_the_prompts_is_said(stories260k, tmp_path, capsys):
    opened(stories260k, tmp_path)
    assert "prompts are learned too, alpaca-lora's default" in capsys.readouterr().out
    for given in (True, False):
        opened(stories260k, tmp_path, train_on_inputs=given)
        assert "prompts are learned" not in capsys.readouterr().out


def test_a_batch_that_micro_batches_do_not_fill_is_said_and_recorded_as_it_ran(stories260k, tmp_path, capsys):
    training.train(*settings(stories260k, tmp_path, batch_size=7, micro_batch_size=2))
    assert "--batch_size 7 is no multiple of --micro_batch_size 2: 6 rows a step" in capsys.readouterr().out
    assert read_run(tmp_path / "out").settings["batch_size"] == 6


@pytest.mark.parametrize(
    ("given", "used"),
    [((16, 512), (16, 496)), ((512, 16), (496, 16)), ((900, 800), (256, 256)), ((300, 280), (256, 256)),
     ((400, 200), (312, 200)), ((100, 412), (100, 412))],
)  # fmt: skip
def test_two_lengths_are_shortened_as_far_as_needed_the_longer_first(stories260k, tmp_path, given, used):
    config = opened(stories260k, tmp_path, cutoff_len=None, source_max_len=given[0], target_max_len=given[1])
    assert (config.source_max_len, config.target_max_len) == used


@pytest.mark.parametrize("rows", [
    [{"text": f"### Human: Say {i}.### Assistant: It is {i}."} for i in range(12)],
    [{"input": f"Human: {i}", "output": f" It is {i}."} for i in range(12)],
])  # fmt: skip
def test_rows_with_their_own_prompt_are_asked_in_it_afterwards(stories260k, tmp_path, capsys, rows):
    training.train(*settings(stories260k, tmp_path, rows=rows, prompt_template_name="alpaca"))
    said = capsys.readouterr().out
    assert "--prompt_template_name has no effect: the rows bring their own prompt" in said
    assert read_run(tmp_path / "out").prompt_template_name == "none"
    asked = "--instruction '…'" if "text" in rows[0] else "--instruction 'Human: "
    assert asked in said.partition("Next: ")[2]
    assert ("What it writes without a prompt" in said) == ("text" in rows[0])
    run_generate(GenerateConfig(lora_weights=str(tmp_path / "out"), instruction="Human: 3", max_new_tokens=1))


def test_an_adapter_keeps_its_own_template(stories260k, tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text('user_turn: "Q: {user}\\n"\nassistant_turn: "A:"\nend: "{eos}"\n')
    training.train(*settings(stories260k, tmp_path, prompt_template_name=str(own)))
    own.unlink()
    (tmp_path / "out").rename(tmp_path / "moved")
    run = read_run(tmp_path / "moved")
    assert run.prompt_template_name == str(tmp_path / "moved" / "prompt_template.json")
    run_generate(GenerateConfig(lora_weights=str(tmp_path / "moved"), instruction="Hi", max_new_tokens=1))
    (tmp_path / "moved" / "prompt_template.json").unlink()
    with pytest.raises(InputError, match="does not exist"):
        run_generate(GenerateConfig(lora_weights=str(tmp_path / "moved"), instruction="Hi", max_new_tokens=1))
