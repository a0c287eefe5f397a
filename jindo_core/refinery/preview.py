"""`jindo-core data preview`: rows as a model will see them."""

from __future__ import annotations

import itertools
from pathlib import Path

from rich.console import Console

from jindo_core.data.examples import PROMPTS_TOO, Encoder
from jindo_core.data.preview import preview
from jindo_core.data.records import stream_records
from jindo_core.data.templates import load_template
from jindo_core.data_config_inspect import PreviewConfig
from jindo_core.errors import InputError
from jindo_core.formats import open_checkpoint
from jindo_core.hub import resolve_model
from jindo_core.tokenizer import load_tokenizer


def run_preview(config: PreviewConfig) -> None:
    """The `data preview` command: the first rows, to standard output.

    Raises:
        InputError: no such data, a row that does not fit its format or the template, no tokenizer.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    records = list(itertools.islice(stream_records(config.data_path or "", config.dataset_format), config.rows))
    path = resolve_model(config.base_model) if config.tokenizer is None else Path(config.tokenizer)
    tokenizer = load_tokenizer(path)
    _note_context(config, path, console)
    encoder = Encoder(
        tokenizer, load_template(config.prompt_template_name, tokenizer), cutoff_len=config.cutoff_len,
        train_on_inputs=config.train_on_inputs, source_max_len=config.source_max_len,
        target_max_len=config.target_max_len,
    )  # fmt: skip
    rule = PROMPTS_TOO if config.train_on_inputs else "answers and their ends are learned, prompts are not"
    console.print(f"note: {rule}", style="yellow", markup=False)
    preview(records, encoder, tokenizer, config.rows, console)


def _note_context(config: PreviewConfig, path: Path, console: Console) -> None:
    """Say where rows are shown longer than `train` would take them; a tokenizer alone knows no context."""
    if config.tokenizer is not None:
        return
    try:
        context = open_checkpoint(path).config.context
    except InputError:  # a folder of a tokenizer, or weights that are not there yet
        return
    apart = None if config.source_max_len is None or config.target_max_len is None else (
        config.source_max_len + config.target_max_len
    )
    longest = config.cutoff_len if apart is None else apart
    if context is not None and longest > context:
        said = f"rows of {longest} tokens are beyond the model's context: train takes {context} at most"
        console.print(f"note: {said}", style="yellow", markup=False)
