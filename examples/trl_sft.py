"""TRL's SFTTrainer with an NF4 model, the fused LoRA layer and the paged optimizer. Needs `pip install trl`.

    python examples/trl_sft.py my-run
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import jindo_core as jc
from jindo_core.integrations import register_fused_lora

ROWS = [
    {"prompt": "하늘은 무슨 색인가요?", "completion": " 파란색이에요."},
    {"prompt": "물은 몇 도에서 끓나요?", "completion": " 100도에서 끓어요."},
]


def main(folder: str) -> None:
    torch.manual_seed(0)
    tokenizer = characters()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = jc.patch_model(AutoModelForCausalLM.from_config(config))
    arguments = SFTConfig(
        folder, max_steps=12, per_device_train_batch_size=2, logging_steps=4, learning_rate=1e-2, bf16=False,
        use_cpu=not torch.cuda.is_available(), report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=register_fused_lora(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")),
        optimizer_cls_and_kwargs=(jc.PagedAdamW, {"lr": 1e-2, "weight_decay": 0.0}),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    trainer.save_model(folder)  # the adapter, in PEFT's format


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer made in place: a token a character."""
    letters = sorted({letter for row in ROWS for text in row.values() for letter in text})
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "my-run")
