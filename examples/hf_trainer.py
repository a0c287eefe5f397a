"""transformers' Trainer with an NF4 model and the paged optimizer; stopped and resumed.

Needs `pip install peft accelerate`.

    python examples/hf_trainer.py my-run
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import jindo_core as jc
from jindo_core.integrations import register_fused_lora


def main(folder: str) -> None:
    trainer_for(folder, steps=4).train()  # leaves folder/checkpoint-4
    resumed = trainer_for(folder, steps=8)
    resumed.train(resume_from_checkpoint=True)  # the optimizer's moments come back too
    print(f"step {resumed.state.global_step}  loss {resumed.state.log_history[-2]['loss']:.3f}")


def trainer_for(folder: str, steps: int) -> Trainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    model = jc.patch_model(AutoModelForCausalLM.from_config(config))
    model = get_peft_model(model, register_fused_lora(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")))
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(128).view(8, 16)]
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, save_steps=4, logging_steps=1, learning_rate=1e-2,
        lr_scheduler_type="constant", use_cpu=not torch.cuda.is_available(), report_to="none", disable_tqdm=True,
    )  # fmt: skip
    # Its keyword arguments are PagedAdamW's: state_bits=8, resident_bytes=0, store="a folder on a disk"
    optimizer = (jc.PagedAdamW, {"lr": 1e-2, "weight_decay": 0.0, "state_bits": 32})
    return Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=optimizer)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "my-run")
