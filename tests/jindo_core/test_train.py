"""The training loop on real weights: gradients as transformers + peft, a falling loss, and what must stop it."""

from __future__ import annotations

import json
import math
import re
import tempfile
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from jindo_core import outcome, prepare
from jindo_core import step as stepping
from jindo_core import train as training
from jindo_core.config import resolve_train_config
from jindo_core.data.examples import Example
from jindo_core.errors import InputError, TrainingError
from jindo_core.feeder import StepRows
from jindo_core.loader import load_model
from jindo_core.lora import adapted_layers, attach_lora
from jindo_core.memory import Relief
from jindo_core.nf4 import NF4Linear
from jindo_core.pager import Pager
from jindo_core.parallel import ALONE
from jindo_core.run_record import read_run


@pytest.fixture
def rows(tmp_path):
    """60 alpaca rows whose answers can be learnt."""
    animals = ("cat", "dog", "bird", "fish")
    data = [
        {"instruction": f"Name the animal {i}.", "input": "", "output": f"It is a little {animals[i % 4]} named Lily."}
        for i in range(60)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(data))
    return path


def settings(model, rows, out, **changes):
    given = {
        "base_model": str(model), "data_path": str(rows), "output_dir": str(out), "batch_size": 8,
        "micro_batch_size": 4, "num_epochs": 2, "learning_rate": 1e-2, "cutoff_len": 96, "val_set_size": 8,
        "train_on_inputs": False, "prompt_template_name": "alpaca_short", "device": "cpu", "dtype": "fp32",
    }  # fmt: skip
    return resolve_train_config(given | changes)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_gradients_equal_transformers_and_peft(stories15m):
    """Loss and the gradients of every A and B, on the dequantized weights."""
    torch.manual_seed(0)
    ours = attach_lora(load_model(stories15m, dtype="fp32", device="cpu"), r=4, alpha=8, target_modules="all-linear")
    theirs = AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)).train()
    for path, layer in adapted_layers(ours):
        nn.init.normal_(layer.lora_B, std=0.05)
        their = theirs.base_model.model.get_submodule(path)
        assert isinstance(layer.base, NF4Linear)
        with torch.no_grad():
            their.base_layer.weight.copy_(layer.base.nf4.dequantize(torch.float32))
            their.lora_A["default"].weight.copy_(layer.lora_A)
            their.lora_B["default"].weight.copy_(layer.lora_B)
    ids = torch.randint(0, 32000, (2, 40))
    labels = ids.clone()
    labels[:, :15] = -100
    got, expected = ours.train()(ids, labels=labels).loss, theirs(ids, labels=labels).loss
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.backward()
    expected.backward()
    for path, layer in adapted_layers(ours):
        their = theirs.base_model.model.get_submodule(path)
        for mine, peer in ((layer.lora_A, their.lora_A), (layer.lora_B, their.lora_B)):
            torch.testing.assert_close(
                mine.grad, peer["default"].weight.grad, rtol=1e-3, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}"
            )


def test_a_run_learns_saves_and_says_so(stories15m, rows, tmp_path, capsys):
    out = tmp_path / "out"
    result = training.train(*settings(stories15m, rows, out, group_by_length=True))
    assert result.loss_after < result.loss_before - 1.0
    assert result.steps == 14  # 52 rows in micro-batches of 4, two a step: 7 steps an epoch
    files = {path.name for path in out.iterdir()}
    assert files == {
        "adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "loss.png", "jindo_run.json", "README.md"
    }  # fmt: skip
    log = metrics(out)
    steps = [row for row in log if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 15))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert log[0]["eval_loss"] == result.loss_before
    assert log[-1]["eval_loss"] == result.loss_after
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert read_run(out).prompt_template_name == "alpaca_short"
    said = capsys.readouterr().out
    for expected in ("Memory plan", "peak", "8 held-out rows", "before", "after", "read back", "Next: "):
        assert expected in said
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories15m), out)
    assert theirs is not None


def test_a_run_repeats_itself(stories260k, rows, tmp_path):
    losses = []
    for name in ("a", "b"):
        training.train(*settings(stories260k, rows, tmp_path / name, num_epochs=1, lora_dropout=0.1))
        losses.append([row["loss"] for row in metrics(tmp_path / name) if "loss" in row])
    assert losses[0] == losses[1]


def test_checkpointing_and_accumulation_change_nothing(stories260k, rows, tmp_path):
    runs = {}
    for name, changes in {
        "plain": {"micro_batch_size": 8},
        "checkpointed": {"micro_batch_size": 8, "gradient_checkpointing": True},
    }.items():
        training.train(*settings(stories260k, rows, tmp_path / name, num_epochs=1, lora_dropout=0.0, **changes))
        runs[name] = [row["loss"] for row in metrics(tmp_path / name) if "loss" in row]
    assert runs["plain"] == runs["checkpointed"]


def test_every_token_weighs_the_same_however_it_is_batched(stories260k):
    model = attach_lora(load_model(stories260k, dtype="fp32", device="cpu"), r=4)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n in (5, 30, 12, 9):
        ids = torch.randint(0, 512, (n,), generator=generator).tolist()
        examples.append(Example(ids, [-100] * (n // 2) + ids[n // 2 :]))

    relief, tokenizer = Relief(model, torch.optim.AdamW(model.parameters()), 4), SimpleNamespace(pad_id=0)
    job = SimpleNamespace(model=model, relief=relief, tokenizer=tokenizer, examples=examples, ranks=ALONE)
    gradients, losses = [], []
    for own in (StepRows(job, batches) for batches in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[1, 3], [0, 2]])):
        model.zero_grad()
        own.counted = own.supervised()
        losses.append(stepping.accumulate(job, own).item())
        gradients.append([layer.lora_B.grad.clone() for _, layer in adapted_layers(model)])
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], rel=1e-5)
        for mine, theirs in zip(gradients[0], gradients[other], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_output_dir_of_another_run_is_refused_unless_told(stories260k, rows, tmp_path):
    out = tmp_path / "out"
    training.train(*settings(stories260k, rows, out, max_steps=2))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="holds another run: give another folder, or --overwrite_output_dir"):
        training.train(*settings(stories260k, rows, out, max_steps=2))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    training.train(*settings(stories260k, rows, out, max_steps=3, overwrite_output_dir=True))
    assert len([row for row in metrics(out) if "loss" in row]) == 3
    config, _, _ = settings(stories260k, rows, out)
    assert training.choose_output_dir(config, named=False) == tmp_path / "out-2"
    (tmp_path / "file").touch()
    config, _, _ = settings(stories260k, rows, tmp_path / "file")
    with pytest.raises(InputError, match="is a file, expected a folder"):
        training.choose_output_dir(config, named=True)


def test_bad_input_leaves_nothing_behind(stories260k, rows, tmp_path):
    out = tmp_path / "out"
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    lacking = tmp_path / "lacking.json"
    lacking.write_text('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]')
    for changes, message in (
        ({"data_path": str(empty)}, "empty|no rows"),
        ({"data_path": str(lacking)}, "row 2"),
        ({"data_path": str(tmp_path / "none.json")}, "does not exist"),
        ({"base_model": str(tmp_path / "none")}, "does not exist"),
        ({"lora_target_modules": "[Wqkv]"}, "match no linear layer"),
        ({"cutoff_len": 16}, "no training row has a supervised token"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            training.train(*settings(stories260k, rows, out, **changes))
        assert "\n" not in str(caught.value)
        assert not out.exists()


def test_a_held_out_row_beyond_the_context_does_not_stop_a_run(stories260k, tmp_path):
    long = "word " * 2000
    data = [{"instruction": long, "input": "", "output": "x"}] * 10
    data += [{"instruction": f"Name {i}", "input": "", "output": "It is Lily."} for i in range(30)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(data))
    for seed in (1, 2, 3):
        out = tmp_path / f"out{seed}"
        training.train(*settings(stories260k, path, out, max_steps=1, seed=seed, batch_size=4, learning_rate=1e-3))
        assert (out / "adapter_model.safetensors").exists()


def test_a_folder_that_can_not_be_written_is_refused_before_the_model_loads(stories260k, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "load_model", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't be made"):
        training.train(*settings(stories260k, rows, tmp_path / "file" / "out"))


def test_a_failed_run_blocks_no_retry_and_spares_the_run_it_would_replace(stories260k, rows, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def fail(*_):
        raise TrainingError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(stepping, "accumulate", fail)
        with pytest.raises(TrainingError):
            training.train(*settings(stories260k, rows, out))
    training.train(*settings(stories260k, rows, out, max_steps=2))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(stepping, "accumulate", fail)
        with pytest.raises(TrainingError):
            training.train(*settings(stories260k, rows, out, overwrite_output_dir=True))
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".part"}
    assert after == before


def test_a_gradient_that_is_not_finite_stops_the_run(stories260k, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(TrainingError, match="gradient at step 5 is inf, and 4 steps before it failed so: no adapter"):
        training.train(*settings(stories260k, rows, tmp_path / "out"))
    with pytest.raises(TrainingError, match="no step had a finite gradient: no adapter"):
        training.train(*settings(stories260k, rows, tmp_path / "out", max_steps=3))


def test_a_loss_that_is_not_finite_costs_its_step(stories260k, rows, tmp_path, monkeypatch, capsys):
    original, calls = stepping.accumulate, []

    def poisoned(job, batches):
        calls.append(1)
        loss = original(job, batches)
        return loss * math.nan if len(calls) == 2 else loss

    monkeypatch.setattr(stepping, "accumulate", poisoned)
    training.train(*settings(stories260k, rows, tmp_path / "out", max_steps=3, eval_steps=2))
    assert "the loss at step 2 is nan: the step is skipped" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 3], "step 2 is evaluated all the same"


def test_one_gradient_that_is_not_finite_costs_one_step(stories260k, rows, tmp_path, monkeypatch, capsys):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, limit):
        calls.append(1)
        if len(calls) == 2:
            parameters[0].grad.view(-1)[0] = math.nan
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    result = training.train(*settings(stories260k, rows, tmp_path / "out", max_steps=4))
    assert "the gradient at step 2 is nan: the step is skipped" in capsys.readouterr().out
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["skipped_steps"]) for row in steps if "loss" in row] == [(1, 0), (2, 1), (3, 1), (4, 1)]
    assert [row["grad_norm"] is None for row in steps if "loss" in row] == [False, True, False, False]
    assert math.isfinite(result.loss_after)


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in lines if "loss" in row]


def test_running_out_of_memory_is_survived(stories260k, rows, tmp_path, monkeypatch, capsys):
    """Every measure in turn, down to streaming: the same losses, for the same rows go into each step."""
    more = {"max_steps": 8, "lora_dropout": 0.0, "batch_size": 4, "micro_batch_size": 4, "device": "cpu"}
    training.train(*settings(stories260k, rows, tmp_path / "calm", **more))
    capsys.readouterr()
    original, calls = stepping.backward, []
    # Backward passes that fail: a step has one, then two, then four, and the failed ones come again.
    fails = {2, 4, 6, 11, 16, 21, 26}

    def short_of_memory(loss):
        calls.append(1)
        if len(calls) in fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(loss)

    monkeypatch.setattr(stepping, "backward", short_of_memory)
    training.train(*settings(stories260k, rows, tmp_path / "short", **more))
    said = capsys.readouterr().out
    for part in (
        "step 2 ran out of memory", "AdamW's moments go to the host", "micro-batches of 2", "micro-batches of 1",
        "every layer runs again", "inputs go to the host", "the head, 0 MB, is streamed",
        "layers, 0 MB, are streamed from the host from now on",
    ):  # fmt: skip
        assert part in said
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "calm"), rel=1e-4)


def test_an_update_that_runs_out_of_memory_is_tried_again(stories260k, rows, tmp_path, monkeypatch, capsys):
    """The weights end bit for bit as they do where there is memory enough."""
    more = {"max_steps": 4, "device": "cpu"}
    training.train(*settings(stories260k, rows, tmp_path / "calm", **more))
    original, calls = Pager.prepare, []

    def short_of_memory(pager):
        calls.append(pager)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(pager)

    monkeypatch.setattr(Pager, "prepare", short_of_memory)
    training.train(*settings(stories260k, rows, tmp_path / "short", **more))
    said = capsys.readouterr().out
    assert "AdamW's moments go to the host; the update is tried again" in said
    assert losses(tmp_path / "short") == losses(tmp_path / "calm")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("short", "calm")]
    assert weights[0] == weights[1]


def test_torch_s_update_that_runs_out_of_memory_stops(stories260k, rows, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(TrainingError, match="update of step 1 ran out of memory, and torch's AdamW can't be"):
        training.train(*settings(stories260k, rows, tmp_path / "out", optim="adamw_torch"))


def test_a_retry_draws_the_same_dropout(stories260k, rows, tmp_path, monkeypatch):
    more = {"max_steps": 3, "lora_dropout": 0.3, "device": "cpu", "micro_batch_size": 8}
    training.train(*settings(stories260k, rows, tmp_path / "calm", **more))
    original, calls = stepping.backward, []

    def short_of_memory(loss):
        calls.append(1)
        if len(calls) == 2:  # the moments give way, which changes nothing else
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(loss)

    monkeypatch.setattr(stepping, "backward", short_of_memory)
    training.train(*settings(stories260k, rows, tmp_path / "short", **more))
    assert losses(tmp_path / "short") == losses(tmp_path / "calm")


def test_an_adapter_that_finds_no_room_is_saved_elsewhere(stories260k, rows, tmp_path, monkeypatch):
    save = outcome.save_adapter

    def full(model, folder, **more):
        if folder == tmp_path / "out":
            raise OSError(28, "No space left on device")
        return save(model, folder, **more)

    monkeypatch.setattr(outcome, "save_adapter", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(TrainingError, match=r"No space left on device\): it is in .*jindo-adapter-") as caught:
        training.train(*settings(stories260k, rows, tmp_path / "out", max_steps=2))
    (elsewhere,) = tmp_path.glob("jindo-adapter-*")
    assert str(elsewhere) in str(caught.value)
    assert (elsewhere / "adapter_model.safetensors").exists()


def test_settings_without_effect_are_named(stories260k, rows, tmp_path, capsys):
    more = {"max_steps": 1, "offload_checkpoints": True, "offload_embedding": True}
    training.train(*settings(stories260k, rows, tmp_path / "out", **more))
    said = capsys.readouterr().out
    assert "--offload_checkpoints has no effect: no layer is checkpointed" in said
    assert "--offload_embedding has no effect: this model's embedding is its head" in said
    more = {"gradient_checkpointing": True, "checkpointed_layers": 3, "max_steps": 1}
    training.train(*settings(stories260k, rows, tmp_path / "more", **more))
    assert "--checkpointed_layers 3 has no effect: all are" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["offload_layers", "checkpointed_layers"])
def test_more_layers_than_there_are(name, stories260k, rows, tmp_path):
    with pytest.raises(InputError, match=f"--{name}: got 6, expected at most 5, the model's layers"):
        training.train(*settings(stories260k, rows, tmp_path / "out", **{name: 6}))


def test_when_nothing_is_left_to_give_way_the_run_says_so(stories260k, rows, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(stepping, "accumulate", fail)
    with pytest.raises(TrainingError, match="step 1 is out of memory at micro-batch 1 with everything"):
        training.train(*settings(stories260k, rows, tmp_path / "out"))


def test_a_folder_for_offloading_that_can_t_be_written_to(stories260k, rows, tmp_path):
    with pytest.raises(InputError, match="none can't be written to"):
        training.train(*settings(stories260k, rows, tmp_path / "out", offload_folder=str(tmp_path / "none")))
    assert not (tmp_path / "out").exists()


def test_other_failures_are_not_taken_for_want_of_memory(stories260k, rows, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(stepping, "accumulate", fail)
    with pytest.raises(RuntimeError, match="something else"):
        training.train(*settings(stories260k, rows, tmp_path / "out"))


def test_a_budget_changes_the_settings_until_the_plan_keeps_it(stories15m, rows, tmp_path, capsys, monkeypatch):
    more = {"max_steps": 2, "lora_dropout": 0.0, "batch_size": 8, "micro_batch_size": 8, "cutoff_len": 256}
    more |= {"device": "cpu", "train_on_inputs": True}
    monkeypatch.setattr(prepare, "current_bytes", lambda _: 500_000_000)
    training.train(*settings(stories15m, rows, tmp_path / "free", **more))
    planned = capsys.readouterr().out
    peak = float(re.search(r"peak +│ +([\d,.]+)", planned)[1].replace(",", ""))
    training.train(*settings(stories15m, rows, tmp_path / "kept", **more, max_memory_MB=int(peak - 4)))
    said = capsys.readouterr().out
    assert f"to keep within {int(peak - 4)} MB: " in said
    kept = float(re.search(r"peak +│ +([\d,.]+)", said)[1].replace(",", ""))
    assert kept <= peak - 4
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "free"), rel=1e-4)
    with pytest.raises(InputError, match=r"--max_memory_MB: got 9, but with everything offloaded .* raise it"):
        training.train(*settings(stories15m, rows, tmp_path / "none", **more, max_memory_MB=9))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch"])
def test_other_optimizers_and_everything_offloaded(optim, stories260k, rows, tmp_path):
    more = {"max_steps": 3, "offload_layers": 2, "offload_checkpoints": True, "checkpointed_layers": 4}
    more |= {"offload_embedding": True, "offload_folder": str(tmp_path), "lora_dropout": 0.0}
    training.train(*settings(stories260k, rows, tmp_path / optim, optim=optim, **more))
    training.train(*settings(stories260k, rows, tmp_path / "plain", max_steps=3, lora_dropout=0.0))
    assert losses(tmp_path / optim) == pytest.approx(losses(tmp_path / "plain"), rel=2e-2)


def test_generate_finds_base_and_template_in_the_run(stories260k, rows, tmp_path, capsys, monkeypatch):
    from jindo_core.config import resolve_generate_config
    from jindo_core.generation import run_generate

    monkeypatch.chdir(tmp_path)
    training.train(*settings(stories260k, rows, "out", max_steps=3))
    capsys.readouterr()
    given = {"lora_weights": "out", "instruction": "Name the animal 1.", "max_new_tokens": 8, "device": "cpu"}
    answer = run_generate(resolve_generate_config(given))
    assert capsys.readouterr().out == answer + "\n"
    (tmp_path / "out" / "jindo_run.json").unlink()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    given["prompt_template_name"] = "alpaca_short"
    assert run_generate(resolve_generate_config(given)) == answer  # peft's own key names the base
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="names no base model"):
        run_generate(resolve_generate_config(given))


def test_notices(stories260k, rows, tmp_path, capsys):
    """The seed's held-out size on a small file, and a cutoff beyond the model's context."""
    training.train(*settings(
        stories260k, rows, tmp_path / "out", max_steps=1, val_set_size=2000, cutoff_len=4096,
        lora_target_modules="[q_proj,Wqkv]",
    ))  # fmt: skip
    said = capsys.readouterr().out
    assert "cutoff_len 4096 is beyond the model's context: 512 is used" in said
    assert "[Wqkv] match nothing" in said
    assert "54 training rows, 6 held out" in said


def test_a_loss_that_is_not_finite_stops_the_run(stories260k, rows, tmp_path, monkeypatch):
    original = prepare.load_model

    def poisoned(*args, **options):
        model = original(*args, **options)
        model.model.norm.weight.data[0] = math.nan
        return model

    monkeypatch.setattr(prepare, "load_model", poisoned)
    with pytest.raises(TrainingError, match="the loss at step 5 is nan, and 4 steps before it failed so: no adapter"):
        training.train(*settings(stories260k, rows, tmp_path / "out", val_set_size=0))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_bundled_data_serves_where_none_is_named(stories260k, tmp_path, capsys):
    config, explicit, _ = resolve_train_config(
        {
            "base_model": str(stories260k), "output_dir": str(tmp_path / "out"), "max_steps": 1, "device": "cpu",
            "batch_size": 2, "cutoff_len": 512, "lora_target_modules": "[q_proj,k_proj,v_proj,o_proj]",
        }
    )  # fmt: skip
    training.train(config, explicit)
    assert "the bundled Korean instructions are used" in capsys.readouterr().out


@pytest.mark.slow
def test_smollm2_learns_the_real_korean_set(assets, smollm2_gguf, tmp_path):
    """987 rows of ShareGPT in Korean: real text, real dirt; the held-out loss falls."""
    data = assets / "data" / "ko" / "ko_sharegpt_deepl_translate_cleaned_v2.json"
    result = training.train(*settings(
        smollm2_gguf, data, tmp_path / "out", max_steps=40, micro_batch_size=4, batch_size=4, cutoff_len=256,
        learning_rate=2e-3, val_set_size=32, lora_target_modules="all-linear", group_by_length=True, dtype="auto",
    ))  # fmt: skip
    assert result.loss_after < result.loss_before - 0.2
