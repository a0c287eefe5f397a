"""What a person sees of the refinery: the jobs of `data clean` and `data split`, a bar, a table, the list of steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from jindo_core.data_config import CleanConfig, SplitConfig
from jindo_core.progress import spoken
from jindo_core.refinery.cleaning import Report, clean
from jindo_core.refinery.recipe import STEPS, step_help
from jindo_core.refinery.split import split
from jindo_core.settings import settings, show

_MANY = 0.05  # share of near duplicates from which on a person is told
_COLUMNS = ("in", "changed", "rejected", "flagged", "made", "out")


def run_clean(config: CleanConfig) -> None:
    """Cleans as `config` says, and prints the report. Raises what `clean` does."""
    console = _console()
    if config.list_steps:
        for line in step_lines():
            console.print(line, markup=False, soft_wrap=True)
        return
    with bars() as tell:
        report = clean(config, tell)
    if config.json:
        print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
        return
    show_report(report, console)
    written = "dry run: nothing was written" if config.dry_run else f"written to {config.output_path}"
    console.print(
        f"{report.rows_in:,} rows in + {report.made:,} made = {report.rows_out:,} out + {report.rejected:,} rejected; "
        f"{written}",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    if report.rejected and config.rejected_path is None and not config.dry_run:
        console.print("note: --rejected_path FILE keeps the rejected rows", style="yellow", markup=False)


def run_split(config: SplitConfig) -> None:
    """Splits as `config` says, and prints the counts. Raises what `split` does."""
    with bars() as tell:
        done = split(config, tell)
    if config.json:
        print(json.dumps(done.as_dict(), indent=2))
        return
    _console().print(
        f"{done.rows_in:,} rows in = {done.train_rows:,} in {done.train} + {done.test_rows:,} in {done.test} "
        f"(seed {done.seed}), in {config.output_dir}",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def show_report(report: Report, console: Console) -> None:
    """A line a step; below it what it rejected and flagged for, and what it found."""
    table = Table(title=f"recipe {report.recipe}, format {report.format}", title_justify="left", title_style="bold")
    table.add_column("step")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for step in report.steps:
        numbers = (step.rows_in, step.changed, step.rejected, step.flagged, step.made, step.rows_out)
        table.add_row(step.name, *(f"{number:,}" for number in numbers))
    console.print(table)
    for step in report.steps:
        for said, counts in (("rows", step.reasons), ("found", step.found)):
            if counts:
                listed = "; ".join(f"{name}: {count:,}" for name, count in counts.most_common())
                console.print(f"{step.name}, {said}: {listed}", markup=False, soft_wrap=True)
        if step.name.startswith("near_duplicates") and step.rejected > _MANY * step.rows_in:
            console.print(
                f"note: {step.name} rejected {step.rejected / step.rows_in:.0%} of its rows: look at some of "
                "them; where they only share a frame, give a higher threshold, or of: answer",
                style="yellow", markup=False, soft_wrap=True,
            )  # fmt: skip
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)


def step_lines() -> Iterator[str]:
    """Every step with its options and their defaults."""
    for name, step in STEPS.items():
        yield f"{name}: {step_help(step)}"
        for option in settings(step).values():
            choices = f" ({' | '.join(option.choices)})" if option.choices else ""
            typed = show(option.default)
            default = "" if option.default in (None, ()) else f" [{typed if typed.isprintable() else repr(typed)}]"
            yield f"    {option.name}: {option.help}{choices}{default}"


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each part of the work, gone afterwards; without a terminal a line now and then. On standard error,
    beside any JSON.

    Yields what to call with the part's name, how far it has come, and the whole.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield spoken(lambda line: print(line, file=sys.stderr, flush=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {}

        def tell(part: str, done: int, whole: int) -> None:
            if part not in tasks:
                tasks[part] = progress.add_task(part, total=whole)
            progress.update(tasks[part], completed=done, total=whole)

        yield tell


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)
