"""What a person sees of a training run: plain lines and tables, and a live bar on a terminal; or, for machines, a JSON
object a line. docs/output.md says what each shows."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from jindo_core.errors import Stopped, TrainingError
from jindo_core.plan import Plan
from jindo_core.progress import LastingOutput, plan_table

REFRESHES = 4
"""Of the bar, a second."""


class InputWait:
    """The part of the steps' time that they waited for their rows, from rows of metrics as they come."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._waited = self._passed = self._waited_before = self._passed_before = 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        """A step's row: `seconds` of all steps so far, and its own `input_seconds`, if they are known. The first row
        that is seen of a run that goes on does not say how long its step took."""
        last, self._last = self._last, row["seconds"]
        if last is None and row["step"] == 1:
            last = 0.0
        if last is not None and "input_seconds" in row:
            self._waited += row["input_seconds"]
            self._passed += row["seconds"] - last

    @property
    def whole(self) -> float | None:
        """The share since the beginning, 0 to 1; None where it is not known."""
        return self._waited / self._passed if self._passed else None

    def lately(self) -> float | None:
        """The share since this was last asked."""
        waited, passed = self._waited - self._waited_before, self._passed - self._passed_before
        self._waited_before, self._passed_before = self._waited, self._passed
        return waited / passed if passed else None


class TrainingView:
    """Prints a run to standard output; without a terminal, one line every `logging_steps`. A run goes on when standard
    output takes no more."""

    def __init__(self, *, quiet: bool = False, bar: bool = True) -> None:
        """quiet: say nothing, for a rank that does not lead. bar: whether a terminal may show one; without, lines."""
        self._output, self._may_draw = LastingOutput(), bar
        self.console = self._console()
        # Not what rich asks: FORCE_COLOR is a terminal to it, and fills a CI's log with bars.
        if quiet or not sys.stdout.isatty() or self.console.is_dumb_terminal:
            # Without a terminal rich assumes 80 columns and wraps; a log line should stay one line.
            self.console = self._console(width=160, quiet=quiet, force_terminal=False)
        self._bar: Progress | None = None
        self._total = 0
        self._planned: int | None = None
        self._input = InputWait()
        self._held_out = math.nan
        self._share: float | None = None

    def _console(self, **more: Any) -> Console:
        return Console(file=cast(IO[str], self._output), highlight=False, **more)

    @property
    def draws(self) -> bool:
        """Whether bars are shown."""
        return self.console.is_terminal and self._may_draw

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def notice(self, text: str) -> None:
        """Something the user should know: a warning that does not stop the run."""
        self.console.print(f"note: {text}", style="yellow", markup=False, soft_wrap=True)

    def plan(self, plan: Plan, process: str) -> None:
        """The rows of a plan; `process`: what the row of the context is called here."""
        self.console.print(plan_table(plan, process))

    def loaded(self, *, rows: int, held_out: int, trainable: int, dtype: str, device: str) -> None:
        """What is about to be trained. trainable: parameters."""
        self.say(
            f"{rows} training rows, {held_out} held out; {trainable:,} trainable parameters; {dtype} on {device}"
        )

    def start(
        self, total: int, *, done: int = 0, planned_bytes: int | None = None, ceiling: float | None = None,
        token_operations: float | None = None,
    ) -> None:  # fmt: skip
        """The loop begins.

        Args:
            total: steps of the run. done: those before this start. planned_bytes: a step's peak, as planned.
            ceiling: floating-point operations a second of this run's devices, as measured.
            token_operations: floating-point operations of a training token.
        """
        self._total, self._planned = total, planned_bytes
        if self.draws:
            column = _Line(lambda: self.console.width, ascii_only=self.console.options.ascii_only)
            self._bar = Progress(column, console=self.console, refresh_per_second=REFRESHES)
            self._bar.start()
            self._bar.add_task("training", total=total, completed=done, pieces={"step": f"{done}/{total}"})

    @contextmanager
    def asking(self, total: int) -> Iterator[Callable[[int], None] | None]:
        """Shows how many of MMLU's questions are answered; on a terminal only, and gone afterwards."""
        if not self.draws:
            yield None
            return
        if self._bar is not None:  # two live displays at once can't be: this is a line of training's
            bar = self._bar
            task = bar.add_task("MMLU", total=total, pieces={"step": f"MMLU 0/{total}"})
            try:
                yield lambda done: bar.update(
                    task, completed=done, refresh=True, pieces={"step": f"MMLU {done}/{total}"}
                )
            finally:
                bar.remove_task(task)
            return
        columns = (TextColumn("MMLU"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as own:
            alone = own.add_task("MMLU", total=total)
            yield lambda done: own.update(alone, completed=done, refresh=True)

    def step(self, row: dict[str, Any], total: int, left: float, log: bool) -> None:
        """One optimizer step; `row` as in metrics.jsonl, `left` in seconds."""
        self._note(row)
        if self._bar is not None:
            pieces = _pieces(row, total, left, self._planned)
            self._bar.update(self._bar.task_ids[0], completed=row["step"], pieces=pieces)
        elif log:
            self.say(self._line(row, total, left))

    def _note(self, row: Mapping[str, Any]) -> None:
        self._input.add(row)
        self._share = row.get("share_of_ceiling")  # of a run that came out above it there is none

    def _line(self, row: Mapping[str, Any], total: int, left: float) -> str:
        parts = [
            f"step {row['step']}/{total}", f"loss {row['loss']:.3f}", f"lr {row['learning_rate']:.2e}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        ]  # fmt: skip
        if (share := row.get("share_of_ceiling")) is not None:
            parts.append(f"{share:.0%} of ceiling")
        parts.append(_memory(row["memory_bytes"], self._planned))
        if math.isfinite(self._held_out):
            parts.append(f"held out {self._held_out:.3f}")
        if (waited := self._input.lately()) is not None:
            parts.append(f"input wait {waited:.1%}")
        return "  ".join([*parts, f"{_clock(left)} left"])

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """A measurement, as its row in metrics.jsonl. What the run began and ends with is shown by `results`."""
        if "eval_loss" in row:
            self._held_out = row["eval_loss"]
            if 0 < row["step"] < self._total:
                more = f"  perplexity {row['eval_perplexity']:,.2f}" if "eval_perplexity" in row else ""
                self.say(f"step {row['step']}/{self._total}  held-out loss {row['eval_loss']:.4f}{more}")
            return
        name = next(name for name in row if name.startswith("mmlu_") and name.endswith("_accuracy"))
        subjects = sum(other.startswith(f"{name}_") for other in row)
        self.say(f"step {row['step']}  MMLU accuracy {row[name]:.4f}, mean of {subjects} subjects")

    def saved(self, step: int, path: str | os.PathLike[str]) -> None:
        """A checkpoint lies at `path`; people need not be told."""

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def results(
        self, before: float, after: float, rows: int, answers: Sequence[tuple[str, str, str]], *,
        perplexities: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """Held-out loss and answers before and after; answers: (instruction, before, after)."""
        if rows:
            table = Table(title=f"Loss on {rows} held-out rows", title_justify="left", title_style="bold")
            table.add_column("")
            for name in ("before", "after", "change"):
                table.add_column(name, justify="right")
            table.add_row("loss", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
            if perplexities is not None:
                was, now = perplexities
                table.add_row("perplexity", f"{was:,.2f}", f"{now:,.2f}", f"{now - was:+,.2f}")
            self.console.print(table)
        for instruction, first, second in answers:
            title = f"Instruction: {instruction}" if instruction else "What it writes without a prompt"
            table = Table(title=Text(title), title_justify="left", title_style="bold")
            table.add_column("before", ratio=1)
            table.add_column("after", ratio=1)
            table.add_row(_answer(first), _answer(second))
            self.console.print(table)

    def mmlu(
        self, before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]], first: float, last: float
    ) -> None:
        """Right answers and questions of each subject, before and after; and the accuracies over all subjects."""
        table = Table(title="MMLU accuracy", title_justify="left", title_style="bold")
        table.add_column("subject")
        for name in ("questions", "before", "after"):
            table.add_column(name, justify="right")
        for subject, (right, count) in sorted(after.items()):
            table.add_row(Text(subject), str(count), f"{before[subject][0] / count:.3f}", f"{right / count:.3f}")
        table.add_section()
        questions = sum(count for _, count in after.values())
        table.add_row("mean of the subjects", str(questions), f"{first:.4f}", f"{last:.4f}", style="bold")
        self.console.print(table)

    def predicted(self, path: str | os.PathLike[str], figures: Mapping[str, float]) -> None:
        """The held-out rows are answered, in the file at `path`; figures: as in metrics.json."""
        names = {"predict_exact_match": "exact match", "predict_chrf": "chrF", "predict_ended": "ended by themselves"}
        told = [f"{said} {figures[name]:.4f}" for name, said in names.items() if name in figures]
        self.say(f"{os.path.basename(path)}: {figures['predict_samples']:,} rows, " + ", ".join(told))

    def finished(self, result: Mapping[str, Any]) -> None:
        """What came of it, once it is saved; result: a `TrainResult`'s attributes."""
        parts = [f"{result['steps']} steps at {result['tokens_per_second']:,.0f} tokens/s"]
        if self._share is not None:
            parts.append(f"{self._share:.0%} of this device's matrix products")
        line = ", ".join(parts)
        if (waited := self._input.whole) is not None:
            line += f"; {waited:.1%} of the steps' time spent waiting for rows"
        self.say(f"{line}; peak memory {result['peak_bytes'] / 1e6:,.0f} MB")


# --- the bar --------------------------------------------------------------------------------------------

_GIVES_WAY = ("lr", "share", "memory", "speed", "left", "loss")
"""What a narrow terminal does without, the first one first."""
_LEAST_BAR, _MOST_BAR = 6, 40


class _Line(ProgressColumn):
    """A task in one line, never wider than the console: the least important gives way, what room is left is a bar."""

    def __init__(self, width: Callable[[], int], *, ascii_only: bool) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._width, self._sign = width, "-" if ascii_only else "━"

    def render(self, task: Task) -> Text:
        width = self._width()
        parts = fitting(task.fields["pieces"], width)
        line = Text("  ".join(parts), no_wrap=True, overflow="crop")
        room = min(width - len(line) - 2, _MOST_BAR)
        if room < _LEAST_BAR or not task.total:
            return line
        done = round(room * min(task.completed / task.total, 1.0))
        bar = Text.assemble(
            (self._sign * done, "bar.finished" if done == room else "bar.complete"),
            (self._sign * (room - done), "bar.back"),
        )  # fmt: skip
        first = Text(parts[0], no_wrap=True, overflow="crop")
        return Text("  ").join([first, bar, *map(Text, parts[1:])])


def _pieces(row: Mapping[str, Any], total: int, left: float, planned: int | None) -> dict[str, str]:
    """The parts of a step's line by name, in their order."""
    speed = row["tokens_per_second"]
    pieces = {
        "step": f"{row['step']}/{total}", "loss": f"loss {row['loss']:.3f}", "lr": f"lr {row['learning_rate']:.1e}",
        "speed": f"{speed / 1e3:,.1f}k tok/s" if speed >= 9999.5 else f"{speed:,.0f} tok/s",
    }  # fmt: skip
    if (share := row.get("share_of_ceiling")) is not None:
        pieces["share"] = f"{share:.0%}"
    return pieces | {"memory": _memory(row["memory_bytes"], planned), "left": f"{_short_clock(left)} left"}


def fitting(pieces: Mapping[str, str], width: int) -> list[str]:
    """Those of the parts that `width` columns hold, two spaces between them; where it is wide enough the share says of
    what."""
    kept = dict(pieces)
    for name in _GIVES_WAY:
        if len("  ".join(kept.values())) <= width:
            break
        kept.pop(name, None)
    if "share" in kept:
        long = kept | {"share": f"{kept['share']} of ceiling"}
        if len("  ".join(long.values())) + 2 + _LEAST_BAR <= width:
            kept = long
    return list(kept.values())


def _memory(now: int, planned: int | None) -> str:
    """`412/506 MB`: what is held, and the planned peak."""
    sizes = [now] if planned is None else [now, planned]
    if max(sizes) >= 1e10:
        return "/".join(f"{size / 1e9:.1f}" for size in sizes) + " GB"
    return "/".join(f"{size / 1e6:.0f}" for size in sizes) + " MB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short_clock(seconds: float) -> str:
    """Without seconds where there are hours."""
    minutes = int(seconds) // 60
    if minutes < 60:
        return _clock(seconds)
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes < 100 * 60 else f"{minutes // 1440}d"


def _answer(text: str) -> Text:
    """As it was written: square brackets in a str would be markup to rich."""
    # A syllable that the token limit cut in half is left out.
    return Text(text.strip().rstrip("\N{REPLACEMENT CHARACTER}") or "(nothing)")


# --- for machines ---------------------------------------------------------------------------------------

EVENTS: dict[str, tuple[str, ...]] = {
    "message": ("text",),
    "notice": ("text",),
    "plan": ("peak_bytes", "host_bytes", "rows", "elsewhere"),
    "device": ("device", "dtype", "training_rows", "held_out_rows", "trainable_parameters"),
    "start": ("step", "steps", "planned_bytes", "ceiling", "token_operations"),
    "step": ("step", "loss", "learning_rate", "tokens_per_second", "seconds_left"),
    "evaluation": ("step",),
    "checkpoint": ("step", "path"),
    "answer": ("instruction", "before", "after"),
    "mmlu": ("accuracy_before", "accuracy_after", "subjects"),
    "results": ("output_dir", "steps", "adapter_step", "loss_before", "loss_after", "tokens_per_second", "peak_bytes",
                "skipped_steps", "share_of_ceiling", "input_share"),
    "predictions": ("path", "figures"),
    "stopped": ("message", "code"),
    "error": ("message", "code"),
}  # fmt: skip
"""Every event of `--json`, and keys that it always has; `step` and `evaluation` have their row's of metrics.jsonl."""


class JsonView(TrainingView):
    """Prints a run to standard output as JSON, an object a line, each with its `event`."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=True)  # what is drawn for people is not drawn
        self._silent = quiet

    def event(self, name: str, **values: Any) -> None:
        """One line. Numbers that are not finite are null, as JSON has no such number."""
        if not self._silent:
            # In ASCII, whatever the encoding; in one piece, which a pipe takes whole.
            self._output.write(json.dumps({"event": name, **_finite(values)}, allow_nan=False) + "\n")
            self._output.flush()

    def say(self, text: str) -> None:
        self.event("message", text=text)

    def notice(self, text: str) -> None:
        self.event("notice", text=text)

    def plan(self, plan: Plan, process: str) -> None:
        self.event(
            "plan", peak_bytes=plan.peak_bytes, host_bytes=plan.host_bytes, rows=plan.rows, elsewhere=plan.elsewhere
        )

    def loaded(self, *, rows: int, held_out: int, trainable: int, dtype: str, device: str) -> None:
        self.event(
            "device", device=device, dtype=dtype, training_rows=rows, held_out_rows=held_out,
            trainable_parameters=trainable,
        )  # fmt: skip

    def start(
        self, total: int, *, done: int = 0, planned_bytes: int | None = None, ceiling: float | None = None,
        token_operations: float | None = None,
    ) -> None:  # fmt: skip
        self.event(
            "start", step=done, steps=total, planned_bytes=planned_bytes, ceiling=ceiling,
            token_operations=token_operations,
        )  # fmt: skip

    def step(self, row: dict[str, Any], total: int, left: float, log: bool) -> None:
        self._note(row)
        if log:
            self.event("step", **row, seconds_left=round(left, 1))

    def evaluated(self, row: Mapping[str, Any]) -> None:
        self.event("evaluation", **row)

    def saved(self, step: int, path: str | os.PathLike[str]) -> None:
        self.event("checkpoint", step=step, path=str(path))

    def results(
        self, before: float, after: float, rows: int, answers: Sequence[tuple[str, str, str]], *,
        perplexities: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """The losses come with `finished`."""
        for instruction, first, second in answers:
            self.event("answer", instruction=instruction, before=first, after=second)

    def mmlu(
        self, before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]], first: float, last: float
    ) -> None:
        subjects = {
            name: {"questions": count, "right_before": before[name][0], "right_after": right}
            for name, (right, count) in sorted(after.items())
        }
        self.event("mmlu", accuracy_before=first, accuracy_after=last, subjects=subjects)

    def predicted(self, path: str | os.PathLike[str], figures: Mapping[str, float]) -> None:
        self.event("predictions", path=str(path), figures=figures)

    def finished(self, result: Mapping[str, Any]) -> None:
        values = {name: str(value) if isinstance(value, os.PathLike) else value for name, value in result.items()}
        self.event("results", **values, share_of_ceiling=self._share, input_share=self._input.whole)

    def ended(self, error: BaseException) -> None:
        """What ended the run before its time, with the exit code that the command line has for it."""
        message = " ".join(str(error).split())
        if isinstance(error, KeyboardInterrupt):
            self.event("stopped", message="stopped by Ctrl-C", code=130)
        elif isinstance(error, Stopped):
            self.event("stopped", message=message, code=error.code)
        else:
            self.event("error", message=message, code=1 if isinstance(error, TrainingError) else 2)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
