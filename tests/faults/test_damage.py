"""Checkpoints that a disk or a hand has spoilt: passed over and named, never taken, never taken in part."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jindo_core import checkpoint, run_record
from jindo_core.adapters import CONFIG, WEIGHTS
from jindo_core.cli.main import main
from jindo_core.errors import InputError
from jindo_core.resume import OPTIMIZER
from jindo_core.train import train

FILES = (WEIGHTS, CONFIG, OPTIMIZER, run_record.FILE, checkpoint.STATE, checkpoint.MANIFEST)


@pytest.fixture(scope="module")
def finished(stories260k, tmp_path_factory):
    """A run of 4 steps with its checkpoints 2 and 4, and its settings' maker."""
    folder = tmp_path_factory.mktemp("finished")
    data = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(24)]
    (folder / "rows.json").write_text(json.dumps(data))

    def given(out, **changes):
        from jindo_core.config import resolve_train_config

        settings = {
            "base_model": str(stories260k), "data_path": str(folder / "rows.json"), "output_dir": str(out),
            "batch_size": 4, "micro_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "cutoff_len": 96,
            "val_set_size": 0, "lora_r": 2, "prompt_template_name": "alpaca_short", "device": "cpu", "save_steps": 2,
            "tokenized_cache": False, "resume": True,
        }  # fmt: skip
        return resolve_train_config(settings | changes)

    train(*given(folder / "out"))
    return folder / "out", given


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it: its folder, and train(**changes) that goes on there."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    return out, lambda **changes: train(*finished[1](out, **changes))


def remake_manifest(folder, step, sequence):
    (folder / checkpoint.MANIFEST).unlink(missing_ok=True)
    (folder / checkpoint.MANIFEST).write_bytes(checkpoint._manifest(folder, step, sequence))


def test_what_lies_in_a_checkpoint(finished):
    """Its adapter is peft's, its tensors have checksums, and the newest one holds the run's end."""
    out, _ = finished
    assert [path.name for path in checkpoint.folders(out)] == ["checkpoint-2", "checkpoint-4"]
    newest, faults = checkpoint.newest(out)
    assert (newest.folder.name, newest.files, faults) == ("checkpoint-4", frozenset(FILES[:-1]), [])
    ours, theirs = load_file(out / "checkpoint-4" / WEIGHTS), load_file(out / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    state = newest.state
    assert state["cursor"]["step"] == 4
    assert set(state["updates"].values()) == {4}
    assert {name.rpartition(".")[0] for name in load_file(out / "checkpoint-4" / OPTIMIZER)} == set(state["updates"])
    first, second = (checkpoint.read(out / f"checkpoint-{step}") for step in (2, 4))
    assert (first.sequence, second.sequence) == (1, 2)
    assert first.id != second.id


def test_generate_takes_a_checkpoint_as_it_is(finished, capsys):
    folder = str(finished[0] / "checkpoint-2")
    assert main(["generate", "--lora_weights", folder, "--instruction", "Say 3.", "--max_new_tokens", "4"]) == 0
    assert run_record.read_run(folder).prompt_template_name == "alpaca_short"


def test_peft_loads_a_checkpoint(finished, stories260k):
    base = AutoModelForCausalLM.from_pretrained(stories260k)
    model = peft.PeftModel.from_pretrained(base, finished[0] / "checkpoint-2")
    assert any(bool(value.any()) for name, value in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(name, finished, tmp_path):
    """One bit at 40 places of each file, the ends among them."""
    folder = shutil.copytree(finished[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    whole = (folder / name).read_bytes()
    checkpoint.read(folder)
    for place in sorted({i * (len(whole) - 1) // 39 for i in range(40)}):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << place % 8
        (folder / name).write_bytes(spoilt)
        with pytest.raises(InputError, match=name) as caught:
            checkpoint.read(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "longer", "empty", "missing"])
def test_the_newest_that_is_whole_is_taken_and_others_are_named(name, how, run, capsys):
    out, go_on = run
    file = out / "checkpoint-4" / name
    whole = file.read_bytes()
    expected = (out / WEIGHTS).read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"cut": whole[:-1], "longer": whole + b"\0", "empty": b""}[how])
    found, faults = checkpoint.newest(out)
    assert found.folder.name == "checkpoint-2"
    (fault,) = faults
    assert name in fault
    if (name, how) in ((OPTIMIZER, "missing"), (checkpoint.MANIFEST, "cut")):  # the others would take as long
        (out / "metrics.jsonl.part").touch()  # it has not ended
        go_on()
        said = capsys.readouterr().out
        assert "passed over: " in said
        assert "Going on after step 2" in said
        assert (out / WEIGHTS).read_bytes() == expected
        assert checkpoint.newest(out)[0].folder.name == "checkpoint-4", "made anew in place of the damaged one"


def test_a_missing_optimizer_state_is_never_fresh(run):
    out, go_on = run
    shutil.rmtree(out / "checkpoint-2")
    (out / "checkpoint-4" / OPTIMIZER).unlink()
    before = (out / WEIGHTS).read_bytes()
    for changes in ({}, {"resume": False, "resume_from_checkpoint": str(out / "checkpoint-4")}):
        with pytest.raises(InputError, match=f"{OPTIMIZER} is missing, which its manifest names"):
            go_on(**changes)
    # Also where the manifest agrees.
    folder = out / "checkpoint-4"
    remake_manifest(folder, 4, 9)
    with pytest.raises(InputError, match=f"has no {OPTIMIZER}: a run never goes on without a part of its state"):
        go_on()
    assert (out / WEIGHTS).read_bytes() == before


def test_when_all_are_damaged_nothing_starts_afresh(run):
    out, go_on = run
    for folder in checkpoint.folders(out):
        (folder / checkpoint.STATE).write_text("{}")
    with pytest.raises(InputError, match=r"no checkpoint that is whole .* start afresh with --overwrite_output_dir"):
        go_on()


def test_a_manifest_of_a_later_version(run):
    folder = run[0] / "checkpoint-4"
    manifest = checkpoint._read_manifest(folder) | {"format": 2}
    (folder / checkpoint.MANIFEST).write_bytes(checkpoint._sealed(manifest))
    with pytest.raises(InputError, match="is of format 2, expected 1: update jindo-core"):
        checkpoint.read(folder)


def test_a_checkpoint_of_another_run_in_its_name_is_newest_by_time(run):
    """Numbers of steps don't say what was written last: a run that went back to step 2 went on from there."""
    out, _ = run
    remake_manifest(out / "checkpoint-2", 2, 3)
    assert checkpoint.newest(out)[0].folder.name == "checkpoint-2"
