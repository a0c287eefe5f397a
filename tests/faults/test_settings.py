"""A checkpoint of another run is refused by the name of what differs; what may differ is said."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from jindo_core import checkpoint, prepare
from jindo_core import step as stepping
from jindo_core import train as training
from jindo_core.adapters import WEIGHTS
from jindo_core.config import resolve_train_config
from jindo_core.errors import InputError, Stopped
from jindo_core.resume import FIXED
from jindo_core.run_record import choose_output_dir, read_run
from jindo_core.train import train

TIGHT = 7.5
"""MB beside the process, in which a step of these runs finds no room as it is, and does with layers run twice."""


@pytest.fixture
def stopped(settings, stop_after, tmp_path, capsys):
    """A run that was stopped after step 4."""
    stop_after(4)
    with pytest.raises(Stopped):
        train(*settings("out"))
    capsys.readouterr()
    return tmp_path / "out"


OTHERS = {
    "lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": "q_proj", "use_rslora": True, "quantize": "none",
    "double_quant": False, "dtype": "bf16", "optim": "paged_adamw_8bit", "batch_size": 12, "micro_batch_size": 8,
    "seed": 1, "packing": True, "group_by_length": True, "data_weights": 0.5, "val_set_size": 5,
    "max_train_samples": 20, "cutoff_len": 90, "source_max_len": 60, "target_max_len": 40, "train_on_inputs": False,
}  # fmt: skip


def test_each_fixed_setting_is_refused_by_name(stopped, settings, monkeypatch):
    """And before anything is loaded; nothing is written."""
    monkeypatch.setattr(training, "prepare", lambda *_: pytest.fail("it read on"))
    assert set(OTHERS) == set(FIXED)
    before = sorted(path.name for path in stopped.iterdir())
    for name, other in OTHERS.items():
        beside = {"source_max_len": {"target_max_len": 40}, "target_max_len": {"source_max_len": 60}}.get(name, {})
        with pytest.raises(InputError, match="checkpoint-4 was made with ") as caught:
            train(*settings("out", resume=True, **{name: other}, **beside))
        first = re.match(r"--(\w+): got ", str(caught.value))[1]
        assert first in {name, *beside, *({"cutoff_len"} if beside else ())}
    assert sorted(path.name for path in stopped.iterdir()) == before


def test_settings_that_may_change_are_said(stopped, settings, capsys):
    result = train(*settings("out", resume=True, learning_rate=1e-3, max_steps=10, save_steps=5, logging_steps=1))
    said = " ".join(capsys.readouterr().out.split())
    assert "note: --learning_rate is 0.001, it was 0.01: the run won't end as it would have" in said
    assert "note: --max_steps is 10, it was 8" in said
    assert "--save_steps" not in said
    assert result.steps == 10
    with pytest.raises(InputError, match="step 10 is done, and 5 are asked for: raise --max_steps or --num_epochs"):
        train(*settings("out", resume=True, max_steps=5))


def test_other_weights_are_refused(stopped, settings, stories260k, tmp_path):
    other = shutil.copytree(stories260k, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="the base model's weights are others than those checkpoint-4 was made with"):
        train(*settings("out", resume=True, base_model=str(other)))


def test_other_rows_are_refused_though_they_are_as_long(stopped, settings, rows):
    data = json.loads(rows.read_text())
    data[3]["output"], data[8]["output"] = data[8]["output"], data[3]["output"]
    rows.write_text(json.dumps(data))
    with pytest.raises(InputError, match="the rows are others than those checkpoint-4 was made with"):
        train(*settings("out", resume=True))


def test_the_same_model_and_rows_elsewhere_are_the_same(stopped, settings, stories260k, rows, tmp_path):
    """Paths don't count, contents do; nor does what lies where."""
    train(*settings("whole"))
    moved = {"base_model": str(shutil.copytree(stories260k, tmp_path / "m")), "offload_layers": 2}
    moved["data_path"] = str(shutil.copy(rows, tmp_path / "other.json"))
    train(*settings("out", resume=True, **moved))
    assert (stopped / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_another_number_of_threads_is_said(stopped, settings, capsys, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    train(*settings("out", resume=True))
    said = f"checkpoint-4 was made with threads {threads}, this run has {threads + 1}: rounding may differ"
    assert said in " ".join(capsys.readouterr().out.split())


# --- what gave way, and the budget ------------------------------------------------------------------------


def test_what_gave_way_gives_way_again(settings, stop_after, tmp_path, monkeypatch):
    """Smaller micro-batches round otherwise: a run that went on with the large ones would end elsewhere."""
    original, calls = stepping.backward, []

    def short_of_memory(loss):
        calls.append(1)
        if len(calls) in (2, 3, 4):  # the micro-batch twice, then checkpointing
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(loss)

    monkeypatch.setattr(stepping, "backward", short_of_memory)
    train(*settings("whole"))
    calls.clear()
    stop_after(4)
    with pytest.raises(Stopped):
        train(*settings("out"))
    assert checkpoint.newest(tmp_path / "out")[0].state["relief"] == [
        "micro_batch", "micro_batch", "checkpointing",
    ]  # fmt: skip
    monkeypatch.setattr(stepping, "backward", original)
    train(*settings("out", resume=True))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_budget_is_planned_once(settings, stop_after, tmp_path, monkeypatch):
    """What the process holds differs from start to start, and so would the micro-batch."""
    more = {"max_memory_MB": 600, "micro_batch_size": 8, "cutoff_len": 200}
    monkeypatch.setattr(prepare, "current_bytes", lambda _: 600_000_000 - prepare.CPU_PRODUCTS - 7_000_000)
    train(*settings("whole", **more))
    stop_after(4)
    with pytest.raises(Stopped):
        train(*settings("out", **more))
    state = checkpoint.newest(tmp_path / "out")[0].state
    assert state["config"]["micro_batch_size"] < state["given"]["micro_batch_size"] == 8
    monkeypatch.setattr(prepare, "current_bytes", lambda _: 100_000_000)
    train(*settings("out", resume=True, **more))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_another_budget_is_planned_anew_as_far_as_no_bit_changes(settings, stop_after, tmp_path, monkeypatch, capsys):
    """None at first; then one that moves what lies where, then one that nothing of the kind can keep."""
    train(*settings("whole"))
    stop_after(4)
    with pytest.raises(Stopped):
        train(*settings("out"))
    capsys.readouterr()

    def room(megabytes):
        held = (600 - megabytes) * 1_000_000 - prepare.CPU_PRODUCTS
        monkeypatch.setattr(prepare, "current_bytes", lambda _: held)

    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    room(0.1)
    with pytest.raises(InputError, match=r"--max_memory_MB: got 600, but the rest of this run takes .* micro_batch_"):
        train(*settings("out", resume=True, max_memory_MB=600))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    room(TIGHT)
    train(*settings("out", resume=True, max_memory_MB=600))
    said = " ".join(capsys.readouterr().out.split())
    assert "note: --max_memory_MB is 600 MB, it was none: what lies where is planned anew, and no bit" in said
    assert "note: to keep within 600 MB: " in said
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    state = checkpoint.newest(tmp_path / "out")[0].state
    assert state["given"]["max_memory_MB"] == 600
    assert state["config"]["micro_batch_size"] == 4
    assert not state["config"]["offload_head"]


# --- which folder, and which of its checkpoints -----------------------------------------------------------


def test_resume_starts_afresh_where_there_is_none_yet(settings, tmp_path, capsys):
    train(*settings("out", resume=True, max_steps=2))
    assert "yet: the run starts afresh" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(InputError, match="holds another run"):  # it ended, and left no checkpoint to go on from
        train(*settings("out", resume=True, max_steps=2))
    with pytest.raises(InputError, match=r"--resume_from_checkpoint: .*none has no checkpoint: --resume starts afresh"):
        train(*settings("none", resume_from_checkpoint="True"))
    with pytest.raises(InputError, match=r"--resume_from_checkpoint: .*checkpoint-9 is no folder"):
        train(*settings("none", resume_from_checkpoint=str(tmp_path / "checkpoint-9")))
    assert not (tmp_path / "none").exists()


def test_an_unfinished_run_is_not_begun_anew_in_silence(stopped, settings, tmp_path):
    with pytest.raises(InputError, match="holds checkpoints of a run that has not ended: --resume goes on with it"):
        train(*settings("out"))
    train(*settings("out", overwrite_output_dir=True, save_steps=5))
    assert [path.name for path in checkpoint.folders(stopped)] == ["checkpoint-5"]
    assert checkpoint.newest(stopped)[0].sequence == 1


def test_a_run_that_ended_can_be_lengthened(settings, tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    train(*settings("whole", max_steps=9, **constant))
    train(*settings("out", max_steps=6, **constant))
    train(*settings("out", max_steps=9, resume=True, **constant))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_named_checkpoint_goes_on_where_it_lies_or_elsewhere(settings, tmp_path):
    train(*settings("out"))
    whole = (tmp_path / "out" / WEIGHTS).read_bytes()
    third = str(tmp_path / "out" / "checkpoint-3")
    for out in ("out", "other"):
        train(*settings(out, resume_from_checkpoint=third))
        assert (tmp_path / out / WEIGHTS).read_bytes() == whole
    with pytest.raises(InputError, match="holds another run"):
        train(*settings("other", resume_from_checkpoint=third))


def test_a_default_folder_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora-alpaca").mkdir()
    (tmp_path / "lora-alpaca" / WEIGHTS).touch()

    def chosen(**more):
        config, explicit, _ = resolve_train_config({"base_model": "m", **more})
        return choose_output_dir(config, "output_dir" in explicit).name

    assert chosen() == chosen(resume=True) == "lora-alpaca-2"
    (tmp_path / "lora-alpaca-2" / "checkpoint-5").mkdir(parents=True)
    assert chosen(resume=True) == "lora-alpaca-2"
    assert chosen() == "lora-alpaca-3"


# --- how many are kept, and which is best -----------------------------------------------------------------


def test_the_newest_are_kept(settings, tmp_path):
    train(*settings("out", save_steps=1, save_total_limit=2, load_best_model_at_end=False))
    assert [path.name for path in checkpoint.folders(tmp_path / "out")] == ["checkpoint-7", "checkpoint-8"]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_best_is_kept_and_ends_the_run(wanted, settings, stop_after, tmp_path, monkeypatch, capsys):
    """Held-out losses by step; also where the run was stopped after the best one."""
    losses = {0: 3.0, 2: 1.0, 4: 0.5, 6: 2.0, 8: 2.5}
    log = tmp_path / "out" / "metrics.jsonl.part"
    monkeypatch.setattr(training, "held_out_sums", lambda *_, **__: (losses[log.read_text().count('"loss"')], 1))
    more = {"save_steps": 2, "eval_steps": 2, "save_total_limit": 1, "load_best_model_at_end": wanted}
    stop_after(5)
    with pytest.raises(Stopped):
        train(*settings("out", **more))
    result = train(*settings("out", **more, resume=True))
    out = tmp_path / "out"
    said = "checkpoint-4 was measured best, 0.5000 to 2.5000: its adapter is kept"
    assert (said in " ".join(capsys.readouterr().out.split())) is wanted
    assert (result.loss_before, result.loss_after) == (3.0, 0.5 if wanted else 2.5)
    assert read_run(out).results["adapter_of_step"] == result.adapter_step == (4 if wanted else 8)
    assert [path.name for path in checkpoint.folders(out)] == ["checkpoint-4", "checkpoint-8"]
    tensors = [load_file(path / WEIGHTS) for path in (out, out / "checkpoint-4", out / "checkpoint-8")]
    assert same(tensors[0], tensors[1 if wanted else 2])
    assert not same(tensors[1], tensors[2])


def test_a_best_checkpoint_that_fails_leaves_the_best_before(settings, tmp_path, monkeypatch):
    """Step 4 is measured best and can't be saved: the one of step 2 is not rotated away for it."""
    losses = {0: 3.0, 2: 1.0, 4: 0.5, 6: 2.0, 8: 2.5}
    log, original = tmp_path / "out" / "metrics.jsonl.part", checkpoint.write
    monkeypatch.setattr(training, "held_out_sums", lambda *_, **__: (losses[log.read_text().count('"loss"')], 1))

    def write(output_dir, step, *given, **more):
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(output_dir, step, *given, **more)

    monkeypatch.setattr(checkpoint, "write", write)
    more = {"save_steps": 2, "eval_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True}
    result = train(*settings("out", **more))
    out = tmp_path / "out"
    assert [path.name for path in checkpoint.folders(out)] == ["checkpoint-2", "checkpoint-8"]
    assert (result.loss_after, result.adapter_step) == (1.0, 2)
    assert same(load_file(out / WEIGHTS), load_file(out / "checkpoint-2" / WEIGHTS))
    assert checkpoint.newest(out)[0].state["run"]["best"] == [2, 1.0, None]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
