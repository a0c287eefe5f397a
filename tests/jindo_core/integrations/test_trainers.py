"""PagedAdamW and NF4 models inside transformers' Trainer: saved, resumed, as if nothing had happened."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import jindo_core as jc
from jindo_core.integrations import JindoNF4Config, register_fused_lora


def rows(count):
    drawn = torch.Generator().manual_seed(3)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(128, (count, 16), generator=drawn)]


def trainer_of(saved, load, folder, *, steps, dropout=0.1, **more):
    base = load(saved("llama"), JindoNF4Config())
    torch.manual_seed(1)
    lora = register_fused_lora(LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear"))
    model = get_peft_model(base, lora)
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, save_steps=2, learning_rate=5e-3, warmup_steps=1,
        gradient_accumulation_steps=2, use_cpu=True, report_to="none", seed=11, disable_tqdm=True, logging_steps=1,
        **more,
    )  # fmt: skip
    optimizer = (jc.PagedAdamW, {"lr": 5e-3, "weight_decay": 0.01})
    return Trainer(model, arguments, train_dataset=rows(40), optimizer_cls_and_kwargs=optimizer)


class Stop(TrainerCallback):
    """Ends training behind a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_a_resumed_run_is_the_uninterrupted_one(saved, load, tmp_path):
    whole = trainer_of(saved, load, tmp_path / "whole", steps=4)
    start = trained(whole)
    whole.train()
    assert type(whole.optimizer.optimizer) is jc.PagedAdamW
    stopped = trainer_of(saved, load, tmp_path / "halves", steps=4)
    stopped.add_callback(Stop(2))
    stopped.train()
    assert stopped.state.global_step == 2
    torch.load(tmp_path / "halves" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    resumed = trainer_of(saved, load, tmp_path / "halves", steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    wanted, got = trained(whole), trained(resumed)
    assert wanted.keys() == got.keys()
    assert [name for name, value in wanted.items() if not torch.equal(got[name], value)] == []
    assert all(not torch.equal(start[name], value) for name, value in wanted.items())
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses == [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert whole.state.total_flos > 0


def test_bf16_autocast_and_checkpointing(saved, load, tmp_path):
    """Trainer's bf16=True: products in bf16, adapters in fp32."""
    trainer = trainer_of(saved, load, tmp_path, steps=2, dropout=0.0, bf16=True, gradient_checkpointing=True)
    seen = set()
    layer = trainer.model.base_model.model.model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda _, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    start = trained(trainer)
    trainer.train()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert all(value.dtype == torch.float32 for value in start.values())
    assert any(not torch.equal(start[name], value) for name, value in trained(trainer).items())


def test_a_quantized_model_without_an_adapter_is_refused_by_trainer(saved, load, tmp_path):
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(load(saved("llama"), JindoNF4Config()), TrainingArguments(tmp_path, use_cpu=True, report_to="none"))
