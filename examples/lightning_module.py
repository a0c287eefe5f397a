"""Lightning around a patched model. Needs `pip install lightning`.

    python examples/lightning_module.py my-run
"""

from __future__ import annotations

import sys

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

import jindo_core as jc


class Adapted(lightning.LightningModule):
    """A causal LM in NF4 with our adapter."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
        )  # fmt: skip
        self.model = jc.patch_model(AutoModelForCausalLM.from_config(config))
        jc.attach_lora(self.model, r=8, alpha=16, target_modules="all-linear")

    def training_step(self, ids: torch.Tensor, _: int) -> torch.Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return jc.PagedAdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


def main(folder: str) -> None:
    lightning.seed_everything(0)
    rows = DataLoader(torch.arange(128).view(8, 16), batch_size=4)
    module = Adapted()
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="auto", devices=1, logger=False, enable_progress_bar=False,
        default_root_dir=folder, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, rows)  # its checkpoint holds the NF4 weights, the adapter and the optimizer
    print(f"step {trainer.global_step}  loss {trainer.callback_metrics['loss']:.3f}")
    jc.save_adapter(module.model, folder)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "my-run")
