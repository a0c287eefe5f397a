"""The main job: load a LLaMA in NF4, train LoRA adapters on instructions, save and check the adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from jindo_core import embedded
from jindo_core.adapters import CONFIG, WEIGHTS, save_adapter
from jindo_core.config import TrainConfig
from jindo_core.data.examples import Example, collate, encode_all, epoch_batches
from jindo_core.data.records import Record, bundled_path, read_records, split_records
from jindo_core.data.templates import Template, load_template
from jindo_core.errors import InputError, TrainingError
from jindo_core.evaluate import held_out_loss
from jindo_core.formats import open_checkpoint
from jindo_core.generation import generate
from jindo_core.hub import resolve_data, resolve_model
from jindo_core.loader import load_model, pick_device, pick_dtype
from jindo_core.lora import attach_lora
from jindo_core.memory import (
    CUDA_CONTEXT,
    Relief,
    current_bytes,
    is_out_of_memory,
    job_of,
    keep_budget,
    peak_bytes,
    sizes_of,
    within_budget,
)
from jindo_core.model import LlamaConfig, LlamaForCausalLM
from jindo_core.optim import build_optimizer, learning_rate_factor
from jindo_core.pages import PageStore
from jindo_core.plan import Job as MemoryJob
from jindo_core.plan import plan
from jindo_core.progress import TrainingView, draw_loss, loading_bar
from jindo_core.recompute import CheckpointOffload
from jindo_core.run_record import RunRecord, choose_output_dir, write_run
from jindo_core.tokenizer import Tokenizer, load_tokenizer

METRICS = "metrics.jsonl"
_NOT_FINITE = "no adapter was saved; lower --learning_rate, use --dtype fp32, or look at the data"

MOST_SKIPPED = 5
"""Steps in a row without a finite gradient that end a run."""

ANSWER_TOKENS = 64
"""Tokens of the sample answers, before and after training."""


@dataclass(frozen=True)
class TrainResult:
    """output_dir: where the adapter lies. Losses are on the held-out rows, NaN without any."""

    output_dir: Path
    steps: int
    loss_before: float
    loss_after: float
    tokens_per_second: float
    peak_bytes: int


@dataclass(frozen=True)
class _Job:
    """A run's parts once everything was read and checked. resident_states: bytes of the optimizer's, or "auto"."""

    config: TrainConfig
    resident_states: int | str
    model: LlamaForCausalLM
    tokenizer: Tokenizer
    template: Template
    examples: list[Example]
    held_out: list[Example]
    probe: Record | None


def train(config: TrainConfig, explicit: frozenset[str] = frozenset()) -> TrainResult:
    """Run a training job as `config` says.

    Args:
        explicit: names of the settings that the user gave; an output_dir among them is never renamed.
    Raises:
        InputError: a path, file, row or setting that can't be used; nothing was written.
        TrainingError: the loss or a gradient stopped being finite; no adapter was written, and one that the
            folder held is as it was. metrics.jsonl.part shows how far the run came.
    """
    view = TrainingView()
    output_dir = choose_output_dir(config, "output_dir" in explicit)
    job = _prepare(config, view)
    config = job.config
    part = output_dir / f"{METRICS}.part"
    with _open_log(part) as log:
        history = _History(log)
        before = _measure(job, config, history, step=0)
        first_answer = _answer(job)
        speed, steps = _loop(job, config, view, history)
        after = _measure(job, config, history, step=steps)
    answers = [] if job.probe is None else [(_one_line(job.probe), first_answer, _answer(job))]
    view.results(before, after, len(job.held_out), answers)
    # Until here a run that was in the folder before is whole, and one that fails leaves no more than its log.
    save_adapter(job.model, output_dir, base_model=_lasting(config.base_model) or embedded.HUB_ID)
    os.replace(part, output_dir / METRICS)
    result = TrainResult(output_dir, steps, before, after, speed, peak_bytes(job.model.device))
    _record(config, result)
    draw_loss(history.rows, output_dir / "loss.png")
    _farewell(view, config, result, job.probe)
    return result


def _open_log(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"output_dir {path.parent} can't be written ({error.strerror}): give another folder") from None


# --- before the first step ------------------------------------------------------------------------------


def _prepare(config: TrainConfig, view: TrainingView) -> _Job:
    """Read and check everything; cheap checks first, the model last."""
    if config.base_model is None:
        view.say(f"Base model: {embedded.NAME}, embedded default (135M weights; it was made for English)")
    template = load_template(config.prompt_template_name)
    if config.data_path is None:
        view.notice("no --data_path: the bundled Korean instructions are used")
    records = read_records(bundled_path() if config.data_path is None else resolve_data(config.data_path))
    training, held_out, warning = split_records(records, config.val_set_size, config.seed)
    if warning:
        view.notice(warning)
    if config.offload_folder is not None:
        PageStore(config.offload_folder).close()  # one that can't be written to is an error now
    path = resolve_model(config.base_model)
    tokenizer = load_tokenizer(path)
    architecture = open_checkpoint(path).config
    tokenizer.check(architecture.vocab_size)
    context = architecture.max_position_embeddings
    if config.cutoff_len > context:
        view.notice(f"cutoff_len {config.cutoff_len} is beyond the model's context: {context} is used")
    cutoff = min(config.cutoff_len, context)
    examples = _encode(training, tokenizer, template, config, cutoff, view)
    if not examples:
        raise InputError(
            f"no training row has a supervised token within cutoff_len {cutoff}: raise --cutoff_len or check the data"
        )
    held_out_examples = _encode(held_out, tokenizer, template, config, cutoff, view)
    config, planned = _plan(config, architecture, examples, view)
    model = _load(path, config, view)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    view.say(
        f"{len(examples)} training rows, {len(held_out)} held out; {trainable:,} trainable parameters; "
        f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
    )
    probe = _choose_probe(held_out or training, tokenizer, template, context)
    resident = "auto" if planned.resident_states is None else planned.resident_states
    return _Job(config, resident, model, tokenizer, template, examples, held_out_examples, probe)


def _plan(
    config: TrainConfig, architecture: LlamaConfig, examples: Sequence[Example], view: TrainingView
) -> tuple[TrainConfig, MemoryJob]:
    """What the budget makes necessary; shows the memory plan."""
    device = pick_device(config.device)
    itemsize = pick_dtype(config.dtype, device).itemsize
    length = -(-max(len(example.input_ids) for example in examples) // 8) * 8
    process = CUDA_CONTEXT if device.type == "cuda" else current_bytes(device)
    rows = min(config.micro_batch_size, len(examples))
    wanted = dataclasses.replace(
        job_of(config, sizes_of(architecture), length=length, itemsize=itemsize, context=process),
        micro_batch=rows, on_cuda=device.type == "cuda",
    )  # fmt: skip
    config, planned, changes = within_budget(config, wanted)
    for change in changes:
        view.notice(f"to keep within {config.max_memory_MB} MB: {change.text} ({change.cost})")
    view.plan(plan(planned), "CUDA context" if device.type == "cuda" else "Python and its libraries")
    keep_budget(device, config.max_memory_MB)
    return config, planned


def _load(path: Path, config: TrainConfig, view: TrainingView) -> LlamaForCausalLM:
    """The model with its adapter attached, as the settings say what is kept where."""
    torch.manual_seed(config.seed)
    with loading_bar(view.console) as on_progress:
        model = load_model(
            path, quantize=config.quantize, double_quant=config.double_quant, dtype=config.dtype, device=config.device,
            offload_layers=config.offload_layers, offload_embedding=config.offload_embedding,
            offload_folder=_place(config), on_progress=on_progress,
        )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach_lora(
            model,
            config.lora_r,
            config.lora_alpha,
            config.lora_dropout,
            config.lora_target_modules,
            use_rslora=config.use_rslora,
        )
    for message in caught:
        view.notice(str(message.message))
    stack = model.model
    stack.checkpointed_layers = len(stack.layers) if config.gradient_checkpointing else config.checkpointed_layers
    if config.offload_checkpoints:
        stack.checkpoint_offload = CheckpointOffload(_place(config))
    return model


def _place(config: TrainConfig) -> str:
    return config.offload_folder or "host"


def _choose_probe(
    records: Sequence[Record], tokenizer: Tokenizer, template: Template, context: int
) -> Record | None:
    """The first row whose prompt leaves room for an answer within the model's context; None if there is none."""
    for record in records[:100]:
        if len(tokenizer.encode(template.prompt(record.instruction, record.input))) + ANSWER_TOKENS <= context:
            return record
    return None


def _encode(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: Template,
    config: TrainConfig,
    cutoff: int,
    view: TrainingView,
) -> list[Example]:
    examples, problems = encode_all(
        records, tokenizer, template, cutoff_len=cutoff, train_on_inputs=config.train_on_inputs
    )
    for problem in problems:
        view.notice(problem)
    return examples


# --- the loop -------------------------------------------------------------------------------------------


class _History:
    """The rows of metrics.jsonl, written as they come."""

    def __init__(self, log: TextIO) -> None:
        self.rows: list[dict[str, Any]] = []
        self._log = log

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        # NaN is no JSON: a figure that is not there is null.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._log.write(json.dumps(clean) + "\n")
        self._log.flush()


def _loop(job: _Job, config: TrainConfig, view: TrainingView, history: _History) -> tuple[float, int]:
    """Train; returns tokens a second over the whole loop, and the steps done."""
    model = job.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(
        config.optim, parameters, lr=config.learning_rate, weight_decay=config.weight_decay,
        resident_bytes=job.resident_states, store=_place(config),
    )  # fmt: skip
    relief = Relief(model, optimizer, config.micro_batch_size, _place(config))
    skipped = _Skipped()
    total = count_steps(len(job.examples), config)
    warmup = min(config.warmup_steps, total // 10)
    model.train()
    view.start(total)
    started, evaluating, tokens = time.perf_counter(), 0.0, 0
    try:
        for step, batches in zip(range(1, total + 1), _step_batches(job.examples, config), strict=False):
            rate = config.learning_rate * learning_rate_factor(
                config.lr_scheduler_type, step - 1, total, warmup
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = _survive(job, batches, step, relief, view)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            if skipped.count(step, float(norm), view):
                optimizer.zero_grad(set_to_none=True)
                continue
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += sum(len(job.examples[i].input_ids) for batch in batches for i in batch)
            seconds = time.perf_counter() - started - evaluating
            row = {
                "step": step,
                "epoch": round(step * config.num_epochs / total, 4) if config.max_steps < 1 else None,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": float(norm),
                "skipped_steps": skipped.total,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "memory_bytes": current_bytes(model.device),
                "seconds": seconds,
            }
            history.add(row)
            view.step(row, total, seconds / step * (total - step), step % config.logging_steps == 0)
            if step % config.eval_steps == 0 and step < total:
                pause = time.perf_counter()
                view_loss = _measure(job, config, history, step)
                evaluating += time.perf_counter() - pause
                view.say(f"step {step}/{total}  held-out loss {view_loss:.4f}")
        seconds = time.perf_counter() - started - evaluating
        if skipped.total == total:
            raise TrainingError(f"no step had a finite gradient: {_NOT_FINITE}")
    finally:
        view.stop()
    model.eval()
    return tokens / seconds, total


def count_steps(examples: int, config: TrainConfig) -> int:
    """Optimizer steps of the run: max_steps if given, else num_epochs over the examples."""
    if config.max_steps > 0:
        return config.max_steps
    batches = -(-examples // config.micro_batch_size)
    per_epoch = -(-batches // config.accumulation_steps)
    return max(math.ceil(per_epoch * config.num_epochs), 1)


def _step_batches(examples: Sequence[Example], config: TrainConfig) -> Iterator[list[list[int]]]:
    """The micro-batches (row numbers) of one step after another, epoch after epoch, without end."""
    lengths = [len(example.input_ids) for example in examples]
    epoch = 0
    while True:
        batches = epoch_batches(
            lengths,
            config.micro_batch_size,
            group_by_length=config.group_by_length,
            seed=config.seed,
            epoch=epoch,
        )
        size = config.accumulation_steps
        for start in range(0, len(batches), size):
            yield batches[start : start + size]
        epoch += 1


@dataclass
class _Skipped:
    """Steps whose gradient was not finite: they change nothing, and so many in a row end the run."""

    total: int = 0
    running: int = 0

    def count(self, step: int, norm: float, view: TrainingView) -> bool:
        """Whether this step is to be skipped."""
        if math.isfinite(norm):
            self.running = 0
            return False
        self.total, self.running = self.total + 1, self.running + 1
        if self.running >= MOST_SKIPPED:
            raise TrainingError(
                f"the gradient at step {step} is {norm}, as at {self.running - 1} steps before it: {_NOT_FINITE}"
            )
        view.notice(f"the gradient at step {step} is {norm}: the step is skipped")
        return True


def _survive(job: _Job, batches: list[list[int]], step: int, relief: Relief, view: TrainingView) -> float:
    """`_accumulate`, tried again with less in memory each time that it runs out."""
    while True:
        try:
            return _accumulate(job, _cut(batches, relief.micro_batch), step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Out here the failed step's graph is gone with its exception.
        job.model.zero_grad(set_to_none=True)
        done = relief.give_way()
        if job.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if done is None:
            raise TrainingError(
                f"step {step} is out of memory at micro-batch 1 with everything offloaded: lower --cutoff_len or "
                "--lora_r; jindo-core plan shows what takes it"
            )
        view.notice(f"step {step} ran out of memory: {done}; the step is tried again")


def _cut(batches: list[list[int]], most: int) -> list[list[int]]:
    """The same rows in micro-batches of at most `most`."""
    return [batch[i : i + most] for batch in batches for i in range(0, len(batch), most)]


def _accumulate(job: _Job, batches: list[list[int]], step: int) -> float:
    """Forward and backward of one step; returns its loss. Every supervised token weighs the same."""
    collated = [collate([job.examples[i] for i in batch], job.tokenizer.pad_id) for batch in batches]
    counted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in collated)
    device = job.model.device
    parts = []
    for batch in collated:
        # No attention mask: padding is on the right, where no causal token sees it.
        part = job.model(
            batch["input_ids"].to(device), labels=batch["labels"].to(device), num_items_in_batch=counted
        ).loss
        assert part is not None
        backward(part)
        parts.append(part.detach())
    # Looked at once a step: on a GPU it waits for all that was launched.
    loss = torch.stack(parts).sum().item()
    if not math.isfinite(loss):
        raise TrainingError(f"the loss at step {step} is {loss}: {_NOT_FINITE}")
    return loss


def backward(loss: Tensor) -> None:
    """The backward pass on this thread. Handing a GPU's nodes to autograd's own costs a quarter of a short step's."""
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()


def _measure(job: _Job, config: TrainConfig, history: _History, step: int) -> float:
    """Held-out loss, also written to the history."""
    if not job.held_out:
        return math.nan
    loss = held_out_loss(
        job.model, job.held_out, batch_size=config.micro_batch_size, pad_id=job.tokenizer.pad_id
    )
    history.add({"step": step, "eval_loss": loss})
    return loss


# --- after the last step --------------------------------------------------------------------------------


def _answer(job: _Job) -> str:
    """A greedy answer to the probe; empty where no row serves as one."""
    if job.probe is None:
        return ""
    prompt = job.template.prompt(job.probe.instruction, job.probe.input)
    return generate(job.model, job.tokenizer, prompt, max_new_tokens=ANSWER_TOKENS)


def _one_line(record: Record) -> str:
    text = " / ".join(part for part in (record.instruction, record.input) if part)
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:99] + "…"


def _record(config: TrainConfig, result: TrainResult) -> None:
    results = {
        "steps": result.steps,
        "held_out_loss_before": None if math.isnan(result.loss_before) else result.loss_before,
        "held_out_loss_after": None if math.isnan(result.loss_after) else result.loss_after,
        "tokens_per_second": result.tokens_per_second,
        "peak_bytes": result.peak_bytes,
    }
    settings = dataclasses.asdict(config)
    template = _lasting(config.prompt_template_name) or config.prompt_template_name
    write_run(result.output_dir, RunRecord(_lasting(config.base_model), template, settings, results))


def _lasting(name: str | None) -> str | None:
    """A local path made absolute, so that the run can be used from any folder; other names as they are."""
    return str(Path(name).absolute()) if name is not None and Path(name).exists() else name


def _farewell(view: TrainingView, config: TrainConfig, result: TrainResult, probe: Record | None) -> None:
    view.say(
        f"{result.steps} steps at {result.tokens_per_second:,.0f} tokens/s; peak memory "
        f"{result.peak_bytes / 1e6:,.0f} MB"
    )
    view.say(f"Saved and read back: {result.output_dir}/{WEIGHTS}, {CONFIG}, {METRICS}, loss.png")
    base = [] if config.base_model is None else ["--base_model", config.base_model]
    asked = [("--instruction", probe.instruction), ("--input", probe.input)] if probe else [("--instruction", "…")]
    given = [part for flag, text in asked if text for part in (flag, text if len(text) < 80 else "…")]
    command = ["jindo-core", "generate", *base, "--lora_weights", str(result.output_dir), *given]
    view.say("Next: " + shlex.join(command))
