"""Settings from a YAML or TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jindo_core.config import TrainConfig, accepted, did_you_mean, meant
from jindo_core.errors import InputError
from jindo_core.settings import Config


def read_config_file(path: str | Path, config_class: type[Config] = TrainConfig) -> dict[str, Any]:
    """The settings in a YAML (.yaml, .yml) or TOML (.toml) file, each read in its own type.

    Keys are the flags' names (`-` and `_` are the same); a null counts as left out; relative paths are taken
    from the working directory, as in flags. Raises InputError for a file that cannot be read or parsed, an
    unknown key and a wrong value.
    """
    path = Path(path).expanduser()
    found: dict[str, Any] = {}
    for key, value in _parse_file(path).items():
        name = str(key).replace("-", "_")
        settings = accepted(config_class)
        if name in settings:
            name, value = meant(name, value)
        known = settings.get(name)
        if known is None:
            raise InputError(
                f"{path}: got the unknown key {str(key)!r}, expected the name of a flag without its dashes."
                f"{did_you_mean(name, config_class)}"
            )
        if value is not None:
            found[name] = known.read(value, label=f"{path}: {name}")
    return found


def _parse_file(path: Path) -> Mapping[Any, Any]:
    if path.suffix.lower() not in (".yaml", ".yml", ".toml"):
        raise InputError(f"{path}: got the ending {path.suffix!r}, expected a .yaml, .yml or .toml file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: got '{error.strerror}', expected a readable file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: got a byte at offset {error.start} that is no UTF-8, expected UTF-8: convert the file"
        ) from error
    parsed = _parse_toml(path, text) if path.suffix.lower() == ".toml" else _parse_yaml(path, text)
    if not isinstance(parsed, dict):
        raise InputError(
            f"{path}: got a {type(parsed).__name__} at the top, expected lines such as 'lora_r: 8'"
        )
    return parsed


def _parse_toml(path: Path, text: str) -> Any:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: got broken TOML ({error}), expected lines such as 'lora_r = 8'") from error


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        said = getattr(error, "problem", None) or str(error).splitlines()[0]
        message = f"{path}: got broken YAML{where} ({said}), expected lines such as 'lora_r: 8'"
        raise InputError(message) from error
    return {} if parsed is None else parsed
