"""What a person sees of loading, tokenizing and a conversion; a plan as a table, and the loss as a picture."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from rich.text import Text

from jindo_core.files import write_atomically
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


class LastingOutput:
    """Standard output for a run that must not die for its display: once its reader has gone (`| head`), or its disk is
    full, that is said on standard error, and what follows is written nowhere."""

    def __init__(self) -> None:
        self._lost = False

    def write(self, text: str) -> int:
        self._try(lambda: _standard_output().write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: _standard_output().flush())

    def isatty(self) -> bool:
        return _standard_output().isatty()

    def fileno(self) -> int:
        return _standard_output().fileno()

    @property
    def encoding(self) -> str:
        """What the letters are written in; rich asks."""
        return _standard_output().encoding

    def _try(self, do: Callable[[], object]) -> None:
        if self._lost:
            return
        try:
            do()
        except OSError as error:
            self._lost = True
            _to_nowhere(_standard_output())
            try:
                print(
                    f"note: standard output takes no more ({error.strerror}): the run goes on and shows nothing",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            except OSError:  # that one has gone, too: nobody is left to be told
                _to_nowhere(sys.stderr)


def _standard_output() -> Any:
    # While rich draws a bar, sys.stdout is its own, which writes to the console.
    return getattr(sys.stdout, "rich_proxied_file", sys.stdout)


def _to_nowhere(stream: Any) -> None:
    """What Python still holds of a stream is written when the process ends: give it somewhere to go."""
    with contextlib.suppress(io.UnsupportedOperation):  # it has no file of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
def loading_bar(
    console: Console, what: str = "loading", *, shown: bool = True
) -> Iterator[Callable[[int, int], None] | None]:
    """Shows how far a model is loaded, or files are read, and how fast; on a terminal only, and gone afterwards.

    Args:
        shown: whether a terminal may show one.
    Yields what `load_model` takes as `on_progress`: (bytes done, bytes in all); None where nothing is shown.
    """
    if not console.is_terminal or not shown:
        yield None
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, whole: bar.update(task, completed=done, total=whole)


@contextmanager
def tokenizing_bar(
    console: Console, name: str, *, shown: bool = True
) -> Iterator[Callable[[int, int, int], None] | None]:
    """Shows how far a file is tokenized; on a terminal only, and gone afterwards.

    Args:
        shown: whether a terminal may show one.
    Yields what `store.tokenize` takes as `on_progress`; None where nothing is shown.
    """
    if not console.is_terminal or not shown:
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


def draw_loss(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw training and held-out loss over steps, as PNG; the file is written whole or not at all. Raises OSError."""
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
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    plt.close(figure)
    write_atomically(path, drawn.getvalue())


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
        named = TextColumn("{task.description}", markup=False)  # a file's name, say
        columns = (named, BarColumn(), amount, TextColumn("left"), TimeRemainingColumn())
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
            changes = ("", "") if i == 0 else (f"{divergence:.2e}", f"{largest:.3g}")
            table.add_row(Text(model), f"{loss:.4f}", *changes)
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
            # Figures bear the names of a file's subjects: nothing in them is markup.
            table.add_row(row.task, Text(row.figure), *figures)
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
