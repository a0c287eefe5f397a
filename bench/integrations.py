"""The same trainer around bitsandbytes' layers and around ours: plain loops, transformers' Trainer, TRL and Lightning.

Both sides have transformers' model and the same NF4 codes; peft's adapters (ours by `register_fused_lora`), but for the
loop without peft, where `patch_model` and bitsandbytes' own layers are put into the same full model and its norms are
trained. bitsandbytes' side has torch's AdamW: its own paged one needs a GPU. FSDP2 is in `fsdp.py`: it takes processes.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench import peers, steps
from bench.shapes import Shape
from bench.timing import OURS, Case
from jindo_core.integrations.patch import patch_model
from jindo_core.nf4 import NF4Linear
from jindo_core.paged_adamw import PagedAdamW

TRAINER_STEPS = 2
OPTIMIZERS: dict[bool, type[torch.optim.Optimizer]] = {True: PagedAdamW, False: torch.optim.AdamW}


def adapted(shape: Shape, weights: steps.Weights, *, ours: bool) -> nn.Module:
    """transformers' LLaMA with peft's adapters on our layers or on bitsandbytes', in training mode."""
    if not ours:
        return steps.peer(shape, weights, train=True)
    from jindo_core.integrations import register_fused_lora

    return steps.peer(shape, weights, train=True, linear=NF4Linear, register=register_fused_lora)


def optimizer_of(model: nn.Module, *, ours: bool) -> torch.optim.Optimizer:
    """Over what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return OPTIMIZERS[ours](trained, lr=1e-5, weight_decay=0.0)


def loop_call(ours: bool, shape: Shape, weights: steps.Weights, ids: Tensor) -> Callable[[int], Tensor]:
    """A step of a plain loop."""
    model = adapted(shape, weights, ours=ours)
    return steps.training_step(model, optimizer_of(model, ours=ours), ids, Tensor.backward)


def patched_call(ours: bool, shape: Shape, weights: steps.Weights, ids: Tensor) -> Callable[[int], Tensor]:
    """A step of a plain loop around a full model whose layers were swapped in place; its norms are trained."""
    model = steps.full(shape, weights)
    if ours:
        patch_model(model)
    else:
        swap_linear4bit(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return steps.training_step(model.train(), optimizer_of(model, ours=ours), ids, Tensor.backward)


def swap_linear4bit(model: nn.Module) -> None:
    """bitsandbytes' layers into the same places as patch_model's, by its own quantizer."""
    bnb = peers.load("bitsandbytes")
    for path, layer in [(path, m) for path, m in model.named_modules() if type(m) is nn.Linear]:
        if path == "lm_head":
            continue
        with torch.device("meta"):
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4"
            )
        new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=new)
        model.set_submodule(path, new.to(layer.weight.device))


def trainer_call(ours: bool, shape: Shape, weights: steps.Weights, ids: Tensor) -> Callable[[int], Tensor]:
    """`Trainer.train()` of TRAINER_STEPS steps, what it does before and after them included."""
    transformers = peers.load("transformers")
    model = adapted(shape, weights, ours=ours)
    rows = [{"input_ids": ids[0], "labels": ids[0]}] * TRAINER_STEPS
    arguments = transformers.TrainingArguments(tempfile.mkdtemp(), **_settings(ids))

    def train(_: int) -> Tensor:
        return _trained(transformers.Trainer(model, arguments, train_dataset=rows, **_optimizer(ours)))

    return train


def sft_call(ours: bool, shape: Shape, weights: steps.Weights, ids: Tensor) -> Callable[[int], Tensor]:
    """TRL's `SFTTrainer.train()` of TRAINER_STEPS steps on rows that are tokens already."""
    trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    model = adapted(shape, weights, ours=ours)
    rows = datasets.Dataset.from_list([{"input_ids": ids[0].tolist()}] * TRAINER_STEPS)
    arguments = trl.SFTConfig(
        tempfile.mkdtemp(), bf16=False, gradient_checkpointing=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, **_settings(ids),
    )  # fmt: skip

    def train(_: int) -> Tensor:
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=rows, processing_class=_tokenizer(), **_optimizer(ours)
        )
        return _trained(trainer)

    return train


def _settings(ids: Tensor) -> dict[str, Any]:
    return {
        "max_steps": TRAINER_STEPS, "per_device_train_batch_size": 1, "save_strategy": "no", "learning_rate": 1e-5,
        "use_cpu": ids.device.type == "cpu", "report_to": "none", "disable_tqdm": True, "logging_steps": 10**9,
    }  # fmt: skip


def _optimizer(ours: bool) -> dict[str, Any]:
    return {"optimizer_cls_and_kwargs": (OPTIMIZERS[ours], {"lr": 1e-5, "weight_decay": 0.0})}


def _trained(trainer: Any) -> Tensor:
    trainer.remove_callback(peers.load("transformers").PrinterCallback)
    return torch.tensor(trainer.train().training_loss)


def _tokenizer() -> Any:
    """SFTTrainer asks for one, for its end-of-text and padding."""
    tokenizers = importlib.import_module("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "<pad>": 1}, unk_token="</s>"))
    return peers.load("transformers").PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )


def lightning_call(ours: bool, shape: Shape, weights: steps.Weights, ids: Tensor) -> Callable[[int], Tensor]:
    """Lightning's `Trainer.fit()` of TRAINER_STEPS steps."""
    lightning = importlib.import_module("lightning")
    model = adapted(shape, weights, ours=ours)
    losses: list[Tensor] = []

    class Module(lightning.LightningModule):  # type: ignore[misc]  # a library without types
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            loss: Tensor = self.model(input_ids=batch, labels=batch).loss
            losses.append(loss.detach().float())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.model, ours=ours)

    module, rows = Module(), DataLoader(ids.cpu().expand(TRAINER_STEPS, -1).contiguous(), batch_size=1)

    def train(_: int) -> Tensor:
        losses.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the number of loader workers, and on logs that nobody reads
            trainer = lightning.Trainer(
                max_steps=TRAINER_STEPS, accelerator="cpu" if ids.device.type == "cpu" else "gpu", devices=1,
                logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                default_root_dir=tempfile.gettempdir(),
            )  # fmt: skip
            trainer.fit(module, rows)
        return torch.stack(losses).mean().cpu()

    return train


# name -> who makes the call, its steps
TRAINERS: dict[str, tuple[Callable[..., Callable[[int], Tensor]], int]] = {
    "peft loop": (loop_call, 1),
    "patched loop": (patched_call, 1),
    "Trainer": (trainer_call, TRAINER_STEPS),
    "TRL SFT": (sft_call, TRAINER_STEPS),
    "Lightning": (lightning_call, TRAINER_STEPS),
}


def case(what: str, shape: Shape, dtype: torch.dtype, device: torch.device, tokens: int) -> Case:
    """`what`: one of TRAINERS."""
    make, count = TRAINERS[what]
    counted = tokens * count
    weights = steps.random_weights(shape, dtype, device)
    ids = torch.randint(0, shape.vocab, (1, tokens), device=device)
    calls: dict[str, Callable[[int], Any]] = {OURS: make(True, shape, weights, ids)}
    if steps.peers_here(device):
        peers.add(calls, "bitsandbytes", functools.partial(make, False, shape, weights, ids))
    flops = steps.training_flops(shape, tokens) * count
    return Case(
        "integrations", what, f"{shape.name} seq {tokens}", flops, "TFLOP/s", "gemm", calls, rows=tokens,
        tolerance=steps.LOSSES_AGREE, tokens=counted, implementation="whole step",
    )  # fmt: skip
