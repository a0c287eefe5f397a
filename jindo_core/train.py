"""The main job: load a model in NF4, train LoRA adapters on instructions, save and check the adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jindo_core import checkpoint, embedded, parallel, resume
from jindo_core.adapters import CONFIG, WEIGHTS, save_adapter
from jindo_core.checkpoint import Checkpoint
from jindo_core.config import TrainConfig
from jindo_core.data.batches import BatchCursor
from jindo_core.data.examples import IGNORE, Example, end_ids, prompt_ids
from jindo_core.data.packing import collate_documents
from jindo_core.data.records import Record
from jindo_core.data.templates import Template
from jindo_core.errors import InputError, Stopped, TrainingError
from jindo_core.evaluate import held_out_sums
from jindo_core.files import held
from jindo_core.generation import generate
from jindo_core.interrupt import Broken, StopSignals
from jindo_core.memory import current_bytes, is_out_of_memory, keep_budget, peak_bytes
from jindo_core.mmlu import Mmlu, Scores
from jindo_core.optim import learning_rate_factor
from jindo_core.paged_adamw import PagedAdamW
from jindo_core.prepare import ANSWER_TOKENS, TrainingJob, prepare
from jindo_core.progress import TrainingView, draw_loss, typed
from jindo_core.resume import Foreign, Saver, base_digest, load_best, restore, take_weights
from jindo_core.run_record import RunRecord, choose_output_dir, keep_template, write_run
from jindo_core.run_state import NOT_FINITE, Best, History, RunState, Skipped

METRICS = "metrics.jsonl"
ROOM = 4 << 20
"""Bytes that must be free in output_dir before a run begins."""

MayBreak = Callable[[], contextlib.AbstractContextManager[None]]
"""About a measurement that may be left off."""

_IDLE = Example([0, 0], [IGNORE, IGNORE])
"""A row of which nothing is learnt."""


@dataclass(frozen=True)
class TrainResult:
    """output_dir: where the adapter lies; adapter_step: after which step it was as it is. Losses are on the held-out
    rows, NaN without any."""

    output_dir: Path
    steps: int
    adapter_step: int
    loss_before: float
    loss_after: float
    tokens_per_second: float
    peak_bytes: int


def train(
    config: TrainConfig, explicit: frozenset[str] = frozenset(), notices: Sequence[str] = ()
) -> TrainResult:
    """Run a training job as `config` says, or go on with one.

    Args:
        explicit: names of the settings that the user gave; an output_dir among them is never renamed.
        notices: what reading the settings has to tell the user; said first.
    Raises:
        InputError: a path, file, row or setting that can't be used; nothing was written.
        TrainingError: the loss or a gradient stopped being finite; no adapter was written, and one that the
            folder held is as it was. metrics.jsonl.part shows how far the run came.
        Stopped: SIGTERM or SIGINT came; the step was finished and a checkpoint written.
    """
    if config.preview:
        raise InputError(f"preview is {config.preview}, expected 0 to train: rows are shown by prepare.preview")
    with parallel.joined(config) as (ranks, config), contextlib.ExitStack() as owned:
        view = TrainingView(quiet=not ranks.leads)
        for notice in (*notices, *([] if (advice := parallel.advice(config)) is None else [advice])):
            view.notice(notice)
        output_dir, there, found = ranks.first(lambda: _claim(config, "output_dir" in explicit, owned, view))
        planned = resume.check_settings(found, config, view) if isinstance(found, Checkpoint) else None
        job = prepare(config, explicit, view, planned, ranks)
        owned.callback(keep_budget, job.model.device, 0)
        ranks.first(lambda: _clear(output_dir, owned, there, anew=found is None and config.overwrite_output_dir))
        return _run(job, found, output_dir, view)


def _claim(
    config: TrainConfig, named: bool, owned: contextlib.ExitStack, view: TrainingView
) -> tuple[Path, bool, Checkpoint | Foreign | None]:
    """The output folder, held if it is there; whether it is; and what is gone on from."""
    output_dir = choose_output_dir(config, named)
    if there := output_dir.is_dir():
        owned.enter_context(held(output_dir))
    return output_dir, there, resume.find(config, output_dir, view)


def _clear(output_dir: Path, owned: contextlib.ExitStack, there: bool, *, anew: bool) -> None:
    """Make the folder ready to be written to. anew: without another run's checkpoints."""
    _make_room(output_dir)
    if not there:
        owned.enter_context(held(output_dir))
    checkpoint.clear(output_dir)
    if anew:
        for folder in filter(checkpoint.is_ours, checkpoint.folders(output_dir)):
            checkpoint.remove(folder)


def _run(job: TrainingJob, found: Checkpoint | Foreign | None, output_dir: Path, view: TrainingView) -> TrainResult:
    """Measure, train, measure again, save."""
    part = output_dir / f"{METRICS}.part"
    with open(part if job.ranks.leads else os.devnull, "w", encoding="utf-8") as log:
        run = _Run(job, RunState(History(log)), output_dir, view)
        run.begin(found)
        with run.signals:
            total = _loop(run)
            after, kept = run.measure_last(total)
            return _finish(run, part, total, after, kept)


def _finish(run: _Run, part: Path, total: int, after: float, kept: int) -> TrainResult:
    """Show and save what came of it. A signal that comes now changes nothing: it is short."""
    job, output_dir, view = run.job, part.parent, run.view
    state, history = run.state, run.state.history
    result = TrainResult(
        output_dir, total, kept, state.before, after, state.tokens_per_second, peak_bytes(job.model.device)
    )
    if not job.ranks.leads:
        return result
    asked = None if job.ranks.sharded else job.probe
    answers = [] if asked is None else [(_one_line(asked), state.first_answer, _answer(job, view))]
    view.results(state.before, after, len(job.held_out), answers)
    if (first := history.first_scores) is not None and (last := history.last_scores) is not None:
        view.mmlu(first.subjects, last.subjects, first.accuracy, last.accuracy)
    # Until here a run that was in the folder before is whole, and one that fails leaves no more than its log.
    _save(job, output_dir)
    os.replace(part, output_dir / METRICS)
    _record(job.config, result, job.template)
    draw_loss(history.rows, output_dir / "loss.png")
    _farewell(view, job.config, result, job.probe)
    return result


def _save(job: TrainingJob, output_dir: Path) -> None:
    """The adapter to output_dir; where that fails, to a folder for temporary files: what was learnt is not lost."""
    base = _base_name(job.config)
    try:
        save_adapter(job.model, output_dir, base_model=base)
    except OSError as error:
        elsewhere = save_adapter(job.model, tempfile.mkdtemp(prefix="jindo-adapter-"), base_model=base)
        raise TrainingError(
            f"the adapter could not be written to {output_dir} ({error.strerror}): it is in {elsewhere}, copy it from "
            "there"
        ) from error


def _make_room(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # no room for an adapter: better known now
            os.posix_fallocate(probe.fileno(), 0, ROOM)
    except OSError as error:
        said = f"output_dir {folder} can't be written to ({error.strerror})"
        raise InputError(f"{said}: give another folder") from None


# --- the loop -------------------------------------------------------------------------------------------


class _Run:
    """A job under way: what it has done, where its rows come from, where it is saved, and whether it is to stop."""

    def __init__(self, job: TrainingJob, state: RunState, output_dir: Path, view: TrainingView) -> None:
        self.job, self.state, self.view, self.signals = job, state, view, StopSignals()
        config = job.config
        self.cursor = BatchCursor(
            job.examples.lengths, batch_size=config.micro_batch_size, accumulation=config.accumulation_steps,
            group_by_length=config.group_by_length, seed=config.seed, portions=job.data.portions,
        )  # fmt: skip
        self._output_dir = output_dir
        self._base = base_digest(job.model)
        job.ranks.check_same({"the base model's weights": self._base, "the rows": job.data.chosen.digest()})
        self._saver = Saver(job, self.cursor, output_dir, self._base, _base_name(config), _record_of(config, {}))

    def begin(self, found: Checkpoint | Foreign | None) -> None:
        """Go on from a checkpoint, or measure what there is before the first step."""
        job, state = self.job, self.state
        if isinstance(found, Checkpoint):
            restore(job, self.cursor, found, self._base, state, self.view)
            return
        if found is not None:
            take_weights(job, found, self.view)
        state.before = self._measure()
        state.first_answer = _answer(job, self.view)

    def measure(self, total: int) -> None:
        """The held-out loss after the last step, where it is due and not known yet; left off when a signal comes."""
        state = self.state
        if not 0 < state.step < total or state.step % self.job.config.eval_steps or state.measured == state.step:
            return
        with contextlib.suppress(Broken):
            loss = self._measure(breakable=True)
            if self.job.held_out:
                self.view.say(f"step {state.step}/{total}  held-out loss {loss:.4f}")
            saved = self.job.config.save_steps and state.step % self.job.config.save_steps == 0
            if saved and math.isfinite(loss) and (state.best is None or loss < state.best.loss):
                state.best = Best(state.step, loss)

    def measure_last(self, total: int) -> tuple[float, int]:
        """The held-out loss of what the run ends with, and whose it is: the last step, or the checkpoint that was
        measured best, whose adapter is in the model then."""
        try:
            loss = self._measure(breakable=True)
        except Broken:
            self.save_if_due()  # and raises Stopped
            raise
        best = self.state.best
        if not self.job.config.load_best_model_at_end or best is None or not best.loss < loss:
            return loss, total
        if not load_best(self.job, self._output_dir / f"checkpoint-{best.step}", self.view):
            return loss, total
        self.view.say(f"checkpoint-{best.step} was measured best, {best.loss:.4f} to {loss:.4f}: its adapter is kept")
        return best.loss, best.step

    def _measure(self, *, breakable: bool = False) -> float:
        """breakable: a signal, on any rank, leaves it off. Not with shards: the others wait for a rank's part."""
        may_break = self.signals.breakable if breakable and not self.job.ranks.sharded else contextlib.nullcontext
        loss = _measure(self.job, self.view, self.state.history, self.state.step, may_break)
        self.state.measured = self.state.step
        return loss

    def save_if_due(self) -> None:
        """A checkpoint after every so many steps, and where a signal ends the run: raises Stopped then."""
        step, every = self.state.step, self.job.config.save_steps
        number = self.job.ranks.worst(self.signals.asked or 0)
        asked = signal.Signals(number) if number else None
        if asked is None and not (every and step % every == 0):
            return
        try:
            path = self._saver.save(self.state)
        except (OSError, InputError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            said = f"the checkpoint of step {step} could not be written ({reason}); the ones before it are as they were"
            if asked is None:
                self.view.notice(f"{said}, and the run goes on")
                return
            raise TrainingError(f"stopped by {asked.name}, and {said}") from error
        if asked is not None:
            raise Stopped(f"stopped by {asked.name} after step {step}: {path} is saved, --resume goes on", 128 + asked)


def _loop(run: _Run) -> int:
    """Train to the end; returns the number of steps."""
    job, state, view, config = run.job, run.state, run.view, run.job.config
    lengths, total = job.examples.lengths, count_steps(run.cursor.steps_per_epoch, config)
    if state.step > total:
        raise InputError(f"step {state.step} is done, and {total} are asked for: raise --max_steps or --num_epochs")
    job.model.train()
    view.start(total)
    try:
        run.measure(total)  # a run that was stopped within a measurement goes on with it
        while state.step < total:
            began, batches = time.perf_counter(), next(run.cursor)
            taken = _step(job, batches, state.step + 1, total, state.skipped, view)
            state.step += 1
            state.tokens += sum(int(lengths[i]) for batch in batches for i in batch)
            state.seconds += time.perf_counter() - began
            row = {
                "step": state.step,
                "epoch": round(state.step * config.num_epochs / total, 4) if config.max_steps < 1 else None,
                **taken,
                "skipped_steps": state.skipped.total,
                "tokens": state.tokens,
                "tokens_per_second": state.tokens_per_second,
                "memory_bytes": current_bytes(job.model.device),
                "seconds": state.seconds,
            }
            state.history.add(row)
            logged = state.step % config.logging_steps == 0 or state.step in (1, total)
            view.step(row, total, state.seconds / state.step * (total - state.step), logged)
            run.measure(total)
            run.save_if_due()
        if state.skipped.total == total:
            raise TrainingError(f"no step had a finite gradient: {NOT_FINITE}")
    finally:
        view.stop()
    job.model.eval()
    return total


def _step(
    job: TrainingJob, batches: list[list[int]], step: int, total: int, skipped: Skipped, view: TrainingView
) -> dict[str, float]:
    """One optimizer step, or none where the gradient is not finite; its row of metrics."""
    config, optimizer = job.config, job.optimizer
    warmup = config.warmup(total)
    rate = config.learning_rate * learning_rate_factor(config.lr_scheduler_type, step - 1, total, warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip() -> float:
        """The gradients' norm before."""
        return float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf))

    loss = job.relief.outlive(lambda: _accumulate(job, batches), step, view.notice)
    loss = job.ranks.sum_gradients(parameters, loss)
    norm = job.relief.outlive(clip, step, view.notice, in_update=True)
    if not skipped.count(step, loss, norm, lambda: job.data.said(batches), view.notice):
        # The norm says that all are finite: the paged ones need not look again, and wait for the device.
        known = {"finite": True} if isinstance(optimizer, PagedAdamW) else {}
        job.relief.outlive(functools.partial(optimizer.step, **known), step, view.notice, in_update=True)
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "learning_rate": rate, "grad_norm": norm}


def count_steps(per_epoch: int, config: TrainConfig) -> int:
    """Optimizer steps of the run: max_steps if given, else num_epochs of so many each."""
    return config.max_steps if config.max_steps > 0 else max(math.ceil(per_epoch * config.num_epochs), 1)


def _accumulate(job: TrainingJob, batches: list[list[int]]) -> float:
    """Forward and backward of this rank's part of a step; returns its part of the loss. Every supervised token of all
    ranks weighs the same."""
    own = job.ranks.share(batches, job.relief.micro_batch, lambda i: int(job.examples.lengths[i]))
    collated = [collate_documents([job.examples[i] for i in batch] or [_IDLE], job.tokenizer.pad_id) for batch in own]
    counted = int(*job.ranks.totals(sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch, _ in collated)))
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
    return torch.stack(parts).sum().item() if parts else 0.0


def backward(loss: Tensor) -> None:
    """The backward pass on this thread. Handing a GPU's nodes to autograd's own costs a quarter of a short step's."""
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()


def _measure(job: TrainingJob, view: TrainingView, history: History, step: int, may_break: MayBreak) -> float:
    """Held-out loss, also written to the history; and MMLU where it is asked for."""
    if job.mmlu is not None:
        _ask(job, job.mmlu, view, history, step, may_break)
    if not job.held_out:
        return math.nan

    def run() -> tuple[float, int]:
        with may_break():
            return held_out_sums(
                job.model, job.held_out, batch_size=job.relief.micro_batch, pad_id=job.tokenizer.pad_id,
                ranks=job.ranks,
            )  # fmt: skip

    total, count = job.ranks.totals(*job.relief.outlive(run, step, view.notice))
    loss = total / count if count else math.nan
    history.add({"step": step, "eval_loss": loss})
    return loss


def _ask(
    job: TrainingJob, mmlu: Mmlu, view: TrainingView, history: History, step: int, may_break: MayBreak
) -> None:
    """Every rank asks all questions."""
    def run() -> Scores:
        with may_break(), view.asking(len(mmlu.questions)) as on_progress:
            return mmlu.ask(job.model, batch_size=job.relief.micro_batch, on_progress=on_progress)

    scores = job.relief.outlive(run, step, view.notice)
    history.add_scores(step, scores)
    view.say(f"step {step}  MMLU accuracy {scores.accuracy:.4f}, mean of {len(scores.subjects)} subjects")


# --- after the last step --------------------------------------------------------------------------------


def _answer(job: TrainingJob, view: TrainingView) -> str:
    """A greedy answer to the probe; empty where no row serves as one, or no memory is left for it."""
    if job.probe is None or not job.ranks.leads or job.ranks.sharded:  # alone, no rank has a sharded layer
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
        "adapter_of_step": result.adapter_step,
        "held_out_loss_before": None if math.isnan(result.loss_before) else result.loss_before,
        "held_out_loss_after": None if math.isnan(result.loss_after) else result.loss_after,
        "tokens_per_second": result.tokens_per_second,
        "peak_bytes": result.peak_bytes,
    }
    name = keep_template(result.output_dir, config.prompt_template_name, template)
    write_run(result.output_dir, _record_of(config, results, name))


def _record_of(config: TrainConfig, results: dict[str, Any], template: str | None = None) -> RunRecord:
    """template: left out, the user's own file where it lies."""
    template = template or _lasting(config.prompt_template_name) or config.prompt_template_name
    return RunRecord(_lasting(config.base_model), template, dataclasses.asdict(config), results)


def _base_name(config: TrainConfig) -> str:
    """What the adapter's config calls its base."""
    return _lasting(config.base_model) or embedded.HUB_ID


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
