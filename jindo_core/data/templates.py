"""Prompt templates: how an instruction becomes the text that the model continues."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jindo_core.errors import InputError, nearest

_FIELD = re.compile(r"\{(instruction|input)\}")
_SUFFIXES = (".yaml", ".yml", ".json")
_KEYS = {"description", "prompt_input", "prompt_no_input", "response_split"}


@dataclass(frozen=True)
class Template:
    """A prompt template.

    prompt_input and prompt_no_input hold {instruction} (and {input}); any other brace is itself. The answer
    follows the prompt directly. response_split is the text between a prompt and its answer.
    """

    name: str
    description: str
    prompt_input: str
    prompt_no_input: str
    response_split: str

    def prompt(self, instruction: str, input: str | None = None) -> str:
        """The prompt of a row. An empty input is no input.

        Both fields are filled in one pass, so text of theirs that looks like a field stays as it is.
        """
        values = {"instruction": instruction, "input": input or ""}
        text = self.prompt_input if input else self.prompt_no_input
        return _FIELD.sub(lambda match: values[match[1]], text)

    def response(self, text: str) -> str:
        """What follows the last response_split in `text`, stripped; all of it, stripped, where there is none."""
        return text.rpartition(self.response_split)[2].strip()


def template_names() -> list[str]:
    """Names of the templates that come with the package."""
    folder = files("jindo_core.data") / "templates"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_template(name_or_path: str | Path) -> Template:
    """A template of the package by name, or the user's own from a .yaml, .yml or .json file.

    The file holds prompt_input, prompt_no_input and response_split, and a description if it likes: the form
    of alpaca-lora's templates.

    Raises:
        InputError: no such name or file, or a file that is no template.
    """
    text = str(name_or_path)
    if text in template_names():
        return _read(text, Path(str(files("jindo_core.data") / "templates" / f"{text}.yaml")))
    path = Path(text).expanduser()
    if path.suffix.lower() not in _SUFFIXES:
        names = template_names()
        raise InputError(
            f"prompt template {text!r} is unknown: expected {', '.join(names)}, or a .yaml or .json file."
            + nearest(text, names)
        )
    if not path.is_file():
        raise InputError(f"prompt template file {text} does not exist: expected a .yaml or .json file")
    return _read(path.stem, path)


def _read(name: str, path: Path) -> Template:
    raw = _parse(path)
    if not isinstance(raw, dict):
        raise InputError(f"prompt template {path} is a {type(raw).__name__}, expected keys and values")
    required = _KEYS - {"description"}
    for key in sorted(required - raw.keys()):
        raise InputError(f"prompt template {path} lacks {key}: expected {', '.join(sorted(required))}")
    for key in raw:
        if key not in _KEYS:
            raise InputError(f"prompt template {path} has an unknown key {key!r}.{nearest(str(key), _KEYS)}")
        if not isinstance(raw[key], str):
            raise InputError(f"prompt template {path}: {key} is {raw[key]!r}, expected text")
    for key, fields in (("prompt_input", {"instruction", "input"}), ("prompt_no_input", {"instruction"})):
        found = set(_FIELD.findall(raw[key]))
        if found != fields:
            wanted = " and ".join(f"{{{field}}}" for field in sorted(fields, reverse=True))
            held = " and ".join(f"{{{field}}}" for field in sorted(found, reverse=True)) or "no field"
            raise InputError(f"prompt template {path}: {key} holds {held}, expected {wanted}")
    if not raw["response_split"].strip():
        raise InputError(f"prompt template {path}: response_split is empty, expected the text before an answer")
    return Template(
        name,
        raw.get("description", ""),
        raw["prompt_input"],
        raw["prompt_no_input"],
        raw["response_split"],
    )


def _parse(path: Path) -> Any:
    import yaml

    try:
        text = path.read_bytes().decode("utf-8-sig")
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise InputError(f"prompt template {path} is no UTF-8 (byte {error.start}): save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(f"prompt template {path}, line {error.lineno}: broken JSON ({error.msg})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"prompt template {path}{where}: broken YAML ({problem})") from error
