"""Short LoRA runs with other trainers, as their documentation says to write them: the children of bench/peer_faults.py.

python -m bench.peer_trainers PEER --job JSON     one run in this process
python -m bench.peer_trainers PEER --serve        jobs on standard input, a line each, every one in a forked child

A run writes what became of it to job["report"], outside its output folder: the step it began at, a digest of what it
trained, whether that is finite, and how many updates the optimizer's moments hold.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

STEPS, SAVE_STEPS, EPOCH = 8, 3, 5
"""A run of 8 steps, 5 to an epoch, with checkpoints after 3 and 6: both in the middle of an epoch."""


@dataclass
class Job:
    """One run and what is done to it. base: a model's folder; rows: JSON, lists of as many token ids each."""

    base: str
    rows: str
    out: str
    report: str  # JSON, written by rank 0 at the end
    progress: str  # JSON lines: a step, when, by whom
    resume: bool = False
    batch_size: int = 4
    seed: int = 1
    learning_rate: float = 1e-2
    lora_r: int = 2
    dropout: float = 0.2
    ranks: int = 1
    timeout_s: int = 0  # of a collective; 0: the peer's own
    extra: str = ""  # jit | plain_loader | on_exception | evaluate: an option of the peer's, see its function
    save_steps: int = SAVE_STEPS  # not torchtune's, which saves at the end of an epoch
    pace: float = 0.0  # seconds that a step takes longer
    nan_at: int = 0  # the gradient of one matrix is not a number in this step
    die_at: int = 0  # kill -9 inside this step
    hang_at: int = 0  # rank 1 waits in this step
    disk: tuple[int, int] = (0, -1)  # what peer_disk.c does, and at which boundary
    scratch: str = ""  # beside out, counted with it: where TMPDIR lies
    modules: str = ""  # a file for the names of all that the run imported


class Rows(Dataset):
    """Rows of token ids, under the names that a peer wants."""

    def __init__(self, path: str, names: tuple[str, str] = ("input_ids", "labels")) -> None:
        self.rows, self.names = json.loads(Path(path).read_text()), names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict.fromkeys(self.names, self.rows[index])


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


@dataclass
class Watch:
    """Counts a run's steps by the gradients of one of its matrices, and does to them what the job says."""

    job: Job
    start: int = 0
    done: int = 0
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def follow(self, model: nn.Module) -> None:
        self.parameters = {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}
        next(iter(self.parameters.values())).register_hook(self._step)

    def _step(self, gradient: torch.Tensor) -> torch.Tensor:
        self.done += 1
        step, rank = self.start + self.done, int(os.environ.get("RANK", 0))
        library = ctypes.CDLL(None)
        row = {"step": step, "at": time.time(), "rank": rank, "pid": os.getpid()}
        if hasattr(library, "peer_disk_count"):
            row["boundaries"], row["syncs"] = library.peer_disk_count(), library.peer_disk_syncs()
        with open(self.job.progress, "a") as file:
            file.write(json.dumps(row) + "\n")
        if step == self.job.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.job.hang_at and rank == 1:
            time.sleep(1000)
        time.sleep(self.job.pace)
        return gradient * float("nan") if step == self.job.nan_at else gradient

    def report(self, optimizer: torch.optim.Optimizer) -> None:
        if int(os.environ.get("RANK", 0)):
            return
        digest = hashlib.sha256()
        for parameter in self.parameters.values():
            digest.update(parameter.detach().numpy().tobytes())
        updates = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
        Path(self.job.report).write_text(
            json.dumps(
                {
                    "start": self.start,
                    "steps": self.done,
                    "digest": digest.hexdigest(),
                    "finite": all(bool(p.isfinite().all()) for p in self.parameters.values()),
                    "updates": max(updates, default=0),
                }
            )
        )


def _peft_model(job: Job) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.base).train()  # Lightning leaves modules in the mode they come in
    lora = LoraConfig(
        r=job.lora_r, lora_alpha=4, lora_dropout=job.dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def transformers_trainer(job: Job, watch: Watch) -> None:
    """transformers' Trainer, resumed as its example scripts do it. extra: jit, its checkpoint on SIGTERM."""
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):  # type: ignore[no-untyped-def]
            watch.start = state.global_step

    set_seed(job.seed)
    more: dict[str, Any] = {"ddp_timeout": job.timeout_s} if job.timeout_s else {}
    if job.extra == "jit":
        more["enable_jit_checkpoint"] = True
    arguments = TrainingArguments(
        output_dir=job.out,
        per_device_train_batch_size=job.batch_size // job.ranks,
        max_steps=STEPS,
        save_steps=job.save_steps,
        learning_rate=job.learning_rate,
        seed=job.seed,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )
    model = _peft_model(job)
    watch.follow(model)
    trainer = Trainer(model, arguments, collate, Rows(job.rows), callbacks=[Begin()])
    last = get_last_checkpoint(job.out) if job.resume and Path(job.out).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(job.out)
    watch.report(_inner(trainer.optimizer))


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper


def lightning_trainer(job: Job, watch: Watch) -> None:
    """Lightning's Trainer. extra: plain_loader (torch's instead of torchdata's), on_exception (its checkpoint then)."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
    from torch.utils.data import DataLoader
    from torchdata.stateful_dataloader import StatefulDataLoader

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = _peft_model(job)

        def on_train_start(self) -> None:
            watch.start = self.trainer.global_step

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=job.learning_rate)

    lightning.seed_everything(job.seed)
    module = Module()
    watch.follow(module)
    saves: list[Any] = [
        ModelCheckpoint(job.out, "{step}", every_n_train_steps=job.save_steps, save_top_k=-1, save_last=True)
    ]
    if job.extra == "on_exception":
        saves.append(OnExceptionCheckpoint(job.out))
    strategy: Any = "auto"
    if job.ranks > 1:
        import datetime

        from lightning.pytorch.strategies import DDPStrategy

        limit = {"timeout": datetime.timedelta(seconds=job.timeout_s)} if job.timeout_s else {}
        strategy = DDPStrategy(process_group_backend="gloo", **limit)
    trainer = lightning.Trainer(
        default_root_dir=job.out, max_steps=STEPS, callbacks=saves, accelerator="cpu", devices=job.ranks,
        strategy=strategy, logger=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    loader = DataLoader if job.extra == "plain_loader" else StatefulDataLoader
    rows = loader(Rows(job.rows), job.batch_size // job.ranks, shuffle=True, collate_fn=collate)
    trainer.fit(module, rows, ckpt_path="last" if job.resume else None)
    if trainer.is_global_zero:
        trainer.save_checkpoint(Path(job.out) / "final.ckpt")
    watch.report(_inner(trainer.optimizers[0]))


def torchtune_dataset(_tokenizer: Any, path: str) -> Rows:
    return Rows(path, ("tokens", "labels"))


class NoText:
    """Stands where torchtune's recipe wants a tokenizer: the rows are token ids already."""

    pad_id = 0


@functools.cache
def _recipe() -> Any:
    """The recipe's file: its folder refuses to be imported as a package, and `tune run` takes it by path, too."""
    folder = Path(str(importlib.util.find_spec("recipes").origin)).parent  # type: ignore[union-attr]
    found = importlib.util.spec_from_file_location("lora_recipe", folder / "lora_finetune_single_device.py")
    module = importlib.util.module_from_spec(found)  # type: ignore[arg-type]
    found.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def torchtune_recipe(job: Job, watch: Watch) -> None:
    """torchtune's lora_finetune_single_device. It saves at the end of an epoch: 5 steps; here 3 epochs of them."""
    from omegaconf import OmegaConf

    shape = json.loads((Path(job.base) / "config.json").read_text())
    config = OmegaConf.create(
        {
            "output_dir": job.out, "device": "cpu", "dtype": "fp32", "seed": job.seed, "shuffle": True,
            "compile": False,
            "model": {
                "_component_": "torchtune.models.llama2.lora_llama2", "lora_attn_modules": ["q_proj", "v_proj"],
                "apply_lora_to_mlp": False, "apply_lora_to_output": False, "vocab_size": shape["vocab_size"],
                "num_layers": shape["num_hidden_layers"], "num_heads": shape["num_attention_heads"],
                "num_kv_heads": shape["num_key_value_heads"], "embed_dim": shape["hidden_size"],
                "intermediate_dim": shape["intermediate_size"], "max_seq_len": 128, "lora_rank": job.lora_r,
                "lora_alpha": 4, "lora_dropout": job.dropout,
            },
            "tokenizer": {"_component_": "peer_trainers.NoText"},
            "checkpointer": {
                "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": job.base,
                "checkpoint_files": ["model.safetensors"], "output_dir": job.out, "model_type": "LLAMA2",
                "adapter_checkpoint": None, "recipe_checkpoint": None,
            },
            "resume_from_checkpoint": job.resume, "save_adapter_weights_only": False,
            "dataset": {"_component_": "peer_trainers.torchtune_dataset", "path": job.rows},
            "epochs": 3, "max_steps_per_epoch": None, "batch_size": job.batch_size, "gradient_accumulation_steps": 1,
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": job.learning_rate},
            "lr_scheduler": {
                "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                "num_warmup_steps": 2,
            },
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}, "clip_grad_norm": 1.0,
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": f"{job.out}/logs",
            },
            "log_every_n_steps": 1,
        }
    )  # fmt: skip
    recipe = _recipe().LoRAFinetuneRecipeSingleDevice(config)
    recipe.setup(config)
    watch.start = recipe.epochs_run * recipe._steps_per_epoch
    watch.follow(recipe._model)
    recipe.train()
    recipe.cleanup()
    watch.report(recipe._optimizer)


PEERS = {"transformers": transformers_trainer, "lightning": lightning_trainer, "torchtune": torchtune_recipe}


def run(peer: str, job: Job) -> None:
    """Train, with the disk as the job says."""
    torch.set_num_threads(1)
    if job.scratch:
        Path(job.scratch).mkdir(parents=True, exist_ok=True)
        import tempfile

        os.environ["TMPDIR"] = tempfile.tempdir = job.scratch
    library = ctypes.CDLL(None)
    if hasattr(library, "peer_disk_arm"):
        library.peer_disk_arm(f"{Path(job.out).parent}/".encode(), *(ctypes.c_long(number) for number in job.disk))
    PEERS[peer](job, Watch(job))
    if job.modules:
        Path(job.modules).write_text("\n".join(sys.modules))


def _forked(peer: str, job: Job, log: str, limit: float) -> int | None:
    """The job in a child, its words in a file; its exit code, or minus a signal, or None after `limit` seconds."""
    pid = os.fork()
    if pid == 0:
        words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(words, 1)
        os.dup2(words, 2)
        code = 1
        try:
            run(peer, job)
            code = 0
        finally:  # whatever the run ended with, this child must not go on with its parent's loop
            if code:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _warm(peer: str) -> dict[str, str]:
    """Import what the peer's runs need, so that children find it; the versions of that."""
    from importlib.metadata import version

    names = {
        "transformers": ("transformers", "peft", "accelerate", "safetensors"),
        "lightning": ("lightning", "torchdata", "peft"),
        "torchtune": ("torchtune", "torchao", "torchdata", "safetensors"),
    }
    found = {name: version(name) for name in ("torch", *names[peer])}
    if peer == "torchtune":
        _recipe()
    else:
        for name in ("peft", "transformers.models.llama.modeling_llama", "transformers.trainer"):
            importlib.import_module(name)
    if peer == "lightning":
        importlib.import_module("lightning")
        importlib.import_module("torchdata.stateful_dataloader")
    return found


def _import(names: list[str]) -> None:
    """What a child has imported, so that the next ones need not; a run here would leave autograd unfit for forks."""
    packages = ("transformers", "peft", "accelerate", "lightning", "torch", "torchtune", "torchmetrics")
    for name in names:
        if name.partition(".")[0] in packages:
            importlib.import_module(name)


def _jobs() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--job")
    parser.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    if not arguments.serve:
        run(arguments.peer, as_job(json.loads(arguments.job)))
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"versions": _warm(arguments.peer)}), file=answers, flush=True)
    for asked in _jobs():
        job = as_job(asked["job"])
        code = _forked(arguments.peer, job, asked["log"], asked["limit"])
        if job.modules and code == 0:
            _import(Path(job.modules).read_text().split())
        print(json.dumps({"code": code}), file=answers, flush=True)


def as_job(given: dict[str, Any]) -> Job:
    known = {each.name for each in fields(Job)}
    return Job(**{name: value for name, value in given.items() if name in known})


if __name__ == "__main__":
    main()
