"""What a person sees of a training run or a conversion: plain lines and tables, and a live bar on a terminal."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from jindo_core.plan import HOST_ROWS, Plan

SAID = {
    "weights": "weights in NF4", "constants": "their second-level constants", "embedding": "embedding",
    "head": "head", "norms": "norms", "adapters": "adapters (fp32)", "gradients": "their gradients",
    "optimizer_resident": "AdamW's moments", "optimizer_staging": "buffers for paged moments",
    "streaming_buffers": "buffers for what is streamed", "scratch": "scratch for a dequantized weight",
    "activations": "activations", "checkpoints": "inputs of checkpointed layers",
    "recompute": "a layer's backward pass", "loss_chunk": "loss, a chunk of logits at a time",
    "gathered": "layers gathered from all processes", "gradient_bucket": "gradients in a row, to be summed",
    "allocator": "the allocator's own (estimate)", "optimizer_paged": "AdamW's moments, paged",
    "offloaded_weights": "streamed layers", "offloaded_checkpoints": "offloaded inputs",
    "offloaded_embedding": "offloaded embedding", "offloaded_head": "streamed head",
}  # fmt: skip


def plan_table(plan: Plan, process: str) -> Table:
    """A memory plan as a table: what is there at the peak, what at another moment, and what lies on the host."""
    table = Table(title="Memory plan", title_justify="left", title_style="bold")
    table.add_column("what")
    table.add_column("MB", justify="right")
    for name, size in plan.rows.items():
        if size:
            table.add_row(SAID.get(name, process), f"{size / 1e6:,.1f}")
    table.add_section()
    table.add_row("peak", f"{plan.peak_bytes / 1e6:,.1f}", style="bold")
    rest = {name: size for name, size in plan.elsewhere.items() if size}
    if rest:
        table.add_section()
    for name, size in rest.items():
        where = "on the host" if name in HOST_ROWS else "not at the peak but at another moment"
        table.add_row(f"{where}: {SAID[name]}", f"{size / 1e6:,.1f}")
    return table


@contextmanager
def loading_bar(console: Console, what: str = "loading") -> Iterator[Callable[[int, int], None] | None]:
    """Shows how far a model is loaded, or files are read, and how fast; on a terminal only, and gone afterwards.

    Yields what `load_model` takes as `on_progress`: (bytes done, bytes in all); None where there is no terminal.
    """
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, whole: bar.update(task, completed=done, total=whole)


@contextmanager
def tokenizing_bar(console: Console, name: str) -> Iterator[Callable[[int, int, int], None] | None]:
    """Shows how far a file is tokenized; on a terminal only, and gone afterwards.

    Yields what `store.tokenize` takes as `on_progress`; None where there is no terminal.
    """
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("tokenizing {task.description}", markup=False), BarColumn(), DownloadColumn())
    more = (TextColumn("{task.fields[rows]:,} rows  left"), TimeRemainingColumn())
    with Progress(*columns, *more, console=console, transient=True) as bar:
        task = bar.add_task(name, total=None, rows=0)
        yield lambda rows, done, whole: bar.update(task, completed=done, total=whole, rows=rows)


SPOKEN_EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal."""


def spoken(say: Callable[[str], object]) -> Callable[[str, int, int | None], None]:
    """Progress without a terminal: what is told of each bit of work says a plain line now and then."""
    last = time.monotonic()

    def tell(part: str, done: int, whole: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= SPOKEN_EVERY:
            last = time.monotonic()
            say(f"{part}: {done / whole:.0%}" if whole else f"{part}: {done:,}")

    return tell


def typed(command: Sequence[str]) -> str:
    """A command line as a person would type it, in one line; a word with a ' in it between double quotes."""
    special = set('"$`\\!')
    words = (" ".join(word.split()) for word in command)
    return " ".join(f'"{w}"' if "'" in w and not set(w) & special else shlex.quote(w) for w in words)


class TrainingView:
    """Prints a run to standard output; without a terminal, one line every `logging_steps`."""

    def __init__(self, *, quiet: bool = False) -> None:
        """quiet: say nothing, for a rank that does not lead."""
        # Without a terminal rich assumes 80 columns and wraps; a log line should stay one line.
        self.console = Console(highlight=False)
        if quiet or not self.console.is_terminal:
            self.console = Console(highlight=False, width=160, quiet=quiet, force_terminal=False)
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def notice(self, text: str) -> None:
        """Something the user should know: a warning that does not stop the run."""
        self.console.print(f"note: {text}", style="yellow", markup=False)

    def plan(self, plan: Plan, process: str) -> None:
        """The rows of a plan; `process`: what the row of the context is called here."""
        self.console.print(plan_table(plan, process))

    def start(self, total: int) -> None:
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  {task.fields[memory]} MB  left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._bar.add_task("training", total=total, loss="-", speed="-", memory="-")

    @contextmanager
    def asking(self, total: int) -> Iterator[Callable[[int], None] | None]:
        """Shows how many of MMLU's questions are answered; on a terminal only, and gone afterwards."""
        if not self.console.is_terminal:
            yield None
            return
        if self._bar is not None:  # two live displays at once can't be: this is a line of training's
            bar = self._bar
            task = bar.add_task("MMLU", total=total, loss="-", speed="-", memory="-")
            try:
                yield lambda done: bar.update(task, completed=done, refresh=True)
            finally:
                bar.remove_task(task)
            return
        columns = (TextColumn("MMLU"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as own:
            alone = own.add_task("MMLU", total=total)
            yield lambda done: own.update(alone, completed=done, refresh=True)

    def step(self, row: dict[str, Any], total: int, left: float, log: bool) -> None:
        """One optimizer step; `row` as in metrics.jsonl, `left` in seconds."""
        memory = f"{row['memory_bytes'] / 1e6:,.0f}"
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=row["step"],
                loss=f"{row['loss']:.3f}",
                speed=f"{row['tokens_per_second']:,.0f}",
                memory=memory,
            )
        elif log:
            self.say(
                f"step {row['step']}/{total}  loss {row['loss']:.3f}  lr {row['learning_rate']:.2e}  "
                f"{row['tokens_per_second']:,.0f} tokens/s  {memory} MB  {_clock(left)} left"
            )

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def results(
        self, before: float, after: float, rows: int, answers: Sequence[tuple[str, str, str]], *,
        perplexities: tuple[float, float] | None = None,
    ) -> None:
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
            table = Table(title=title, title_justify="left", title_style="bold")
            table.add_column("before", ratio=1)
            table.add_column("after", ratio=1)
            table.add_row(_plain(first), _plain(second))
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
            table.add_row(_plain(subject), str(count), f"{before[subject][0] / count:.3f}", f"{right / count:.3f}")
        table.add_section()
        questions = sum(count for _, count in after.values())
        table.add_row("mean of the subjects", str(questions), f"{first:.4f}", f"{last:.4f}", style="bold")
        self.console.print(table)


def _plain(text: str) -> str:
    # Square brackets are markup to rich, and a model may say them.
    # A syllable that the token limit cut in half is left out.
    return (text.strip().rstrip("\N{REPLACEMENT CHARACTER}") or "(nothing)").replace("[", r"\[")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def draw_loss(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw training and held-out loss over steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    if steps:
        x, y = zip(*steps, strict=True)
        axes.plot(x, y, color="#9bb8d3", linewidth=1, label="training, each step")
        axes.plot(x, _smooth(y), color="#1f5f99", linewidth=2, label="training, moving average")
    held = [point for point in held if math.isfinite(point[1])]
    if held:
        x, y = zip(*held, strict=True)
        axes.plot(x, y, "o--", color="#c8442f", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    out: list[float] = []
    mean = 0.0
    for i, value in enumerate(values, start=1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**i))
    return out


class ConversionView:
    """Prints a conversion to standard output, with a bar on a terminal while tensors are written."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=160)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def bar(self, what: str, total: int | None, *, in_bytes: bool = True) -> Iterator[Callable[[int], None]]:
        """A bar of `total` bytes, or steps; what is yielded moves it on by so many. Without a terminal, a line
        now and then."""
        if not self.console.is_terminal and in_bytes and total is not None:
            self.say(f"{what}: {total / 1e6:,.0f} MB …")
        amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
        columns = (TextColumn(what), BarColumn(), amount, TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task, tell, done = bar.add_task(what, total=total), spoken(self.say), 0

            def advance(amount: int) -> None:
                nonlocal done
                done += amount
                bar.advance(task, amount)
                if not self.console.is_terminal:
                    tell(what, done, total)

            yield advance

    def drift(self, rows: Sequence[tuple[str, float, float, float]], text: str) -> None:
        """Rows: (model, loss, mean KL from the first row's, largest difference of a logit)."""
        self.say(f"On {text}:")
        table = Table()
        table.add_column("model")
        for name in ("loss", "KL from the first", "largest logit change"):
            table.add_column(name, justify="right")
        for i, (model, loss, divergence, largest) in enumerate(rows):
            table.add_row(model, f"{loss:.4f}", *(("", "") if i == 0 else (f"{divergence:.2e}", f"{largest:.3g}")))
        self.console.print(table)

    def evaluation(self, kept: Sequence[str], rows: Sequence[EvaluationRow]) -> None:
        """Figures of tasks. kept: how the model was, for each value of a row; of two the difference is shown too."""
        table = Table()
        for name in ("task", "figure"):
            table.add_column(name)
        for name in (*kept, *(["difference", "answers changed"] if len(kept) == 2 else []), "standard error", "of"):
            table.add_column(name, justify="right")
        for row in rows:
            figures = [f"{value:.4f}" for value in row.values]
            if len(kept) == 2:
                figures.append(f"{row.values[0] - row.values[1]:+.4f}")
                figures.append("" if row.changed is None else str(row.changed))
            figures += ["" if row.error is None else f"{row.error:.4f}", f"{row.count:,}"]
            table.add_row(row.task, row.figure, *figures)
        self.console.print(table)


@dataclass(frozen=True)
class EvaluationRow:
    """A figure of a task: its values, the first one's standard error, what it is a mean over, and how many answers the
    second model gave otherwise."""

    task: str
    figure: str
    values: Sequence[float]
    error: float | None
    count: int
    changed: int | None
