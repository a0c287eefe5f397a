"""Every setting of `data inspect`, `data convert`, `data preview` and `data refine`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jindo_core.config import check_device, read_fields
from jindo_core.data_config import check_apart
from jindo_core.errors import InputError
from jindo_core.settings import Config, setting, settings

_DATA, _MODEL, _OUTPUT = "data", "model and files", "what is written"
_WORK, _CHECKS, _SAMPLING, _MEMORY = "the work", "checks of a rewritten text", "sampling", "memory and arithmetic"
_SEED_LIMIT = 2**63 - 1
OUTPUT_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""What rows can be written as."""


def _data_setting() -> Any:
    return setting(None, _DATA, "file, folder or Hub id of rows", path=True, metavar="DATA")


def _format_setting() -> Any:
    return setting(None, _DATA, "the rows' format; left out: by their columns", metavar="NAME")


def _output_setting() -> Any:
    return setting(None, _OUTPUT, "file of rows to write: " + ", ".join(OUTPUT_SUFFIXES), path=True, metavar="FILE")


def _overwrite_setting() -> Any:
    return setting(False, _OUTPUT, "replace the file that is there, once the new one is complete")


def base_setting() -> Any:
    what = "folder, .gguf file or Hub id; left out: the adapter's, else SmolLM2-135M"
    return setting(None, _MODEL, what, path=True, metavar="MODEL")


def adapter_setting() -> Any:
    return setting(None, _MODEL, "folder of a LoRA adapter; left out: none", path=True, metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """The settings of `jindo-core data inspect`. Raises InputError when a value is wrong."""

    data_path: str | None = _data_setting()
    dataset_format: str | None = _format_setting()
    base_model: str | None = setting(None, _MODEL, "count tokens as this model does", path=True, metavar="MODEL")
    tokenizer: str | None = setting(None, _MODEL, "or with this one: a folder or .gguf file", path=True, metavar="PATH")
    prompt_template_name: str = setting("alpaca", _MODEL, "template of the rows counted in tokens", metavar="NAME")
    sample: int = setting(
        20_000, _WORK, "rows for languages, tokens, near duplicates and dirt, drawn at random (0: all)", at_least=0
    )
    seed: int = setting(42, _WORK, "of the sample", at_least=0, at_most=_SEED_LIMIT)
    output_dir: str | None = setting(None, _OUTPUT, "folder for lengths.png and report.json", path=True, metavar="DIR")
    overwrite: bool = setting(False, _OUTPUT, "replace an earlier report there")
    json: bool = setting(False, _OUTPUT, "JSON for machines in place of the tables")

    def __post_init__(self) -> None:
        read_fields(self)
        _need(self, "data_path")
        _check_tokenizer("inspect", self.base_model, self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class DataConvertConfig:
    """The settings of `jindo-core data convert`. Raises InputError when a value is wrong."""

    data_path: str | None = _data_setting()
    dataset_format: str | None = _format_setting()
    output_path: str | None = _output_setting()
    to: str | None = setting(
        None, _OUTPUT, "format: alpaca, sharegpt, messages, orca, koalpaca, qa, self-instruct (prompt/completion), …",
        metavar="NAME",
    )  # fmt: skip
    keep_columns: bool = setting(False, _OUTPUT, "take columns along that the rows' format does not know (id, …)")
    rounds: Literal["split", "first", "refuse"] = setting(
        "refuse", _WORK, "what the target can't hold of a conversation: a row for each round, the first round, an error"
    )
    rejected_path: str | None = setting(
        None, _OUTPUT, "JSON lines of the rows that can't be said there, with the reason; left out: one is an error",
        path=True, metavar="FILE",
    )  # fmt: skip
    overwrite: bool = _overwrite_setting()

    def __post_init__(self) -> None:
        read_fields(self)
        _need(self, "data_path", "output_path", "to")
        check_output(self.output_path, self.overwrite)
        named = {name: getattr(self, f"{name}_path") for name in ("data", "output", "rejected")}
        check_apart({f"--{name}_path": path for name, path in named.items() if path is not None})
        if self.rejected_path is not None and not self.rejected_path.lower().endswith((".jsonl", ".json")):
            raise InputError(f"--rejected_path: got {self.rejected_path}, expected a name that ends in .jsonl or .json")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """The settings of `jindo-core data preview`. Raises InputError when a value is wrong."""

    data_path: str | None = _data_setting()
    dataset_format: str | None = _format_setting()
    base_model: str | None = setting(
        None, _MODEL, "the model whose tokenizer it is; left out: SmolLM2-135M", path=True, metavar="MODEL"
    )
    tokenizer: str | None = setting(None, _MODEL, "or this one: a folder or .gguf file", path=True, metavar="PATH")
    prompt_template_name: str = setting("alpaca", _MODEL, "a template's name or file", metavar="NAME")
    rows: int = setting(3, _WORK, "rows to show, from the first", at_least=1)
    cutoff_len: int = setting(256, _WORK, "longest row in tokens", at_least=2)
    train_on_inputs: bool = setting(True, _WORK, "the loss counts on the prompt too")
    source_max_len: int | None = setting(None, _WORK, "longest prompt in tokens, in place of cutoff_len", at_least=1)
    target_max_len: int | None = setting(None, _WORK, "longest answer in tokens, in place of cutoff_len", at_least=1)

    def __post_init__(self) -> None:
        read_fields(self)
        _need(self, "data_path")
        _check_tokenizer("preview", self.base_model, self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """The settings of `jindo-core data refine`. Raises InputError when a value is wrong."""

    data_path: str | None = _data_setting()
    dataset_format: str | None = _format_setting()
    max_rows: int = setting(0, _DATA, "rows to take, from the first (0: all)", at_least=0)
    base_model: str | None = base_setting()
    lora_weights: str | None = adapter_setting()
    prompt_template_name: str | None = setting(
        None, _MODEL, "a template's name or file; left out: the adapter's, else alpaca", metavar="NAME"
    )
    output_path: str | None = _output_setting()
    overwrite: bool = _overwrite_setting()
    restart: bool = setting(False, _OUTPUT, "throw away the rows of a run that was stopped")

    mode: Literal["rewrite", "score"] | None = setting(None, _WORK, "rewrite a text of each row, or score its answer")
    field: Literal["output", "instruction", "input"] = setting("output", _WORK, "the text to rewrite")
    instruction: str | None = setting(
        None, _WORK, "what the model is asked; {instruction}, {input}, {output}: the row's", verbatim=True,
        metavar="TEXT",
    )  # fmt: skip
    input: str | None = setting(
        None, _WORK, "what it is asked about; left out: the text to rewrite, unless the instruction holds it",
        verbatim=True, empty_is_none=True, metavar="TEXT",
    )  # fmt: skip
    prefix: str = setting("score_", _WORK, "of the columns that a score adds", metavar="TEXT")
    cutoff_len: int = setting(1024, _WORK, "longest row that is scored, in tokens; what is beyond is cut", at_least=2)

    min_length_ratio: float = setting(0.5, _CHECKS, "shortest, in characters of the old text", at_least=0)
    max_length_ratio: float = setting(2.0, _CHECKS, "longest, in characters of the old text", above=0)

    max_new_tokens: int = setting(512, _SAMPLING, "longest rewritten text in tokens", at_least=1)
    temperature: float = setting(0.0, _SAMPLING, "0: always the likeliest token (greedy)", at_least=0)
    top_p: float = setting(1.0, _SAMPLING, "sample from this share of the probability", above=0, at_most=1)
    top_k: int = setting(0, _SAMPLING, "sample from the k likeliest tokens (0: all)", at_least=0)
    seed: int = setting(42, _SAMPLING, "of the sampling, with the row's number", at_least=0, at_most=_SEED_LIMIT)

    batch_size: int = setting(16, _MEMORY, "rows at a time", at_least=1)
    quantize: Literal["nf4", "none"] = setting("nf4", _MEMORY, "how the base model is kept")
    double_quant: bool = setting(True, _MEMORY, "quantize NF4's scales too")
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", _MEMORY, "of the arithmetic")
    device: str = setting("auto", _MEMORY, "auto, cpu, cuda or cuda:N", metavar="DEVICE")

    def __post_init__(self) -> None:
        read_fields(self)
        _need(self, "data_path", "output_path", "mode")
        check_output(self.output_path, self.overwrite)
        check_apart({"--data_path": str(self.data_path), "--output_path": str(self.output_path)})
        check_device(self.device)
        if self.mode == "rewrite":
            _need(self, "instruction")
        if self.min_length_ratio > self.max_length_ratio:
            raise InputError(
                f"--min_length_ratio: got {self.min_length_ratio:g}, expected at most --max_length_ratio "
                f"{self.max_length_ratio:g}"
            )
        for name in ("instruction", "input"):
            text = getattr(self, name)
            # Bytes on a command line that are no UTF-8 arrive as lone surrogates, which no tokenizer takes.
            if text is not None and re.search("[\ud800-\udfff]", text):
                raise InputError(f"--{name}: got bytes that are no UTF-8, expected text in UTF-8")


def _need(config: Config, *names: str) -> None:
    for name in names:
        if getattr(config, name) is None:
            known = settings(type(config))[name]
            expected = f"{known.expected()} ({known.help})" if known.choices else known.help
            raise InputError(f"--{name}: got nothing, expected {expected}")


def _check_tokenizer(command: str, base_model: str | None, tokenizer: str | None) -> None:
    if base_model is not None and tokenizer is not None:
        raise InputError(f"{command}: got both --base_model and --tokenizer, expected one: they name the same thing")


def check_output(path: str | None, overwrite: bool) -> Path:
    """See that a file of rows can be written there, before any work. Raises InputError."""
    found = Path(path or "").expanduser()
    if found.suffix.lower() not in OUTPUT_SUFFIXES:
        raise InputError(f"--output_path: got {path}, expected a name that ends in {' or '.join(OUTPUT_SUFFIXES)}")
    if found.is_dir():
        raise InputError(f"--output_path: {path} is a folder, expected a file")
    if found.exists() and not overwrite:
        raise InputError(f"--output_path: {path} is there already: give another name, or --overwrite to replace it")
    if not found.parent.is_dir():
        raise InputError(f"--output_path: {found.parent} is no folder: make it, or give another name")
    return found
