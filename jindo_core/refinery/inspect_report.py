"""`jindo-core data inspect`: an inspection as tables, a picture and JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jindo_core.data.formats import detect_format
from jindo_core.data.readers import open_rows
from jindo_core.data.templates import Template, load_template
from jindo_core.data_config_inspect import InspectConfig
from jindo_core.errors import InputError
from jindo_core.files import write_atomically
from jindo_core.hub import resolve_model
from jindo_core.progress import loading_bar
from jindo_core.refinery.inspect import FIELDS, LIMITS, Inspection, inspect
from jindo_core.refinery.lengths import draw_lengths, text_histogram
from jindo_core.refinery.recipe import load_recipe, recipe_names
from jindo_core.tokenizer import Tokenizer, load_tokenizer

PICTURE, REPORT = "lengths.png", "report.json"
_SHOWN = 6  # languages of a field, and columns


def run_inspect(config: InspectConfig) -> Inspection:
    """The `data inspect` command: look, print, and write the picture and the JSON where a folder is given.

    Raises:
        InputError: no such data, a format that is not known, a tokenizer that can't be read, a folder that can't be
            made, no row that can be read.
    """
    source = open_rows(config.data_path or "")
    form = detect_format(source, config.dataset_format)
    folder = None if config.output_dir is None else _folder(Path(config.output_dir), config.overwrite)
    tokenizer, template = _tokenizer(config)
    with loading_bar(Console(stderr=True), "reading twice") as on_progress:
        found = inspect(
            source, form, tokenizer=tokenizer, template=template, sample=config.sample, seed=config.seed,
            on_progress=on_progress,
        )  # fmt: skip
    if found.unreadable == found.rows:
        why = (found.broken + found.reasons)[0]
        raise InputError(f"no row can be read as {form.name}: {why}")
    text = json.dumps(found.as_json(), ensure_ascii=False, indent=1)
    if config.json:
        print(text)
    else:
        show(found, config.prompt_template_name, named=config.dataset_format is not None)
    if folder is not None:
        write_atomically(folder / REPORT, (text + "\n").encode())
        _draw(found, folder / PICTURE)
        if not config.json:
            print(f"written: {folder / PICTURE} and {REPORT}")
    return found


def _folder(path: Path, overwrite: bool) -> Path:
    there = next((name for name in (REPORT, PICTURE) if (path / name).exists()), None)
    if there is not None and not overwrite:
        raise InputError(f"{path / there} is there already: give another --output_dir, or --overwrite to replace it")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir {path} can't be made ({error.strerror}): give another folder") from None
    return path


def _tokenizer(config: InspectConfig) -> tuple[Tokenizer | None, Template | None]:
    if config.tokenizer is None and config.base_model is None:
        return None, None
    path = Path(config.tokenizer) if config.tokenizer is not None else resolve_model(config.base_model)
    tokenizer = load_tokenizer(path)
    return tokenizer, load_template(config.prompt_template_name, tokenizer)


def _draw(found: Inspection, path: Path) -> None:
    """The picture, whole or not at all."""
    named = {name: found.characters[name] for name in FIELDS if found.characters[name].count}
    panels = [("characters", named)]
    if found.sample.row_tokens.count:
        panels.append(("tokens of a row, template and all", {"rows": found.sample.row_tokens}))
    scratch = path.with_name(f".{path.name}")
    draw_lengths(panels, LIMITS if len(panels) > 1 else (), scratch)
    write_atomically(path, scratch.read_bytes())
    scratch.unlink()


def _steps_of(recipe: str) -> set[str]:
    return {step.name for step in load_recipe(recipe).steps}


def show(found: Inspection, template_name: str, *, named: bool = False) -> None:
    """Print an inspection to standard output. named: the format was named, not detected."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    size = sum(size for _, size in found.files)
    files = found.files[0][0] if len(found.files) == 1 else f"{len(found.files)} files"
    say(f"{files}: {found.rows:,} rows, {size / 1e6:,.1f} MB")
    for line in found.broken:
        say(f"BROKEN, nothing behind this was read: {line}")
    columns = ", ".join(
        name if count == found.rows else f"{name} (in {count:,})"
        for name, count in found.columns.most_common(2 * _SHOWN)
    )
    say(f"format: {found.format}, {'as named' if named else 'by its columns'}: {columns}")
    if found.unreadable:
        say(f"{found.unreadable:,} rows can't be read as {found.format}, such as: {found.reasons[0]}")
    if len(found.rounds) > 1 or 1 not in found.rounds:
        said = ", ".join(f"{rows:,} of {count}" for count, rows in sorted(found.rounds.items())[:10])
        say(f"rounds: rows by how many they have: {said}")
    console.print(_lengths_table(found))
    say(f"characters of a row (of {found.row_characters.count:,})")
    say("\n".join(text_histogram(found.row_characters)))
    repeated = ", ".join(f"{count:,} {what}" for what, count in found.repeated.items())
    say(f"equal to an earlier one: {repeated} (prompts: system, instruction, input)")
    _show_sample(found, template_name, console, say)


def _lengths_table(found: Inspection) -> Table:
    table = Table(title="Lengths", title_justify="left", title_style="bold")
    table.add_column("of")
    names = ("count", "mean", "p5", "p50", "p95", "p99", "max")
    for name in ("texts", *names[1:]):
        table.add_column(name, justify="right")
    rows = [(f"{name}, characters", found.characters[name]) for name in FIELDS if found.characters[name].count]
    rows.append(("row, characters", found.row_characters))
    if found.sample.row_tokens.count:
        rows.append(("row, tokens (sampled)", found.sample.row_tokens))
    for title, lengths in rows:
        told = lengths.as_json()
        table.add_row(title, *(f"{told[name]:,.0f}" for name in names))
    return table


def _show_sample(found: Inspection, template_name: str, console: Console, say) -> None:  # type: ignore[no-untyped-def]
    sample = found.sample
    which = "all rows" if sample.rows == sample.of else f"a seeded sample of {sample.rows:,} of {sample.of:,} rows"
    say(f"\nof {which}:")
    letters = max(sample.scripts.total(), 1)
    say("letters: " + (", ".join(f"{name} {n / letters:.1%}" for name, n in sample.scripts.most_common()) or "none"))
    for name in FIELDS:
        languages = sample.languages[name]
        if languages:
            said = ", ".join(f"{code} {n / languages.total():.1%}" for code, n in languages.most_common(_SHOWN))
            say(f"language of {name}: {said}")
    if sample.tokens:
        table = Table(title="Tokens", title_justify="left", title_style="bold")
        for name in ("field", "language"):
            table.add_column(name)
        for name in ("texts", "tokens", "characters/token", "tokens/character"):
            table.add_column(name, justify="right")
        for (name, code), count in sorted(sample.tokens.items(), key=lambda entry: -entry[1].tokens)[: 2 * _SHOWN]:
            ratios = count.characters / max(count.tokens, 1), count.tokens / max(count.characters, 1)
            table.add_row(name, code, f"{count.texts:,}", f"{count.tokens:,}", *(f"{ratio:.2f}" for ratio in ratios))
        console.print(table)
        rows = max(sample.row_tokens.count, 1)
        above = ", ".join(
            f"{limit}: {over:,} ({over / rows:.1%})" for limit in LIMITS if (over := sample.row_tokens.above(limit))
        )
        say(f"rows longer than cutoff_len, in template {template_name}: {above or 'none'}")
        if sample.misfits:
            say(f"{sample.misfits:,} rows not counted there: the template has no place for a system message")
        say("\n".join(text_histogram(sample.row_tokens)))
    say(f"near duplicates: {sample.near:,} of {sample.near_rows:,} rows are like an earlier one and not equal to it")
    dirty = [counts for counts in sample.dirt if counts.changed or counts.rejected or counts.flagged or counts.found]
    if not dirty:
        say("dirt: none that the refinery's steps know")
        return
    table = Table(title="Dirt: what each step of `data clean` would do by itself", title_justify="left")
    table.add_column("step")
    table.add_column("in recipe")
    for name in ("change", "reject", "flag"):
        table.add_column(name, justify="right")
    table.add_column("found")
    for counts in dirty:
        told = [f"{n:,} {what}" for what, n in (counts.reasons + counts.found).most_common(3)]
        numbers = (f"{n:,}" if n else "" for n in (counts.changed, counts.rejected, counts.flagged))
        recipes = [name for name in recipe_names() if counts.name in _steps_of(name)]
        table.add_row(counts.name, ", ".join(recipes) or "none", *numbers, "; ".join(told))
    console.print(table)
    say("N in a finding is any number. Steps of no recipe run where a recipe of your own names them (docs/refinery.md)")
