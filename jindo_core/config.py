"""Every setting of `train` and `generate`: name, type, default, help and bounds, in one place.

The command line (`jindo_core.cli.flags`), config files and Python callers all meet here. A value is read by
its `Setting` (type, choices, bounds) when a config is made; what concerns several settings at once is checked
in `__post_init__`. Nothing heavy is imported, so that `--help` and a wrong value answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jindo_core.errors import InputError, nearest

# Defaults that depend on the job. `alpaca` (a base model is named) is alpaca-lora's finetune.py; `embedded`
# (none is named) is the main job on SmolLM2-135M, sized to end within five minutes on two CPU cores.
PROFILES: dict[str, dict[str, Any]] = {
    "alpaca": {
        "output_dir": "./lora-alpaca",
        "batch_size": 128,
        "micro_batch_size": 4,
        "num_epochs": 3.0,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "linear",
        "val_set_size": 2000,
        "lora_dropout": 0.05,
        "lora_target_modules": ("q_proj", "v_proj"),
        "train_on_inputs": True,
        "group_by_length": False,
        "prompt_template_name": "alpaca",
        "logging_steps": 10,
    },
    "embedded": {
        "output_dir": "./lora-korean",
        "batch_size": 4,
        "micro_batch_size": 4,
        "num_epochs": 1.0,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "val_set_size": 32,
        "lora_dropout": 0.0,  # one pass over the rows: nothing to overfit, and a tenth of the time saved
        "lora_target_modules": ("all-linear",),
        "train_on_inputs": False,
        "group_by_length": True,
        "prompt_template_name": "korean_short",
        "logging_steps": 1,
    },
}

# What other trainers call a setting, where the spelling alone would suggest a wrong one (`lr` is closest to
# `lora_r`) or none at all.
_SAID_ELSEWHERE = {
    "base_model": "model model_name model_name_or_path",
    "data_path": "data dataset train_file",
    "output_dir": "output",
    "overwrite_output_dir": "overwrite",
    "micro_batch_size": "per_device_train_batch_size",
    "learning_rate": "lr",
    "num_epochs": "epochs num_train_epochs",
    "lr_scheduler_type": "scheduler",
    "cutoff_len": "max_seq_len max_seq_length max_length",
    "prompt_template_name": "template prompt_template",
    "lora_r": "r rank",
    "lora_alpha": "alpha",
    "lora_target_modules": "target_modules",
    "lora_weights": "adapter",
    "instruction": "prompt",
}

_TRUE = frozenset({"true", "1", "yes", "on", "t", "y"})
_FALSE = frozenset({"false", "0", "no", "off", "f", "n"})

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_MODULE_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Setting:
    """What is known of one field of a config: enough to read a value, make a flag of it and explain it."""

    name: str
    kind: Literal["int", "float", "bool", "text", "names"]
    help: str
    group: str
    default: Any
    optional: bool = False
    choices: tuple[str, ...] = ()
    metavar: str = ""
    path: bool = False
    verbatim: bool = False
    empty_is_none: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def expected(self) -> str:
        """What a value of this setting may be, in words: `a whole number of at least 1`."""
        if self.choices:
            return " or ".join(self.choices) if len(self.choices) < 3 else "one of " + ", ".join(self.choices)
        if self.kind == "bool":
            return "True or False"
        if self.kind == "names":
            return "a list of module names such as q_proj,v_proj"
        if self.kind == "text":
            return "a path, not blank" if self.path else "text, not blank"
        bounds = [("of at least", self.at_least), ("above", self.above), ("at most", self.at_most)]
        said = [f"{word} {bound:g}" for word, bound in [*bounds, ("below", self.below)] if bound is not None]
        return " ".join(["a whole number" if self.kind == "int" else "a number", " and ".join(said)]).strip()

    def read(self, value: object, label: str | None = None) -> Any:
        """The value in this setting's own type, from text (a flag) or from a typed value (a file, Python).

        `label` names the value in messages; `--name` when left out. Raises InputError when the value is of
        another type, out of bounds or not among the choices.
        """
        if (value is None and self.optional) or (value == "" and self.empty_is_none):
            return None
        found = _READERS[self.kind](value)
        if found is None or not self._within(found):
            got = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
            example = f", for example {show(self.default)}" if self.kind in ("int", "float") else ""
            raise InputError(f"{label or '--' + self.name}: got {got}, expected {self.expected()}{example}")
        # The shell expands no ~ in --output_dir=~/x, and nobody does in a file.
        return os.path.expanduser(str(found)) if self.path else found

    def _within(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.kind not in ("int", "float"):
            return True
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def show(value: Any) -> str:
    """A setting's value as it would be typed after its flag."""
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _whole(value: object) -> int | None:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    # A string is read too where the value comes from YAML: PyYAML takes `1e-4` for a string.
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _boolean(value: object) -> bool | None:
    if isinstance(value, str):
        word = value.strip().lower()
        return True if word in _TRUE else False if word in _FALSE else None
    return value if isinstance(value, bool) else None


def _text(value: object) -> str | None:
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    return found if isinstance(found, str) and found.strip() else None


def _names(value: object) -> tuple[str, ...] | None:
    """`[q_proj,v_proj]`, `["q_proj", "v_proj"]`, `q_proj,v_proj`, `q_proj v_proj` or a list of strings."""
    if isinstance(value, str):
        text = value.strip()
        if text[:1] + text[-1:] in ("[]", "()"):
            text = text[1:-1]
        parts = [part.strip("'\"") for part in re.split(r"[,\s]+", text.strip()) if part]
    elif isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        parts = list(value)
    else:
        return None
    if not parts or not all(_MODULE_NAME.fullmatch(part) for part in parts):
        return None
    return tuple(dict.fromkeys(parts))


_READERS: dict[str, Callable[[object], Any]] = {
    "int": _whole,
    "float": _number,
    "bool": _boolean,
    "text": _text,
    "names": _names,
}


def _setting(default: Any, group: str, help: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **more})


def _profiled(name: str, group: str, help: str, **more: Any) -> Any:
    """A setting whose default is the profile's; a config made without a profile takes alpaca-lora's."""
    return _setting(PROFILES["alpaca"][name], group, help, **more)


_MODEL, _RUN, _DATA, _LORA = "model and files", "the run", "data and prompts", "LoRA"
_MEMORY, _LOGS, _SAMPLING = "memory and device", "logging", "sampling"
_SEED_LIMIT = 2**32 - 1  # numpy's; torch would take more


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of `jindo-core train`. Raises InputError when a value is wrong.

    The defaults below are the `alpaca` profile's. `resolve_train_config` picks the profile that fits.
    """

    base_model: str | None = _setting(
        None, _MODEL, "folder, .gguf file or Hub id; left out: SmolLM2-135M", path=True, metavar="MODEL"
    )
    data_path: str | None = _setting(
        None, _MODEL, "alpaca-format .json or .jsonl, or Hub id; left out: bundled", path=True, metavar="DATA"
    )
    output_dir: str = _profiled("output_dir", _MODEL, "for the adapter and logs", path=True, metavar="DIR")
    overwrite_output_dir: bool = _setting(False, _MODEL, "replace another run's output")

    batch_size: int = _profiled("batch_size", _RUN, "rows to one optimizer step", at_least=1)
    micro_batch_size: int = _profiled("micro_batch_size", _RUN, "rows on the device at once", at_least=1)
    num_epochs: float = _profiled("num_epochs", _RUN, "passes over the data", above=0)
    max_steps: int = _setting(-1, _RUN, "stop after so many steps (-1: no limit)", at_least=-1)
    learning_rate: float = _profiled("learning_rate", _RUN, "highest learning rate", above=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = _profiled(
        "lr_scheduler_type", _RUN, "linear, cosine or constant", metavar="NAME"
    )
    warmup_steps: int = _setting(100, _RUN, "warmup, at most a tenth of the run", at_least=0)
    weight_decay: float = _setting(0.0, _RUN, "AdamW's weight decay", at_least=0)
    max_grad_norm: float = _setting(1.0, _RUN, "clip the gradient's norm (0: off)", at_least=0)
    optim: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch"] = _setting(
        "paged_adamw_32bit", _RUN, "AdamW: paged (fp32 or 8-bit moments), or torch's", metavar="NAME"
    )
    seed: int = _setting(42, _RUN, "of split, order and LoRA", at_least=0, at_most=_SEED_LIMIT)

    cutoff_len: int = _setting(256, _DATA, "longest row in tokens", at_least=2)
    val_set_size: int = _profiled("val_set_size", _DATA, "rows held out (0: none)", at_least=0)
    train_on_inputs: bool = _profiled("train_on_inputs", _DATA, "count the prompt in the loss too")
    group_by_length: bool = _profiled("group_by_length", _DATA, "batch rows of similar length")
    prompt_template_name: str = _profiled(
        "prompt_template_name", _DATA, "a template's name or file", metavar="NAME"
    )

    lora_r: int = _setting(8, _LORA, "rank", at_least=1)
    lora_alpha: float = _setting(16.0, _LORA, "scale: alpha / r", above=0)
    lora_dropout: float = _setting(0.05, _LORA, "dropout before A", at_least=0, below=1)
    lora_target_modules: tuple[str, ...] = _profiled(
        "lora_target_modules", _LORA, "layers to adapt, or all-linear", metavar="A,B"
    )
    use_rslora: bool = _setting(False, _LORA, "scale by alpha / sqrt(r)")

    quantize: Literal["nf4", "none"] = _setting("nf4", _MEMORY, "how the base model is kept")
    double_quant: bool = _setting(True, _MEMORY, "quantize NF4's scales too")
    gradient_checkpointing: bool = _setting(False, _MEMORY, "less memory, a third more time")
    dtype: Literal["auto", "bf16", "fp32"] = _setting("auto", _MEMORY, "of the arithmetic")
    device: str = _setting("auto", _MEMORY, "auto, cpu, cuda or cuda:N", metavar="DEVICE")

    logging_steps: int = _profiled("logging_steps", _LOGS, "log every N steps", at_least=1)
    eval_steps: int = _setting(200, _LOGS, "held-out loss every N steps", at_least=1)

    def __post_init__(self) -> None:
        _read_fields(self)
        _check_device(self.device)
        if self.micro_batch_size > self.batch_size:
            raise InputError(
                f"--micro_batch_size: got {self.micro_batch_size}, expected at most --batch_size "
                f"({self.batch_size}): lower it, or raise --batch_size"
            )
        if self.max_steps == 0:
            raise InputError("--max_steps: got 0, expected a whole number above 0, or -1 for no limit")
        if "all-linear" in self.lora_target_modules and len(self.lora_target_modules) > 1:
            raise InputError(
                f"--lora_target_modules: got {show(self.lora_target_modules)}, expected all-linear alone or "
                "a list of names: leave all-linear out or the rest"
            )

    @property
    def accumulation_steps(self) -> int:
        """Micro batches to one optimizer step: batch_size // micro_batch_size, as alpaca-lora counts."""
        return self.batch_size // self.micro_batch_size


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The settings of `jindo-core generate`. Raises InputError when a value is wrong."""

    base_model: str | None = _setting(
        None,
        _MODEL,
        "folder, .gguf file or Hub id; left out: $BASE_MODEL, else the adapter's",
        path=True,
        metavar="MODEL",
    )
    lora_weights: str | None = _setting(
        None, _MODEL, "folder of a LoRA adapter in PEFT's format; left out: none", path=True, metavar="DIR"
    )
    instruction: str | None = _setting(
        None, "the request", "what to do; left out: read from standard input", verbatim=True, metavar="TEXT"
    )
    input: str | None = _setting(
        None,
        "the request",
        "what to do it with; left out: nothing",
        verbatim=True,
        empty_is_none=True,
        metavar="TEXT",
    )
    prompt_template_name: str | None = _setting(
        None, "the request", "a template's name or file; left out: the adapter's, else alpaca", metavar="NAME"
    )
    max_new_tokens: int = _setting(128, _SAMPLING, "longest answer in tokens", at_least=1)
    temperature: float = _setting(0.0, _SAMPLING, "0: always the likeliest token (greedy)", at_least=0)
    top_p: float = _setting(1.0, _SAMPLING, "sample from this share of the probability", above=0, at_most=1)
    top_k: int = _setting(0, _SAMPLING, "sample from the k likeliest tokens (0: all)", at_least=0)
    seed: int = _setting(42, _SAMPLING, "of the sampling", at_least=0, at_most=_SEED_LIMIT)
    stream: bool = _setting(True, _SAMPLING, "print the answer while it is written")

    quantize: Literal["nf4", "none"] = _setting("nf4", _MEMORY, "how the base model is kept")
    double_quant: bool = _setting(True, _MEMORY, "quantize NF4's scales too")
    dtype: Literal["auto", "bf16", "fp32"] = _setting("auto", _MEMORY, "of the arithmetic")
    device: str = _setting("auto", _MEMORY, "auto, cpu, cuda or cuda:N", metavar="DEVICE")

    def __post_init__(self) -> None:
        _read_fields(self)
        _check_device(self.device)
        for name in ("instruction", "input"):
            text = getattr(self, name)
            # Bytes on a command line that are no UTF-8 arrive as lone surrogates, which no tokenizer takes.
            if text is not None and not text.isascii() and re.search("[\ud800-\udfff]", text):
                raise InputError(f"--{name}: got bytes that are no UTF-8, expected text in UTF-8")


class Config(typing.Protocol):  # any dataclass whose fields are settings
    __dataclass_fields__: typing.ClassVar[dict[str, Any]]


def _read_fields(config: Config) -> None:
    for name, setting in settings(type(config)).items():
        object.__setattr__(config, name, setting.read(getattr(config, name)))


def _check_device(device: str) -> None:
    if not _DEVICE.fullmatch(device):
        raise InputError(f"--device: got {device!r}, expected auto, cpu, cuda or cuda:N such as cuda:0")


def settings(config_class: type[Config]) -> dict[str, Setting]:
    """The settings of a config class by name, in the order of its fields."""
    hints = typing.get_type_hints(config_class)
    return {
        field.name: _describe(field.name, hints[field.name], field.default, dict(field.metadata))
        for field in dataclasses.fields(config_class)
    }


def _describe(name: str, hint: Any, default: Any, metadata: dict[str, Any]) -> Setting:
    optional = isinstance(hint, types.UnionType) and types.NoneType in typing.get_args(hint)
    if optional:
        (hint,) = [part for part in typing.get_args(hint) if part is not types.NoneType]
    choices: tuple[str, ...] = ()
    kind: Any
    if typing.get_origin(hint) is Literal:
        choices, kind = typing.get_args(hint), "text"
    elif typing.get_origin(hint) is tuple:
        kind = "names"
    else:
        kind = {int: "int", float: "float", bool: "bool", str: "text"}[hint]
    metadata.setdefault("metavar", "|".join(choices) or {"int": "N", "float": "X"}.get(kind, "TEXT"))
    return Setting(name=name, kind=kind, default=default, optional=optional, choices=choices, **metadata)


def did_you_mean(name: str, config_class: type[Config], prefix: str = "") -> str:
    """`" Did you mean 'lora_r'?"` for a name that is no setting, or `""`; `prefix` goes before the name."""
    known = [prefix + known for known in settings(config_class)]
    meant = [prefix + setting for setting, names in _SAID_ELSEWHERE.items() if name in names.split()]
    return f" Did you mean '{meant[0]}'?" if meant and meant[0] in known else nearest(prefix + name, known)


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
        setting = settings(config_class).get(name)
        if setting is None:
            raise InputError(
                f"{path}: got the unknown key {str(key)!r}, expected the name of a flag without its dashes."
                f"{did_you_mean(name, config_class)}"
            )
        if value is not None:
            found[name] = setting.read(value, label=f"{path}: {name}")
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


def _read_given(given: Mapping[str, Any], config_class: type[Config]) -> dict[str, Any]:
    known = settings(config_class)
    for name in given:
        if name not in known:
            raise InputError(
                f"got the unknown setting {name!r}, expected one of {config_class.__name__}'s."
                f"{did_you_mean(name, config_class)}"
            )
    return {name: known[name].read(value) for name, value in given.items() if value is not None}


def resolve_train_config(given: Mapping[str, Any]) -> tuple[TrainConfig, frozenset[str]]:
    """The whole config from the settings that a person gave (flags over file), and the names of those.

    A named base model takes the `alpaca` profile's defaults, none the `embedded` one's. A None counts as not
    given. A default never contradicts what was given: of batch_size and micro_batch_size, the one left out
    gives way. Raises InputError for an unknown name or a wrong value.
    """
    explicit = _read_given(given, TrainConfig)
    values = {**PROFILES["alpaca" if "base_model" in explicit else "embedded"], **explicit}
    if "micro_batch_size" not in explicit:
        values["micro_batch_size"] = min(values["micro_batch_size"], values["batch_size"])
    elif "batch_size" not in explicit:
        values["batch_size"] = max(values["micro_batch_size"], values["batch_size"])
    return TrainConfig(**values), frozenset(explicit)


def resolve_generate_config(given: Mapping[str, Any]) -> GenerateConfig:
    """The config from the settings that a person gave. Raises InputError as `resolve_train_config` does."""
    return GenerateConfig(**_read_given(given, GenerateConfig))
