"""The main job: load a model in NF4, train LoRA adapters on instructions, save and check the adapter."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jindo_core import checkpoint, parallel, predict, profiling, reports, resume
from jindo_core.adapters import WEIGHTS
from jindo_core.ceiling import share_of
from jindo_core.checkpoint import Checkpoint
from jindo_core.compiled import compiled_graphs
from jindo_core.config import TrainConfig
from jindo_core.data.batches import BatchCursor
from jindo_core.errors import InputError, Stopped, TrainingError
from jindo_core.evaluate import held_out_sums
from jindo_core.feeder import Feeder
from jindo_core.files import held
from jindo_core.host_memory import TRY_AGAIN, HostWatch
from jindo_core.interrupt import Broken, StopSignals
from jindo_core.memory import current_bytes, keep_budget, peak_bytes
from jindo_core.mmlu import Mmlu, Scores, Share
from jindo_core.outcome import (
    PICTURE,
    TrainResult,
    answer,
    base_name,
    farewell,
    figures_of,
    one_line,
    record,
    record_of,
    save,
)
from jindo_core.plan import plan
from jindo_core.prepare import TrainingJob, prepare
from jindo_core.profiling import StepProfile
from jindo_core.progress import draw_loss
from jindo_core.reports import Reports, open_reports
from jindo_core.resume import Foreign, Saver, base_digest, load_best, restore, take_weights
from jindo_core.run_card import Card, command_of, write_card
from jindo_core.run_record import FILE as RECORD
from jindo_core.run_record import METRICS, ROOM, choose_output_dir, read_run
from jindo_core.run_state import NOT_FINITE, Best, History, MetricsLog, RunState, perplexity
from jindo_core.step import take_step
from jindo_core.training_view import JsonView, TrainingView

MayBreak = Callable[[], contextlib.AbstractContextManager[None]]
"""About a measurement that may be left off."""


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
        Stopped: SIGTERM or SIGINT came, or the host ran out of memory; the step was finished and a checkpoint written.
    """
    if config.preview:
        raise InputError(f"preview is {config.preview}, expected 0 to train: rows are shown by prepare.preview")
    given = config
    with parallel.joined(config) as (ranks, config), contextlib.ExitStack() as owned:
        view = JsonView(quiet=not ranks.leads) if config.json else TrainingView(quiet=not ranks.leads, bar=config.bar)
        for notice in (*notices, *([] if (advice := parallel.advice(config)) is None else [advice])):
            view.notice(notice)
        ranks.first(lambda: reports.check(config, view.notice))
        output_dir, there, found = ranks.first(lambda: _claim(config, "output_dir" in explicit, owned, view))
        planned = resume.check_settings(found, config, view) if isinstance(found, Checkpoint) else None
        if isinstance(found, Checkpoint) and (done := ranks.first(lambda: _ended(found, config, output_dir))):
            view.say(f"The run in {output_dir} has ended, and nothing is left to do: --max_steps N goes further")
            view.finished(vars(done))
            return done
        job = prepare(config, explicit, view, planned, ranks)
        owned.callback(keep_budget, job.model.device, 0)
        ranks.first(lambda: _clear(output_dir, owned, there))
        command = command_of(given, explicit, ranks.size)
        return _run(job, found, output_dir, view, command)


def _claim(
    config: TrainConfig, named: bool, owned: contextlib.ExitStack, view: TrainingView
) -> tuple[Path, bool, Checkpoint | Foreign | None]:
    """The output folder, held if it is there; whether it is; and what is gone on from."""
    output_dir = choose_output_dir(config, named)
    if there := output_dir.is_dir():
        owned.enter_context(held(output_dir))
    return output_dir, there, resume.find(config, output_dir, view)


def _ended(found: Checkpoint, config: TrainConfig, output_dir: Path) -> TrainResult | None:
    """What the run in output_dir came to, where it has ended and no more is asked for; None: there is something to do.
    A run that has not ended keeps its rows under another name."""
    run, before = read_run(output_dir), found.state["given"]
    asked = all(before[name] == getattr(config, name) for name in ("num_epochs", "max_steps"))
    unanswered = config.predict_with_generate and not (output_dir / predict.FILE).exists()
    whole = (output_dir / METRICS).exists() and not (output_dir / f"{METRICS}.part").exists()
    if run is None or not asked or unanswered or not whole or not (output_dir / WEIGHTS).exists():
        return None
    known: dict[str, Any] = {name: math.nan if value is None else value for name, value in run.results.items()}
    if known["steps"] < found.step:
        return None
    return TrainResult(
        output_dir, known["steps"], known["adapter_of_step"], known["held_out_loss_before"],
        known["held_out_loss_after"], known["tokens_per_second"], known["peak_bytes"], known["skipped_steps"],
    )  # fmt: skip


def _clear(output_dir: Path, owned: contextlib.ExitStack, there: bool) -> None:
    """Make the folder ready to be written to; what another run has in it stays."""
    _make_room(output_dir)
    if not there:
        owned.enter_context(held(output_dir))
    checkpoint.clear(output_dir)


def _begin_anew(output_dir: Path) -> None:
    """Take away another run's checkpoints, once nothing refuses this one any more."""
    for folder in filter(checkpoint.is_ours, checkpoint.folders(output_dir)):
        checkpoint.remove(folder)
    for name in (profiling.TABLE, profiling.TRACE):
        (output_dir / name).unlink(missing_ok=True)


def _run(
    job: TrainingJob, found: Checkpoint | Foreign | None, output_dir: Path, view: TrainingView, command: str
) -> TrainResult:
    """Measure, train, measure again, save. command: what a person typed for it."""
    part = output_dir / f"{METRICS}.part"
    with contextlib.ExitStack() as owned:
        reported = owned.enter_context(_reports(job, found, output_dir, view))
        if found is None and job.config.overwrite_output_dir:
            job.ranks.first(lambda: _begin_anew(output_dir))
        if job.ranks.leads:
            profiling.clear(output_dir)
        log = owned.enter_context(MetricsLog(part if job.ranks.leads else None, view.notice))
        run = _Run(job, RunState(History(log, reported.log)), output_dir, view)
        run.begin(found)
        with run.signals:
            total = _loop(run)
            after, kept = run.measure_last(total)
            job.ranks.first(lambda: _complete(run, output_dir))
            return _finish(run, part, total, after, kept, reported, command)


def _complete(run: _Run, output_dir: Path) -> None:
    """See to it that all rows are on the disk. Where they can't be, the adapter is saved all the same, and
    TrainingError says what is there."""
    try:
        run.state.history.complete()
    except OSError as error:
        save(run.job, output_dir)
        how = ": make room, and --resume ends the run" if checkpoint.folders(output_dir) else ""
        raise TrainingError(
            f"{METRICS}.part could not be written whole ({error.strerror}): the adapter is saved, and no {METRICS} or "
            f"record of the run beside it{how}"
        ) from error


def _reports(job: TrainingJob, found: Checkpoint | Foreign | None, output_dir: Path, view: TrainingView) -> Reports:
    """Where the run's figures go to; the first rank's."""
    opened = [Reports([], view.notice)]
    step = int(found.state["run"]["step"]) if isinstance(found, Checkpoint) else None

    def begin() -> None:
        opened[0] = open_reports(job.config, output_dir, step, view.notice, job.model)

    job.ranks.first(begin)
    return opened[0]


def _finish(
    run: _Run, part: Path, total: int, after: float, kept: int, reported: Reports, command: str
) -> TrainResult:
    """Save and show what came of it. A signal that comes now changes nothing: it is short, but for the predictions."""
    job, output_dir, view = run.job, part.parent, run.view
    state, history = run.state, run.state.history
    result = TrainResult(
        output_dir, total, kept, state.before, after, state.tokens_per_second, peak_bytes(job.model.device),
        state.skipped.total,
    )  # fmt: skip
    if not job.ranks.leads:
        _predict(run, output_dir, after)
        return result
    # Until here a run that was in the folder before is whole, and one that fails leaves no more than its log.
    save(job, output_dir)
    figures = figures_of(result, history)
    _keep(job, part, result, figures)
    _draw(history, output_dir, view)
    asked = None if job.ranks.sharded else job.probe
    answers = [] if asked is None else [(one_line(asked), state.first_answer, answer(job, view))]
    perplexities = (result.perplexity_before, result.perplexity_after)
    view.results(state.before, after, len(job.held_out), answers, perplexities=perplexities)
    if (first := history.first_scores) is not None and (last := history.last_scores) is not None:
        view.mmlu(first.subjects, last.subjects, first.accuracy, last.accuracy)
    view.finished(vars(result))
    try:
        if predicted := _predict(run, output_dir, after):
            figures |= predicted
            _record(job, result, figures)
            view.predicted(output_dir / predict.FILE, predicted)
    finally:  # the card and the reports are the adapter's, whatever became of its predictions
        described = write_card(output_dir, Card(job, figures, answers, command), view.notice)
        reported.finish(output_dir, figures)
    farewell(view, job.config, result, job.probe, described)
    return result


def _keep(job: TrainingJob, part: Path, result: TrainResult, figures: dict[str, Any]) -> None:
    """The log and the record of the run beside its adapter, which is saved; what another adapter's run left goes. part:
    the log. Raises TrainingError: one can't be written."""
    try:
        predict.clear(result.output_dir, going_on=bool(job.data.answered))
        os.replace(part, result.output_dir / METRICS)
    except OSError as error:
        raise _unwritten(METRICS, result.output_dir, error) from error
    _record(job, result, figures)


def _record(job: TrainingJob, result: TrainResult, figures: dict[str, Any]) -> None:
    try:
        record(job.config, result, job.template, figures)
    except OSError as error:
        raise _unwritten(RECORD, result.output_dir, error) from error


def _unwritten(name: str, output_dir: Path, error: OSError) -> TrainingError:
    on = "generate takes it with the run's --base_model and --prompt_template_name"
    return TrainingError(
        f"the adapter is saved in {output_dir}, but {name} could not be written ({error.strerror}): make room; {on}"
    )


def _draw(history: History, output_dir: Path, view: TrainingView) -> None:
    try:
        draw_loss(history.rows, output_dir / PICTURE)
    except OSError as error:
        said = f"{PICTURE} could not be written ({error.strerror})"
        view.notice(f"{said}: the adapter is saved, and {METRICS} has the figures")


def _predict(run: _Run, output_dir: Path, loss: float) -> dict[str, float]:
    """Answer the held-out rows where that is asked for: the first rank does, whatever time the others wait for it.
    Returns the figures of that, none where it isn't. Raises Stopped where a signal ends it: the adapter is saved by
    then."""
    job = run.job
    if not job.data.answered:
        return {}
    on = "--resume goes on" if checkpoint.folders(output_dir) else "jindo-core eval --tasks generation answers, too"

    def answer_all() -> tuple[int | None, dict[str, float]]:
        try:
            return predict.predict(job, output_dir, loss, run.signals, run.view)
        except InputError as error:  # a part file: its own advice is for a run that has only that to do
            said = str(error).partition(": ")[0]
            raise TrainingError(f"{said}: {output_dir} has the adapter without predictions; {on}") from error

    number, figures = job.ranks.first(answer_all, limit=None)
    if number is not None:
        name = signal.Signals(number).name
        raise Stopped(f"stopped by {name} within the predictions: {output_dir} has the adapter; {on}", 128 + number)
    return figures


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
        self.total = count_steps(self.cursor.steps_per_epoch, config)
        folder = config.offload_folder or tempfile.gettempdir()
        self._host = HostWatch(job.model, job.optimizer, job.relief, folder, job.ranks)
        self._output_dir = output_dir
        self._base = base_digest(job.model)
        job.ranks.check_same({"the base model's weights": self._base, "the rows": job.data.chosen.digest()})
        self._saver = Saver(job, self.cursor, output_dir, self._base, base_name(config), record_of(config, {}))

    def begin(self, found: Checkpoint | Foreign | None) -> None:
        """Go on from a checkpoint, or measure what there is before the first step."""
        job, state = self.job, self.state
        if isinstance(found, Checkpoint):
            restore(job, self.cursor, found, self._base, state, self.view)
            return
        if found is not None:
            take_weights(job, found, self.view)
        state.before = self._measure()
        state.first_answer = answer(job, self.view)

    def profile(self, total: int) -> StepProfile:
        """Of some of the steps that are left, on the first rank, where it is asked for."""
        asked = self.job.config.profile_steps if self.job.ranks.leads else 0
        return StepProfile(asked, total - self.state.step, self._output_dir, self.job.model.device, self.view)

    def measure(self, total: int) -> None:
        """The held-out loss after the last step, where it is due and not known yet; left off when a signal comes."""
        state = self.state
        if not 0 < state.step < total or not self._is_due("eval") or state.measured == state.step:
            return
        with contextlib.suppress(Broken):
            loss = self._measure(breakable=True)
            if self._is_due("save") and math.isfinite(loss) and (state.best is None or loss < state.best.loss):
                state.candidate = Best(state.step, loss, state.history.last_scores)

    def measure_last(self, total: int) -> tuple[float, int]:
        """The held-out loss of what the run ends with, and whose it is: the last step, or the checkpoint that was
        measured best, whose adapter is in the model then."""
        try:
            loss = self._measure(breakable=True)
        except Broken:
            self.save_if_due()  # and raises Stopped
            raise
        best = self.state.best
        spoilt = math.isfinite(self.state.before) and not math.isfinite(loss)
        kept = best is not None and self.job.config.load_best_model_at_end and (spoilt or best.loss < loss)
        if spoilt and not kept:
            raise TrainingError(f"the held-out loss is {loss} after the last step: {NOT_FINITE}")
        if best is None or not kept:
            return loss, total
        if not load_best(self.job, self._output_dir / f"checkpoint-{best.step}", self.view):
            return loss, total
        self.state.history.last_scores = best.scores  # MMLU's, of what is kept
        self.view.say(f"checkpoint-{best.step} was measured best, {best.loss:.4f} to {loss:.4f}: its adapter is kept")
        return best.loss, best.step

    def _measure(self, *, breakable: bool = False) -> float:
        """breakable: a signal, on any rank, leaves it off. Not with shards: the others wait for a rank's part."""
        may_break = self.signals.breakable if breakable and not self.job.ranks.sharded else contextlib.nullcontext
        loss = _measure(self.job, self.view, self.state.history, self.state.step, may_break)
        self.state.measured = self.state.step
        return loss

    def _is_due(self, what: Literal["eval", "save"]) -> bool:
        """Whether the step that was taken last is one to measure or to save after."""
        config, step = self.job.config, self.state.step
        epochs, every = getattr(config, f"{what}_epochs"), getattr(config, f"{what}_steps")
        if epochs:
            every = self.cursor.steps_per_epoch
        return bool(every and step % every == 0)

    def _why_stop(self) -> tuple[str, int] | None:
        """What ends the run before its time, and the exit code: a signal, or want of memory on the host."""
        # One message for two questions: a signal's number above, the clock of the host's watch in the last bit.
        number, due = divmod(self.job.ranks.worst(2 * (self.signals.asked or 0) + self._host.due), 2)
        if number:
            return f"by {signal.Signals(number).name}", 128 + number
        if self.state.step == self.total:
            return None
        short = self._host.look(self.state.step, self.view.notice, due=bool(due))
        return None if short is None else (f"for want of memory ({short})", TRY_AGAIN)

    def save_if_due(self) -> None:
        """A checkpoint where one is due, and where the run has to end: raises Stopped then."""
        step, stop = self.state.step, self._why_stop()
        if stop is None and not self._is_due("save"):
            return
        try:
            path = self._saver.save(self.state)
        except (OSError, InputError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            said = f"the checkpoint of step {step} could not be written ({reason}); the ones before it are as they were"
            if stop is None:
                self.view.notice(f"{said}, and the run goes on")
                return
            raise TrainingError(f"stopped {stop[0]}, and {said}") from error
        self.view.saved(step, path)
        if stop is not None:
            raise Stopped(f"stopped {stop[0]} after step {step}: {path} is saved, --resume goes on", stop[1])


def _loop(run: _Run) -> int:
    """Train to the end; returns the number of steps."""
    job, state, view, config = run.job, run.state, run.view, run.job.config
    lengths, total = job.examples.lengths, run.total
    if state.step > total:
        raise InputError(f"step {state.step} is done, and {total} are asked for: raise --max_steps or --num_epochs")
    job.model.train()
    share = share_of(job, view.notice, tokens=state.usual.tokens, seconds=state.usual.seconds)
    view.start(
        total, done=state.step, planned_bytes=plan(job.step).peak_bytes, ceiling=share.ceiling,
        token_operations=share.token_operations,
    )  # fmt: skip
    with contextlib.ExitStack() as ending:
        ending.callback(view.stop)
        feeder = ending.enter_context(Feeder(job, run.cursor, total - state.step))
        profile = ending.enter_context(run.profile(total))
        run.measure(total)  # a run that was stopped within a measurement goes on with it
        state.keep_candidate()
        while state.step < total:
            graphs = compiled_graphs() if config.compile else 0
            with profile.step() as profiled:  # starting, stopping and writing it is no step's time
                began, rows = time.perf_counter(), next(feeder)
                taken = take_step(job, rows, state.step + 1, total, state.skipped, view)
                passed = time.perf_counter() - began
            tokens = sum(int(lengths[i]) for batch in rows for i in batch)
            compiles = config.compile and compiled_graphs() != graphs
            state.add_step(tokens, passed, usual=not (profiled or compiles))
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
            if (reached := share.reached(state.usual.tokens, state.usual.seconds)) is not None:
                row["share_of_ceiling"] = reached
            state.history.add(row)
            logged = state.step % config.logging_steps == 0 or state.step in (1, total)
            view.step(row, total, state.seconds_a_step * (total - state.step), logged)
            run.measure(total)
            run.save_if_due()
        if state.skipped.total == total:
            raise TrainingError(f"no step had a finite gradient: {NOT_FINITE}")
    job.model.eval()
    return total


def count_steps(per_epoch: int, config: TrainConfig) -> int:
    """Optimizer steps of the run: max_steps if given, else num_epochs of so many each."""
    return config.max_steps if config.max_steps > 0 else max(math.ceil(per_epoch * config.num_epochs), 1)


def _measure(job: TrainingJob, view: TrainingView, history: History, step: int, may_break: MayBreak) -> float:
    """Held-out loss, and MMLU where it is asked for; written to the history once both are known, for a measurement that
    is left off in the middle is made again."""
    scores = None if job.mmlu is None else _ask(job, job.mmlu, view, step, may_break)
    loss = _held_out_loss(job, view, step, may_break) if job.held_out else math.nan
    if scores is not None:
        history.add_scores(step, scores)
        view.evaluated({"step": step, **scores.metrics()})
    if job.held_out:
        row = {"step": step, "eval_loss": loss, "eval_perplexity": perplexity(loss)}
        history.add(row)
        view.evaluated(row)
    return loss


def _held_out_loss(job: TrainingJob, view: TrainingView, step: int, may_break: MayBreak) -> float:
    def run() -> tuple[float, int]:
        with may_break():
            return held_out_sums(
                job.model, job.held_out, batch_size=job.relief.micro_batch, pad_id=job.tokenizer.pad_id,
                ranks=job.ranks,
            )  # fmt: skip

    total, count = job.ranks.totals(*job.relief.outlive(run, step, view.notice))
    return total / count if count else math.nan


def _ask(job: TrainingJob, mmlu: Mmlu, view: TrainingView, step: int, may_break: MayBreak) -> Scores:
    """Each rank asks its part of the questions."""
    def run() -> Share:
        with may_break(), view.asking(-(-len(mmlu.questions) // job.ranks.size)) as on_progress:
            return mmlu.ask_share(
                job.model, batch_size=job.relief.micro_batch, ranks=job.ranks, on_progress=on_progress
            )

    return mmlu.scores(job.ranks.gather(job.relief.outlive(run, step, view.notice)))
