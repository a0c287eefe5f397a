"""The main job: load a model in NF4, train LoRA adapters on instructions, save and check the adapter."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from jindo_core import embedded
from jindo_core.adapters import CONFIG, WEIGHTS, save_adapter
from jindo_core.config import TrainConfig
from jindo_core.data.batches import BatchCursor
from jindo_core.data.examples import end_ids, prompt_ids
from jindo_core.data.packing import collate_documents
from jindo_core.data.records import Record
from jindo_core.data.templates import Template
from jindo_core.errors import InputError, TrainingError
from jindo_core.evaluate import held_out_loss
from jindo_core.generation import generate
from jindo_core.memory import current_bytes, is_out_of_memory, keep_budget, peak_bytes
from jindo_core.mmlu import Mmlu, Scores
from jindo_core.optim import learning_rate_factor
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.prepare import ANSWER_TOKENS, TrainingJob, prepare
from jindo_core.progress import TrainingView, draw_loss, typed
from jindo_core.run_record import RunRecord, choose_output_dir, keep_template, write_run

METRICS = "metrics.jsonl"
_NOT_FINITE = "no adapter was saved; lower --learning_rate, use --dtype fp32, or look at the data"

ROOM = 4 << 20
"""Bytes that must be free in output_dir before a run begins."""

MOST_SKIPPED = 5
"""Steps in a row without a finite gradient that end a run."""


@dataclass(frozen=True)
class TrainResult:
    """output_dir: where the adapter lies. Losses are on the held-out rows, NaN without any."""

    output_dir: Path
    steps: int
    loss_before: float
    loss_after: float
    tokens_per_second: float
    peak_bytes: int


def train(
    config: TrainConfig, explicit: frozenset[str] = frozenset(), notices: Sequence[str] = ()
) -> TrainResult:
    """Run a training job as `config` says.

    Args:
        explicit: names of the settings that the user gave; an output_dir among them is never renamed.
        notices: what reading the settings has to tell the user; said first.
    Raises:
        InputError: a path, file, row or setting that can't be used; nothing was written.
        TrainingError: the loss or a gradient stopped being finite; no adapter was written, and one that the
            folder held is as it was. metrics.jsonl.part shows how far the run came.
    """
    if config.preview:
        raise InputError(f"preview is {config.preview}, expected 0 to train: rows are shown by prepare.preview")
    view = TrainingView()
    for notice in notices:
        view.notice(notice)
    output_dir = choose_output_dir(config, "output_dir" in explicit)
    job = prepare(config, explicit, view)
    try:
        return _run(job, output_dir, view)
    finally:
        keep_budget(job.model.device, 0)


def _run(job: TrainingJob, output_dir: Path, view: TrainingView) -> TrainResult:
    """Measure, train, measure again, save."""
    config, part = job.config, output_dir / f"{METRICS}.part"
    with _open_log(part) as log:
        history = _History(log)
        before = _measure(job, view, history, step=0)
        first_answer = _answer(job, view)
        speed, steps = _loop(job, view, history)
        after = _measure(job, view, history, step=steps)
    answers = [] if job.probe is None else [(_one_line(job.probe), first_answer, _answer(job, view))]
    view.results(before, after, len(job.held_out), answers)
    if history.mmlu:
        first, last = history.mmlu[0], history.mmlu[-1]
        view.mmlu(first.subjects, last.subjects, first.accuracy, last.accuracy)
    # Until here a run that was in the folder before is whole, and one that fails leaves no more than its log.
    _save(job, output_dir)
    os.replace(part, output_dir / METRICS)
    result = TrainResult(output_dir, steps, before, after, speed, peak_bytes(job.model.device))
    _record(config, result, job.template)
    draw_loss(history.rows, output_dir / "loss.png")
    _farewell(view, config, result, job.probe)
    return result


def _save(job: TrainingJob, output_dir: Path) -> None:
    """The adapter to output_dir; where that fails, to a folder for temporary files: what was learnt is not lost."""
    base = _lasting(job.config.base_model) or embedded.HUB_ID
    try:
        save_adapter(job.model, output_dir, base_model=base)
    except OSError as error:
        elsewhere = save_adapter(job.model, tempfile.mkdtemp(prefix="jindo-adapter-"), base_model=base)
        raise TrainingError(
            f"the adapter could not be written to {output_dir} ({error.strerror}): it is in {elsewhere}, copy it from "
            "there"
        ) from error


def _open_log(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as probe:  # no room for an adapter: better known now
            os.posix_fallocate(probe.fileno(), 0, ROOM)
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        said = f"output_dir {path.parent} can't be written to ({error.strerror})"
        raise InputError(f"{said}: give another folder") from None


# --- the loop -------------------------------------------------------------------------------------------


class _History:
    """The rows of metrics.jsonl, written as they come; and MMLU's scores."""

    def __init__(self, log: TextIO) -> None:
        self.rows: list[dict[str, Any]] = []
        self.mmlu: list[Scores] = []
        self._log = log

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        # NaN is no JSON: a figure that is not there is null.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._log.write(json.dumps(clean) + "\n")
        self._log.flush()


def _loop(job: TrainingJob, view: TrainingView, history: _History) -> tuple[float, int]:
    """Train; returns tokens a second over the whole loop, and the steps done."""
    config, model, skipped = job.config, job.model, _Skipped()
    lengths = job.examples.lengths
    cursor = BatchCursor(
        lengths, batch_size=config.micro_batch_size, accumulation=config.accumulation_steps,
        group_by_length=config.group_by_length, seed=config.seed, portions=job.portions,
    )  # fmt: skip
    total = count_steps(cursor.steps_per_epoch, config)
    model.train()
    view.start(total)
    started, evaluating, tokens = time.perf_counter(), 0.0, 0
    try:
        for step, batches in zip(range(1, total + 1), cursor, strict=False):
            taken = _step(job, batches, step, total, skipped, view)
            tokens += sum(int(lengths[i]) for batch in batches for i in batch)
            seconds = time.perf_counter() - started - evaluating
            row = {
                "step": step,
                "epoch": round(step * config.num_epochs / total, 4) if config.max_steps < 1 else None,
                **taken,
                "skipped_steps": skipped.total,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "memory_bytes": current_bytes(model.device),
                "seconds": seconds,
            }
            history.add(row)
            logged = step % config.logging_steps == 0 or step in (1, total)
            view.step(row, total, seconds / step * (total - step), logged)
            if step % config.eval_steps == 0 and step < total:
                pause = time.perf_counter()
                held_out = _measure(job, view, history, step)
                evaluating += time.perf_counter() - pause
                if job.held_out:
                    view.say(f"step {step}/{total}  held-out loss {held_out:.4f}")
        seconds = time.perf_counter() - started - evaluating
        if skipped.total == total:
            raise TrainingError(f"no step had a finite gradient: {_NOT_FINITE}")
    finally:
        view.stop()
    model.eval()
    return tokens / seconds, total


def _step(
    job: TrainingJob, batches: list[list[int]], step: int, total: int, skipped: _Skipped, view: TrainingView
) -> dict[str, float]:
    """One optimizer step, or none where the gradient is not finite; its row of metrics."""
    config, optimizer = job.config, job.optimizer
    warmup = config.warmup(total)
    rate = config.learning_rate * learning_rate_factor(config.lr_scheduler_type, step - 1, total, warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def gradients() -> tuple[float, float]:
        """Makes them, and clips them; the loss, and their norm before."""
        loss = _accumulate(job, batches)
        return loss, float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf))

    loss, norm = job.relief.outlive(gradients, step, view.notice)
    if not skipped.count(step, loss, norm, view):
        # The norm says that all are finite: the paged ones need not look again, and wait for the device.
        known = {"finite": True} if isinstance(optimizer, PagedAdamW) else {}
        job.relief.outlive(functools.partial(optimizer.step, **known), step, view.notice, in_update=True)
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "learning_rate": rate, "grad_norm": norm}


def count_steps(per_epoch: int, config: TrainConfig) -> int:
    """Optimizer steps of the run: max_steps if given, else num_epochs of so many each."""
    return config.max_steps if config.max_steps > 0 else max(math.ceil(per_epoch * config.num_epochs), 1)


@dataclass
class _Skipped:
    """Steps whose gradient was not finite: they change nothing, and so many in a row end the run."""

    total: int = 0
    running: int = 0

    def count(self, step: int, loss: float, norm: float, view: TrainingView) -> bool:
        """Whether this step is to be skipped."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.running = 0
            return False
        what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
        self.total, self.running = self.total + 1, self.running + 1
        if self.running >= MOST_SKIPPED:
            raise TrainingError(
                f"the {what} at step {step} is {value}, and {self.running - 1} steps before it failed so: {_NOT_FINITE}"
            )
        view.notice(f"the {what} at step {step} is {value}: the step is skipped")
        return True


def _cut(batches: list[list[int]], most: int) -> list[list[int]]:
    """The same rows in micro-batches of at most `most`."""
    return [batch[i : i + most] for batch in batches for i in range(0, len(batch), most)]


def _accumulate(job: TrainingJob, batches: list[list[int]]) -> float:
    """Forward and backward of one step; returns its loss. Every supervised token weighs the same."""
    batches = _cut(batches, job.relief.micro_batch)
    collated = [collate_documents([job.examples[i] for i in batch], job.tokenizer.pad_id) for batch in batches]
    counted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch, _ in collated)
    device = job.model.device
    parts = []
    for batch, documents in collated:
        # No attention mask: padding is on the right, where no causal token sees it.
        part = job.model(
            batch["input_ids"].to(device), labels=batch["labels"].to(device), num_items_in_batch=counted,
            documents=documents,
        ).loss  # fmt: skip
        assert part is not None
        backward(part)
        parts.append(part.detach())
    # Looked at once a step: on a GPU it waits for all that was launched.
    return torch.stack(parts).sum().item()


def backward(loss: Tensor) -> None:
    """The backward pass on this thread. Handing a GPU's nodes to autograd's own costs a quarter of a short step's."""
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()


def _measure(job: TrainingJob, view: TrainingView, history: _History, step: int) -> float:
    """Held-out loss, also written to the history; and MMLU where it is asked for."""
    if job.mmlu is not None:
        _ask(job, job.mmlu, view, history, step)
    if not job.held_out:
        return math.nan

    def run() -> float:
        return held_out_loss(
            job.model, job.held_out, batch_size=job.relief.micro_batch, pad_id=job.tokenizer.pad_id
        )  # fmt: skip

    loss = job.relief.outlive(run, step, view.notice)
    history.add({"step": step, "eval_loss": loss})
    return loss


def _ask(job: TrainingJob, mmlu: Mmlu, view: TrainingView, history: _History, step: int) -> None:
    def run() -> Scores:
        with view.asking(len(mmlu.questions)) as on_progress:
            return mmlu.ask(job.model, batch_size=job.relief.micro_batch, on_progress=on_progress)

    scores = job.relief.outlive(run, step, view.notice)
    history.add({"step": step, **scores.metrics()})
    view.say(f"step {step}  MMLU accuracy {scores.accuracy:.4f}, mean of {len(scores.subjects)} subjects")
    history.mmlu.append(scores)


# --- after the last step --------------------------------------------------------------------------------


def _answer(job: TrainingJob, view: TrainingView) -> str:
    """A greedy answer to the probe; empty where no row serves as one, or no memory is left for it."""
    if job.probe is None:
        return ""
    prompt = prompt_ids(job.tokenizer, job.template, job.probe)
    ends = end_ids(job.tokenizer, job.template)
    try:
        return generate(job.model, job.tokenizer, prompt, max_new_tokens=ANSWER_TOKENS, ends=ends)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        view.notice("no memory for a sample answer: it is left out")
        return ""


def _one_line(record: Record) -> str:
    text = " / ".join(part for part in (record.instruction, record.input) if part)
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:99] + "…"


def _record(config: TrainConfig, result: TrainResult, template: Template) -> None:
    results = {
        "steps": result.steps,
        "held_out_loss_before": None if math.isnan(result.loss_before) else result.loss_before,
        "held_out_loss_after": None if math.isnan(result.loss_after) else result.loss_after,
        "tokens_per_second": result.tokens_per_second,
        "peak_bytes": result.peak_bytes,
    }
    settings = dataclasses.asdict(config)
    name = keep_template(result.output_dir, config.prompt_template_name, template)
    write_run(result.output_dir, RunRecord(_lasting(config.base_model), name, settings, results))


def _lasting(name: str | None) -> str | None:
    """A local path made absolute, so that the run can be used from any folder; other names as they are."""
    return str(Path(name).absolute()) if name is not None and Path(name).exists() else name


def _farewell(view: TrainingView, config: TrainConfig, result: TrainResult, probe: Record | None) -> None:
    view.say(
        f"{result.steps} steps at {result.tokens_per_second:,.0f} tokens/s; peak memory "
        f"{result.peak_bytes / 1e6:,.0f} MB"
    )
    budget = config.max_memory_MB * 1_000_000
    if budget and result.peak_bytes > budget:
        over = (result.peak_bytes - budget) / 1e6
        view.notice(f"that is {over:,.0f} MB over the {config.max_memory_MB:,} MB asked for")
    view.say(f"Saved and read back: {result.output_dir}/{WEIGHTS}, {CONFIG}, {METRICS}, loss.png")
    base = [] if config.base_model is None else ["--base_model", config.base_model]
    asked = [("--instruction", probe.instruction), ("--input", probe.input)] if probe else [("--instruction", "…")]
    if probe is not None and not probe.instruction:
        asked[0] = ("--instruction", "…")  # rows that are learned whole: what stands for a prompt, only the user knows
    given = [part for flag, text in asked if text for part in (flag, text if len(text) < 80 else "…")]
    command = ["jindo-core", "generate", *base, "--lora_weights", str(result.output_dir), *given]
    view.say("Next: " + typed(command))
