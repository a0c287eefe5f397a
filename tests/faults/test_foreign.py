"""Checkpoints of peft and of transformers' Trainer: their adapter is taken up, and that this is all is said."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jindo_core import train as training
from jindo_core.adapters import CONFIG, PREFIX, adapter_state
from jindo_core.errors import InputError
from jindo_core.train import train


@pytest.fixture
def theirs(stories260k, tmp_path):
    """theirs(…) -> a checkpoint as the Trainer leaves it, and the tensors in it."""

    def make(folder="out/checkpoint-40", safe=True, **changes):
        torch.manual_seed(1)
        shape = {"r": 2, "lora_alpha": 16, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]} | changes
        base = AutoModelForCausalLM.from_pretrained(stories260k)
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **shape))
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.01)
        path = tmp_path / folder
        model.save_pretrained(path, safe_serialization=safe)
        (path / "trainer_state.json").write_text(json.dumps({"global_step": 40}))
        tensors = peft.get_peft_model_state_dict(model)
        return path, {name.removeprefix(PREFIX): value for name, value in tensors.items()}

    return make


@pytest.fixture
def first_weights(monkeypatch):
    """The adapter as the first step finds it."""
    original, seen = training.take_step, []

    def step(job, *rest):
        if not seen:
            seen.append({n.removeprefix(PREFIX): v.clone() for n, v in adapter_state(job.model).items()})
        return original(job, *rest)

    monkeypatch.setattr(training, "take_step", step)
    return seen


@pytest.mark.parametrize("how", ["named", "found", "older"])
def test_the_weights_are_taken_and_the_rest_begins_anew(how, theirs, settings, first_weights, capsys):
    path, tensors = theirs(safe=how != "older")
    if how == "older":  # peft before safetensors
        (path / "adapter_model.safetensors").unlink(missing_ok=True)
        torch.save({f"{PREFIX}{name}": value for name, value in tensors.items()}, path / "adapter_model.bin")
    more = {"resume": True} if how == "found" else {"resume_from_checkpoint": str(path)}
    result = train(*settings("out" if how == "found" else "new", max_steps=2, **more))
    assert result.steps == 2
    (first,) = first_weights
    assert first.keys() == tensors.keys()
    assert all(torch.equal(first[name], tensors[name]) for name in first)
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-40 is of another tool: its adapter is taken up, while optimizer, learning rate and data" in said


def test_the_other_tool_s_checkpoint_is_left_as_it_is(theirs, settings, tmp_path, capsys):
    """Where ours would have its name, none is written, and that is said."""
    path, _ = theirs("out/checkpoint-2")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    train(*settings("out", max_steps=4, save_steps=2, save_total_limit=1, resume=True))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert "the checkpoint of step 2 could not be written" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "out" / "checkpoint-4").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 4}, r"has r 4 and lora_alpha 16, this run --lora_r 2 and --lora_alpha 16: give the same"),
        ({"lora_alpha": 8}, r"has r 2 and lora_alpha 8, this run --lora_r 2 and --lora_alpha 16"),
        ({"r": 4, "lora_alpha": 32}, r"shape \(4, 64\), expected \(2, 64\): it is of another --lora_r"),
        ({"target_modules": ["q_proj"]}, r"has no tensor .*v_proj.*: expected the same --lora_target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, r"has a tensor .*o_proj.*: expected the same"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(changes, said, theirs, settings, tmp_path):
    path, _ = theirs(**changes)
    with pytest.raises(InputError, match=said):
        train(*settings("new", resume_from_checkpoint=str(path)))
    assert not (tmp_path / "new" / "adapter_model.safetensors").exists()


def test_a_folder_with_neither_is_refused(settings, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / CONFIG).write_text("{}")
    with pytest.raises(InputError, match=r"c holds neither a checkpoint of ours nor adapter_model\.safetensors"):
        train(*settings("new", resume_from_checkpoint=str(tmp_path / "c")))


def test_the_adapter_of_a_run_of_ours_can_be_begun_with(settings, first_weights, tmp_path):
    train(*settings("first", max_steps=2))
    first_weights.clear()
    train(*settings("second", max_steps=2, resume_from_checkpoint=str(tmp_path / "first")))
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert all(torch.equal(first_weights[0][name.removeprefix(PREFIX)], value) for name, value in tensors.items())
