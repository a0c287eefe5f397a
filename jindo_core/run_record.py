"""What a training run leaves beside its adapter, so that `generate` needs no more than the folder."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jindo_core import checkpoint
from jindo_core.adapters import CONFIG, WEIGHTS, base_of
from jindo_core.config import TrainConfig
from jindo_core.data.templates import CHAT, Template, template_names
from jindo_core.errors import InputError
from jindo_core.files import read_json, write_atomically
from jindo_core.hub import holds_model
from jindo_core.settings import settings

FILE = "jindo_run.json"
METRICS = "metrics.jsonl"
ROOM = 4 << 20
"""Bytes that must be free in output_dir before a run begins: an adapter's, at least."""
TEMPLATE = "prompt_template.json"
"""A copy of the user's own template, beside the record that names it."""


@dataclass(frozen=True)
class RunRecord:
    """base_model: as the user named it, None for the embedded one. prompt_template_name: a template's name, or the path
    of its copy in the run's folder. results: figures of the run."""

    base_model: str | None
    prompt_template_name: str
    settings: dict[str, Any]
    results: dict[str, Any]


def record_bytes(record: RunRecord) -> bytes:
    """What the record's file holds."""
    return (json.dumps(vars(record), indent=2, ensure_ascii=False) + "\n").encode()


def write_run(folder: Path, record: RunRecord) -> None:
    """Write the record into `folder`, whole or not at all."""
    write_atomically(folder / FILE, record_bytes(record))


def keep_template(folder: Path, name: str, template: Template) -> str:
    """What to record of a run's template: a name of the package's, or that of a copy of the user's own file, which may
    be changed or taken away later."""
    if name in (CHAT, *template_names()):
        (folder / TEMPLATE).unlink(missing_ok=True)  # another run's
        return name
    texts = {key: value for key, value in vars(template).items() if value and key != "name"}
    write_atomically(folder / TEMPLATE, (json.dumps(texts, indent=2, ensure_ascii=False) + "\n").encode())
    return TEMPLATE


def by_name(text: str) -> str:
    """A local path's last part, which says nothing of the machine; other names, a Hub id's say, as they are."""
    path = Path(text).expanduser()
    local = path.is_absolute() or text.startswith((".", "~")) or path.exists()
    return path.resolve().name if local else text


def shown(config: TrainConfig) -> dict[str, Any]:
    """The settings as others may see them: paths by their last part, tuples as lists."""
    found = {}
    for name, value in dataclasses.asdict(config).items():
        known = settings(TrainConfig)[name]
        if known.path or name == "prompt_template_name":
            value = [by_name(one) for one in value] if isinstance(value, tuple) else value and by_name(value)
        found[name] = list(value) if isinstance(value, tuple) else value
    return found


def read_run(folder: str | Path | None) -> RunRecord | None:
    """The record in `folder`; None where there is none (an adapter that another tool made)."""
    path = None if folder is None else Path(folder).expanduser() / FILE
    if path is None or not path.exists():
        return None
    raw = read_json(path)
    names = {field.name for field in fields(RunRecord)}
    if not names <= raw.keys():
        raise InputError(f"{path} lacks {sorted(names - raw.keys())[0]}: it is no record of a run")
    base, template = raw["base_model"], raw["prompt_template_name"]
    if not isinstance(base, str | None) or not isinstance(template, str):
        raise InputError(f"{path} has base_model {base!r} and template {template!r}, expected names: it was damaged")
    if template == TEMPLATE:
        raw["prompt_template_name"] = str(path.with_name(TEMPLATE))
    return RunRecord(**{name: raw[name] for name in names})


def base_and_run(base_model: str | None, lora_weights: str | None) -> tuple[str | None, RunRecord | None]:
    """The base to load, the adapter's where none is named, and the adapter's record. Raises InputError."""
    if lora_weights is not None and not Path(lora_weights).expanduser().is_dir():
        raise InputError(f"lora_weights {lora_weights} is no folder: expected one that holds a LoRA adapter")
    if lora_weights is not None and holds_model(lora_weights):
        raise InputError(f"lora_weights {lora_weights} is a model, not an adapter: --base_model names a model")
    run = read_run(lora_weights)
    return base_model or (run.base_model if run else base_of(lora_weights)), run


def choose_output_dir(config: TrainConfig, named: bool) -> Path:
    """The folder to write to. One that holds a run is refused, unless that goes on; a default name gets the next free
    number, or the last one with checkpoints to go on from."""
    folder, going_on = Path(config.output_dir).expanduser(), _goes_on(config)
    if going_on and not named:
        numbered = [folder, *_numbered(folder)]
        folder = next((one for one in reversed(numbered) if checkpoint.folders(one)), folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file, expected a folder")
    if not (name := str(folder.absolute())).isascii() and re.search("[\ud800-\udfff]", name):
        raise InputError(f"output_dir {str(folder)!a} is no UTF-8, and its files name it: give another folder")
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"output_dir {folder} can't be made: {nearest} is no folder that can be written to")
    if (free := shutil.disk_usage(nearest).free) < ROOM:
        raise InputError(
            f"output_dir {folder} has {free / 1e6:.1f} MB free, expected at least {ROOM / 1e6:.1f}: make room, or give "
            "another folder"
        )
    if config.overwrite_output_dir or not _holds_run(folder) or (going_on and checkpoint.folders(folder)):
        return folder
    if named and not any((folder / name).exists() for name in (WEIGHTS, CONFIG, FILE)):
        raise InputError(
            f"output_dir {folder} holds checkpoints of a run that has not ended: --resume goes on with it; or give "
            "another folder, or --overwrite_output_dir to replace it"
        )
    if named:
        raise InputError(
            f"output_dir {folder} holds another run: give another folder, or --overwrite_output_dir to replace it"
        )
    return folder.with_name(f"{folder.name}-{len(_numbered(folder)) + 2}")


def _goes_on(config: TrainConfig) -> bool:
    """Whether the run goes on in the folder that holds its checkpoints."""
    named = config.resume_from_checkpoint
    if named in (None, "True"):
        return config.resume or named is not None
    return Path(named).expanduser().resolve().parent == Path(config.output_dir).expanduser().resolve()


def _numbered(folder: Path) -> list[Path]:
    """`folder`-2, `folder`-3, … as far as they hold runs."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return list(itertools.takewhile(_holds_run, names))


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (WEIGHTS, CONFIG, FILE)) or bool(checkpoint.folders(folder))
